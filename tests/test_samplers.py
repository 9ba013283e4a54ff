"""Samplers: published probabilities, exact plans, frequencies; the same plan with every loader and any processes."""

import itertools
import random
import time

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import settled
from torch.utils.data.distributed import DistributedSampler

from mbib_timm.data import (
    SAMPLERS,
    Split,
    Splits,
    class_probabilities,
    create_loaders,
    open_data,
    parse_sampler,
    sampler,
)
from mbib_timm.data.images import ArrayReader
from mbib_timm.data.samplers import ClassIndex, Key, TrainingSampler, epoch_plan
from mbib_timm.environment import World
from mbib_timm.errors import DataError, MbibError

CPU = torch.device("cpu")
SIZE = (3, 16, 16)
COUNTS = np.array([500, 50, 5])
# The last class's images are the last five.
TARGETS = np.repeat(np.arange(3), COUNTS)
CLASSES = ClassIndex.of(TARGETS, 3)
NAMES = list(SAMPLERS)
DRAWN = [name for name in NAMES if name not in ("instance", "class_aware")]


def recipe(**keys):
    base = dict(workers=0, train_crop_mode="none", img_size=16, batch_size=8, image_cache="none", loader="resident")
    return settled(**{**base, **keys})


def splits(targets):
    """Images that differ from one another, with these labels."""
    images = np.random.RandomState(0).randint(0, 256, (len(targets), 16, 16, 3), dtype=np.uint8)
    split = Split(ArrayReader(images, "arrays"), np.asarray(targets))
    return Splits(split, split, None, np.bincount(targets), None)


def small():
    """Shuffled labels of three classes with 30, 9 and 3 images."""
    return np.random.RandomState(1).permutation(np.repeat(np.arange(3), [30, 9, 3]))


def indices(loader, epoch):
    """The indices of an epoch, of each stream."""
    loader.set_epoch(epoch)
    return [torch.cat(parts).tolist() for parts in zip(*([b.index for b in batch] for batch in loader), strict=True)]


# Probabilities


@pytest.mark.parametrize(
    ("name", "epoch", "expected"),
    [
        ("instance", 0, (0.900901, 0.090090, 0.009009)),
        ("sqrt", 0, (0.706101, 0.223289, 0.070610)),
        ("balanced", 0, (1 / 3, 1 / 3, 1 / 3)),
        ("progressive", 99, (0.617117, 0.211712, 0.171171)),
        ("progressive", 199, (1 / 3, 1 / 3, 1 / 3)),
        ("progressive", 1000, (1 / 3, 1 / 3, 1 / 3)),
        ("reverse", 0, (0.009009, 0.090090, 0.900901)),
        ("effective", 0, (0.338581, 0.331082, 0.330338)),
        ("effective:0.9999", 0, (0.338581, 0.331082, 0.330338)),
        ("effective:0", 0, (0.900901, 0.090090, 0.009009)),
        ("class_aware", 0, (1 / 3, 1 / 3, 1 / 3)),
        ("class_aware:1", 0, (1 / 3, 1 / 3, 1 / 3)),
    ],
)
def test_class_probabilities(name, epoch, expected):
    assert class_probabilities(name, COUNTS, epoch, 200) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", DRAWN)
def test_classes_are_drawn_by_their_probability_and_images_alike(name):
    epochs = 60
    drawn = np.concatenate([epoch_plan(name, CLASSES, Key(0, epoch), epochs) for epoch in range(epochs)])
    q = np.mean([class_probabilities(name, COUNTS, epoch, epochs) for epoch in range(epochs)], axis=0)
    for counted, probability in (
        (np.bincount(TARGETS[drawn], minlength=3), q),
        (np.bincount(drawn, minlength=555), (q / COUNTS)[TARGETS]),
    ):
        sigma = np.sqrt(len(drawn) * probability * (1 - probability))
        assert (np.abs(counted - len(drawn) * probability) <= 5 * sigma).all()


# Plans


