"""Resident images: the cache on the disk, and the memory that they take."""

import hashlib

import forked
import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from small_data import CPU, SIZE, epoch, image_folder, recipe, splits

from mbib_timm.data import Split, Splits, create_loaders, decoding, open_data
from mbib_timm.data.decoding import decode_split, decoded_bytes, fits, free_memory

# The cache


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path)


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
                "mode": {"train_crop_mode": "none", "crop_pct": 0.875, "crop_mode": "center"}}  # fmt: skip
        settings = settings.replace(**keys[change])
    create_loaders(open_data(settings), settings, (3, settings.img_size, settings.img_size), CPU)
    assert len(entries(folder)) >= 3


@pytest.mark.parametrize("damage", ["flip a bit", "truncate", "no index", "nonsense index", "no pixels"])
def test_a_damaged_entry_is_decoded_again(folder, capsys, damage):
    settings = cached(folder)
    first = batches(settings)
    for entry in entries(folder):
        pixels, index = entry / decoding.PIXELS, entry / decoding.INDEX
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

    monkeypatch.setattr(decoding, "decoded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batches(cached(folder))
    assert entries(folder) == []
    monkeypatch.undo()
    assert equal(batches(cached(folder)), batches(recipe(dataset="folder", data_dir=str(folder))))


def test_what_killed_processes_have_half_written_goes_with_the_next_start(folder):
    cache = folder.parent / "cache"
    dead, living, foreign = cache / f"{'a' * 32}.abcd1234", cache / f"{'b' * 32}.abcd_234", cache / "photos.2024"
    for path in (dead, living, foreign):
        path.mkdir(parents=True)
        (path / "pixels.bin").touch()
    with FileLock(cache / f"{'b' * 32}.lock"):
        batches(cached(folder))
        assert (dead.exists(), living.exists(), foreign.exists()) == (False, True, True)
    batches(cached(folder))
    assert (living.exists(), foreign.exists()) == (False, True)


def test_a_cache_that_cannot_be_written_stops_nothing(folder, capsys):
    (folder.parent / "cache").write_text("a file")
    assert equal(batches(cached(folder)), batches(recipe(dataset="folder", data_dir=str(folder))))
    assert "decoded images are not kept: " in capsys.readouterr().out


def test_blocks_are_checked_one_by_one(folder, monkeypatch):
    monkeypatch.setattr(decoding, "BLOCK_BYTES", 1000)
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


@pytest.mark.slow
def test_two_processes_decode_once_and_see_the_same(folder, tmp_path, monkeypatch):
    original = decoding.write_entry

    def write(*arguments):
        print("decoding")
        original(*arguments)

    def work():
        read = [tensor for batch in batches(cached(folder)) for tensor in batch]
        print(hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in read)).hexdigest())

    monkeypatch.setattr(decoding, "write_entry", write)
    files = [tmp_path / f"{number}.txt" for number in range(2)]
    processes = [forked.start(work, file, file) for file in files]
    for process in processes:
        process.join()
    outputs = [file.read_text().split() for file in files]
    assert [process.exitcode for process in processes] == [0, 0], outputs
    assert sum(output.count("decoding") for output in outputs) == 2  # training and evaluation, once each
    assert outputs[0][-1] == outputs[1][-1]


# Memory


def test_the_memory_that_images_take(folder):
    settings = cached(folder, train_crop_mode="rrc", val_fraction=0.01)
    data = open_data(settings)
    assert decoded_bytes(data.val, settings, SIZE, training=False) == len(data.val) * 3 * 16 * 16
    areas = [np.prod(Image.open(data.train.reader.path(int(i))).size) for i in data.train.indices]
    assert decoded_bytes(data.train, settings, SIZE, training=True) == pytest.approx(3 * sum(areas), rel=1e-6)
    built = create_loaders(data, settings, SIZE, CPU)
    assert built.train.streams[0].images.pixels.numel() == 3 * (sum(areas) + 1)  # and the black pixel


@pytest.mark.parametrize(("side", "kept"), [(16, [150, 500]), (224, [150, 500]), (336, [225, 750]), (640, [300, 1000])])
def test_images_beyond_the_longest_side_shrink_and_larger_inputs_are_cut_from_more(side, kept):
    data, size = splits(2, 300, 1000), (3, side, side)
    settings = recipe(train_crop_mode="rrc", img_size=side)
    assert decoded_bytes(data.train, settings, size, training=True) == 2 * 3 * kept[0] * kept[1]
    images = decode_split(data.train, settings, size, CPU, training=True, replace_broken=True)
    assert images.sizes.tolist() == [kept] * 2


def test_free_memory_is_known():
    assert 1 << 20 < free_memory(CPU) < 1 << 50
    assert fits(0, CPU)
    assert not fits(1 << 60, CPU)
