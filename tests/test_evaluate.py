"""Evaluation of models: every head, every image once, and the table of the result."""

import importlib
import os
import socket
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.multiprocessing as mp
import yaml
from small_data import noise_batches

from mbib_timm.analysis.outputs import collect_outputs
from mbib_timm.data import Batch
from mbib_timm.errors import DataError, MbibError
from mbib_timm.evaluation import AnswerLog, batch_statistics, evaluate, summarize, with_intervals
from mbib_timm.evaluation.metrics import wilson_interval
from mbib_timm.files import to_json
from mbib_timm.models import MBIB
from mbib_timm.models.frozen_backbone import FrozenBackbone
from mbib_timm.models.head_outputs import head_logits
from mbib_timm.recipe import load_recipe
from mbib_timm.results.record import Epoch
from mbib_timm.results.run_text import epoch_line
from mbib_timm.results.tables import accuracy_table
from mbib_timm.training import train

evaluate_module = importlib.import_module("mbib_timm.evaluation.evaluate")

COUNTS = np.array([500, 101, 100, 60, 20, 19, 3])
CPU = torch.device("cpu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MBIB("cifar_resnet20", taps=(3, 6, 9), num_classes=7)


def test_every_head_and_the_prediction(model):
    loader, x, y = noise_batches()
    results = evaluate(model, loader, COUNTS, device=CPU)
    assert list(results) == ["prediction", "v1", "v2", "v3", "z"]
    with torch.no_grad():
        heads = named_heads(model, x)
    for name, logits in heads.items():
        expected = summarize(batch_statistics(logits, y), COUNTS)
        assert results[name].per_class == expected.per_class
        assert results[name].nll == pytest.approx(expected.nll, rel=1e-5)
    for metrics in results.values():
        to_json(metrics)  # refuses what is not finite


def test_a_shift_moves_the_logits_of_every_head(model):
    loader, x, y = noise_batches()
    shift = torch.tensor([0.5, -1.0, 2.0, -1e4, 0.0, 1.0, 0.3])
    results = evaluate(model, loader, COUNTS, device=CPU, shift=shift)
    with torch.no_grad():
        heads = head_logits(model.eval(), x)
    for name, logits in heads.items():
        expected = summarize(batch_statistics(logits + shift, y), COUNTS)
        assert results[name].per_class == expected.per_class
        assert results[name].nll == pytest.approx(expected.nll, rel=1e-5)
        assert results[name].per_class[3] == 0  # an excluded class
        to_json(results[name])


@pytest.mark.parametrize(("pixels", "sizes"), [(65, [16, 16, 8]), (64, [40])])
@torch.no_grad()
def test_on_a_cpu_photographs_are_evaluated_in_small_batches_with_the_same_result(model, pixels, sizes):
    x = torch.randn(40, 3, 32, pixels, generator=torch.Generator().manual_seed(0))
    y = torch.arange(40) % 7
    expected = {name: summarize(batch_statistics(logits, y), COUNTS) for name, logits in named_heads(model, x).items()}
    pooled = torch.cat(model.pool_features(x), dim=1)
    seen = []
    handle = model.backbone.conv1.register_forward_hook(lambda _, images, __: seen.append(len(images[0])))
    results = evaluate(model, [Batch((x,), y, torch.arange(40))], COUNTS, device=CPU)
    assert seen == sizes
    for name, metrics in results.items():
        assert metrics.per_class == expected[name].per_class
        assert metrics.nll == pytest.approx(expected[name].nll, rel=1e-5)
    frozen = FrozenBackbone(model)
    assert torch.allclose(frozen(x), pooled, atol=1e-5)
    assert seen == 2 * sizes
    handle.remove()


def named_heads(model, x):
    return {"prediction": model.eval()(x), **dict(zip(model.head_names, model.forward_heads(x), strict=True))}


def test_a_plain_model_has_a_prediction_alone():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 7))
    loader, x, y = noise_batches()
    results = evaluate(model, loader, COUNTS, device=CPU)
    assert list(results) == ["prediction"]
    correct = (model(x).argmax(1) == y).sum().item()
    assert results["prediction"].top1 == pytest.approx(100 * correct / len(y))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_evaluated_in_evaluation_mode_and_keeps_its_own(model, training):
    model.train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader, _, _ = noise_batches()
    evaluate(model, loader, COUNTS, device=CPU)
    assert model.training == training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_error_of_the_loader_leaves_the_models_mode(model):
    def loader():
        yield from noise_batches()[0]
        raise DataError("cannot read image.png")

    with pytest.raises(DataError, match=r"image\.png"):
        evaluate(model, loader(), COUNTS, device=CPU)
    assert model.training


