"""What the first run on CUDA would trip over, over all methods: ``pytest -m gpu tests/test_cuda.py`` on a machine with
a GPU. Without one the same checks run on the CPU, where graphs are emulated and compiling stops before code is made.
"""

import copy
import functools
import gc
import socket
import warnings
import weakref

import numpy as np
import pytest
import timm
import torch
import torch.multiprocessing as mp
from emulated_graphs import EmulatedGraphs
from safetensors.torch import load_file
from test_methods import EPOCHS, TRAINED, batches_for, make
from test_step import TwoHeads
from timm.layers import BatchNormAct2d
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mbib_timm.capturing import Graphs
from mbib_timm.cli import main
from mbib_timm.compiling import CompileOrEager, _with_backward
from mbib_timm.data import Batch
from mbib_timm.environment import World
from mbib_timm.errors import LostDeviceError, MbibError
from mbib_timm.evaluation import AnswerLog, evaluate
from mbib_timm.methods import METHODS
from mbib_timm.models.head_outputs import head_logits
from mbib_timm.recipe import Recipe, find_recipe, load_recipe
from mbib_timm.sweeps import sweep_runs
from mbib_timm.sweeps.sweep import load_sweep
from mbib_timm.training import run as run_module
from mbib_timm.training import setup as set_up_module
from mbib_timm.training import stages, train
from mbib_timm.training import step as step_module
from mbib_timm.training.optimization import (
    Precision,
    create_optimizer,
    precision_line,
    restore_optimizer,
    round_learning_rates,
)
from mbib_timm.training.run_folder import RunFolder
from mbib_timm.training.setup import _synchronized
from mbib_timm.training.step import create_step, loss_parts

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FULL = Precision(None, None)
CONTENTLESS = pytest.mark.skipif(
    torch.__version__ < "2.10" and not torch.cuda.is_available(),
    reason="before 2.10 torch asks CUDA for its stream for tensors without content too, and aborts without a driver",
)
# The first four batches are whole: the step is captured in the first epoch.
SIZES = (8, 8, 8, 8, 5)


@pytest.fixture(autouse=True)
def full_precision():
    """Devices are compared: neither TF32 nor kernels that are chosen by their time."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32
    cudnn.allow_tf32 = cudnn.benchmark = matmul.allow_tf32 = False
    yield
    cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = before


def graphs_on(device):
    return EmulatedGraphs() if device == "cpu" else Graphs(CUDA)


def trained(name, device, *, graphs=None, precision=FULL, epochs=EPOCHS, dtype=torch.float32, **keys):
    """Train a method's small network; learning rates, constants and batches differ from epoch to epoch.

    In float32 another order of additions is worth some percent after a few steps; in float64 nothing.

    Returns:
        The loss parts of every step, and the method's state.
    """
    method = (make(name) if isinstance(name, str) else name()).to(device, dtype)
    method.device = torch.device(device)
    recipe = Recipe(**{"method": "ce", "model": "resnet18", "opt": "momentum", "opt_kwargs": {"fused": True}, **keys})
    method.freeze_all_but(method.part, method.frozen_bn)
    optimizer = create_optimizer(recipe, method)
    step = create_step(recipe, method, optimizer, precision, graphs)
    torch.manual_seed(0)
    found = []
    for epoch in range(epochs):
        method.train()
        method.start_epoch(epoch)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - epoch / EPOCHS)
        round_learning_rates(optimizer)
        for streams in batches_for(method.name, SIZES, seed=epoch, device=device):
            streams = tuple(batch._replace(views=tuple(view.to(dtype) for view in batch.views)) for batch in streams)
            found.append({part: value.item() for part, value in step(streams).items()})
    return found, {key: value.cpu() for key, value in method.state_dict().items()}


def assert_same(one, other):
    assert one[0] == other[0]
    assert all(torch.equal(value, other[1][key]) for key, value in one[1].items())


def assert_close(one, other, rel):
    for found, expected in zip(one[0], other[0], strict=True):
        assert found == pytest.approx(expected, rel=rel)


# Captured, compiled, eager: all methods


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TRAINED)
def test_captured_steps_give_the_eager_losses_and_state_to_the_bit(name, device):
    """Captured in the first epoch: what an epoch's start, a schedule or a step changes later must change in memory."""
    graphs = graphs_on(device)
    assert_same(trained(name, device, graphs=graphs), trained(name, device))
    assert device != "cpu" or graphs.captures == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "keys",
    [
        {"clip_grad": 0.1},
        {"clip_grad": 0.01, "clip_mode": "value"},
        {"clip_grad": 0.01, "clip_mode": "agc"},
        {"opt": "adamw", "lr": 0.001},
        {"precision": Precision(torch.bfloat16, None)},
    ],
    ids=str,
)
def test_captured_steps_clip_and_cast_as_eager_ones(keys, device):
    if device == "cuda" and keys.get("opt") == "adamw":
        keys = {**keys, "opt_kwargs": {"fused": True, "capturable": True}}
    captured = trained("mbib", device, graphs=graphs_on(device), epochs=3, **keys)
    assert_same(captured, trained("mbib", device, epochs=3, **keys))
    assert captured[0] != trained("mbib", device, epochs=3)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TRAINED)
