"""
Fuzz targets, guided by what of the product each input reaches.

Usage: python fuzz/run.py [TARGET...] [--seconds N] [--seed N] [--corpus DIR]

Each target runs in a process of its own, two at a time. It begins with the inputs in
fuzz/corpus/TARGET and with what earlier runs left in DIR/TARGET. The first finding ends
it all, with exit code 1 and a line that says how to run that input again.
"""

import argparse
import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
NAMES = (
    *("codec", "receiver", "sender", "spool", "records", "lines", "dialogue"),
    *("wire_frames", "wire_null", "wire_curve"),
)
_AT_ONCE = 2
_LAST_LINES = 15
_LIMITS = ["-max_len=2048", "-timeout=30", "-rss_limit_mb=1024"]
_PROGRESS = re.compile(r"#(\d+)\s+DONE\s+cov: (\d+) ft: (\d+).*exec/s: (\d+)")
_BEFORE = re.compile(r"#\d+\s+INITED\s+cov: (\d+)")


def fuzz(target: str, options: list[str]) -> None:
    """Fuzz one target in this process; does not return."""
    import atheris

    with atheris.instrument_imports(include=["zmqpush"]):
        import targets
    atheris.Setup(["fuzz", *options], targets.TARGETS[target])
    atheris.Fuzz()


class Run:
    """A target that is being fuzzed; what it says goes to a file in the corpus."""

    def __init__(self, target: str, seconds: int, seed: int, corpus: Path) -> None:
        self.target = target
        self._seconds = seconds
        self._corpus = corpus
        grown = corpus / target
        grown.mkdir(parents=True, exist_ok=True)
        self._log = corpus / f"{target}.log"
        options = [f"-max_total_time={seconds}", f"-seed={seed}", *_LIMITS]
        options.append(f"-artifact_prefix={corpus / target}-")
        command = [sys.executable, __file__, "--child", target, *options, grown]
        if (HERE / "corpus" / target).is_dir():
            command.append(HERE / "corpus" / target)
        with open(self._log, "wb") as log:
            self.child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def report(self) -> bool:
        """Say how it ended; return whether nothing was found."""
        text = self._log.read_text(errors="replace")
        done, before = _PROGRESS.search(text), _BEFORE.search(text)
        if self.child.returncode == 0 and done and before:
            runs, reached, features, speed = done.groups()
            print(
                f"{self.target}: nothing found in {self._seconds} s: {runs} runs, {speed}/s; "
                f"{reached} branches reached, {before[1]} from the start; {features} features"
            )
            return True
        print("\n".join(text.splitlines()[-_LAST_LINES:]))
        found = re.search(r"Test unit written to (\S+)", text)
        if found:
            again = f"{sys.executable} {HERE / 'targets.py'} {self.target} {found[1]}"
            print(f"{self.target}: found something. To run it again: {again}")
            print(f"Once it is mended, keep that file in {HERE / 'corpus' / self.target}")
        else:
            print(f"{self.target}: the fuzzer failed with {self.child.returncode}: {self._log}")
        return False


def main() -> int:
    """Fuzz as the command line says."""
    if sys.argv[1:2] == ["--child"]:
        fuzz(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(NAMES))
    parser.add_argument("--seconds", type=int, default=600, help="for each target")
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--corpus", type=Path, default=ROOT / "build" / "fuzz")
    args = parser.parse_args()
    if unknown := set(args.targets) - set(NAMES):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if not importlib.util.find_spec("atheris"):
        print("nothing is fuzzed: atheris is not installed (it has wheels for Linux on x86-64)")
        return 0
    waiting, running = list(args.targets or NAMES), []
    try:
        while waiting or running:
            while waiting and len(running) < _AT_ONCE:
                running.append(Run(waiting.pop(0), args.seconds, args.seed, args.corpus))
            time.sleep(0.1)
            for run in [run for run in running if run.child.poll() is not None]:
                running.remove(run)
                if not run.report():
                    return 1
    finally:
        for run in running:
            run.child.kill()
            run.child.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