def test_channels_last_and_autocast(model):
    loader, _, _ = noise_batches()
    plain = evaluate(model, loader, COUNTS, device=CPU)
    last = evaluate(model.to(memory_format=torch.channels_last), loader, COUNTS, device=CPU, channels_last=True)
    half = evaluate(model, loader, COUNTS, device=CPU, amp_dtype=torch.bfloat16)
    for name in plain:
        assert last[name].nll == pytest.approx(plain[name].nll, rel=1e-4)
        assert half[name].nll == pytest.approx(plain[name].nll, rel=0.05)
    assert half["prediction"].nll != plain["prediction"].nll


def test_a_log_has_the_answer_for_every_image_in_the_order_of_the_split(model):
    loader, x, y = noise_batches()
    order = torch.randperm(25, generator=torch.Generator().manual_seed(1))
    shuffled = [Batch((x[i],), y[i], i) for i in order.split(10)]
    log = AnswerLog()
    metrics = evaluate(model, shuffled, COUNTS, device=CPU, answers=log)["prediction"]
    answers = log.read()
    with torch.no_grad():
        probabilities = model.eval()(x).softmax(dim=1)
    assert answers.index.tolist() == list(range(25))
    assert answers.targets.tolist() == y.tolist()
    assert answers.predicted.tolist() == probabilities.argmax(dim=1).tolist()
    assert answers.probability == pytest.approx(probabilities.amax(dim=1).numpy(), abs=1e-5)
    plain = evaluate(model, loader, COUNTS, device=CPU)["prediction"]
    assert set(plain.intervals) == {"top1"}, "bootstrap is for results alone"
    assert set(metrics.intervals) == {"top1", "macro", "many", "medium", "few"}, "25 images are too few for macro F1's"
    assert metrics.class_images == torch.bincount(y, minlength=len(COUNTS)).tolist()
    assert replace(metrics, intervals=plain.intervals, nll=plain.nll, ece=plain.ece, class_images=[]) == plain
    assert metrics.intervals == with_intervals(plain, y.numpy(), answers.predicted, COUNTS).intervals, "one seed"


def test_images_of_a_group_count_as_one_in_the_intervals_of_every_head(model):
    loader = noise_batches()[0][1:]  # images 10 to 24 of the split, which are of groups 2 to 4
    groups = np.array([f"group {i // 5}" for i in range(25)])
    results = evaluate(model, loader, COUNTS, device=CPU, answers=AnswerLog(groups))
    outputs = collect_outputs(model, loader, COUNTS, groups=groups)
    for name, metrics in results.items():
        expected = pytest.approx(wilson_interval(metrics.top1 / 100 * 3, 3))
        assert metrics.intervals["top1"] == outputs.metrics[name].intervals["top1"] == expected, name


def test_the_answers_of_several_processes_come_together(model, monkeypatch):
    """The other process has the first batch; tests/test_adapters.py runs two real ones."""
    loader, _, _ = noise_batches()
    whole, share, other = AnswerLog(), AnswerLog(), AnswerLog()
    evaluate(model, loader, COUNTS, device=CPU, answers=whole)
    evaluate(model, loader[:1], COUNTS, device=CPU, answers=other)
    there = torch.cat(other.parts, dim=1).numpy()
    evaluate(model, loader[1:], COUNTS, device=CPU, answers=share)
    share.answers = None

    def gather(shares, own):
        shares[:] = [own, there]

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    for name in ("index", "targets", "predicted", "probability"):
        assert getattr(share.read(), name).tolist() == getattr(whole.read(), name).tolist()


def test_no_image_is_an_error(model):
    with pytest.raises(DataError, match="no image"):
        evaluate(model, [], COUNTS, device=CPU)


def test_logits_that_are_not_finite_are_an_error_that_names_the_heads(model):
    with torch.no_grad():
        model.bottleneck.classifier.weight[0, 0] = torch.nan
    with pytest.raises(
        MbibError,
        match=r"logits of prediction and 1 more are not .* float32 cannot hold them; .*--clip-grad 5",
    ):
        evaluate(model, noise_batches()[0], COUNTS, device=CPU)


def test_a_process_without_images_adds_zeros_in_the_others_order(model, monkeypatch):
    """The other process has everything; tests/test_adapters.py runs two real ones."""
    loader, _, _ = noise_batches()
    sent = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.broadcast", lambda tensor, source: None)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: sent.append(tensor.clone()))
    alone = evaluate(model, loader, COUNTS, device=CPU)
    assert [len(tensor) for tensor in sent] == [5] * 6, "each tensor holds all heads"
    others = iter(sent)

    def receive(tensor):
        other = next(others)
        assert (tensor.shape, tensor.dtype, tensor.count_nonzero()) == (other.shape, other.dtype, 0)
        tensor.add_(other)

    monkeypatch.setattr("torch.distributed.all_reduce", receive)
    assert evaluate(model, [], COUNTS, device=CPU) == alone
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: None)
    with pytest.raises(DataError, match="no image to evaluate"):
        evaluate(model, [], COUNTS, device=CPU)


