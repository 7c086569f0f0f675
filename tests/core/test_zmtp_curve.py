"""The handshake and the messages with keys, against whoever stands between or at an end."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.bindings import (
    crypto_box_afternm,
    crypto_box_beforenm,
    crypto_box_easy,
    crypto_box_easy_afternm,
    crypto_box_keypair,
    crypto_box_open_easy,
)

from zmqpush.core.zmtp import curve
from zmqpush.core.zmtp.connection import Connection
from zmqpush.core.zmtp.curve import CurveServer, Keys
from zmqpush.core.zmtp.errors import Fault
from zmqpush.core.zmtp.metadata import SocketType, encode
from zmtp_links import (
    CLIENT,
    GREETING_BYTES,
    LIMITS,
    OTHER,
    SERVER,
    Link,
    client,
    command,
    curve_link,
    frame,
    greeting,
    server,
)

NAMES = (b"HELLO", b"WELCOME", b"INITIATE", b"READY")
# Public keys that make a shared one known to all, as in libsodium's own list, and their
# other spellings.
P = 2**255 - 19
LOW_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    *((P + n).to_bytes(32, "little") for n in (-1, 0, 1)),
]
LOW_ORDER += [key[:31] + bytes((key[31] | 0x80,)) for key in LOW_ORDER]


def flipped(data, bit):
    """Return bytes with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def ready_link():
    """Return a link whose ends are ready."""
    link = curve_link().run()
    assert link.one.ready
    assert link.other.ready
    return link


def ends(link, direction):
    """Return who sends and who receives."""
    return (link.one, link.other) if direction == "to the server" else (link.other, link.one)


both_directions = pytest.mark.parametrize("direction", ["to the server", "to the client"])


@pytest.mark.parametrize("kind", list(SocketType))
def test_both_ends_of_each_type_shake_hands_and_talk(kind):
    one, other = client(kind), server(kind.peer)
    link = Link(one, other).run()
    assert (one.key, other.key) == (SERVER.public, CLIENT.public)
    link.send(one, [b"a"], [b""], [b"b" * 400, b"", b"c"]).send(other, [b"d"], [b"e" * 256])

    assert link.accepted == {one: [b"d", b"e" * 256], other: [b"a", b"", b"b" * 400, b"", b"c"]}


def test_commands_are_of_the_length_that_the_specification_says():
    sent = [data for _, data in curve_link().run().sent]
    commands = [data for data in sent if data[0] == 4]
    initiate = sent[-2]

    assert [data[3 : 3 + data[2]] for data in sent if data[0] == 4] == [
        *(b"HELLO", b"WELCOME", b"READY")
    ]
    assert [data[1] for data in commands] == [200, 168, 30 + len(encode(SocketType.ROUTER))]
    assert initiate[0] == 6
    assert int.from_bytes(initiate[1:9]) == 257 + len(encode(SocketType.DEALER))
    assert initiate[9:18] == b"\x08INITIATE"


def test_hello_is_padded_with_72_zeros_and_other_padding_is_refused():
    link = curve_link(change=lambda _, data: data.replace(bytes(72), b"\1" * 72))
    link.run()

    assert link.other.failure.fault is Fault.PROTOCOL
    hello = next(data for _, data in link.sent if b"HELLO" in data)
    assert hello[2:82] == b"\5HELLO\1\0" + bytes(72)


def test_one_counter_runs_through_all_commands_of_an_end():
    link = ready_link()
    link.send(link.one, [b"a"], [b"b", b"c"]).send(link.other, [b"d"])
    sent = b"".join(data for end, data in link.sent if end is link.one)
    hello = sent.index(b"HELLO") + 5 + 2 + 72 + 32
    initiate = sent.index(b"INITIATE") + 8 + 96
    messages = [n + 7 for n in range(len(sent)) if sent.startswith(b"MESSAGE", n)]

    assert [int.from_bytes(sent[at : at + 8]) for at in (hello, initiate, *messages)] == [
        *(1, 2, 3, 4, 5)
    ]
    other = b"".join(data for end, data in link.sent if end is link.other)
    at = [other.index(b"READY") + 5, other.index(b"MESSAGE") + 7]
    assert [int.from_bytes(other[n : n + 8]) for n in at] == [1, 2]


