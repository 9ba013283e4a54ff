"""Operations on batches of pixels: colour jitter against torchvision's, the others against PIL, by pixel."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy import stats
from torchvision.transforms import ColorJitter

from mbib_timm.data import augment
from mbib_timm.data import pixels as pixels_module
from mbib_timm.data.pixels import (
    NAMES,
    NOTHING,
    NUMBER,
    affine,
    apply_operations,
    blur,
    color_jitter,
    cut_out,
    enhance,
    shifted_hue,
    smoothed,
)

# Colour jitter


OPERATIONS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)


ORDERS = list(itertools.permutations(range(3)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw_jitter(n, strength, source):
    return tuple(augment.ColorJitter(strength).draw(n, source).values())


@pytest.mark.parametrize("strength", [0.4, 1.5])
def test_parameters_are_distributed_as_torchvisions(strength):
    count = 4000
    factors, orders = draw_jitter(count, strength, generator())
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
    assert torch.equal(color_jitter(images, *draw_jitter(9, 0.0, generator())), images)


def test_the_generator_alone_decides():
    torch.manual_seed(9)
    before = torch.get_rng_state()
    first, second, other = (draw_jitter(50, 0.4, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for i in range(2):
        assert torch.equal(first[i], second[i])
        assert not torch.equal(first[i], other[i])


def batch(channels, count=48, height=23, width=31):
    """Return noise of all contrasts and colour casts, and parameters that go through all orders."""
    images = torch.rand(count, height, width, channels, generator=generator())
    spread = torch.rand(count, 1, 1, channels, generator=generator(1))
    images = (256 * (images * spread + (1 - spread) * images.flip(0)[:, :1, :1])).to(torch.uint8)
    factors, _ = draw_jitter(count, 1.2, generator(2))
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
    monkeypatch.setattr(pixels_module, "CPU_BLOCK_BYTES", limit)
    assert torch.equal(color_jitter(images, factors, orders), together)


@pytest.mark.gpu
def test_images_on_a_gpu_are_those_on_the_cpu():
    parameters = batch(3)
    expected = color_jitter(*parameters).int()
    changed = color_jitter(*(values.cuda() for values in parameters)).cpu().int()
    assert (changed - expected).abs().max() <= 1


# Operations of policies


FILL = (128, 30, 200)


def pictures(count=6, height=19, width=26, channels=3, seed=0):
    """Smooth pictures with noise, so that every level, edge and range occurs."""
    rng = np.random.RandomState(seed)
    small = rng.randint(0, 256, (count, 5, 6, channels), dtype=np.uint8)
    big = [np.asarray(Image.fromarray(s.squeeze()).resize((width, height), Image.Resampling.BICUBIC)) for s in small]
    noisy = np.stack(big).reshape(count, height, width, channels).astype(int) + rng.randint(-20, 21, (height, width, 1))
    return noisy.clip(0, 255).astype(np.uint8)


def pil(pixels):
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def by_pil(name, picture, argument, fill, resampling):
    """What PIL makes of a picture, as timm's and AutoAugment's authors call it."""
    width, height = picture.size

    def transform(*matrix):
        return picture.transform(picture.size, Image.Transform.AFFINE, matrix, resampling, fillcolor=fill)

    return {
        "shear_x": lambda: transform(1, argument, 0, 0, 1, 0),
        "shear_y": lambda: transform(1, 0, 0, argument, 1, 0),
        "translate_x": lambda: transform(1, 0, argument * width, 0, 1, 0),
        "translate_y": lambda: transform(1, 0, 0, 0, 1, argument * height),
        "rotate": lambda: picture.rotate(argument, resampling, fillcolor=fill),
        "brightness": lambda: ImageEnhance.Brightness(picture).enhance(argument),
        "contrast": lambda: ImageEnhance.Contrast(picture).enhance(argument),
        "color": lambda: ImageEnhance.Color(picture).enhance(argument),
        "sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(argument),
        "posterize": lambda: ImageOps.posterize(picture, int(argument)) if argument else picture.point(lambda _: 0),
        "solarize": lambda: ImageOps.solarize(picture, argument),
        "solarize_add": lambda: picture.point([min(255, i + int(argument)) if i < 128 else i for i in range(256)] * 3),
        "autocontrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "invert": lambda: ImageOps.invert(picture),
    }[name]()


BLENDS = ("brightness", "contrast", "color", "sharpness", "autocontrast")


ARGUMENTS = {
    "shear_x": (-0.3, 0.1, 0.2667),
    "shear_y": (-0.2, 0.0333, 0.3),
    "translate_x": (-0.45, 0.3525, 150 / 331),
    "translate_y": (-0.2, 0.1007, 0.45),
    "rotate": (-30.0, 6.67, 90.0, 17.3),
    "brightness": (0.1, 1.0, 1.7, 1.9),
    "contrast": (0.1, 1.0, 1.6, 1.9),
    "color": (0.0, 1.0, 1.4, 1.9),
    "sharpness": (0.1, 1.0, 1.3, 1.9),
    "posterize": (0, 1, 4, 5, 8),
    "solarize": (0, 113.7, 128, 256),
    "solarize_add": (0, 55, 110),
    "autocontrast": (0,),
    "equalize": (0,),
    "invert": (0,),
}


@pytest.mark.parametrize("name", NAMES)
def test_operations_are_pils_by_pixel(name):
    images = pictures()
    images[0] = images[0] // 3 + 60  # of a small range
    images[1] = 77  # of one level
    for argument in ARGUMENTS[name]:
        changed = torch.from_numpy(images.copy())
        numbers = torch.full((len(images),), NUMBER[name])
        numbers[3] = NOTHING
        apply_operations(changed, numbers, torch.full((len(images),), argument, dtype=torch.float64), FILL)
        np.testing.assert_array_equal(changed[3], images[3])
        for i in set(range(len(images))) - {3}:
            expected = np.asarray(by_pil(name, pil(images[i]), argument, FILL, Image.Resampling.NEAREST)).astype(int)
            difference = np.abs(changed[i].numpy().astype(int) - expected)
            # Blends and stretched contrasts are truncated: they may fall on either side of a whole level.
            assert difference.max() <= (name in BLENDS), (argument, i)
            assert np.mean(difference > 0) < 0.03, (argument, i)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"])
def test_interpolated_geometry_is_pils_within_a_level(name, interpolation):
    images = pictures()
    for argument in ARGUMENTS[name]:
        changed = torch.from_numpy(images.copy())
        arguments = torch.full((len(images),), argument, dtype=torch.float64)
        apply_operations(changed, torch.full((len(images),), NUMBER[name]), arguments, FILL, interpolation)
        for i in range(len(images)):
            expected = np.asarray(by_pil(name, pil(images[i]), argument, FILL, RESAMPLING[interpolation])).astype(int)
            difference = np.abs(changed[i].numpy().astype(int) - expected)
            # A place that lies on the border to within rounding may be inside for one and outside for the other.
            assert np.mean(difference.max(axis=-1) > 1) < 0.005, (argument, i)


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_has_an_operation_and_an_argument_of_its_own(channels):
    count = 2 * len(NAMES)
    images = pictures(count, channels=channels)
    numbers = torch.arange(count) % len(NAMES)
    arguments = torch.tensor(
        [ARGUMENTS[NAMES[n]][i % len(ARGUMENTS[NAMES[n]])] for i, n in enumerate(numbers.tolist())]
    )
    together = torch.from_numpy(images.copy())
    apply_operations(together, numbers, arguments.double(), FILL[:channels], "bilinear")
    for i in range(count):
        alone = torch.from_numpy(images[i : i + 1].copy())
        apply_operations(alone, numbers[i : i + 1], arguments[i : i + 1].double(), FILL[:channels], "bilinear")
        assert torch.equal(together[i], alone[0]), NAMES[numbers[i]]


def test_the_places_of_nearest_neighbours_do_not_round():
    # A half turn maps centres onto centres: with floating point, a place on a border falls to either side.
    images = torch.from_numpy(pictures(1, 8, 8))
    half_turn = torch.tensor([[-1.0, 0, 8, 0, -1, 8]], dtype=torch.float64)
    assert torch.equal(affine(images, half_turn, FILL)[0], images[0].flip(0, 1))


def test_smoothing_is_pils():
    images = pictures()
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    for image, smooth in zip(images, smoothed(pixels), strict=True):
        expected = np.asarray(pil(image).filter(ImageFilter.SMOOTH))
        np.testing.assert_array_equal(smooth.permute(1, 2, 0).numpy(), expected)
    tiny = torch.rand(1, 3, 2, 9)
    assert torch.equal(smoothed(tiny), tiny)


def test_an_enhancement_by_one_changes_nothing():
    images = torch.from_numpy(pictures(4))
    assert torch.equal(enhance(images, torch.arange(4), torch.ones(4)), images)


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.07, 0.4])
def test_hues_are_torchvisions_within_a_level(shift):
    pixels = torch.from_numpy(pictures(8)).permute(0, 3, 1, 2)
    shifts = torch.full((8, 1, 1, 1), shift)
    expected = tv.adjust_hue(pixels, shift)
    changed = shifted_hue(pixels.float(), shifts)
    assert (changed - expected).abs().max() <= 1
    if shift == 0:
        assert torch.equal(changed, pixels.float())


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 25), (13, 30)])
def test_blurred_images_are_torchvisions(height, width):
    images = torch.from_numpy(pictures(6, height, width))
    sigmas = torch.tensor([0.1, 0.5, 0.9, 1.3, 1.7, 2.0])
    changed = blur(images, sigmas, radius=11).permute(0, 3, 1, 2)
    for image, sigma, got in zip(images.permute(0, 3, 1, 2), sigmas, changed, strict=True):
        expected = tv.gaussian_blur(image, [23, 23], [float(sigma)] * 2)
        assert (got.int() - expected.int()).abs().max() <= 1


def test_blur_reaches_as_far_as_a_small_image_can_be_mirrored():
    images = torch.from_numpy(pictures(1, 6, 8))
    expected = tv.gaussian_blur(images.permute(0, 3, 1, 2), [2 * 7 + 1, 2 * 5 + 1], [2.0, 2.0])
    got = blur(images, torch.tensor([2.0]), radius=11).permute(0, 3, 1, 2)
    assert (got.int() - expected.int()).abs().max() <= 1


def test_holes_are_black_and_end_at_the_border():
    images = torch.full((4, 10, 12, 3), 9, dtype=torch.uint8)
    tops, lefts = torch.tensor([-3, 2, 8, 5]), torch.tensor([-2, 4, 10, 11])
    cut_out(images, tops, lefts, 5)
    for image, top, left in zip(images, tops.tolist(), lefts.tolist(), strict=True):
        expected = np.full((10, 12, 3), 9, dtype=np.uint8)
        for y in range(10):
            for x in range(12):
                if top <= y < top + 5 and left <= x < left + 5:
                    expected[y, x] = 0
        np.testing.assert_array_equal(image, expected)
