"""The contract of a method, over all that are registered and one of a file outside the package.

Methods of one's own pass it too: ``pytest tests/test_methods.py --plugin my_method.py``. What only this package's
methods can be held to, such as their equations, is tested of these alone.
"""

import copy
import dataclasses
import inspect
import io
import json
import math
import subprocess
import sys
import typing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from emulated_graphs import waits
from naive import (
    listing_of_figure_10,
    naive_adjusted_cross_entropy,
    naive_bib,
    naive_bsc,
    naive_focal,
    naive_plain,
    naive_vsd,
    naive_weights,
)
from safetensors.torch import load_file
from tiny import EXPERTS, MBIB_EXPERTS, OBSERVATIONS, Tiny, batches, previous_run
from torch import nn
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mbib_timm.data.batch import Batch
from mbib_timm.errors import MbibError
from mbib_timm.methods import METHODS, Facts, Method, part_of, register, resolve_method
from mbib_timm.methods.functional import adjusted_cross_entropy, self_distillation
from mbib_timm.methods.mbib import Bottleneck, Edge
from mbib_timm.methods.tau_norm import CANDIDATES
from mbib_timm.methods.teacher import Taught
from mbib_timm.options import build_options, default_of, option_types
from mbib_timm.progress import Progress
from mbib_timm.recipe import Recipe, load_recipe
from mbib_timm.recipe.plugins import load_plugin
from mbib_timm.results.record import read_history
from mbib_timm.training import train
from mbib_timm.training.checkpoint import load_checkpoint
from mbib_timm.training.epoch import LossLog, train_one_epoch
from mbib_timm.training.optimization import Precision, create_optimizer
from mbib_timm.training.run_folder import RunFolder
from mbib_timm.training.setup import build_network
from mbib_timm.training.step import create_step, loss_parts

TOY = Path(__file__).parent / "toy_method.py"
load_plugin(str(TOY))

ALL = list(METHODS)
TRAINED = [name for name in ALL if not METHODS[name].post_hoc]
OF_OBSERVATIONS = [name for name in TRAINED if issubclass(METHODS[name], Bottleneck)]
# This package's and the toy; those that train have their equations written out below.
OURS = [name for name in ALL if METHODS[name].__module__.startswith("mbib_timm.methods.") or name == "toy"]
# Of these the loss is a function of the student's logits and the labels alone; others have a test file of their own.
KNOWN = [name for name in TRAINED if name in OURS and METHODS[name].forward is Method.forward]
OF_EXPERTS = {"sade": EXPERTS, "sade_mbib": MBIB_EXPERTS}
OF_ANY_NETWORK = [name for name in KNOWN if name not in (*OF_OBSERVATIONS, *OF_EXPERTS)]

CPU = torch.device("cpu")
COUNTS = [500, 120, 40, 9, 3]
EPOCHS = 10
FEW = [500, 50, 5]
LOGITS = torch.tensor([[2, 1, -1], [1, 0, 0.5]], dtype=torch.float64)
COSINES = torch.tensor([[0.2, 0.1, -0.1], [0, 0.1, 0.3]], dtype=torch.float64)
TARGETS = torch.tensor([2, 0])


def heads_of(name):
    """The heads of the networks that a method is for."""
    if name in OF_EXPERTS:
        return OF_EXPERTS[name]
    if name not in OF_OBSERVATIONS:
        return ("logits",)
    return ("v1", "z") if name == "bib" else OBSERVATIONS


# Where a default does not fit a handful of images.
SMALL = {"paco": {"queue": 20}}


def make(name, heads=None, counts=COUNTS, epochs=EPOCHS, seed=0, **settings):
    """Build a method around a network of its own, as a run does."""
    kind = METHODS[name] if isinstance(name, str) else name
    built = build_options(kind.Settings, {**SMALL.get(kind.name, {}), **settings}, f"method {kind.name!r}")
    torch.manual_seed(seed)
    heads = heads_of(name) if heads is None else heads
    network = kind.build_network(built, lambda **kwargs: Tiny(len(counts), heads, **kwargs))
    return kind(network, built, Facts(np.array(counts), epochs, previous_run(len(counts))), CPU)


def optimizer_of(method, part=None, frozen_bn=None, **keys):
    method.freeze_all_but(part or method.part, frozen_bn or method.frozen_bn)
    return create_optimizer(Recipe(method="ce", model="resnet18", opt="momentum", lr=0.05, **keys), method)


def batches_for(name, *args, **kwargs):
    """Batches with as many views and streams as a method asks for."""
    kind = METHODS[name]
    return batches(*args, **kwargs, views=len(kind.views), streams=1 + kind.sampler.count("+"))