def test_compiled_and_captured_steps_give_the_eager_losses(name, device, monkeypatch):
    if device == "cpu":  # code for every method takes minutes
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    compiled = CompileOrEager(loss_parts, "the training step")
    monkeypatch.setattr(step_module, "compiled_loss_parts", compiled)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(captured|compiled)")
        found = trained(name, device, graphs=graphs_on(device), epochs=2, dtype=torch.float64, torchcompile=True)
    assert_close(found, trained(name, device, epochs=2, dtype=torch.float64), 1e-8)
    assert not compiled.failed


@pytest.mark.gpu
@pytest.mark.parametrize("name", TRAINED)
def test_captured_losses_on_a_device_are_the_eager_ones_on_the_cpu(name):
    captured = trained(name, "cuda", graphs=graphs_on("cuda"), epochs=2, dtype=torch.float64)
    assert_close(captured, trained(name, "cpu", epochs=2, dtype=torch.float64), 1e-8)


def on_contentless_cuda(method, batches):
    """Take a step but for the backward pass and the optimizer, which need a device, on tensors without content of a
    CUDA device that need not be there: mixed devices, waits and copies from the host raise."""

    def on_cuda(value):
        return torch.empty(value.shape, dtype=value.dtype, device=CUDA)

    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=False):
            method._apply(on_cuda)
            assert all(parameter.device == CUDA for parameter in method.parameters())
            method.device = CUDA
            method.train()
            method.start_epoch(EPOCHS - 1)
            there = tuple(Batch(tuple(map(on_cuda, b.views)), on_cuda(b.targets), on_cuda(b.index)) for b in batches)
            parts = loss_parts(method, there, None)
            assert all(value.device == CUDA for value in parts.values())
            with torch.no_grad():
                method.after_step()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@CONTENTLESS
@pytest.mark.parametrize("name", TRAINED)
def test_all_that_a_step_uses_is_on_the_device(name):
    method = make(name)
    method.freeze_all_but(method.part, method.frozen_bn)
    on_contentless_cuda(method, batches_for(name, (8,))[0])


class Elsewhere(METHODS["ce"]):
    """Adds what is no buffer, and so stays where it was."""

    def start_epoch(self, epoch):
        self.offset = torch.zeros(5)

    def loss(self, logits, targets):
        return super().loss({name: values + self.offset for name, values in logits.items()}, targets)


# The emulation finds what a graph would freeze


