"""Pieces of work for tests/test_side_by_side.py: a text says what to do, and in which folder."""

import os
import signal
import sys
import time
from pathlib import Path

from mbib_timm.sweeps.side_by_side import Outcome, side_by_side


def create_task():
    return do


def do(item):
    what, folder = item
    print(f"{what} begins\n\nand goes on")
    print("to the other stream", file=sys.stderr)
    place = Path(folder, f"{what}.{os.getpid()}")
    place.write_text(os.environ["OMP_NUM_THREADS"])
    if what == "meet":  # two of them can only end together
        deadline = time.monotonic() + 60
        while len(list(Path(folder).glob("meet.*"))) < 2:
            if time.monotonic() > deadline:
                return Outcome(failed="nobody came")
            time.sleep(0.01)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise":
        raise RuntimeError("no such thing\nand more")
    if what == "fail":
        return Outcome(failed="as it should")
    if what == "last":
        try:
            time.sleep(600)
        finally:
            Path(folder, f"{os.getpid()}.over").write_text("")
    return Outcome()


if __name__ == "__main__":  # lasting work, until somebody ends this process
    work = [(number, ("last", sys.argv[1])) for number in (1, 2)]
    for _ in side_by_side(create_task, work, 2, lambda number, item: print(number, flush=True)):
        pass
