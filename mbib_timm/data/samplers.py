"""Samplers: which training images an epoch sees, in which order.

An epoch's plan is N indices of the N training images, a pure function of labels and (seed, epoch, stage, stream): the
same for every loader, and for any number of processes, which deal its indices out among them. No global random state
is read or written.

A further sampler is one decorated function, from class counts to class probabilities::

    @sampler("cube_root")
    def cube_root(counts, progress, number):
        return counts ** (1 / 3)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from mbib_timm.data.long_tail import named
from mbib_timm.data.splits import Splits
from mbib_timm.environment import World
from mbib_timm.errors import DataError, MbibError, few
from mbib_timm.recipe import Recipe
from mbib_timm.recipe.declared import stream_names
from mbib_timm.registry import Registry

# Indices that are drawn, or given as Python's numbers, at once.
BLOCK = 1 << 16


class Key(NamedTuple):
    """What an epoch's random numbers are a function of.

    Attributes:
        seed: the recipe's.
        epoch: counted from 0.
        stage: of the run, 0 for the first.
        stream: 0, or 1 for the second of two streams side by side.
    """

    seed: int
    epoch: int
    stage: int = 0
    stream: int = 0

    def generator(self) -> np.random.RandomState:
        """Return a generator of its own; numpy has frozen this kind, so that plans outlive numpy's versions."""
        return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(list(self))))


