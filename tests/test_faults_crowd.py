"""
The killing loops with company: two receivers on one disk, several labels in each spool.

Files are named by labels and rotated into another directory while everybody is killed. Each
line has to be in the files once, and under the label of the run that took it.
"""

import json
import random
import signal

import pytest

from chaos import DOSE, Pipeline, kill, number_of, spooled, stop, wait_for_growth, written
from helpers import PATIENCE, wait_until_ready

LABELS = 3


class Party(Pipeline):
    """One spool and one receiver; what it writes lies beside the files of others."""

    def __init__(self, start, directory, to, name):
        directory.mkdir()
        super().__init__(start, directory)
        self.to, self.name = to, name
        self.path = to / "{type}.ndjson"
        self.label_of = {}
        self.runs = 0
        self.receiver = self.receive()
        self.begin()

    def files(self):
        return sorted(self.to.rglob(f"{self.name}*"))

    def begin(self):
        """Start a sender with another label, and feed it what is not safe yet."""
        self.label = f"{self.name}{self.runs % LABELS}"
        self.runs += 1
        self.sender = self.send("--format", "json", self.label)
        self.feeder = self.feed(self.sender)

    def kill_sender(self):
        kill(self.sender)
        self.feeder.stop()
        self.note_labels()
        self.begin()

    def note_labels(self):
        """Note under which label the last run took the lines that are safe now."""
        known = self.fed
        safe = {*spooled(self.spool), *written(*self.files())}
        self.fed = max(safe, default=0)
        assert len(safe) == self.fed
        self.label_of.update(dict.fromkeys(range(known + 1, self.fed + 1), self.label))

    def kill_receiver(self):
        kill(self.receiver)
        self.receiver = self.receive()

    def rotate(self, chance, number, *, killed):
        """Move a file into another directory, with the receiver alive or dead."""
        files = [path for path in self.files() if path.parent == self.to]
        if killed:
            kill(self.receiver)
        if files:
            path = chance.choice(files)
            path.rename(self.to / "old" / f"{path.name}.{number}")
        if killed:
            self.receiver = self.receive()
        else:
            wait_until_ready(self.receiver)
            self.receiver.send_signal(signal.SIGHUP)

    def end(self):
        """Let everything drain; return which labels the files give to each number."""
        fed = self.feeder.stop()
        self.label_of.update(dict.fromkeys(range(self.fed + 1, fed + 1), self.label))
        _, err = self.sender.communicate(timeout=PATIENCE)
        assert self.sender.returncode == 0, err
        stop(self.receiver)
        found = {}
        for path in self.files():
            for record in path.read_bytes().splitlines():
                label = path.name.partition(".")[0]
                assert json.loads(record)["type"] == label
                found.setdefault(number_of(record), []).append(label)
        return found


@pytest.mark.parametrize("seed", range(2))
def test_85_nobody_loses_repeats_or_misfiles_when_all_are_killed_and_files_move(
    start, tmp_path, seed
):
    chance = random.Random(seed)
    to = tmp_path / "to"
    (to / "old").mkdir(parents=True)
    parties = [Party(start, tmp_path / name, to, name) for name in ("a", "b")]
    for number in range(DOSE.kills * 8):
        party = chance.choice(parties)
        wait_for_growth(to / f"{party.label}.ndjson", chance.randrange(200_000), party.sender)
        acts = (
            party.kill_sender,
            party.kill_receiver,
            lambda: party.rotate(chance, number, killed=False),  # noqa: B023 - called at once
            lambda: party.rotate(chance, number, killed=True),  # noqa: B023
        )
        chance.choice(acts)()

    for party in parties:
        found = party.end()
        assert found == {number: [label] for number, label in party.label_of.items()}
