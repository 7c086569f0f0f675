"""Both state machines of acknowledged delivery, row by row of ``docs/protocol.md``."""

import itertools
import json
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqpush.core.protocol import receiver
from zmqpush.core.protocol.messages import (
    DROPPED,
    MAX_CREDIT_BLOCKS,
    MAX_SEQ,
    Ack,
    Data,
    Error,
    Goodbye,
    Hello,
    Labels,
    Ping,
    Reset,
    Skip,
    Welcome,
    decode,
    encode,
    public_name,
)
from zmqpush.core.protocol.receiver import FORMER, Floor, Progress, Receiver
from zmqpush.core.protocol.sender import Redial, Sender
from zmqpush.core.records.encode import Payload
from zmqpush.sender.unacked_queue import UnackedQueue
from zmqpush.settings import WhenFull

RUN, OTHER_RUN = "aa" * 16, "bb" * 16
SECRET, OTHER_SECRET = "cd" * 16, "ef" * 16
STREAM, OTHER_STREAM = public_name(SECRET), public_name(OTHER_SECRET)
LABELS = Labels("t", "h")
SESSION = 7
KEY = ("anonymous", STREAM)


def block(first, records=1, payload=None):
    return Data.of(first, records, payload or b"x\n" * records)


# The sender.


class Sending:
    """A sender with its queue, greeted if ``session`` is given; what it sends is decoded."""

    def __init__(self, blocks=0, session=SESSION, random=0.0, recovered=0, store=None):
        self.store = store or UnackedQueue(1 << 30, WhenFull.BLOCK, LABELS)
        self.store.recovered = recovered
        self.sender = Sender(self.store, RUN, 2, lambda: random)
        self.put(blocks)
        self.sender.connect(0)
        if session:
            self.send(0)
            self.welcome(0, session)

    def put(self, blocks, payload=b"x\n"):
        for _ in range(blocks):
            self.store.put(Payload(payload, payload.count(b"\n")))

    def welcome(self, now, number=SESSION, asked=True, **values):
        """Answer a HELLO; if there was but one, it was answered before the next was sent."""
        self.sender._unanswered = max(self.sender._unanswered, int(asked))
        defaults = {
            "version": 2,
            "stream": public_name(self.store.secret),
            "type": "t",
            "host": "h",
            "raw": False,
            "session": f"{number:016x}",
            "acked": 0,
            "run": RUN,
            "blocks": 256,
            "bytes": 1 << 20,
            "ping": 5.0,
            "durability": "disk",
        }
        return self.receive(Welcome(defaults | values), now, number)

    def receive(self, message, now, session=SESSION):
        return self.sender.receive(encode(message, session), now)

    def send(self, now):
        """Return what it wants to send now, without sessions."""
        return [message for message, _ in self.send_with_sessions(now)]

    def send_with_sessions(self, now):
        frames = iter(lambda: self.sender.next_frame(now), None)
        return [decode(frame) for frame in frames]

    @property
    def waiting(self):
        """Return the numbers that are not acknowledged."""
        return list(range(self.store.first, self.store.first + self.store.records))


def is_hello(messages):
    return [type(message) for message in messages] == [Hello]


def test_a_new_socket_begins_with_a_hello():
    it = Sending(blocks=2, session=None)
    ((hello, session),) = it.send_with_sessions(0)

    assert session == 0
    assert hello.values == {
        "versions": [2, 2],
        "secret": it.store.secret,
        "run": RUN,
        "first": 1,
        "spooled": False,
        "type": "t",
        "host": "h",
        "raw": False,
    }
    assert not it.sender.streaming


def test_the_hello_of_the_longest_labels_is_understood():
    labels = Labels("\x01" * 256, "\U0001f600" * 256, raw=True)
    store = UnackedQueue(1, WhenFull.BLOCK, labels)
    store.was = "ab" * 16
    sender = Sender(store, RUN)
    sender.connect(0)
    receiver = Receiving()
    receiver.receiver.receive(b"peer", sender.next_frame(0), 0)

    assert [type(message) for message, _ in receiver.replies()] == [Welcome]


def test_a_hello_without_an_answer_is_sent_again_after_two_seconds():
    it = Sending(session=None, random=1.0)

    assert is_hello(it.send(0))
    assert it.sender.deadline(0) == 2
    assert it.send(1.9) == []
    assert is_hello(it.send(2))


def test_without_an_answer_patience_doubles_up_to_ten_seconds_and_begins_anew_with_a_session():
    it = Sending(session=None)
    now = 0.0
    for patience in (2, 4, 8, 10, 10):
        assert it.sender.tick(now + patience - 0.1) is None
        now += patience
        assert it.sender.tick(now) == Redial(0, "no answer")
        it.sender.connect(now)
    it.welcome(now)
    it.sender.disconnected(now)
    assert it.sender.tick(now + 1.9) is None
    assert it.sender.tick(now + 2) == Redial(0, "no answer")


@pytest.mark.parametrize(("random", "patience"), [(0.0, 2.0), (1.0, 3.0)])
def test_patience_is_up_to_half_longer_at_random(random, patience):
    it = Sending(session=None, random=random)
    it.send(0)

    assert it.sender.deadline(0) == min(patience, 2)
    assert it.sender.tick(patience - 0.1) is None
    assert it.sender.tick(patience)


def test_a_welcome_begins_a_session_at_what_is_not_acknowledged():
    it = Sending(blocks=5, session=None, recovered=5)
    it.send(0)
    it.welcome(0, acked=2, run=OTHER_RUN)

    assert it.sender.streaming
    assert it.send_with_sessions(0) == [(block(n), SESSION) for n in (3, 4, 5)]
    it.put(1)
    assert it.send(0) == [block(6)]


def test_a_second_welcome_begins_a_new_session_that_has_everything_again():
    it = Sending(blocks=3)
    it.send(0)
    it.welcome(0, 8, acked=1)

    assert it.send_with_sessions(0) == [(block(2), 8), (block(3), 8)]
    assert it.receive(Ack(3, 9, 9), 0) is None  # of the older one
    assert it.waiting == [2, 3]