def random_logits(heads=OBSERVATIONS, batch=6, classes=5, scale=2.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = {h: scale * torch.randn(batch, classes, generator=generator, dtype=dtype) for h in heads}
    return logits, torch.randint(0, classes, (batch,), generator=generator)


def loss_of(name, logits, targets, **keys):
    return make(name, tuple(logits), **keys).double().loss(logits, targets)["loss"]


# What each method's loss is, written out


def over_heads(each):
    """The mean over the heads."""

    def mean(method, logits, targets, epoch):
        return sum(each(method, values, targets, epoch) for values in logits.values()) / len(logits)

    return mean


def counts_of(method):
    return method.facts.class_counts.tolist()


def cross_entropy(method, logits, targets, epoch):
    return naive_adjusted_cross_entropy(logits, targets)


def balanced_softmax(method, logits, targets, epoch):
    return naive_adjusted_cross_entropy(logits, targets, offset=[math.log(n) for n in counts_of(method)])


def focal(method, logits, targets, epoch):
    return naive_focal(logits, targets, method.settings.gamma)


def ldam_drw(method, logits, targets, epoch):
    counts, settings = counts_of(method), method.settings
    largest = max(n**-0.25 for n in counts)
    margin = [settings.scale * settings.max_margin * n**-0.25 / largest for n in counts]
    weight = [1.0] * len(counts)
    if epoch + 1 > settings.reweight_from * method.facts.epochs:
        raw = [(1 - settings.effective_beta) / (1 - settings.effective_beta**n) for n in counts]
        weight = [len(counts) * w / sum(raw) for w in raw]
    return naive_adjusted_cross_entropy(logits, targets, margin=margin, weight=weight)


def toy(method, logits, targets, epoch):
    share = method.settings.strength * (epoch + 1) / method.facts.epochs
    offset = [share * math.log(n) for n in counts_of(method)]
    return naive_adjusted_cross_entropy(method.scale.item() * logits, targets, offset=offset)


STRUCTURES = {
    "bib": {("v3", "z"): 1},
    "mbib": {("v1", "z"): 0.1, ("v2", "z"): 0.3, ("v3", "z"): 1},
    "se_mbib": {("v1", "v2"): 1, ("v2", "v3"): 1, ("v3", "z"): 1},
    "all_mbib": {("v1", "z"): 0.1, ("v2", "z"): 0.3, ("v3", "z"): 1, ("v1", "v2"): 1, ("v2", "v3"): 1},
}


def bottleneck(method, logits, targets, epoch):
    edges = STRUCTURES[method.name] if len(logits) > 2 else {tuple(logits): 1}
    settings, counts = method.settings, counts_of(method)
    constants = settings.beta, settings.gamma, settings.class_weight_power
    return sum(w * naive_bib(logits[t], logits[s], targets, counts, *constants) for (t, s), w in edges.items())


def naive_offsets(counts, tau):
    """0, log pi and log pi - tau log pi_rev, where the r-th rarest class has the r-th largest count in pi_rev."""
    rarest_first = sorted(range(len(counts)), key=lambda i: counts[i])
    reverse = dict(zip(rarest_first, (counts[i] for i in reversed(rarest_first)), strict=True))
    second = [math.log(n / sum(counts)) for n in counts]
    third = [value - tau * math.log(reverse[i] / sum(counts)) for i, value in enumerate(second)]
    return [0.0] * len(counts), second, third


def sade(method, logits, targets, epoch):
    offsets = naive_offsets(counts_of(method), method.settings.tau)
    return sum(
        naive_adjusted_cross_entropy(logits[expert], targets, offset=offset)
        for expert, offset in zip(EXPERTS, offsets, strict=True)
    )


def sade_mbib(method, logits, targets, epoch):
    """Every expert's MBIB, with its offset in the place of log n: n_i exp(t_i) is exp(offset_i) exp(t_i)."""
    settings, counts, total = method.settings, counts_of(method), 0.0
    weights = naive_weights(counts, settings.class_weight_power)
    for expert, offset in zip(EXPERTS, naive_offsets(counts, settings.tau), strict=True):
        z = logits[f"{expert}_z"]
        for v, weight in zip(OBSERVATIONS, settings.observation_weights, strict=False):
            t = logits[f"{expert}_{v}"]
            both = [naive_adjusted_cross_entropy(x, targets, offset=offset, weight=weights) for x in (t, z)]
            total += weight * (sum(both) + settings.beta * naive_vsd(t, z, counts, settings.gamma))
    return total


REFERENCES = {
    "ce": over_heads(cross_entropy),
    "crt": over_heads(cross_entropy),
    "bsce": over_heads(balanced_softmax),
    "focal": over_heads(focal),
    "ldam_drw": over_heads(ldam_drw),
    "toy": over_heads(toy),
    **dict.fromkeys(STRUCTURES, bottleneck),
    "sade": sade,
    "sade_mbib": sade_mbib,
}
OTHER_SETTINGS = {
    "focal": {"gamma": 0.7},
    "ldam_drw": {"max_margin": 0.3, "scale": 7.0, "reweight_from": 0.5, "effective_beta": 0.99},
    "toy": {"strength": 0.5},
    **{name: {"beta": 2.0, "gamma": 0.5, "class_weight_power": 0.7} for name in STRUCTURES},
    "sade": {"tau": 0.7},
    "sade_mbib": {"beta": 2.0, "gamma": 0.5, "tau": 1.0, "observation_weights": [0.2, 0.5, 0.9]},
}


@pytest.mark.parametrize("epoch", [0, 4, 5, EPOCHS - 1])
@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("name", KNOWN)
def test_the_loss_is_its_equation_written_out(name, changed, epoch):
    assert name in REFERENCES, f"method {name!r} needs its equation written out in REFERENCES"
    method = make(name, **(OTHER_SETTINGS.get(name, {}) if changed else {})).double()
    method.start_epoch(epoch)
    logits, targets = random_logits(heads_of(name), batch=9)
    parts = method.loss(logits, targets)
    assert next(iter(parts)) == "loss"
    assert all(value.shape == () for value in parts.values())
    assert parts["loss"].item() == pytest.approx(REFERENCES[name](method, logits, targets, epoch), rel=1e-6)


@pytest.mark.parametrize("epoch", [0, EPOCHS - 1])
@pytest.mark.parametrize(
    "name", [name for name in TRAINED if METHODS[name].soft_targets and METHODS[name].forward is Method.forward]
)
def test_soft_targets_of_quarters_count_as_four_images_with_a_label_each(name, epoch):
    """Whatever the method: of four copies of each image, as many have a label as the target has quarters of it."""
    method = make(name).double()
    method.start_epoch(epoch)
    logits, _ = random_logits(heads_of(name), batch=6)
    labels = torch.randint(5, (6, 4), generator=torch.Generator().manual_seed(1))
    labels[0], labels[1] = 3, torch.tensor([0, 0, 0, 4])  # one class; two of them
    soft = F.one_hot(labels, 5).double().mean(dim=1)
    copies = {head: values.repeat_interleave(4, dim=0) for head, values in logits.items()}
    found = []
    for values, targets in ((copies, labels.flatten()), (logits, soft), (logits, soft.float())):
        free = {head: each.clone().requires_grad_() for head, each in values.items()}
        parts = method.loss(free, targets)
        gradients = torch.autograd.grad(parts["loss"], list(free.values()))
        gradients = [each.unflatten(0, (6, -1)).sum(dim=1) for each in gradients]
        found.append((parts, gradients))
    for parts, gradients in found[1:]:
        assert parts.keys() == found[0][0].keys()
        torch.testing.assert_close(list(parts.values()), list(found[0][0].values()), rtol=1e-9, atol=0)
        torch.testing.assert_close(gradients, found[0][1], rtol=1e-9, atol=1e-12)


def test_all_of_this_packages_methods_that_train_take_soft_targets():
    assert [name for name in KNOWN if not METHODS[name].soft_targets] == ["toy"]


@pytest.mark.parametrize("name", OF_ANY_NETWORK)
def test_on_several_heads_the_loss_is_the_mean_over_them(name):
    method = make(name, OBSERVATIONS).double()
    method.start_epoch(EPOCHS - 1)
    logits, targets = random_logits()
    parts = method.loss(logits, targets)
    assert parts["loss"].item() == pytest.approx(REFERENCES[name](method, logits, targets, EPOCHS - 1), rel=1e-6)
    each = {head: REFERENCES[name](method, {head: values}, targets, EPOCHS - 1) for head, values in logits.items()}
    assert {head: parts[f"loss_{head}"].item() for head in logits} == pytest.approx(each, rel=1e-6)


@pytest.mark.parametrize("name", KNOWN)
def test_a_step_computes_the_loss_of_the_networks_logits(name):
    method = make(name)
    method.train()
    ((batch,),) = batches((8,))
    logits = method.logits(batch.images)
    assert tuple(logits) == heads_of(name)
    expected = method.loss(logits, batch.targets)
    found = method(batch)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


# Gradients: where they should be, and nowhere else


@pytest.mark.parametrize(("part", "frozen_bn"), [(None, None), ("classifier", "eval"), ("all", None)])
@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_finite_where_something_trains_and_nowhere_else(name, part, frozen_bn):
    method = make(name)
    optimizer = optimizer_of(method, part, frozen_bn)
    method.train()
    method.start_epoch(0)
    (streams,) = batches_for(name, (8,))
    method(*streams)["loss"].backward()
    trained = dict(method.trainable_parameters())
    network = method.trainable_module
    wanted = part_of(network, part or method.part) & {name for name, _ in network.named_parameters()}
    own = {name for name, parameter in method.own_parameters() if parameter.requires_grad}
    assert trained.keys() == wanted | own
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trained.values())
    for key, parameter in trained.items():
        assert parameter.grad is not None, f"{key} gets no gradient"
        assert parameter.grad.isfinite().all()
    assert any(parameter.grad.any() for parameter in trained.values())
    frozen = [p for p in method.parameters() if id(p) not in held]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def offsets_by_head(method):
    """Of every head with a weight, one for all or one for each."""
    return method.logit_offsets.expand(len(method.head_weights), 1, -1)[:, 0]


