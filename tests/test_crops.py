"""Batched crops against torchvision's and timm's: boxes by distribution, resized and shifted crops by pixel."""

import random

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image
from scipy import stats
from timm.data.transforms import RandomResizedCropAndInterpolation

from mbib_timm.data import crops as crops_module
from mbib_timm.data.crops import PadAndCrop, draw_resized_crops, resized_crops
from mbib_timm.data.decoding import DecodedImages

# Boxes and resized crops


SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


WAYS = pytest.mark.parametrize("way", [crops_module._by_interpolation, crops_module._by_products])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def statistics(boxes):
    top, left, height, width = np.asarray(boxes, dtype=float).T
    return {"top": top, "left": left, "height": height, "width": width, "area": height * width, "ratio": width / height}


@pytest.mark.parametrize("size", [(375, 500), (500, 120), (30, 90), (100, 70), (40, 40)])
@pytest.mark.parametrize(("scale", "ratio"), [(SCALE, RATIO), ((0.5, 0.9), (0.5, 3.0))])
def test_boxes_are_distributed_as_timms(size, scale, ratio):
    random.seed(0)
    count = 5000
    image = torch.empty(3, *size, device="meta")
    timms = [RandomResizedCropAndInterpolation.get_params(image, scale, ratio) for _ in range(count)]
    ours = draw_resized_crops(torch.tensor([size]).expand(count, 2), scale, ratio, generator(1))
    for (name, got), expected in zip(statistics(ours).items(), statistics(timms).values(), strict=True):
        assert stats.ks_2samp(got, expected).pvalue > 1e-3, name


@pytest.mark.parametrize("size", [(100, 10), (10, 100), (99, 10), (10, 10)])
def test_where_no_attempt_fits_the_box_is_timms_central_one(size):
    image = torch.empty(3, *size, device="meta")
    scale = (4.0, 5.0)
    boxes = draw_resized_crops(torch.tensor([size]), scale, RATIO, generator())
    assert tuple(boxes[0].tolist()) == RandomResizedCropAndInterpolation.get_params(image, scale, RATIO)


def test_boxes_lie_in_their_images():
    sizes = torch.randint(1, 9, (5000, 2), generator=generator())
    boxes = draw_resized_crops(sizes, SCALE, RATIO, generator(1))
    assert boxes.dtype == torch.int64
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()


def test_a_box_depends_on_its_own_size_and_the_generator_alone():
    sizes = torch.randint(1, 500, (200, 2), generator=generator())
    boxes = draw_resized_crops(sizes, SCALE, RATIO, generator(1))
    others = sizes.flip(0)
    others[100] = sizes[100]
    torch.manual_seed(9)
    before = torch.get_rng_state()
    assert torch.equal(draw_resized_crops(others, SCALE, RATIO, generator(1))[100], boxes[100])
    assert torch.equal(draw_resized_crops(sizes, SCALE, RATIO, generator(1)), boxes)
    assert not torch.equal(draw_resized_crops(sizes, SCALE, RATIO, generator(2)), boxes)
    assert torch.equal(torch.get_rng_state(), before)
    used = [generator(1) for _ in range(2)]
    for source, drawn_for in zip(used, (sizes, others), strict=True):
        draw_resized_crops(drawn_for, SCALE, RATIO, source)
    assert torch.equal(used[0].get_state(), used[1].get_state())


# Height and width of an image, and the box: whole images, single pixels, borders, corners.
CASES = [
    ((40, 60), (0, 0, 40, 60)),
    ((40, 60), (39, 59, 1, 1)),
    ((40, 60), (0, 20, 1, 33)),
    ((1, 1), (0, 0, 1, 1)),
    ((1, 30), (0, 25, 1, 5)),
    ((33, 7), (3, 2, 30, 5)),
    ((32, 24), (0, 0, 32, 24)),
    ((90, 120), (10, 20, 80, 100)),
    ((375, 500), (100, 200, 275, 300)),
    ((375, 500), (0, 0, 375, 499)),
    ((500, 11), (0, 0, 500, 11)),
    ((90, 120), (40, 60, 2, 3)),
]