@dataclass(frozen=True)
class ClassIndex:
    """The images of each class.

    Attributes:
        targets: labels (N,), in 0..K-1.
        counts: images of each class, (K,), int64.
    """

    targets: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, targets: np.ndarray, num_classes: int) -> "ClassIndex":
        """Count the images of K classes."""
        return cls(targets, np.bincount(targets, minlength=num_classes))

    def __len__(self) -> int:
        return len(self.targets)

    @cached_property
    def images(self) -> np.ndarray:
        """Indices of the images, class by class, (N,), int32; sorted when first asked for, which not every sampler
        does."""
        return np.argsort(self.targets, kind="stable").astype(np.int32)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each class begins in them, (K,), int64."""
        return np.cumsum(self.counts) - self.counts


# From counts (K,), float64, the progress e/T in (0, 1] and the sampler's number to what class probabilities are
# proportional to, (K,).
ClassWeights = Callable[[np.ndarray, float, float], np.ndarray]
# From the images of each class, class probabilities (K,), the number and the key to N indices, int64.
Order = Callable[[ClassIndex, np.ndarray, float, Key], np.ndarray]


class Number(NamedTuple):
    """The number that a sampler takes after a colon.

    Attributes:
        symbol: its name in the equation.
        default: where the name gives none.
        described: the numbers it accepts, in words.
        accepts: whether a number is among them.
    """

    symbol: str
    default: float
    described: str
    accepts: Callable[[float], bool]


@dataclass(frozen=True)
class Sampler:
    """A way through the training images.

    Attributes:
        weights: of the classes; see `ClassWeights`.
        order: of the images; see `Order`.
        number: what the name may say after a colon; None for nothing.
        serves_empty_classes: it looks at no labels, so that a class may be without images.
    """

    weights: ClassWeights
    order: Order
    number: Number | None
    serves_empty_classes: bool


SAMPLERS: Registry[Sampler] = Registry("sampler")


def by_class_then_image(classes: ClassIndex, probabilities: np.ndarray, number: float, key: Key) -> np.ndarray:
    """Draw N times, with replacement: a class by its probability, then an image of it, each as likely as the others."""
    generator, n = key.generator(), len(classes)
    cumulative = np.cumsum(probabilities)
    # By the last class that has a share: rounding may leave the sum below a number that was drawn.
    last = int(np.flatnonzero(probabilities)[-1])
    blocks = [slice(begin, begin + BLOCK) for begin in range(0, n, BLOCK)]
    plan = np.empty(n, dtype=np.int64)
    for block in blocks:
        drawn = generator.random_sample(len(plan[block]))
        plan[block] = np.searchsorted(cumulative, drawn, side="right").clip(max=last)
    for block in blocks:
        labels = plan[block]
        within = (generator.random_sample(len(labels)) * classes.counts[labels]).astype(np.int64)
        plan[block] = classes.images[classes.starts[labels] + within]
    return plan


def shuffled(classes: ClassIndex, probabilities: np.ndarray, number: float, key: Key) -> np.ndarray:
    """Order every image once."""
    n = len(classes)
    if key.stage == key.stream == 0:
        # The order of torch's DistributedSampler, which is that of ordinary training with timm.
        return torch.randperm(n, generator=torch.Generator().manual_seed(key.seed + key.epoch)).numpy()
    return key.generator().permutation(n)


def class_cycles(classes: ClassIndex, probabilities: np.ndarray, number: float, key: Key) -> np.ndarray:
    """Go through the classes in cycles, m images of each in a row.

    The classes are shuffled anew for each cycle; a class's images are taken from its shuffled list, which is shuffled
    anew whenever it is through.
    """
    generator, n, num_classes, in_a_row = key.generator(), len(classes), len(classes.counts), int(number)
    cycles = math.ceil(n / (in_a_row * num_classes))
    visits = np.argsort(generator.random_sample((cycles, num_classes)), axis=1, kind="stable").ravel()
    visits = visits[: math.ceil(n / in_a_row)]
    # Every class's list, one behind the other; a list is as many rounds of the class's images as its visits need.
    rounds = -(-in_a_row * np.bincount(visits, minlength=num_classes) // classes.counts)
    class_of_round = np.repeat(np.arange(num_classes), rounds)
    lengths = classes.counts[class_of_round]
    round_of = np.repeat(np.arange(len(lengths)), lengths)
    shift = classes.starts[class_of_round] - (np.cumsum(lengths) - lengths)
    lists = classes.images[np.arange(len(round_of)) + shift[round_of]]
    lists = lists[np.lexsort((generator.random_sample(len(lists)), round_of))]
    list_starts = np.cumsum(rounds * classes.counts) - rounds * classes.counts
    # A class has been visited once in each cycle before.
    draw = np.arange(n)
    visit = draw // in_a_row
    found = lists[list_starts[visits[visit]] + visit // num_classes * in_a_row + draw % in_a_row]
    return found.astype(np.int64)


def sampler(
    name: str, *, order: Order = by_class_then_image, number: Number | None = None, serves_empty_classes: bool = False
) -> Callable[[ClassWeights], ClassWeights]:
    """Decorator that files a sampler under `name`, given its class weights.

    Args:
        name: in recipes.
        order: what makes indices of them.
        number: that the name may give after a colon.
        serves_empty_classes: it does not look at labels.
    """

    def decorate(weights: ClassWeights) -> ClassWeights:
        SAMPLERS.register(name, weights.__module__)(Sampler(weights, order, number, serves_empty_classes))
        return weights

    return decorate


@sampler("instance", order=shuffled, serves_empty_classes=True)
def instance(counts: np.ndarray, progress: float, number: float) -> np.ndarray:
    """Every image once: q_k of n_k."""
    return counts


@sampler("sqrt")
def square_root(counts: np.ndarray, progress: float, number: float) -> np.ndarray:
    """q_k of sqrt(n_k) (Mahajan et al. 2018; Kang et al. 2020)."""
    return np.sqrt(counts)


@sampler("balanced")
def balanced(counts: np.ndarray, progress: float, number: float) -> np.ndarray:
    """q_k = 1/K."""
    return np.ones_like(counts)


@sampler("progressive")
def progressive(counts: np.ndarray, progress: float, number: float) -> np.ndarray:
    """q_k = (1 - e/T) n_k/N + (e/T)/K in the e-th of T epochs (Kang et al. 2020): the last one is balanced."""
    return (1 - progress) * counts / counts.sum() + progress / len(counts)


@sampler("reverse")
def reverse(counts: np.ndarray, progress: float, number: float) -> np.ndarray:
    """q_k of 1/n_k (the second stream of Zhou et al. 2020)."""
    return 1 / counts


@sampler(
    "effective", number=Number("beta", 0.9999, "a number of at least 0 and less than 1", lambda beta: 0 <= beta < 1)
)
def effective(counts: np.ndarray, progress: float, beta: float) -> np.ndarray:
    """q_k of n_k w_k: images are drawn by their class's weight w_k = (1 - beta)/(1 - beta^n_k) (Cao et al. 2019)."""
    return counts * (1 - beta) / (1 - beta**counts)