class Frozen(METHODS["ce"]):
    """Changes the loss by Python where a graph does not see it: a number, another tensor, a branch."""

    kind = "number"

    def __init__(self, *args):
        super().__init__(*args)
        self.factor, self.buffer = 1.0, torch.ones(())

    def start_epoch(self, epoch):
        self.factor = 1.0 + epoch
        self.buffer = torch.full((), 1.0 + epoch)

    def loss(self, logits, targets):
        parts = super().loss(logits, targets)
        if self.kind == "branch":
            return {"loss": parts["loss"] * 2 if self.factor > 2 else parts["loss"]}
        return {"loss": parts["loss"] * (self.factor if self.kind == "number" else self.buffer)}


class Waiting(METHODS["ce"]):
    """Asks the device in every step."""

    def loss(self, logits, targets):
        parts = super().loss(logits, targets)
        return {"loss": parts["loss"] * (2 if parts["loss"] > 1 else 1)}


def made(base, **attributes):
    def build():
        method = make(type(base.__name__, (base,), {**attributes, "name": "ce"}))
        return method

    return build


@pytest.mark.parametrize("kind", ["number", "tensor", "branch"])
def test_the_emulation_notices_what_a_graph_would_freeze(kind):
    build = made(Frozen, kind=kind)
    captured, eager = (trained(build, "cpu", graphs=graphs, epochs=4) for graphs in (EmulatedGraphs(), None))
    assert captured[0][: len(SIZES)] == eager[0][: len(SIZES)]
    assert captured[0] != eager[0]


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_waits_for_the_device_runs_as_it_is_and_says_so(device):
    graphs = graphs_on(device)
    with pytest.warns(UserWarning, match=r"the training step is not captured: it waits for the device \("):
        found = trained(made(Waiting), device, graphs=graphs, epochs=3)
    assert_same(found, trained(made(Waiting), device, epochs=3))
    assert device != "cpu" or graphs.captures == 0


@CONTENTLESS
@pytest.mark.parametrize("kind", [Elsewhere, Waiting])
def test_what_is_on_another_device_or_waits_is_noticed_without_one(kind):
    with pytest.raises(RuntimeError, match=r"device|_local_scalar_dense"):
        on_contentless_cuda(made(kind)(), batches_for("ce", (8,))[0])


# Compiling


@pytest.mark.skipif(not _with_backward(), reason="this torch compiles the backward pass when it is first taken")
def test_where_the_backward_pass_cannot_be_compiled_the_step_is_eager_from_the_start(monkeypatch):
    from torch._dynamo.backends.common import aot_autograd

    def broken(*args):
        raise RuntimeError("no backward pass")

    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=broken)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    compiled = CompileOrEager(loss_parts, "the training step")
    monkeypatch.setattr(step_module, "compiled_loss_parts", compiled)
    with pytest.warns(UserWarning, match="the training step cannot be compiled, and runs eagerly: .*no backward pass"):
        found = trained("bsce", "cpu", epochs=1, torchcompile=True)
    assert compiled.failed
    assert_same(found, trained("bsce", "cpu", epochs=1))


def test_inductors_options_for_cuda_are_for_cuda_alone_and_exist(monkeypatch):
    seen, original = {}, torch.compile

    def compile(function, options=None, **kwargs):
        seen[device] = options
        return original(function, backend="eager")

    monkeypatch.setattr(torch, "compile", compile)
    double = CompileOrEager(lambda x: 2 * x, "it")
    for device in ("cpu", "cuda"):
        assert double.on(torch.device(device))(torch.ones(2)).tolist() == [2, 2]
    assert seen == {"cpu": None, "cuda": {"combo_kernels": True}}
    original(lambda x: x, options=seen["cuda"])  # refuses unknown ones


# Evaluation


class TwoHeadsEvaluated(TwoHeads):
    prediction_heads = ("v1", "z")

    def forward_heads(self, x):
        return TwoHeads.forward(self, x)

    def forward(self, x):
        return torch.stack(super().forward(x)).mean(dim=0)


