"""Features of a frozen backbone: what heads learn of them, and the cache that keeps them."""

import csv
import json
import resource

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_data import class_folders, picture

import mbib_timm.data.features as features_module
from mbib_timm.cli import main
from mbib_timm.data import Passes, open_data
from mbib_timm.data.batch import Loader
from mbib_timm.data.decoding import FileStates
from mbib_timm.data.features import FeatureLoader, Features, FeatureStore, Rows, load_chunk, to_bytes
from mbib_timm.data.images import ArrayReader, Split
from mbib_timm.data.samplers import OrderedSampler
from mbib_timm.environment import World
from mbib_timm.errors import CheckpointError, DataError, MbibError
from mbib_timm.models.weights import load_model
from mbib_timm.recipe import Recipe
from mbib_timm.training import train

CPU = torch.device("cpu")
SIZE = (3, 32, 32)


@pytest.fixture
def images(tmp_path):
    """Class folders of 12, 5, 3 and 1 images."""
    return class_folders(tmp_path)


def recipe(images, **keys):
    """Heads on the packaged weights' backbone, a few steps."""
    base = dict(
        dataset="folder", data_dir=str(images), output=str(images.parent / "runs"), device="cpu", workers=0,
        image_cache=str(images.parent / "cache"), loader="timm", img_size=32, train_crop_mode="none", hflip=0.0,
        model="mbib_resnet32.cifar100_lt_if100", pretrained=True, method="mbib", feature_passes=1, epochs=3,
        batch_size=6, lr=0.05, seed=1, mean=[0.5], std=[0.25], crop_pct=0.875, crop_mode="center",
        interpolation="bicubic",
    )  # fmt: skip
    return Recipe(**{**base, **keys})


class Backbone:
    """The mean colour and the first pixels of an image, and how many images it has seen."""

    width, digest, dtype = 5, "mean colour", torch.float32

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return torch.cat([images.mean(dim=(2, 3)), images[:, 0, 0, :2]], dim=1)


def store(recipe, backbone=None, kept=None):
    return FeatureStore(backbone or Backbone(), recipe, SIZE, World(CPU), {} if kept is None else kept, FileStates())


def rows_of(loader: Loader):
    batches = list(loader)
    return torch.cat([b.images for b in batches])[:, :, 0, 0], torch.cat([b.index for b in batches])


# What heads learn


