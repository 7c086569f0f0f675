"""Keys: ``zmqpush-keys``, the files that it makes, and those that others have made."""

import contextlib
import ctypes
import ctypes.util
import os
import re
import shutil
import stat
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
import zmq
import zmq.auth
from hypothesis import given, settings
from hypothesis import strategies as st
from zmq.utils import z85

from helpers import (
    BIN,
    NOBODY,
    PATIENCE,
    ZMQKEYS,
    ZMQPULL,
    ZMQPUSH,
    wait_until,
    wait_until_ready,
    words,
)
from manager import manager
from zmqpush.errors import KeyFileError
from zmqpush.security.allowlist import Admitted, editing, read_admitted
from zmqpush.security.keyfile import check_name, is_key, read_pair, read_public

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


def run(*command, **kwargs):
    """Run a command to its end."""
    return subprocess.run(words(*command), capture_output=True, timeout=PATIENCE, **kwargs)


def keys(*args, **kwargs):
    """Run ``zmqpush-keys``, which must succeed; return the lines that it prints."""
    done = run(ZMQKEYS, *args, **kwargs)
    assert (done.returncode, done.stderr) == (0, b""), done
    return done.stdout.decode().splitlines()


def refused(*args, **kwargs):
    """Run ``zmqpush-keys``, which must fail; return its exit code and the last line of why."""
    done = run(ZMQKEYS, *args, **kwargs)
    assert done.stdout == b""
    assert b"Traceback" not in done.stderr
    return done.returncode, done.stderr.decode().splitlines()[-1]


def new_key():
    return zmq.curve_keypair()[0].decode()


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def pair(tmp_path):
    """Return the file of a key pair."""
    keys("new", tmp_path / "web1")
    return tmp_path / "web1"


# Making a pair.


def test_a_new_pair_is_told_with_the_command_that_admits_it(tmp_path):
    told, command = keys("new", tmp_path / "web1")
    key, values = read_public(tmp_path / "web1")

    assert re.fullmatch(rf"{re.escape(key)} \([0-9a-f]{{4}}(:[0-9a-f]{{4}}){{3}}\)", told)
    assert command == f"zmqpush-keys allow LIST '{key}' --name web1"
    assert values == {"name": "web1"}
    assert read_pair(tmp_path / "web1").public == key
    assert keys("new", tmp_path / "x y", "--name", "a;b")[1].endswith(" --name 'a;b'")


def test_a_pair_is_never_written_over_another(pair):
    before = pair.read_bytes(), Path(f"{pair}_secret").read_bytes()

    assert refused("new", pair) == (78, f"zmqpush-keys: cannot write {pair}_secret: File exists")
    assert before == (pair.read_bytes(), Path(f"{pair}_secret").read_bytes())


@pytest.mark.parametrize("suffix", ["", "_secret"])
def test_a_pair_is_not_written_through_a_link_and_half_a_pair_is_not_left(tmp_path, suffix):
    (tmp_path / f"web1{suffix}").symlink_to(tmp_path / "elsewhere")
    code, why = refused("new", tmp_path / "web1")

    assert (code, "File exists" in why) == (78, True)
    assert [path.name for path in tmp_path.iterdir()] == [f"web1{suffix}"]


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed (Debian: strace)")
def test_a_secret_is_nobody_elses_from_its_first_moment(tmp_path):
    trace = ("strace", "-f", "-qq", "-o", tmp_path / "trace", "-e", "trace=openat,chmod,fchmod")
    done = run(*trace, ZMQKEYS, "new", tmp_path / "web1", umask=0)
    calls = (tmp_path / "trace").read_text()
    (opened,) = re.findall(r"openat\(.*web1_secret\".*\)", calls)

    assert done.returncode == 0, done
    assert re.search(r"O_CREAT\|O_EXCL.*, 0600\)", opened)
    assert "chmod" not in calls
    assert (mode(tmp_path / "web1_secret"), mode(tmp_path / "web1")) == (0o600, 0o644)