def block(channels):
    """Return each case with flips and filters in every combination, as the arguments that `resized_crops` takes."""
    rng = np.random.RandomState(0)
    cases = CASES * 4
    blocks = []
    for i, (size, _) in enumerate(cases):
        noise = rng.randint(0, 256, (size[0] * size[1], channels), dtype=np.uint8)
        blocks.append(np.where(noise > 127, 255, 0).astype(np.uint8) if i % 3 == 0 else noise)
    sizes = torch.tensor([size for size, _ in cases])
    return {
        "pixels": torch.from_numpy(np.concatenate([np.zeros((1, channels), np.uint8), *blocks])),
        "starts": 1 + sizes.prod(dim=1).cumsum(0) - sizes.prod(dim=1),
        "sizes": sizes,
        "boxes": torch.tensor([box for _, box in cases]),
        "flips": torch.arange(len(cases)) >= 2 * len(CASES),
        "bicubic": torch.arange(len(cases)) // len(CASES) % 2 == 1,
    }


def only(images, chosen):
    return {name: value if name == "pixels" else value[chosen] for name, value in images.items()}


def pil_crop(images, i, height, width, one_call=False):
    """Resize with PIL, rows first: in one call, PIL 13 begins with the columns of some boxes."""
    start, (rows, columns) = int(images["starts"][i]), images["sizes"][i].tolist()
    top, left, box_height, box_width = images["boxes"][i].tolist()
    picture = images["pixels"][start : start + rows * columns].view(rows, columns, -1).numpy()
    channels = picture.shape[2]
    crop = Image.fromarray(picture if channels == 3 else picture[:, :, 0])
    crop = crop.crop((left, top, left + box_width, top + box_height))
    method = Image.Resampling.BICUBIC if images["bicubic"][i] else Image.Resampling.BILINEAR
    crop = crop if one_call else crop.resize((width, box_height), method)
    crop = crop.resize((width, height), method)
    if images["flips"][i]:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(crop).reshape(height, width, channels).astype(int)


@WAYS
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize(("height", "width"), [(32, 24), (17, 80), (96, 64)])
def test_crops_are_pils_by_pixel(way, channels, height, width):
    images = block(channels)
    crops = way(**images, height=height, width=width)
    assert crops.dtype == torch.uint8
    assert crops.shape == (len(images["boxes"]), height, width, channels)
    differing = []
    for i, crop in enumerate(crops.numpy()):
        difference = np.abs(crop - pil_crop(images, i, height, width))
        # A level of rounding; where that of the first direction has the bicubic filter's greatest weights, two.
        assert difference.max() <= (2 if images["bicubic"][i] else 1), (i, CASES[i % len(CASES)])
        differing.append((difference > 0).mean())
    assert np.mean(differing) < 0.01


@WAYS
def test_bilinear_crops_are_those_of_one_call_of_pil(way):
    images = block(3)
    images = only(images, ~images["bicubic"])
    crops = way(**images, height=40, width=40).numpy()
    for i, crop in enumerate(crops):
        assert np.abs(crop - pil_crop(images, i, 40, 40, one_call=True)).max() <= 1


def test_boxes_of_the_results_size_stay_as_they_are():
    images = only(block(3), [6, 6 + len(CASES)])
    pixels = images["pixels"][images["starts"][0] :][: 32 * 24].view(32, 24, 3)
    for way in (crops_module._by_interpolation, crops_module._by_products):
        assert torch.equal(way(**images, height=32, width=24)[0], pixels)


@WAYS
def test_a_crop_does_not_depend_on_the_others(way):
    images = block(3)
    together = way(**images, height=20, width=30)
    for i in (0, 1, 8, 21, 35, 47):
        assert torch.equal(way(**only(images, [i]), height=20, width=30)[0], together[i])


@pytest.mark.parametrize("limit", [1, 30_000_000])
def test_chunks_do_not_change_the_crops(monkeypatch, limit):
    images = block(3)
    whole = crops_module._by_products(**images, height=20, width=30)
    monkeypatch.setattr(crops_module, "CHUNK_BYTES", limit)
    assert torch.equal(crops_module._by_products(**images, height=20, width=30), whole)