@sampler(
    "class_aware",
    order=class_cycles,
    # A row as long as a batch has batches of one class, which BatchNorm and most losses learn nothing from.
    number=Number("m", 4, "a whole number from 1 to 1000", lambda m: m == int(m) and 1 <= m <= 1000),
)
def class_aware(counts: np.ndarray, progress: float, number: float) -> np.ndarray:
    """q_k = 1/K, classes in shuffled cycles, m images of each in a row (Shen et al. 2016; Kang et al. 2020: m = 4)."""
    return np.ones_like(counts)


def parse_sampler(text: str) -> tuple[str, ...]:
    """Return the names of the streams that a recipe's sampler asks for: one, or two joined by ``+``.

    Args:
        text: e.g. ``balanced``, ``effective:0.999``, ``instance+reverse``.

    Raises:
        MbibError: an unknown sampler, a number that it does not take, or more than two streams.
    """
    names = stream_names(text)
    for name in names:
        _find(name)
    return names


def _find(text: str) -> tuple[Sampler, float]:
    """Return a sampler and its number. Raises MbibError for a name that is none, or a number it does not take."""
    name, colon, digits = text.partition(":")
    found = SAMPLERS[name]
    if found.number is None:
        if colon:
            takers = [f"{each}[:{taken.symbol}]" for each in SAMPLERS if (taken := SAMPLERS[each].number) is not None]
            raise MbibError(f"sampler {text!r}: {name} takes no number; those that do are {' and '.join(takers)}")
        return found, 0.0
    if not colon:
        return found, found.number.default
    try:
        number = float(digits)
        accepted = math.isfinite(number) and found.number.accepts(number)
    except ValueError:
        accepted = False
    if not accepted:
        raise MbibError(
            f"sampler {text!r}: {found.number.symbol} is {found.number.described}, not {digits!r}; "
            f"{name} alone is {name}:{found.number.default:g}"
        )
    return found, number


def check_sampler(text: str, splits: Splits, foregrounds: str | None = None) -> None:
    """Check that a sampler can serve a run's training images.

    Args:
        text: as a recipe has it.
        splits: the run's data.
        foregrounds: the sampler of the images that CutMix pastes, where it has one.

    Raises:
        MbibError: an unknown sampler.
        DataError: a class without images.
    """
    names = parse_sampler(text)
    if foregrounds is not None:
        check_sampler(foregrounds, splits)
    if all(_find(name)[0].serves_empty_classes for name in names):
        return
    empty = np.flatnonzero(np.asarray(splits.class_counts) == 0)
    if len(empty):
        names = named(splits.class_names, splits.num_classes)
        raise DataError(f"sampler {text!r}: no training images of class {few([names[k] for k in empty])}")


def class_probabilities(name: str, counts: np.ndarray, epoch: int, epochs: int) -> np.ndarray:
    """Return how likely an image of an epoch is to be of each class.

    Args:
        name: of one sampler, with its number if need be.
        counts: training images of each class, (K,).
        epoch: counted from 0; it is the e-th of T epochs, e = epoch + 1.
        epochs: T.

    Returns:
        Probabilities q (K,), float64, that sum to 1.

    Raises:
        MbibError: an unknown sampler, or a number that it does not take.
    """
    found, number = _find(name)
    weights = found.weights(np.asarray(counts, dtype=np.float64), min(1.0, (epoch + 1) / max(1, epochs)), number)
    return weights / weights.sum()


