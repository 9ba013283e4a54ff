"""Policies and augmentations: what is drawn, against torchvision's and timm's own; the same keys on both loaders."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from small_data import cut, settled
from timm.data import auto_augment as timms
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from mbib_timm.data import create_loaders, open_data
from mbib_timm.data.augment import (
    Augmentation,
    ColorJitter,
    Cutout,
    GaussianBlur,
    Grayscale,
    PolicyOperation,
    Rotation,
    check_augmentation,
    create_augmentation,
    create_operations,
)
from mbib_timm.data.pixels import NAMES, NOTHING, NUMBER
from mbib_timm.data.policies import AutoAugmentCifar10, RandAugment, create_policy
from mbib_timm.data.transforms import train_transform
from mbib_timm.errors import MbibError
from mbib_timm.recipe import find_recipe, load_recipe
from mbib_timm.recipe.checks import view_of

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(count, height=32, width=32, channels=3, seed=0):
    return torch.randint(1, 256, (count, height, width, channels), dtype=torch.uint8, generator=generator(seed))


def recipe(**keys):
    return settled(**{"workers": 0, "train_crop_mode": "pad", "img_size": 16, "image_cache": "none", **keys})


# AutoAugment's policy for CIFAR-10

TORCHVISION = {
    "ShearX": "shear_x",
    "ShearY": "shear_y",
    "TranslateX": "translate_x",
    "TranslateY": "translate_y",
    "Rotate": "rotate",
    "Brightness": "brightness",
    "Contrast": "contrast",
    "Color": "color",
    "Sharpness": "sharpness",
    "Posterize": "posterize",
    "Solarize": "solarize",
    "AutoContrast": "autocontrast",
    "Equalize": "equalize",
    "Invert": "invert",
}


def test_the_cifar10_policy_is_torchvisions():
    theirs = AutoAugment(AutoAugmentPolicy.CIFAR10)
    side = 662
    space = theirs._augmentation_space(10, (side, side))
    ours = AutoAugmentCifar10()
    assert len(ours.operations) == len(theirs.policies) == 25
    for pair, policy in enumerate(theirs.policies):
        for step, (name, probability, level) in enumerate(policy):
            assert NAMES[ours.operations[pair, step]] == TORCHVISION[name]
            assert float(ours.probabilities[pair, step]) == pytest.approx(probability)
            values, signed = space[name]
            value = 0.0 if level is None else float(values[level] if values.ndim else values)
            around, reach = float(ours.around[pair, step]), float(ours.reach[pair, step])
            if name.startswith("Translate"):
                assert (around, reach * side) == pytest.approx((0, value))
            elif name in ("Brightness", "Contrast", "Color", "Sharpness"):
                assert (around, reach) == pytest.approx((1, value))
            elif name == "Solarize":  # from 256 down as the authors have it; torchvision begins at 255
                assert (around, reach) == pytest.approx((256 - 256 * level / 9, 0))
                assert abs(around - value) <= 1
            elif signed:
                assert (around, reach) == pytest.approx((0, value))
            else:
                assert (around, reach) == pytest.approx((value, 0))


def test_pairs_probabilities_and_signs_of_the_cifar10_policy():
    policy = AutoAugmentCifar10()
    operations, arguments = policy.draw(60_000, generator())
    assert operations.shape == arguments.shape == (60_000, 2)
    rotated = operations[:, 0] == NUMBER["rotate"]
    assert stats.binomtest(int(rotated.sum()), 60_000, 0.7 / 25).pvalue > 1e-3
    assert set(arguments[rotated, 0].round(decimals=4).tolist()) == {-6.6667, 6.6667}
    assert stats.binomtest(int((arguments[rotated, 0] > 0).sum()), int(rotated.sum()), 0.5).pvalue > 1e-3
    nothing = (operations == NOTHING).double().mean(dim=0)
    torch.testing.assert_close(nothing, 1 - policy.probabilities.double().mean(dim=0), atol=0.01, rtol=0)
    # What is drawn for one image says nothing of the next.
    assert stats.spearmanr(operations[:-1, 0], operations[1:, 0]).pvalue > 1e-3


# RandAugment


@pytest.mark.parametrize("increasing", [False, True])
def test_randaugments_arguments_are_timms(increasing):
    names = timms._RAND_INCREASING_TRANSFORMS if increasing else timms._RAND_TRANSFORMS
    for magnitude in (0.0, 3.7, 9.0, 10.0):
        operations, arguments = RandAugment(magnitude, 3, increasing=increasing, probability=1).draw(3000, generator())
        for name in names:
            plain = {"TranslateXRel": "translate_x", "TranslateYRel": "translate_y"}.get(name)
            plain = plain or TORCHVISION.get(name.removesuffix("Increasing"), "solarize_add")
            ours = set(arguments[operations == NUMBER[plain]].round(decimals=9).tolist())
            to_argument = timms.LEVEL_TO_ARG[name]
            if to_argument is None:
                assert ours == {0.0}
                continue
            random.seed(0)
            theirs = {round(to_argument(magnitude, {"translate_pct": 0.45})[0], 9) for _ in range(50)}
            assert {value + 0.0 for value in ours} == {value + 0.0 for value in theirs}, (name, magnitude)


def test_randaugments_draws_are_distributed_as_timms():
    policy = create_policy("rand-m9-n2-mstd0.5-p0.6-inc1")
    assert policy == RandAugment(9.0, 2, 0.5, 0.6, True)
    operations, arguments = policy.draw(30_000, generator())
    applied = operations[operations != NOTHING]
    assert stats.binomtest(len(applied), 60_000, 0.6).pvalue > 1e-3
    assert stats.chisquare(torch.bincount(applied).numpy()).pvalue > 1e-3
    degrees = arguments[operations == NUMBER["rotate"]].abs() / 3
    rng = np.random.RandomState(0)
    assert stats.ks_2samp(degrees.numpy(), rng.normal(9, 0.5, 20_000).clip(0, 10)).pvalue > 1e-3


def test_whole_images_look_as_after_timms_randaugment():
    """The mean over many draws of one image, pixel by pixel, is that of timm's transform."""
    rng = np.random.RandomState(0)
    picture = Image.fromarray(rng.randint(0, 256, (5, 5, 3), dtype=np.uint8)).resize((24, 24), Image.Resampling.BICUBIC)
    settings = recipe(aa="rand-m9-mstd0.5-inc1", interpolation="bilinear", mean=[0.5, 0.5, 0.5])
    (operation,) = create_operations(settings, (3, 24, 24))
    assert isinstance(operation, PolicyOperation)
    images = torch.from_numpy(np.array(picture)).expand(6000, 24, 24, 3).clone()
    ours = operation(images, operation.draw(6000, generator())).double().numpy()
    # Python's and numpy's generators are timm's.
    random.seed(1)
    np.random.seed(1)
    transform = timms.rand_augment_transform(
        "rand-m9-mstd0.5-inc1", {"img_mean": (128,) * 3, "interpolation": Image.Resampling.BILINEAR}
    )
    theirs = np.stack([np.asarray(transform(picture)) for _ in range(6000)]).astype(float)
    error = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / 6000)
    z = (ours.mean(axis=0) - theirs.mean(axis=0)) / error
    assert np.abs(z).max() < 5.5
    assert np.abs(ours.std(axis=0) - theirs.std(axis=0)).max() < 6


