"""Frozen teachers: trained models whose logits a method learns from."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mbib_timm.data import Batch, Passes
from mbib_timm.data.decoding import fits
from mbib_timm.data.images import channelwise
from mbib_timm.environment import is_distributed
from mbib_timm.errors import MbibError
from mbib_timm.methods.base import Facts, Method
from mbib_timm.models.weights import LoadedModel, load_model
from mbib_timm.options import option

PREVIOUS = "previous"  # a literal here, as the command line reads it without importing this file


@dataclass(frozen=True)
class TeacherSettings:
    """Which models teach, and at which images they look."""

    teacher: list[str] = option(
        [PREVIOUS],
        "models to learn from, by the mean of their logits: previous (the previous stage), a run's folder, a "
        "published name such as mbib_resnet32.cifar100_lt_if100, or hf-hub:REPO",
        place=True,
    )
    teacher_pass: str = option(
        "step",
        "which images a teacher sees: step (the student's, in every step) or once (the training images without "
        "augmentation, before the first epoch)",
        choices=("step", "once"),
    )


class Renormalized(nn.Module):
    """A model that takes images normalised with other constants than its own.

    Args:
        model: the model.
        given: means and standard deviations of the images' channels, each (C,).
        own: those that the model was trained with.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, given: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.model = model
        (mean, std), (own_mean, own_std) = given, own
        # (p - m') / s' of a pixel p, from (p - m) / s.
        self.register_buffer("scale", (std / own_std).float().view(-1, 1, 1))
        self.register_buffer("shift", ((mean - own_mean) / own_std).float().view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images * self.scale + self.shift)


class Teachers(nn.Module):
    """Frozen models: always in evaluation mode, without gradients, and unchanged by training.

    A checkpoint keeps only their digest. They are loaded again from where they are, and must then be the same.

    Args:
        targets: what `TeacherSettings.teacher` names.
        facts: of the run.
        owner: the method, for messages.

    Raises:
        MbibError: a teacher that does not exist, or was trained on other classes or another input size.
    """

    def __init__(self, targets: Sequence[str], facts: Facts, owner: str) -> None:
        super().__init__()
        where = f"setting 'teacher' of method {owner!r}"
        if not targets:
            raise MbibError(f"{where}: expected at least one model")
        self.models = nn.ModuleList(_load(target, facts, where) for target in targets)
        self.requires_grad_(False).eval()
        self.digest = _digest(self)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the mean of the teachers' predicted logits (B, K) for the student's images (B, C, H, W)."""
        return torch.stack([model(images) for model in self.models]).mean(dim=0)

    def train(self, mode: bool = True) -> "Teachers":
        """Stay in evaluation mode."""
        return super().train(False)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the digest alone."""
        destination = {} if destination is None else destination
        destination[f"{prefix}digest"] = self.digest
        return destination

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        given = state_dict.get(f"{prefix}digest")
        if given is not None and not torch.equal(given, self.digest):
            raise RuntimeError("the teachers' weights differ from those that training began with")


