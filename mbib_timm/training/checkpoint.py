"""Checkpoints that survive any interruption: written aside, synced, renamed; the one before is kept.

A checkpoint holds tensors and plain Python values only, so that torch loads it with ``weights_only``.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mbib_timm.errors import CheckpointError
from mbib_timm.files import write_atomically

FORMAT = "mbib_timm training state, version 4"
NEXT, LAST, PREVIOUS = "next.ckpt", "last.ckpt", "previous.ckpt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Save a training state as ``last.ckpt``; the one that was there becomes ``previous.ckpt``."""
    content = io.BytesIO()  # torch's own file writer reports a full disk as an internal error
    torch.save({"format": FORMAT, **state}, content)
    write_atomically(folder / NEXT, lambda file: file.write(content.getbuffer()))
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / PREVIOUS)
    os.replace(folder / NEXT, folder / LAST)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a training state on the CPU.

    Raises:
        CheckpointError: the file is missing, truncated, or not a training state of this package.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # unpickling what is no pickle ends in almost any error
        raise CheckpointError(f"{path} is truncated or not a checkpoint") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a training state of mbib_timm")
    return state


def load_newest(folder: Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """Load the newest sound checkpoint of a run.

    Args:
        folder: the run's folder.
        warn: told about a checkpoint that was passed over.

    Returns:
        The state, or None where the folder holds no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, and none is sound.
    """
    # A next.ckpt that is there is complete: the process died before it could be renamed.
    found = [folder / name for name in (NEXT, LAST, PREVIOUS) if (folder / name).exists()]
    for i, path in enumerate(found):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            if i == len(found) - 1:
                raise
            warn(f"{error}; using the one before")
    return None
