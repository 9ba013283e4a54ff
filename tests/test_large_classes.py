"""Many classes: losses in blocks are those of the whole, in little memory; records stay short."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from benchmarking.live_memory import over_logits, peak_of
from benchmarking.targets import LOSSES_OF_CLASSES

from mbib_timm.data.batch import Batch
from mbib_timm.evaluation.evaluate import AnswerLog
from mbib_timm.evaluation.metrics import batch_statistics, summarize, with_intervals
from mbib_timm.files import parse_json, to_json
from mbib_timm.methods import METHODS, Facts, functional
from mbib_timm.methods.functional import adjusted_cross_entropy, focal_loss, self_distillation


def counts_of(classes):
    return np.maximum(1, 1000 / np.arange(1, classes + 1)).astype(np.int64)


def method_of(name, classes):
    kind = METHODS[name]
    network = kind.build_network(kind.Settings(), lambda **own: timm.create_model(
        LOSSES_OF_CLASSES[name], num_classes=classes, **own))  # fmt: skip
    return kind(network, kind.Settings(), Facts(counts_of(classes), 1), torch.device("cpu"))


def targets_of(kind, images, classes, dtype=torch.float32):
    if kind == "labels":
        return torch.randint(classes, (images,))
    return torch.rand(images, classes, dtype=dtype).softmax(dim=-1)


def test_bytes_of_tensors_are_counted_while_they_live():
    def action():
        one = torch.zeros(1000)  # 4,000 bytes
        two = one + 1  # 8,000
        del one
        three = two.view(10, 100).exp()  # a view takes none
        del two
        return three.add_(1)

    assert peak_of(action) == 8000


@pytest.mark.parametrize("kind", ["labels", "soft targets"])
@pytest.mark.parametrize("name", LOSSES_OF_CLASSES)
def test_a_loss_and_its_gradients_take_three_times_the_logits(monkeypatch, name, kind):
    """20,000 classes, with blocks as small beside the batch as those of 100,000."""
    images, classes = 16, 20_000
    monkeypatch.setattr(functional, "LARGE", images * classes - 1)
    monkeypatch.setattr(functional, "BLOCK", images * classes // 8)
    method, targets = method_of(name, classes), targets_of(kind, images, classes)
    logits = {head: torch.randn(images, classes, requires_grad=True) for head in method.head_names}
    assert over_logits(lambda given: method.loss(given, targets)["loss"].backward(), logits) < 3


def test_an_evaluation_takes_three_times_the_logits():
    targets = targets_of("labels", 16, 20_000)

    def evaluated(logits):
        log, stacked = AnswerLog(), torch.stack([*logits.values()])
        batch_statistics(stacked, targets)
        log.add(stacked[0], Batch((), targets, targets))

    assert over_logits(evaluated, {str(head): torch.randn(16, 20_000) for head in range(5)}) < 3


@pytest.mark.parametrize("kind", ["labels", "soft targets"])
@pytest.mark.parametrize("name", LOSSES_OF_CLASSES)
def test_a_method_in_blocks_is_the_method(monkeypatch, name, kind):
    method, targets = method_of(name, 30), targets_of(kind, 7, 30)
    logits = {head: torch.randn(7, 30, requires_grad=True) for head in method.head_names}

    def parts_and_gradients():
        parts = method.loss(logits, targets)
        return parts, torch.autograd.grad(parts["loss"], [*logits.values()])

    parts, gradients = parts_and_gradients()
    monkeypatch.setattr(functional, "LARGE", 1)
    monkeypatch.setattr(functional, "BLOCK", 60)
    blocks, in_blocks = parts_and_gradients()
    assert blocks.keys() == parts.keys()
    torch.testing.assert_close(blocks, parts)
    torch.testing.assert_close(in_blocks, gradients)


@pytest.mark.parametrize("kind", ["labels", "soft targets"])
@pytest.mark.parametrize("heads", [(), (3,)])
def test_losses_in_blocks_are_those_of_the_whole(monkeypatch, kind, heads):
    logits = torch.randn(*heads, 9, 20, dtype=torch.float64, requires_grad=True)
    other, targets = torch.randn_like(logits), targets_of(kind, 9, 20, torch.float64)
    own = torch.rand(20, dtype=torch.float64) + 0.5
    losses = {
        "all of it": lambda: adjusted_cross_entropy(
            logits, targets, offset=own, divisor=own, margin=own, weight=own, smoothing=own / 10
        ).sum(),
        "by images": lambda: adjusted_cross_entropy(logits, targets, weight=own, normalize=False).sum(),
        "distillation": lambda: self_distillation(other, logits, own).sum(),
    }
    if not heads:
        losses["focal"] = lambda: focal_loss(logits, targets, 1.5, own)
    for name, loss in losses.items():
        with monkeypatch.context() as patch:
            whole, gradient = loss(), torch.autograd.grad(loss(), logits)
            patch.setattr(functional, "LARGE", 1)
            patch.setattr(functional, "BLOCK", 40)
            torch.testing.assert_close(loss(), whole, rtol=1e-12, atol=0, msg=name)
            torch.testing.assert_close(torch.autograd.grad(loss(), logits), gradient, rtol=1e-10, atol=1e-14)


def test_metrics_of_many_classes_are_few_lines():
    classes, images = 2_000, 4_000
    targets = torch.arange(images) % classes
    logits = torch.randn(images, classes)
    metrics = summarize(batch_statistics(logits, targets), counts_of(classes))
    guess = logits.argmax(dim=-1).numpy()
    metrics = with_intervals(metrics, targets.numpy(), guess, counts_of(classes))
    content = to_json(metrics)
    assert content.count(b"\n") < 80
    assert len(content) < 30 * classes
    read = parse_json(content)
    assert read["per_class"] == metrics.per_class
    assert replace(metrics, per_class=read["per_class"]) == metrics


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({}, "{}"),
        ([], "[]"),
        ({"a": [1, 2], "b": {"c": None}}, '{\n  "a": [\n    1,\n    2\n  ],\n  "b": {\n    "c": null\n  }\n}'),
        ([*range(1001)], f"[{', '.join(map(str, range(1001)))}]"),
        ([[1]] * 2, "[\n  [\n    1\n  ],\n  [\n    1\n  ]\n]"),
    ],
)
def test_long_lists_stand_in_one_line(value, text):
    assert to_json(value) == f"{text}\n".encode()


def test_not_a_number_is_refused_in_a_long_list_too():
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"a": [float("nan")] * 1001})
