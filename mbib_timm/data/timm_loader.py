"""Batches through timm's `create_loader`, with what it leaves out: seeded order, the last short batch, exact shards."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.data import create_loader
from torch.utils.data import Dataset

from mbib_timm.data.augment import check_augmentation
from mbib_timm.data.batch import Batch
from mbib_timm.data.images import ImageDataset, Split, from_worker
from mbib_timm.data.loaders import IndexSampler, Place, ShardSampler, channelwise, drops_last, pil_mode
from mbib_timm.data.samplers import TrainingSampler
from mbib_timm.data.transforms import Views, eval_transform, train_transform
from mbib_timm.errors import DataError
from mbib_timm.recipe import Recipe

# A stage's epochs are told to a stream as numbers of their own, so that its shards come in another order.
EPOCHS_OF_A_STAGE = 1 << 20


class TimmLoader:
    """The `Loader` of data of any size: worker processes decode and augment, image by image.

    Args:
        loader: timm's loader.
        dataset: what it loads.
        sampler: chooses the order; None for streams, which do that themselves.
        first_epoch: number of a stream's epoch 0.
        views: augmented copies of each image, which come as its channels.
    """

    def __init__(
        self, loader: Any, dataset: Any, sampler: IndexSampler | None, first_epoch: int = 0, views: int = 1
    ) -> None:
        self.loader, self.dataset, self.sampler, self.first_epoch = loader, dataset, sampler, first_epoch
        self.views = views

    def __iter__(self) -> Iterator[Batch]:
        try:
            for images, targets in self.loader:
                views = images.chunk(self.views, dim=1)
                if self.sampler is None:
                    yield Batch(views, targets, torch.full_like(targets, -1))
                else:
                    yield Batch(views, *targets.T.contiguous().unbind())
        except DataError as error:
            raise from_worker(error) from None

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; it is a function of the recipe's seed and this number."""
        if self.sampler is None:
            self.dataset.set_epoch(self.first_epoch + epoch)
        else:
            self.sampler.set_epoch(epoch)

    def broken_images(self) -> list[str]:
        """Return the paths of images that were replaced because they could not be read."""
        return self.dataset.broken()


def timm_train_loader(
    split: Split,
    recipe: Recipe,
    input_size: tuple[int, int, int],
    place: Place,
    sampler: TrainingSampler | None,
    stage: int = 0,
    views: Sequence[Recipe] = (),
) -> TimmLoader:
    """Build one stream of training: ordered by the sampler, augmented, the last short batch kept.

    Args:
        split: training images.
        recipe: augmentation, batch size, workers.
        input_size: (C, H, W).
        place: device and processes.
        sampler: chooses the order; None for a source that streams.
        stage: of the run, 0 for the first.
        views: the recipe of each view of an image; that of the run alone when not given.
    """
    channels = input_size[0]
    views = views or (recipe,)
    for view in views:
        check_augmentation(view, input_size)
    whole = recipe.train_crop_mode == "pad"
    transform = Views([train_transform(view, input_size, whole) for view in views])
    if split.stream is not None:
        stream = split.stream(True, pil_mode(channels))
        loader = _through_timm(stream, recipe, input_size, place, recipe.batch_size, None, transform, len(views))
        loader.first_epoch = stage * EPOCHS_OF_A_STAGE
        return loader
    assert sampler is not None
    dataset = ImageDataset(split, pil_mode(channels), transform, replace_broken=True)
    loader = _through_timm(dataset, recipe, input_size, place, recipe.batch_size, sampler, transform, len(views))
    loader.loader.batch_sampler.drop_last = drops_last(len(sampler), recipe.batch_size)
    return loader


def timm_eval_loader(
    split: Split, recipe: Recipe, input_size: tuple[int, int, int], place: Place, replace_broken: bool = False
) -> TimmLoader:
    """Build an evaluation loader: in order, every image once over all processes.

    Args:
        split: images to evaluate.
        recipe: preprocessing, batch size, workers.
        input_size: (C, H, W).
        place: device and processes.
        replace_broken: give the next image for one that cannot be read; else that is an error. Streams always raise.
    """
    channels, height, width = input_size
    transform = eval_transform(recipe, height, width)
    if split.stream is not None:
        stream = split.stream(False, pil_mode(channels))
        return _through_timm(stream, recipe, input_size, place, recipe.validation_batch_size, None, transform)
    dataset = ImageDataset(split, pil_mode(channels), transform, replace_broken)
    sampler = ShardSampler(len(dataset), place.rank, place.world_size)
    return _through_timm(dataset, recipe, input_size, place, recipe.validation_batch_size, sampler, transform)


def _through_timm(
    dataset: Dataset,
    recipe: Recipe,
    input_size: tuple[int, int, int],
    place: Place,
    batch_size: int,
    sampler: IndexSampler | None,
    transform: Any,
    views: int = 1,
) -> TimmLoader:
    on_cuda = place.device.type == "cuda"
    loader = create_loader(
        dataset,
        input_size=(views * input_size[0], *input_size[1:]),
        batch_size=batch_size,
        is_training=False,
        mean=views * channelwise(recipe.mean, input_size[0]),
        std=views * channelwise(recipe.std, input_size[0]),
        num_workers=recipe.workers,
        pin_memory=on_cuda if recipe.pin_mem is None else recipe.pin_mem,
        persistent_workers=False,  # workers that live on would keep the random state of the epoch before
        device=place.device,
    )
    dataset.transform = transform  # type: ignore[attr-defined]  # create_loader has put its own
    if sampler is not None:
        loader.batch_sampler.sampler = sampler
    return TimmLoader(loader, dataset, sampler, views=views)
