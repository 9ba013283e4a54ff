"""Features of a frozen backbone: computed once, kept on the disk, mapped into memory; and batches of them.

An entry of the cache is a folder of safetensors files, named by a digest of everything that decides its numbers, but
for their rounding: the backbone's weights and taps, each image's path, size and time of change, the labels, the
preprocessing, and which pass over the images it is. The first pass sees the images as an evaluation does; further ones
are augmented, alike for every seed of a recipe and any number of workers, so that the runs of a sweep share them. A
file holds some thousand images and is there as a whole or not at all, with a checksum: what a killed process has
finished, the next one finds.
"""

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mbib_timm.data.batch import Batch, send
from mbib_timm.data.decoding import FileStates, cache_folder, entry_key, fits
from mbib_timm.data.images import Split, pil_mode
from mbib_timm.data.loaders import OrderedLoader, TimmLoader, timm_eval_loader, timm_train_loader
from mbib_timm.data.samplers import IndexSampler, OrderedSampler, ShardSampler, TrainingSampler, drops_last
from mbib_timm.data.transforms import evaluation_crop
from mbib_timm.environment import World
from mbib_timm.errors import DataError, MbibError
from mbib_timm.files import remove_debris, write_bytes
from mbib_timm.progress import Progress
from mbib_timm.recipe import KEYS, Recipe

# Of the cache: the version of its format, and the images of a file.
FORMAT = 1
CHUNK = 4096
# Of the passes' augmentation: not the recipe's, so that runs of several seeds share them.
SEED = 0
# Keeps the draws among passes apart from those of samplers and mixing, whose generators have seeds of the same numbers.
SPAWN_KEY = (12,)
# What of a recipe decides how an augmented pass sees an image.
AUGMENTATION = [name for name, item in KEYS.items() if item.metadata["group"] in ("input", "augmentation")]


