"""The two loaders: the resident one, whose images lie decoded on the device and are augmented there in batches; and
timm's, for data of any size.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.data import create_loader
from timm.data.loader import fast_collate
from torch import Tensor

from mbib_timm.data.augment import Augmentation, check_augmentation, create_augmentation
from mbib_timm.data.batch import Batch, send
from mbib_timm.data.decoding import DecodedImages
from mbib_timm.data.images import Drawn, ImageDataset, Split, channelwise, from_worker, pil_mode
from mbib_timm.data.samplers import IndexSampler, ShardSampler, TrainingSampler, batches_of, drops_last
from mbib_timm.data.transforms import eval_transform, evaluation_crop, stacked_views, train_transform
from mbib_timm.environment import World
from mbib_timm.errors import DataError
from mbib_timm.recipe import Recipe

# Pieces of an epoch that are augmented at once: all of CIFAR-100, a batch or two of 224-pixel images.
PIECE_BYTES = 1 << 30


class OrderedLoader:
    """What the `Loader` of data that are at hand knows: how many batches, and the order of an epoch.

    Args:
        sampler: gives the indices in the order of the epoch.
        batch_size: images of a batch.
        drop_last: leave the last short batch out.
        broken: paths of images that could not be read, and were replaced or left out.
    """

    def __init__(self, sampler: IndexSampler, batch_size: int, drop_last: bool, broken: Sequence[str]) -> None:
        self.sampler, self.batch_size, self.drop_last, self.broken = sampler, batch_size, drop_last, broken
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return batches_of(len(self.sampler), self.batch_size, self.drop_last)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose an epoch and its first batch; order, and what else is drawn, are functions of the recipe's seed and
        the epoch."""
        self.sampler.set_epoch(epoch)
        self.epoch, self.start = epoch, start

    def broken_images(self) -> list[str]:
        """Return the paths of images that could not be read, and were replaced or left out."""
        return list(self.broken)

    def order(self) -> Tensor:
        """Return the indices of this epoch, in host memory."""
        return torch.from_numpy(self.sampler.order())


