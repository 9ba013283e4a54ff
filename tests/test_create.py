"""What is built of a run's splits: which loader, passes of a method, images that runs share."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_data import CPU, SIZE, epoch, image_folder, loaders, recipe, settled, splits

from mbib_timm.data import DataPool, Passes, Split, Splits, choose_loader, create_loaders, open_data
from mbib_timm.data.loaders import TimmLoader
from mbib_timm.environment import World
from mbib_timm.errors import MbibError


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path)


# Which loader


def test_what_fits_is_resident_and_what_does_not_is_not(monkeypatch):
    data = splits()
    assert choose_loader(data, recipe(loader="auto"), SIZE, CPU) == "resident"
    needed = 2 * 50 * 3 * 16 * 16
    for free, chosen in ((2 * needed, "resident"), (2 * needed - 2, "timm")):
        monkeypatch.setattr("mbib_timm.data.decoding.free_memory", lambda device, free=free: free)
        assert choose_loader(data, recipe(loader="auto"), SIZE, CPU) == chosen
    assert choose_loader(data, recipe(loader="resident"), SIZE, CPU) == "resident"
    assert choose_loader(data, recipe(loader="timm"), SIZE, CPU) == "timm"


META = torch.device("meta")  # stands for any device that is not the host
IMAGES = 50 * 3 * 16 * 16  # of either split, in bytes


@pytest.mark.parametrize(
    ("on_device", "on_host", "auto", "problem"),
    [
        (4 * IMAGES, 2 * IMAGES, "resident", None),
        (4 * IMAGES - 2, 2 * IMAGES, "timm", None),
        (4 * IMAGES, 2 * IMAGES - 2, "timm", "GiB of host memory while they are decoded, and 0.0 are free"),
        (2 * IMAGES - 1, 2 * IMAGES, "timm", "GiB on meta, and 0.0 are free; expected loader: timm, or auto"),
    ],
)
def test_memory_of_device_and_host_is_asked_before_anything_is_decoded(monkeypatch, on_device, on_host, auto, problem):
    for module in ("create", "decoding"):
        free = {META: on_device, CPU: on_host}
        monkeypatch.setattr(f"mbib_timm.data.{module}.free_memory", free.__getitem__)
    monkeypatch.setattr("mbib_timm.data.create.decode_split", None)
    data = splits()
    assert choose_loader(data, recipe(loader="auto"), SIZE, META) == auto
    asked = recipe(loader="resident")
    if problem is None:
        assert choose_loader(data, asked, SIZE, META) == "resident"
    else:
        with pytest.raises(MbibError, match=f"loader: resident: the decoded images take .* {problem}"):
            choose_loader(data, asked, SIZE, META)


def test_images_that_the_disk_keeps_need_no_host_memory(folder, tmp_path, monkeypatch):
    for module in ("create", "decoding"):
        monkeypatch.setattr(f"mbib_timm.data.{module}.free_memory", {META: 1 << 30, CPU: 0}.__getitem__)
    settings = recipe(dataset="folder", data_dir=str(folder), val_fraction=0.5, loader="auto")
    for cache, chosen in (("none", "timm"), (str(tmp_path / "cache"), "resident")):
        cached = settings.replace(image_cache=cache)
        assert choose_loader(open_data(cached), cached, SIZE, META) == chosen


def test_images_that_are_there_already_are_not_counted_again(monkeypatch):
    """A second run on the same data takes the loader of the first, whatever memory that has left."""
    data, pool, settings = splits(), DataPool(), recipe(loader="auto")
    needed = 2 * 50 * 3 * 16 * 16

    def free(device):
        return 2 * needed - sum(images.pixels.numel() for images in pool.images.values())

    monkeypatch.setattr("mbib_timm.data.decoding.free_memory", free)
    for seed in (0, 1):
        changed = settings.replace(seed=seed, lr=0.1 + seed)
        assert choose_loader(data, changed, SIZE, CPU, pool) == "resident"
        create_loaders(data, changed, SIZE, CPU, pool=pool)
    assert len(pool.images) == 2
    assert free(CPU) < 2 * needed
    # Images of other data give way, rather than change the loader; what never fits takes timm's, then as now.
    assert choose_loader(data, settings.replace(imbalance="exp"), SIZE, CPU, pool) == "resident"
    assert not pool.images
    large = settings.replace(img_size=32)
    assert choose_loader(data, large, (3, 32, 32), CPU, pool) == "timm"
    monkeypatch.setattr("mbib_timm.data.decoding.free_memory", lambda device: 1 << 40)
    assert choose_loader(data, large, (3, 32, 32), CPU, pool) == "timm"


def test_single_image_policies_take_timms_loader():
    data = splits()
    policy = dict(train_crop_mode="rrc", aa="augmix-m3-w3")
    assert choose_loader(data, recipe(loader="auto", **policy), SIZE, CPU) == "timm"
    with pytest.raises(MbibError, match=r"loader: resident .* 'aa'.* use loader: timm"):
        choose_loader(data, recipe(**policy), SIZE, CPU)
    assert choose_loader(data, recipe(loader="auto", aa="cifar10"), SIZE, CPU) == "resident"


def test_runs_of_one_process_share_opened_data_and_images(tmp_path):
    pool = DataPool()
    settings = settled(loader="resident", image_cache="none", workers=0)
    data = pool.open(settings)
    assert pool.open(settings.replace(seed=3, lr=1.0)) is data
    first = create_loaders(data, settings, SIZE, CPU, pool=pool)
    second = create_loaders(data, settings.replace(seed=3), SIZE, CPU, pool=pool)
    assert first.train.streams[0].images is second.train.streams[0].images
    assert pool.open(settings.replace(imbalance="exp")) is not data


# Passes of a method that looks at images before or after training


@pytest.mark.parametrize("mode", ["pad", "none", "rrc"])
@pytest.mark.parametrize("kind", ["resident", "timm"])
def test_a_pass_gives_every_image_in_order_as_an_evaluation_does(mode, kind):
    data, settings = splits(21, 20, 24), recipe(train_crop_mode=mode, loader=kind)
    evaluated = epoch(loaders(settings, data).val, 0)
    data = replace(data, held_out=data.train.subset(np.arange(5)), held_out_from="a few")
    passes = Passes(data, settings, SIZE, World(CPU))
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(epoch(passes.train, 0), evaluated, strict=True))
    assert all(torch.equal(part, whole[:5]) for part, whole in zip(epoch(passes.held_out, 0), evaluated, strict=True))
    halves = [Passes(data, settings, SIZE, World(CPU, rank, 2)).train for rank in (0, 1)]
    assert sorted(i for half in halves for i in epoch(half, 0)[2].tolist()) == list(range(21))


def test_passes_share_the_images_of_training_where_those_are_the_same():
    data, pool = splits(), DataPool()
    data = replace(data, held_out=data.val)
    for mode, copies in (("pad", 2), ("none", 2), ("rrc", 3)):
        pool.images.clear()
        settings = recipe(train_crop_mode=mode)
        create_loaders(data, settings, SIZE, CPU, pool=pool)
        passes = Passes(data, settings, SIZE, World(CPU), pool)
        assert len(pool.images) == 2
        assert len(passes.train) == len(passes.held_out) == 7
        assert len(pool.images) == copies


def test_what_does_not_fit_is_decoded_as_it_passes(monkeypatch):
    monkeypatch.setattr("mbib_timm.data.decoding.free_memory", lambda device: 0)
    assert isinstance(Passes(splits(), recipe(), SIZE, World(CPU)).train, TimmLoader)


def test_without_held_out_images_a_pass_says_how_to_get_them():
    passes = Passes(splits(), recipe(), SIZE, World(CPU))
    with pytest.raises(MbibError, match=r"every image is trained or tested on, .* set holdout: 0\.1 to"):
        _ = passes.held_out
    assert len(list(passes.train)) == 7


@pytest.mark.parametrize("kind", ["resident", "timm"])
def test_a_pass_replaces_a_broken_image_as_training_does(folder, kind):
    (folder / "ant" / "2.png").write_bytes(b"no image")
    settings = recipe(dataset="folder", data_dir=str(folder), val_fraction=0.9, loader=kind)
    reader = open_data(settings).train.reader
    train = Split(reader, np.array([0] * 6 + [1] * 4), np.arange(10))
    data = Splits(train, train.subset(np.array([0])), None, np.array([6, 4]), None)
    assert epoch(Passes(data, settings, SIZE, World(CPU)).train, 0)[2].tolist() == [0, 1, 3, 3, *range(4, 10)]