class Observer(Protocol):
    """A frozen backbone.

    Attributes:
        width: D, of all that it observes of an image.
        digest: of everything that decides its features but for the images.
        dtype: of the features: float32, or float16 where it computes in half precision.
    """

    width: int
    digest: str
    dtype: torch.dtype

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features (B, D) of images (B, C, H, W)."""


@dataclass(frozen=True)
class Features:
    """Features of a split's images.

    Attributes:
        passes: of each pass over the images, (N, D) in one piece or in chunks, in host memory or on a device.
        targets: labels (N,), int64.
        index: position in the split of what each row holds, (N,), int64.
        broken: paths of images that could not be read: in training each row holds the image after it, in an evaluation
            they are left out.
    """

    passes: tuple[tuple[Tensor, ...], ...]
    targets: Tensor
    index: Tensor
    broken: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> "Features":
        """Return them with labels and positions on a device; and the features in one piece there, where they fit."""
        passes = self.passes
        if fits(sum(rows.nbytes for chunks in passes for rows in chunks), device):
            passes = tuple((torch.cat(chunks).to(device),) for chunks in passes)
        return Features(passes, self.targets.to(device), self.index.to(device), self.broken)

    def rows(self, order: Tensor, drawn: Tensor, device: torch.device) -> Tensor:
        """Return rows (B, D), float32, on a device: places `order` (B,) of the passes `drawn` (B,), in host memory."""
        (first, *_), *_ = self.passes
        if len(self.passes) == 1 and len(self.passes[0]) == 1:
            return first[send(order, first.device)].to(device).float()
        found = first.new_empty(len(order), first.shape[1])
        for number, chunks in enumerate(self.passes):
            begin = 0
            for chunk in chunks:
                wanted = ((drawn == number) & (order >= begin) & (order < begin + len(chunk))).nonzero()[:, 0]
                if len(wanted):
                    rows = chunk[send(order[wanted] - begin, chunk.device)]
                    found[send(wanted, found.device)] = rows.to(found.device)
                begin += len(chunk)
        return found.to(device).float()


@dataclass(frozen=True)
class FeatureStore:
    """The features of a run's images.

    Attributes:
        observe: the backbone.
        recipe: preprocessing, passes and their augmentation, batch sizes, workers, cache folder.
        input_size: (C, H, W) of the images.
        world: the device, and this process among others.
        kept: what this process has on its devices, or mapped, already, by key and device; it grows.
        states: of the images' files, as this process knows them.
    """

    observe: Observer
    recipe: Recipe
    input_size: tuple[int, int, int]
    world: World
    kept: dict[str, Features]
    states: FileStates

    def train_loader(self, split: Split, sampler: TrainingSampler) -> "FeatureLoader":
        """Return batches of training images in the sampler's order, each image from one of the passes.

        Raises:
            DataError: no image can be read, or features that are not finite.
        """
        found = [self._pass(split, number, replace_broken=True) for number in range(self.recipe.feature_passes or 1)]
        features = replace(found[0], passes=tuple(each.passes[0] for each in found))
        return FeatureLoader(features, sampler, self.recipe.batch_size, self.world.device, self.recipe.seed)

    def eval_loader(self, split: Split, replace_broken: bool = False) -> "FeatureLoader":
        """Return batches of a split in order, every image once over all processes.

        Args:
            split: the images.
            replace_broken: give the next image for one that cannot be read; else leave it out.

        Raises:
            DataError: no image can be read, or features that are not finite.
        """
        features = self._pass(split, 0, replace_broken)
        order = ShardSampler(len(features), self.world.rank, self.world.world_size)
        return FeatureLoader(features, order, self.recipe.validation_batch_size, self.world.device)

    def _pass(self, split: Split, number: int, replace_broken: bool) -> Features:
        job = _Pass(self.observe, self.recipe, self.input_size, self.world, split, number, replace_broken)
        files = self.states.of(split, self.world)
        # Of images that are not in files, as those of a package, the split itself, which `states` holds, is known.
        key = job.key(files or f"split {id(split)}")
        place = f"{key} {self.world.device}"
        if place not in self.kept:
            folder = None if files is None else cache_folder(self.recipe, "features")
            found = job.features([*job.chunks(None)] if folder is None else _cached(job, folder / key))
            self.kept[place] = found.to(self.world.device)
        return self.kept[place]


class Rows(NamedTuple):
    """Features (N, D), and the position in the split of what each row holds, (N,), int64."""

    features: Tensor
    index: Tensor  # type: ignore[assignment]  # hides a method of tuples that nothing calls on rows


@dataclass(frozen=True)
class _Pass:
    """One pass over a split's images: the first, 0, as an evaluation sees them, others augmented."""

    observe: Observer
    recipe: Recipe
    input_size: tuple[int, int, int]
    world: World
    split: Split
    number: int
    replace_broken: bool

    def key(self, images: str) -> str:
        """Return the digest that names the pass over these images, for that of their files or what else tells them."""
        recipe, size = self.recipe, self.input_size
        seen: dict[str, Any] = {"mean": recipe.mean, "std": recipe.std, **evaluation_crop(recipe)}
        if self.number:
            seen |= {"seed": SEED, **{name: getattr(recipe, name) for name in AUGMENTATION}}
        backbone = [self.observe.digest, str(self.observe.dtype)]
        described = json.dumps([FORMAT, CHUNK, backbone, size, self.number, seen])
        return entry_key(self.split, pil_mode(size[0]), self.replace_broken, described, images)

    def chunks(self, folder: Path | None) -> Iterator[Rows]:
        """Give the features of all images, `CHUNK` of them at a time; from files in a folder, or to be kept there."""
        progress = Progress(len(self.split), 0, self.world.is_main, unit="image")
        generators, kept = torch.get_rng_state(), True
        try:
            for start in range(0, len(self.split), CHUNK):
                places = range(start, min(start + CHUNK, len(self.split)))
                path = None if folder is None else folder / f"{start:09d}.safetensors"
                rows = None if path is None else load_chunk(path)
                if rows is None:
                    rows = self._compute(places, progress)
                    if path is not None and kept:
                        try:
                            write_bytes(path, to_bytes(rows))
                            rows = load_chunk(path) or rows  # mapped, it takes no memory that others cannot have
                        except MbibError as error:  # no room: the run does not depend on it
                            print(f"features are not kept: {error}")
                            kept = False
                else:
                    progress.step(len(places))
                yield rows
        finally:
            torch.set_rng_state(generators)
            progress.close()

    def _compute(self, places: range, progress: Progress) -> Rows:
        parts = [Rows(torch.zeros(0, self.observe.width, dtype=self.observe.dtype), torch.zeros(0, dtype=torch.int64))]
        for batch in self._loader(OrderedSampler(places)):
            features = self.observe(batch.images).to(self.observe.dtype)
            parts.append(Rows(features.cpu(), batch.index.cpu()))
            progress.step(len(batch.index))
        rows = Rows(*map(torch.cat, zip(*parts, strict=True)))
        if not rows.features.isfinite().all():
            raise DataError("the frozen backbone gives features that are not finite")
        return rows

    def _loader(self, order: OrderedSampler) -> TimmLoader:
        recipe, size, world = self.recipe, self.input_size, self.world
        if self.number == 0:
            return timm_eval_loader(self.split, recipe, size, world, self.replace_broken, order)
        recipe = recipe.replace(batch_size=max(2, recipe.validation_batch_size))
        loader = timm_train_loader(self.split, recipe, size, world, order)
        loader.loader.batch_sampler.drop_last = False
        # The same whichever chunks were computed before, and in whatever batches.
        loader.places.key = (SEED, self.number, order.places.start)
        return loader

    def features(self, chunks: Sequence[Rows]) -> Features:
        """Return what the pass has found, with the labels, and the images that could not be read.

        Raises:
            DataError: there is nothing.
        """
        index = torch.cat([rows.index for rows in chunks])
        if len(index) == 0:
            raise DataError(f"none of the {len(self.split)} images can be read")
        places = np.arange(len(self.split))
        lost = places[index.numpy() != places] if self.replace_broken else np.setdiff1d(places, index.numpy())
        targets = torch.from_numpy(np.asarray(self.split.targets, dtype=np.int64))[index]
        broken = tuple(self.split.path(int(place)) for place in lost)
        return Features((tuple(rows.features for rows in chunks),), targets, index, broken)