@pytest.mark.parametrize("name", ["two words", ""])
def test_a_name_that_is_none_is_refused_before_anything_is_written(tmp_path, name):
    for args in (
        ("new", tmp_path / "web1", "--name", name),
        ("allow", tmp_path / "list", new_key(), "--name", name),
        ("allow", tmp_path / "list", new_key(), "--host", name),
    ):
        code, why = refused(*args)
        assert (code, "is not a name: one has no blanks" in why) == (2, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tab\t", "quote'", 'quote"', "-x", "\x1b[2J", "\u2028", "\udcff"])
def test_a_name_that_would_be_taken_for_something_else_is_refused(name):
    for text in (name, new_key()):
        with pytest.raises(ValueError, match="is not a name"):
            check_name(text)


# What others make and read.


def test_pyzmq_reads_what_we_make(pair):
    ours = read_pair(pair)
    public, secret = zmq.auth.load_certificate(f"{pair}_secret")

    assert (public.decode(), secret.decode()) == (ours.public, ours.secret)
    assert zmq.auth.load_certificate(pair) == (public, None)


def test_a_pair_of_pyzmq_is_good_once_nobody_else_may_read_it(tmp_path):
    public, secret = map(Path, zmq.auth.create_certificates(tmp_path, "web1"))
    secret.chmod(0o644)
    why = f"others may read {secret}, a secret key: chmod 600 {secret}"
    with pytest.raises(KeyFileError, match=re.escape(why)):
        read_pair(public)
    secret.chmod(0o600)

    assert read_pair(public) == tuple(k.decode() for k in zmq.auth.load_certificate(secret))
    assert read_public(public)[0] == read_pair(public).public


@pytest.fixture
def czmq():
    """Return czmq's ``zcert``."""
    if not (name := ctypes.util.find_library("czmq")):
        pytest.skip("czmq is not installed (Debian: libczmq4)")
    library = ctypes.CDLL(name)
    library.zcert_new.restype = library.zcert_load.restype = ctypes.c_void_p
    library.zcert_public_txt.restype = library.zcert_secret_txt.restype = ctypes.c_char_p
    return library


def zcert_texts(czmq, certificate):
    """Return both keys of a ``zcert``."""
    texts = (czmq.zcert_public_txt(certificate), czmq.zcert_secret_txt(certificate))
    return tuple(text.decode() for text in texts)


def test_czmq_reads_what_we_make_and_we_read_what_it_makes(czmq, pair, tmp_path):
    loaded = ctypes.c_void_p(czmq.zcert_load(os.fsencode(pair)))
    made = ctypes.c_void_p(czmq.zcert_new())
    czmq.zcert_set_meta(made, b"name", b'Ada "A" Lovelace')
    czmq.zcert_set_meta(made, b"hosts", b"one two")
    store = tmp_path / "store"
    store.mkdir()
    assert czmq.zcert_save(made, os.fsencode(store / "ada")) == 0

    assert zcert_texts(czmq, loaded) == read_pair(pair)
    assert zcert_texts(czmq, made) == read_pair(store / "ada")
    admitted = {read_pair(store / "ada").public: Admitted('Ada "A" Lovelace', {"one", "two"})}
    assert read_admitted(store) == read_admitted(store / "ada") == admitted


# Whose secret it is.


@pytest.mark.parametrize("open_mode", [0o640, 0o604, 0o620, 0o601])
def test_a_secret_that_others_may_read_is_refused(pair, open_mode):
    Path(f"{pair}_secret").chmod(open_mode)

    with pytest.raises(KeyFileError, match="chmod 600"):
        read_pair(pair)


@needs_root
def test_a_secret_of_somebody_else_is_refused(pair):
    os.chown(f"{pair}_secret", 65534, -1)

    with pytest.raises(KeyFileError, match="belongs to somebody else"):
        read_pair(pair)


def test_keys_that_do_not_belong_together_are_refused(pair):
    path = Path(f"{pair}_secret")
    path.write_text(path.read_text().replace(read_pair(pair).public, new_key()))

    with pytest.raises(KeyFileError, match="do not belong together"):
        read_pair(pair)


def test_systemd_gives_a_service_its_keys_as_credentials(tmp_path):
    unit = (
        "[Service]\nDynamicUser=yes\nLogsDirectory=zmqpull\n"
        "LoadCredential=collector_secret:/var/lib/collector_secret\n"
        "LoadCredential=allowed:/var/lib/allowed\n"
        "ExecStart=/usr/local/bin/zmqpull --bind tcp://*:5014 --key %d/collector "
        "--allow %d/allowed --to /var/log/zmqpull/all\n"
    )
    with manager(tmp_path) as systemd:
        for name in ("collector", "web1"):
            keys("new", systemd.lib / name)
        keys("allow", systemd.lib / "allowed", systemd.lib / "web1")
        (tmp_path / "units/keyed.service").write_text(unit)
        systemd.run("systemctl", "daemon-reload")
        systemd.run("systemctl", "start", "keyed.service")
        push = "zmqpush --key /var/lib/web1 --server-key /var/lib/collector --timeout 60"
        systemd.run("sh", "-c", f"echo hello | {push} -c tcp://127.0.0.1:5014")
        arrived = systemd.log / "private/zmqpull/all"
        wait_until(lambda: arrived.exists() and b"hello" in arrived.read_bytes())

        assert not re.search(r"Uid:\s+0\b", systemd.status("keyed.service"))


def test_the_access_list_of_a_credential_is_no_right_of_others(pair, monkeypatch):
    # By which systemd lets a service read what belongs to root; it looks like a group's right.
    Path(f"{pair}_secret").chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(pair.parent))

    assert read_pair(pair).public == read_public(pair)[0]
    Path(f"{pair}_secret").chmod(0o444)
    with pytest.raises(KeyFileError, match="chmod 600"):
        read_pair(pair)


# Lists.


def test_a_key_is_admitted_changed_and_revoked(pair, tmp_path):
    key, path, other = read_public(pair)[0], tmp_path / "allowed", new_key()
    path.write_text(f"# ours\n\n{other} other # a comment\n")
    rest = path.read_text()
    told = keys("allow", path, pair, "--host", "b.example.com", "--host", "a.example.com")
    line = f"{key} web1 a.example.com b.example.com"

    assert path.read_text() == f"{rest}{line}\n"
    assert told[0].startswith("allowed ")
    assert told[0].endswith(f" {line}")
    assert "SIGHUP" in told[1]
    keys("allow", path, key, "--name", "web2")
    assert path.read_text() == f"{rest}{key} web2 a.example.com b.example.com\n"
    shown = keys("show", path, pair)
    assert [line.split()[1:3] for line in shown] == [[other, "other"], [key, "web2"], [key, "web1"]]
    assert "SIGHUP" in keys("revoke", path, "web2")[1]
    assert path.read_text() == rest
    keys("revoke", path, other)
    assert path.read_text() == "# ours\n\n"
    assert refused("revoke", path, pair) == (78, f"zmqpush-keys: '{pair}' is not in {path}")
    assert refused("revoke", path, "web2") == (78, f"zmqpush-keys: 'web2' is not in {path}")


def test_a_name_revokes_all_its_keys(tmp_path):
    one, two, other = new_key(), new_key(), new_key()
    keys("allow", tmp_path / "list", one, two, "--name", "web1")
    keys("allow", tmp_path / "list", other)
    keys("revoke", tmp_path / "list", "web1")

    assert read_admitted(tmp_path / "list").keys() == {other}


def test_a_list_can_be_a_directory(pair, tmp_path):
    key, path = read_public(pair)[0], tmp_path / "allowed"
    path.mkdir(mode=0o750)
    keys("allow", path, pair, "--host", "a.example.com")
    (path / "web1_secret").write_text("not looked at")
    (path / "web1~").write_text("nor this")
    expected = {key: Admitted("web1", frozenset({"a.example.com"}))}

    assert read_admitted(path) == expected
    assert zmq.auth.load_certificate(path / "web1") == (key.encode(), None)
    assert mode(path / "web1") == 0o640
    code, why = refused("allow", path, new_key(), "--name", "web1")
    assert (code, why.endswith("web1 is there, with another key")) == (78, True)
    assert refused("allow", path, new_key(), "--name", "../web2")[0] == 78
    keys("allow", path, key, "--name", "web2")
    assert read_admitted(path)[key].name == "web2"
    keys("revoke", path, pair)
    assert sorted(file.name for file in path.iterdir()) == ["web1_secret", "web1~"]


def test_a_list_keeps_its_owner_its_mode_and_its_link(tmp_path):
    path, link = tmp_path / "allowed", tmp_path / "link"
    keys("allow", path, new_key(), umask=0)
    assert mode(path) == 0o600
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
    before = path.stat()
    link.symlink_to("allowed")
    keys("allow", link, new_key(), umask=0)
    after = path.stat()

    assert len(read_admitted(path)) == 2
    assert link.is_symlink()
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )
    assert after.st_ino != before.st_ino