@pytest.mark.parametrize(
    "aa",
    ["augmix-m3-w2", "original", "3a", "rand-n15-tweights", "rand-n14-t3aw", "rand-n20-t3a", "rand-m9-mstd101",
     "rand-m12-mmax12"],
)  # fmt: skip
def test_policies_that_only_timm_has(aa):
    assert create_policy(aa) is None
    transform = train_transform(recipe(aa=aa), (3, 20, 20))
    picture = Image.fromarray(noise(1, 20, 20)[0].numpy())
    changed = torch.stack([transform(picture) for _ in range(12)])
    assert changed.shape == (12, 3, 20, 20)
    assert len(changed.unique(dim=0)) > 6
    with pytest.raises(MbibError, match=f"recipe key 'aa': '{aa}' works on single images; use loader: timm"):
        create_operations(recipe(aa=aa), (3, 20, 20))


@pytest.mark.parametrize("aa", ["cifar", "rnd-m9"])
def test_unknown_policies_are_refused(aa):
    with pytest.raises(MbibError, match=f"recipe key 'aa': unknown policy '{aa}'; expected cifar10, rand-"):
        create_operations(recipe(aa=aa), (3, 20, 20))


# Operations of a recipe


def test_they_follow_one_another_in_the_order_that_the_module_says():
    keys = dict(rotation=5, aa="cifar10", hue=0.1, grayscale_prob=0.2, gaussian_blur_prob=0.5, cutout=4)
    built = create_operations(recipe(**keys), (3, 16, 16))
    names = ["Rotation", "PolicyOperation", "ColorJitter", "Grayscale", "GaussianBlur", "Cutout"]
    assert [type(operation).__name__ for operation in built] == names
    assert create_operations(recipe(), (3, 16, 16)) == []
    assert create_augmentation(recipe(train_crop_mode="none"), (3, 16, 16)) is None
    assert isinstance(create_augmentation(recipe(train_crop_mode="none", cutout=4), (3, 16, 16)), Augmentation)