@pytest.mark.parametrize(
    ("recovered", "run", "acked", "renamed"),
    [
        (5, OTHER_RUN, 5, False),  # an earlier run of ours
        (5, OTHER_RUN, 6, True),
        (5, "", 6, True),
        (0, OTHER_RUN, 0, False),
        (0, OTHER_RUN, 1, True),
        (0, RUN, 3, False),  # we have sent three
        (0, RUN, 4, True),
        (5, RUN, 5, False),
        (5, RUN, 6, True),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_stream_gets_a_new_name_if_somebody_else_used_its_numbers(
    recovered, run, acked, renamed, streaming
):
    it = Sending(blocks=3, recovered=recovered)
    it.send(0)
    it.put(5)
    secret = it.store.secret
    if not streaming:
        it.sender.disconnected(0)
        it.send(0)
    it.welcome(0, 9, run=run, acked=acked)

    assert (it.store.secret != secret) == renamed
    assert it.sender.streaming != renamed
    if renamed:
        assert it.waiting == list(range(1, 9))  # nothing counts as delivered
        (hello,) = it.send(now := it.sender.deadline(0))
        assert (hello.values["secret"], hello.values["first"]) == (it.store.secret, 1)
        assert it.sender.tick(now + 0.9) is None


def test_a_welcome_for_the_name_that_a_stream_had_before_is_ignored():
    it = Sending(blocks=1, session=None)
    it.send(0)
    former = it.store.secret
    it.welcome(0, acked=9, run=OTHER_RUN)
    secret = it.store.secret
    it.welcome(0, 8, acked=9, run=OTHER_RUN, stream=public_name(former))

    assert it.store.secret == secret != former
    assert not it.sender.streaming


@pytest.mark.parametrize(
    "wrong",
    [
        *({key: None} for key in ("version", "stream", "session", "acked", "run")),
        *({key: None} for key in ("blocks", "bytes", "ping")),
        {"version": 1},
        {"type": "other"},
        {"host": ""},
        {"raw": True},
        {"stream": OTHER_STREAM},
        {"stream": 1},
        {"session": "0" * 16},
        {"session": "7"},
        {"session": "-" + "7" * 15},
        {"session": 7},
        {"acked": -1},
        {"acked": MAX_SEQ + 1},
        {"acked": 0.0},
        {"acked": True},
        {"acked": "0"},
        {"run": 7},
        {"blocks": -1},
        {"blocks": 10**30},
        {"bytes": MAX_SEQ + 1},
        {"ping": 0.9},
        {"ping": 3601},
        {"ping": float("nan")},
        {"ping": float("inf")},
        {"ping": 10**400},
        {"ping": "5"},
        {"ping": True},
    ],
)
def test_a_welcome_that_is_out_of_bounds_is_ignored(wrong):
    it = Sending(blocks=1, session=None)
    it.send(0)
    it.welcome(0, **wrong)

    assert not it.sender.streaming
    assert it.waiting == [1]


@pytest.mark.parametrize("missing", ["version", "stream", "session", "acked", "run", "ping", "raw"])
def test_a_welcome_that_lacks_something_is_ignored(missing):
    it = Sending(session=None)
    values = {
        "version": 2,
        "stream": public_name(it.store.secret),
        "session": "7" * 16,
        "run": "",
        "acked": 0,
    }
    values |= {"blocks": 1, "bytes": 1, "ping": 1, **LABELS._asdict()}
    it.send(0)
    it.receive(Welcome({k: v for k, v in values.items() if k != missing}), 0)
    assert not it.sender.streaming

    it.receive(Welcome(values | {"unknown": "key"}), 0)
    assert it.sender.streaming


def test_blocks_are_sent_within_the_credit():
    it = Sending(blocks=5)
    it.welcome(0, blocks=2)

    assert it.send(0) == [block(1), block(2)]
    it.receive(Ack(1, 2, 1000), 0)
    assert it.waiting == [2, 3, 4, 5]
    assert it.send(0) == [block(3)]


def test_the_last_block_may_go_over_the_credit_in_bytes():
    it = Sending(blocks=5)
    it.welcome(0, bytes=3)

    assert it.send(0) == [block(1), block(2)]  # two bytes each
    it.receive(Ack(1, 9, 4), 0)
    assert it.send(0) == [block(3)]


def test_credit_may_shrink_below_what_is_in_flight_and_down_to_nothing():
    it = Sending(blocks=5)
    it.welcome(0, blocks=4)
    assert len(it.send(0)) == 4
    it.receive(Ack(1, 2, 1000), 0)
    assert it.send(0) == []  # three in flight
    it.receive(Ack(4, 0, 1000), 0)
    assert it.send(0) == []
    it.receive(Ack(4, 1, 0), 0)
    assert it.send(0) == []
    it.receive(Ack(4, 1, 1), 0)

    assert it.send(0) == [block(5)]


def test_no_receiver_can_grant_more_than_the_link_has_room_for():
    it = Sending(blocks=300)
    it.welcome(0, blocks=MAX_SEQ, bytes=MAX_SEQ)
    assert len(it.send(0)) == MAX_CREDIT_BLOCKS
    it.receive(Ack(0, (1 << 32) - 1, (1 << 64) - 1), 0)

    assert it.send(0) == []


def test_a_skip_counts_as_a_block_of_no_bytes():
    it = Sending(store=UnackedQueue(600, WhenFull.DROP_OLDEST, LABELS))
    it.put(3)  # there is room for two
    it.welcome(0, blocks=2, bytes=1)

    assert it.send(0) == [Skip(1, 1, DROPPED), block(2)]


@pytest.mark.parametrize("acked", [3, 1000, MAX_SEQ])
def test_an_ack_of_what_was_not_sent_acknowledges_no_more_than_is_in_flight(acked):
    it = Sending(blocks=5)
    it.welcome(0, blocks=3)
    it.send(0)
    it.receive(Ack(acked, 0, 0), 0)

    assert it.waiting == [4, 5]


def test_an_ack_that_is_old_or_within_a_block_acknowledges_whole_blocks_only():
    it = Sending()
    it.put(2, b"x\n" * 3)
    it.send(0)
    it.receive(Ack(2, 9, 9), 0)
    assert it.store.first == 1
    it.receive(Ack(3, 9, 9), 0)
    it.receive(Ack(1, 9, 9), 0)

    assert it.store.first == 4


def test_silence_is_asked_about_after_the_ping_interval_and_again_after_it():
    it = Sending()
    it.welcome(0, ping=3.0)

    assert it.sender.deadline(0) == 3
    assert it.send(2.9) == []
    assert it.send(3) == [Ping(0)]
    assert it.sender.deadline(3) == 6
    it.receive(Ack(0, 9, 9), 3.1)
    assert it.send(6) == []
    assert it.send(6.1) == [Ping(0)]


def test_with_something_in_flight_silence_is_asked_about_each_second():
    it = Sending()
    it.put(2)
    assert it.send(4) == [block(1), block(2)]

    assert it.sender.deadline(4) == 5
    assert it.send(4.9) == []
    assert it.send(5) == [Ping(2)]
    assert it.send(5.9) == []
    assert it.send(6) == [Ping(2)]
    it.receive(Ack(2, 9, 9), 6.1)
    assert it.send(7.2) == []


def test_after_three_ping_intervals_of_silence_the_receiver_is_given_up():
    it = Sending(blocks=1)
    it.welcome(0, ping=2.0)
    it.receive(Ack(0, 9, 9), 1)

    assert it.sender.tick(6.9) is None
    it.send(6.9)
    assert it.sender.deadline(6.9) == 7
    assert it.sender.tick(7) == Redial(0, "no sign of life")


def test_frames_that_mean_nothing_are_no_sign_of_life():
    it = Sending(blocks=1)
    for frame in (b"", b"garbage", encode(Ack(1, 1, 1), 8), encode(block(1), SESSION)):
        assert it.sender.receive(frame, 14) is None

    assert it.waiting == [1]
    assert it.sender.tick(15)


@pytest.mark.parametrize("how", ["reset", "disconnected"])
def test_a_session_that_ends_is_followed_by_a_hello_and_everything_again(how):
    it = Sending(blocks=3)
    it.send(0)
    it.receive(Ack(1, 9, 9), 0)
    if how == "reset":
        assert it.receive(Reset(412, "a gap"), 20) is None
    else:
        it.sender.disconnected(20)

    assert not it.sender.streaming
    (hello,) = it.send(20)
    assert hello.values["first"] == 2
    assert it.sender.tick(21.9) is None
    assert it.sender.tick(22) == Redial(0, "no answer")
    it.welcome(22, 8, acked=2)
    assert it.send(22) == [block(3)]


def test_a_new_connection_is_greeted_at_once():
    it = Sending(session=None, random=1.0)
    it.send(0)
    it.sender.disconnected(1)

    assert it.sender.deadline(1) == 3  # when its patience ends: there is no connection
    assert is_hello(it.send(1))


# What a receiver may answer to a HELLO again and again, without ever taking anything.
IN_VAIN = {
    "begun and ended": (Goodbye(), {}),
    "begun and reset": (Reset(404, "who?"), {}),
    "begun and cut": (None, {}),
    "reset": (Reset(404, "who?"), None),
    "a stream of somebody else": (None, {"acked": MAX_SEQ, "run": OTHER_RUN}),
}


def try_in_vain(it, now, answer, values):
    """Answer a HELLO; return when the sender may say the next one."""
    assert is_hello(it.send(now)[:1])
    session = 0
    if values is not None:
        it.welcome(now, session := 9, **values)
        it.send(now)
    redial = it.receive(answer, now, session if it.sender.streaming else 0) if answer else None
    it.sender.disconnected(now)
    if redial:
        it.sender.connect(now + redial.delay)
    it.sender._give_up_at = 1e9  # this is about answers
    return it.sender._hello_at


@pytest.mark.parametrize("how", IN_VAIN)
@pytest.mark.parametrize("random", [0.0, 1.0])
def test_who_answers_in_vain_is_asked_ever_more_rarely(how, random):
    it = Sending(blocks=3, session=None, random=random)
    times = [0.0]
    for _ in range(9):
        times.append(try_in_vain(it, times[-1], *IN_VAIN[how]))
    pauses = [after - before for before, after in itertools.pairwise(times)]

    assert pauses == [p * (1 + random / 2) for p in (0, 1, 2, 4, 8, 10, 10, 10, 10)]
    assert it.store.first == 1


@pytest.mark.parametrize("acked", ["in a session", "by its WELCOME"])
def test_what_is_acknowledged_makes_it_ask_at_once_again(acked):
    it = Sending(blocks=3, session=None)
    now = 0.0
    for _ in range(4):
        now = try_in_vain(it, now, Reset(404, ""), {})
    it.send(now)
    it.welcome(now, 9, acked=1 if acked == "by its WELCOME" else 0)
    it.send(now)
    if acked == "in a session":
        it.receive(Ack(1, 9, 9), now, 9)
    it.receive(Reset(404, ""), now, 9)

    assert is_hello(it.send(now))
    assert it.waiting == [2, 3]


def test_a_session_that_lasted_is_followed_by_the_next_at_once():
    """An idle stream has nothing acknowledged, and is not in vain for that."""
    it = Sending(session=None)
    now = 0.0
    for number in range(9):
        assert is_hello(it.send(now))
        it.welcome(now, number + 1)
        now += 15
        redial = it.receive(Goodbye(), now, number + 1)
        assert redial == Redial(0, "it ends")
        it.sender.connect(now)


def test_a_welcome_that_answers_no_hello_is_ignored():
    it = Sending(blocks=3)
    assert it.send(0) == [block(1), block(2), block(3)]
    it.welcome(0, 8, asked=False)

    assert it.send(0) == []  # nothing is sent again
    it.receive(Ack(3, 9, 9), 0)
    assert it.waiting == []


def test_resets_that_answer_the_greeting_do_not_prolong_it():
    it = Sending(session=None)
    for now in (0.0, 0.5, 1.0, 1.5, 1.9):
        it.send(now)
        it.receive(Reset(404, "who?"), now, 0)

    assert it.sender.tick(2)


def test_a_goodbye_closes_the_socket_and_nothing_is_forgotten():
    it = Sending(blocks=1)
    it.send(0)

    assert it.receive(Goodbye(), 0) == Redial(0, "it ends")
    assert it.waiting == [1]


@pytest.mark.parametrize("session", [None, SESSION])
def test_an_error_closes_the_socket_for_half_a_minute(session):
    it = Sending(session=session)

    redial = it.receive(Error(505, "no"), 0, session or 0)
    advice = "this sender speaks version 2: upgrade the older one"
    assert redial == Redial(30, f"it refuses: no (505); {advice}", refused=True)


@pytest.mark.parametrize("message", [Reset(404, ""), Error(505, ""), Goodbye(), Ack(1, 0, 0)])
@pytest.mark.parametrize("session", [0, 8])
def test_frames_of_another_session_are_ignored(message, session):
    it = Sending(blocks=1)
    it.send(0)

    assert it.receive(message, 0, session) is None
    assert it.sender.streaming
    assert it.waiting == [1]


@pytest.mark.parametrize("message", [Goodbye(), Ack(1, 1, 1), Ping(), block(1), Hello({})])
def test_a_greeting_is_answered_by_nothing_else(message):
    it = Sending(blocks=1, session=None)

    assert it.receive(message, 0, 0) is None
    assert it.waiting == [1]
    assert is_hello(it.send(0))


def test_the_last_frame_is_a_goodbye_if_there_is_a_session():
    assert Sending(session=None).sender.goodbye() is None
    assert decode(Sending().sender.goodbye()) == (Goodbye(), SESSION)


# Labels.


class Runs(UnackedQueue):
    """A queue whose first block is number 1, and whose blocks have the labels of their runs."""

    def __init__(self, *labels):
        super().__init__(1 << 30, WhenFull.BLOCK, LABELS)
        self.of_blocks = labels

    @property
    def next_labels(self):
        if self._taken == len(self._blocks):
            return None
        return self.of_blocks[self._blocks[self._taken].first - 1]


OTHER_LABELS = Labels("t", "h", raw=True)


def labels_of(message):
    return Labels(*(message.values[key] for key in Labels._fields))


def test_other_labels_are_announced_when_nothing_is_in_flight():
    it = Sending(blocks=4, session=None, store=Runs(LABELS, LABELS, OTHER_LABELS, LABELS))
    (hello,) = it.send(0)
    assert labels_of(hello) == LABELS
    it.welcome(0)
    assert it.send(0) == [block(1), block(2)]
    it.receive(Ack(1, 256, 1000), 0)
    assert it.send(0) == []
    it.receive(Ack(2, 256, 1000), 0)
    (hello,) = it.send(0)
    assert (labels_of(hello), hello.values["first"]) == (OTHER_LABELS, 3)
    assert not it.sender.streaming
    it.welcome(0, 8, acked=2, raw=True)
    assert it.send(0) == [block(3)]
    it.receive(Ack(3, 256, 1000), 0, 8)
    assert labels_of(*it.send(0)) == LABELS


def test_a_sender_with_nothing_to_send_has_no_labels_to_announce():
    it = Sending(blocks=1, session=None, store=Runs(OTHER_LABELS))
    it.send(0)
    it.welcome(0, raw=True)
    assert it.send(0) == [block(1)]
    it.receive(Ack(1, 256, 1000), 0)

    assert it.send(0) == []
    assert it.sender.streaming


def test_a_hello_without_a_block_has_the_labels_of_the_run():
    assert labels_of(*Sending(session=None, store=Runs()).send(0)) == LABELS


def test_labels_that_a_welcome_makes_the_next_ones_are_announced_before_anything_is_sent():
    it = Sending(blocks=2, session=None, recovered=2, store=Runs(OTHER_LABELS, LABELS))
    assert labels_of(*it.send(0)) == OTHER_LABELS
    it.welcome(0, acked=1, raw=True)

    assert labels_of(*it.send(0)) == LABELS


@pytest.mark.parametrize("lost", [False, True])
def test_a_late_welcome_for_other_labels_misfiles_nothing(lost):
    """A HELLO that was answered twice, and the one after it is lost or on its way."""
    it = Sending(blocks=2, session=None, store=Runs(LABELS, OTHER_LABELS))
    it.send(0)
    it.welcome(0)
    assert it.send(0) == [block(1)]
    it.receive(Ack(1, 256, 1000), 0)
    assert labels_of(*it.send(0)) == OTHER_LABELS
    it.welcome(0, 8, acked=1)
    assert it.send(0) == []
    if not lost:
        it.welcome(0, 9, acked=1, raw=True)
        assert it.send(0) == [block(2)]
    else:
        assert labels_of(*it.send(2)) == OTHER_LABELS


def test_equal_labels_of_several_runs_cost_no_greeting():
    it = Sending(blocks=2, store=Runs(LABELS, Labels(*LABELS)))

    assert it.send(0) == [block(1), block(2)]


def test_the_name_under_version_1_is_said_until_the_stream_gets_a_new_secret():
    store = UnackedQueue(1, WhenFull.BLOCK, LABELS)
    store.was = OTHER_SECRET
    (hello,) = Sending(session=None, store=store).send(0)
    assert hello.values["was"] == OTHER_SECRET


# The receiver.


class Receiving:
    """A receiver, and what it answers."""

    def __init__(self, floors=None, memory=1 << 20):
        self.receiver = Receiver(floors or {}, memory, "disk", itertools.count(1).__next__)

    def say(self, message, session=0, now=0.0, peer=b"peer", principal="anonymous"):
        """Return the block for the sink."""
        return self.receiver.receive(peer, encode(message, session), now, principal)

    def replies(self, peer=None):
        return [
            decode(frame)
            for whom, frame in self.receiver.take_replies()
            if peer is None or whom == peer
        ]

    def ask(self, message, session=0, **kwargs):
        """Say something and return the messages that answer all that was said."""
        self.say(message, session, **kwargs)
        return [message for message, _ in self.replies()]

    def greet(self, now=0.0, peer=b"peer", principal="anonymous", **values):
        """Return what WELCOME says, and its session."""
        self.say(hello(**values), 0, now, peer, principal)
        replies = self.replies(peer)
        ((welcome, session),) = [reply for reply in replies if isinstance(reply[0], Welcome)]
        assert welcome.values["session"] == f"{session:016x}"
        return welcome.values, session

    def commit(self):
        moved = self.receiver.take_accepted()
        self.receiver.committed(moved)
        return moved

    def ends(self, session, **kwargs):
        """Return whether a session has ended, as a PING tells."""
        answer = self.ask(Ping(), session, **kwargs)
        return [type(message) for message in answer] == [Reset]


def hello(**values):
    return Hello({"versions": [2, 2], "secret": SECRET, "run": RUN, "first": 1} | values)


def test_a_hello_is_welcomed():
    values, _ = Receiving({KEY: Floor(4, OTHER_RUN)}).greet()

    assert values == {
        "version": 2,
        "stream": STREAM,
        "session": "0000000000000001",
        "acked": 4,
        "run": OTHER_RUN,
        "blocks": 256,
        "bytes": 256 << 10,
        "ping": 5.0,
        "durability": "disk",
        "type": "",
        "host": "",
        "raw": False,
    }


def test_an_unknown_stream_begins_at_nothing():
    values, _ = Receiving().greet()

    assert (values["acked"], values["run"]) == (0, "")


def test_streams_of_the_same_name_belong_to_their_principals():
    it = Receiving({("someone", STREAM): Floor(4, RUN)})

    assert it.greet()[0]["acked"] == 0
    assert it.greet(peer=b"other", principal="someone")[0]["acked"] == 4


def test_a_hello_without_a_common_version_is_an_error():
    it = Receiving()

    for versions in ([3, 4], [1, 1], [3, 2]):
        (error,) = it.ask(Hello({"versions": versions, "stream": "of another kind"}))
        assert (type(error), error.code) == (Error, 505)
    assert it.greet(versions=[0, 9])
    assert it.greet(unknown="key")


@pytest.mark.parametrize(
    "wrong",
    [
        *({key: None} for key in ("versions", "secret", "run", "first", "spooled")),
        *({key: None} for key in ("type", "host", "raw", "was")),
        {"versions": [1]},
        {"versions": [1.0, 1]},
        {"versions": [True, 1]},
        {"secret": SECRET.upper()},
        {"secret": SECRET + "0"},
        {"was": 0},
        {"was": "ab"},
        {"raw": 1},
        {"run": "g" * 32},
        {"first": 0},
        {"first": MAX_SEQ + 1},
        {"first": True},
        {"first": 1.0},
        {"type": "x" * 257},
        {"host": 1},
        {"spooled": 1},
    ],
)
def test_a_malformed_hello_is_counted_and_leaves_nothing_behind(wrong):
    it = Receiving()

    assert it.ask(hello(**wrong)) == []
    assert it.receiver.counters.malformed == 1
    assert (it.receiver.sessions, it.receiver._streams) == (0, {})


def test_the_labels_of_a_sender_come_with_its_blocks():
    it = Receiving()
    _, session = it.greet(type="t" * 256, host="h", raw=True)

    arrival = it.say(block(1), session)
    assert arrival[1:] == ({"type": "t" * 256, "host": "h"}, block(1), True)
    assert arrival.raw is True


@pytest.mark.parametrize("raw", [False, True])
def test_a_sender_says_whether_its_lines_are_raw(raw):
    it = Receiving()
    _, session = it.greet(raw=raw)

    assert it.say(block(1), session).raw == raw


def test_blocks_are_accepted_in_order_and_acknowledged_when_the_sink_holds_them():
    it = Receiving()
    _, session = it.greet()

    assert it.say(block(1, 2), session).block == block(1, 2)
    assert it.say(block(3), session).block == block(3)
    assert it.replies() == []
    moved = it.receiver.take_accepted()
    assert moved == [Progress(KEY, Floor(3, RUN))]
    assert it.say(block(4), session).block == block(4)
    assert it.replies() == []
    it.receiver.committed(moved)
    ((ack, answered),) = it.replies()
    assert (ack.acked, ack.credit_blocks, answered) == (3, 256, session)
    assert it.commit() == [Progress(KEY, Floor(4, RUN))]
    assert it.receiver.take_accepted() == []
    assert it.receiver.counters.accepted == 4


def test_several_reasons_for_an_ack_make_one():
    it = Receiving()
    _, session = it.greet()
    for message in (block(1), block(1), Ping(), Ping(1)):
        it.say(message, session)
    it.commit()

    assert [type(message) for message, _ in it.replies()] == [Ack]


def test_what_came_before_is_acknowledged_and_counted_and_not_for_the_sink():
    it = Receiving({KEY: Floor(4, OTHER_RUN)})
    _, session = it.greet()

    assert it.say(block(1, 3), session) is None
    assert it.say(block(4), session) is None
    assert it.say(Skip(2, 2, DROPPED), session) is None
    ((ack, _),) = it.replies()
    assert ack.acked == 4
    assert it.receiver.counters.duplicates == 4
    assert it.receiver.take_accepted() == []
    assert it.greet()[0]["run"] == OTHER_RUN  # nothing was accepted of this run


@pytest.mark.parametrize(
    "message",
    [block(6), block(4, 2), block(3, 9), block(MAX_SEQ), Skip(6, 1, DROPPED), Skip(9, 9, DROPPED)],
)
def test_a_gap_or_an_overlap_resets_the_session(message):
    it = Receiving({KEY: Floor(4, RUN)})
    _, session = it.greet()

    (reset,) = it.ask(message, session)
    assert (type(reset), reset.code) == (Reset, 412)
    assert it.ends(session)
    assert it.greet()[0]["acked"] == 4


@pytest.mark.parametrize("first", [1, 5, 3])
def test_a_skip_moves_the_end_and_is_committed_like_a_block(first):
    it = Receiving({KEY: Floor(4, OTHER_RUN)})
    _, session = it.greet()

    assert it.say(Skip(first, 10 - first, DROPPED), session) is None
    assert it.commit() == [Progress(KEY, Floor(9, RUN))]
    assert it.replies()[0][0].acked == 9
    assert it.receiver.counters.skipped == 5
    assert it.say(block(10), session)


def test_a_ping_is_answered_with_what_the_sink_holds():
    it = Receiving()
    _, session = it.greet()
    it.say(block(1), session)

    assert it.ask(Ping(1), session) == [Ack(0, 256, 1 << 20)]


def test_a_ping_tells_of_a_block_that_was_lost_on_the_way():
    it = Receiving()
    _, session = it.greet()
    it.say(block(1), session)

    (reset,) = it.ask(Ping(2), session)
    assert reset.code == 412
    assert it.ends(session)


def test_frames_of_no_session_are_answered_with_a_reset():
    it = Receiving()
    for message in (block(1), Skip(1, 1, DROPPED), Ping()):
        (reset,) = it.ask(message, 99)
        assert reset.code == 404

    assert it.ask(Goodbye(), 99) == []
    assert it.receiver.counters.resets == 3


def test_frames_of_another_peers_session_are_answered_with_a_reset():
    it = Receiving()
    _, session = it.greet()

    assert it.ask(block(1), session, peer=b"thief")[0].code == 404
    assert it.say(block(1), session)


def test_frames_that_only_receivers_send_and_unknown_ones_are_counted():
    it = Receiving()
    _, session = it.greet()
    for message in (Ack(1, 1, 1), Welcome({}), Reset(404, ""), Error(505, "")):
        assert it.ask(message, session) == []
    unknown = bytearray(encode(Ping(), session))
    unknown[3] = 99
    it.receiver.receive(b"peer", bytes(unknown), 0)

    assert it.receiver.counters.malformed == 5
    assert not it.ends(session)


def test_a_malformed_frame_resets_the_session_that_it_belongs_to():
    it = Receiving()
    _, session = it.greet()
    damaged = block(1)._replace(crc=0)

    assert it.ask(damaged, 99) == []
    assert it.ask(damaged, session, peer=b"other") == []
    assert it.ask(damaged, session)[0].code == 400
    assert it.ends(session)
    assert it.receiver.counters.malformed == 3


def test_what_must_be_understood_and_is_not_is_an_error():
    it = Receiving()
    _, session = it.greet()
    for at, value in ((2, 1), (4, 0x80), (3, 99)):
        frame = bytearray(encode(Ping(), session))
        frame[at] = value
        if at == 3:
            frame[4] = 0x80
        if at == 4:
            frame[5] = 1
        it.receiver.receive(b"peer", bytes(frame), 0)

    assert [(e.code, s) for e, s in it.replies()] == [(505, session)] * 3
    assert not it.ends(session)


def test_a_newer_session_of_the_stream_ends_the_older_one():
    it = Receiving()
    _, older = it.greet(peer=b"older")
    _, newer = it.greet(peer=b"newer")

    assert it.ask(block(1), older, peer=b"older")[0].code == 404
    assert it.say(block(1), newer, peer=b"newer")
    assert it.receiver.sessions == 1


def test_a_newer_session_of_the_peer_ends_the_older_one():
    it = Receiving()
    _, older = it.greet()
    _, newer = it.greet(secret=OTHER_SECRET)

    assert it.ends(older)
    assert not it.ends(newer)
    assert it.receiver.sessions == 1


def test_a_hello_waits_until_the_sink_holds_what_came_in_the_older_session():
    it = Receiving()
    _, session = it.greet()
    it.say(block(1), session)
    moved = it.receiver.take_accepted()
    it.say(block(2), session)

    assert it.ask(hello(run=OTHER_RUN), peer=b"first") == []
    assert it.ask(hello(run=OTHER_RUN), peer=b"second") == []
    assert it.ask(block(3), session)[0].code == 404
    it.receiver.committed(moved)
    assert it.replies() == []
    it.commit()
    ((peer, frame),) = it.receiver.take_replies()
    values = decode(frame)[0].values
    assert (peer, values["acked"], values["run"]) == (b"second", 2, RUN)


def test_a_session_that_had_to_wait_long_does_not_end_at_once():
    it = Receiving()
    _, session = it.greet()
    it.say(block(1), session)
    it.say(hello(), now=1.0, peer=b"new")
    it.receiver.tick(40)
    it.commit()
    it.receiver.tick(45)

    assert it.receiver.sessions == 1


def test_what_was_acknowledged_elsewhere_is_passed_over_and_counted_if_the_stream_is_known():
    it = Receiving({KEY: Floor(4, OTHER_RUN)})
    values, session = it.greet(first=10)

    assert (values["acked"], values["run"]) == (9, RUN)
    assert it.receiver.counters.missing == 5
    assert it.say(block(10), session)
    assert it.commit() == [Progress(KEY, Floor(10, RUN))]
    values, _ = it.greet(secret=OTHER_SECRET, first=MAX_SEQ)
    assert values["acked"] == MAX_SEQ - 1
    assert it.receiver.counters.missing == 5


def test_the_credit_of_blocks_is_a_bound_until_they_are_committed(monkeypatch):
    monkeypatch.setattr(receiver, "MAX_CREDIT_BLOCKS", 3)
    it = Receiving()
    values, session = it.greet()
    assert values["blocks"] == 3
    for message in (block(1), Skip(2, 1, DROPPED), block(3)):
        it.say(message, session)
    it.commit()
    for number in (4, 5, 6):
        assert it.say(block(number), session)

    assert it.ask(block(7), session)[-1].code == 429
    assert it.ask(hello()) == []
    it.commit()
    ((_, session),) = it.replies()
    for number in (7, 8, 9):
        assert it.say(Skip(number, 1, DROPPED), session) is None
    assert it.ask(Skip(10, 1, DROPPED), session)[0].code == 429


def test_the_credit_of_bytes_is_a_bound_that_the_last_block_may_go_over():
    it = Receiving(memory=5)
    values, session = it.greet()
    assert values["bytes"] == 5
    for number in (1, 2, 3):
        assert it.say(block(number), session)  # two bytes each

    assert it.ask(block(4), session)[0].code == 429


def test_credit_that_was_granted_may_be_used_after_it_shrank():
    it = Receiving(memory=6)
    _, first = it.greet(peer=b"first")
    it.greet(peer=b"second", secret=OTHER_SECRET)
    assert it.ask(Ping(), first, peer=b"first") == [Ack(0, 256, 3)]

    for number in (1, 2, 3):
        assert it.say(block(number), first, peer=b"first")


@pytest.mark.parametrize("memory", [1, 7, 1000])
def test_sessions_share_the_memory_and_each_gets_at_least_one_block(memory):
    it = Receiving(memory=memory)
    sessions = []
    for number in range(10):
        peer = b"%d" % number
        values, session = it.greet(peer=peer, secret=f"{number:032x}")
        assert values["bytes"] >= 1
        sessions.append((peer, session))
    credit = {}
    for _ in range(2):  # what the first are asked to give back is for the last ones
        for peer, session in sessions:
            (ack,) = it.ask(Ping(), session, peer=peer)
            credit[peer] = ack.credit_bytes
            assert ack.credit_blocks == 256

    assert set(credit.values()) == {max(1, memory // 10)}
    for peer, session in sessions[1:]:
        it.say(Goodbye(), session, peer=peer)
    assert it.ask(Ping(), sessions[0][1], peer=b"0") == [Ack(0, 256, memory)]


def test_a_session_ends_after_six_ping_intervals_of_silence():
    it = Receiving()
    _, session = it.greet(now=1.0)
    it.say(Ping(), session, now=2.0)
    it.receiver.tick(32)
    assert it.receiver.sessions == 1
    it.receiver.tick(32.1)

    assert it.receiver.sessions == 0
    assert it.ask(block(1), session, now=33.0)[-1].code == 404


def test_a_peer_that_has_gone_is_forgotten():
    it = Receiving()
    it.greet(peer=b"other", secret=OTHER_SECRET)
    _, session = it.greet()
    it.receiver.forget(b"peer")
    it.receiver.forget(b"nobody")

    assert it.receiver.sessions == 1
    assert it.ends(session)


def test_at_the_end_nothing_more_is_accepted_and_all_that_was_is_acknowledged_first():
    it = Receiving()
    _, session = it.greet()
    it.say(block(1), session)
    it.receiver.stop()

    assert it.say(block(2), session) is None
    assert it.ask(Ping(), session) == []
    it.commit()
    ((ack, _),) = it.replies()
    assert ack.acked == 1
    ((peer, frame),) = it.receiver.goodbyes()
    assert (peer, decode(frame)) == (b"peer", (Goodbye(), session))


# What a receiver forgets.


@pytest.mark.parametrize("ending", ["goodbye", "silence", "reset", "gone", "superseded", "other"])
@pytest.mark.parametrize("first", [1, 10])
def test_a_stream_of_which_nothing_was_accepted_is_forgotten_with_its_session(ending, first):
    it = Receiving()
    _, session = it.greet(first=first)
    if ending == "goodbye":
        it.say(Goodbye(), session)
    elif ending == "silence":
        it.receiver.tick(31)
    elif ending == "reset":
        it.say(block(99), session)
    elif ending == "gone":
        it.receiver.forget(b"peer")
    elif ending == "superseded":
        _, newer = it.greet(peer=b"newer")
        it.say(Goodbye(), newer, peer=b"newer")
    else:
        _, newer = it.greet(secret=OTHER_SECRET)
        it.say(Goodbye(), newer)

    assert it.receiver._streams == {}
    assert it.receiver._peers == it.receiver._sessions == {}
    assert it.receiver.take_forgotten() == []  # it was never in the durable state


@pytest.mark.parametrize("spooled", [None, True])
def test_a_goodbye_forgets_the_session_and_not_the_stream(spooled):
    it = Receiving()
    _, session = it.greet(**({} if spooled is None else {"spooled": spooled}))
    it.say(block(1), session)
    it.commit()
    it.replies()

    assert it.ask(Goodbye(), session) == []
    assert it.ends(session)
    assert it.receiver.take_forgotten() == []
    assert it.greet()[0]["acked"] == 1


@pytest.mark.parametrize("committed", ["before", "after"])
def test_a_stream_without_a_spool_is_forgotten_after_its_goodbye(committed):
    it = Receiving()
    _, session = it.greet(spooled=False)
    it.say(block(1), session)
    if committed == "before":
        it.commit()
    it.say(Goodbye(), session)
    if committed == "after":
        assert it.receiver.take_forgotten() == []
        it.commit()

    assert it.receiver.take_forgotten() == [KEY]
    assert it.receiver.take_forgotten() == []
    assert it.receiver._streams == {}


def test_a_stream_without_a_spool_that_an_earlier_run_remembers_is_forgotten_too():
    it = Receiving({KEY: Floor(4, RUN)})
    _, session = it.greet(spooled=False, first=5)
    it.say(Goodbye(), session)

    assert it.receiver.take_forgotten() == [KEY]


@pytest.mark.parametrize("ending", ["silence", "gone", "reset"])
def test_without_a_goodbye_a_stream_without_a_spool_is_remembered(ending):
    it = Receiving()
    _, session = it.greet(spooled=False)
    it.say(block(1), session)
    it.commit()
    if ending == "silence":
        it.receiver.tick(31)
    elif ending == "gone":
        it.receiver.forget(b"peer")
    else:
        it.say(block(99), session)

    assert it.receiver.take_forgotten() == []
    assert it.greet()[0]["acked"] == 1


def test_a_stream_that_goes_on_after_its_goodbye_is_not_forgotten():
    it = Receiving()
    _, session = it.greet(spooled=False)
    it.say(block(1), session)
    it.say(Goodbye(), session)
    assert it.ask(hello(spooled=False)) == []
    it.commit()

    assert it.receiver.take_forgotten() == []
    ((welcome, _),) = it.replies()
    assert welcome.values["acked"] == 1
    it.receiver.forget(b"peer")
    assert it.receiver.take_forgotten() == []


MONTH = 30 * 86400


def test_a_stream_that_was_quiet_for_thirty_days_is_forgotten():
    it = Receiving({KEY: Floor(4, RUN)})
    _, session = it.greet(now=9.0, secret=OTHER_SECRET)
    it.say(block(1), session, now=10.0)
    it.commit()
    it.say(Goodbye(), session, now=20.0)
    it.receiver.tick(1000)  # from here on it knows of the older one
    it.receiver.tick(MONTH + 19)
    assert it.receiver.take_forgotten() == []
    it.receiver.tick(MONTH + 20)
    assert it.receiver.take_forgotten() == [("anonymous", OTHER_STREAM)]
    it.receiver.tick(MONTH + 1000)

    assert it.receiver.take_forgotten() == [KEY]
    assert it.receiver._streams == {}


def test_a_stream_is_not_forgotten_just_because_the_machine_has_been_up_for_long():
    it = Receiving({KEY: Floor(4, RUN)})
    it.receiver.tick(100 * MONTH)

    assert it.receiver.take_forgotten() == []
    assert it.greet(now=100.0 * MONTH)[0]["acked"] == 4


def test_a_stream_with_a_session_is_never_forgotten_nor_soon_after():
    it = Receiving({KEY: Floor(4, RUN)})
    it.receiver.tick(1)
    _, session = it.greet(now=1.0)
    for day in range(1, 40):
        it.say(Ping(), session, now=day * 86400.0)
        it.receiver.tick(day * 86400)
    it.say(Goodbye(), session, now=39 * 86400.0)
    it.receiver.tick(40 * 86400)

    assert it.receiver.take_forgotten() == []


@pytest.mark.parametrize("waits", [False, True])
def test_a_stream_that_the_sink_does_not_hold_yet_is_never_forgotten(waits):
    it = Receiving()
    _, session = it.greet()
    it.say(block(1), session)
    it.receiver.forget(b"peer")
    if waits:
        it.say(hello(), now=1.0)
    it.receiver.tick(2 * MONTH)
    assert it.receiver.take_forgotten() == []
    it.commit()
    it.receiver.tick(2 * MONTH + 1)

    assert it.receiver.take_forgotten() == []
    it.replies()
    assert it.greet(now=2.0 * MONTH)[0]["acked"] == 1


# Whatever comes.


FRAMES = st.one_of(
    st.builds(hello),
    st.builds(
        lambda key, value: hello(**{key: value}),
        st.sampled_from(
            ["versions", "secret", "run", "first", "type", "host", "spooled", "raw", "was"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=40),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
            max_leaves=4,
        ),
    ),
    st.builds(block, st.integers(1, 9) | st.just(MAX_SEQ)),
    st.builds(Skip, st.integers(1, 9), st.integers(1, 1 << 60), st.integers(0, 255)),
    st.builds(Ack, st.integers(0, 9) | st.just(MAX_SEQ), st.integers(0, 9), st.integers(0, 9)),
    st.builds(Ping, st.integers(0, 9) | st.just(MAX_SEQ)),
    st.just(Goodbye()),
    st.builds(Reset, st.integers(0, 999), st.text()),
    st.builds(Error, st.integers(0, 999), st.text()),
    st.builds(
        lambda values: Welcome({"version": 1, "session": "0" * 15 + "1", "run": RUN} | values),
        st.fixed_dictionaries(
            {"acked": st.integers(-1, 9), "blocks": st.integers(-1, 9), "bytes": st.integers(0, 9)},
            optional={"ping": st.floats(), "run": st.text(), "session": st.text()},
        ),
    ),
)


@st.composite
def wire(draw):
    """Return a frame, good, damaged, or damaged with a checksum that fits."""
    frame = bytearray(encode(draw(FRAMES), draw(st.integers(0, 4))))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(frame) - 1))
        if draw(st.booleans()):
            frame[at] ^= 1 << draw(st.integers(0, 7))
        else:
            del frame[at : at + draw(st.integers(1, 8))]
            frame += draw(st.binary(max_size=8))
        if not frame:
            break
    return bytes(frame)


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b"]), wire() | st.binary(max_size=60))))
def test_a_receiver_survives_whatever_comes_and_still_serves(frames):
    it = Receiving(memory=6)
    for now, (peer, frame) in enumerate(frames):
        it.receiver.receive(peer, frame, float(now))
        if now % 3 == 0:
            it.commit()
        it.receiver.tick(now)
        for _, reply in it.receiver.take_replies():
            assert decode(reply)[0] is not None
    it.commit()
    it.receiver.take_replies()
    _, session = it.greet(now=len(frames), peer=b"well", secret=OTHER_SECRET)

    assert it.say(block(1), session, now=len(frames), peer=b"well")
    assert it.receiver.sessions <= 3
    assert it.receiver._granted == sum(s.granted for s in it.receiver._sessions.values())


@given(st.lists(wire() | st.binary(max_size=60)))
def test_a_sender_survives_whatever_comes_and_still_delivers(frames):
    it = Sending(blocks=3)
    sent = 0
    for now, frame in enumerate(frames):
        sent = max([sent, *(m.end for m in it.send(now) if isinstance(m, Data | Skip))])
        redial = it.sender.receive(frame, now) or it.sender.tick(now)
        assert it.store.first <= sent + 1  # nothing is forgotten that was not sent
        if redial:
            it.sender.disconnected(now)
            it.sender.connect(now)
        assert it.sender.deadline(now) >= min(now, it.sender._hello_at)
    it.sender.disconnected(len(frames))
    it.sender.connect(len(frames))
    assert is_hello(it.send(len(frames)))
    it.welcome(len(frames), 99, acked=it.store.first - 1)

    assert [m.first for m in it.send(len(frames))] == it.waiting


def test_what_is_given_back_is_left_to_its_sender_and_costs_no_memory():
    it = Receiving()
    _, session = it.greet()
    for first in (1, 2, 3):
        it.say(block(first), session)
    moved = [Progress(KEY, Floor(1, RUN))]
    it.receiver.take_accepted()
    it.say(block(4), session)
    it.receiver.committed(moved)
    it.receiver.give_back(KEY, 2, "not now")

    refusal = it.replies()[-1]
    assert refusal == (Error(503, "not now"), session)
    assert it.ends(session)
    assert it.receiver._pending == 0
    assert it.greet(first=2)[0]["acked"] == 1
    it.commit()


def test_a_hello_that_waits_for_what_is_given_back_is_refused_too():
    it = Receiving()
    _, session = it.greet()
    it.say(block(1), session)
    it.receiver.take_accepted()
    assert it.ask(hello(run=OTHER_RUN), peer=b"again") == []
    it.receiver.give_back(KEY, 1, "not now")

    assert it.replies(b"again") == [(Error(503, "not now"), 0)]
    assert it.greet(run=OTHER_RUN)[0]["acked"] == 0


# Streams of version 1.

FORMER_KEY = ("anonymous", FORMER + "12" * 16)


def forgotten_and_moved(it):
    return it.receiver.take_forgotten(), it.receiver.take_accepted()


def test_a_stream_of_version_1_goes_on_under_its_new_name_once_that_is_safe():
    it = Receiving({FORMER_KEY: Floor(4, OTHER_RUN)})
    it.say(hello(was="12" * 16, first=3))
    assert it.replies() == []
    gone, moved = forgotten_and_moved(it)
    assert (gone, moved) == ([FORMER_KEY], [Progress(KEY, Floor(4, OTHER_RUN))])
    it.receiver.committed(moved)
    ((welcome, session),) = it.replies()

    assert (welcome.values["acked"], welcome.values["run"]) == (4, OTHER_RUN)
    assert it.say(block(4), session) is None
    assert it.say(block(5), session).key == KEY
    assert list(it.receiver._streams) == [KEY]
    # And when it greets again.
    it.commit()
    assert it.greet(was="12" * 16, first=3)[0]["acked"] == 5
    assert it.receiver.take_forgotten() == []


@pytest.mark.parametrize("values", [{}, {"was": "34" * 16}, {"was": STREAM}, {"secret": "12" * 16}])
def test_nothing_else_reaches_a_stream_of_version_1(values):
    it = Receiving({FORMER_KEY: Floor(4, OTHER_RUN)})
    welcome, session = it.greet(**values)
    assert welcome["acked"] == 0
    it.say(block(1, 9), session)
    it.commit()

    assert it.receiver._streams[FORMER_KEY].floor == 4


def test_a_stream_of_version_1_belongs_to_its_principal():
    it = Receiving({FORMER_KEY: Floor(4, OTHER_RUN)})

    assert it.greet(principal="someone", was="12" * 16)[0]["acked"] == 0


def test_a_stream_that_is_known_takes_nothing_over():
    it = Receiving({FORMER_KEY: Floor(4, OTHER_RUN), KEY: Floor(2, RUN)})

    assert it.greet(was="12" * 16)[0]["acked"] == 2


def test_who_takes_a_stream_of_version_1_first_makes_its_sender_deliver_again_and_lose_nothing():
    it = Receiving({FORMER_KEY: Floor(4, OTHER_RUN)})
    it.say(hello(was="12" * 16, secret=OTHER_SECRET), peer=b"stranger")
    it.commit()
    ((_, stolen),) = it.replies()
    it.say(block(5, 100), stolen, peer=b"stranger")
    it.commit()
    it.replies()
    welcome, session = it.greet(was="12" * 16, first=3)

    assert (welcome["acked"], welcome["run"]) == (2, RUN)
    assert it.say(block(3), session).key == KEY


def test_what_was_taken_over_and_not_remembered_is_taken_over_again():
    it = Receiving({FORMER_KEY: Floor(4, OTHER_RUN)})
    it.say(hello(was="12" * 16))
    it = Receiving({FORMER_KEY: Floor(4, OTHER_RUN)})  # it died
    it.say(hello(was="12" * 16))
    it.commit()

    assert it.replies()[0][0].values["acked"] == 4


def test_the_secret_of_a_stream_is_nowhere_in_a_receiver():
    it = Receiving()
    _, session = it.greet()
    it.say(block(1), session)
    it.commit()
    replies = str(it.replies())

    assert SECRET not in replies + str(vars(it.receiver)) + str(it.receiver._streams)
    assert ("anonymous", public_name(SECRET)) == KEY
    assert SECRET not in public_name(SECRET)


# Peers of version 1, by the bytes that they say.


def former_frame(kind, body, session=0):
    frame = struct.pack(">HBBHHQ", 0x5A50, 1, kind, 0, 16, session) + body
    return frame + struct.pack(">I", zlib.crc32(frame))


def test_a_sender_of_version_1_is_told_to_be_upgraded():
    it = Receiving({FORMER_KEY: Floor(4, OTHER_RUN)})
    values = {"versions": [1, 1], "stream": "12" * 16, "run": RUN, "first": 1, "type": "t"}
    it.receiver.receive(b"peer", former_frame(1, json.dumps(values).encode()), 0)
    data = struct.pack(">QQI", 5, 1, zlib.crc32(struct.pack(">QQ", 5, 1) + b"x\n")) + b"x\n"
    it.receiver.receive(b"peer", former_frame(3, data, 7)[:-4], 0)
    replies = it.receiver.take_replies()
    text = b"this receiver speaks version 2, not 1: upgrade the sender"

    assert [frame for _, frame in replies] == [
        former_frame(10, struct.pack(">H", 505) + text, session) for session in (0, 7)
    ]
    assert list(it.receiver._streams) == [FORMER_KEY]


def test_a_receiver_of_version_1_understands_the_range_of_versions_and_its_refusal_counts():
    it = Sending(blocks=3, session=None)
    frame = it.sender.next_frame(0)
    assert frame[:4] == b"ZP\1\1"
    assert json.loads(frame[16:-4])["versions"] == [2, 2]
    refusal = former_frame(10, struct.pack(">H", 505) + b"this receiver speaks version 1")
    redial = it.sender.receive(refusal, 0)

    assert redial.delay == 30
    assert redial.reason.startswith("it refuses: this receiver speaks version 1 (505); ")
    assert it.waiting == [1, 2, 3]