def test_whoever_reads_a_list_never_sees_half_of_it(tmp_path):
    path, stay = tmp_path / "list", {new_key(): Admitted(f"n{n}") for n in range(300)}
    comes_and_goes = new_key()
    with editing(path) as admitted:
        admitted.update(stay)
    wrong, ended, seen = [], threading.Event(), set()

    def read():
        while not ended.is_set():
            found = read_admitted(path)
            seen.add(comes_and_goes in found)
            if found.keys() - {comes_and_goes} != stay.keys():
                wrong.append(len(found))

    reader = threading.Thread(target=read)
    reader.start()
    turns = 0
    while turns < 20 or len(seen) < 2:
        turns += 1
        with editing(path) as admitted:
            admitted[comes_and_goes] = Admitted("x")
        with editing(path) as admitted:
            del admitted[comes_and_goes]
    ended.set()
    reader.join()

    assert wrong == []
    assert [file.name for file in tmp_path.iterdir()] == ["list"]


def test_who_edit_a_list_at_once_lose_nothing(start, tmp_path):
    added = [new_key() for _ in range(6)]
    children = [start(ZMQKEYS, "allow", tmp_path / "list", "--", key) for key in added]

    assert [child.wait(PATIENCE) for child in children] == [0] * 6
    assert read_admitted(tmp_path / "list").keys() == set(added)


NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20).filter(
    lambda text: not set(text) & set("\"'") and text[0] not in "-#"
)
KEYS = st.binary(min_size=32, max_size=32).map(lambda data: z85.encode(data).decode())
LISTS = st.dictionaries(KEYS, st.builds(Admitted, NAMES, st.frozensets(NAMES, max_size=3)))


@settings(max_examples=50)
@given(LISTS, LISTS, st.sets(st.integers(0, 5)))
def test_what_is_written_is_read_again(first, second, kept):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "list")
        path.write_text("# a comment\n")
        with editing(path) as admitted:
            admitted.update({check_name(a.name) and key: a for key, a in first.items()})
        assert read_admitted(path) == first
        kept_keys = {key: a for n, (key, a) in enumerate(first.items()) if n in kept}
        with editing(path) as admitted:
            admitted.clear()
            admitted.update(kept_keys | second)

        assert read_admitted(path) == kept_keys | second
        assert path.read_text().startswith("# a comment\n")


@given(st.binary(max_size=300) | st.text('#ab =\n\t"-\x1c', max_size=100).map(str.encode))
def test_any_bytes_are_a_list_or_an_error(data):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "list")
        path.write_bytes(data)
        with contextlib.suppress(KeyFileError):
            assert all(map(is_key, read_admitted(path)))


