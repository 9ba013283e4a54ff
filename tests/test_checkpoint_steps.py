"""Checkpoints within an epoch: whatever gives the images, what goes on from one ends with the same bits."""

import copy
from math import cos, pi

import numpy as np
import pytest
import torch
from archive_images import tar_bytes
from crashes import CrashError, differing, epochs_of
from small_data import class_folders
from torch.optim.optimizer import register_optimizer_step_post_hook

from mbib_timm.data import images as images_module
from mbib_timm.errors import CheckpointError, MbibError
from mbib_timm.methods import METHODS, Method
from mbib_timm.recipe import Recipe, find_recipe, load_recipe
from mbib_timm.training import train
from mbib_timm.training.checkpoint import load_checkpoint, save_checkpoint

# 12 to 1 images of each digit, 47 in all: 6 batches an epoch, 5 of them whole; a dropout draws from torch's generator.
SHORT = dict(
    epochs=3, val_interval=3, warmup_epochs=1, imbalance_max=12, imbalance_factor=12, batch_size=8, device="cpu",
    workers=0, checkpoint_seconds=1e6, model_kwargs={"drop_rate": 0.2},
)  # fmt: skip
AUGMENTED = dict(train_crop_mode="rrc", color_jitter=0.4, cutout=4, loader="timm")
CMO = dict(method="bsce", cutmix=1.0, mixup_prob=0.6, cutmix_sampler="reverse")
FEATURES = dict(
    dataset="folder", loader="timm", img_size=32, train_crop_mode="none", hflip=0.0, pretrained=True,
    model="mbib_resnet32.cifar100_lt_if100", feature_passes=2, batch_size=3, mean=[0.5], std=[0.25], crop_pct=0.875,
    crop_mode="center", interpolation="bicubic", imbalance="none", model_kwargs={}, train="heads", method="mbib",
)  # fmt: skip
# Keys; of an epoch updates until a checkpoint, and until the crash, counted over the run.
RUNS = {
    "resident": (dict(model_ema=True, model_ema_decay=0.5, sched_on_updates=True, opt="adamw", lr=1e-3), 2, 10),
    "resident, in the first epoch": (dict(loader="resident", aa="cifar10", cutout=4), 4, 5),
    "accumulated gradients": (dict(grad_accum_steps=4, sched_on_updates=True, warmup_epochs=0), 3, 4),
    "timm": (AUGMENTED, 2, 9),
    "timm, two workers": (dict(AUGMENTED, workers=2), 2, 11),
    "foregrounds": (dict(CMO, loader="resident"), 5, 11),
    "foregrounds by timm": (dict(CMO, **AUGMENTED), 3, 10),
    "mixup by timm": (dict(AUGMENTED, method="bsce", mixup=0.3, cutmix=1.0, smoothing=0.1), 4, 9),
    "class-aware": (dict(AUGMENTED, sampler="class_aware:2"), 4, 9),
    "two views and a queue": (dict(method={"name": "paco", "queue": 32, "features": 8}, model_kwargs={}), 5, 11),
    "features": (FEATURES, 3, 10),
    "tar": (dict(AUGMENTED, dataset="folder", imbalance="none", batch_size=3), 3, 10),
    "shards": (dict(AUGMENTED, dataset="wds", imbalance="none", batch_size=3, workers=2), 3, 10),
}


def settings(tmp_path, name, **keys):
    own, every, _ = RUNS[name]
    keys = {**SHORT, **own, "checkpoint_steps": every, "output": str(tmp_path), **keys}
    if name == "features":
        keys.pop("warmup_epochs"), keys.pop("imbalance_factor"), keys.pop("imbalance_max")
        return Recipe(**keys, data_dir=str(class_folders(tmp_path)), image_cache=str(tmp_path / "cache"))
    if name in ("tar", "shards"):
        files = sorted(class_folders(tmp_path).glob("*/*.png"))
        if name == "tar":
            place = tmp_path / "images.tar"
            place.write_bytes(tar_bytes({f"{file.parent.name}/{file.name}": file.read_bytes() for file in files}))
        else:
            place = tmp_path / "shards"
            place.mkdir()
            for number in range(3):
                entries = {}
                for file in files[number::3]:
                    key, label = f"{file.parent.name}_{file.stem}", ["ant", "bee", "cat", "dog"].index(file.parent.name)
                    entries |= {f"{key}.png": file.read_bytes(), f"{key}.cls": str(label).encode()}
                (place / f"{number}.tar").write_bytes(tar_bytes(entries))
        keys |= {"data_dir": str(place)}
        keys.pop("imbalance_factor"), keys.pop("imbalance_max")
    return load_recipe(find_recipe("cifar_resnet20.ce_digits"), keys)


def trains(optimizer):
    """Whether this is a run's, and not one that tries what its kind takes."""
    return sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"]) > 4


def crash_at(update):
    """Let the optimizer's step of that number, from 1, end in a crash."""
    left = iter(range(update - 1, -1, -1))

    def crash(optimizer, *_):
        if trains(optimizer) and next(left) == 0:
            raise CrashError

    return register_optimizer_step_post_hook(crash)


