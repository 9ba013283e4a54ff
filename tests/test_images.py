"""From an opened file to what a model sees, against PIL's own and naive arithmetic."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from archive_images import tar_bytes, unpacked, write
from PIL import Image, ImageOps
from small_data import picture

from mbib_timm.data import open_split
from mbib_timm.data.images import ArrayReader, ImageDataset, Split, convert_image, unreadable
from mbib_timm.data.paths import Names, PathReader
from mbib_timm.errors import DataError
from mbib_timm.recipe import Recipe

RAMP = np.arange(256, dtype=np.float64).reshape(16, 16)


def reopened(image, form, **options):
    """Return an image as PIL reads it back from a file."""
    content = io.BytesIO()
    image.save(content, form, **options)
    return Image.open(io.BytesIO(content.getvalue()))


def grey(image):
    return np.asarray(convert_image(image, "L"))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, form, mode):
    image = picture(3, (12, 20))
    exif = image.getexif()
    exif[0x0112] = orientation
    expected = ImageOps.exif_transpose(reopened(image, form, exif=exif)).convert(mode)
    converted = convert_image(reopened(image, form, exif=exif), mode)
    assert expected.size == ((20, 12) if orientation < 5 else (12, 20))
    assert converted.mode == mode
    assert np.array_equal(converted, expected)


def test_an_empty_file_is_called_so(tmp_path):
    unpacked(tmp_path / "data", {"ant/1.png": b"", "bee/1.png": b"text"})
    write(tmp_path / "x.tar", tar_bytes({"ant/1.png": b"", "bee/1.png": b"text"}))
    for place in (tmp_path / "data", tmp_path / "x.tar"):
        split = open_split(Recipe(dataset="folder", data_dir=str(place)), "all")
        empty, text = unreadable(split, 0).values()
        assert empty.startswith("empty file")
        assert text == "not an image, or damaged, or of a kind that is not read"


@pytest.mark.parametrize("exif", [b"Exif\0\0nothing that can be read", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_malformed_exif_does_not_matter(exif):
    image = picture(3, (12, 20))
    plain = reopened(image, "JPEG")
    assert np.array_equal(convert_image(reopened(image, "JPEG", exif=exif), "RGB"), plain)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_images_keep_their_whole_range(form, mode):
    ramp = (257 * RAMP + 100).clip(0, 65535).astype(np.uint16)
    image = reopened(Image.fromarray(ramp), form)
    assert image.mode.startswith("I")
    converted = np.asarray(convert_image(image, mode))
    expected = np.rint(ramp / 257)
    assert np.array_equal(converted, expected if mode == "L" else np.stack([expected] * 3, axis=-1))
    assert converted.min() == 0
    assert converted.max() == 255


@pytest.mark.parametrize("dtype", [">u2", "<u2", np.int32])
def test_integers_are_of_16_bits_whatever_the_brightest_pixel(dtype):
    # As of a night shot: it stays dark.
    assert np.array_equal(grey(Image.fromarray((2 * RAMP).astype(dtype))), np.rint(2 * RAMP / 257))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP / 255, RAMP),
        (RAMP, RAMP),
        (257 * RAMP, RAMP),
        (1e6 * RAMP - 7, RAMP),
        (RAMP / 127.5 - 1, RAMP),
        (np.where(RAMP < 8, np.nan, RAMP), np.where(RAMP < 8, 0, RAMP)),
        (np.where(RAMP < 8, np.inf, RAMP / 255), np.where(RAMP < 8, 0, RAMP)),
        (np.full((16, 16), -3.0), np.zeros((16, 16))),
    ],
)
def test_floating_point_images_are_scaled_and_not_clipped(values, expected):
    image = reopened(Image.fromarray(values.astype(np.float32)), "TIFF")
    assert image.mode == "F"
    assert np.abs(grey(image).astype(int) - expected).max() <= 1


def on_white(colour, alpha):
    return alpha / 255 * colour + (1 - alpha / 255) * 255


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_white(mode, form):
    alpha = RAMP.astype(np.uint8)
    colour = np.asarray(picture(3, (16, 16))) if mode == "RGBA" else np.asarray(picture(3, (16, 16)))[..., :1]
    image = Image.fromarray(np.dstack([colour, alpha]).squeeze(), mode)
    converted = np.asarray(convert_image(reopened(image, form, lossless=True, exact=True), "RGB")).astype(float)
    assert np.abs(converted - on_white(colour.astype(float), alpha[..., None].astype(float))).max() <= 1
    assert (converted[0, 0] == 255).all(), "black behind a transparent pixel is no black"


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_is_white(form):
    image = Image.fromarray(RAMP.astype(np.uint8) // 128, "P")
    image.putpalette([200, 10, 30, 40, 90, 250])
    assert convert_image(reopened(image, form), "RGB").getpixel((0, 0)) == (200, 10, 30)
    converted = convert_image(reopened(image, form, transparency=0), "RGB")
    assert converted.getpixel((0, 0)) == (255, 255, 255)
    assert converted.getpixel((0, 15)) == (40, 90, 250)


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_a_transparent_colour_of_other_images_is_white(mode):
    image = Image.new(mode, (4, 4))
    transparent = reopened(image, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert convert_image(transparent, "RGB").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_transparent_grey_of_16_bits_is_white(mode):
    values = np.array([[0, 32768], [32768, 40000]], dtype=np.uint16)
    image = reopened(Image.fromarray(values), "PNG", transparency=32768)
    assert image.mode.startswith("I;16")
    assert grey(convert_image(image, mode)).tolist() == [[0, 255], [255, 156]]


@pytest.mark.parametrize(("mode", "form"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "JPEG"), ("1", "PNG")])
def test_other_kinds_of_colour_are_as_pil_converts_them(mode, form):
    image = picture(3).convert(mode)
    converted = convert_image(reopened(image, form), "RGB")
    assert np.array_equal(converted, reopened(image, form).convert("RGB"))


def test_cmyk_has_the_colours_that_were_painted():
    red = Image.new("RGB", (16, 16), (200, 30, 40))
    found = np.asarray(convert_image(reopened(red.convert("CMYK"), "JPEG", quality=95), "RGB")).mean(axis=(0, 1))
    assert np.abs(found - (200, 30, 40)).max() < 6


@pytest.mark.parametrize(("form", "options"), [("GIF", {"duration": 40}), ("TIFF", {}), ("WEBP", {}), ("PNG", {})])
def test_the_first_of_several_frames_counts(form, options):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    image = reopened(frames[0], form, save_all=True, append_images=frames[1:], lossless=True, **options)
    assert image.n_frames == 3
    image.seek(2)
    assert convert_image(image, "RGB").getpixel((4, 4)) == (255, 0, 0)


def test_plain_images_stay_as_they_are():
    pixels = np.asarray(picture(3, (12, 20)))
    assert np.array_equal(convert_image(Image.fromarray(pixels), "RGB"), pixels)
    assert np.array_equal(convert_image(Image.fromarray(pixels), "L"), Image.fromarray(pixels).convert("L"))


def test_a_decompression_bomb_is_refused_by_name(monkeypatch, tmp_path):
    file = tmp_path / "bomb.png"
    Image.new("1", (4000, 3000)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)

    class Files(ArrayReader):
        def read(self, index):
            return Image.open(file)

        def path(self, index):
            return str(file)

    split = Split(Files(np.zeros((1, 1, 1)), ""), np.zeros(1, dtype=np.int64))
    with pytest.raises(DataError, match=r"bomb\.png: it has 12 million pixels, and up to 2 million are read: make"):
        ImageDataset(split, "RGB", np.asarray, replace_broken=False)[0]


@pytest.mark.parametrize("root", [".", "/", "a/../b", "/data/images/", "x//y"])
@pytest.mark.parametrize(
    "names", [["a.png", "b/c.png", "/abs/d.png"], ["./a.png", "b/../c.png", "b//c.png", "/abs/./d.png", "ä"]]
)
@pytest.mark.parametrize("indices", [None, np.array([2, 0])])
def test_normalised_paths_are_those_of_the_images(root, names, indices):
    split = Split(
        PathReader(Path(root), Names.of(names)), np.zeros(len(names if indices is None else indices), int), indices
    )
    expected = [os.path.abspath(split.path(place)) for place in range(len(split))]
    assert [os.fsdecode(file) for file in split.files()] == expected