def test_heads_learn_what_they_do_beside_a_backbone_that_is_frozen_in_every_step(images):
    on_features = train(recipe(images), "features")
    frozen = dict(feature_passes=None, train="^(?!backbone)", frozen_bn="eval")
    on_images = train(recipe(images, **frozen), "images")
    ours, theirs = (load_file(run.folder / "model.safetensors") for run in (on_features, on_images))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4, msg=name)
    losses = [[row.losses["loss"] for row in run.history] for run in (on_features, on_images)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    moved = [name for name in theirs if not name.startswith("backbone.") and "classifier.weight" in name]
    fresh = train(recipe(images, epochs=1, lr=1e-12), "fresh")
    before = load_file(fresh.folder / "model.safetensors")
    assert all(not torch.allclose(before[name], ours[name], atol=1e-3) for name in moved)


@pytest.mark.parametrize(
    "keys",
    [
        {"model_ema": True, "model_ema_decay": 0.5},
        {"model": "cifar_resnet32.bsce_cifar100_lt_if100", "method": "ce", "smoothing": 0.1, "feature_passes": 2},
        {"model": "cifar_resnet32.bsce_cifar100_lt_if100", "method": "bsce", "mixup": 0.2, "class_weights": "balanced"},
    ],
)
def test_the_result_is_an_ordinary_model(images, keys):
    run = train(recipe(images, **keys), "heads")
    loaded = load_model(str(run.folder))
    assert loaded.num_classes == 4
    best = load_file(run.folder / "best.safetensors")
    assert best.keys() == loaded.module.state_dict().keys()
    assert main(["validate", str(run.folder), "--results", str(images.parent / "validated.json")]) == 0
    there = json.loads((images.parent / "validated.json").read_text())["heads"]["prediction"]
    assert there["nll"] == pytest.approx(run.record.result.prediction.nll, rel=1e-4)
    assert there["top1"] == run.record.result.prediction.top1
    with (run.folder / "predictions.csv").open() as file:
        recorded = {row["image"]: float(row["probability"]) for row in csv.DictReader(file)}
    with (images.parent / "validated_predictions.csv").open() as file:
        validated = {row["image"]: float(row["probability"]) for row in csv.DictReader(file)}
    assert recorded.keys() == validated.keys()
    assert [*validated.values()] == pytest.approx([recorded[path] for path in validated], abs=1e-4)
    checkpoint = torch.load(run.folder / "last.ckpt", map_location="cpu", weights_only=True)
    assert not any(name.startswith("backbone.") for name in checkpoint["state_dict"])


def test_a_run_resumes_to_the_same_bits_and_only_on_the_same_backbone(images, tmp_path):
    constant = dict(sched="constant", epochs=4)
    whole = train(recipe(images, **constant), "whole")
    train(recipe(images, **{**constant, "epochs": 2}), "parts")
    parts = train(recipe(images, **constant, resume="auto"), "parts")
    ours, theirs = (load_file(run.folder / "model.safetensors") for run in (whole, parts))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    weights = load_file(whole.folder / "model.safetensors")
    name = next(name for name in weights if name.startswith("backbone.") and name.endswith("weight"))
    changed = tmp_path / "changed"
    changed.mkdir()
    save_file({**weights, name: weights[name] + 1e-3}, changed / "model.safetensors")
    started = recipe(images, epochs=2, pretrained=False, initial_checkpoint=str(whole.folder))
    train(started, "started")
    with pytest.raises(CheckpointError, match="features of another backbone"):
        train(started.replace(resume="auto", epochs=4, initial_checkpoint=str(changed)), "started")


def test_a_stage_of_heads_comes_before_one_of_everything(images, tmp_path):
    file = tmp_path / "two.yaml"
    keys = recipe(images).keys()
    kept = ("dataset", "data_dir", "output", "device", "workers", "image_cache", "model", "img_size", "batch_size")
    text = {name: keys[name] for name in kept}
    stages = [
        {"method": "mbib", "feature_passes": 1, "pretrained": True, "epochs": 2, "lr": 0.05},
        {"method": "mbib", "epochs": 1, "lr": 0.001},
    ]
    file.write_text(json.dumps({**text, "stages": stages}))
    assert main(["train", str(file), "--experiment", "two"]) == 0
    run = images.parent / "runs" / "two"
    first, last = (load_file(place / "model.safetensors") for place in (run / "stage1-mbib", run))
    name = next(name for name in last if name.startswith("backbone.") and name.endswith("conv1.weight"))
    assert not torch.equal(first[name], last[name])
    heads = [weights["observation.classifier.weight"] for weights in (first, last)]
    torch.testing.assert_close(*heads, atol=0.1, rtol=0.1)


# The cache


def test_features_are_computed_once_for_all_runs_that_see_the_same(images):
    own = recipe(images)
    split = open_data(own).train
    first = Backbone()
    expected, index = rows_of(store(own, first).eval_loader(split))
    assert first.seen == len(split)
    assert index.tolist() == list(range(len(split)))
    for changes in ({"seed": 5}, {"lr": 0.2}, {"batch_size": 4}, {"epochs": 9}):
        again = Backbone()
        assert torch.equal(rows_of(store(own.replace(**changes), again).eval_loader(split))[0], expected)
        assert again.seen == 0
    for changes in ({"mean": [0.4]}, {"crop_pct": 0.5}, {"interpolation": "bilinear"}):
        again = Backbone()
        rows_of(store(own.replace(**changes), again).eval_loader(split))
        assert again.seen == len(split), changes
    other = Backbone()
    other.digest = "other weights"
    rows_of(store(own, other).eval_loader(split))
    assert other.seen == len(split)
    picture(99).save(split.path(3))
    changed = Backbone()
    there = rows_of(store(own, changed).eval_loader(split))[0]
    assert changed.seen == len(split)
    assert [row for row in range(len(split)) if not torch.equal(there[row], expected[row])] == [3]
    kept, unsaved = {}, Backbone()
    for _ in range(2):
        rows_of(store(own.replace(image_cache="none"), unsaved, kept).eval_loader(split))
    assert unsaved.seen == len(split)


def test_splits_in_memory_with_equal_labels_keep_their_own_features(images):
    backbone = Backbone()
    made = store(recipe(images), backbone)
    splits = [Split(ArrayReader(np.full((4, 8, 8, 3), grey, np.uint8), "same"), np.arange(4)) for grey in (50, 200)]
    dark, light, again = (rows_of(made.eval_loader(split))[0] for split in (*splits, splits[0]))
    assert not torch.equal(dark, light)
    assert torch.equal(dark, again)
    assert backbone.seen == 8


def test_what_a_killed_process_has_finished_is_not_computed_again(images, monkeypatch, capsys):
    monkeypatch.setattr(features_module, "CHUNK", 4)
    own = recipe(images, validation_batch_size=2)
    split = open_data(own).train
    expected = rows_of(store(own.replace(image_cache="none")).eval_loader(split))[0]

    class Dying(Backbone):
        def __call__(self, images):
            if self.seen == 10:
                raise KeyboardInterrupt
            return super().__call__(images)

    with pytest.raises(KeyboardInterrupt):
        store(own, Dying()).eval_loader(split)
    second = Backbone()
    assert torch.equal(rows_of(store(own, second).eval_loader(split))[0], expected)
    assert second.seen == len(split) - 8
    files = sorted((images.parent / "cache").glob("*/*.safetensors"))
    assert len(files) == -(-len(split) // 4)
    content = bytearray(files[1].read_bytes())
    content[-50] ^= 1
    files[1].write_bytes(content)
    files[2].write_bytes(files[2].read_bytes()[:-7])
    files[0].unlink()
    third = Backbone()
    assert torch.equal(rows_of(store(own, third).eval_loader(split))[0], expected)
    assert third.seen == 12
    said = capsys.readouterr().out
    assert said.count("is damaged; its features are computed again") == 2


def test_a_full_disk_leaves_features_in_memory(images, monkeypatch, capsys):
    monkeypatch.setattr(features_module, "CHUNK", 4)
    own = recipe(images)
    split = open_data(own).train
    expected = rows_of(store(own.replace(image_cache="none")).eval_loader(split))[0]
    backbone, limits = Backbone(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        found = rows_of(store(own, backbone).eval_loader(split))[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(found, expected)
    assert backbone.seen == len(split) > 4
    assert capsys.readouterr().out.count("features are not kept: cannot write") == 1


def test_augmented_passes_are_the_same_for_every_seed_interruption_and_number_of_workers(images, monkeypatch):
    monkeypatch.setattr(features_module, "CHUNK", 4)
    own = recipe(images, feature_passes=3, train_crop_mode="rrc", hflip=0.5, validation_batch_size=3)
    data = open_data(own)
    order = OrderedSampler(range(len(data.train)))

    def passes(settings):
        features = store(settings).train_loader(data.train, order).features
        return [torch.cat(chunks) for chunks in features.passes]

    plain, one, two = passes(own)
    assert torch.equal(plain, rows_of(store(own).eval_loader(data.train))[0])
    assert all(not torch.equal(one[row], two[row]) for row in range(len(one)))
    for file in sorted((images.parent / "cache").glob("*/*.safetensors"))[::2]:
        file.unlink()
    for before, after in zip((plain, one, two), passes(own.replace(seed=7)), strict=True):
        assert torch.equal(before, after)
    for changes in ({}, {"workers": 1, "validation_batch_size": 2}):
        for before, after in zip((plain, one, two), passes(own.replace(image_cache="none", **changes)), strict=True):
            assert torch.equal(before, after)


def test_each_row_of_an_epoch_is_of_one_of_the_passes(images):
    passes = tuple((torch.full((40, 2), float(number)) + torch.arange(40)[:, None] / 100,) for number in range(3))
    features = Features(passes, torch.arange(40) % 4, torch.arange(40))
    epochs = []
    for number in (0, 1, 0):
        loader = FeatureLoader(features, OrderedSampler(range(40)), 7, CPU, seed=3)
        loader.set_epoch(number)
        rows, index = rows_of(loader)
        assert torch.equal(index, torch.arange(40))
        torch.testing.assert_close(rows[:, 0] % 1, torch.arange(40) / 100)
        epochs.append(rows[:, 0].int())
    assert {*epochs[0].tolist()} == {0, 1, 2}
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])
    rows, _ = rows_of(FeatureLoader(features, OrderedSampler(range(40)), 7, CPU))
    assert {*rows[:, 0].int().tolist()} == {0}, "an evaluation takes the first pass"


@pytest.mark.parametrize("count", [41, 40])
def test_rows_that_do_not_fit_are_gathered_from_their_files(monkeypatch, count):
    whole = torch.rand(count, 3)
    chunks = tuple(whole.split(9))
    features = Features((chunks, tuple((whole + 1).split(9))), torch.arange(count), torch.arange(count))
    results = []
    for fit in (True, False):
        monkeypatch.setattr(features_module, "fits", lambda needed, device, fit=fit: fit)
        sampler = OrderedSampler(range(count - 1, -1, -1))
        loader = FeatureLoader(features.to(CPU), sampler, 8, CPU, seed=0)
        assert (len(loader.features.passes[0]) == 1) == fit
        assert len(list(loader)) == len(loader)
        results.append(rows_of(loader)[0])
    assert torch.equal(*results)
    assert len(results[0]) == (40 if count == 41 else count), "a last batch of one is left out in training"


def test_broken_images_are_replaced_in_training_and_left_out_of_an_evaluation(images, monkeypatch):
    monkeypatch.setattr(features_module, "CHUNK", 4)
    own = recipe(images)
    split = open_data(own).train
    for place in (2, 7):
        with open(split.path(place), "wb") as file:
            file.write(b"broken")
    made = store(own)
    evaluated = made.eval_loader(split)
    rows, index = rows_of(evaluated)
    assert index.tolist() == [place for place in range(len(split)) if place not in (2, 7)]
    assert evaluated.broken_images() == [split.path(2), split.path(7)]
    trained = made.train_loader(split, OrderedSampler(range(len(split))))
    replaced, places = rows_of(trained)
    assert places.tolist() == [3 if place == 2 else 8 if place == 7 else place for place in range(len(split))]
    assert torch.equal(replaced[2], rows[2])
    assert trained.broken_images() == [split.path(2), split.path(7)]
    everything = Passes(open_data(own), own, SIZE, World(CPU), store=made)
    assert torch.equal(rows_of(everything.train)[0], replaced)
    for place in range(len(split)):
        with open(split.path(place), "wb") as file:
            file.write(b"broken too")
    with pytest.raises(DataError, match="none of the"):
        store(own).eval_loader(split)


def test_a_chunk_is_read_as_it_was_written(tmp_path):
    for dtype in (torch.float32, torch.float16):
        rows = Rows(torch.randn(7, 3).to(dtype), torch.arange(7))
        (tmp_path / "chunk").write_bytes(to_bytes(rows))
        found = load_chunk(tmp_path / "chunk")
        assert found is not None
        assert found.features.dtype == dtype
        assert torch.equal(found.features, rows.features)
        assert torch.equal(found.index, rows.index)
    for damage in (b"", b"\0" * 100, (tmp_path / "chunk").read_bytes()[:40]):
        (tmp_path / "chunk").write_bytes(damage)
        assert load_chunk(tmp_path / "chunk") is None


def test_features_that_are_not_finite_are_an_error(images):
    class Diverged(Backbone):
        def __call__(self, images):
            return super().__call__(images) / 0

    with pytest.raises(DataError, match="gives features that are not finite"):
        store(recipe(images), Diverged()).eval_loader(open_data(recipe(images)).train)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pretrained": False}, "the frozen backbone needs weights: expected pretrained: true"),
        ({"cutmix": 1.0}, "CutMix cannot cut features; use mixup"),
        ({"method": {"name": "dive", "teacher": "mbib_resnet32.cifar100_lt_if100"}}, "'dive' looks at images"),
        (
            {"method": "paco", "train_crop_mode": "rrc"},
            "'paco' looks at images, not at features alone; methods that train heads",
        ),
        ({"feature_passes": 0}, "expected at least 1"),
    ],
)
def test_what_cannot_be_on_features(images, keys, message):
    with pytest.raises(MbibError, match=message):
        recipe(images, **keys)


def test_heads_on_several_backbones_cannot(images, tmp_path):
    experts = dict(model="experts_resnet20", pretrained=False, method="sade")
    run = train(recipe(images, **experts, feature_passes=None, epochs=1), "on_images")
    with pytest.raises(MbibError, match="the heads of Experts do not stand on one backbone"):
        train(recipe(images, **experts, initial_checkpoint=str(run.folder)), "on_features")


def test_rows_are_those_that_numpy_takes():
    features = Features((tuple(torch.arange(30.0).view(10, 3).split(4)),), torch.zeros(10), torch.arange(10))
    order = torch.tensor([9, 0, 4, 4, 3])
    expected = np.arange(30.0).reshape(10, 3)[order.numpy()]
    assert np.array_equal(features.rows(order, torch.zeros(5, dtype=torch.int64), CPU).numpy(), expected)