@pytest.mark.parametrize("name", KNOWN)
def test_gradients_agree_with_finite_differences(name):
    method = make(name, gamma=0.5) if name in OF_OBSERVATIONS else make(name)
    method = method.double()
    method.start_epoch(EPOCHS - 1)
    logits, targets = random_logits(heads_of(name), batch=3)
    heads = [values.requires_grad_() for values in logits.values()]
    # The teachers are constants: what a finite difference would move in them must not count.
    frozen = {head: values.detach().clone() for head, values in logits.items()}

    def student_only(*values):
        given = dict(zip(logits, values, strict=True))
        if name not in OF_OBSERVATIONS:
            return method.loss(given, targets)["loss"]
        total = sum(
            weight * adjusted_cross_entropy(given[head], targets, offset=offset, weight=method.class_weights)
            for (head, weight), offset in zip(method.head_weights.items(), offsets_by_head(method), strict=True)
        )
        return total + method.settings.beta * sum(
            edge.weight * self_distillation(frozen[edge.teacher], given[edge.student], method.temperatures)
            for edge in method.edges
        )

    assert torch.autograd.gradcheck(student_only, heads, eps=1e-6, atol=1e-6)
    used = torch.autograd.grad(method.loss(logits, targets)["loss"], heads, allow_unused=True)
    expected = torch.autograd.grad(student_only(*heads), heads, allow_unused=True)
    torch.testing.assert_close(used, expected)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite(name, dtype):
    settings = {"gamma": 0.5} if "gamma" in option_types(METHODS[name].Settings) else {}
    logits, targets = random_logits(heads_of(name), batch=4, scale=1.0, dtype=torch.float32)
    logits = {head: (1e4 * values.sign()).to(dtype).requires_grad_() for head, values in logits.items()}
    parts = make(name, **settings).loss(logits, targets)
    assert all(value.isfinite() for value in parts.values())
    parts["loss"].backward()
    assert all(values.grad is None or values.grad.isfinite().all() for values in logits.values())


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "toy"])  # whose product autocast may round
def test_float32_inside_autocast(name):
    logits, targets = random_logits(heads_of(name), dtype=torch.float32)
    method = make(name)
    outside = method.loss(logits, targets)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = method.loss(logits, targets)["loss"]
        half = method.loss({head: values.bfloat16() for head, values in logits.items()}, targets)["loss"]
    assert inside.dtype == half.dtype == torch.float32
    assert torch.equal(inside, outside)
    rounded = {head: values.bfloat16().float() for head, values in logits.items()}
    assert torch.equal(half, method.loss(rounded, targets)["loss"])


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_in_half_precision_is_finite(name):
    method = make(name)
    optimizer_of(method)
    method.train()
    method.start_epoch(EPOCHS - 1)
    (streams,) = batches_for(name, (8,))
    parts = loss_parts(method, streams, torch.bfloat16)
    parts["loss"].backward()
    assert all(value.isfinite() for value in parts.values())
    assert all(each.grad is None or each.grad.isfinite().all() for each in method.parameters())


# A run's epochs


def run_epochs(method, optimizer, epochs, **keys):
    """Train as a run does, on three batches an epoch, the last one short; returns the losses."""
    recipe = Recipe(method="ce", model="resnet18", log_interval=1000, **keys)
    step = create_step(recipe, method, optimizer, Precision(None, None))
    losses = []
    for epoch in epochs:
        torch.manual_seed(epoch)
        method.start_epoch(epoch)
        loader, progress = batches_for(method.name, seed=epoch), Progress(3, visible=False)
        log = LossLog(epoch, method.name)
        losses.append(train_one_epoch(method, loader, step, recipe, log, progress, lambda steps: method.update_ema()))
    return losses


def through_a_file(state):
    content = io.BytesIO()
    torch.save(state, content)
    content.seek(0)
    return torch.load(content, weights_only=True)


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("name", TRAINED)
def test_a_method_resumes_with_its_state(name, ema):
    def start(seed):
        method = make(name, epochs=4, seed=seed)
        optimizer = optimizer_of(method)
        if ema:
            method.setup_ema(decay=0.5)
        return method, optimizer

    whole, optimizer = start(0)
    expected = run_epochs(whole, optimizer, range(4))
    broken, optimizer = start(0)
    run_epochs(broken, optimizer, range(2))
    state = {**broken.get_checkpoint_state(), "optimizer": optimizer.state_dict()}
    state |= broken.get_checkpoint_state(ema=True) if ema else {}
    state = through_a_file(state)
    resumed, optimizer = start(1)
    resumed.load_checkpoint_state(state["state_dict"], state.get("task_state"))
    if ema:
        resumed.load_checkpoint_state(state["state_dict_ema"], state.get("task_state_ema"), ema=True)
    optimizer.load_state_dict(state["optimizer"])
    assert run_epochs(resumed, optimizer, range(2, 4)) == expected[2:]
    first, second = whole.state_dict(), resumed.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), resumed.buffers(), strict=True))


class StoppedError(Exception):
    """Stands for a crash."""


def require_the_same_bits(name, folder, monkeypatch):
    """Of a run that was never interrupted, of one that went on within its second epoch, and of that one once more."""
    kind = METHODS[name]
    keys = dict(base="digits", model="cifar_resnet20", method=name, epochs=2, val_interval=2, warmup_epochs=0,
                imbalance_max=12, imbalance_factor=12, batch_size=16, checkpoint_steps=2, checkpoint_seconds=1e6,
                plugin=[str(TOY)], device="cpu", workers=0, output=str(folder))  # fmt: skip
    file = folder / "own.yaml"
    file.write_text(yaml.safe_dump(keys))
    recipe = load_recipe(file)
    runs = [train(recipe, "whole")]
    after_step, left = kind.after_step, iter(range(4, -1, -1))

    def stop(self):
        after_step(self)
        if next(left) == 0:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(kind, "after_step", stop)
        with pytest.raises(StoppedError):
            train(recipe, "broken")
    progress = load_checkpoint(folder / "broken" / "last.ckpt")["progress"]
    assert (progress["epoch"], progress["part"]["steps"]) == (1, 1)
    runs += [train(recipe.replace(resume="auto"), "broken") for _ in range(2)]
    first, *others = [load_file(run.folder / "model.safetensors") for run in runs]
    for weights, run in zip(others, runs[1:], strict=True):
        assert weights.keys() == first.keys()
        assert [key for key in first if not torch.equal(weights[key], first[key])] == []
        assert run.record.result == runs[0].record.result
        assert read_history(run.folder)[-1].losses == read_history(runs[0].folder)[-1].losses


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in TRAINED if name == "toy" or (name not in OURS and not METHODS[name].needs_start)]
)
def test_a_run_of_a_method_goes_on_within_an_epoch_to_the_same_bits(tmp_path, monkeypatch, name):
    """This package's are trained so in tests of their own."""
    require_the_same_bits(name, tmp_path, monkeypatch)


def test_a_run_goes_on_with_what_the_start_of_an_epoch_and_the_end_draw_and_read(tmp_path, monkeypatch):
    class Drawn(Method):
        title = "Drawn"

        def __init__(self, *args):
            super().__init__(*args)
            for buffer in ("noise", "lengths"):
                self.register_buffer(buffer, torch.zeros(len(self.facts.class_counts)), persistent=False)

        def start_epoch(self, epoch):
            self.noise.copy_(torch.randn(len(self.noise)))
            self.lengths.copy_(self.result_model().get_classifier().weight.detach().norm(dim=1))

        def head_loss(self, logits, targets):
            return F.cross_entropy(logits + self.noise + self.lengths, targets)

        def finish(self, data):
            bias = self.result_model().get_classifier().bias
            bias += self.lengths * torch.randn(len(bias))

    register("drawn")(Drawn)
    try:
        require_the_same_bits("drawn", tmp_path, monkeypatch)
    finally:
        METHODS.remove("drawn")


def test_the_toys_state_is_kept_and_state_of_other_keys_is_refused():
    method = make("toy")
    optimizer = optimizer_of(method)
    run_epochs(method, optimizer, range(2))
    state = through_a_file(method.get_checkpoint_state())
    assert state["task_state"]["method"].keys() == {"offset", "updates", "scale"}
    assert state["task_state"]["method"]["updates"].item() == 6  # a hook after every step
    assert not any("scale" in key or "offset" in key for key in state["state_dict"])
    other = make("toy", seed=1)
    for wrong in (None, {"network": {}, "method": {"offset": torch.zeros(5)}}):
        with pytest.raises(RuntimeError, match=r"the state of method 'toy' has other keys: .*scale"):
            other.load_checkpoint_state(state["state_dict"], wrong)