def _cached(job: _Pass, folder: Path) -> list[Rows]:
    """Return a pass from the disk, or where that takes nothing, from memory."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # a second process waits, and finds what the first has computed
            remove_debris(folder)
            return [*job.chunks(folder)]
    except OSError as error:  # no room, no right to write: the run does not depend on it
        print(f"features are not kept: {error.strerror or error} ({folder})")
    return [*job.chunks(None)]


def to_bytes(rows: Rows) -> bytes:
    """Return a chunk as safetensors, with a checksum."""
    return save(rows._asdict(), metadata={"crc32": str(_checksum(rows))})


def load_chunk(path: Path) -> Rows | None:
    """Map a chunk into memory; None where there is none, or one that is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as opened:
            rows = Rows(opened.get_tensor("features"), opened.get_tensor("index"))
            sound = opened.metadata()["crc32"] == str(_checksum(rows))
    except (SafetensorError, OSError, KeyError, TypeError):
        sound = False
    if not sound:
        print(f"{path} is damaged; its features are computed again")
        return None
    return rows


def _checksum(rows: Rows) -> int:
    return zlib.crc32(rows.index.numpy().data, zlib.crc32(rows.features.numpy().data))


class FeatureLoader(OrderedLoader):
    """The `Loader` of features: batches of (B, D, 1, 1), as a map of one pixel.

    Args:
        features: of a split, see `Features.to`.
        sampler: gives the rows in the order of the epoch.
        batch_size: rows of a batch.
        device: where the batches go.
        seed: of the draws among several passes; None for an evaluation, which takes the first.
    """

    def __init__(
        self, features: Features, sampler: IndexSampler, batch_size: int, device: torch.device, seed: int | None = None
    ) -> None:
        super().__init__(
            sampler, batch_size, seed is not None and drops_last(len(sampler), batch_size), features.broken
        )
        self.features, self.device, self.seed = features, device, seed

    def __iter__(self) -> Iterator[Batch]:
        order = self.order()
        passes = len(self.features.passes)
        drawn = torch.zeros_like(order)
        if passes > 1 and self.seed is not None:
            sequence = np.random.SeedSequence([self.seed, self.epoch], spawn_key=SPAWN_KEY)
            drawn = torch.from_numpy(np.random.default_rng(sequence).integers(passes, size=len(order)))
        for batch in range(self.start, len(self)):
            part = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            rows = self.features.rows(order[part], drawn[part], self.device)
            places = send(order[part], self.device)
            yield Batch((rows[:, :, None, None],), self.features.targets[places], self.features.index[places])
