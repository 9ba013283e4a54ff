"""Work of a sweep side by side: a process each, which does one piece after another on a thread of its own."""

import contextlib
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, Generic, TextIO, TypeVar

from mbib_timm.errors import first_line

# That a process may take to end once it is told to, before it is killed.
GRACE_SECONDS = 10
THREADS = "OMP_NUM_THREADS"

Item = TypeVar("Item")


@dataclass(frozen=True)
class Outcome:
    """How a piece of work ended.

    Attributes:
        failed: why it did not come to its end; None where it did.
        busy: it was left to another process.
        lost: the process that did it goes no further.
    """

    failed: str | None = None
    busy: bool = False
    lost: bool = False


# Does a piece of work. What makes it is called once in each process, and is a function of a module.
Task = Callable[[Item], Outcome]


class _Worker(Generic[Item]):
    """A process, and the number and item that it works on; None for none."""

    def __init__(self, create_task: Callable[[], Task[Item]]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, create_task))
        self.work: tuple[int, Item] | None = None
        with _one_thread(), _without_interrupts():
            self.process.start()
        theirs.close()

    def give(self, number: int, item: Item) -> None:
        """Start on a piece of work."""
        self.work = number, item
        with contextlib.suppress(BrokenPipeError):  # it has ended, which `take` says
            self.connection.send(self.work)

    def take(self) -> Outcome:
        """Return how the work ended, when there is something to read."""
        self.work = None
        try:
            outcome: Outcome = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return Outcome(failed=f"its process {_ended(self.process.exitcode or 0)}", lost=True)
        return outcome


def side_by_side(
    create_task: Callable[[], Task[Item]],
    items: Sequence[tuple[int, Item]],
    jobs: int,
    announce: Callable[[int, Item], None],
) -> Generator[tuple[Item, Outcome], None, None]:
    """Yield items as their work ends, several of which is done at once, in processes of their own.

    A process that ends, and an error that is none of the input, fail the work that it was at; another takes its place.
    Closing the iterator ends them all, and so does the end of this process, whatever ends it. Each has one thread,
    or as many as ``OMP_NUM_THREADS`` says, and the lines that it prints begin with its work's number.

    Args:
        create_task: makes what does the work.
        items: numbered, in the order in which they are begun.
        jobs: processes at most.
        announce: called with number and item before each.
    """
    left = deque(items)
    workers: list[_Worker[Item]] = []
    try:
        with _ended_by_sigterm():
            while left or any(worker.work for worker in workers):
                while left:
                    idle = next((worker for worker in workers if worker.work is None), None)
                    if idle is None:
                        if len(workers) == jobs:
                            break
                        workers.append(idle := _Worker(create_task))
                    announce(*left[0])
                    idle.give(*left.popleft())
                ready = wait([worker.connection for worker in workers if worker.work is not None])
                for worker in [worker for worker in workers if worker.connection in ready]:
                    assert worker.work is not None
                    _, item = worker.work
                    outcome = worker.take()
                    if outcome.lost:
                        workers.remove(worker)
                        _end([worker.process])
                    yield item, outcome
    finally:
        _end([worker.process for worker in workers])


def _end(processes: Sequence[Any]) -> None:
    """End processes, and wait until they have."""
    for process in processes:
        process.terminate()
    last = time.monotonic() + GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, last - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    return f"was ended by {name}" + (", as the system does where memory is short" if name == "SIGKILL" else "")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let processes that start have one thread, where the user has not said how many."""
    before = os.environ.get(THREADS)
    os.environ.setdefault(THREADS, "1")
    try:
        yield
    finally:
        if before is None:
            del os.environ[THREADS]


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let processes that start never be interrupted, as a terminal does to all: whoever started them ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process as an error does, so that it ends its processes first."""
    if threading.current_thread() is not threading.main_thread():  # which alone may say so
        yield
        return
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# In the processes


class _Numbered(io.TextIOBase):
    """Writes whole lines at once, each behind a number: what several processes say stays readable."""

    def __init__(self, stream: TextIO, number: int) -> None:
        self.stream, self.number, self.begun = stream, number, ""

    def write(self, text: str) -> int:
        """Write the lines that are whole by now."""
        *lines, self.begun = (self.begun + text).split("\n")
        if shown := [f"[{self.number}] {line}\n" for line in lines if line]:
            self.stream.write("".join(shown))
            self.stream.flush()
        return len(text)


def _work(connection: Connection, create_task: Callable[[], Task[Item]]) -> None:
    """Do the work that comes, until there is none or it goes wrong."""
    signal.signal(signal.SIGTERM, _exit)
    sys.unraisablehook = _exit_later
    threading.Thread(target=_end_with_parent, daemon=True).start()
    task = create_task()
    streams = sys.stdout, sys.stderr
    with contextlib.suppress(EOFError):
        while True:
            number, item = connection.recv()
            sys.stdout, sys.stderr = (_Numbered(stream, number) for stream in streams)
            try:
                outcome = task(item)
            except Exception as error:
                traceback.print_exc()
                connection.send(Outcome(failed=f"{type(error).__name__}: {first_line(error)}", lost=True))
                return  # another process takes over, with none of this one's memory
            connection.send(outcome)


def _exit_later(ignored: "sys.UnraisableHookArgs") -> None:
    """End this process in a moment, where a finalizer ran as the signal came, out of which nothing can be raised."""
    if issubclass(ignored.exc_type, SystemExit):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:
        sys.__unraisablehook__(ignored)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)
