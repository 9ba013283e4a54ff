"""Batches through timm's `create_loader`, with what it leaves out: seeded order, the last short batch, exact shards."""

from collections.abc import Iterator, Sequence
from typing import Any

from timm.data import create_loader

from mbib_timm.data.augment import check_augmentation
from mbib_timm.data.batch import Batch
from mbib_timm.data.images import ImageDataset, Split, from_worker
from mbib_timm.data.loaders import IndexSampler, Place, ShardSampler, channelwise, drops_last, pil_mode
from mbib_timm.data.samplers import TrainingSampler
from mbib_timm.data.transforms import Views, eval_transform, train_transform
from mbib_timm.errors import DataError
from mbib_timm.recipe import Recipe


class TimmLoader:
    """The `Loader` of data of any size: worker processes decode and augment, image by image.

    Args:
        loader: timm's loader.
        dataset: what it loads.
        sampler: chooses the order.
        views: augmented copies of each image, which come as its channels.
    """

    def __init__(self, loader: Any, dataset: ImageDataset, sampler: IndexSampler, views: int = 1) -> None:
        self.loader, self.dataset, self.sampler, self.views = loader, dataset, sampler, views

    def __iter__(self) -> Iterator[Batch]:
        try:
            for images, targets in self.loader:
                yield Batch(images.chunk(self.views, dim=1), *targets.T.contiguous().unbind())
        except DataError as error:
            raise from_worker(error) from None

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; it is a function of the recipe's seed and this number."""
        self.sampler.set_epoch(epoch)

    def broken_images(self) -> list[str]:
        """Return the paths of images that were replaced because they could not be read."""
        return self.dataset.broken()


def timm_train_loader(
    split: Split,
    recipe: Recipe,
    input_size: tuple[int, int, int],
    place: Place,
    sampler: TrainingSampler,
    views: Sequence[Recipe] = (),
) -> TimmLoader:
    """Build one stream of training: ordered by the sampler, augmented, the last short batch kept.

    Args:
        split: training images.
        recipe: augmentation, batch size, workers.
        input_size: (C, H, W).
        place: device and processes.
        sampler: chooses the order.
        views: the recipe of each view of an image; that of the run alone when not given.
    """
    channels = input_size[0]
    views = views or (recipe,)
    for view in views:
        check_augmentation(view, input_size)
    whole = recipe.train_crop_mode == "pad"
    transform = Views([train_transform(view, input_size, whole) for view in views])
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
        replace_broken: give the next image for one that cannot be read; else that is an error.
    """
    channels, height, width = input_size
    transform = eval_transform(recipe, height, width)
    dataset = ImageDataset(split, pil_mode(channels), transform, replace_broken)
    sampler = ShardSampler(len(dataset), place.rank, place.world_size)
    return _through_timm(dataset, recipe, input_size, place, recipe.validation_batch_size, sampler, transform)


def _through_timm(
    dataset: ImageDataset,
    recipe: Recipe,
    input_size: tuple[int, int, int],
    place: Place,
    batch_size: int,
    sampler: IndexSampler,
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
    dataset.transform = transform  # create_loader has put its own
    loader.batch_sampler.sampler = sampler
    return TimmLoader(loader, dataset, sampler, views=views)
