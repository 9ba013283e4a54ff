"""Processes that train and are killed: at a moment, at a step, or at a system call; and what they leave.

A fault is a text, such as ``1 replace 3``: the process of that rank kills itself, as ``kill -9`` does, in the place of
its third call of ``os.replace``. Other kinds are ``fsync``, ``step`` (of the optimizer) and ``seconds``.
"""

import csv
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import forked
import matplotlib.figure  # noqa: F401  (so that the processes have it already)
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import mbib_timm.training  # noqa: F401
from mbib_timm.cli import main


def die():
    """End as by ``kill -9``: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def put_in(fault):
    """Put a fault into this process, if it is the one of the fault's rank; nothing for an empty text."""
    rank, kind, number = fault.split() if fault else (-1, "", 0)
    if int(rank) != int(os.environ.get("RANK", "0")):
        return
    if kind == "seconds":
        timer = threading.Timer(float(number), die)
        timer.daemon = True
        timer.start()
    elif kind == "step":
        count = iter(range(1, int(number) + 1))

        def last(*_):
            if next(count) == int(number):
                die()

        register_optimizer_step_pre_hook(last)
    else:
        original, calls = getattr(os, kind), iter(range(1, sys.maxsize))

        def dying(*args, **kwargs):
            if next(calls) == int(number):
                die()
            return original(*args, **kwargs)

        setattr(os, kind, dying)


def _started(argv, rank, ranks, port, fault, log):
    def work():
        put_in(fault)
        return main(argv)

    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {name: str(value) for name, value in places.items()} if ranks > 1 else {}
    return forked.start(work, log, log, environment=environment)


def run(argv, log, ranks=1, fault="", grace=5.0):
    """Run a command in forked processes; where one ends badly, the others are told to end, as torchrun does.

    Args:
        argv: of ``mbib``.
        log: file that takes what they print.
        ranks: processes.
        fault: that is put in.
        grace: seconds until the others are told.

    Returns:
        Exit statuses by rank: -9 for what was killed, -15 for what was told to end.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [_started(argv, rank, ranks, port, fault, log) for rank in range(ranks)]
    told = None
    while any(process.is_alive() for process in processes):
        time.sleep(0.01)
        if any(process.exitcode for process in processes):
            told = told or time.monotonic() + grace
        if told and time.monotonic() > told:
            for process in processes:
                process.terminate()
            told = time.monotonic() + grace
    return [process.exitcode for process in processes]


def outcome(folder):
    """What a run has come to, stage by stage: its weights, epochs and results, without times."""
    found = {}
    for stage in [Path(folder), *sorted(Path(folder).glob("stage*-*"))]:
        name = stage.relative_to(folder).as_posix()
        for file in ("model.safetensors", "best.safetensors"):
            found |= {f"{name} {file} {key}": value for key, value in load_file(stage / file).items()}
        with (stage / "summary.csv").open() as rows:
            found[f"{name} epochs"] = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(rows)]
        record = json.loads((stage / "metrics.json").read_text())
        found |= {f"{name} {key}": record[key] for key in ("result", "best", "raw", "chosen", "class_counts")}
        found[f"{name} predictions"] = (stage / "predictions.csv").read_text()
    return found


def differing(one, other):
    """Names of what differs between two outcomes, bit for bit."""

    def same(a, b):
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return [name for name in one.keys() | other.keys() if name not in one.keys() & other.keys()
            or not same(one[name], other[name])]  # fmt: skip


def debris(folder):
    """Files that an interrupted process has left."""
    names = {"next.ckpt"}
    return [path for path in Path(folder).rglob("*") if path.name.endswith(".tmp") or path.name in names]


def remove(folder):
    """Remove a run."""
    shutil.rmtree(folder, ignore_errors=True)
