"""Mixing: mixup, CutMix and CMO, label smoothing, and the soft targets that all of them make.

Batches are mixed on the device once they are augmented and normalised, the same with every loader, and outside the
training step, whose shapes stay the same: with any of this on, targets are (B, K) in every batch, mixed or not.

CMO (Park et al. 2022) is CutMix whose pasted images come from a second stream that favours rare classes, with
probability 0.5 and not in the first and last 3 epochs. With ``cutmix_sampler: reverse`` that stream draws class k by
1/n_k; the authors' code weighs images, not classes, by 1/n_k, which is ``balanced``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mbib_timm.data.batch import Batch, Loader, TrainLoader, send
from mbib_timm.recipe import Recipe

# Keeps these draws apart from those of samplers and augmentations, whose generators have seeds of the same numbers.
SPAWN_KEY = (11,)


class Box(NamedTuple):
    """A rectangle of an image, in pixels; bottom and right are the first outside."""

    top: int
    bottom: int
    left: int
    right: int

    def crop(self, images: Tensor) -> Tensor:
        """Return this part of images (..., H, W), not copied."""
        return images[..., self.top : self.bottom, self.left : self.right]


class Mix(NamedTuple):
    """What is drawn for a batch that is mixed.

    Attributes:
        share: lambda, what the batch's own images count; the images mixed in count 1 - lambda.
        order: positions (B,) in the batch of the images mixed in; None where they come from another stream.
        box: that CutMix pastes; None for mixup.
    """

    share: float
    order: np.ndarray | None
    box: Box | None


def soft_targets(targets: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Return smoothed targets ``(1 - eps) [j = y] + eps / K``, (B, K), float32 (Szegedy et al. 2016, section 7).

    Args:
        targets: labels y (B,).
        num_classes: K.
        smoothing: eps.
    """
    off = smoothing / num_classes
    return torch.full((len(targets), num_classes), off, device=targets.device).scatter_(
        1, targets[:, None], 1 - smoothing + off
    )


def mixup(values: Tensor, others: Tensor, share: float) -> Tensor:
    """Return ``lambda x + (1 - lambda) x'`` of images or of soft targets (Zhang et al. 2018, eq. 1).

    Args:
        values: x, of any shape.
        others: x', of the same.
        share: lambda.
    """
    return values.lerp(others, 1 - share)


def cutmix_box(share: float, centre: tuple[int, int], height: int, width: int) -> tuple[Box, float]:
    """Return CutMix's box and the share of the image around it (Yun et al. 2019, eq. 2).

    The box has the image's shape and the area share ``1 - lambda``; the part outside the image is cut off, and lambda
    becomes the true share of the area.

    Args:
        share: lambda.
        centre: row and column of the box's centre.
        height: of the image, in pixels.
        width: of the image.
    """
    side = (1 - share) ** 0.5
    rows, columns = int(height * side), int(width * side)
    top, left = centre[0] - rows // 2, centre[1] - columns // 2
    box = Box(max(0, top), min(height, top + rows), max(0, left), min(width, left + columns))
    area = (box.bottom - box.top) * (box.right - box.left)
    return box, 1 - area / (height * width)


def paste(images: Tensor, patches: Tensor, box: Box) -> Tensor:
    """Return copies of images (B, C, H, W) with patches (B, C, h, w) in a box of that size."""
    pasted = images.clone()
    box.crop(pasted).copy_(patches)
    return pasted


