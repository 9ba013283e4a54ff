"""Runs that crash in an epoch, and whether two runs have come to the same."""

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mbib_timm.training import run as run_module
from mbib_timm.training import train


class CrashError(Exception):
    """Stands for a crash."""


def crash(recipe, name, epoch, *, stage=0, after=False):
    """Train until an epoch of a stage begins, or until `after` it, before its checkpoint is written."""
    original = run_module.train_one_epoch

    def crashing(method, loader, step, recipe, log, *args, **kwargs):
        here = (recipe.stage, log.epoch) == (stage, epoch)
        if here and not after:
            raise CrashError
        result = original(method, loader, step, recipe, log, *args, **kwargs)
        if here:
            raise CrashError
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "train_one_epoch", crashing)
        with pytest.raises(CrashError):
            train(recipe, name)


def weights(folder):
    """The weights of a run."""
    return load_file(Path(folder) / "model.safetensors")


def differing(first, second):
    """Names of the weights of two runs that are not the same to the last bit."""
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


def epochs_of(folder):
    """The epochs of a run, without what they took."""
    with (Path(folder) / "summary.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]
