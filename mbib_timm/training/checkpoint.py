"""Checkpoints that survive any interruption and show any damage: written aside, synced, renamed; the one before stays.

A checkpoint is what ``torch.save`` writes of tensors and plain Python values, so that ``torch.load`` reads it with
``weights_only``; after it stand `MARK` and the SHA-256 of all before the mark. One that does not end so, with that sum,
is unsound.
"""

import hashlib
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mbib_timm.errors import CheckpointError
from mbib_timm.files import read_content, write_atomically

FORMAT = "mbib_timm training state, version 6"
NEXT, LAST, PREVIOUS = "next.ckpt", "last.ckpt", "previous.ckpt"
MARK = b"sha256:"
_ENDING = len(MARK) + hashlib.sha256().digest_size


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Save a training state as ``last.ckpt``; the one that was there becomes ``previous.ckpt``."""
    content = io.BytesIO()  # torch's own file writer reports a full disk as an internal error
    torch.save({"format": FORMAT, **state}, content)
    content.write(MARK + hashlib.sha256(content.getbuffer()).digest())
    write_atomically(folder / NEXT, lambda file: file.write(content.getbuffer()))
    take_next(folder)


def take_next(folder: Path) -> None:
    """Let ``next.ckpt`` become ``last.ckpt``, if it is there, and that one ``previous.ckpt``."""
    if (folder / NEXT).exists():
        if (folder / LAST).exists():
            os.replace(folder / LAST, folder / PREVIOUS)
        os.replace(folder / NEXT, folder / LAST)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a training state on the CPU.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or not a training state of this package and version.
    """
    content = read_content(path, "checkpoint", CheckpointError, most=None)
    mark, digest = content[-_ENDING : -_ENDING + len(MARK)], content[-_ENDING + len(MARK) :]
    if mark != MARK:
        raise CheckpointError(f"{path} is cut short, damaged, or no checkpoint of this version of mbib_timm")
    if hashlib.sha256(memoryview(content)[:-_ENDING]).digest() != digest:
        raise CheckpointError(f"{path} is damaged: its checksum is another")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # unpickling what is no pickle ends in almost any error
        raise CheckpointError(f"{path} is not a checkpoint") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a training state of this version of mbib_timm")
    return state


def load_newest(folder: Path, warn: Callable[[str], None]) -> tuple[dict[str, Any], list[Path]]:
    """Load the newest sound checkpoint of a run.

    Args:
        folder: the run's, with one checkpoint at least.
        warn: told about a checkpoint that was passed over.

    Returns:
        What was saved, and the newer checkpoints that were passed over.

    Raises:
        CheckpointError: none is sound.
    """
    # A next.ckpt that is there is complete: the process died before it could be renamed.
    found = [folder / name for name in (NEXT, LAST, PREVIOUS) if os.path.lexists(folder / name)]
    problems: list[str] = []
    for i, path in enumerate(found):
        try:
            state = load_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warn(f"{problem}; using the one before, {path.name}")
        return state, found[:i]
    raise CheckpointError(
        f"{folder} has no sound checkpoint to resume from ({'; '.join(problems)}); start anew in another folder"
    )


def set_aside(unsound: Path) -> None:
    """Make room for the next checkpoint where something else stands: a file goes, a folder gets another name."""
    if unsound.is_dir() and not unsound.is_symlink():
        unsound.rename(unsound.with_name(f"{unsound.name}.unsound"))
    else:
        unsound.unlink(missing_ok=True)