def interrupted(recipe, update):
    hook = crash_at(update)
    try:
        with pytest.raises(CrashError):
            train(recipe, "broken")
    finally:
        hook.remove()


def test_a_run_that_stopped_within_an_epoch_has_the_epochs_that_it_had(tmp_path):
    """The rest of an epoch follows the schedule of its beginning."""
    name = next(iter(RUNS))
    recipe, (_, _, crash) = settings(tmp_path, name), RUNS[name]
    interrupted(recipe, crash)
    more = recipe.replace(resume="auto", epochs=recipe.epochs + 1)
    with pytest.raises(
        CheckpointError, match=f"was stopped within epoch .* continue with --epochs {recipe.epochs} until"
    ):
        train(more, "broken")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_within_an_epoch_to_the_same_bits(tmp_path, name):
    recipe, (_, _, crash) = settings(tmp_path, name), RUNS[name]
    whole = train(recipe, "whole")
    interrupted(recipe, crash)
    part = load_checkpoint(tmp_path / "broken" / "last.ckpt")["progress"]["part"]
    assert part["steps"] > 0
    assert part["steps"] % recipe.grad_accum_steps == 0
    resumed = train(recipe.replace(resume="auto"), "broken")
    assert not differing(whole.folder, resumed.folder)
    assert epochs_of(whole.folder) == epochs_of(resumed.folder)
    assert whole.record.result == resumed.record.result
    assert whole.record.best == resumed.record.best


def counted_steps(monkeypatch):
    """Let cross-entropy count its steps since the epoch began in a buffer of the checkpoint; return what each saw."""
    seen, kind = [], METHODS["ce"]

    def begin(self, *args):
        Method.__init__(self, *args)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("epoch", torch.full((), -1), persistent=False)

    def start(self, epoch):
        self.steps.zero_()
        self.epoch.fill_(epoch)

    def after(self):
        self.steps += 1
        seen.append((self.epoch.item(), self.steps.item()))

    for name, function in {"__init__": begin, "start_epoch": start, "after_step": after}.items():
        monkeypatch.setattr(kind, name, function, raising=False)
    return seen