@pytest.mark.parametrize("name", [*OF_OBSERVATIONS, "ce", "bsce", "ldam_drw", "focal", "sade"])
def test_constants_that_settings_give_stay_out_of_the_state(name):
    method = make(name)
    assert not {key for key in method.state_dict() if not key.startswith("trainable_module.")}
    assert not method.get_task_state()


@pytest.mark.parametrize("name", TRAINED)
def test_buffers_and_weights_are_written_in_place(name):
    """A captured step goes on reading the memory that it was captured with."""
    method = make(name)
    optimizer = optimizer_of(method)
    held = dict((*method.named_buffers(), *method.named_parameters()))
    places = {key: value.data_ptr() for key, value in held.items()}
    run_epochs(method, optimizer, (0, EPOCHS - 1))
    after = dict((*method.named_buffers(), *method.named_parameters()))
    assert after.keys() == held.keys()
    assert all(after[key] is held[key] for key in held)
    assert {key: value.data_ptr() for key, value in after.items()} == places


class OneHotOutOfSight(TorchFunctionMode):
    """Hides `one_hot` of a given number of classes from other modes: on the CPU it reads the labels, on CUDA not."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = kwargs or {}
        if function is F.one_hot and given.get("num_classes", args[1] if len(args) > 1 else -1) >= 0:
            with _disable_current_modes():
                return function(*args, **given)
        return function(*args, **given)


class NoWaiting(TorchDispatchMode):
    """Raises on what makes the host wait for the device: a number read from it, or a shape that depends on values."""

    def __init__(self):
        super().__init__()
        self.hiding = OneHotOutOfSight()

    def __enter__(self):
        self.hiding.__enter__()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self.hiding.__exit__(*raised)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if waits(function, args):
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


def test_waiting_is_noticed():
    x = torch.arange(4.0)
    waiting = (x[0].item, lambda: x[x > 1], lambda: bool(x[1] > 0), lambda: x.nonzero(), lambda: float(x.sum()),
               lambda: F.one_hot(x.long()), lambda: F.one_hot(x.long(), num_classes=-1))  # fmt: skip
    for wait in waiting:
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
            wait()


def test_one_hot_of_a_given_number_of_classes_does_not_wait():
    """However it was imported, and what comes after it is seen again."""
    from torch.nn.functional import one_hot

    with NoWaiting():
        encoded = [one_hot(TARGETS, 3), F.one_hot(TARGETS, num_classes=3)]
        with pytest.raises(AssertionError, match="waits for the device"):
            encoded[0][0, 0].item()
    assert all(each.tolist() == [[0, 0, 1], [1, 0, 0]] for each in encoded)


@pytest.mark.parametrize("name", TRAINED)
def test_nothing_waits_for_the_device_inside_an_epoch(name):
    method = make(name)
    optimizer = optimizer_of(method)
    method.setup_ema(decay=0.5)
    with NoWaiting():
        run_epochs(method, optimizer, range(2), clip_grad=1.0)


# Compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),
    # Whether there are breaks, and whether buffers are read anew, the quick back end tells as well.
    [*((name, "aot_eager") for name in TRAINED), *((name, "inductor") for name in ("mbib", "ldam_drw", "toy"))],
)
def test_a_step_compiles_as_one_graph_that_follows_the_epochs(name, backend):
    """Buffers that an epoch's start and the hook after a step write take effect without compiling anew."""
    torch._dynamo.reset()
    compiled = torch.compile(loss_parts, fullgraph=True, dynamic=False, backend=backend)
    results = []
    for compute in (loss_parts, compiled):
        method = make(name)
        optimizer = optimizer_of(method)
        method.train()
        losses = []
        for epoch in (0, EPOCHS - 1):
            method.start_epoch(epoch)
            for streams in batches_for(name, (8, 8), seed=epoch):
                before = counters["stats"]["unique_graphs"]
                parts = compute(method, streams, None)
                compiles = counters["stats"]["unique_graphs"] - before
                assert compiles == (compute is compiled and not losses), "one graph, compiled once"
                parts["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    method.after_step()
                losses.append({key: value.item() for key, value in parts.items()})
        results.append(losses)
    for eager, compiled_losses in zip(*results, strict=True):
        assert compiled_losses == pytest.approx(eager, rel=1e-5)
    if name in ("ldam_drw", "toy"):  # what an epoch's start writes does change the loss
        method = make(name)
        ((batch,),) = batches((8,))
        losses = []
        for epoch in (0, EPOCHS - 1):
            method.start_epoch(epoch)
            losses.append(method(batch)["loss"].item())
        assert losses[0] != losses[1]


# What a method says of itself


@pytest.mark.parametrize("name", ALL)
def test_a_method_says_what_it_is(name):
    kind = METHODS[name]
    assert kind.name == name
    assert kind.title
    assert kind.title not in {METHODS[other].title for other in ALL if other != name}
    assert kind.citation or name == "ce" or name not in OURS, "of its paper"
    assert inspect.getdoc(kind)
    assert kind.__doc__ or name not in OURS, "of its own, not its parent's"
    assert sys.modules[kind.__module__].__doc__ or name not in OURS
    assert make(name).logit_prior in ("train", "uniform", None)
    assert kind.part in ("all", "classifier")
    assert kind.frozen_bn in (None, "train", "eval")


@pytest.mark.parametrize("name", ALL)
def test_settings_are_typed_documented_and_ranged(name):
    declared = METHODS[name].Settings
    assert dataclasses.is_dataclass(declared)
    assert declared.__dataclass_params__.frozen
    made_up = f"{declared.__name__}("  # by dataclass, where there is no docstring
    assert not declared.__doc__.startswith(made_up) or name not in OURS
    types = option_types(declared)
    for item in dataclasses.fields(declared):
        assert item.metadata["help"], f"{item.name} has no help"
        expected = types[item.name]
        plain = {t for t in (expected, *typing.get_args(expected)) if t in (int, float, str)}
        limits = [item.metadata[key] for key in ("minimum", "above", "maximum", "below")]
        if plain & {int, float}:
            assert any(limit is not None for limit in limits), f"{item.name} has no range"
        if str in plain:
            assert item.metadata["choices"] or item.metadata.get("place"), f"{item.name} says nothing of what it may be"
        build_options(declared, {item.name: default_of(item)}, name)  # the default is one of the values accepted


@pytest.mark.parametrize("name", ALL)
def test_settings_that_cannot_be_are_refused_by_name(name):
    declared = METHODS[name].Settings
    with pytest.raises(
        MbibError, match=rf"unknown setting .*'no_such_thing'|'no_such_thing': method '{name}' has none"
    ):
        resolve_method({"name": name, "no_such_thing": 1})
    for item in dataclasses.fields(declared):
        expected = option_types(declared)[item.name]
        numbers = {float, int} & {expected, *typing.get_args(expected)}
        wrong = ["text"] if numbers or expected is bool else [3]
        limits = item.metadata
        if numbers:
            wrong += [limits["minimum"] - 1] if limits["minimum"] is not None else []
            wrong += [limits["above"]] if limits["above"] is not None else []
            wrong += [limits["maximum"] + 1] if limits["maximum"] is not None else []
            wrong += [limits["below"]] if limits["below"] is not None else []
            wrong += [math.nan, math.inf]
        for value in wrong:
            given = [value] if typing.get_origin(expected) is list else value
            with pytest.raises(MbibError, match=rf"setting '{item.name}' of method '{name}'"):
                resolve_method({"name": name, item.name: given})


def test_a_setting_that_is_almost_right_is_named():
    with pytest.raises(MbibError, match="unknown setting of method 'mbib': 'betta': did you mean 'beta'"):
        resolve_method({"name": "mbib", "betta": 1})
    with pytest.raises(MbibError, match="unknown method 'mbibb': did you mean"):
        resolve_method({"name": "mbibb"})
    with pytest.raises(MbibError, match="'sequential_weights' of method 'se_mbib' 'observations': did you mean"):
        resolve_method({"name": "se_mbib", "sequential_weights": "observations"})
    with pytest.raises(MbibError, match="'effective_beta' of method 'ldam_drw': expected less than 1, got 1"):
        resolve_method({"name": "ldam_drw", "effective_beta": 1})  # 0/0


@pytest.mark.parametrize("name", ["bsce", "ldam_drw", "toy", "sade", *OF_OBSERVATIONS])
def test_a_class_without_training_images_is_refused(name):
    with pytest.raises(MbibError, match=r"classes without: \[1\]"):
        make(name, counts=[5, 0, 3])


def test_invariance_to_a_constant_in_the_logits_and_to_the_order_of_the_classes():
    order = torch.tensor([3, 0, 4, 1, 2])
    for name in KNOWN:
        logits, targets = random_logits(heads_of(name))
        loss = loss_of(name, logits, targets)
        shifted = {head: values + 7 for head, values in logits.items()}
        torch.testing.assert_close(loss_of(name, shifted, targets), loss)
        permuted = {head: values[:, order] for head, values in logits.items()}
        moved = torch.tensor([order.tolist().index(y) for y in targets.tolist()])
        counts = [COUNTS[i] for i in order]
        torch.testing.assert_close(loss_of(name, permuted, moved, counts=counts), loss)


# LDAM-DRW


def test_ldam_on_three_classes_before_and_after_the_weights_set_in():
    method = make("ldam_drw", counts=FEW, epochs=200).double()
    method.start_epoch(0)
    logits = 30 * COSINES
    each = [method.head_loss(logits[i : i + 1], TARGETS[i : i + 1]).item() for i in range(2)]
    assert each == pytest.approx([24.048587, 13.745893], abs=1e-5)
    assert method.head_loss(logits, TARGETS).item() == pytest.approx(18.897240, abs=1e-5)
    never = make("ldam_drw", counts=FEW, epochs=200, reweight_from=1.0).double()
    for epoch in (0, 100, 159):  # the 160th epoch, counted from 1, is the last without weights
        for one in (method, never):
            one.start_epoch(epoch)
        assert torch.equal(method.head_loss(logits, TARGETS), never.head_loss(logits, TARGETS))
    for epoch in (160, 199):
        for one in (method, never):
            one.start_epoch(epoch)
        assert never.head_loss(logits, TARGETS).item() == pytest.approx(18.897240, abs=1e-5)
        assert method.weights.tolist() == pytest.approx([0.027690, 0.270763, 2.701547], abs=1e-6)
        weighted = (2.701547 * each[0] + 0.027690 * each[1]) / (2.701547 + 0.027690)
        assert method.head_loss(logits, TARGETS).item() == pytest.approx(weighted, rel=1e-6)
    method.start_epoch(3)  # an epoch's constants are a function of its number
    assert method.weights.tolist() == [1.0, 1.0, 1.0]


# cRT


def test_crt_trains_the_classifier_alone_and_its_batch_normalisation_goes_on():
    kind = METHODS["crt"]
    assert (kind.sampler, kind.part, kind.reset, kind.frozen_bn) == ("balanced", "classifier", "classifier", "train")
    for frozen_bn in ("train", "eval"):
        method = make("crt")
        optimizer = optimizer_of(method, frozen_bn=frozen_bn)
        network = method.get_eval_model()
        images = batches((8,), seed=9)[0][0].images
        before = {key: value.clone() for key, value in network.state_dict().items()}
        features = network.eval().features(images)["logits"]
        run_epochs(method, optimizer, range(3))
        changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
        statistics = {f"norm.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")}
        classifier = {f"classifiers.logits.{key}" for key in ("weight", "bias")}
        assert changed == classifier | (statistics if frozen_bn == "train" else set())
        same = torch.equal(network.eval().features(images)["logits"], features)
        assert same == (frozen_bn == "eval")


