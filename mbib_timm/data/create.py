"""From the splits of a run to its loaders: resident where the data fit, timm's where they do not."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from mbib_timm.data.batch import Loader, TrainLoader
from mbib_timm.data.decoding import (
    DecodedImages,
    FileStates,
    cache_folder,
    decode_split,
    decoded_bytes,
    fits,
    free_memory,
)
from mbib_timm.data.features import Features, FeatureStore
from mbib_timm.data.images import Split
from mbib_timm.data.loaders import ResidentLoader, timm_eval_loader, timm_train_loader
from mbib_timm.data.mixing import MixedTrainLoader, Mixing
from mbib_timm.data.overview import summary
from mbib_timm.data.policies import create_policy
from mbib_timm.data.samplers import TrainingSampler, check_sampler, parse_sampler
from mbib_timm.data.sources import Source
from mbib_timm.data.splits import Splits, open_data
from mbib_timm.data.transforms import fixed_preprocessing
from mbib_timm.environment import World
from mbib_timm.errors import MbibError
from mbib_timm.recipe import DATA_KEYS, OPENED_BY, Recipe

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Loaders:
    """Batches of each split: for training of every stream at a time, for evaluation one by one."""

    train: TrainLoader
    val: Loader
    test: Loader | None

    def left_out_images(self) -> list[str]:
        """Return the evaluated images that could not be read and were left out."""
        evaluated = [self.val, *([] if self.test is None else [self.test])]
        return [path for loader in evaluated for path in loader.broken_images()]


@dataclass
class DataPool:
    """Opened data and resident images, which the runs of one process share."""

    sources: dict[str, Source] = field(default_factory=dict)
    opened: dict[str, Splits] = field(default_factory=dict)
    images: dict[tuple[str, ...], DecodedImages] = field(default_factory=dict)
    features: dict[str, Features] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)
    resident: dict[tuple[str, ...], bool] = field(default_factory=dict)
    states: FileStates = field(default_factory=FileStates)

    def introduce(self, recipe: Recipe) -> list[str]:
        """Return what the recipe's data are, in lines, when first asked; see `summary`."""
        if not self.first_time(data_key(recipe)):
            return []
        splits = self.open(recipe)
        lines = summary(splits, recipe.holdout > 0)
        if splits.val.in_files and not splits.val.chosen:
            lines.append("note: copies of training images among the evaluated are not looked for; mbib data lists them")
        return lines

    def first_time(self, line: str | None) -> list[str]:
        """Return a line, unless there is none or it was asked for before."""
        if line is None or line in self.said:
            return []
        self.said.add(line)
        return [line]

    def source(self, recipe: Recipe) -> Source:
        """Return where the recipe's splits are opened by name; what it has read serves the next `open`."""
        key = opened_key(recipe)
        if key not in self.sources:
            self.sources[key] = Source(recipe)
        return self.sources[key]

    def open(self, recipe: Recipe) -> Splits:
        """Open the recipe's data, once, however their images are prepared; see `open_data`."""
        key = opened_key(recipe)
        if key not in self.opened:
            self.opened[key] = open_data(recipe, self.sources.pop(key, None))
        return self.opened[key]

    def fit(self, splits: Splits, recipe: Recipe, input_size: tuple[int, int, int], device: torch.device) -> bool:
        """Return whether a recipe's images, those of its splits, fit onto a device; the first answer stays.

        Runs of one process that see the same images take the same loader, and so the same augmentation. Images of
        other data, which an earlier run has left there, give way.
        """
        key = (data_key(recipe), str(input_size), str(device))
        if key not in self.resident:
            needed, on_host = _resident_bytes(splits, recipe, input_size, device)
            if not fits(needed, device):
                self.images.clear()
            self.resident[key] = fits(needed, device) and fits(on_host, HOST)
        return self.resident[key]

    def require_room(
        self, splits: Splits, recipe: Recipe, input_size: tuple[int, int, int], device: torch.device
    ) -> None:
        """Check, once, that the images of a recipe which asks for resident ones fit onto a device and, while they are
        decoded, into host memory.

        Raises:
            MbibError: they do not.
        """
        key = (data_key(recipe), str(input_size), str(device))
        if key in self.resident:
            return
        needed, on_host = _resident_bytes(splits, recipe, input_size, device)
        if needed > free_memory(device):
            self.images.clear()
        places = ((needed, device, f"on {device}"), (2 * on_host, HOST, "of host memory while they are decoded"))
        for size, place, where in places:
            if size > (free := free_memory(place)):
                raise MbibError(
                    f"loader: resident: the decoded images take {size / 2**30:,.1f} GiB {where}, and "
                    f"{free / 2**30:,.1f} are free; expected loader: timm, or auto, which chooses"
                )
        self.resident[key] = True

    def decode(
        self,
        name: str,
        split: Split,
        recipe: Recipe,
        input_size: tuple[int, int, int],
        world: World,
        *,
        training: bool,
        replace_broken: bool,
    ) -> DecodedImages:
        """Bring a split's images onto the device, once; see `decode_split`. All processes have to ask.

        Args:
            name: of the split in the run.
        """
        fixed = fixed_preprocessing(recipe, input_size, training)
        key = (data_key(recipe), name, fixed, str(replace_broken), str(world.device))
        # Asked for first: one process may have the images still, and another not.
        files = None if cache_folder(recipe, "images") is None else self.states.of(split, world)
        if key not in self.images:
            self.images[key] = decode_split(split, recipe, input_size, world.device, training, replace_broken, files)
        return self.images[key]


