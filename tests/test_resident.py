"""The resident loader against timm's and torchvision, by pixel and by distribution; its cache; when it is chosen."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image
from scipy import stats

from mbib_timm.data import Batch, DataPool, choose_loader, create_loaders, create_passes, open_data
from mbib_timm.data import image_cache as cache_module
from mbib_timm.data import resident as resident_module
from mbib_timm.data.crops import PadAndCrop, shifted_crops
from mbib_timm.data.decode import DecodedImages
from mbib_timm.data.images import ArrayReader, Split
from mbib_timm.data.loaders import Place
from mbib_timm.data.memory import decoded_bytes, fits, free_memory
from mbib_timm.data.splits import Splits
from mbib_timm.data.timm_loader import TimmLoader
from mbib_timm.errors import MbibError
from mbib_timm.recipe import Recipe

CPU = torch.device("cpu")
SIZE = (3, 16, 16)


def recipe(**keys):
    base = {"workers": 0, "train_crop_mode": "pad", "img_size": 16, "batch_size": 8, "validation_batch_size": 8}
    return Recipe(**{**base, "image_cache": "none", "loader": "resident", **keys})


def splits(count=50, height=16, width=16, classes=5):
    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, (count, height, width, 3), dtype=np.uint8)
    split = Split(ArrayReader(images, "arrays"), np.arange(count) % classes)
    return Splits(split, split, None, np.bincount(split.targets), None)


def loaders(settings, data=None, rank=0, world_size=1):
    return create_loaders(data or splits(), settings, SIZE, CPU, rank, world_size)


def epoch(loader, number):
    loader.set_epoch(number)
    batches = [item[0] if isinstance(item, tuple) and not isinstance(item, Batch) else item for item in loader]
    return tuple(torch.cat(parts) for parts in zip(*((b.images, b.targets, b.index) for b in batches), strict=True))


# The same batches as timm's loader


@pytest.mark.parametrize("mode", ["pad", "none", "rrc"])
@pytest.mark.parametrize("image", [(16, 16), (23, 40)])
def test_evaluation_batches_are_bit_equal_to_timms(mode, image):
    data = splits(20, *image)
    ours = loaders(recipe(train_crop_mode=mode), data).val
    timms = loaders(recipe(train_crop_mode=mode, loader="timm"), data).val
    assert type(ours) is not type(timms)
    for batch, expected in zip(ours, timms, strict=True):
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.targets, expected.targets)
        assert torch.equal(batch.index, expected.index)


@pytest.mark.parametrize("count", [48, 49, 50])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_training_has_timms_order_and_its_last_batch(count, rank, world_size):
    data = splits(count)
    data = Splits(Split(data.train.reader, np.arange(count)), data.val, None, data.class_counts, None)
    both = [loaders(recipe(loader=kind), data, rank, world_size).train for kind in ("resident", "timm")]
    for number in (0, 7):
        ours, timms = (
            [batch.index.tolist() for loader in [built] for (batch,) in (loader.set_epoch(number), loader)[1]]
            for built in both
        )
        assert ours == timms
    assert len(both[0]) == len(both[1])


def test_without_augmentation_training_batches_are_bit_equal_to_timms():
    ours, timms = (loaders(recipe(train_crop_mode="none", loader=kind)).train for kind in ("resident", "timm"))
    for got, expected in zip(epoch(ours, 3), epoch(timms, 3), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("channels_last", [True, False])
def test_batches_have_the_memory_format_that_the_recipe_asks_for(channels_last):
    (batch,) = next(iter(loaders(recipe(channels_last=channels_last)).train))
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    assert batch.images.is_contiguous(memory_format=wanted)


# Pad, crop and flip


def decoded(images):
    count, height, width, channels = images.shape
    pixels = np.concatenate([np.zeros((1, channels), np.uint8), images.reshape(-1, channels)])
    sizes = torch.tensor([[height, width]]).expand(count, 2)
    return DecodedImages(torch.from_numpy(pixels), sizes, torch.zeros(count, dtype=torch.int64), torch.arange(count))


def test_crops_are_torchvisions_by_pixel():
    rng = np.random.RandomState(0)
    images = rng.randint(1, 256, (6, 16, 24, 3), dtype=np.uint8)
    chosen = torch.tensor([5, 0, 3, 3, 1, 2])
    tops, lefts = torch.tensor([-2, 2, 0, 1, -1, 2]), torch.tensor([3, -3, 0, 2, -2, -1])
    flips = torch.tensor([True, False, True, False, False, True])
    crops = shifted_crops(decoded(images), chosen, 16, 24, tops, lefts, flips)
    for i in range(6):
        picture = tv.pad(Image.fromarray(images[chosen[i]]), [3, 2])  # left and right by 24/8, top and bottom by 16/8
        picture = tv.crop(picture, int(tops[i]) + 2, int(lefts[i]) + 3, 16, 24)
        picture = tv.hflip(picture) if flips[i] else picture
        np.testing.assert_array_equal(crops[i].numpy(), np.asarray(picture))


def test_crops_and_flips_are_uniform():
    draws = PadAndCrop(32, 16, 0.3).draw(torch.zeros(20_000, 2), torch.Generator().manual_seed(0))
    for name, reach in (("tops", 4), ("lefts", 2)):
        counts = torch.bincount(draws[name] + reach, minlength=2 * reach + 1)
        assert len(counts) == 2 * reach + 1
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert stats.binomtest(int(draws["flips"].sum()), 20_000, 0.3).pvalue > 1e-3
    table = stats.contingency.crosstab(draws["tops"].numpy(), draws["flips"].numpy()).count
    assert stats.chi2_contingency(table).pvalue > 1e-3


# An epoch as a function of seed, epoch and rank


@pytest.mark.parametrize("mode", ["pad", "rrc"])
def test_an_epoch_does_not_depend_on_the_pieces_it_is_augmented_in(monkeypatch, mode):
    settings = recipe(train_crop_mode=mode, color_jitter=0.4 if mode == "rrc" else 0)
    data = splits(50, 20, 30)
    whole = epoch(loaders(settings, data).train, 2)
    monkeypatch.setattr(resident_module, "PIECE_BYTES", 1)
    for got, expected in zip(epoch(loaders(settings, data).train, 2), whole, strict=True):
        assert torch.equal(got, expected)


def test_augmentation_is_a_function_of_seed_epoch_and_rank():
    images = epoch(loaders(recipe()).train, 1)[0]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(epoch(loaders(recipe()).train, 1)[0], images)
    assert torch.equal(torch.get_rng_state(), before)  # the model's dropout has the global generator for itself
    same = Split(splits().train.reader, np.zeros(50, dtype=int), np.zeros(50, dtype=int))
    data = Splits(same, same, None, np.array([50, 0]), None)
    first = loaders(recipe(), data).train
    assert not torch.equal(epoch(first, 0)[0], epoch(first, 1)[0])
    ranks = [epoch(loaders(recipe(), data, rank, 2).train, 0)[0] for rank in (0, 1)]
    assert not torch.equal(*ranks)
    assert not torch.equal(epoch(loaders(recipe(seed=1), data).train, 0)[0], epoch(first, 0)[0])


def test_runs_of_one_process_share_opened_data_and_images(tmp_path):
    pool = DataPool()
    settings = Recipe(loader="resident", image_cache="none", workers=0)
    data = pool.open(settings)
    assert pool.open(settings.replace(seed=3, lr=1.0)) is data
    first = create_loaders(data, settings, SIZE, CPU, pool=pool)
    second = create_loaders(data, settings.replace(seed=3), SIZE, CPU, pool=pool)
    assert first.train.streams[0].images is second.train.streams[0].images
    assert pool.open(settings.replace(imbalance="exp")) is not data


# Passes of a method that looks at images once training is done


@pytest.mark.parametrize("mode", ["pad", "none", "rrc"])
@pytest.mark.parametrize("kind", ["resident", "timm"])
def test_a_pass_gives_every_image_in_order_as_an_evaluation_does(mode, kind):
    data, settings = splits(21, 20, 24), recipe(train_crop_mode=mode, loader=kind)
    evaluated = epoch(loaders(settings, data).val, 0)
    data = replace(data, held_out=data.train.subset(np.arange(5)), held_out_from="a few")
    passes = create_passes(data, settings, SIZE, Place(CPU))
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(epoch(passes.train, 0), evaluated, strict=True))
    assert all(torch.equal(part, whole[:5]) for part, whole in zip(epoch(passes.held_out, 0), evaluated, strict=True))
    halves = [create_passes(data, settings, SIZE, Place(CPU, rank, 2)).train for rank in (0, 1)]
    assert sorted(i for half in halves for i in epoch(half, 0)[2].tolist()) == list(range(21))


def test_passes_share_the_images_of_training_where_those_are_the_same():
    data, pool = splits(), DataPool()
    data = replace(data, held_out=data.val)
    for mode, copies in (("pad", 2), ("none", 2), ("rrc", 3)):
        pool.images.clear()
        settings = recipe(train_crop_mode=mode)
        create_loaders(data, settings, SIZE, CPU, pool=pool)
        passes = create_passes(data, settings, SIZE, Place(CPU), pool)
        assert len(pool.images) == 2
        assert len(passes.train) == len(passes.held_out) == 7
        assert len(pool.images) == copies


def test_what_does_not_fit_is_decoded_as_it_passes(monkeypatch):
    monkeypatch.setattr("mbib_timm.data.memory.free_memory", lambda device: 0)
    assert isinstance(create_passes(splits(), recipe(), SIZE, Place(CPU)).train, TimmLoader)


def test_without_held_out_images_a_pass_says_how_to_get_them():
    passes = create_passes(splits(), recipe(), SIZE, Place(CPU))
    with pytest.raises(MbibError, match=r"no images that are neither trained nor tested on, .* set holdout: 0\.1 to"):
        _ = passes.held_out
    assert len(list(passes.train)) == 7


@pytest.mark.parametrize("kind", ["resident", "timm"])
def test_a_pass_replaces_a_broken_image_as_training_does(folder, kind):
    (folder / "ant" / "2.png").write_bytes(b"no image")
    settings = recipe(dataset="folder", data_dir=str(folder), val_fraction=0.9, loader=kind)
    reader = open_data(settings).train.reader
    train = Split(reader, np.array([0] * 6 + [1] * 4), np.arange(10))
    data = Splits(train, train.subset(np.array([0])), None, np.array([6, 4]), None)
    assert epoch(create_passes(data, settings, SIZE, Place(CPU)).train, 0)[2].tolist() == [0, 1, 3, 3, *range(4, 10)]


# The cache


@pytest.fixture
def folder(tmp_path):
    """Class folders of 6 and 4 images, of different sizes."""
    rng = np.random.RandomState(0)
    for label, count in {"ant": 6, "bee": 4}.items():
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(count):
            pixels = rng.randint(0, 256, (20 + i, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
    return tmp_path / "images"


def cached(folder, **keys):
    return recipe(dataset="folder", data_dir=str(folder), image_cache=str(folder.parent / "cache"), **keys)


def entries(folder):
    return sorted(path for path in (folder.parent / "cache").iterdir() if path.is_dir())


def batches(settings):
    built = create_loaders(open_data(settings), settings, SIZE, CPU)
    return [epoch(loader, 0) for loader in (built.train, built.val)]


def equal(first, second):
    return all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("mode", ["pad", "rrc"])
def test_the_second_run_decodes_nothing(folder, monkeypatch, mode):
    settings = cached(folder, train_crop_mode=mode)
    first = batches(settings)
    assert len(entries(folder)) == 2  # training and evaluation
    monkeypatch.setattr("mbib_timm.data.images.ImageDataset.__getitem__", None)
    assert equal(batches(settings), first)
    assert equal(first, batches(settings))


@pytest.mark.parametrize("change", ["image", "label", "size", "interpolation", "mode"])
def test_an_entry_is_for_one_source_and_one_preprocessing(folder, change):
    settings = cached(folder)
    batches(settings)
    if change == "image":
        Image.new("RGB", (30, 20)).save(folder / "ant" / "0.png")
        Image.new("RGB", (30, 20)).save(folder / "bee" / "0.png")
    elif change == "label":
        (folder / "cat").mkdir()
        for i in (4, 5):
            (folder / "ant" / f"{i}.png").rename(folder / "cat" / f"{i}.png")
    else:
        keys = {"size": {"img_size": 24}, "interpolation": {"interpolation": "bilinear"},
                "mode": {"train_crop_mode": "none"}}  # fmt: skip
        settings = settings.replace(**keys[change])
    create_loaders(open_data(settings), settings, (3, settings.img_size, settings.img_size), CPU)
    assert len(entries(folder)) >= 3


@pytest.mark.parametrize("damage", ["flip a bit", "truncate", "no index", "nonsense index", "no pixels"])
def test_a_damaged_entry_is_decoded_again(folder, capsys, damage):
    settings = cached(folder)
    first = batches(settings)
    for entry in entries(folder):
        pixels, index = entry / cache_module.PIXELS, entry / cache_module.INDEX
        content = bytearray(pixels.read_bytes())
        if damage == "flip a bit":
            content[100] ^= 1
            pixels.write_bytes(content)
        elif damage == "truncate":
            pixels.write_bytes(content[:-1])
        elif damage == "no index":
            index.unlink()
        elif damage == "nonsense index":
            index.write_bytes(b"nonsense")
        else:
            pixels.unlink()
    assert equal(batches(settings), first)
    assert ("is damaged" in capsys.readouterr().out) == (damage in ("flip a bit", "truncate", "nonsense index"))
    assert equal(batches(settings), first)
    assert capsys.readouterr().out == ""


def test_what_is_interrupted_leaves_no_entry(folder, monkeypatch):
    def interrupted(dataset, workers):
        yield np.zeros((16, 16, 3), np.uint8), np.zeros(2, np.int64)
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_module, "decoded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batches(cached(folder))
    assert entries(folder) == []
    monkeypatch.undo()
    assert equal(batches(cached(folder)), batches(recipe(dataset="folder", data_dir=str(folder))))


def test_a_cache_that_cannot_be_written_stops_nothing(folder, capsys):
    (folder.parent / "cache").write_text("a file")
    assert equal(batches(cached(folder)), batches(recipe(dataset="folder", data_dir=str(folder))))
    assert "decoded images are not kept: " in capsys.readouterr().out


def test_blocks_are_checked_one_by_one(folder, monkeypatch):
    monkeypatch.setattr(cache_module, "BLOCK_BYTES", 1000)
    first = batches(cached(folder))
    assert equal(batches(cached(folder)), first)


def test_broken_images_are_remembered(folder):
    (folder / "ant" / "2.png").write_bytes(b"no image")
    settings = cached(folder, val_fraction=0.01)
    for _ in range(2):
        data = open_data(settings)
        data = Splits(data.train, Split(data.train.reader, np.array([0]), np.array([0])), None, data.class_counts, None)
        built = create_loaders(data, settings, SIZE, CPU)
        in_training = {data.train.reader.path(int(i)) for i in data.train.indices}
        assert set(built.train.broken_images()) == {str(folder / "ant" / "2.png")} & in_training


def test_two_processes_decode_once_and_see_the_same(folder):
    program = (
        "import sys, hashlib; from tests.test_resident import *\n"
        "import pathlib; import mbib_timm.data.image_cache as c; w = c.write_entry\n"
        "def write(*a): print('decoding'); w(*a)\n"
        "c.write_entry = write\n"
        "r = batches(cached(pathlib.Path(sys.argv[1])))\n"
        "print(hashlib.sha256(b''.join(t.contiguous().numpy().tobytes() for x in r for t in x)).hexdigest())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["PYTHONPATH"] = str(os.path.dirname(os.path.dirname(__file__))) + os.pathsep + environment["PYTHONPATH"]
    command = [sys.executable, "-c", program, str(folder)]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(output.count("decoding") for output in outputs) == 2  # training and evaluation, once each
    assert outputs[0][-1] == outputs[1][-1]


# Which loader


def test_what_fits_is_resident_and_what_does_not_is_not(monkeypatch):
    data = splits()
    assert choose_loader(data, recipe(loader="auto"), SIZE, CPU) == "resident"
    needed = 2 * 50 * 3 * 16 * 16
    for free, chosen in ((2 * needed, "resident"), (2 * needed - 2, "timm")):
        monkeypatch.setattr("mbib_timm.data.memory.free_memory", lambda device, free=free: free)
        assert choose_loader(data, recipe(loader="auto"), SIZE, CPU) == chosen
    assert choose_loader(data, recipe(loader="resident"), SIZE, CPU) == "resident"
    assert choose_loader(data, recipe(loader="timm"), SIZE, CPU) == "timm"


def test_single_image_policies_take_timms_loader():
    data = splits()
    policy = dict(train_crop_mode="rrc", aa="augmix-m3-w3")
    assert choose_loader(data, recipe(loader="auto", **policy), SIZE, CPU) == "timm"
    with pytest.raises(MbibError, match=r"loader: resident .* 'aa'.* use loader: timm"):
        choose_loader(data, recipe(**policy), SIZE, CPU)


def test_the_memory_that_images_take(folder):
    settings = cached(folder, train_crop_mode="rrc", val_fraction=0.01)
    data = open_data(settings)
    assert decoded_bytes(data.val, settings, SIZE, training=False) == len(data.val) * 3 * 16 * 16
    areas = [np.prod(Image.open(data.train.reader.path(int(i))).size) for i in data.train.indices]
    assert decoded_bytes(data.train, settings, SIZE, training=True) == pytest.approx(3 * sum(areas), rel=1e-6)
    built = create_loaders(data, settings, SIZE, CPU)
    assert built.train.streams[0].images.pixels.numel() == 3 * (sum(areas) + 1)  # and the black pixel


def test_images_beyond_the_longest_side_shrink():
    data = splits(2, 300, 1000)
    settings = recipe(train_crop_mode="rrc")
    assert decoded_bytes(data.train, settings, SIZE, training=True) == 2 * 3 * 150 * 500
    assert loaders(settings, data).train.streams[0].images.sizes.tolist() == [[150, 500]] * 2


def test_free_memory_is_known():
    assert 1 << 20 < free_memory(CPU) < 1 << 50
    assert fits(0, CPU)
    assert not fits(1 << 60, CPU)