def test_a_frozen_part_stays_in_evaluation_mode_after_the_mode_is_set_anew():
    method = make("crt")
    optimizer_of(method, frozen_bn="eval")
    network = method.get_eval_model()
    for _ in range(2):
        method.train()
        assert network.training
        assert not network.norm.training
        method.eval()
        assert not network.training


def test_what_freezes_batch_normalisation_must_say_how():
    method = make("ce")
    with pytest.raises(
        MbibError, match=r"'frozen_bn': with train: classifier the statistics of layer norm are frozen; say whether"
    ):
        method.freeze_all_but("classifier", None)
    method = make("ce")
    method.freeze_all_but("norm|classifiers", None)  # no such layer is frozen
    trained = {name for name, _ in method.trainable_parameters()}
    assert trained == {"norm.weight", "norm.bias", "classifiers.logits.weight", "classifiers.logits.bias"}


@pytest.mark.parametrize(
    ("part", "message"),
    [("fc", r"'train': 'fc' matches no parameter's name; .*the network has conv, norm, mixed, classifiers"),
     ("(", r"'train': '\(' is not a regular expression")],
)  # fmt: skip
def test_parts_that_are_none(part, message):
    with pytest.raises(MbibError, match=message):
        part_of(Tiny(), part)
    with pytest.raises(MbibError, match="Sequential does not say what its classifier is"):
        part_of(nn.Sequential(nn.Linear(2, 2)), "classifier")


def test_parts_of_a_network():
    network = Tiny(heads=("v1", "z"))
    assert part_of(network, "all") == set(network.state_dict())
    assert part_of(network, "none") == set()
    heads = {f"classifiers.{head}.{key}" for head in ("v1", "z") for key in ("weight", "bias")}
    assert part_of(network, "classifier") == heads
    assert part_of(network, r"^norm\.(weight|bias)$") == {"norm.weight", "norm.bias"}


# tau-normalisation


class Passes:
    """Held-out images; the training images are none of its business."""

    def __init__(self, images):
        self.held_out = images

    @property
    def train(self):
        raise AssertionError("read the training images")


def held_out(classes, seed=5):
    return [batch for (batch,) in batches((16, 16, 9), classes, seed)]


def naive_choice(network, images, classes):
    """The first of 0, 0.1, ..., 2 whose mean of class accuracies is largest."""
    network.eval()
    accuracies = []
    for tau in (i / 10 for i in range(21)):
        correct, total = [0] * classes, [0] * classes
        for batch in images:
            features = network.features(batch.images)
            logits = 0
            for head in network.prediction_heads:
                rows = network.classifiers[head].weight
                logits = logits + torch.stack([features[head] @ (row / row.norm() ** tau) for row in rows], dim=1)
            for guess, y in zip(logits.argmax(dim=1).tolist(), batch.targets.tolist(), strict=True):
                correct[y] += guess == y
                total[y] += 1
        accuracies.append(sum(c / n for c, n in zip(correct, total, strict=True) if n) / sum(n > 0 for n in total))
    return accuracies.index(max(accuracies)) / 10, accuracies


@pytest.mark.parametrize("heads", [("logits",), OBSERVATIONS])
@pytest.mark.parametrize("seed", range(3))
def test_tau_is_the_best_on_held_out_images(seed, heads):
    method = make("tau_norm", heads, seed=seed)
    network = method.result_model()
    with torch.no_grad():  # rows of very different length, as long-tailed training leaves them
        for classifier in network.classifiers.values():
            classifier.weight.mul_(torch.tensor([4.0, 2.0, 1.0, 0.5, 0.1])[:, None])
    images = held_out(5)
    best, accuracies = naive_choice(network, images, 5)
    assert len(set(accuracies)) > 1
    method.finish(Passes(images))
    assert method.report() == {"tau": pytest.approx(best)}
    assert torch.allclose(torch.tensor(CANDIDATES), torch.arange(21) / 10)
    # Chosen again, of the same images: nothing but the images and the weights decides.
    assert not any(classifier._forward_pre_hooks for classifier in network.classifiers.values())


