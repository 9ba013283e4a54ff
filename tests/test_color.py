"""Batched colour jitter against torchvision's: parameters by distribution, images by pixel."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image
from scipy import stats
from torchvision.transforms import ColorJitter

from mbib_timm.data import color
from mbib_timm.data.color import color_jitter, draw_color_jitter

OPERATIONS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
ORDERS = list(itertools.permutations(range(3)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Parameters


@pytest.mark.parametrize("strength", [0.4, 1.5])
def test_parameters_are_distributed_as_torchvisions(strength):
    count = 4000
    factors, orders = draw_color_jitter(count, strength, generator())
    assert (factors.dtype, orders.dtype) == (torch.float32, torch.int64)
    jitter = ColorJitter(strength, strength, strength)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        drawn = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, None) for _ in range(count)]
    for i in range(3):
        assert stats.ks_2samp(factors[:, i].numpy(), [values[i + 1] for values in drawn]).pvalue > 1e-3
    assert stats.spearmanr(factors.numpy()).pvalue[np.triu_indices(3, 1)].min() > 1e-3
    theirs = [ORDERS.index(tuple(i for i in order.tolist() if i < 3)) for order, *_ in drawn]
    ours = [ORDERS.index(tuple(order)) for order in orders.tolist()]
    counts = np.stack([np.bincount(which, minlength=6) for which in (ours, theirs)])
    assert stats.chi2_contingency(counts).pvalue > 1e-3
    assert stats.kruskal(*(factors[np.array(ours) == i, 0].numpy() for i in range(6))).pvalue > 1e-3


def test_without_strength_images_stay_as_they_are():
    images = torch.randint(0, 256, (9, 5, 7, 3), dtype=torch.uint8, generator=generator())
    assert torch.equal(color_jitter(images, *draw_color_jitter(9, 0.0, generator())), images)


def test_the_generator_alone_decides():
    torch.manual_seed(9)
    before = torch.get_rng_state()
    first, second, other = (draw_color_jitter(50, 0.4, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for i in range(2):
        assert torch.equal(first[i], second[i])
        assert not torch.equal(first[i], other[i])


# Pixels


def batch(channels, count=48, height=23, width=31):
    """Return noise of all contrasts and colour casts, and parameters that go through all orders."""
    images = torch.rand(count, height, width, channels, generator=generator())
    spread = torch.rand(count, 1, 1, channels, generator=generator(1))
    images = (256 * (images * spread + (1 - spread) * images.flip(0)[:, :1, :1])).to(torch.uint8)
    factors, _ = draw_color_jitter(count, 1.2, generator(2))
    factors[:4] = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.5, 1.5, 2.0], [2.0, 0.0, 1.0]])
    return images, factors, torch.tensor(ORDERS).repeat(count // 6, 1)


@pytest.mark.parametrize("channels", [3, 1])
def test_images_are_torchvisions_by_pixel(channels):
    images, factors, orders = batch(channels)
    changed = color_jitter(images, factors, orders)
    assert changed.dtype == torch.uint8
    differing = []
    for before, after, factor, order in zip(images.numpy(), changed.numpy(), factors.tolist(), orders, strict=True):
        picture = Image.fromarray(before if channels == 3 else before[:, :, 0])
        for operation in order.tolist():
            picture = OPERATIONS[operation](picture, factor[operation])
        difference = np.abs(np.asarray(picture).reshape(before.shape).astype(int) - after)
        assert difference.max() <= 1
        differing.append((difference > 0).mean())
    assert np.mean(differing) < 1e-3


def test_saturation_does_nothing_to_one_channel():
    images, factors, orders = batch(1)
    factors[:, :2] = 1
    assert torch.equal(color_jitter(images, factors, orders), images)


@pytest.mark.parametrize("limit", [1, 20_000])
def test_an_image_does_not_depend_on_the_others_or_on_blocks(monkeypatch, limit):
    images, factors, orders = batch(3)
    together = color_jitter(images, factors, orders)
    alone = color_jitter(images[7:8], factors[7:8], orders[7:8])
    assert torch.equal(alone[0], together[7])
    monkeypatch.setattr(color, "CPU_BLOCK_BYTES", limit)
    assert torch.equal(color_jitter(images, factors, orders), together)


def test_nothing_on_the_device_is_read():
    # A tensor of the meta device has nothing to read: what would wait for a GPU's values raises here.
    changed = color_jitter(*(values.to("meta") for values in batch(3)))
    assert changed.shape == (48, 23, 31, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_images_on_a_gpu_are_those_on_the_cpu():
    parameters = batch(3)
    expected = color_jitter(*parameters).int()
    changed = color_jitter(*(values.cuda() for values in parameters)).cpu().int()
    assert (changed - expected).abs().max() <= 1
