"""A real systemd, in namespaces of its own, that runs our units as they are."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import BIN, PATIENCE, ZMQPULL, ZMQPUSH, wait_until

CONTRIB = Path(__file__).parent.parent / "contrib" / "systemd"
SYSTEMD = "/lib/systemd/systemd"
MACHINE = "cd" * 16
# It sees no units but these and ours, so it starts nothing of the machine's.
TARGETS = ("sysinit", "basic", "sockets", "network-online", "multi-user", "shutdown")
# What is mounted is seen inside only. A Python that lies in root's home is made reachable.
INSIDE = """
set -e
mount --make-rprivate /
for path in var/lib var/log usr/local/bin etc/passwd etc/group etc/machine-id etc/zmqpush \
    dev/console; do
    [ ! -e "/$path" ] || mount --bind "$here/$path" "/$path"
done
mount -t tmpfs tmpfs /run
mount --bind -o ro /proc/sys /proc/sys
umount --lazy --recursive /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
if [ "$homes" ]; then
    mkdir "$here/homes"
    mount -t tmpfs tmpfs "$here/homes"
    for path in $homes; do
        mkdir -p "$here/homes$path"
        mount --bind "$path" "$here/homes$path"
    done
    mount --rbind "$here/homes/root" /root
fi
ip link set lo up
mount --make-rshared /  # systemd mounts credentials in a namespace aside, and has them seen here
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_LOG_TARGET=console \
    SYSTEMD_UNIT_PATH="$here/units" SYSTEMD_GENERATOR_PATH=/nowhere \
    "$systemd" --system --unit=multi-user.target
"""


class Manager:
    """
    The running systemd.

    Args:
        pid: Its process, as seen from outside.
        here: Holds what is ``/var`` inside.

    """

    def __init__(self, pid: int, here: Path) -> None:
        self._pid = pid
        self.lib = here / "var" / "lib"
        self.log = here / "var" / "log"

    def _run(self, command: tuple[str, ...]) -> subprocess.CompletedProcess[bytes]:
        enter = ["nsenter", "-t", str(self._pid), "-m", "-p", "-n", "-C"]
        return subprocess.run([*enter, *command], capture_output=True, timeout=PATIENCE)

    def succeeds(self, *command: str) -> bool:
        """Run a command inside; return whether it exits with 0."""
        return self._run(command).returncode == 0

    def run(self, *command: str) -> str:
        """Run a command inside; return what it prints."""
        done = self._run(command)
        assert done.returncode == 0, done
        return done.stdout.decode()

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--value", "-p", name, unit).strip()

    def status(self, unit: str) -> str:
        """Return what the kernel says of the main process of a service."""
        return self.run("cat", f"/proc/{self.show(unit, 'MainPID')}/status")

    def signal(self, number: signal.Signals, unit: str) -> None:
        """Send a signal to the main process of a service."""
        self.run("systemctl", "kill", "--kill-who=main", f"--signal={number.name}", unit)


def _cgroup() -> Path | None:
    """Return a new cgroup, if one can be made."""
    own = re.search(r"^0::(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    for line in Path("/proc/mounts").read_text().splitlines():
        _, path, kind, *_ = line.split()
        if own and kind == "cgroup2":
            with contextlib.suppress(OSError):
                cgroup = Path(f"{path}{own[1]}") / f"zmqpush-test-{os.getpid()}"
                cgroup.mkdir()
                return cgroup
    return None


def _remove(cgroup: Path) -> bool:
    try:
        for path, _, _ in os.walk(cgroup, topdown=False):
            os.rmdir(path)
    except OSError:
        return False  # a process is still about to end
    return True


def _furnish(here: Path) -> None:
    for name in ("var/lib", "var/log", "etc/zmqpush", "dev", "units/service.d"):
        (here / name).mkdir(parents=True)
    (here / "dev/console").touch()
    (here / "etc/machine-id").write_text(f"{MACHINE}\n")
    for name in ("passwd", "group"):
        shutil.copy(f"/etc/{name}", here / "etc")
    users = [str(CONTRIB / "zmqpull.sysusers")]
    subprocess.run(["systemd-sysusers", f"--root={here}", *users], check=True, capture_output=True)
    programs = here / "usr/local/bin"
    shutil.copytree("/usr/local/bin", programs, symlinks=True)
    for program in (ZMQPUSH, ZMQPULL):
        (programs / Path(program).name).symlink_to(program)
    shutil.copy(CONTRIB / "zmqpush-journal", programs)
    for unit in (*CONTRIB.glob("*.service"), *CONTRIB.glob("*.socket")):
        shutil.copy(unit, here / "units")
    drop_in = here / "units/zmqpull.service.d"
    drop_in.mkdir()
    (drop_in / "insecure.conf").write_text("[Service]\nEnvironment=ZMQPULL_INSECURE=yes\n")
    for target in TARGETS:
        text = f"[Unit]\nDescription={target}\nDefaultDependencies=no\n"
        (here / f"units/{target}.target").write_text(text)


@contextlib.contextmanager
def manager(here: Path) -> Iterator[Manager]:
    """Start it; skip the test where that is impossible."""
    if not Path(SYSTEMD).exists() or not shutil.which("ip"):
        pytest.skip("systemd and ip are needed: packages systemd and iproute2")
    probe = ["unshare", "--pid", "--fork", "--mount", "--cgroup", "--net", "true"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("namespaces cannot be made here: that takes root")
    cgroup = _cgroup()
    if cgroup is None:
        pytest.skip("a cgroup (version 2) cannot be made here")
    _furnish(here)
    ours = {sys.base_prefix, str(BIN.parent)}
    homes = [path for path in ours if path.startswith("/root/")]
    if homes:
        (here / "units/service.d/home.conf").write_text("[Service]\nProtectHome=no\n")
    # Each unit has a /tmp of its own; what it runs may lie in ours.
    temporary = [path for path in ours if path.startswith(("/tmp/", "/var/tmp/"))]
    seen = "".join(f"BindReadOnlyPaths={path}\n" for path in temporary)
    (here / "units/service.d/temporary.conf").write_text(f"[Service]\n{seen}")
    variables = {"here": str(here), "homes": " ".join(homes), "systemd": SYSTEMD}
    unshare = "unshare --pid --fork --kill-child --mount --cgroup --net --uts --ipc --mount-proc"
    command = f'echo 0 >{cgroup}/cgroup.procs && exec {unshare} sh -c "$inside"'
    with open(here / "log", "wb") as log:
        child = subprocess.Popen(
            ["sh", "-c", command],
            env=os.environ | variables | {"inside": INSIDE},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
        wait_until(lambda: child.poll() is not None or children.read_text())
        assert child.poll() is None, (here / "log").read_text()
        started = Manager(int(children.read_text()), here)
        is_up = ("systemctl", "is-active", "--quiet", "multi-user.target")
        wait_until(lambda: child.poll() is not None or started.succeeds(*is_up))
        assert child.poll() is None, (here / "log").read_text()
        yield started
    finally:
        child.send_signal(signal.SIGKILL)  # and with it all processes inside
        child.wait()
        wait_until(lambda: _remove(cgroup))