KEY = z85.encode(bytes(range(32))).decode()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"{KEY} one\n# x\n{KEY} two\n", "line 3 has the same key as LIST, line 1"),
        (f"# x\n{KEY[:-1]} one\n", "line 2: no public key, which has 40 characters of Z85"),
        ("%" * 40, "line 1: no public key"),  # too large a number
        (f"{KEY} a\x1b[2J\n", "line 1 has a name with control characters"),
        (b"\xff\n", "LIST is not text"),
        (f'public-key = "{KEY}"\nsecret-key = "{KEY}"\n', "LIST holds a secret key: it is no list"),
        (f'public-key = "{KEY}"\nhost = "web1"\n', "LIST says host: hosts is what restricts"),
    ],
)
def test_a_list_that_cannot_be_understood_names_the_line(tmp_path, text, why):
    path = tmp_path / "list"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())

    with pytest.raises(KeyFileError) as caught:
        read_admitted(path)
    assert why.replace("LIST", str(path)) in str(caught.value)
    assert refused("allow", path, new_key())[0] == 78


def test_a_comment_may_end_a_line(tmp_path):
    (tmp_path / "list").write_text(f"{KEY} web1 a.example # the web server\n")

    assert read_admitted(tmp_path / "list") == {KEY: Admitted("web1", frozenset(["a.example"]))}


def test_two_files_of_a_list_may_not_have_the_same_key(pair, tmp_path):
    (tmp_path / "list").mkdir()
    for name in ("a", "b"):
        shutil.copy(pair, tmp_path / "list" / name)

    with pytest.raises(KeyFileError, match=r"list/b has the same key as .*list/a"):
        read_admitted(tmp_path / "list")


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "directory of a directory"])
def test_what_has_no_end_or_no_beginning_is_no_file_with_keys(pair, tmp_path, kind):
    path = Path(kind)
    if kind == "fifo":
        os.mkfifo(path := tmp_path / "fifo")
    elif not path.exists():
        (path := tmp_path / "list" / "x").mkdir(parents=True)
    listed = path.parent if path.is_dir() else path
    done = run(ZMQPULL, "--bind", "tcp://127.0.0.1:*", "--key", pair, "--allow", listed)

    assert done.returncode == 78
    assert re.search(rb"zmqpull: .*(is not a regular file|Is a directory)\n", done.stderr)
    if not path.is_dir():
        assert run(ZMQPUSH, "-c", NOBODY, "--key", path, "--server-key", KEY).returncode == 78


# Keys on the command line.


def test_the_printed_command_can_be_pasted_whatever_the_key_begins_with(pair, tmp_path):
    first = {}
    while len(first) < 83:  # a key begins with any digit of Z85 but # and $
        key = new_key()
        first.setdefault(key[0], key)
    special = {char: key for char, key in first.items() if not char.isalnum()}
    known, command = read_public(pair)[0], keys("new", tmp_path / "x")[1]
    command = command.replace(read_public(tmp_path / "x")[0], special["-"]).replace("LIST", "list")
    others = " ".join(f"'{key}'" for key in special.values())
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    shell = {"cwd": tmp_path, "env": environment}
    done = run("bash", "-c", f"{command} && zmqpush-keys show list", **shell)
    assert done.stdout.decode().endswith(f"{special['-']} x\n")
    done = run("bash", "-c", f"zmqpush-keys allow list {others} --name x", **shell)

    assert (done.returncode, done.stderr) == (0, b"")
    assert len(special) == 21
    assert read_admitted(tmp_path / "list").keys() == set(special.values())
    dash = special["-"]
    done = run("bash", "-c", f"zmqpush-keys revoke list '{dash}' {pair} || true", **shell)
    assert f"'{pair}' is not in list" in done.stderr.decode()
    done = run("bash", "-c", f"zmqpush-keys revoke list '{dash}' && echo gone", **shell)
    assert done.stdout.endswith(b"gone\n")
    ship = f"zmqpush --timeout 0 -c {NOBODY} --key {pair} --server-key '{dash}' </dev/null"
    assert run("bash", "-c", ship, **shell).returncode == 0
    assert known not in read_admitted(tmp_path / "list")


# What nobody is to see.