def epoch_plan(name: str, classes: ClassIndex, key: Key, epochs: int) -> np.ndarray:
    """Return the images of an epoch in order: N indices of N images.

    Args:
        name: of one sampler, with its number if need be.
        classes: the training images of each class; none is empty unless the sampler is ``instance``.
        key: seed, epoch, stage and stream.
        epochs: of the stage.

    Raises:
        MbibError: an unknown sampler, or a number that it does not take.
    """
    found, number = _find(name)
    return found.order(classes, class_probabilities(name, classes.counts, key.epoch, epochs), number, key)


class IndexSampler(ABC):
    """Gives the indices of a pass."""

    @abstractmethod
    def __len__(self) -> int:
        """Return how many those are."""

    @abstractmethod
    def order(self) -> np.ndarray:
        """Return the indices of a pass, int64."""

    @abstractmethod
    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""

    def __iter__(self) -> Iterator[int]:
        """Give the indices of a pass, one by one."""
        return self.since(0)

    def since(self, start: int) -> Iterator[int]:
        """Give the indices of a pass from a place on; Python's numbers of ten million of them would take 400 MB."""
        order = self.order()
        for begin in range(start, len(order), BLOCK):
            yield from order[begin : begin + BLOCK].tolist()


class TrainingSampler(IndexSampler):
    """What orders the training images of a stage: a plan of each epoch, the same with every loader.

    Each process has a share of it, as many indices as the others, so that a few come twice.

    Args:
        targets: labels (N,) of the training images.
        num_classes: classes K.
        recipe: gives the seed.
        world: this process among those that share the images.
        name: of one sampler, with its number if need be.
        epochs: of the stage.
        stage: of the run, 0 for the first.
        stream: 0, or 1 for the second of two streams.

    Raises:
        DataError: fewer than two images per process, which BatchNorm cannot train on.
    """

    def __init__(
        self,
        targets: np.ndarray,
        num_classes: int,
        recipe: Recipe,
        world: World,
        name: str = "instance",
        *,
        epochs: int = 1,
        stage: int = 0,
        stream: int = 0,
    ) -> None:
        self.classes, self.name, self.epochs = ClassIndex.of(targets, num_classes), name, epochs
        self.key = Key(recipe.seed, 0, stage, stream)
        self.rank, self.world_size = world.rank, world.world_size
        if len(self) < 2:
            raise DataError(f"{len(targets)} training images are too few for {self.world_size} processes")

    def __len__(self) -> int:
        return -(-len(self.classes) // self.world_size)

    def order(self) -> np.ndarray:
        """Return this process's share of the plan of an epoch."""
        plan = epoch_plan(self.name, self.classes, self.key, self.epochs)
        if self.world_size == 1:
            return plan
        # Beyond its end the plan begins anew, as with torch's DistributedSampler.
        return plan.take(np.arange(self.rank, len(self) * self.world_size, self.world_size), mode="wrap")

    def set_epoch(self, epoch: int) -> None:
        """Choose the plan of an epoch."""
        self.key = self.key._replace(epoch=epoch)


class OrderedSampler(IndexSampler):
    """The images at some places, in order."""

    def __init__(self, places: range) -> None:
        self.places = places

    def order(self) -> np.ndarray:
        """Return the places."""
        return np.arange(self.places.start, self.places.stop, self.places.step)

    def __len__(self) -> int:
        return len(self.places)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the order is always the same."""


class ShardSampler(OrderedSampler):
    """Every `world_size`-th image in order, from `rank` on: together the ranks see each image once, none twice."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        super().__init__(range(rank, length, world_size))


def batches_of(images: int, batch_size: int, drop_last: bool) -> int:
    """Return how many batches there are of so many images; `drop_last` leaves a short one out."""
    whole, rest = divmod(images, batch_size)
    return whole + (rest > 0 and not drop_last)


def drops_last(images: int, batch_size: int) -> bool:
    """Return whether the last short batch of training is left out: only that of a single image is."""
    return images % batch_size == 1
