"""Transforms of single images, against numpy and PIL."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import arrays, picture, settled
from small_data import normalized_recipe as recipe

from mbib_timm.data.transforms import eval_transform, train_transform


def test_pad_crop_is_a_window_of_the_padded_image_or_its_mirror():
    _, images = arrays(1)
    image = images[0]
    transform = train_transform(recipe(), (3, 16, 16))
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = {}
    for y in range(5):
        for x in range(5):
            window = padded[y : y + 16, x : x + 16]
            windows[window.tobytes()] = (y, x, False)
            windows[window[:, ::-1].tobytes()] = (y, x, True)
    torch.manual_seed(0)
    seen = [windows[transform(Image.fromarray(image)).permute(1, 2, 0).numpy().tobytes()] for _ in range(1500)]
    assert len(set(seen)) == 50, "every offset and both mirror images occur"
    counts = np.array([seen.count(place) for place in set(seen)])
    assert ((counts - 30) ** 2 / 30).sum() < 95, "about equally often (chi-square, 49 degrees of freedom)"


def test_evaluation_leaves_an_image_of_the_right_size_alone():
    _, images = arrays(1)
    result = eval_transform(recipe(), (3, 16, 16))(Image.fromarray(images[0]))
    assert (result.permute(1, 2, 0).numpy() == images[0]).all()


def test_evaluation_resizes_and_crops_the_centre():
    settings = settled(crop_pct=0.5, interpolation="bilinear")
    image = picture(0, (64, 64))
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR).crop((8, 8, 24, 24)))
    result = eval_transform(settings, (3, 16, 16))(image).permute(1, 2, 0).numpy()
    assert np.abs(result.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["rrc", "none", "pad"])
def test_every_crop_mode_gives_uint8_of_the_size(mode):
    keys = {"color_jitter": 0.4, "aa": "rand-m9-mstd0.5"}
    result = train_transform(recipe(train_crop_mode=mode, **keys), (3, 16, 24))(picture(0, (50, 40)))
    assert result.shape == (3, 16, 24)
    assert result.dtype == torch.uint8