def _resident_bytes(
    splits: Splits, recipe: Recipe, input_size: tuple[int, int, int], device: torch.device
) -> tuple[int, int]:
    """Return the bytes that the images of a recipe's splits take on a device, and those of the largest split in host
    memory on its way there: none where the host is the device, or the disk keeps what is decoded."""
    sizes = [
        (split, decoded_bytes(split, recipe, input_size, training=number == 0))
        for number, split in enumerate(splits.opened())
    ]
    needed = sum(size for _, size in sizes)
    if device.type == "cpu":
        return needed, 0
    has_cache = cache_folder(recipe, "images") is not None
    return needed, max((size for split, size in sizes if not (has_cache and split.in_files)), default=0)


def opened_key(recipe: Recipe) -> str:
    """Return what two recipes have in common that open the same images, however these are prepared."""
    return json.dumps({name: getattr(recipe, name) for name in OPENED_BY})


def data_key(recipe: Recipe) -> str:
    """Return what two recipes have in common that see the same images."""
    return json.dumps({name: getattr(recipe, name) for name in DATA_KEYS})


def choose_loader(
    splits: Splits,
    recipe: Recipe,
    input_size: tuple[int, int, int],
    device: torch.device,
    pool: DataPool | None = None,
) -> str:
    """Return which loader a recipe's data take: ``resident`` or ``timm``.

    Args:
        splits: the data.
        recipe: loader, augmentation.
        input_size: (C, H, W) of the model.
        device: where the batches go.
        pool: of the process's runs, which knows what is on the device already.

    Raises:
        MbibError: the recipe asks for resident data, which its augmentation or the memory does not allow.
    """
    pool = pool or DataPool()
    by_image = any(view.aa is not None and create_policy(view.aa) is None for view in recipe.augmentations())
    if recipe.loader == "resident" and by_image:
        raise MbibError(
            "loader: resident augments images in batches, but a policy of timm's (recipe key 'aa') works on single "
            "images; use loader: timm"
        )
    if recipe.loader == "resident":
        pool.require_room(splits, recipe, input_size, device)
    if recipe.loader != "auto":
        return recipe.loader
    return "timm" if by_image or not pool.fit(splits, recipe, input_size, device) else "resident"


