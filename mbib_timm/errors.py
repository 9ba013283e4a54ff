"""Errors a user can mend: one short sentence each, naming the file, key or class at fault."""

import difflib
import re
import reprlib
from collections.abc import Iterable, Sequence


class MbibError(Exception):
    """A mistake in the input. The command line prints it without a traceback and exits with status 2."""

    exit_status = 2


class DataError(MbibError):
    """The data do not fit: a missing folder, a broken image, a malformed list line, a class without images."""


class CheckpointError(MbibError):
    """A checkpoint that is truncated, foreign, or does not fit the model."""


class BusyFolderError(MbibError):
    """Another process trains in the run's folder."""


class LostProcessError(MbibError):
    """Another process of a run has ended, and this one cannot go on without it."""

    exit_status = 1


class LostDeviceError(MbibError):
    """A device has failed or is gone, and its process cannot use it again."""

    exit_status = 1


class NonFiniteLossError(MbibError):
    """The training loss, or a weight, became infinite or not a number."""

    exit_status = 1


class NoFirstLossError(NonFiniteLossError):
    """The loss of the first step was infinite or not a number, before any update."""


def first_line(error: BaseException) -> str:
    """Return what an error says first; libraries add paragraphs."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class _Shown(reprlib.Repr):
    """Shows the beginning of what is long or nested."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 8, 8, 8
        self.maxstring, self.maxlong, self.maxother = 100, 40, 100

    def repr_int(self, value: int, level: int) -> str:
        """Show a number; Python writes none of thousands of digits."""
        return f"a number of {value.bit_length():,} bits" if value.bit_length() > 256 else repr(value)


def shown(value: object) -> str:
    """Return a value as Python writes it, cut where it is long or deep: what a message says of somebody's input."""
    return _Shown().repr(value)


def few(names: Sequence[object], most: int = 5) -> str:
    """Return the first of some names in a line, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(map(str, names[:most]))}{more}"


# Share of letters by which a name is behind the nearest one that is not named beside it.
FAR_BEHIND = 0.15


def nearest(name: str, valid: Iterable[str], most: int = 3, alike: float = 0.65) -> list[str]:
    """Return the valid names that a name may be a slip of, the nearest first, whatever the case of their letters.

    Args:
        name: that is not known.
        valid: the names that are.
        most: names to return.
        alike: share of the letters of both names together that stand in the same order.
    """
    own, folded = name.casefold(), {each.casefold(): each for each in valid}
    near = difflib.get_close_matches(own, folded, n=most, cutoff=alike)
    how_alike = {each: difflib.SequenceMatcher(None, each, own).ratio() for each in near}
    return [folded[each] for each in near if how_alike[each] > how_alike[near[0]] - FAR_BEHIND]


def _whole_of(part: str, names: Iterable[str]) -> list[str]:
    """Return the first three names that begin or end with a name, as words: ``class_means`` of ``means``."""
    word = re.escape(part)
    whole = re.compile(rf"{word}[^a-z].*|.*[^a-z]{word}", re.IGNORECASE | re.DOTALL)
    return [each for each in names if part and whole.fullmatch(each)][:3]


# What other programs call some keys of a recipe, where the nearest name is not the one that is meant.
ALIASES = {
    "aa": ("augment", "auto_augment", "randaugment"),
    "amp": ("fp16", "bf16", "mixed_precision", "precision"),
    "batch_size": ("bs", "batch"),
    "clip_grad": ("clip", "grad_clip", "max_grad_norm", "gradient_clip_val"),
    "data_dir": ("data", "data_path", "data_root", "root", "path"),
    "device": ("gpu", "gpus", "cuda"),
    "epochs": ("num_epochs", "max_epochs"),
    "experiment": ("name", "exp_name", "run_name"),
    "grad_accum_steps": ("accum_iter", "accumulation_steps", "accumulate_grad_batches"),
    "imbalance": ("imb_type",),
    "img_size": ("size", "input_size", "image_size", "resolution"),
    "initial_checkpoint": ("ckpt", "finetune"),
    "lr": ("learning_rate", "base_lr"),
    "method": ("loss", "loss_type", "criterion", "algorithm"),
    "model": ("arch", "architecture", "net", "network", "backbone"),
    "model_ema": ("ema",),
    "opt": ("optimizer",),
    "output": ("output_dir", "out", "out_dir", "outdir", "save_dir", "work_dir", "log_dir"),
    "sched": ("scheduler", "lr_scheduler", "lr_schedule"),
    "seed": ("random_seed", "manual_seed"),
    "smoothing": ("label_smoothing",),
    "torchcompile": ("compile",),
    "train": ("freeze", "freeze_backbone"),
    "val_fraction": ("val_ratio", "test_size"),
    "warmup_epochs": ("warmup",),
    "weight_decay": ("wd",),
    "workers": ("num_workers", "num_threads"),
}


def _as_key(name: str) -> str:
    """Return a flag as the recipe key that it stands for; any other name as it is."""
    return name.removeprefix("--").replace("-", "_").casefold()


def _called_otherwise(name: str, names: Iterable[str]) -> list[str]:
    """Return the valid name of what other programs call by a name."""
    return [each for each in names if _as_key(name) in ALIASES.get(_as_key(each), ())]


# What lists the valid names of some kind.
LISTED = {
    "recipe": "mbib recipes lists them",
    "sweep or recipe": "mbib recipes lists them",
    "method": "mbib methods lists them",
    "model": "mbib models --all lists this package's",
    "model or folder": "mbib models --all lists this package's",
    "recipe key": "mbib train --help lists them",
    "key": "mbib train --help lists them",
}


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> MbibError:
    """Build the error for an unknown name of a kind, such as ``"method"``, with the nearest valid names."""
    names = sorted(valid)
    if near := _called_otherwise(name, names) or nearest(name, names) or _whole_of(name, names):
        hint = f"did you mean {' or '.join(map(repr, near))}?"
    elif not names:
        hint = "there are none."
    elif len(names) <= 20:
        hint = f"choose from {', '.join(names)}."
    else:
        of_command = kind.removeprefix("flag of ")
        listed = f"{of_command} --help lists them" if of_command != kind else LISTED.get(kind, "")
        listed = listed and f"; {listed}"
        hint = f"there are {len(names)} valid names, e.g. {', '.join(names[:3])}{listed}."
    return MbibError(f"unknown {kind} {shown(name)}: {hint}")