def test_of_several_best_the_smallest_tau_and_of_absent_classes_nothing():
    method = make("tau_norm")
    network = method.result_model()
    with torch.no_grad():
        network.classifiers["logits"].weight.copy_(F.normalize(torch.randn(5, 8)))
    ((batch,),) = batches((16,))
    images = [Batch(batch.views, batch.targets % 2, batch.index)]  # of two classes only
    assert naive_choice(network, images, 5)[0] == 0.0
    method.finish(Passes(images))
    assert method.report()["tau"] == 0.0


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_a_given_tau_normalises_every_row_and_drops_the_bias(tau):
    method = make("tau_norm", OBSERVATIONS, tau=tau)
    network = method.result_model()
    with torch.no_grad():
        for classifier in network.classifiers.values():
            classifier.bias.fill_(3.0)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    method.finish(Passes(None))
    assert method.report() == {}, "it was not chosen"
    for key, value in network.state_dict().items():
        if not key.startswith("classifiers."):
            assert torch.equal(value, before[key])
        elif key.endswith("bias"):
            assert not value.any()
        else:
            rows = [row / row.norm() ** tau for row in before[key]]
            torch.testing.assert_close(value, torch.stack(rows))
            assert tau > 0 or torch.equal(value, before[key])


def test_tau_normalisation_changes_the_moving_average_where_that_is_the_result():
    method = make("tau_norm", tau=1.0)
    method.setup_ema(decay=0.5)
    method.finish(Passes(None))
    torch.testing.assert_close(method.result_model().classifiers["logits"].weight.norm(dim=1), torch.ones(5))


def test_tau_normalisation_needs_linear_classifiers():
    kind = METHODS["tau_norm"]
    with pytest.raises(MbibError, match="method 'tau_norm' needs linear classifiers, got Cosine"):
        kind(Tiny(classifier="cosine"), kind.Settings(), Facts(np.array(COUNTS), 0), CPU)


# BIB, MBIB and their relatives


@pytest.mark.parametrize("power", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("beta", [0.0, 5.0])
def test_bib_is_what_figure_10_computes(beta, gamma, power):
    logits, targets = random_logits(batch=16)
    loss = loss_of("bib", logits, targets, beta=beta, gamma=gamma, class_weight_power=power)
    arrays = [targets.numpy(), logits["v3"].numpy(), logits["z"].numpy()]
    assert loss.item() == pytest.approx(listing_of_figure_10(*arrays, COUNTS, beta, gamma, power), rel=1e-6)


def weights_of_edges(name, **settings):
    return {(edge.teacher, edge.student): edge.weight for edge in make(name, OBSERVATIONS, **settings).edges}


def test_sequential_edges_weigh_one_or_as_the_observations_do():
    for name in ("se_mbib", "all_mbib"):
        assert weights_of_edges(name) == STRUCTURES[name] == weights_of_edges(name, sequential_weights="one")
    observation = {"sequential_weights": "observation"}
    assert weights_of_edges("se_mbib", **observation) == {("v1", "v2"): 0.1, ("v2", "v3"): 0.3, ("v3", "z"): 1}
    together = {**STRUCTURES["mbib"], ("v1", "v2"): 0.1, ("v2", "v3"): 0.3}
    assert weights_of_edges("all_mbib", **observation) == together
    own = dict(observation_weights=[0.2, 0.5, 1.0])
    assert weights_of_edges("se_mbib", **own) == STRUCTURES["se_mbib"]
    sequential = {("v1", "v2"): 0.2, ("v2", "v3"): 0.5, ("v3", "z"): 1}
    assert weights_of_edges("se_mbib", **own, **observation) == sequential
    assert weights_of_edges("all_mbib", **own)[("v1", "z")] == 0.2


@pytest.mark.parametrize("name", ["se_mbib", "all_mbib"])
def test_structures_with_weighted_sequential_edges_equal_the_sum_of_their_terms(name):
    logits, targets = random_logits()
    settings = {"sequential_weights": "observation", "observation_weights": [0.2, 0.5, 1.0]}
    expected = sum(
        weight * naive_bib(logits[t], logits[s], targets, COUNTS, 5.0, 0, 0.1)
        for (t, s), weight in weights_of_edges(name, **settings).items()
    )
    assert loss_of(name, logits, targets, **settings).item() == pytest.approx(expected, rel=1e-6)


def test_the_parts_are_the_unweighted_terms_and_loss_comes_first():
    logits, targets = random_logits()
    parts = make("mbib").double().loss(logits, targets)
    assert next(iter(parts)) == "loss"
    assert set(parts) == {"loss", "bsc_v1", "bsc_v2", "bsc_v3", "bsc_z", "vsd_v1_z", "vsd_v2_z", "vsd_v3_z"}
    assert parts["bsc_v2"].item() == pytest.approx(naive_bsc(logits["v2"], targets, COUNTS, 0.1), rel=1e-6)
    assert parts["vsd_v2_z"].item() == pytest.approx(naive_vsd(logits["v2"], logits["z"], COUNTS, 0), rel=1e-6)


def test_the_bottleneck_weighs_a_plus_b_plus_1():
    assert make("mbib").head_weights == pytest.approx({"v1": 0.1, "v2": 0.3, "v3": 1.0, "z": 1.4})


@pytest.mark.parametrize("observations", [2, 3, 4, 5, 6])
def test_any_number_of_observations(observations):
    heads = (*(f"v{i + 1}" for i in range(observations)), "z")
    logits, targets = random_logits(heads)
    weights = [0.3] * (observations - 1) + [1.0]
    expected = sum(
        w * naive_bib(logits[h], logits["z"], targets, COUNTS, 5.0, 0, 0.1)
        for h, w in zip(heads, weights, strict=False)
    )
    loss = loss_of("mbib", logits, targets, observation_weights=weights)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_8142_classes():
    counts = np.linspace(1000, 2, 8142).astype(int)
    logits, targets = random_logits(classes=8142, batch=4)
    method = make("mbib", counts=counts.tolist(), gamma=0.5).double()
    assert method.class_weights.sum().item() == pytest.approx(8142, rel=1e-5)
    expected = sum(
        w * naive_bib(logits[h], logits["z"], targets, counts.tolist(), 5.0, 0.5, 0.1)
        for h, w in zip(OBSERVATIONS, (0.1, 0.3, 1.0), strict=False)
    )
    assert method.loss(logits, targets)["loss"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "heads", "message"),
    [
        ("mbib", ("logits",), "needs a model with observations and a bottleneck.*returns only logits"),
        ("bib", ("first", "second"), "needs a model with observations and a bottleneck.*returns only first, second"),
        ("mbib", ("v1", "z"), "'observation_weights' of method 'mbib': expected 1 numbers, one for each of v1"),
    ],
)
def test_networks_that_do_not_fit_are_refused(name, heads, message):
    with pytest.raises(MbibError, match=message):
        make(name, heads)


def test_an_own_graph_of_edges():
    class Own(Bottleneck):
        Settings = METHODS["bib"].Settings

        def graph(self, heads):
            return [Edge("v1", "v3", 0.5)]

    logits, targets = random_logits()
    expected = 0.5 * naive_bib(logits["v1"], logits["v3"], targets, COUNTS, 2.0, 0, 0.1)
    loss = make(Own, OBSERVATIONS, beta=2.0).double().loss(logits, targets)["loss"]
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", STRUCTURES)
def test_without_logit_adjustment_the_terms_are_plain_cross_entropies(name):
    logits, targets = random_logits()
    weights = naive_weights(COUNTS, 0.1)
    divisor = sum(weights[y] for y in targets.tolist())
    terms = {head: naive_plain(values, targets, weights, divisor) for head, values in logits.items()}
    expected = sum(
        w * (terms[t] + terms[s] + 5.0 * naive_vsd(logits[t], logits[s], COUNTS, 0.5))
        for (t, s), w in STRUCTURES[name].items()
    )
    method = make(name, OBSERVATIONS, gamma=0.5, logit_adjustment=False).double()
    assert method.loss(logits, targets)["loss"].item() == pytest.approx(expected, rel=1e-6)
    # Plain logits are for the frequencies of the training images; adjusted ones for uniform frequencies.
    assert method.logit_prior == "train"
    assert make(name, OBSERVATIONS).logit_prior == "uniform"


