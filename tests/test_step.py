"""The three kinds of training step give the same losses; compiling and capturing are wrappers that may fail."""

import sys
import warnings

import forked
import numpy as np
import pytest
import torch
from emulated_graphs import EmulatedGraphs
from safetensors.torch import load_file
from tiny import batches as batches_of
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from mbib_timm.capturing import WARM_UP_CALLS
from mbib_timm.cli import main
from mbib_timm.compiling import CompileOrEager
from mbib_timm.environment import World
from mbib_timm.errors import MbibError, NoFirstLossError, NonFiniteLossError
from mbib_timm.evaluation import evaluate
from mbib_timm.evaluation.evaluate import compiled_head_logits
from mbib_timm.methods import Facts, resolve_method
from mbib_timm.progress import Progress
from mbib_timm.recipe import Recipe
from mbib_timm.training import epoch as epoch_module
from mbib_timm.training.epoch import LossLog, train_one_epoch
from mbib_timm.training.optimization import Precision, create_optimizer, round_learning_rates
from mbib_timm.training.step import compiled_loss_parts, create_step, find_graphs, training_step

CPU = World(torch.device("cpu"))
FULL = Precision(None, None)
COUNTS = [50, 20, 5]


class TwoHeads(nn.Module):
    """A small network with the heads of a BIB model, BatchNorm and dropout."""

    head_names = ("v1", "z")
    bottleneck_head = "z"

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.v1, self.z, self.drop = nn.Linear(width, 3), nn.Linear(width, 3), nn.Dropout(0.1)

    def forward(self, x):
        pooled = self.stem(x).mean(dim=(2, 3))
        return self.v1(pooled), self.z(self.drop(pooled))


def setup(recipe, device="cpu", drop=0.0):
    torch.manual_seed(0)
    model = TwoHeads().to(device)
    model.drop.p = drop
    kind, settings = resolve_method(recipe.method)
    method = kind(model, settings, Facts(np.array(COUNTS), 10), torch.device(device)).to(device)
    method.train()
    return method, create_optimizer(recipe, method)


def batches(sizes=(8, 8, 5), device="cpu"):
    return batches_of(sizes, classes=3, device=device)


def evaluated(sizes=(8, 8, 5)):
    return [batch for (batch,) in batches(sizes)]


def settings(method="bib", **keys):
    return Recipe(**{"method": method, "opt": "momentum", "lr": 0.05, **keys})


def losses(step, epochs=2, device="cpu"):
    torch.manual_seed(3)
    return [
        {name: value.item() for name, value in step(streams).items()}
        for _ in range(epochs)
        for streams in batches(device=device)
    ]


# Compiled