def test_the_table_shows_groups_counts_and_heads():
    _, x, y = noise_batches()
    logits = x.flatten(1)[:, :7]
    result = summarize(batch_statistics(logits, y), COUNTS)
    empty = replace(result, few=None)
    lines = accuracy_table({"prediction": result, "v3": result, "z": empty}, COUNTS).splitlines()
    assert lines[0].split() == ["%", "overall", "macro", "macro", "F1", "many", "medium", "few"]
    assert lines[2].split() == ["classes", "7", "7", "7", "2", "3", "2"]
    assert lines[3].split() == ["training", "images", *["803"] * 3, "601", "180", "22"]
    assert lines[4].split() == ["per", "class", *["3-500"] * 3, "101-500", "20-100", "3-19"]
    images = np.bincount(y, minlength=7)
    assert lines[5].split() == ["evaluated", "classes", *["7"] * 3, "2", "3", "2"]
    assert lines[6].split()[2:] == [*["25"] * 3, *(str(images[group].sum()) for group in ([0, 1], [2, 3, 4], [5, 6]))]
    *lines, last = lines
    assert last == "v3 and z are single heads of the network; prediction is its answer"
    assert [line.split()[0] for line in lines[8:]] == ["v3", "z", "prediction", "95"]
    low, high = result.intervals["top1"]
    assert lines[8].split()[1:4] == [f"{result.top1:.2f}", f"{result.macro:.2f}", f"{result.macro_f1:.2f}"]
    assert lines[9].split()[-1] == "–"
    assert lines[11].split()[3:] == [f"{low:.1f}-{high:.1f}", *["–"] * 5]
    assert len({len(line) for line in lines}) == 1
    alone = accuracy_table({"prediction": result}, COUNTS).splitlines()
    assert alone[8:] == lines[10:], "nothing to explain"
    experts = dict.fromkeys(("prediction", "expert1_v3", "expert1_z", "expert1"), result)
    assert accuracy_table(experts, COUNTS).splitlines()[-1] == (
        "expert1_v3 to expert1 are single heads and experts of the network; prediction is its answer"
    )


def test_the_line_of_an_epoch_has_the_names_of_the_tables_columns():
    val = dict.fromkeys(("top1", "macro", "macro_f1", "many", "medium"), 50.0)
    line = epoch_line(Epoch(3, 0.1, 1.25, {"loss": 2.0}, {**val, "few": None}), 200)
    accuracies = "overall 50.0  macro 50.0  macro F1 50.0  many 50.0  medium 50.0  few –"
    assert line == f"epoch   3/200  lr 1.00e-01  loss 2.000  {accuracies}  1.2 s"


def test_the_table_of_data_without_few_shot_classes():
    _, x, y = noise_batches()
    counts = np.full(7, 300)
    lines = accuracy_table({"prediction": summarize(batch_statistics(x.flatten(1)[:, :7], y), counts)}, counts)
    assert [line.split()[-1] for line in lines.splitlines()[2:7]] == ["0", "0", "–", "0", "0"]
    assert lines.splitlines()[-2].split()[-2:] == ["–", "–"]


# Two processes


@torch.enable_grad()
def train_and_look(rank, folder, ema):
    """Train in one of two processes; keep the logits of fixed images that every evaluation would give."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    seen, original = [], evaluate_module.head_logits

    def looking(model, images):
        seen.append(model(probe()))
        return original(model, images)

    evaluate_module.head_logits = looking
    keys = dict(base="digits", model="cifar_resnet20", method="ce", epochs=2, warmup_epochs=0, device="cpu", workers=0)
    keys["imbalance_max"] = 48
    (folder / f"own{rank}.yaml").write_text(yaml.safe_dump({**keys, "model_ema": ema, "model_ema_decay": 0.5}))
    train(load_recipe(folder / f"own{rank}.yaml", {"output": str(folder)}), "run")
    torch.save(seen, folder / f"{rank}.pt")


def probe():
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("ema", [False, True])
@torch.no_grad()
def test_all_processes_evaluate_the_weights_that_are_saved(tmp_path, monkeypatch, ema):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    mp.start_processes(train_and_look, (tmp_path, ema), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    # An evaluation an epoch, of 170 images in one batch; with an average also of the raw weights, and at the end again.
    assert len(first) == len(second) == (5 if ema else 2)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    saved = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    torch.testing.assert_close(saved(probe()), first[-3 if ema else -1], rtol=1e-5, atol=1e-5)
    if ema:  # and the raw weights after it
        raw = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
        saved.load_state_dict(raw)
        torch.testing.assert_close(saved(probe()), first[-1], rtol=1e-5, atol=1e-5)