def create_loaders(
    splits: Splits,
    recipe: Recipe,
    input_size: tuple[int, int, int],
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    pool: DataPool | None = None,
    *,
    sampler: str = "instance",
    views: Sequence[Recipe] = (),
    store: FeatureStore | None = None,
) -> Loaders:
    """Make batches of a run's splits.

    Args:
        splits: what `open_data` found.
        recipe: loader, augmentation, mixing, batch sizes, workers; epochs, for samplers that change with the epoch; and
            the stage, of which each has other orders and augmentations.
        input_size: (C, H, W) of the model.
        device: where the batches go.
        rank: this process.
        world_size: processes that share the data.
        pool: holds resident images for the next run.
        sampler: which training images an epoch sees: a name of `SAMPLERS`, or two joined by ``+`` for two streams.
        views: the recipe of each view of a training image, see `Recipe.augmentations`; `recipe` alone when not given.
        store: the batches are of features, and these are they.

    Raises:
        MbibError: a loader or a sampler that the data or the recipe do not allow.
        DataError: images that cannot be read, or too few of them.
    """
    world = World(device, rank, world_size)
    pool = pool or DataPool()
    check_sampler(sampler, splits, recipe.cutmix_sampler)
    names, foregrounds = parse_sampler(sampler), recipe.cutmix_sampler
    resident = store is None and choose_loader(splits, recipe, input_size, device, pool) == "resident"
    # The streams share the worker processes; each has one at least, unless the main process loads.
    shared = recipe.replace(workers=-(-recipe.workers // (len(names) + (foregrounds is not None))))

    def stream(number: int, name: str) -> Loader:
        order = TrainingSampler(
            splits.train.targets,
            splits.num_classes,
            recipe,
            world,
            name,
            epochs=recipe.epochs,
            stage=recipe.stage,
            stream=number,
        )
        if store is not None:
            return store.train_loader(splits.train, order)
        if not resident:
            return timm_train_loader(splits.train, shared, input_size, world, order, views)
        images = pool.decode("train", splits.train, recipe, input_size, world, training=True, replace_broken=True)
        return ResidentLoader(images, recipe, input_size, world, order, views)

    def evaluated(name: str, split: Split) -> Loader:
        if store is not None:
            return store.eval_loader(split)
        if not resident:
            return timm_eval_loader(split, recipe, input_size, world)
        images = pool.decode(name, split, recipe, input_size, world, training=False, replace_broken=False)
        return ResidentLoader(images, recipe, input_size, world, None)

    streams = [stream(number, name) for number, name in enumerate(names)]
    pasted = None if foregrounds is None else stream(len(names), foregrounds)
    train = TrainLoader(streams)
    if recipe.soft_targets:
        train = MixedTrainLoader(streams, Mixing(recipe, splits.num_classes, rank), pasted)
    val = evaluated("val", splits.val)
    return Loaders(train, val, None if splits.test is None else evaluated("test", splits.test))


@dataclass
class Passes:
    """Images for a method that looks at them before or after training.

    They are preprocessed as for an evaluation, and come in order, every image once over all processes. A broken image
    is replaced, as in training. A loader is made when it is first asked for.

    Attributes:
        splits: what `open_data` found.
        recipe: loader, preprocessing, batch size, workers.
        input_size: (C, H, W) of the model.
        world: the device, and this process among those that share the data.
        pool: holds resident images for the next run.
        store: the batches are of features, and these are they.
    """

    splits: Splits
    recipe: Recipe
    input_size: tuple[int, int, int]
    world: World
    pool: DataPool = field(default_factory=DataPool)
    store: FeatureStore | None = None

    @cached_property
    def train(self) -> Loader:
        """The training images."""
        return self._loader("train", self.splits.train, replace_broken=True)

    @cached_property
    def held_out(self) -> Loader:
        """Images that are never trained on; ``Splits.held_out_from`` says which.

        Raises:
            MbibError: there are none.
        """
        split, val = self.splits.require_held_out(), self.splits.val
        return self._loader("val", val, False) if split is val else self._loader("held_out", split, True)

    @property
    def opened_held_out(self) -> bool:
        """Whether the images that are never trained on were asked for."""
        return "held_out" in vars(self)

    def _loader(self, name: str, split: Split, replace_broken: bool) -> Loader:
        recipe, size, world = self.recipe, self.input_size, self.world
        if self.store is not None:
            return self.store.eval_loader(split, replace_broken)
        # Both kinds give the same batches.
        fitting = fits(decoded_bytes(split, recipe, size, training=False), world.device)
        if recipe.loader == "resident" and not world.gather([] if fitting else ["in one process they do not fit"]):
            images = self.pool.decode(name, split, recipe, size, world, training=False, replace_broken=replace_broken)
            return ResidentLoader(images, recipe, size, world, None)
        return timm_eval_loader(split, recipe, size, world, replace_broken)


def build_views_loader(
    recipe: Recipe, split: Split, views: Sequence[Recipe], *, input_size: tuple[int, int, int], device: torch.device
) -> Loader:
    """Make batches of random views of a split's images, in a random order that knows nothing of their labels.

    Args:
        recipe: names the preprocessing, the batch size and the seed.
        split: the images.
        views: the recipe of each view of an image.
        input_size: (C, H, W) of the model.
        device: where the batches go.

    Raises:
        MbibError: an augmentation that images of this size have no use for.
        DataError: fewer than two images.
    """
    world = World(device)
    order = TrainingSampler(np.zeros(len(split), dtype=np.int64), 1, recipe, world)
    if not fits(decoded_bytes(split, recipe, input_size, training=True), device):
        return timm_train_loader(split, recipe, input_size, world, order, views=views)
    # Not kept for the next run: nobody else sees these images like this.
    images = decode_split(split, recipe, input_size, device, training=True, replace_broken=True)
    return ResidentLoader(images, recipe, input_size, world, order, views)
