"""What the first run on CUDA would trip over, over all methods: ``pytest -m gpu tests/test_cuda.py`` on a machine with
a GPU; without one the same checks run on the CPU, where graphs are emulated.
"""

import pytest
import torch
from emulated_graphs import EmulatedGraphs
from test_methods import EPOCHS, TRAINED, batches_for, make

from mbib_timm.capturing import Graphs
from mbib_timm.recipe import Recipe
from mbib_timm.training.optimization import Precision, create_optimizer, round_learning_rates
from mbib_timm.training.step import create_step

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FULL = Precision(None, None)
# The first four batches are whole: the step is captured in the first epoch.
SIZES = (8, 8, 8, 8, 5)


def graphs_of(device):
    return EmulatedGraphs() if device == "cpu" else Graphs(torch.device(device))


def epochs_of(name, device, *, graphs=None, precision=FULL, seed=0, epochs=EPOCHS, **keys):
    """Train a method's small network over all epochs, whose learning rates, constants and batches differ.

    Returns:
        The loss parts of every step, and the method's state.
    """
    method = make(name)
    method.to(device)
    method.device = torch.device(device)
    recipe = Recipe(**{"method": "ce", "model": "resnet18", "opt": "momentum", "opt_kwargs": {"fused": True}, **keys})
    method.freeze_all_but(method.part, method.frozen_bn)
    optimizer = create_optimizer(recipe, method)
    step = create_step(recipe, method, optimizer, precision, graphs)
    torch.manual_seed(seed)
    found = []
    for epoch in range(epochs):
        method.train()
        method.start_epoch(epoch)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - epoch / epochs)
        round_learning_rates(optimizer)
        for streams in batches_for(name, SIZES, seed=epoch, device=device):
            found.append({part: value.item() for part, value in step(streams).items()})
    return found, {key: value.cpu() for key, value in method.state_dict().items()}


def assert_same(one, other, **tolerance):
    (losses, state), (expected, expected_state) = one, other
    assert len(losses) == len(expected)
    for found, wanted in zip(losses, expected, strict=True):
        assert found == (pytest.approx(wanted, **tolerance) if tolerance else wanted)
    if not tolerance:
        assert all(torch.equal(value, expected_state[key]) for key, value in state.items())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TRAINED)
def test_captured_steps_give_the_eager_losses_and_state_to_the_bit(name, device):
    """Captured in the first epoch: what an epoch's start, a schedule or a step changes later must change in memory."""
    graphs = graphs_of(device)
    assert_same(epochs_of(name, device, graphs=graphs), epochs_of(name, device))
    assert device != "cpu" or graphs.captures == 1
