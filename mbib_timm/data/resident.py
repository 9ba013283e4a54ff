"""The resident loader: the whole split decoded once, on the device as uint8, and augmented there in batches."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mbib_timm.data.augment import Augmentation, create_augmentation
from mbib_timm.data.batch import Batch
from mbib_timm.data.decode import DecodedImages
from mbib_timm.data.image_cache import cached_decode, default_folder
from mbib_timm.data.images import ImageDataset, Split
from mbib_timm.data.loaders import IndexSampler, Place, ShardSampler, channelwise, drops_last, pil_mode, send
from mbib_timm.data.samplers import TrainingSampler
from mbib_timm.data.transforms import resident_transform
from mbib_timm.recipe import Recipe

# Pieces of an epoch that are augmented at once: all of CIFAR-100, a batch or two of 224-pixel images.
PIECE_BYTES = 1 << 30


class ResidentLoader:
    """The `Loader` of data that fit into the device's memory.

    Args:
        images: on the device.
        sampler: gives the images' indices in the order of the epoch.
        batch_size: images of a batch.
        drop_last: leave the last short batch out.
        augmentations: for training, one for each view of an image; None gives the images as they are, which are then
            all of one size.
        mean: of each channel, of images in 0..1.
        std: of each channel.
        seed: of the augmentation: seed and rank; and stage and stream where those are not the first.
        channels_last: memory format of the batches.
    """

    def __init__(
        self,
        images: DecodedImages,
        sampler: IndexSampler,
        batch_size: int,
        *,
        drop_last: bool,
        augmentations: Sequence[Augmentation | None],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: tuple[int, ...],
        channels_last: bool,
    ) -> None:
        self.images, self.sampler, self.batch_size = images, sampler, batch_size
        self.drop_last, self.augmentations, self.seed = drop_last, tuple(augmentations), seed
        self.channels_last = channels_last
        self.device = images.pixels.device
        self.mean = torch.tensor([255 * value for value in mean], device=self.device).view(1, -1, 1, 1)
        self.std = torch.tensor([255 * value for value in std], device=self.device).view(1, -1, 1, 1)
        self.epoch = 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of an epoch: functions of the recipe's seed and this number."""
        self.sampler.set_epoch(epoch)
        self.epoch = epoch

    def broken_images(self) -> list[str]:
        """Return the paths of images that were replaced because they could not be read."""
        return list(self.images.broken)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.from_numpy(np.fromiter(self.sampler, np.int64, len(self.sampler)))
        if len(order) == 0:  # of a process beyond the last image
            return
        on_device = send(order, self.device)
        targets, index = self.images.targets[on_device], self.images.index[on_device]
        taken = 0
        for pieces in zip(*(self._pieces(order, view) for view in range(len(self.augmentations))), strict=True):
            for views in zip(*(piece.split(self.batch_size) for piece in pieces), strict=True):
                size = len(views[0])
                if size == 1 and self.drop_last:
                    return
                batch = slice(taken, taken + size)
                yield Batch(tuple(self._normalize(pixels) for pixels in views), targets[batch], index[batch])
                taken += size

    def _pieces(self, order: Tensor, view: int) -> Iterator[Tensor]:
        """Give the images in order as (n, H, W, C), uint8, n a multiple of the batch size but for the last."""
        size = self._piece_size()
        augmentation = self.augmentations[view]
        if augmentation is None:
            stacked = self.images.stacked()
            for indices in send(order, self.device).split(size):
                yield stacked.index_select(0, indices)
            return
        seed, rank, *stream = self.seed
        # The first view's draws are those of a loader of one view.
        stream = stream if view == 0 else [*(stream or (0, 0)), view]
        entropy = np.random.SeedSequence([seed, rank, self.epoch, *stream]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(entropy[0] >> 1))
        draws = augmentation.draw(self.images.sizes[order], generator)
        for begin in range(0, len(order), size):
            piece = slice(begin, begin + size)
            drawn = [{name: value[piece] for name, value in each.items()} for each in draws]
            yield augmentation(self.images, order[piece], drawn)

    def _piece_size(self) -> int:
        """Return how many images are augmented at once, the same for all views: a multiple of the batch size."""
        needed = sum(augmentation.bytes_an_image for augmentation in self.augmentations if augmentation is not None)
        return self.batch_size * (max(1, PIECE_BYTES // (needed * self.batch_size)) if needed else 1)

    def _normalize(self, pixels: Tensor) -> Tensor:
        # As timm's loader does it, to the last bit.
        images = pixels.permute(0, 3, 1, 2).float().sub_(self.mean).div_(self.std)
        return images if self.channels_last else images.contiguous()


def decode_split(
    split: Split,
    recipe: Recipe,
    input_size: tuple[int, int, int],
    device: torch.device,
    training: bool,
    replace_broken: bool,
) -> DecodedImages:
    """Bring a split's images onto the device, decoded and through the fixed part of the preprocessing.

    Args:
        split: the images.
        recipe: preprocessing, cache folder, workers.
        input_size: (C, H, W).
        device: where they go.
        training: they are to be augmented.
        replace_broken: take the next image for one that cannot be read; else that is an error.

    Raises:
        DataError: an image that cannot be read and may not be replaced.
    """
    channels, height, width = input_size
    transform = resident_transform(recipe, height, width, training)
    dataset = ImageDataset(split, pil_mode(channels), transform, replace_broken)
    fixed = fixed_preprocessing(recipe, input_size, training)
    folder = {"auto": default_folder(), "none": None}.get(recipe.image_cache, Path(recipe.image_cache))
    return cached_decode(dataset, fixed, folder, recipe.workers).to(device)


def fixed_preprocessing(recipe: Recipe, input_size: tuple[int, int, int], training: bool) -> str:
    """Return a description of what decoded images have behind them: images that agree in it are the same."""
    kept = "whole" if training and recipe.train_crop_mode == "rrc" else "as evaluated"
    return f"{kept} {recipe.train_crop_mode} {input_size} {recipe.crop_pct} {recipe.interpolation}"


def resident_loader(
    images: DecodedImages,
    recipe: Recipe,
    input_size: tuple[int, int, int],
    place: Place,
    sampler: TrainingSampler | None,
    views: Sequence[Recipe] = (),
) -> ResidentLoader:
    """Build a loader: one stream of training, or of an evaluation.

    Args:
        images: on the device.
        recipe: augmentation, normalisation, batch sizes, seed.
        input_size: (C, H, W).
        place: device and processes.
        sampler: chooses the order of training, which also augments; None for an evaluation: every image once over all
            processes, in order, as it is.
        views: of training, the recipe of each view of an image; that of the run alone when not given.
    """
    channels = input_size[0]
    training = sampler is not None
    order = ShardSampler(len(images), place.rank, place.world_size) if sampler is None else sampler
    batch_size = recipe.batch_size if training else recipe.validation_batch_size
    seed: tuple[int, ...] = (recipe.seed, place.rank)
    if sampler is not None and (sampler.key.stage or sampler.key.stream):
        seed += (sampler.key.stage, sampler.key.stream)
    return ResidentLoader(
        images,
        order,
        batch_size,
        drop_last=training and drops_last(len(order), batch_size),
        augmentations=[create_augmentation(view, input_size) for view in views or (recipe,)] if training else [None],
        mean=channelwise(recipe.mean, channels),
        std=channelwise(recipe.std, channels),
        seed=seed,
        channels_last=recipe.channels_last,
    )
