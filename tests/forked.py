"""Processes that are forked from the tests' own, which has torch and timm already: fresh ones import them for seconds.

What a fresh process must find by itself is tested in one: what is imported when, and what the environment decides then.
"""

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import torch

RUNNERS = multiprocessing.get_context("fork")


def _child(work: Callable[[], int | None], out: str, error: str, folder: str, environment: Mapping[str, str]) -> None:
    # Pytest has put its own streams in the place of these.
    sys.stdout, sys.stderr = (Path(file).open("a", buffering=1, encoding="utf-8") for file in (out, error))  # noqa: SIM115
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    status: Any = 1
    try:
        status = work()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def start(
    work: Callable[[], int | None],
    out: Any,
    error: Any,
    folder: Any = ".",
    environment: Mapping[str, str] | None = None,
) -> multiprocessing.process.BaseProcess:
    """Start a function in a process of its own, which ends with what it returns for its status.

    Args:
        work: the function.
        out: file that takes what it prints.
        error: file that takes what it prints to the other stream.
        folder: the current one.
        environment: variables beside those of this process.
    """
    process = RUNNERS.Process(target=_child, args=(work, str(out), str(error), str(folder), environment or {}))
    process.start()
    return process


def run(work: Callable[[], int | None], folder: Any = ".", **environment: str) -> "CompletedProcess[str]":
    """Run a function in a process of its own to the end."""
    with tempfile.TemporaryDirectory() as place:
        out, error = Path(place, "out"), Path(place, "error")
        process = start(work, out, error, folder, environment)
        try:
            process.join()
        finally:
            process.kill()
        printed, said = (file.read_text(encoding="utf-8") for file in (out, error))
        return CompletedProcess(["forked"], process.exitcode or 0, printed, said)


def mbib(*arguments: Any, folder: Any = ".", **environment: str) -> "CompletedProcess[str]":
    """Run a command of ``mbib`` in a process of its own to the end."""
    from mbib_timm.cli import main

    return run(lambda: main([*map(str, arguments)]), folder, **environment)


def run_with_hub(
    hub: Any, home: Path, work: Callable[[], int | None], folder: Any = ".", **environment: str
) -> "CompletedProcess[str]":
    """As `run`, with a client of the Hub on loopback that is told what the environment says to a fresh one."""
    from huggingface_hub import close_session, constants

    def told() -> int | None:
        constants.ENDPOINT = hub.url
        constants.HUGGINGFACE_CO_URL_TEMPLATE = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        constants.HF_HUB_CACHE, constants.HF_TOKEN_PATH = str(home / "hub"), str(home / "token")
        constants.HF_HUB_DISABLE_XET, constants.HF_HUB_OFFLINE = True, "HF_HUB_OFFLINE" in environment
        close_session()
        return work()

    return run(told, folder, **{"HF_TOKEN": hub.token, **environment})


def mbib_and_hub(
    hub: Any, home: Path, *arguments: Any, folder: Any = ".", **environment: str
) -> "CompletedProcess[str]":
    """As `mbib`, with a client as in `run_with_hub`."""
    from mbib_timm.cli import main

    return run_with_hub(hub, home, lambda: main([*map(str, arguments)]), folder, **environment)
