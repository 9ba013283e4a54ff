"""Work side by side in processes: what is done at once, what fails alone, what ends with what."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import side_tasks

from mbib_timm.sweeps.side_by_side import side_by_side

pytestmark = pytest.mark.slow  # seconds for each process to start


def run(folder, kinds, jobs=2):
    """Return the outcomes by kind of work, and the numbers announced."""
    numbers = []
    items = list(enumerate([(kind, str(folder)) for kind in kinds], start=1))
    ended = side_by_side(side_tasks.create_task, items, jobs, lambda number, item: numbers.append(number))
    return {item[0]: outcome for item, outcome in ended}, numbers


def pids(folder, kind):
    return [int(file.suffix[1:]) for file in Path(folder).glob(f"{kind}.*") if file.suffix[1:].isdigit()]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_over(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_two_are_done_at_once_with_a_thread_each_and_their_lines_have_numbers(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS")
    outcomes, numbers = run(tmp_path, ["meet", "meet", "well"])
    assert all(outcome.failed is None for outcome in outcomes.values())
    assert numbers == [1, 2, 3]
    assert len(set(pids(tmp_path, "meet"))) == 2
    assert pids(tmp_path, "well")[0] in pids(tmp_path, "meet"), "a process does more than one"
    assert {file.read_text() for file in tmp_path.iterdir()} == {"1"}
    assert "OMP_NUM_THREADS" not in os.environ
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == sorted(
        f"[{number}] {line}"
        for number, what in ((1, "meet"), (2, "meet"), (3, "well"))
        for line in (f"{what} begins", "and goes on")
    )
    assert sorted(err.splitlines()) == [f"[{number}] to the other stream" for number in (1, 2, 3)]


def test_the_users_threads_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    run(tmp_path, ["well"])
    assert [file.read_text() for file in tmp_path.iterdir()] == ["2"]


def test_what_fails_fails_alone(tmp_path, capfd):
    outcomes, numbers = run(tmp_path, ["die", "raise", "fail", "well"], jobs=1)
    assert {kind: outcome.failed for kind, outcome in outcomes.items()} == {
        "die": "its process was ended by SIGKILL, as the system does where memory is short",
        "raise": "RuntimeError: no such thing",
        "fail": "as it should",
        "well": None,
    }
    assert numbers == [1, 2, 3, 4]
    die, error, fail, well = (pids(tmp_path, kind)[0] for kind in ("die", "raise", "fail", "well"))
    assert len({die, error, fail}) == 3, "a process that has gone wrong goes no further"
    assert fail == well
    assert "[2] RuntimeError: no such thing" in capfd.readouterr().err


def test_closing_ends_the_processes(tmp_path):
    work = [(1, ("well", str(tmp_path))), (2, ("last", str(tmp_path)))]
    ended = side_by_side(side_tasks.create_task, work, 2, lambda number, item: None)
    assert next(ended)[0][0] == "well"
    wait_for(lambda: pids(tmp_path, "last"))
    ended.close()
    assert all(map(is_over, pids(tmp_path, "last")))
    assert list(tmp_path.glob("*.over")), "it was ended as an error ends it, so that it could clear up"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_processes_end_with_the_one_that_started_them(tmp_path, popen, number):
    command = [sys.executable, str(Path(side_tasks.__file__)), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    wait_for(lambda: len(pids(tmp_path, "last")) == 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == (143 if number == signal.SIGTERM else -number)
    wait_for(lambda: all(map(is_over, pids(tmp_path, "last"))), 10)
    assert len(list(tmp_path.glob("*.over"))) == 2
    assert errors.count("Traceback") == (number == signal.SIGINT), "no process but the first speaks of it"