@pytest.mark.parametrize("cubic", [False, True])
def test_products_add_up_without_rounding(cubic):
    for inputs in (1, 2, 100, 231, 500, 32 * 16):
        weights = crops_module._weights(torch.tensor([[[inputs]]]), inputs, 16, torch.tensor([cubic])).double()
        assert torch.equal(weights * 2**15, (weights * 2**15).round())
        assert weights.abs().sum(dim=2).max() < 2
        assert (weights.sum(dim=2) - 1).abs().max() < 0.5 / 255  # white stays white


@pytest.mark.parametrize("cubic", [False, True])
def test_weights_do_not_depend_on_the_padding(cubic):
    for inputs in range(20, 500, 7):
        shapes = torch.tensor([[[inputs]]]), torch.tensor([cubic])
        alone, padded = (crops_module._weights(shapes[0], most, 16, shapes[1]) for most in (inputs, 500))
        assert torch.equal(padded[..., :inputs], alone)
        assert not padded[..., inputs:].any()


def test_nothing_on_the_device_is_read():
    # A tensor of the meta device has nothing to read: what would wait for a GPU's values raises here.
    images = block(3)
    images["pixels"] = images["pixels"].to("meta")
    crops = resized_crops(**images, height=20, width=30)
    assert crops.device.type == "meta"
    assert crops.shape == (len(images["boxes"]), 20, 30, 3)


@pytest.mark.gpu
def test_crops_on_a_gpu_are_those_of_the_products_on_the_cpu():
    images = block(3)
    expected = crops_module._by_products(**images, height=96, width=64)
    images["pixels"] = images["pixels"].cuda()
    resized_crops(**images, height=96, width=64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        crops = resized_crops(**images, height=96, width=64)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(crops.cpu(), expected)


# Pad, crop and flip


def decoded(images):
    count, height, width, channels = images.shape
    pixels = np.concatenate([np.zeros((1, channels), np.uint8), images.reshape(-1, channels)])
    sizes = torch.tensor([[height, width]]).expand(count, 2)
    return DecodedImages(torch.from_numpy(pixels), sizes, torch.zeros(count, dtype=torch.int64), torch.arange(count))


def test_crops_are_torchvisions_by_pixel():
    rng = np.random.RandomState(0)
    images = rng.randint(1, 256, (6, 16, 24, 3), dtype=np.uint8)
    chosen = torch.tensor([5, 0, 3, 3, 1, 2])
    tops, lefts = torch.tensor([-2, 2, 0, 1, -1, 2]), torch.tensor([3, -3, 0, 2, -2, -1])
    flips = torch.tensor([True, False, True, False, False, True])
    crops = PadAndCrop(16, 24, 0.5)(decoded(images), chosen, {"tops": tops, "lefts": lefts, "flips": flips})
    for i in range(6):
        picture = tv.pad(Image.fromarray(images[chosen[i]]), [3, 2])  # left and right by 24/8, top and bottom by 16/8
        picture = tv.crop(picture, int(tops[i]) + 2, int(lefts[i]) + 3, 16, 24)
        picture = tv.hflip(picture) if flips[i] else picture
        np.testing.assert_array_equal(crops[i].numpy(), np.asarray(picture))


def test_crops_and_flips_are_uniform():
    draws = PadAndCrop(32, 16, 0.3).draw(torch.zeros(20_000, 2), torch.Generator().manual_seed(0))
    for name, reach in (("tops", 4), ("lefts", 2)):
        counts = torch.bincount(draws[name] + reach, minlength=2 * reach + 1)
        assert len(counts) == 2 * reach + 1
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert stats.binomtest(int(draws["flips"].sum()), 20_000, 0.3).pvalue > 1e-3
    table = stats.contingency.crosstab(draws["tops"].numpy(), draws["flips"].numpy()).count
    assert stats.chi2_contingency(table).pvalue > 1e-3