class Taught(Method):
    """A method that learns from teachers; a base class. Its `Settings` extend `TeacherSettings`.

    `forward` asks `teacher_logits` for the teachers' answers to a batch.

    Raises:
        MbibError: what `Teachers` raises; ``teacher_pass: once`` where no table of logits can stand for the images.
    """

    Settings = TeacherSettings
    needs_images = True

    table: Tensor | None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.settings.teacher_pass == "once":
            self._require_table()
        self.teachers = Teachers(self.settings.teacher, self.facts, self.name)
        self.register_buffer("table", None, persistent=False)

    def _require_table(self) -> None:
        images, classes = int(self.facts.class_counts.sum()), len(self.facts.class_counts)
        if self.facts.mixed:
            raise MbibError(
                f"setting 'teacher_pass' of method {self.name!r}: 'once' needs the same images in every epoch, but the "
                "recipe mixes images; use teacher_pass: step"
            )
        if not fits(4 * images * classes, self.device):
            raise MbibError(
                f"setting 'teacher_pass' of method {self.name!r}: the logits of {images:,} images, {classes:,} each, "
                f"take {4e-9 * images * classes:.1f} GB, which do not fit onto {self.device}; use teacher_pass: step"
            )

    @torch.no_grad()
    def begin(self, data: Passes) -> None:
        """With ``teacher_pass: once``, evaluate the teachers on every training image: a table (N, K) of logits.

        A broken image that another one has replaced has no logits, and never occurs in training.
        """
        if self.settings.teacher_pass != "once":
            return
        counts = self.facts.class_counts
        table = torch.zeros(int(counts.sum()), len(counts), device=self.device)
        seen = torch.zeros(len(table), 1, device=self.device)
        for batch in data.train:
            table[batch.index] = self.teachers(batch.images).to(table.dtype)
            seen[batch.index] = 1
        if is_distributed():
            # Each process has seen its share; a replacement of a broken image may be in the shares of two.
            torch.distributed.all_reduce(table)
            torch.distributed.all_reduce(seen)
            table /= seen.clamp_(min=1)
        self.table = table

    def teacher_logits(self, batch: Batch) -> Tensor:
        """Return the teachers' logits (B, K) for a batch, without gradient."""
        return self.teachers(batch.images) if self.table is None else self.table[batch.index]


def _load(target: str, facts: Facts, where: str) -> nn.Module:
    """Load a teacher that fits the student's classes and images."""
    if target == PREVIOUS and facts.previous is None:
        raise MbibError(
            f"{where}: 'previous' is the stage before, and there is none; put a stage before this one (stages: "
            "[{method: bsce}, ...]), or name a trained model"
        )
    try:
        loaded = load_model(str(facts.previous) if target == PREVIOUS else target)
    except MbibError as error:
        raise MbibError(f"{where}: {error}") from None
    classes, size = len(facts.class_counts), tuple(loaded.preprocessing["input_size"])
    if loaded.num_classes != classes:
        raise MbibError(f"{where}: {target} has {loaded.num_classes} classes, the data have {classes}")
    if facts.class_names and loaded.class_names and facts.class_names != loaded.class_names:
        pairs = zip(facts.class_names, loaded.class_names, strict=True)
        own, other = next(pair for pair in pairs if pair[0] != pair[1])
        raise MbibError(f"{where}: {target} has other classes than the data, or another order: {other!r} for {own!r}")
    if facts.input_size is not None and size != facts.input_size:
        raise MbibError(
            f"{where}: {target} takes images of {_shape(size)}, the student's are {_shape(facts.input_size)}"
        )
    return _renormalized(loaded, facts)


def _shape(size: tuple[int, ...]) -> str:
    """Return a size (C, H, W) in words."""
    channels, height, width = size
    return f"{height} x {width} pixels in {channels} channel{'s' if channels > 1 else ''}"


def _renormalized(loaded: LoadedModel, facts: Facts) -> nn.Module:
    """Return a teacher that takes the student's normalised images, exactly as its own."""
    if facts.input_size is None:
        return loaded.module
    channels = facts.input_size[0]

    def constants(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
        wide = (channelwise(list(values), channels) for values in (mean, std))
        first, second = (torch.tensor(values, dtype=torch.float64) for values in wide)
        return first, second

    given = constants(facts.mean, facts.std)
    own = constants(loaded.preprocessing["mean"], loaded.preprocessing["std"])
    same = all(torch.equal(one, other) for one, other in zip(given, own, strict=True))
    return loaded.module if same else Renormalized(loaded.module, given, own)


def _digest(teachers: Teachers) -> Tensor:
    """Return the SHA-256 of all parameters and buffers, as 32 bytes on the CPU."""
    digest = hashlib.sha256()
    for name, value in sorted(teachers.models.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)