@pytest.mark.slow
def test_the_compiled_step_gives_the_eager_losses_and_compiles_each_shape_once():
    expected = losses(create_step(settings(), *setup(settings()), FULL))
    recipe = settings(torchcompile=True)
    method, optimizer = setup(recipe)
    step = create_step(recipe, method, optimizer, FULL)
    before = counters["stats"]["unique_graphs"]
    got = losses(step)
    for one, other in zip(got, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert counters["stats"]["unique_graphs"] - before == 2  # the whole batch and the short last one
    # Another run of the same structure, with other weights, counts, beta and temperatures, takes the same code.
    again = settings({"name": "bib", "beta": 1.0, "class_weight_power": 0.5}, torchcompile=True)
    method, optimizer = setup(again)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.mul_(0.5)
    losses(create_step(again, method, optimizer, FULL))
    assert counters["stats"]["unique_graphs"] - before == 2
    assert not compiled_loss_parts.failed


@pytest.mark.slow
def test_without_a_compiler_a_run_goes_on_eagerly_and_says_so_once(tmp_path):
    command = ["train", "--epochs", "1", "--device", "cpu", "--warmup-epochs", "0", "--imbalance-max", "48"]
    command += ["--model", "test_resnet", "--method", "ce", "--output", str(tmp_path), "--experiment"]
    assert main([*command, "eager"]) == 0

    def compiled():
        torch._dynamo.reset()
        inductor.cpp.cxx, inductor.compile_threads = ("no_such_compiler",), 1
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            status = main([*command, "compiled", "--torchcompile"])
        print(*(str(each.message).replace("\n", " ") for each in said), sep="\n", file=sys.stderr)
        return status

    done = forked.run(compiled, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"))
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stderr.splitlines() if "cannot be compiled" in line]
    assert len(warned) == 2  # of training, of evaluation
    assert "the training step cannot be compiled, and runs eagerly: " in warned[0]
    assert "no_such_compiler" in warned[0]
    eager, compiled = (load_file(tmp_path / name / "model.safetensors") for name in ("eager", "compiled"))
    assert all(torch.equal(eager[name], compiled[name]) for name in eager)


def test_errors_of_the_model_are_not_taken_for_failures_of_the_compiler():
    def broken(x):
        raise ValueError("labels out of range")

    function = CompileOrEager(broken, "it")
    with pytest.raises(ValueError, match="labels out of range"):
        function.on(CPU.device)(torch.ones(2))
    assert not function.failed


def test_compiled_evaluation_counts_the_same():
    torch.manual_seed(0)
    model = TwoHeadsEvaluated()
    plain = evaluate(model, evaluated(), np.array(COUNTS), device=CPU.device)
    compiled = evaluate(model, evaluated(), np.array(COUNTS), device=CPU.device, compile=True)
    assert not compiled_head_logits.failed
    for head in plain:
        assert compiled[head].top1 == plain[head].top1
        assert compiled[head].nll == pytest.approx(plain[head].nll, rel=1e-5)


class TwoHeadsEvaluated(TwoHeads):
    """Gives one tensor, as plain models do."""

    head_names = ("logits",)

    def forward(self, x):
        return super().forward(x)[1]


# Captured. Without a CUDA device, emulated graphs record the step and repeat it.


def captured(recipe):
    graphs = EmulatedGraphs()
    return create_step(recipe, *setup(recipe), FULL, graphs), graphs


def test_a_run_that_goes_on_before_a_short_last_batch_is_captured_for_whole_ones():
    recipe = settings(opt_kwargs={"fused": True})
    step, graphs = captured(recipe)
    reference, plain = setup(recipe)
    whole, *_, short = batches()
    for streams in (short, *[whole] * (WARM_UP_CALLS + 2), short):
        assert step(streams)["loss"] == training_step(reference, plain, FULL, streams)["loss"]
    assert graphs.captures == 1


def test_what_a_step_returned_is_not_overwritten_by_the_next():
    step, _ = captured(settings(opt_kwargs={"fused": True}))
    returned = [step(streams)["loss"] for _ in range(6) for streams in batches()]
    assert len({value.item() for value in returned}) == len(returned)


@pytest.mark.parametrize(
    ("keys", "world", "named"),
    [
        ({}, CPU, "device cpu"),
        ({}, World(torch.device("cuda"), 0, 2), "2 processes"),
        ({"grad_accum_steps": 2}, World(torch.device("cuda")), "grad_accum_steps"),
        ({"opt": "lamb"}, World(torch.device("cuda")), "optimizer 'lamb'"),
    ],
)
def test_what_cannot_be_captured_is_named(keys, world, named):
    recipe = settings(**{"cuda_graph": True, **keys})
    _, optimizer = setup(recipe)
    with pytest.raises(MbibError, match=f"recipe key 'cuda_graph': a step cannot be captured with {named}"):
        find_graphs(recipe, optimizer, FULL, world)
    assert find_graphs(recipe.replace(cuda_graph=None), optimizer, FULL, world) is None
    assert find_graphs(recipe.replace(cuda_graph=False), optimizer, FULL, world) is None


@pytest.mark.gpu
@pytest.mark.parametrize("drop", [0.0, 0.1])
def test_a_cuda_graph_gives_the_eager_losses_to_the_bit(drop):
    world = World(torch.device("cuda", 0))
    results = []
    for graph in (False, True):
        recipe = settings(cuda_graph=graph, amp=False)
        method, optimizer = setup(recipe, "cuda", drop)
        round_learning_rates(optimizer)
        results.append(
            losses(
                create_step(recipe, method, optimizer, FULL, find_graphs(recipe, optimizer, FULL, world)),
                epochs=6,
                device="cuda",
            )
        )
    assert results[0] == results[1]


# Waiting


def test_an_epoch_reads_the_device_only_where_a_line_is_due(monkeypatch):
    recipe = settings(log_interval=2, clip_grad=1.0)
    method, optimizer = setup(recipe)
    step = create_step(recipe, method, optimizer, FULL)
    reads = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, original=original, name=name, **kwargs):
            reads.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    loader = batches((8, 8, 8, 8, 5))
    train_one_epoch(method, loader, step, recipe, LossLog(0, "ce"), Progress(5, visible=False), lambda steps: None)
    assert reads == ["tolist"] * 3  # after steps 2 and 4, and at the end