def test_a_message_goes_out_as_a_message_and_says_nothing_in_the_clear():
    link = ready_link()
    (data,) = link.one.encode_parts([b"secret", b"more"])

    assert data[:2] == bytes((0, 8 + 8 + 16 + 1 + 6))
    assert data[2:10] == b"\7MESSAGE"
    assert data[41] == 0  # the second part's flags
    assert b"secret" not in data


def test_two_connections_share_nothing():
    sent = [{data for _, data in curve_link().run().sent if data[0] in (4, 6)} for _ in range(2)]

    assert len(sent[0]) == 4
    assert not sent[0] & sent[1]
    messages = [b"".join(ready_link().one.encode_messages([b"x"])) for _ in range(2)]
    assert messages[0] != messages[1]


def test_keys_do_not_show_their_secret():
    for text in (repr(CLIENT), str(CLIENT), f"{CLIENT}", repr([CLIENT])):
        assert repr(CLIENT.public) in text
        assert repr(CLIENT.secret) not in text
    for it in (CurveServer(SERVER, bool), client(), server()):
        assert "secret" not in repr(it)


# Who stands between: handshakes.


def sizes():
    """Return the length of each command of a handshake."""
    commands = [data for _, data in curve_link().run().sent if data[0] in (4, 6)]
    return dict(zip(NAMES, map(len, commands), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_any_bit_of_a_handshake_that_is_flipped_lets_nobody_in(name):
    for bit in range(8 * sizes()[name]):

        def change(end, data, bit=bit):
            return flipped(data, bit) if data[:20].find(name) > 0 else data

        link = curve_link(change=change).run()
        receiver = link.one if name in (b"WELCOME", b"READY") else link.other
        assert not receiver.ready, bit
        assert not link.one.ready
        assert link.other.ready == (name == b"READY")
        if link.other.ready:
            link.send(link.other, [b"x"])
        # A longer command than was sent is waited for.
        assert receiver.failure or receiver.held, bit
        assert link.accepted[link.one] == link.accepted[link.other] == []


@both_directions
def test_any_bit_of_a_greeting_that_is_flipped_changes_nothing_or_ends_it(direction):
    changed_nothing = set()
    for bit in range(8 * GREETING_BYTES):
        passed = []

        def change(end, data, bit=bit, passed=passed):
            if end._mechanism.binds != (direction == "to the client"):
                return data
            at = 8 * sum(map(len, passed))
            passed.append(data)
            return flipped(data, bit - at) if at <= bit < at + 8 * len(data) else data

        link = curve_link(change=change)
        link.run()
        if link.one.ready and link.other.ready:
            link.send(link.one, [b"a"]).send(link.other, [b"b"])
            assert link.accepted == {link.one: [b"b"], link.other: [b"a"]}
            changed_nothing.add(bit // 8)
        else:
            assert link.one.failure or link.other.failure
            assert link.accepted == {link.one: [], link.other: []}

    # The padding, the versions from 3 on, as-server and the filler.
    assert changed_nothing == {*range(1, 9), 10, 11, *range(32, 64)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", [1, 5, 16])
def test_a_shorter_command_is_refused(name, cut):
    def change(_, data):
        if data[:20].find(name) < 0:
            return data
        body = data[9:] if data[0] & 2 else data[2:]
        return command(body[:-cut])

    link = curve_link(change=change).run()

    assert (link.one if name in (b"WELCOME", b"READY") else link.other).failure
    assert not link.one.ready


@pytest.mark.parametrize("name", NAMES)
def test_a_command_of_nothing_but_its_name_is_refused(name):
    def change(_, data):
        short = command(bytes((len(name),)) + name)
        return short if data[:20].find(name) > 0 else data

    link = curve_link(change=change).run()

    assert (link.one.failure or link.other.failure).fault is Fault.PROTOCOL
    assert not link.one.ready


# Who stands between: messages.


@both_directions
@pytest.mark.parametrize("parts", [[b"b"], [b"b" * 240], [b"b", b"c"]])
def test_any_bit_of_a_message_that_is_flipped_ends_the_connection(direction, parts):
    link = ready_link()
    sender, _ = ends(link, direction)
    size = len(b"".join(sender.encode_parts(parts)))
    for bit in range(8 * size):
        link = ready_link()
        sender, receiver = ends(link, direction)
        link.send(sender, [b"a"])
        link.pass_on(sender, flipped(b"".join(sender.encode_parts(parts)), bit))
        for _ in range(12):  # what a longer size would take for its own
            link.send(sender, [b"c" * 100])

        assert receiver.failure, bit
        assert link.accepted[receiver] == [b"a"], bit


@both_directions
def test_a_clear_flag_is_refused(direction):
    for flags in (1, 3, 4, 6):
        link = ready_link()
        sender, receiver = ends(link, direction)
        first, second = ([*sender.encode_messages([body])][1] for body in (b"a", b"b"))
        link.pass_on(sender, frame(first, flags & ~2, long=flags & 2) + frame(second))

        assert receiver.failure.fault is Fault.PROTOCOL
        assert link.accepted[receiver] == []


@both_directions
def test_a_clear_frame_after_the_handshake_is_refused(direction):
    for data in (frame(b"x"), frame(b"x" * 100), command(b"\4PING\0\0"), command(b"\5ERROR\0")):
        link = ready_link()
        sender, receiver = ends(link, direction)
        link.pass_on(sender, data)
        link.send(sender, [b"x"])

        assert receiver.failure.fault is Fault.PROTOCOL
        assert link.accepted[receiver] == []
        assert receiver.take_output() == b""


@both_directions
def test_a_message_that_comes_again_is_refused(direction):
    link = ready_link()
    sender, receiver = ends(link, direction)
    link.send(sender, [b"a"], [b"b"])
    for _, again in link.sent[-2:]:
        link.pass_on(sender, again)
    link.send(sender, [b"c"])

    assert link.accepted[receiver] == [b"a", b"b"]
    assert receiver.failure.fault is Fault.PROTOCOL


@both_directions
def test_messages_in_another_order_are_refused(direction):
    link = ready_link()
    sender, receiver = ends(link, direction)
    first, second = (b"".join(sender.encode_messages([body])) for body in (b"a", b"b"))
    link.pass_on(sender, second)
    link.pass_on(sender, first)

    assert link.accepted[receiver] == [b"b"]
    assert receiver.failure.fault is Fault.PROTOCOL


@both_directions
def test_a_message_is_refused_by_its_own_sender(direction):
    link = ready_link()
    sender, receiver = ends(link, direction)
    data = b"".join(sender.encode_messages([b"a"]))
    link.pass_on(receiver, data)

    assert link.accepted[sender] == []
    assert sender.failure.fault is Fault.PROTOCOL


@both_directions
def test_a_message_of_another_connection_is_refused(direction):
    one, two = ready_link(), ready_link()
    data = b"".join(ends(one, direction)[0].encode_messages([b"a"]))
    sender, receiver = ends(two, direction)
    two.pass_on(sender, data)

    assert two.accepted[receiver] == []
    assert receiver.failure.fault is Fault.PROTOCOL


@both_directions
def test_the_nonce_of_a_box_that_does_not_open_counts_for_nothing(direction):
    """The connection ends, but not because of a number that nobody has proven."""
    link = ready_link()
    sender, receiver = ends(link, direction)
    before = receiver._mechanism._last_nonce
    link.pass_on(sender, frame(b"\7MESSAGE" + b"\xff" * 8 + bytes(40)))

    assert receiver.failure.fault is Fault.PROTOCOL
    assert receiver._mechanism._last_nonce == before


@both_directions
def test_numbers_may_have_gaps_but_do_not_begin_again(direction):
    link = ready_link()
    sender, receiver = ends(link, direction)
    sender.encode_messages([b"lost"])
    link.send(sender, [b"a"])
    assert link.accepted[receiver] == [b"a"]
    mechanism = sender._mechanism

    def sealed(number, body):
        nonce = number.to_bytes(8)
        box = crypto_box_easy_afternm(body, mechanism._ours + nonce, mechanism._shared)
        return frame(b"\7MESSAGE" + nonce + box)

    link.pass_on(sender, sealed((1 << 64) - 1, b"\0last"))
    link.pass_on(sender, sealed(0, b"\0first"))
    assert link.accepted[receiver] == [b"a", b"last"]
    assert receiver.failure.fault is Fault.PROTOCOL


@both_directions
def test_other_flags_in_a_box_are_refused(direction):
    for flags in range(3, 256):
        link = ready_link()
        sender, receiver = ends(link, direction)
        link.send(sender, [b"a"])
        (body,) = sender._mechanism._seal([bytes((flags,))], [b"\4PING\0\0"])
        link.pass_on(sender, frame(body))

        assert link.accepted[receiver] == [b"a"]
        assert receiver.failure.fault is Fault.PROTOCOL


@both_directions
def test_a_ping_in_a_box_is_answered_in_a_box(direction):
    link = ready_link()
    sender, receiver = ends(link, direction)
    link.pass_on(sender, sender._mechanism.encode_command(b"\4PING\0\0ctx"))
    pong = receiver.take_output()
    body = bytes(pong[2:])
    mechanism = sender._mechanism
    flag, plain = mechanism._open(0, body, False)

    assert pong[0] == 0
    assert (flag, plain) == (4, b"\4PONGctx")


@both_directions
def test_a_box_without_flags_is_refused(direction):
    link = ready_link()
    sender, receiver = ends(link, direction)
    mechanism = sender._mechanism
    nonce = mechanism._next_nonces()
    box = crypto_box_easy_afternm(b"", mechanism._ours + nonce, mechanism._shared)
    link.pass_on(sender, frame(b"\7MESSAGE" + nonce + box))

    assert link.accepted[receiver] == []
    assert receiver.failure.fault is Fault.PROTOCOL


edits = st.tuples(
    st.sampled_from(["insert", "cut", "flip", "repeat", "swap", "drop"]),
    st.integers(0, 1 << 16),
    st.binary(min_size=1, max_size=40),
)


def edited(pieces, edits):
    """Return what arrives of pieces after some edits."""
    pieces = [*pieces]
    for name, number, data in edits:
        at = number % len(pieces)
        piece = pieces[at]
        where = number // len(pieces) % (len(piece) or 1)
        match name:
            case "insert":
                pieces[at] = piece[:where] + data + piece[where:]
            case "cut":
                pieces[at] = piece[:where] + piece[where + len(data) :]
            case "flip":
                pieces[at] = flipped(piece, number % (8 * len(piece))) if piece else piece
            case "repeat":
                pieces.insert(number // len(pieces) % len(pieces), piece)
            case "swap":
                pieces[at], pieces[at - 1] = pieces[at - 1], piece
            case "drop" if len(pieces) > 1:
                del pieces[at]
    return b"".join(pieces)


@both_directions
@given(edits=st.lists(edits, min_size=1, max_size=3))
def test_whoever_stands_between_can_take_out_parts_and_nothing_more(direction, edits):
    link = ready_link()
    sender, receiver = ends(link, direction)
    sent = [b"%d" % n * 20 for n in range(8)]
    pieces = [b"".join(sender.encode_messages([body])) for body in sent[:4]]
    pieces.append(b"".join(sender.encode_parts(sent[4:7])))
    pieces.append(b"".join(sender.encode_messages([sent[7]])))
    link.pass_on(sender, edited(pieces, edits))

    left = iter(sent)
    assert all(part in left for part in link.accepted[receiver])  # in order, each once


# Recorded handshakes.


@cache
def recorded():
    """Return what a client sent in a connection: greeting, HELLO, INITIATE, a message."""
    link = ready_link()
    link.send(link.one, [b"a record"])
    assert link.accepted[link.other] == [b"a record"]
    return b"".join(data for end, data in link.sent if end is link.one)


def test_a_recorded_connection_is_refused_by_the_same_server_and_after_a_restart():
    for _ in range(3):  # each connection has a state of its own, as has each process
        end = server(SocketType.ROUTER)

        assert end.receive(recorded()) == []
        assert not end.ready
        assert end.failure.fault is Fault.KEY


def test_a_cookie_of_another_connection_is_refused():
    """Even if it is the client itself that comes with it."""
    donor = curve_link()
    cookies = []

    def keep(end, data):
        if b"INITIATE" in data[:20]:
            at = data.index(b"INITIATE") + 8
            cookies.append(data[at : at + 96])
        return data

    donor._change = keep
    donor.run()

    def swap(end, data):
        if b"INITIATE" not in data[:20]:
            return data
        at = data.index(b"INITIATE") + 8
        return data[:at] + cookies[0] + data[at + 96 :]

    link = curve_link(change=swap).run()

    assert link.other.failure.fault is Fault.KEY
    assert not link.other.ready


def test_what_a_server_said_is_refused_by_another_client():
    link = ready_link()
    link.send(link.other, [b"an answer"])
    said = b"".join(data for end, data in link.sent if end is link.other)
    end = client(SocketType.DEALER)

    assert end.receive(said) == []
    assert end.failure.fault is Fault.KEY


# Who is at the other end.


def test_a_client_that_is_not_admitted_hears_nothing_but_the_end():
    asked = []
    one, other = client(keys=OTHER), server(admits=lambda key: asked.append(key) or False)
    link = Link(one, other).run()

    assert asked == [OTHER.public]
    assert other.failure.fault is Fault.NOT_ADMITTED
    assert not other.ready
    assert other.key is None
    assert [data[3:10] for end, data in link.sent if end is other][2:] == [b"WELCOME"]


def test_admission_comes_before_the_socket_type():
    one, other = client(SocketType.PULL, keys=OTHER), server()
    Link(one, other).run()

    assert other.failure.fault is Fault.NOT_ADMITTED


def test_an_error_while_admitting_admits_nobody():
    def fails(key):
        raise OSError("the list cannot be read")

    one, other = client(), server(admits=fails)
    link = Link(one, other).run()
    link.pass_on(one, b"more")

    assert other.failure.fault is Fault.INTERNAL
    assert not other.ready
    assert not one.ready


def test_a_client_with_another_key_of_the_server_is_refused_at_its_first_word():
    one, other = client(server=OTHER.public), server()
    Link(one, other).run()

    assert other.failure.fault is Fault.KEY
    assert not one.ready


def test_a_server_that_does_not_have_its_key_cannot_answer():
    """It answers as if it had opened HELLO."""
    one = client()
    one.receive(greeting(b"CURVE", as_server=1))
    one.take_output()
    one.receive(command(b"\7WELCOME" + bytes(160)))

    assert one.failure.fault is Fault.KEY


def test_two_clients_say_so():
    one, other = client(), client(SocketType.PULL, keys=OTHER)
    Link(one, other).run()

    assert str(other.failure).startswith("HELLO")
    assert other.failure.fault is Fault.PROTOCOL


def test_two_servers_wait_for_each_other():
    one, other = server(SocketType.PUSH), server()
    link = Link(one, other).run()

    for end in (one, other):
        assert not end.ready
        assert not end.failure
    assert len(link.sent) == 4


class Impostor:
    """A client that makes each command itself, and a server that it talks to."""

    def __init__(self, admits=lambda key: True):
        self.short = Keys(*crypto_box_keypair())  # C' and c'
        self.server = server(admits=admits)
        self.server.receive(greeting(b"CURVE"))
        self.server.take_output()

    def hello(self, *, public=None, nonce=1, version=b"\1\0", signed=bytes(64), key=None):
        short = bytes(nonce.to_bytes(8))
        secret = self.short.secret
        box = crypto_box_easy(signed, b"CurveZMQHELLO---" + short, key or SERVER.public, secret)
        public = self.short.public if public is None else public
        self.server.receive(command(b"\5HELLO" + version + bytes(72) + public + short + box))
        return self

    def welcome(self):
        """Take what the server has answered."""
        answer = self.server.take_output()
        nonce = b"WELCOME-" + answer[10:26]
        opened = crypto_box_open_easy(answer[26:], nonce, SERVER.public, self.short.secret)
        self.theirs, self.cookie = opened[:32], opened[32:]
        self.shared = crypto_box_beforenm(self.theirs, self.short.secret)
        return self

    def initiate(
        self, *, keys=CLIENT, public=None, nonce=2, vouched=None, claimed=None, metadata=None
    ):
        vouched = (self.short.public + SERVER.public) if vouched is None else vouched
        public = self.theirs if public is None else public
        vouch = crypto_box_easy(vouched, b"VOUCH---" + bytes(16), public, keys.secret)
        metadata = encode(SocketType.PUSH) if metadata is None else metadata
        body = (claimed or keys.public) + bytes(16) + vouch + metadata
        short = nonce.to_bytes(8)
        box = crypto_box_easy_afternm(body, b"CurveZMQINITIATE" + short, self.shared)
        self.server.receive(frame(b"\x08INITIATE" + self.cookie + short + box, 4))
        return self

    def message(self, nonce, body=b"x"):
        short = nonce.to_bytes(8)
        box = crypto_box_easy_afternm(b"\0" + body, b"CurveZMQMESSAGEC" + short, self.shared)
        return self.server.receive(frame(b"\7MESSAGE" + short + box))


def test_an_honest_client_made_by_hand_is_taken():
    it = Impostor(CLIENT.public.__eq__).hello().welcome().initiate()

    assert it.server.ready
    assert it.server.key == CLIENT.public
    assert it.message(3) == [b"x"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"signed": bytes(63) + b"\1"},
        {"signed": b""},
        {"key": OTHER.public},
        {"public": OTHER.public},
        {"version": b"\1\1"},
        {"version": b"\2\0"},
        {"nonce": 0},
    ],
)
def test_a_wrong_hello_is_refused(wrong):
    it = Impostor().hello(**wrong)

    assert it.server.failure.fault in (Fault.KEY, Fault.PROTOCOL)
    assert it.server.take_output() == b""


@pytest.mark.parametrize(
    "wrong",
    [
        {"vouched": OTHER.public + SERVER.public},  # C' of another connection
        {"vouched": bytes(32) + SERVER.public},
        {"public": SERVER.public},  # sealed for S, not for S'
        {"claimed": OTHER.public},  # another's key
        {"claimed": bytes(32)},
        {"claimed": SERVER.public},
    ],
)
def test_a_wrong_vouch_is_refused(wrong):
    asked = []
    it = Impostor(lambda key: asked.append(key) or True).hello().welcome().initiate(**wrong)

    assert it.server.failure.fault is Fault.KEY
    assert asked == []
    assert it.server.take_output() == b""
    assert it.message(3) == []


def test_a_vouch_for_another_server_is_refused():
    """A server that a client trusts cannot be that client to a second server."""
    it = Impostor().hello().welcome()
    it.initiate(vouched=it.short.public + OTHER.public)

    assert it.server.failure.fault is Fault.KEY


@pytest.mark.parametrize(("hello", "initiate"), [(1, 1), (5, 5), (5, 4), (9, 0)])
def test_the_numbers_of_a_handshake_rise(hello, initiate):
    it = Impostor().hello(nonce=hello).welcome().initiate(nonce=initiate)

    assert it.server.failure.fault is Fault.PROTOCOL


@pytest.mark.parametrize("nonce", [0, 1, 2])
def test_the_numbers_of_messages_go_on_from_the_handshake(nonce):
    it = Impostor().hello().welcome().initiate()

    assert it.message(nonce) == []
    assert it.server.failure.fault is Fault.PROTOCOL


@pytest.mark.parametrize("metadata", [b"", b"\1", encode(SocketType.PUSH) * 2])
def test_malformed_metadata_in_a_box_is_refused(metadata):
    it = Impostor().hello().welcome().initiate(metadata=metadata)

    assert it.server.failure.fault is Fault.PROTOCOL
    assert not it.server.ready


@pytest.mark.parametrize("key", LOW_ORDER)
def test_a_key_that_shares_no_secret_is_one_error_wherever_it_comes(key):
    text = "its keys do not fit ours"
    at_first = client(server=key)
    at_first.receive(greeting(b"CURVE"))
    assert (at_first.failure.fault, str(at_first.failure)) == (Fault.KEY, text)

    hello = Impostor().hello(public=key)
    assert (hello.server.failure.fault, str(hello.server.failure)) == (Fault.KEY, text)

    initiate = Impostor().hello().welcome().initiate(claimed=key)
    assert (initiate.server.failure.fault, str(initiate.server.failure)) == (Fault.KEY, text)

    one = client()
    one.receive(greeting(b"CURVE"))
    hello = one.take_output()[GREETING_BYTES + 2 :]
    welcome = crypto_box_easy(
        key + bytes(96), b"WELCOME-" + bytes(16), hello[80:112], SERVER.secret
    )
    one.receive(command(b"\7WELCOME" + bytes(16) + welcome))
    assert (one.failure.fault, str(one.failure)) == (Fault.KEY, text)
    assert one.take_output() == b""


def test_another_spelling_of_a_key_is_another_key():
    """X25519 ignores the highest bit, lists of keys do not."""
    spelled = CLIENT.public[:31] + bytes((CLIENT.public[31] ^ 0x80,))
    it = Impostor(CLIENT.public.__eq__).hello().welcome().initiate(claimed=spelled)

    assert it.server.failure.fault is Fault.NOT_ADMITTED
    short = Impostor()
    public = short.short.public
    short.hello(public=public[:31] + bytes((public[31] ^ 0x80,))).welcome().initiate()
    assert short.server.failure.fault is Fault.KEY


def test_an_error_of_a_server_is_a_hint():
    one = client()
    one.receive(greeting(b"CURVE") + command(b"\5ERROR\x03400"))

    assert one.failure.fault is Fault.REFUSED
    assert "400" in str(one.failure)


def test_nacl_of_the_boxes_is_the_one_of_the_specification():
    """The same box as of the function that NaCl itself has, whose padding is in the open."""
    link = ready_link()
    mechanism = link.one._mechanism
    (body,) = mechanism._seal([b"\0"], [b"text"])
    padded = crypto_box_afternm(b"\0text", b"CurveZMQMESSAGEC" + body[8:16], mechanism._shared)

    assert body == b"\7MESSAGE" + (3).to_bytes(8) + padded


def test_what_was_admitted_is_what_came_in_the_box():
    seen = []
    one = client()
    other = Connection(
        SocketType.PULL, CurveServer(SERVER, lambda key: seen.append(key) or True), LIMITS
    )
    Link(one, other).run()

    assert seen == [CLIENT.public]
    assert other.key == CLIENT.public


@pytest.mark.parametrize("batches_before", [0, 1])
@pytest.mark.parametrize("error", [MemoryError, ValueError])
def test_what_could_not_be_opened_is_never_taken_for_a_message(monkeypatch, batches_before, error):
    link = ready_link()
    bodies = [b"%d" % n for n in range((batches_before + 1) * curve.BATCH)]
    data = b"".join(link.one.encode_messages(bodies))
    calls = iter([curve.open_all] * batches_before)

    def fail(*args):
        if (call := next(calls, None)) is None:
            raise error
        return call(*args)

    monkeypatch.setattr(curve, "open_all", fail)
    taken = link.other.receive(data)

    assert taken == bodies[: batches_before * curve.BATCH]
    assert link.other.failure.fault is Fault.INTERNAL