@pytest.mark.parametrize("power", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("adjusted", [True, False])
def test_class_weights_that_are_not_normalised_divide_by_the_number_of_images(power, adjusted):
    logits, targets = random_logits(batch=7)
    settings = dict(beta=0.0, class_weight_power=power, logit_adjustment=adjusted)
    weights = naive_weights(COUNTS, power)
    shifted = {h: values + torch.tensor(COUNTS).log() if adjusted else values for h, values in logits.items()}
    expected = sum(naive_plain(shifted[head], targets, weights, len(targets)) for head in ("v3", "z"))
    out = loss_of("bib", logits, targets, **settings, normalize_class_weights=False).item()
    assert out == pytest.approx(expected, rel=1e-6)
    inside = loss_of("bib", logits, targets, **settings).item()
    # Without class weights the sum of the weights is the number of images.
    assert (inside == pytest.approx(out, rel=1e-9)) == (power == 0)


# Which logits they are for


def test_the_prior_of_the_logits():
    priors = {name: make(name).logit_prior for name in OURS}
    assert priors == {name: "train" if name in ("ce", "focal") else "uniform" for name in priors}


def test_the_prior_of_logits_that_nothing_has_trained_is_not_known():
    assert make("ce").result_prior == "train"
    assert make("ce", epochs=0).result_prior is None


# The seams that these methods leave unused


class TwoStreams(Method):
    """Halves of the loss from two batches, and a projector around the network that is not published."""

    def __init__(self, *args):
        super().__init__(*args)
        self.head_names = ("logits",)

    @classmethod
    def build_network(cls, settings, build):
        network = nn.Module()
        network.model, network.projector = build(), nn.Linear(5, 4)
        return Projected(network.model, network.projector)

    def get_eval_model(self, module=None, ema=False):
        whole = super().get_eval_model(module, ema)
        return None if whole is None else whole.model

    def forward(self, first, second):
        logits = self.trainable_module.model(torch.cat([first.images, second.images]))
        one, other = logits.split([len(first.targets), len(second.targets)])
        projected = self.trainable_module.projector(logits).square().mean()
        losses = F.cross_entropy(one, first.targets), F.cross_entropy(other, second.targets)
        return {"loss": (losses[0] + losses[1]) / 2 + projected, "projected": projected.detach()}


class Projected(nn.Module):
    def __init__(self, model, projector):
        super().__init__()
        self.model, self.projector = model, projector


def test_a_method_of_two_streams_with_a_network_around_the_model():
    method = make(TwoStreams, ("logits",))
    optimizer = optimizer_of(method)
    step = create_step(Recipe(method="ce", model="resnet18"), method, optimizer, Precision(None, None))
    method.train()
    before = {key: value.clone() for key, value in method.trainable_module.state_dict().items()}
    ((first,), (second,)) = batches((8, 5))
    parts = step((first, second))
    assert list(parts) == ["loss", "projected"]
    after = method.trainable_module.state_dict()
    assert all(not torch.equal(after[f"projector.{key}"], before[f"projector.{key}"]) for key in ("weight", "bias"))
    state = through_a_file(method.get_checkpoint_state())
    assert state["state_dict"].keys() == Tiny().state_dict().keys()  # what is evaluated and published
    assert state["task_state"]["network"].keys() == {"projector.weight", "projector.bias"}
    other = make(TwoStreams, ("logits",), seed=1)
    other.load_checkpoint_state(state["state_dict"], state["task_state"])
    assert all(torch.equal(value, after[key]) for key, value in other.trainable_module.state_dict().items())


def test_a_method_that_defines_no_loss_says_so():
    with pytest.raises(NotImplementedError, match="Method defines none of head_loss, loss and forward"):
        make(Method, ("logits",)).loss(*random_logits(("logits",)))


@pytest.mark.parametrize("own", ["headloss", "Forward", "start_epoch"])
def test_a_method_that_defines_no_loss_is_refused_when_it_is_registered(own):
    meant = {"headloss": ", but headloss: did you mean head_loss?", "Forward": ", but Forward: did you mean forward?"}
    message = f"method 'wrong': defines none of head_loss, loss and forward{meant.get(own, '')}"
    with pytest.raises(MbibError) as caught:
        register("wrong")(type("Wrong", (Method,), {own: lambda self, epoch: None}))
    assert str(caught.value) == message
    assert "wrong" not in METHODS


def test_a_setting_of_a_method_that_is_not_settable_is_refused_when_it_is_registered():
    class NotSettings:
        pass

    with pytest.raises(MbibError, match="method 'wrong': its Settings must be a frozen dataclass"):
        register("wrong")(type("Wrong", (Method,), {"Settings": NotSettings}))
    with pytest.raises(MbibError, match=r"method 'wrong': expected a subclass of mbib_timm\.methods\.Method"):
        register("wrong")(NotSettings)
    with pytest.raises(MbibError, match=r"method 'ce' is registered already, by mbib_timm\.methods\.ce"):
        register("ce")(type("Wrong", (Method,), {"head_loss": lambda self, logits, targets: logits.mean()}))
    assert "wrong" not in METHODS


# The result, loaded by somebody else

RUNS = {
    **{name: {"model": "cifar_resnet20"} for name in OURS if name not in OF_OBSERVATIONS},
    **{name: {"model": "bib_resnet20" if name == "bib" else "mbib_resnet20"} for name in OF_OBSERVATIONS},
    "sade": {"model": "experts_resnet20"},
    "sade_mbib": {"model": "mbib_experts_resnet20"},
    "ldam_drw on several heads": {"method": "ldam_drw", "model": "mbib_resnet20"},
    "ldam_drw on a model of timm's": {"method": "ldam_drw", "model": "resnet10t", "img_size": 32},
    "tau_norm of mbib": {"method": "tau_norm", "model": "mbib_resnet20"},
    "ncm of mbib": {"method": "ncm", "model": "mbib_resnet20"},
    "ncm of a model of timm's": {"method": "ncm", "model": "resnet10t", "img_size": 32},
    "toy with a moving average": {"method": "toy", "model": "cifar_resnet20", "model_ema": True},
}
LOAD = """
import sys
import mbib_timm
import timm
import torch

torch.set_num_threads(1)
images = torch.load(sys.argv[1], weights_only=True)
logits = {}
for folder, inputs in images.items():
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        logits[folder] = model(inputs)
assert not any(name.startswith("mbib_timm_plugin") for name in sys.modules)
torch.save(logits, sys.argv[2])
"""


@pytest.mark.slow
def test_results_load_in_a_fresh_process_through_timm_alone(tmp_path, monkeypatch):
    """Of every method, trained for an epoch: the logits there are those of the model that was trained."""
    original, logits, images = RunFolder.write_model, {}, {}

    def write_model(self, model, *, input_size, **kwargs):
        images[str(self.path)] = torch.randn(4, *input_size, generator=torch.Generator().manual_seed(0))
        plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # as timm loads it
        with torch.no_grad():
            logits[str(self.path)] = plain.eval()(images[str(self.path)])
        return original(self, model, input_size=input_size, **kwargs)

    keys = dict(base="digits", epochs=1, warmup_epochs=0, imbalance_max=24, device="cpu", workers=0, plugin=[str(TOY)])
    folders = {}
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_model", write_model)
        for run, changes in RUNS.items():
            recipe = {**keys, "method": run, **changes}
            kind = METHODS[recipe["method"]]
            recipe["method"] = {"name": kind.name, **SMALL.get(kind.name, {})}
            if kind.needs_start or issubclass(kind, Taught):
                last = {"method": recipe.pop("method"), "epochs": 0 if kind.post_hoc else 1}
                first = "mbib" if recipe["model"] == "mbib_resnet20" else "ce"
                recipe["stages"] = [{"method": first}, last]
            file = tmp_path / "own.yaml"
            file.write_text(yaml.safe_dump(recipe))
            folders[run] = train(load_recipe(file, {"output": str(tmp_path / "runs")}), run.replace(" ", "_")).folder
    torch.save({str(folder): images[str(folder)] for folder in folders.values()}, tmp_path / "images.pt")
    arguments = [str(tmp_path / "images.pt"), str(tmp_path / "logits.pt")]
    command = [sys.executable, "-c", LOAD, *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = torch.load(tmp_path / "logits.pt", weights_only=True)
    for run, folder in folders.items():
        trained = logits[str(folder)]
        assert loaded[str(folder)].shape == (4, 10), run
        assert torch.equal(loaded[str(folder)], trained), run
        assert trained.std() > 0, run
        config = json.loads((folder / "config.json").read_text())
        kind = METHODS[RUNS[run].get("method", run)]
        assert config["logit_prior"] == ("train" if kind.name in ("ce", "focal") else "uniform"), run
        keys = load_file(folder / "model.safetensors").keys()
        assert not any("trainable_module" in key or key in ("offset", "updates", "scale") for key in keys), run


def test_a_run_of_two_streams_draws_each_by_its_own_sampler(tmp_path):
    """The second one's reversed: the rarest class is its most frequent."""
    seen = []

    class Pair(Method):
        title = "Pair"
        sampler = "instance+reverse"

        def forward(self, first, second):
            seen.append((first.targets, second.targets))
            losses = [F.cross_entropy(self.logits(b.images)["logits"], b.targets) for b in (first, second)]
            return {"loss": sum(losses) / 2}

    register("pair")(Pair)
    try:
        file = tmp_path / "own.yaml"
        keys = dict(base="digits", model="cifar_resnet20", method="pair", epochs=2, warmup_epochs=0, imbalance_max=48)
        file.write_text(yaml.safe_dump({**keys, "device": "cpu", "workers": 0, "output": str(tmp_path)}))
        record = train(load_recipe(file), "run").record
    finally:
        METHODS.remove("pair")
    counts, steps = record.class_counts, len(seen) // 2
    first, second = (torch.cat([pair[i] for pair in seen[:steps]]) for i in range(2))
    assert torch.bincount(first, minlength=10).tolist() == counts
    n, inverse = len(second), 1 / np.array(counts)
    share = inverse / inverse.sum()
    drawn = torch.bincount(second, minlength=10).numpy()
    assert n == len(first)
    assert (np.abs(drawn - n * share) < 5 * np.sqrt(n * share * (1 - share)) + 1).all()
    assert drawn.argmax() >= 8


def test_ldams_constants_reach_the_networks_classifier():
    recipe = Recipe(method={"name": "ldam_drw", "scale": 11.0}, model="cifar_resnet20")
    network = build_network(recipe, 10).eval()
    images = torch.randn(2, 3, 32, 32)
    before = network(images)
    assert before.abs().max() <= 11 * (1 + 1e-6)
    rows = network.get_classifier().weight
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(10))  # each drawn from -1 to 1, and normalised
    with torch.no_grad():
        rows.mul_(5.0)
    torch.testing.assert_close(network(images), before)
    with pytest.raises(MbibError, match="method 'ldam_drw' sets classifier_scale to 11"):
        build_network(recipe.replace(model_kwargs={"classifier_scale": 3.0}), 10)


# What goes together


NETWORKS = ("cifar_resnet20", "mbib_resnet20", "experts_resnet20", "mbib_experts_resnet20")


def table_of_what_goes_together():
    """The rows of docs/method_zoo.md: for each method what it says of each kind of network, and of mixing."""
    text = (Path(__file__).parents[1] / "docs" / "method_zoo.md").read_text(encoding="utf-8")
    lines = text.partition("## What can be combined")[2].partition("## Teachers")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {name.strip("` "): cells for names, *cells in rows for name in names.split(",")}


def test_what_goes_together_is_said_of_every_method():
    ours = {name for name in OURS if name != "toy"}
    assert table_of_what_goes_together().keys() == ours


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OURS if name != "toy"])
def test_what_goes_together_is_as_the_documentation_says(name):
    *networks, mixing = table_of_what_goes_together()[name]
    kind = METHODS[name]
    settings = build_options(kind.Settings, SMALL.get(name, {}), name)
    facts = Facts(np.array(COUNTS), EPOCHS, previous_run(len(COUNTS)))
    for model, said in zip(NETWORKS, networks, strict=True):

        def build(model=model):
            network = kind.build_network(settings, partial(timm.create_model, model, num_classes=len(COUNTS)))
            return kind(network, settings, facts, CPU)

        if said == "yes":
            method = build()
            if not kind.post_hoc:
                batch = Batch((torch.randn(6, 3, 32, 32),) * len(kind.views), torch.arange(6) % 5, torch.arange(6))
                method(batch)["loss"].backward()
        else:
            assert said.startswith("no: ")
            with pytest.raises(MbibError, match=f"method '{name}' (needs|compares)"):
                build()
    assert mixing == ("trains nothing" if kind.post_hoc else "yes" if kind.soft_targets else "no: it needs labels")