def evaluated(device, graphs, dtype=None):
    torch.manual_seed(0)
    model = TwoHeadsEvaluated().to(device)
    found = []
    for epoch in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape).to(device)
        loader = [batch for (batch,) in batches_for("ce", SIZES, classes=3, seed=epoch, device=device)]
        keys = dict(device=torch.device(device), amp_dtype=dtype, graphs=graphs, channels_last=True)
        log = AnswerLog()
        found.append(
            (evaluate(model, loader, np.array([50, 20, 5]), answers=log, **keys), log.read().predicted.tolist())
        )
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_captured_evaluation_counts_the_same_of_weights_that_change(device, dtype):
    graphs = graphs_on(device)
    assert evaluated(device, graphs, dtype) == evaluated(device, None, dtype)
    assert device != "cpu" or graphs.captures == 1


def test_an_evaluation_casts_the_weights_once(monkeypatch):
    """And gives what casting them for every batch gives."""
    torch.manual_seed(0)
    model = TwoHeadsEvaluated()
    loader = [batch for (batch,) in batches_for("ce", SIZES, classes=3)]
    casts = []

    class Casts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            cast = function.overloadpacket is torch.ops.aten._to_copy
            if cast and any(arguments[0] is parameter for parameter in model.parameters()):
                casts.append(function)
            return function(*arguments, **(named or {}))

    with Casts():
        found = evaluate(model, loader, np.array([50, 20, 5]), device=CPU, amp_dtype=torch.bfloat16)
    # Weights and biases of a convolution and two linear layers.
    assert len(casts) == 6
    logits = []
    model.eval()
    for batch in loader:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits.append((head_logits(model, batch.images)["prediction"].float(), batch.targets))
    values, targets = (torch.cat(each) for each in zip(*logits, strict=True))
    loss = torch.nn.functional.cross_entropy(values.double(), targets).item()
    assert found["prediction"].nll == pytest.approx(loss, rel=1e-6)


# Whole runs


def digits(tmp_path, **keys):
    base = dict(
        epochs=3, warmup_epochs=1, batch_size=32, workers=0, imbalance_max=64, checkpoint_seconds=0, opt="momentum",
        opt_kwargs={"fused": True}, output=str(tmp_path), device="cpu", model_kwargs={}, method="bsce",
        model="cifar_resnet20",
    )  # fmt: skip
    return load_recipe(find_recipe("cifar_resnet32.ce_digits"), {**base, **keys})


class CrashError(Exception):
    """Stands for whatever ends a process."""


def interrupted(monkeypatch, recipe, error=CrashError, epoch=1):
    """Train until an epoch begins that never ends."""
    with monkeypatch.context() as patch:
        original = run_module.Run._train_epoch

        def stop(self, number):
            if number == epoch:
                raise error
            original(self, number)

        patch.setattr(run_module.Run, "_train_epoch", stop)
        with pytest.raises(type(error) if isinstance(error, Exception) else error):
            train(recipe, "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("captured", "eager"),
        ("eager", "captured"),
        pytest.param("cpu", "cuda", marks=pytest.mark.gpu),
        pytest.param("cuda", "cpu", marks=pytest.mark.gpu),
        pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
    ],
)
def test_a_run_resumes_on_another_device(tmp_path, monkeypatch, first, second):
    def on(place):
        if place == "captured":
            monkeypatch.setattr(set_up_module, "find_graphs", lambda *args: EmulatedGraphs())
        elif place == "eager":
            monkeypatch.undo()
        return "cuda" if place == "cuda" else "cpu"

    whole = train(digits(tmp_path / "whole", device=on(second)), "run")
    interrupted(monkeypatch, digits(tmp_path / "cut", device=on(first)))
    cut = train(digits(tmp_path / "cut", device=on(second), resume="auto"), "run")
    assert RunFolder(cut.folder).recipe().cuda_graph is (second in ("captured", "cuda"))
    one, other = (load_file(run.folder / "model.safetensors") for run in (whole, cut))
    if "cuda" in (first, second):
        assert all(value.isfinite().all() for value in other.values())
        assert cut.record.result.prediction.nll == pytest.approx(whole.record.result.prediction.nll, rel=0.2)
    else:
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_an_optimizers_state_does_not_say_how_this_device_computes():
    def optimizer(**kwargs):
        parameter = nn.Parameter(torch.ones(3))
        parameter.grad = torch.ones(3)
        return torch.optim.AdamW([parameter], lr=0.1, **kwargs)

    for given, own in (({"fused": True}, {"foreach": False}), ({"foreach": False}, {"fused": True})):
        there, here = optimizer(**given), optimizer(**own)
        there.step()
        there.param_groups[0]["lr"] = torch.tensor(0.05)  # as a captured step has it
        expected = {name: here.param_groups[0][name] for name in ("fused", "foreach", "capturable")}
        restore_optimizer(here, copy.deepcopy(there.state_dict()))
        assert {name: here.param_groups[0][name] for name in expected} == expected
        round_learning_rates(here)
        here.step()
        (state,) = here.state.values()
        assert state["step"] == 2


