"""Batches through timm's `create_loader`, with what it leaves out: seeded order, the last short batch, exact shards."""

from collections.abc import Iterator
from typing import Any

from timm.data import create_loader
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mbib_timm.data.images import ImageDataset, Split, from_worker
from mbib_timm.data.loaders import Place, ShardSampler, channelwise, drops_last, pil_mode, training_sampler
from mbib_timm.data.transforms import eval_transform, train_transform
from mbib_timm.errors import DataError
from mbib_timm.recipe import Recipe


class TimmLoader:
    """The `Loader` of data of any size: worker processes decode and augment, image by image.

    Args:
        loader: timm's loader.
        dataset: what it loads.
        sampler: chooses the order; None for streams, which do that themselves.
    """

    def __init__(self, loader: Any, dataset: Any, sampler: Any) -> None:
        self.loader, self.dataset, self.sampler = loader, dataset, sampler

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            yield from self.loader
        except DataError as error:
            raise from_worker(error) from None

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; it is a function of the recipe's seed and this number."""
        (self.dataset if self.sampler is None else self.sampler).set_epoch(epoch)

    def broken_images(self) -> list[str]:
        """Return the paths of images that were replaced because they could not be read."""
        return self.dataset.broken()


def timm_train_loader(split: Split, recipe: Recipe, input_size: tuple[int, int, int], place: Place) -> TimmLoader:
    """Build the training loader: shuffled, augmented, the last short batch kept.

    Args:
        split: training images.
        recipe: augmentation, batch size, seed, workers.
        input_size: (C, H, W).
        place: device and processes.

    Raises:
        DataError: fewer images than two, which BatchNorm cannot train on.
    """
    channels, height, width = input_size
    transform = train_transform(recipe, height, width)
    if split.stream is not None:
        stream = split.stream(True, pil_mode(channels))
        return _through_timm(stream, recipe, input_size, place, recipe.batch_size, None, transform)
    dataset = ImageDataset(split, pil_mode(channels), transform, replace_broken=True)
    sampler = training_sampler(len(dataset), recipe, place)
    loader = _through_timm(dataset, recipe, input_size, place, recipe.batch_size, sampler, transform)
    loader.loader.batch_sampler.drop_last = drops_last(len(sampler), recipe.batch_size)
    return loader


def timm_eval_loader(split: Split, recipe: Recipe, input_size: tuple[int, int, int], place: Place) -> TimmLoader:
    """Build an evaluation loader: in order, every image once over all processes.

    Args:
        split: images to evaluate.
        recipe: preprocessing, batch size, workers.
        input_size: (C, H, W).
        place: device and processes.
    """
    channels, height, width = input_size
    transform = eval_transform(recipe, height, width)
    if split.stream is not None:
        stream = split.stream(False, pil_mode(channels))
        return _through_timm(stream, recipe, input_size, place, recipe.validation_batch_size, None, transform)
    dataset = ImageDataset(split, pil_mode(channels), transform, replace_broken=False)
    sampler = ShardSampler(len(dataset), place.rank, place.world_size)
    return _through_timm(dataset, recipe, input_size, place, recipe.validation_batch_size, sampler, transform)


def _through_timm(
    dataset: Dataset,
    recipe: Recipe,
    input_size: tuple[int, int, int],
    place: Place,
    batch_size: int,
    sampler: Sampler | None,
    transform: Any,
) -> TimmLoader:
    on_cuda = place.device.type == "cuda"
    loader = create_loader(
        dataset,
        input_size=input_size,
        batch_size=batch_size,
        is_training=False,
        mean=channelwise(recipe.mean, input_size[0]),
        std=channelwise(recipe.std, input_size[0]),
        num_workers=recipe.workers,
        pin_memory=on_cuda if recipe.pin_mem is None else recipe.pin_mem,
        persistent_workers=False,  # workers that live on would keep the random state of the epoch before
        device=place.device,
    )
    dataset.transform = transform  # type: ignore[attr-defined]  # create_loader has put its own
    if sampler is not None:
        loader.batch_sampler.sampler = sampler
    return TimmLoader(loader, dataset, sampler)