def test_logged_losses_go_by_name_and_are_the_same_in_every_step():
    log = LossLog(0, "mine")
    log.add({"loss": torch.tensor(1.0), "a": torch.tensor(2.0)})
    log.add({"a": torch.tensor(4.0), "loss": torch.tensor(3.0)})
    for other in (("loss",), ("loss", "b"), ("loss", "a", "b")):
        with pytest.raises(MbibError, match=f"method 'mine': .* in those before loss, a; got {', '.join(other)}"):
            log.add(dict.fromkeys(other, torch.tensor(1.0)))
    assert log.read() == {"loss": 2.0, "a": 3.0}


def test_logged_losses_are_means_over_the_processes(monkeypatch):
    def of_two(value):
        problem, rows = value
        return [value, (problem, [[10 * part for part in row] for row in rows])]

    monkeypatch.setattr(epoch_module, "of_all", of_two)
    log = LossLog(0, "mbib", {"loss": 2.0, "loss_z": 1.0}, steps=2)
    for loss in (1.0, 3.0):
        log.add({"loss": torch.tensor(loss), "loss_z": torch.tensor(0.5)})
    assert log.read() == {"loss": 6.0, "loss_z": 6.5 / 4}
    assert log.sums == {"loss": 2.0 + 5.5 + 16.5, "loss_z": 1.0 + 2 * 2.75}


@pytest.mark.parametrize("amp", [False, True])
def test_a_first_loss_that_is_not_finite_names_what_gives_it(amp):
    log = LossLog(0, "mine", amp=amp)
    log.add({"loss": torch.tensor(float("nan"))})
    told = r"'mine': the loss is nan before any update: look at its formula and settings, and at the weights that it"
    with pytest.raises(NoFirstLossError, match=told) as caught:
        log.read()
    assert str(caught.value).endswith("; or try --no-amp" if amp else "starts from")


def test_of_several_processes_a_first_loss_that_is_not_finite_comes_before_a_later_one(monkeypatch):
    """The first process has its own in step 2, the second in step 1."""
    logs = [LossLog(0, "mine") for _ in range(2)]
    for log, losses in zip(logs, [(1.0, float("nan")), (float("inf"), 1.0)], strict=True):
        for loss in losses:
            log.add({"loss": torch.tensor(loss)})
    monkeypatch.setattr(epoch_module, "of_all", lambda value: [value])
    with pytest.raises(NoFirstLossError) as second:
        logs[1].read()
    monkeypatch.setattr(epoch_module, "of_all", lambda value: [value, (second.value, [])])
    with pytest.raises(NonFiniteLossError, match="the loss is inf before any update"):
        logs[0].read()


def test_a_loss_without_a_gradient_names_the_method(monkeypatch):
    recipe = settings("ce")
    method, optimizer = setup(recipe)
    step = create_step(recipe, method, optimizer, FULL)
    monkeypatch.setattr(type(method), "loss", lambda self, logits, targets: {"loss": logits["z"].detach().mean()})
    with pytest.raises(MbibError, match=r"method 'ce': its loss has no gradient: .*detach\(\)"):
        step(next(iter(batches())))