LOST = getattr(torch, "AcceleratorError", RuntimeError)(
    "CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later"
)


@pytest.mark.slow
def test_a_device_that_vanishes_ends_the_run_in_one_sentence_and_leaves_its_checkpoint(tmp_path, monkeypatch, capsys):
    keys = ["--epochs", "3", "--warmup-epochs", "1", "--imbalance-max", "64", "--device", "cpu", "--workers", "0"]
    argv = ["train", "cifar_resnet32.ce_digits", *keys, "--checkpoint-seconds", "0", "--experiment", "run"]
    assert main([*argv, "--output", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        original = step_module.training_step
        calls = []

        def lost(*args, **kwargs):
            calls.append(None)
            if len(calls) == 5:
                raise LOST
            return original(*args, **kwargs)

        patch.setattr(step_module, "training_step", lost)
        capsys.readouterr()
        assert main([*argv, "--output", str(tmp_path / "cut")]) == 1
    sentence = (
        "mbib: error: device cpu has failed: CUDA error: unspecified launch failure; continue with --resume auto\n"
    )
    assert capsys.readouterr().err.endswith(sentence)
    assert main([*argv, "--output", str(tmp_path / "cut"), "--resume", "auto"]) == 0
    one, other = (load_file(tmp_path / name / "run" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_device_that_vanishes_ends_a_sweep_too(tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text("recipe: cifar_resnet32.ce_digits\nseeds: [0, 1]\naxes: {lr: [0.1, 0.05]}\n")
    runs = []

    def lost(recipe, *args, **kwargs):
        runs.append(recipe)
        raise LostDeviceError("device cuda:0 has failed")

    monkeypatch.setattr(sweep_runs, "train", lost)
    with pytest.raises(LostDeviceError):
        sweep_runs.run_sweep(load_sweep(tmp_path / "own.yaml"), {}, tmp_path / "results")
    assert len(runs) == 1


@pytest.mark.parametrize("captured", [False, True])
def test_nothing_of_a_run_stays_in_memory(tmp_path, monkeypatch, captured):
    """Not even where an exception that somebody keeps holds the frames that called it, as matplotlib's parser does."""
    methods, kept, original = [], [], run_module.create_step

    def create_step(recipe, method, *args):
        methods.append(weakref.ref(method))
        return original(recipe, method, *args)

    def draw(*args):
        try:
            raise ValueError("kept")
        except ValueError as error:
            kept.append(error)

    monkeypatch.setattr(run_module, "create_step", create_step)
    monkeypatch.setattr(stages, "draw_figures", draw)
    if captured:
        monkeypatch.setattr(set_up_module, "find_graphs", lambda *args: EmulatedGraphs())
    monkeypatch.setattr(gc, "collect", None)
    gc.disable()
    try:
        train(digits(tmp_path, epochs=1, warmup_epochs=0), "run")
        assert kept
        assert [method() for method in methods] == [None]
    finally:
        gc.enable()


# Two processes


def two_processes(rank, port, device):
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    place = torch.device(device, 0) if device == "cuda" else CPU
    method = make("bsce").to(place)
    method.device = place
    recipe = Recipe(method="ce", model="resnet18", opt="momentum")
    optimizer = create_optimizer(recipe, method)
    method.prepare_distributed([0] if device == "cuda" else None)
    assert step_module.find_graphs(recipe, optimizer, FULL, World(place, rank, 2)) is None
    step = create_step(recipe, method, optimizer, FULL)
    method.train()
    for streams in batches_for("bsce", (8, 8, 5), seed=rank, device=device):
        step(streams)
    for parameter in method.parameters():
        both = [torch.empty_like(parameter, device="cpu") for _ in range(2)]
        torch.distributed.all_gather(both, parameter.detach().cpu())
        assert torch.equal(*both)
        assert both[0].isfinite().all()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_two_processes_on_one_device_keep_the_same_weights(device):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    method = "fork" if device == "cpu" else "spawn"
    mp.start_processes(two_processes, (port, device), nprocs=2, start_method=method)


# Synchronised batch normalisation


@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenetv4_conv_small", "cifar_resnet20"])
def test_synchronised_networks_compute_what_the_network_computes(name):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=5).eval()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias)
    images = torch.randn(4, 3, 32, 32)
    world = World(CUDA, 0, 2)
    converted = _synchronized(copy.deepcopy(network), Recipe(sync_bn=True), world)
    norms = [module for module in converted.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(module, nn.SyncBatchNorm) for module in norms)
    with torch.no_grad():
        torch.testing.assert_close(converted(images), network(images), rtol=0, atol=0)
        torch.manual_seed(1)
        expected = network.train()(images)
        torch.manual_seed(1)
        torch.testing.assert_close(converted.train()(images), expected, rtol=0, atol=0)
    if any(isinstance(module, BatchNormAct2d) for module in network.modules()):  # torch's own would not do
        other = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network)).eval()
        assert not torch.allclose(other(images), network.eval()(images), atol=0.1)


# Precision


@pytest.mark.parametrize(
    ("keys", "device", "side", "capability", "expected"),
    [
        ({}, "cpu", 224, None, "float32"),
        ({}, "cuda", 32, (9, 0), "float32"),
        ({}, "cuda", 63, (9, 0), "float32"),
        ({}, "cuda", 64, (9, 0), "bfloat16"),
        ({}, "cuda", 224, (8, 0), "bfloat16"),
        ({}, "cuda", 224, (7, 5), "float32"),
        ({"amp": True}, "cuda", 32, (8, 6), "bfloat16"),
        ({"amp": False}, "cuda", 224, (9, 0), "float32"),
        ({"amp": True}, "cuda", 224, (7, 5), "recipe key 'amp_dtype': Old card computes no bfloat16"),
        ({"amp_dtype": "float16"}, "cuda", 224, (7, 5), "float16"),
    ],
)
def test_precision_is_chosen_by_device_and_image_size(monkeypatch, keys, device, side, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old card")
    recipe, place, size = Recipe(**keys), torch.device(device), (3, side, side)
    if expected.startswith("recipe key"):
        with pytest.raises(MbibError, match=expected):
            Precision.of(recipe, place, size)
        return
    assert Precision.of(recipe, place, size).name == expected
    fell_back = keys == {} and side >= 64 and capability == (7, 5)
    assert (precision_line(recipe, place, size) is not None) == fell_back


def test_only_cuda_gets_timms_switches(monkeypatch):
    from mbib_timm import environment

    monkeypatch.setattr(environment, "keep_freed_memory", lambda: None)
    for device, on in ((CPU, False), (CUDA, True)):
        environment.prepare(device)
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark) == (on, on)