def test_a_secret_is_never_shown(pair, start, tmp_path):
    secret_file, path = Path(f"{pair}_secret"), tmp_path / "list"
    secret = read_pair(pair).secret
    leaky = {
        "value": f'secret-key="{secret}"\n',
        "quoted": f'"{secret}"\n',
        "long": f"{secret}x\n",
    }
    for name, text in leaky.items():
        (tmp_path / name).write_text(text)
    shutil.copy(secret_file, tmp_path / "open")
    (tmp_path / "open").chmod(0o644)
    broken = tmp_path / "broken"
    broken.write_text(secret_file.read_text().replace(read_pair(pair).public, new_key()))
    broken.chmod(0o600)
    push = (ZMQPUSH, "-c", NOBODY, "--timeout", 0)
    pull = (ZMQPULL, "--bind", "tcp://127.0.0.1:*", "--key", pair)
    commands = [
        *((program, "--help") for program in (ZMQPUSH, ZMQPULL, ZMQKEYS)),
        *((*push, "--key", bad, "--server-key", pair) for bad in (broken, tmp_path / "open")),
        (*push, "--key", pair, "--server-key", tmp_path / "value"),
        *((*pull, "--allow", tmp_path / name) for name in leaky),
        *((ZMQPULL, "--config", tmp_path / name) for name in ("value", secret_file)),
        *((ZMQKEYS, "allow", tmp_path / name, pair) for name in leaky),
        (ZMQKEYS, "allow", path, *(tmp_path / name for name in leaky)),
        (ZMQKEYS, "new", pair),
        (ZMQKEYS, "show", secret_file),
        (ZMQKEYS, "allow", path, secret_file, "--name", "x"),
        (ZMQKEYS, "revoke", path, secret_file),
    ]
    outputs = [run(*command) for command in commands]
    running = [
        start(*push[:-1], 60, "--key", pair, "--server-key", KEY),
        start(*pull, "--allow", "any"),
    ]
    for child in running:
        wait_until_ready(child)
    seen = [proc(child, name) for child in running for name in ("cmdline", "environ")]

    assert any(b"zmqpush" in text for text in seen)
    assert [o.args for o in outputs if secret.encode() in o.stdout + o.stderr] == []
    assert not any(secret.encode() in text for text in seen)
    assert secret not in repr(read_pair(pair))


def proc(child, name):
    return Path(f"/proc/{child.pid}/{name}").read_bytes()


def test_nothing_that_the_programs_make_is_open_to_others(pair, start, tmp_path):
    made = tmp_path / "made"
    made.mkdir(mode=0o700)
    ship = (ZMQPUSH, "-q", "--timeout", 0, "--spool", made / "spool")
    for line in (b"one\n", b"two\n"):
        run(*ship, "-c", NOBODY, input=line, umask=0)
    segment = min(made.glob("spool/0/*.seg2"))
    data = bytearray(segment.read_bytes())
    data[-2] ^= 1
    segment.write_bytes(data)
    keys("allow", made / "list", pair, umask=0)
    pull = start(
        *(ZMQPULL, "--ack-bind", "tcp://127.0.0.1:*", "--state", made / "state"),
        *("--to", made / "{type}" / "{host}", "--key", pair, "--allow", made / "list"),
        *("--bind", f"ipc://{made}/socket"),
        umask=0,
    )
    port = re.search(rb"tcp://127.0.0.1:\d+", pull.stderr.readline())[0].decode()
    args = ("--key", pair, "--server-key", pair, "--timeout", 60, "-c", port, "app")
    run(ZMQPUSH, "-q", "--spool", made / "spool", *args, input=b"three\n", umask=0)
    assert mode(made / "socket") & 0o007 == 0
    pull.terminate()
    assert pull.wait(PATIENCE) == 0
    found = {path.relative_to(made): mode(path) for path in made.rglob("*")}

    assert {path: oct(bits) for path, bits in found.items() if bits & 0o007} == {}
    assert {"spool", "state", "list", "app"} <= {path.parts[0] for path in found}
    assert len(list(made.glob("spool/0/damaged/*"))) == 1
    assert len(list(made.glob("app/*"))) == 1
