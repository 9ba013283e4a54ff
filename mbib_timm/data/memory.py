"""Whether a data set fits: the memory that its decoded images take, and the memory that there is."""

import contextlib
import os
from pathlib import Path

import numpy as np
import torch

from mbib_timm.data.images import Split
from mbib_timm.data.transforms import LONGEST_SIDE
from mbib_timm.recipe import Recipe

# What resident images may take of the memory that is free; the rest is for the model and its activations.
SHARE = 0.5
SAMPLED_IMAGES = 64


def decoded_bytes(split: Split, recipe: Recipe, input_size: tuple[int, int, int], training: bool) -> int:
    """Return the memory that a split's decoded images take; where they keep their own sizes, by a sample of them.

    Args:
        split: the images.
        recipe: preprocessing.
        input_size: (C, H, W).
        training: the split is trained on.
    """
    channels, height, width = input_size
    if not (training and recipe.train_crop_mode == "rrc"):
        return len(split) * channels * height * width
    indices = np.arange(len(split)) if split.indices is None else split.indices
    areas = []
    for index in indices[np.linspace(0, len(indices) - 1, num=min(SAMPLED_IMAGES, len(indices)), dtype=np.int64)]:
        try:
            image_width, image_height = split.reader.read(int(index)).size  # reads the header alone
        except Exception:  # a broken image is no matter here
            continue
        scale = min(1.0, LONGEST_SIDE / max(image_width, image_height))
        areas.append(image_width * image_height * scale**2)
    area = float(np.mean(areas)) if areas else LONGEST_SIDE**2
    return int(len(split) * channels * area)


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device; on the CPU also within the limit of the control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free = _available_to_the_machine()
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, KeyError):  # no control group, or one without a limit
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Cached files count as used, but give way.
        used = int((group / "memory.current").read_text()) - int(statistics["file"])
        free = min(free, int((group / "memory.max").read_text()) - used)
    return free


def _available_to_the_machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        # Where the system does not tell what is free: a quarter of what is there, or of 8 GB where it says nothing.
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 << 30
        return pages // 4


def fits(needed: int, device: torch.device) -> bool:
    """Return whether so many bytes of images fit onto a device."""
    return needed <= SHARE * free_memory(device)
