"""Webdataset shards: every image once in evaluation, broken ones named, and none skipped in silence."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from mbib_timm.data import create_loaders, create_passes, open_data
from mbib_timm.data.loaders import Place
from mbib_timm.data.timm_loader import timm_eval_loader
from mbib_timm.errors import DataError, MbibError
from mbib_timm.recipe import Recipe

pytest.importorskip("webdataset")

CPU = torch.device("cpu")
SIZE = (3, 16, 16)
SHARD_LENGTHS = {"train": [6, 6], "validation": [5, 1, 3]}


def png(color):
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), color, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Write shards; takes labels and images that replace the sound ones, by split and image."""

    def write(labels=None, images=None):
        info = {}
        for split, lengths in SHARD_LENGTHS.items():
            names, number = [f"demo-{split}-{i:03}.tar" for i in range(len(lengths))], 0
            for name, length in zip(names, lengths, strict=True):
                with tarfile.open(tmp_path / name, "w") as tar:
                    for _ in range(length):
                        key = (split, number)
                        label = (labels or {}).get(key, str(number % 2).encode())
                        for kind, content in (("png", (images or {}).get(key, png(number))), ("cls", label)):
                            member = tarfile.TarInfo(f"{number:03}.{kind}")
                            member.size = len(content)
                            tar.addfile(member, io.BytesIO(content))
                        number += 1
            info[split] = dict(name=split, filenames=names, shard_lengths=lengths, num_samples=sum(lengths))
        (tmp_path / "_info.json").write_text(json.dumps({"splits": info}))
        (tmp_path / "counts.txt").write_text("6\n6\n")
        return Recipe(
            dataset="wds", data_dir=str(tmp_path), class_counts=str(tmp_path / "counts.txt"), batch_size=3, workers=0,
            validation_batch_size=2, train_crop_mode="pad", hflip=0.0, mean=[0.0], std=[1.0],
        )  # fmt: skip

    return write


def loaders(recipe, size=SIZE, **keys):
    return create_loaders(open_data(recipe), recipe, size, CPU, **keys)


def image_numbers(loader):
    """Each image is filled with its number."""
    return sorted(round(image.max().item() * 255) for batch in loader for image in batch.images)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (4, 0)])
def test_evaluation_sees_every_image_exactly_once(shards, monkeypatch, world_size, workers):
    recipe, seen = shards().replace(workers=workers), []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: world_size > 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: world_size)
    for rank in range(world_size):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        seen += image_numbers(timm_eval_loader(open_data(recipe).val, recipe, SIZE, Place(CPU)))
    assert sorted(seen) == list(range(9))


def test_a_broken_image_stops_evaluation_with_its_shard_and_key(shards):
    for workers in (0, 2):
        recipe = shards(images={("validation", 7): b"no image"}).replace(workers=workers)
        with pytest.raises(DataError, match=r"^cannot read image .*demo-validation-002\.tar/007: "):
            list(loaders(recipe).val)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_replaced_and_reported_in_training(shards, workers):
    recipe = shards(images={("train", 2): b"no image", ("train", 8): png(8)[:60]}).replace(workers=workers)
    train = loaders(recipe)
    for _ in range(2):
        assert sum(len(batch.targets) for (batch,) in train.train) == 12 == 3 * len(train.train)
    names = sorted("/".join(path.split("/")[-2:]) for path in train.broken_images())
    assert names == ["demo-train-000.tar/002", "demo-train-001.tar/008"]


@pytest.mark.parametrize(("label", "message"), [(b"owl", "label 'owl' is not an integer"), (b"2", r"not in 0\.\.1")])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_bad_labels_stop_training_and_evaluation(shards, split, label, message):
    both = loaders(shards(labels={(split, 4): label}))
    with pytest.raises(DataError, match=f"demo-{split}-000.tar/004: .*{message}"):
        list(both.train if split == "train" else both.val)


def test_a_truncated_shard_stops_evaluation(shards, tmp_path):
    recipe = shards()
    shard = tmp_path / "demo-validation-000.tar"
    shard.write_bytes(shard.read_bytes()[:1700])
    with pytest.raises(DataError, match="cannot read"):
        list(loaders(recipe).val)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_is_a_function_of_the_epoch(shards, workers):
    recipe = shards().replace(workers=workers)

    def order(loader, epoch):
        torch.manual_seed(epoch)  # as the training run does
        loader.set_epoch(epoch)
        return [round(image.max().item() * 255) for (batch,) in loader for image in batch.images]

    whole, resumed = loaders(recipe).train, loaders(recipe).train
    first, second = order(whole, 0), order(whole, 1)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(12))
    assert order(resumed, 1) == second
    if workers == 0:  # else each worker holds one of the two shards, and shuffles it by the seed of the epoch above
        assert order(loaders(recipe, stage=1).train, 0) not in (first, second)


def test_what_needs_images_by_index_is_refused(shards):
    recipe = shards()
    with pytest.raises(MbibError, match="sampler 'balanced' chooses images by their class, but the data source stream"):
        loaders(recipe, sampler="balanced")
    with pytest.raises(DataError, match="'wds' streams: recipe key 'holdout' needs images by index"):
        open_data(recipe.replace(holdout=0.1))


def test_a_method_may_pass_over_the_training_shards(shards):
    recipe = shards()
    data = open_data(recipe)
    passes = create_passes(data, recipe, SIZE, Place(CPU))
    assert image_numbers(passes.train) == list(range(12))
    with pytest.raises(MbibError, match="set holdout"):
        _ = passes.held_out


def test_without_webdataset_the_error_says_what_to_install(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.delitem(sys.modules, "mbib_timm.data.shards", raising=False)
    with pytest.raises(DataError, match=r"pip install 'mbib-timm\[wds\]'"):
        open_data(shards())


def test_grey_models_get_grey_images(shards):
    (batch,) = next(iter(loaders(shards(), (1, 16, 16)).train))
    assert batch.images.shape == (3, 1, 16, 16)


def test_shards_that_are_not_there(shards, tmp_path):
    recipe = shards()
    with pytest.raises(DataError, match="cannot open split 'dev' of the shards in"):
        loaders(recipe.replace(val_split="dev"))
    with pytest.raises(DataError, match="2 shards cannot feed 3 loading processes: lower --workers"):
        loaders(recipe.replace(workers=3))
    (tmp_path / "demo-train-001.tar").unlink()
    with pytest.raises(DataError, match=r"names the shard demo-train-001\.tar, which is not in"):
        loaders(recipe)
    with pytest.raises(DataError, match="does not exist"):
        loaders(recipe.replace(data_dir=str(tmp_path / "nowhere")))