class WithFeatures(nn.Module):
    """A network around a model, as docs/methods.md has it, that says nothing of the model in it."""

    def __init__(self, model):
        super().__init__()
        self.model, self.projector = model, nn.Linear(4, 4)

    def forward(self, images):
        return self.model(images), images


def test_more_outputs_than_heads_need_a_forward_of_the_methods_own():
    method = METHODS["ce"](WithFeatures(Tiny()), None, Facts(np.array([3, 2, 1, 1, 1]), 1), torch.device("cpu"))
    with pytest.raises(MbibError, match=r"'ce': the network returned 2 outputs, and has the heads logits \(1\); a net"):
        method.logits(torch.zeros(2, 3, 8, 8))


def test_a_wrapper_trains_in_part_and_keeps_what_its_model_spares():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5)
    network = WithFeatures(model)
    assert part_of(network, "classifier") == {"model.head.weight", "model.head.bias"}
    method = METHODS["ce"](network, None, Facts(np.array([3, 2, 1, 1, 1]), 1), torch.device("cpu"))
    groups = create_optimizer(Recipe(weight_decay=0.1), method).param_groups
    (decay,) = (g["weight_decay"] for g in groups for p in g["params"] if p is model.pos_embed)
    assert decay == 0
    assert method.get_eval_model() is network


@pytest.mark.parametrize(
    ("name", "model", "part"), [("bib", "mbib_resnet20", "all"), ("toy", "cifar_resnet20", "none")]
)
def test_several_processes_wait_for_no_gradient_that_does_not_come(name, model, part, tmp_path):
    """Of heads that the loss leaves out; of a network that does not train at all."""
    kind = METHODS[name]
    method = kind(timm.create_model(model, num_classes=5), kind.Settings(), Facts(np.array(COUNTS), EPOCHS), CPU)
    method.freeze_all_but(part, "eval")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        method.prepare_distributed().train()
        for step in batches((4, 4, 4), size=8):
            method(*step)["loss"].backward()
    finally:
        torch.distributed.destroy_process_group()
    trained = dict(method.trainable_parameters())
    assert trained
    assert [each for each, parameter in trained.items() if parameter.grad is None] == []