class ResidentLoader(OrderedLoader):
    """The `Loader` of data that fit into the device's memory: one stream of training, or an evaluation.

    Args:
        images: on the device.
        recipe: augmentation, normalisation, batch sizes, seed.
        input_size: (C, H, W).
        world: the device, and this process among those that share the data.
        sampler: chooses the order of training, which also augments; None for an evaluation: every image once over all
            processes, in order, as it is.
        views: of training, the recipe of each view of an image; that of the run alone when not given.
    """

    def __init__(
        self,
        images: DecodedImages,
        recipe: Recipe,
        input_size: tuple[int, int, int],
        world: World,
        sampler: TrainingSampler | None,
        views: Sequence[Recipe] = (),
    ) -> None:
        order = ShardSampler(len(images), world.rank, world.world_size) if sampler is None else sampler
        batch_size = recipe.validation_batch_size if sampler is None else recipe.batch_size
        super().__init__(order, batch_size, sampler is not None and drops_last(len(order), batch_size), images.broken)
        self.images, self.device, self.channels_last = images, images.pixels.device, recipe.channels_last
        self.augmentations: list[Augmentation | None] = [None]  # images as they are, which are then all of one size
        self.seed, self.stream = (recipe.seed, world.rank), (0, 0)
        if sampler is not None:
            self.augmentations = [create_augmentation(view, input_size) for view in views or (recipe,)]
            self.stream = (sampler.key.stage, sampler.key.stream)
        mean, std = (channelwise(recipe.settled(key), input_size[0]) for key in ("mean", "std"))
        self.mean = torch.tensor([255 * value for value in mean], device=self.device).view(1, -1, 1, 1)
        self.std = torch.tensor([255 * value for value in std], device=self.device).view(1, -1, 1, 1)

    def __iter__(self) -> Iterator[Batch]:
        order = self.order()
        if len(order) == 0:  # of a process beyond the last image
            return
        on_device = send(order, self.device)
        targets, index = self.images.targets[on_device], self.images.index[on_device]
        begin, size = self.start * self.batch_size, self._piece_size()
        taken = begin - begin % size  # pieces begin where they always do
        views = range(len(self.augmentations))
        for pieces in zip(*(self._pieces(order, view, taken, size) for view in views), strict=True):
            for batches in zip(*(piece.split(self.batch_size) for piece in pieces), strict=True):
                number = len(batches[0])
                if number == 1 and self.drop_last:
                    return
                batch = slice(taken, taken + number)
                if taken >= begin:
                    yield Batch(tuple(self._normalize(pixels) for pixels in batches), targets[batch], index[batch])
                taken += number

    def _pieces(self, order: Tensor, view: int, first: int, size: int) -> Iterator[Tensor]:
        """Give the images in order, from a place on, as (n, H, W, C), uint8, `size` of them but for the last."""
        augmentation = self.augmentations[view]
        if augmentation is None:
            stacked = self.images.stacked()
            for indices in send(order[first:], self.device).split(size):
                yield stacked.index_select(0, indices)
            return
        # The first view's draws are those of a loader of one view; stage and stream count where they are not the first.
        stream = (*self.stream, view) if view else self.stream
        key = [*self.seed, self.epoch, *(stream if any(stream) else ())]
        entropy = np.random.SeedSequence(key).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(entropy[0]) >> 1)
        draws = augmentation.draw(self.images.sizes[order], generator)
        for begin in range(first, len(order), size):
            piece = slice(begin, begin + size)
            drawn = [{name: value[piece] for name, value in each.items()} for each in draws]
            yield augmentation(self.images, order[piece], drawn)

    def _piece_size(self) -> int:
        """Return how many images are augmented at once, the same for all views: a multiple of the batch size."""
        needed = sum(augmentation.bytes_per_image for augmentation in self.augmentations if augmentation is not None)
        return self.batch_size * (max(1, PIECE_BYTES // (needed * self.batch_size)) if needed else 1)

    def _normalize(self, pixels: Tensor) -> Tensor:
        # As timm's loader does it, to the last bit.
        images = pixels.permute(0, 3, 1, 2).float().sub_(self.mean).div_(self.std)
        return images if self.channels_last else images.contiguous()


class TimmLoader:
    """The `Loader` of data of any size: worker processes decode and augment, image by image.

    Args:
        loader: timm's; its sampler becomes this one's.
        dataset: what it loads.
        sampler: chooses the order.
        views: augmented copies of each image, which come as its channels.
        key: what the draws of an image are a function of, beside epoch and place in it; None for what was drawn before.
    """

    def __init__(
        self,
        loader: Any,
        dataset: ImageDataset,
        sampler: IndexSampler,
        views: int = 1,
        key: tuple[int, ...] | None = None,
    ) -> None:
        self.loader, self.dataset, self.views = loader, dataset, views
        self.places = loader.batch_sampler.sampler = _Places(sampler, key)

    def __iter__(self) -> Iterator[Batch]:
        try:
            for images, targets in self.loader:
                if len(targets) == 0:  # of a batch none of which can be read
                    continue
                yield Batch(images.chunk(self.views, dim=1), *targets.T.contiguous().unbind())
        except DataError as error:
            raise from_worker(error) from None

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the order of an epoch, a function of the recipe's seed and this number; and its first batch."""
        self.places.sampler.set_epoch(epoch)
        self.places.epoch, self.places.start = epoch, start * self.loader.batch_sampler.batch_size

    def broken_images(self) -> list[str]:
        """Return the paths of images that could not be read, and were replaced or left out."""
        return self.dataset.broken()


class _Places:
    """What timm's loader takes of an epoch: the images from a place on, on request each with the key of its draws."""

    def __init__(self, sampler: IndexSampler, key: tuple[int, ...] | None) -> None:
        self.sampler, self.key = sampler, key
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int | Drawn]:
        indices = self.sampler.since(self.start)
        if self.key is None:
            return indices
        return (Drawn(index, (*self.key, self.epoch, place)) for place, index in enumerate(indices, self.start))


def _collate(size: tuple[int, int, int], batch: list[tuple[Tensor, np.ndarray] | None]) -> tuple[Tensor, Tensor]:
    """Collate as timm does, to images (B, C, H, W), uint8, of a size (C, H, W), and labels with positions (B, 2).

    Some or all of the images may be left out.
    """
    readable = [item for item in batch if item is not None]
    if not readable:
        return torch.zeros(0, *size, dtype=torch.uint8), torch.zeros(0, 2, dtype=torch.int64)
    collated: tuple[Tensor, Tensor] = fast_collate(readable)
    return collated


def timm_train_loader(
    split: Split,
    recipe: Recipe,
    input_size: tuple[int, int, int],
    world: World,
    sampler: IndexSampler,
    views: Sequence[Recipe] = (),
) -> TimmLoader:
    """Build one stream of training: ordered by the sampler, augmented, the last short batch kept.

    Args:
        split: training images.
        recipe: augmentation, batch size, workers.
        input_size: (C, H, W).
        world: the device.
        sampler: chooses the order.
        views: the recipe of each view of an image; that of the run alone when not given.
    """
    views = views or (recipe,)
    for view in views:
        check_augmentation(view, input_size)
    whole = recipe.train_crop_mode == "pad"
    transform = partial(stacked_views, [train_transform(view, input_size, whole) for view in views])
    dataset = ImageDataset(split, pil_mode(input_size[0]), transform, replace_broken=True)
    key = None
    # So that an image is augmented alike whether or not those before it were read.
    if recipe.checkpoint_steps is not None and isinstance(sampler, TrainingSampler):
        key = (recipe.seed, world.rank, sampler.key.stage, sampler.key.stream)
    return _through_timm(dataset, recipe, input_size, world, sampler, training=True, views=len(views), key=key)


def timm_eval_loader(
    split: Split,
    recipe: Recipe,
    input_size: tuple[int, int, int],
    world: World,
    replace_broken: bool = False,
    sampler: IndexSampler | None = None,
) -> TimmLoader:
    """Build an evaluation loader: in order, every image once over all processes.

    Args:
        split: images to evaluate.
        recipe: preprocessing, batch size, workers.
        input_size: (C, H, W).
        world: the device, and this process among those that share the images.
        replace_broken: give the next image for one that cannot be read; else leave it out.
        sampler: another order, or a part of the images.
    """
    dataset = ImageDataset(split, pil_mode(input_size[0]), eval_transform(recipe, input_size), replace_broken)
    sampler = sampler or ShardSampler(len(dataset), world.rank, world.world_size)
    return _through_timm(dataset, recipe, input_size, world, sampler, training=False)


def _through_timm(
    dataset: ImageDataset,
    recipe: Recipe,
    input_size: tuple[int, int, int],
    world: World,
    sampler: IndexSampler,
    *,
    training: bool,
    views: int = 1,
    key: tuple[int, ...] | None = None,
) -> TimmLoader:
    channels, height, width = input_size
    batch_size = recipe.batch_size if training else recipe.validation_batch_size
    transform = dataset.transform
    loader = create_loader(
        dataset,
        input_size=(views * channels, height, width),
        batch_size=batch_size,
        is_training=training,
        mean=views * channelwise(recipe.settled("mean"), channels),
        std=views * channelwise(recipe.settled("std"), channels),
        num_workers=recipe.workers,
        pin_memory=world.device.type == "cuda" if recipe.pin_mem is None else recipe.pin_mem,
        collate_fn=partial(_collate, (views * channels, height, width)),
        persistent_workers=False,  # workers that live on would keep the random state of the epoch before
        device=world.device,
        **evaluation_crop(recipe),
    )
    # What `create_loader` has no parameters for. The last short batch of training, which it always drops.
    loader.batch_sampler.drop_last = training and drops_last(len(sampler), batch_size)
    # Training's transform: several views, padded crops, rotation, hue, AutoAugment's policy for CIFAR, Cutout, and
    # colour jitter beside a policy. That of an evaluation is made of the parameters above.
    if training:
        dataset.transform = transform
    # An order that is a function of the recipe's seed, and an evaluation over several processes that sees no image
    # twice: its own samplers draw from torch's global generator, and repeat images until all processes have as many.
    return TimmLoader(loader, dataset, sampler, views, key)