GOLDEN = {
    "instance": [5, 0, 3, 4, 1, 7, 9, 6, 8, 2],
    "instance, stream 1": [9, 6, 0, 4, 3, 7, 5, 8, 2, 1],
    "sqrt": [9, 5, 5, 1, 0, 5, 1, 3, 6, 5],
    "balanced": [8, 3, 5, 3, 0, 5, 3, 3, 6, 3],
    "progressive": [9, 5, 5, 1, 0, 5, 1, 5, 6, 5],
    "reverse": [3, 3, 3, 3, 1, 3, 3, 3, 6, 3],
    "effective:0.5": [9, 5, 5, 1, 0, 5, 1, 5, 6, 5],
    "class_aware": [9, 2, 4, 6, 3, 3, 3, 3, 8, 1],
    "class_aware:1": [4, 3, 1, 5, 3, 2, 3, 7, 8, 3],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_plans_of_a_fixed_seed(name):
    """A change here is another training run of every recipe that names this sampler."""
    classes = ClassIndex.of(np.array([0, 1, 0, 2, 0, 1, 0, 0, 1, 0]), 3)
    stream = 1 if name == "instance, stream 1" else 0
    assert epoch_plan(name.split(",")[0], classes, Key(5, 2, 0, stream), 10).tolist() == GOLDEN[name]


@pytest.mark.parametrize(("count", "world_size"), [(555, 1), (555, 2), (555, 4), (5, 4), (3, 2)])
def test_instance_is_the_order_of_torchs_distributed_sampler(count, world_size):
    for seed, epoch, rank in itertools.product((0, 3), (0, 7), range(world_size)):
        theirs = DistributedSampler(range(count), world_size, rank, shuffle=True, seed=seed)
        theirs.set_epoch(epoch)
        ours = TrainingSampler(np.zeros(count, int), 1, recipe(seed=seed), World(CPU, rank, world_size))
        ours.set_epoch(epoch)
        assert list(ours) == list(theirs)
        assert len(ours) == len(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_plans_are_functions_of_seed_epoch_stage_and_stream(name):
    keys = [Key(0, 0), Key(1, 0), Key(0, 1), Key(0, 0, 1), Key(0, 0, 0, 1), Key(0, 0, 1, 1), Key(0, 1, 1), Key(1, 1)]
    plans = [tuple(epoch_plan(name, CLASSES, key, 10)) for key in keys]
    # torch's sampler adds seed and epoch: seed 1, epoch 0 has the order of seed 0, epoch 1.
    assert len(set(plans)) == len(keys) - (name == "instance")
    assert plans == [tuple(epoch_plan(name, CLASSES, key, 10)) for key in keys]


@pytest.mark.parametrize("name", NAMES)
def test_no_global_random_state_is_touched_or_read(name):
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    plan = epoch_plan(name, CLASSES, Key(0, 0, 1), 10)
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    assert torch.equal(before[0], after[0])
    assert (before[1] == after[1]).all()
    assert before[2] == after[2]
    torch.manual_seed(9), np.random.seed(9), random.seed(9)
    assert (epoch_plan(name, CLASSES, Key(0, 0, 1), 10) == plan).all()


@pytest.mark.parametrize("in_a_row", [1, 4, 7])
def test_class_aware_goes_through_classes_and_images_in_cycles(in_a_row):
    classes = ClassIndex.of(small(), 3)
    big = ClassIndex.of(np.tile(small(), 20), 3)
    for index in (classes, big):
        targets = np.empty(len(index.images), dtype=int)
        targets[index.images] = np.repeat(np.arange(3), index.counts)
        plan = epoch_plan(f"class_aware:{in_a_row}", index, Key(0, 0), 10)
        whole = len(plan) // in_a_row * in_a_row
        rows = targets[plan[:whole]].reshape(-1, in_a_row)
        assert (rows == rows[:, :1]).all()
        visits = rows[:, 0]
        cycles = visits[: len(visits) // 3 * 3].reshape(-1, 3)
        assert (np.sort(cycles, axis=1) == [0, 1, 2]).all()
        for label, count in enumerate(index.counts):
            of_class = plan[targets[plan] == label]
            rounds = [of_class[i : i + count] for i in range(0, len(of_class), count)]
            assert all(len(set(images)) == len(images) for images in rounds)
    orders = {tuple(cycle) for cycle in cycles}
    assert len(orders) == 6 or in_a_row == 7, "the classes are shuffled anew for each cycle"
    assert len(rounds) > 1, "the last class is gone through more than once"
    assert any(tuple(first) != tuple(second) for first, second in itertools.pairwise(rounds[:-1]))


def test_plans_of_inaturalist_take_no_time():
    """437,513 images of 8,142 classes."""
    counts = np.maximum(2, 437_513 * np.exp(-np.arange(8_142) / 1_300) / 1_297).astype(int)
    counts[0] += 437_513 - counts.sum()
    classes = ClassIndex.of(np.random.RandomState(0).permutation(np.repeat(np.arange(8_142), counts)), 8_142)
    for name in NAMES:
        seconds = []
        for epoch in range(3):
            start = time.process_time()
            assert len(epoch_plan(name, classes, Key(0, epoch, 1), 10)) == 437_513
            seconds.append(time.process_time() - start)
        assert min(seconds) < 1, name


def test_a_further_sampler_is_one_decorated_function(monkeypatch):
    monkeypatch.setattr(SAMPLERS, "_entries", dict(SAMPLERS._entries))

    @sampler("fourth_root")
    def fourth_root(counts, progress, number):
        return counts ** (1 / 4)

    roots = np.sqrt(np.sqrt(COUNTS))
    assert class_probabilities("fourth_root", COUNTS, 0, 1) == pytest.approx(roots / roots.sum())
    data = splits(small())
    loader = create_loaders(data, recipe(), SIZE, CPU, sampler="fourth_root+instance").train
    drawn, every = indices(loader, 0)
    assert len(set(drawn)) < len(drawn) == len(set(every)) == 42


# Through the loaders


@pytest.mark.parametrize("name", [*NAMES, "instance+reverse", "class_aware:2+balanced"])
@pytest.mark.parametrize("stage", [0, 1])
def test_both_loaders_and_any_number_of_processes_have_the_same_plan(name, stage):
    data, settings = splits(small()), recipe(epochs=10)
    settings = settings.replace_previous(settings) if stage else settings
    names = parse_sampler(name)
    for epoch in (0, 7):
        plans = [
            epoch_plan(part, ClassIndex.of(data.train.targets, 3), Key(0, epoch, stage, stream), 10).tolist()
            for stream, part in enumerate(names)
        ]
        for kind in ("resident", "timm"):
            built = [
                create_loaders(data, settings.replace(loader=kind), SIZE, CPU, rank, 2, sampler=name).train
                for rank in (0, 1)
            ]
            halves = [indices(loader, epoch) for loader in built]
            merged = [[i for pair in zip(*shares, strict=True) for i in pair] for shares in zip(*halves, strict=True)]
            assert merged == plans
            alone = create_loaders(data, settings.replace(loader=kind), SIZE, CPU, sampler=name).train
            assert indices(alone, epoch) == plans


@pytest.mark.parametrize("kind", ["resident", "timm"])
def test_batches_hold_the_images_that_they_say(kind):
    data = splits(small())
    built = create_loaders(
        data, recipe(loader=kind, crop_pct=1.0, mean=[0.0], std=[1.0]), SIZE, CPU, sampler="balanced"
    )
    batches = [*(batch for (batch,) in built.train), *built.val]
    assert [len(batch.views) for batch in batches] == [1] * len(batches)
    for batch in batches:
        assert batch.index.dtype == batch.targets.dtype == torch.int64
        np.testing.assert_array_equal(batch.targets, data.train.targets[batch.index])
        pixels = data.train.reader.images[batch.index.numpy()]
        np.testing.assert_allclose(255 * batch.images.permute(0, 2, 3, 1).numpy(), pixels, atol=1e-3)


@pytest.mark.parametrize("kind", ["resident", "timm"])
def test_a_broken_image_has_the_index_of_its_replacement(tmp_path, kind):
    for label, count in (("ant", 4), ("bee", 3)):
        (tmp_path / label).mkdir()
        for i in range(count):
            Image.new("RGB", (16, 16), (i, 9, 9)).save(tmp_path / label / f"{i}.png")
    (tmp_path / "ant" / "3.png").write_bytes(b"no image")
    settings = recipe(dataset="folder", data_dir=str(tmp_path), loader=kind, batch_size=4)
    whole = open_data(settings.replace(val_fraction=0.9))
    # Of the folder, all images in order.
    split = Split(whole.train.reader, np.array([0, 0, 0, 0, 1, 1, 1]), np.arange(7))
    data = Splits(split, split.subset(np.array([0])), None, np.array([4, 3]), None)
    loader = create_loaders(data, settings, SIZE, CPU).train
    seen = sorted(tuple(pair) for (batch,) in loader for pair in torch.stack([batch.index, batch.targets], 1).tolist())
    assert seen == [(0, 0), (1, 0), (2, 0), (4, 1), (4, 1), (5, 1), (6, 1)]
    assert loader.broken_images() == [str(tmp_path / "ant" / "3.png")]
    two = create_loaders(data, settings, SIZE, CPU, sampler="instance+balanced").train
    assert len(list(two)) == len(two) == 2
    assert two.broken_images() == [str(tmp_path / "ant" / "3.png")], "once, and not once for each stream"


@pytest.mark.parametrize("kind", ["resident", "timm"])
@pytest.mark.parametrize("workers", [0, 2])
def test_two_streams_are_augmented_each_on_its_own(kind, workers):
    targets = np.zeros(24, dtype=int)
    image = np.random.RandomState(0).randint(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    split = Split(ArrayReader(image, "one"), targets, np.zeros(24, dtype=int))
    data = Splits(split, split, None, np.array([24]), None)
    settings = recipe(loader=kind, workers=workers, train_crop_mode="pad")

    def epoch(sampler, settings=settings):
        torch.manual_seed(0)
        loader = create_loaders(data, settings, SIZE, CPU, sampler=sampler).train
        loader.set_epoch(1)
        return [torch.cat(stream) for stream in zip(*([b.images for b in batch] for batch in loader), strict=True)]

    first, second = epoch("instance+instance")
    assert first.shape == second.shape == (24, 3, 16, 16)
    assert not torch.equal(first, second)
    if kind == "resident":
        assert torch.equal(first, epoch("instance")[0]), "the first stream is that of an ordinary run"
        assert not torch.equal(epoch("instance", settings.replace_previous(settings))[0], first)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_two_streams_share_the_workers():
    data = splits(small())
    for workers, expected in ((0, 0), (1, 1), (2, 1), (3, 2)):
        settings = recipe(loader="timm", workers=workers)
        train = create_loaders(data, settings, SIZE, CPU, sampler="instance+reverse").train
        assert [stream.loader.loader.num_workers for stream in train.streams] == [expected] * 2
        (alone,) = create_loaders(data, settings, SIZE, CPU).train.streams
        assert alone.loader.loader.num_workers == workers


def test_progress_is_that_of_the_stage():
    data = splits(small())
    plans = [
        indices(create_loaders(data, recipe(epochs=epochs), SIZE, CPU, sampler="progressive").train, 3)[0]
        for epochs in (200, 200, 4)
    ]
    assert plans[0] == plans[1] != plans[2]


# Bad input


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("balancd", r"unknown sampler 'balancd': did you mean 'balanced'"),
        ("instance+revers", r"unknown sampler 'revers': did you mean 'reverse'"),
        ("class-aware", r"unknown sampler 'class-aware': did you mean 'class_aware'"),
        ("", "unknown sampler ''"),
        ("instance+", "unknown sampler ''"),
        ("instance+reverse+sqrt", "expected one sampler, or two side by side, got 3"),
        ("balanced:3", r"balanced takes no number; those that do are effective\[:beta\] and class_aware\[:m\]"),
        ("balanced:", "balanced takes no number"),
        ("effective:1", r"'effective:1': beta is a number of at least 0 and less than 1, not '1'; effective alone is"),
        ("effective:-0.1", "not '-0.1'"),
        ("effective:nan", "not 'nan'"),
        ("effective:", r"not ''; effective alone is effective:0\.9999"),
        ("class_aware:0", "m is a whole number from 1 to 1000, not '0'; class_aware alone is class_aware:4"),
        ("class_aware:2.5", "not '2.5'"),
        ("class_aware:four", "not 'four'"),
        ("class_aware:1e9", "not '1e9'"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(MbibError, match=message):
        parse_sampler(name)
    with pytest.raises(MbibError, match=message):
        create_loaders(splits(small()), recipe(), SIZE, CPU, sampler=name)


def test_a_class_without_images():
    train = splits(small()).train
    data = Splits(train, train, None, np.array([30, 9, 3, 0]), ("ant", "bee", "cat", "dog"))
    with pytest.raises(DataError, match="sampler 'balanced': no training images of class dog"):
        create_loaders(data, recipe(), SIZE, CPU, sampler="balanced")
    with pytest.raises(DataError, match=r"sampler 'instance\+reverse': no training images of class dog"):
        create_loaders(data, recipe(), SIZE, CPU, sampler="instance+reverse")
    assert len(create_loaders(data, recipe(), SIZE, CPU).train) == 6
