"""SADE and SADE + MBIB: the numbers of METHODS 4.3 and 4.4, and what they are made of."""

import numpy as np
import pytest
import timm
import torch
from tiny import EXPERTS, MBIB_EXPERTS, OBSERVATIONS, Tiny

from mbib_timm.data.long_tail import exponential_profile
from mbib_timm.errors import MbibError
from mbib_timm.methods import METHODS, Facts
from mbib_timm.methods.sade import expert_offsets, reversed_counts

COUNTS = [500, 120, 40, 9, 3]
FEW = [500, 50, 5]
Z = torch.tensor([[2, 1, -1], [1, 0, 0.5]], dtype=torch.float64)
TARGETS = torch.tensor([2, 0])


def make(name, network=None, counts=COUNTS, **settings):
    heads = {"sade": EXPERTS, "sade_mbib": MBIB_EXPERTS, "mbib": OBSERVATIONS}[name]
    torch.manual_seed(0)
    network = network or Tiny(len(counts), heads)
    kind = METHODS[name]
    return kind(network, kind.Settings(**settings), Facts(np.array(counts), 10), torch.device("cpu")).double()


def random_logits(heads, batch=6):
    generator = torch.Generator().manual_seed(0)
    logits = {head: 2 * torch.randn(batch, len(COUNTS), generator=generator, dtype=torch.float64) for head in heads}
    return logits, torch.randint(0, len(COUNTS), (batch,), generator=generator)


# METHODS 4.3


def test_offsets_on_three_classes():
    assert (reversed_counts(FEW) / sum(FEW)).tolist() == pytest.approx([0.009009, 0.090090, 0.900901], abs=1e-6)
    first, second, third = expert_offsets(FEW, 2.0)
    assert first.tolist() == [0, 0, 0]
    assert second.tolist() == pytest.approx([-0.104360, -2.406945, -4.709530], abs=1e-6)
    assert third.tolist() == pytest.approx([9.314700, 2.406945, -4.500810], abs=1e-6)
    torch.testing.assert_close(third - 3 * second, (third - 3 * second).mean().expand(3))


def test_the_third_expert_over_corrects_geometric_counts():
    """pi_i pi_rev_i is constant where counts are geometric: its offset is 3 log pi, up to a constant."""
    counts = [round(1e6 * 0.5**i) for i in range(8)]
    _, second, third = expert_offsets(counts, 2.0)
    difference = third - 3 * second
    assert (difference - difference.mean()).abs().max() < 1e-3


def test_the_loss_on_three_classes():
    method = make("sade", counts=FEW)
    parts = method.loss(dict.fromkeys(EXPERTS, Z), TARGETS)
    assert tuple(parts) == ("loss", *(f"loss_{expert}" for expert in EXPERTS))
    assert [value.item() for value in parts.values()] == pytest.approx(
        [14.264633, 2.014641, 3.841869, 8.408123], abs=2e-6
    )
    assert not any(value.requires_grad for key, value in parts.items() if key != "loss")


def test_ranks_of_equal_counts_are_a_permutation():
    """Unstable or half-stable ranks would give two classes the count of one."""
    counts = exponential_profile(100, 500, 100)
    for given in (counts, counts[::-1], [7] * 9, [3, 9, 3, 9, 3, 1]):
        reverse = reversed_counts(np.array(given)).tolist()
        assert sorted(reverse) == sorted(given)
        order = np.argsort(np.array(given), kind="stable")
        assert np.array(reverse)[order].tolist() == sorted(given, reverse=True)
    assert reversed_counts([7] * 9).tolist() == [7] * 9


# METHODS 4.4


def test_one_expert_of_sade_mbib_is_mbib():
    """The second expert's offset is MBIB's, log n up to a constant: term by term."""
    logits, targets = random_logits(MBIB_EXPERTS)
    settings = {"beta": 3.0, "gamma": 0.5, "observation_weights": [0.2, 0.5, 1.0]}
    parts = make("sade_mbib", **settings).loss(logits, targets)
    mbib = make("mbib", **settings).loss({h: logits[f"expert2_{h}"] for h in OBSERVATIONS}, targets)
    for head in OBSERVATIONS:
        torch.testing.assert_close(parts[f"bsc_expert2_{head}"], mbib[f"bsc_{head}"], rtol=1e-6, atol=0)
    for head in OBSERVATIONS[:-1]:
        name = f"vsd_expert2_{head}_expert2_z"
        torch.testing.assert_close(parts[name], mbib[f"vsd_{head}_z"])


# Networks


def test_sade_trains_cosine_classifiers_of_its_scale():
    kind = METHODS["sade"]
    given = {}
    network = kind.build_network(kind.Settings(scale=16.0), lambda **kwargs: given.update(kwargs) or kwargs)
    assert network == given == {"classifier": "cosine", "classifier_scale": 16.0}


@pytest.mark.parametrize(
    ("name", "model", "kwargs", "message"),
    [
        ("sade", "cifar_resnet20", {}, "exactly three experts.*this one has none"),
        ("sade", "mbib_resnet20", {}, "exactly three experts.*this one has none"),
        ("sade", "experts_resnet20", {"experts": 4}, "exactly three experts.*this one has 4 experts"),
        ("sade", "experts_resnet20", {"experts": 1}, "exactly three experts.*this one has 1 expert$"),
        (
            "sade",
            "mbib_experts_resnet20",
            {},
            "experts with one head each.*first has expert1_v1, .*see method sade_mbib",
        ),
        ("sade_mbib", "mbib_experts_resnet20", {"experts": 2}, "exactly three experts.*this one has 2 experts"),
        ("sade_mbib", "mbib_resnet20", {}, "exactly three experts.*this one has none"),
        ("sade_mbib", "experts_resnet20", {}, "observations and a bottleneck each, such as mbib_experts_resnet20"),
        (
            "sade_mbib",
            "mbib_experts_resnet20",
            {"training_heads": False},
            "'observation_weights' of method 'sade_mbib': expected 1 numbers, one for each of expert1_v3",
        ),
    ],
)
def test_networks_that_do_not_fit_are_refused(name, model, kwargs, message):
    network = timm.create_model(model, num_classes=5, **kwargs)
    with pytest.raises(MbibError, match=message):
        make(name, network)


def test_a_step_trains_every_parameter():
    for name, model in (("sade", "experts_resnet20"), ("sade_mbib", "mbib_experts_resnet20")):
        method = make(name, timm.create_model(model, num_classes=5)).float()
        method.train()
        logits = method.logits(torch.randn(4, 3, 32, 32))
        method.loss(logits, torch.tensor([0, 1, 2, 3]))["loss"].backward()
        assert [key for key, p in method.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