def test_angles_are_uniform():
    degrees = Rotation(15).draw(5000, generator())["degrees"]
    assert stats.kstest(degrees.numpy(), stats.uniform(-15, 30).cdf).pvalue > 1e-3


def test_jittered_images_are_torchvisions_in_every_order():
    from torchvision.transforms import functional as tv

    jitter = ColorJitter(0.4, 0.1, 0.8)
    draws = jitter.draw(120, generator())
    assert len(draws["orders"].unique(dim=0)) == 24
    images = noise(120, 8, 8)
    changed = jitter(images.clone(), draws)
    unchanged = 0
    for before, after, factors, order in zip(images, changed, draws["factors"], draws["orders"].tolist(), strict=True):
        if factors.tolist() == [1, 1, 1, 0]:
            unchanged += 1
            assert torch.equal(before, after)
            continue
        pixels = before.permute(2, 0, 1)
        for step in order:
            change = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)[step]
            pixels = change(pixels, float(factors[step]))
        difference = (pixels.permute(1, 2, 0).int() - after.int()).abs()
        assert difference.float().mean() < 0.7, "each of four steps may round to another level"
        assert difference.max() <= 6
    assert stats.binomtest(unchanged, 120, 0.2).pvalue > 1e-3


def test_grey_and_blurred_images():
    images = noise(4000, 8, 8)
    before = images.clone()
    drawn = Grayscale(0.2).draw(4000, generator())
    after = Grayscale(0.2)(images, drawn)
    changed = (after != before).flatten(1).any(dim=1)
    assert torch.equal(changed, drawn["grey"])
    assert stats.binomtest(int(changed.sum()), 4000, 0.2).pvalue > 1e-3
    assert (after[changed] == after[changed][..., :1]).all()
    expected = np.asarray(Image.fromarray(before[changed][0].numpy()).convert("L"))
    np.testing.assert_array_equal(after[changed][0, ..., 0], expected)
    drawn = GaussianBlur(0.5).draw(4000, generator())
    after = GaussianBlur(0.5)(before.clone(), drawn)
    unchanged = (after == before).flatten(1).all(dim=1)
    assert unchanged[~drawn["blurred"]].all()
    assert not unchanged[drawn["blurred"] & (drawn["sigmas"] > 0.5)].any()
    assert stats.kstest(drawn["sigmas"].numpy(), stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3


@pytest.mark.parametrize("side", [4, 5])
def test_holes_lie_anywhere(side):
    images = noise(6000, 10, 12)
    after = Cutout(side)(images.clone(), Cutout(side).draw(6000, generator()))
    black = (after == 0).all(dim=-1)
    assert torch.equal(after[~black], images[~black])
    # A pixel is covered by the holes whose centre is near enough: of 120 centres, as many as lie in reach.
    rows = [sum(0 <= y - (c - side // 2) < side for c in range(10)) for y in range(10)]
    columns = [sum(0 <= x - (c - side // 2) < side for c in range(12)) for x in range(12)]
    expected = torch.tensor(rows)[:, None] * torch.tensor(columns)[None] / 120
    error = (expected * (1 - expected) / 6000).sqrt()
    assert ((black.double().mean(dim=0) - expected).abs() < 5 * error).all()


@pytest.mark.parametrize(
    ("keys", "size", "message"),
    [
        (
            dict(cutout=16),
            (3, 16, 16),
            "recipe key 'cutout': a square of 16 pixels would blacken whole images of 16x16",
        ),
        (dict(), (3, 6, 6), "'train_crop_mode': pad moves images by up to an eighth of their side, which is zero"),
        (dict(hue=0.1), (1, 16, 16), "recipe key 'hue': the model takes grey images"),
        (dict(grayscale_prob=0.1), (1, 16, 16), "recipe key 'grayscale_prob': the model takes grey images"),
    ],
)
def test_what_images_have_no_use_for_is_refused_on_both_loaders(keys, size, message):
    with pytest.raises(MbibError, match=message):
        create_augmentation(recipe(**keys), size)
    with pytest.raises(MbibError, match=message):
        check_augmentation(recipe(**keys), size)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(scale=[0.2, 1.0]), "recipe key 'scale' has no effect without train_crop_mode: rrc"),
        (dict(color_jitter_prob=0.8), "recipe key 'color_jitter_prob' has no effect without color_jitter or hue"),
        (dict(hue=0.6), "recipe key 'hue': expected at most 0.5"),
        (dict(rotation=-1), "recipe key 'rotation': expected at least 0"),
        (dict(views=[{}, {}]), "recipe key 'views': method 'mbib' takes 1 view of each image, got 2"),
        (dict(views=[{"cutot": 3}]), "key of view 1 'cutot'.*cutout"),
        (dict(views=[{"cutout": -3}]), "view 1: recipe key 'cutout': expected at least 0"),
        (dict(views=[{"scale": [0.5, 1.0]}]), "view 1: recipe key 'scale' has no effect"),
        (
            dict(train_crop_mode="rrc", views=[{"train_crop_mode": "pad"}]),
            "rrc applies to all views of an image; got pad",
        ),
    ],
)
def test_keys_that_fit_nothing_are_refused(keys, message):
    with pytest.raises(MbibError, match=message):
        recipe(**keys)


def test_an_image_depends_on_its_own_draws_alone():
    keys = dict(rotation=15, aa="cifar10", color_jitter=0.4, hue=0.1, color_jitter_prob=0.8, grayscale_prob=0.2)
    operations = create_operations(recipe(**keys, gaussian_blur_prob=0.5, cutout=5), (3, 20, 24))
    together, alone = noise(60, 20, 24), noise(60, 20, 24)[17:18]
    draws = [operation.draw(60, generator(i)) for i, operation in enumerate(operations)]
    for operation, drawn in zip(operations, draws, strict=True):
        together = operation(together, drawn)
        alone = operation(alone, {name: value[17:18] for name, value in drawn.items()})
    assert torch.equal(together[17], alone[0])


def test_nothing_on_the_device_is_read():
    keys = dict(
        rotation=15, aa="rand-m9-mstd0.5", color_jitter=0.4, hue=0.1, grayscale_prob=0.5, gaussian_blur_prob=0.5
    )
    images = noise(40, 16, 16).to("meta")
    for operation in create_operations(recipe(**keys, cutout=5, interpolation="bilinear"), (3, 16, 16)):
        images = operation(images, operation.draw(40, generator()))
    assert images.shape == (40, 16, 16, 3)


# On loaders


def loader_of(kind, keys, views=(), seed=0):
    crop = cut(keys.get("train_crop_mode", "pad"))
    own = dict(crop, loader=kind, workers=0, device="cpu", seed=seed, **keys)
    settings = load_recipe(find_recipe("mbib_resnet20.digits"), own)
    splits = open_data(settings)
    views = [view_of(settings, view) for view in views] or [settings]
    return settings, create_loaders(splits, settings, (3, 16, 16), CPU, views=views).train


def epoch(loader, number=0):
    loader.set_epoch(number)
    torch.manual_seed(number)
    return [batch for (batch,) in loader]


STRONG = dict(aa="cifar10", cutout=6, rotation=10, color_jitter=0.3, hue=0.1, gaussian_blur_prob=0.3)


def test_both_loaders_augment_alike():
    """The mean and the spread of the images of four epochs agree, pixel by pixel."""
    means = []
    for kind in ("resident", "timm"):
        _, loader = loader_of(kind, STRONG)
        images = torch.cat([batch.images for number in range(4) for batch in epoch(loader, number)])
        means.append((images.double().mean(dim=0), images.double().var(dim=0), len(images)))
    (mean, variance, n), (other, other_variance, m) = means
    z = (mean - other) / (variance / n + other_variance / m).sqrt()
    assert z.abs().max() < 5.5
    torch.testing.assert_close(variance, other_variance, rtol=0.35, atol=0.05)


@pytest.mark.parametrize("kind", ["resident", "timm"])
def test_views_have_policies_of_their_own(kind):
    crop = {"train_crop_mode": "rrc", "scale": [0.9, 1.0]}
    black = {"cutout": 15}
    _, loader = loader_of(
        kind, dict(hflip=0.0), [{}, black, {**crop, "grayscale_prob": 1.0}, {"train_crop_mode": "none"}]
    )
    (batch, *_) = epoch(loader)
    plain, holed, cropped, whole = batch.views
    lowest = plain.amin()
    assert (holed == lowest).double().mean() > (plain == lowest).double().mean()
    assert not torch.equal(plain, cropped)
    _, evaluated = loader_of(kind, dict(train_crop_mode="none", crop_pct=1.0))
    expected = {int(i): image for b in epoch(evaluated) for i, image in zip(b.index, b.images, strict=True)}
    assert all(torch.equal(image, expected[int(i)]) for i, image in zip(batch.index, whole, strict=True))