@dataclass(frozen=True)
class Mixing:
    """How a stage's batches are mixed.

    Attributes:
        recipe: of the stage: its mixing keys, its epochs and its seed.
        num_classes: K.
        rank: of this process.
    """

    recipe: Recipe
    num_classes: int
    rank: int = 0

    def mixes(self, epoch: int) -> bool:
        """Return whether batches of an epoch, counted from 0, are mixed."""
        off = self.recipe.mixup_off_epochs
        return (self.recipe.mixup > 0 or self.recipe.cutmix > 0) and off <= epoch < self.recipe.epochs - off

    def generator(self, epoch: int, stream: int = 0) -> np.random.RandomState:
        """Return what the batches of an epoch's stream are drawn with, one after another.

        numpy has frozen this kind of generator, so that draws outlive numpy's versions.
        """
        key = [self.recipe.seed, epoch, self.rank, self.recipe.stage, stream]
        entropy = np.random.SeedSequence(key, spawn_key=SPAWN_KEY)
        return np.random.RandomState(np.random.MT19937(entropy))

    def draw(self, generator: np.random.RandomState, images: torch.Size) -> Mix | None:
        """Draw how a batch of images (B, C, H, W) is mixed; None for not at all."""
        recipe = self.recipe
        if generator.random_sample() >= recipe.mixup_prob:
            return None
        cuts = recipe.cutmix > 0
        if cuts and recipe.mixup > 0:
            cuts = generator.random_sample() < recipe.mixup_switch_prob
        alpha = recipe.cutmix if cuts else recipe.mixup
        share = float(generator.beta(alpha, alpha))
        size, _, height, width = images
        order = None if cuts and recipe.cutmix_sampler is not None else generator.permutation(size)
        if not cuts:
            return Mix(share, order, None)
        centre = int(generator.randint(height)), int(generator.randint(width))
        box, share = cutmix_box(share, centre, height, width)
        return Mix(share, order, box)

    def soften(self, batch: Batch) -> Batch:
        """Return a batch as it is, with soft targets."""
        return batch._replace(targets=soft_targets(batch.targets, self.num_classes, self.recipe.smoothing))

    def apply(self, batch: Batch, mix: Mix, foregrounds: Batch | None = None) -> Batch:
        """Mix a batch; all views of an image with the same views of one other image, by the same share and box.

        Args:
            batch: with labels (B,).
            mix: as drawn.
            foregrounds: at least B images of another stream, where the images mixed in come from there.
        """
        source = batch if foregrounds is None else foregrounds
        chosen: slice | Tensor = slice(len(batch.targets))
        if mix.order is not None:
            chosen = send(torch.from_numpy(mix.order), batch.targets.device)
        pairs, box = zip(batch.views, source.views, strict=True), mix.box
        if box is None:
            views = tuple(mixup(view, other[chosen], mix.share) for view, other in pairs)
        else:
            views = tuple(paste(view, box.crop(other)[chosen], box) for view, other in pairs)
        own = soft_targets(batch.targets, self.num_classes, self.recipe.smoothing)
        others = soft_targets(source.targets[chosen], self.num_classes, self.recipe.smoothing)
        return Batch(views, mixup(own, others, mix.share), batch.index)


class MixedTrainLoader(TrainLoader):
    """A `TrainLoader` whose batches are mixed, each stream's within itself, and have soft targets.

    Args:
        streams: as a `TrainLoader` has them.
        mixing: how.
        foregrounds: the stream that CutMix's foregrounds come from, as long as the others; None for the same batch. Of
            its batches only as many are taken as are mixed.
    """

    def __init__(self, streams: Sequence[Loader], mixing: Mixing, foregrounds: Loader | None = None) -> None:
        super().__init__(streams)
        self.mixing, self.foregrounds = mixing, foregrounds
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the order and the mixing of an epoch, functions of the recipe's seed and this number; and its first
        batch."""
        super().set_epoch(epoch, start)
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[tuple[Batch, ...]]:
        """Give the batches of one pass, targets (B, K)."""
        mixing = self.mixing
        if not mixing.mixes(self.epoch):
            for batches in super().__iter__():
                yield tuple(mixing.soften(batch) for batch in batches)
            return
        generators = [mixing.generator(self.epoch, stream) for stream in range(len(self.streams))]
        foregrounds: Iterator[Batch] | None = None
        for batches in super().__iter__():
            if foregrounds is None:  # the first batches, whose size all have
                foregrounds = self._foregrounds(self._drawn_before(batches, generators))
            yield tuple(self._mixed(*pair, foregrounds) for pair in zip(batches, generators, strict=True))

    def _drawn_before(self, batches: Sequence[Batch], generators: Sequence[np.random.RandomState]) -> int:
        """Draw for the batches before the first, all of them whole; return how many have taken foregrounds."""
        taken = 0
        for _ in range(self.start):
            for batch, generator in zip(batches, generators, strict=True):
                shape = torch.Size((self.mixing.recipe.batch_size, *batch.images.shape[1:]))
                mix = self.mixing.draw(generator, shape)
                taken += mix is not None and mix.order is None
        return taken

    def _foregrounds(self, taken: int) -> Iterator[Batch]:
        """Give the batches of foregrounds from one on. Once some are taken a loader has started, which draws from
        torch's generator; so it does then at once."""
        if self.foregrounds is None:
            return iter(())
        self.foregrounds.set_epoch(self.epoch, taken)
        left = iter(self.foregrounds)
        return chain([*islice(left, 1)], left) if taken else left

    def _mixed(self, batch: Batch, generator: np.random.RandomState, foregrounds: Iterator[Batch]) -> Batch:
        mix = self.mixing.draw(generator, batch.images.shape)
        if mix is None:
            return self.mixing.soften(batch)
        # The k-th batch of foregrounds is short only if it is the last, and then so is the k-th batch of an epoch.
        return self.mixing.apply(batch, mix, next(foregrounds) if mix.order is None else None)

    def broken_images(self) -> list[str]:
        """Return the paths of images that were replaced because they could not be read, each once."""
        found = super().broken_images()
        return found if self.foregrounds is None else list(dict.fromkeys(found + self.foregrounds.broken_images()))