@pytest.mark.slow
def test_an_epoch_starts_once_whatever_checkpoints_lie_in_it_and_where_a_run_goes_on(tmp_path, monkeypatch):
    seen = counted_steps(monkeypatch)
    recipe = settings(tmp_path, "resident, in the first epoch")
    train(recipe.replace(checkpoint_steps=None), "without")
    without = seen.copy()
    assert [step for epoch, step in without if epoch == 0] == list(range(1, len(without) // recipe.epochs + 1))
    seen.clear()
    train(recipe, "with")
    assert seen == without
    seen.clear()
    interrupted(recipe, RUNS["resident, in the first epoch"][2])
    broken = len(seen)
    train(recipe.replace(resume="auto"), "broken")
    assert seen[broken:] == without[without.index(seen[broken]) :]
    assert seen[broken][1] > 1


def test_a_run_that_goes_on_begins_as_it_did(tmp_path, monkeypatch):
    """First `begin`, of the network as it starts; then the epoch; then what the checkpoint holds."""
    called, kind = [], METHODS["ce"]

    def note(name):
        def noted(self, *args):
            weights = [parameter.detach().clone() for parameter in self.trainable_module.parameters()]
            looks_on = not self.trainable_module.training and not torch.is_grad_enabled()
            called.append((name, weights, looks_on, *(args if name == "start_epoch" else ())))

        return noted

    for name in ("begin", "start_epoch", "finish"):
        monkeypatch.setattr(kind, name, note(name))
    recipe = settings(tmp_path, "resident, in the first epoch")
    interrupted(recipe, RUNS["resident, in the first epoch"][2])
    assert [name for name, *_ in called] == ["begin", "start_epoch"]
    start = called[0][1]
    called.clear()
    train(recipe.replace(resume="auto"), "broken")
    assert [name for name, *_ in called] == ["begin", *["start_epoch"] * recipe.epochs, "finish"]
    assert all(torch.equal(one, other) for one, other in zip(called[0][1], start, strict=True))
    assert [epoch for name, _, _, *epoch in called if name == "start_epoch"] == [[0], [1], [2]]
    assert [looks_on for name, _, looks_on, *_ in called if name != "start_epoch"] == [True, True]


def mean_weight(self):
    return float(next(self.trainable_module.parameters()).detach().mean())


SET = {
    "number": (None, lambda self: mean_weight(self), True),
    "list": ([0.0], lambda self: [*self.kept, mean_weight(self)], True),
    "list, in place": ([0.0], lambda self: self.kept.append(mean_weight(self)) or self.kept, True),
    "tensor": (torch.zeros(()), lambda self: self.kept.clone(), True),
    "tensor, in place": (torch.zeros(()), lambda self: self.kept.fill_(mean_weight(self)), True),
    "array": (np.zeros(1), lambda self: np.full(1, mean_weight(self)), True),
    "a tensor without a version": (torch.inference_mode()(torch.zeros)(()), lambda self: self.kept, False),
    "the same": (0.5, lambda self: 0.5, False),
    "the epoch": (-1, lambda self: self.epoch, False),
    "a layer": (None, lambda self: torch.nn.Identity(), False),
}


@pytest.mark.parametrize("name", SET)
def test_what_a_checkpoint_within_an_epoch_would_lack_is_refused(tmp_path, monkeypatch, name):
    first, value, refused = SET[name]
    own = {"begin": lambda self, data: setattr(self, "kept", copy.deepcopy(first))}

    def start(self, epoch):
        self.epoch = epoch
        self.kept = value(self)

    for hook, function in (own | {"start_epoch": start}).items():
        monkeypatch.setattr(METHODS["ce"], hook, function)
    recipe = settings(tmp_path, "resident, in the first epoch", epochs=1, warmup_epochs=0, val_interval=1)
    if not refused:
        train(recipe, "run")
        return
    with pytest.raises(MbibError, match=r"method 'ce': start_epoch sets kept, which no checkpoint has, .* in a buffer"):
        train(recipe, "run")
    train(recipe.replace(checkpoint_steps=None), "without")


def test_a_run_that_has_its_last_epoch_behind_it_begins_too(tmp_path, monkeypatch):
    """What `begin` prepares `finish` may need."""
    called = []
    monkeypatch.setattr(METHODS["ce"], "begin", lambda self, data: called.append("begin"))

    def finish(self, data):
        called.append("finish")
        if len(called) == 2:
            raise MbibError("the machine goes down")

    monkeypatch.setattr(METHODS["ce"], "finish", finish)
    recipe = settings(tmp_path, "resident, in the first epoch")
    with pytest.raises(MbibError, match="goes down"):
        train(recipe, "broken")
    train(recipe.replace(resume="auto"), "broken")
    assert called == ["begin", "finish", "begin", "finish"]


@pytest.mark.slow
def test_checkpoints_change_no_draw_of_resident_images(tmp_path):
    recipe = settings(tmp_path, "resident, in the first epoch")
    runs = train(recipe, "with"), train(recipe.replace(checkpoint_steps=None), "without")
    assert not differing(*(run.folder for run in runs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm", "tar", "shards"])
def test_images_that_are_done_are_not_read_again(tmp_path, monkeypatch, name):
    recipe = settings(tmp_path, name, epochs=1, warmup_epochs=0, val_interval=1, workers=0)
    interrupted(recipe, RUNS[name][1] + 1)
    read = []
    convert = images_module.convert_image
    monkeypatch.setattr(images_module, "convert_image", lambda *args: (read.append(1), convert(*args))[1])
    run = train(recipe.replace(resume="auto"), "broken")
    images, evaluated = sum(run.record.class_counts), run.record.result.prediction.images
    assert len(read) == images - RUNS[name][1] * recipe.batch_size + evaluated


@pytest.mark.slow
def test_what_cannot_go_on_within_an_epoch_says_so(tmp_path):
    recipe = settings(tmp_path, "timm")
    interrupted(recipe, 9)
    with pytest.raises(CheckpointError, match=r"checkpoint_steps \('given' there, None asked for\)"):
        train(recipe.replace(resume="auto", checkpoint_steps=None), "broken")
    with pytest.raises(CheckpointError, match="has begun 2 epochs, more than the 1 asked for: expected at least 2"):
        train(recipe.replace(resume="auto", epochs=1, warmup_epochs=0), "broken")
    checkpoint = tmp_path / "broken" / "last.ckpt"
    state = load_checkpoint(checkpoint)
    save_checkpoint(checkpoint.parent, {**state, "generators": state["generators"] * 2})
    with pytest.raises(CheckpointError, match="was written within an epoch, by 2 processes: expected as many, got 1"):
        train(recipe.replace(resume="auto"), "broken")
    assert train(recipe.replace(resume=str(checkpoint.with_name("previous.ckpt")), checkpoint_steps=5), "broken")


def test_rates_by_update_are_those_of_timm(tmp_path):
    """After every update that of timm's schedule at its number; by epoch it stays within one."""
    seen = []

    def note(optimizer, *_):
        if trains(optimizer):
            seen.append(optimizer.param_groups[0]["lr"])

    hook = register_optimizer_step_post_hook(note)
    keys = dict(epochs=2, val_interval=2, lr=0.1, warmup_epochs=1, warmup_lr=0.01, min_lr=0.0, sched="cosine")
    try:
        run = train(settings(tmp_path, "resident", **keys, opt="sgd"), "rates")
    finally:
        hook.remove()
    warm = [0.01 + n * (0.1 - 0.01) / 6 for n in range(6)]
    assert seen == pytest.approx(warm + [0.05 * (1 + cos(pi * n / 12)) for n in range(6, 12)], rel=1e-6)
    assert [float(row["lr"]) for row in epochs_of(run.folder)] == pytest.approx([seen[0], seen[6]], rel=1e-6)
