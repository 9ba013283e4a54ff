"""`mbib data`: what it finds, against what the test made; duplicates against a comparison of all pairs."""

import csv
import io
import itertools
import os
import re
import shlex
import socket
import sys

import numpy as np
import pytest
from archive_images import png, tar_bytes, unpacked, write
from PIL import Image

from mbib_timm.cli import main
from mbib_timm.data import open_split
from mbib_timm.data.overview import SMALL_INPUT, median_size, shrunk_note
from mbib_timm.data.sources import Source
from mbib_timm.drawing import canvas, render
from mbib_timm.errors import MbibError
from mbib_timm.files import contains, require_own, to_cell
from mbib_timm.models.preprocessing import declared_side
from mbib_timm.recipe import FOR_PHOTOGRAPHS, FOR_SMALL_IMAGES, Recipe, find_recipe, load_recipe
from mbib_timm.reporting import inspection
from mbib_timm.reporting.data_report import FIGURE_TITLE, FIGURES
from mbib_timm.reporting.inspection import Look, Picture, duplicates, near_pairs, perceptual_hash


def photo(seed):
    """A picture with large shapes, as a perceptual hash sees them."""
    coarse = np.random.RandomState(seed).randint(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path):
    """Foxes and hares at four sites, one lynx, a file that is no image, and what a scan passes over."""
    root = tmp_path / "photos"
    for seed, (label, site, i) in enumerate(itertools.product(("fox", "hare"), "ABCD", range(3))):
        path = root / label / f"site {site}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(seed).save(path)
    (root / "lynx").mkdir()
    photo(99).save(root / "lynx" / "0.jpg", quality=95)
    # The first fox again, brighter and smaller, as a hare; and byte by byte at another site.
    photo(0).resize((64, 48)).point(lambda level: min(255, level + 6)).save(root / "hare" / "site B" / "near.png")
    (root / "fox" / "site D" / "same.png").write_bytes((root / "fox" / "site A" / "0.png").read_bytes())
    (root / "fox" / "site C" / "9.png").write_bytes(b"no image")
    (root / "stray.png").write_bytes(png(1))
    (root / "owl").mkdir()
    return root


def said(capsys, *words):
    assert main(["data", *map(str, words), "--workers", "0"]) == 0
    return capsys.readouterr().out


def test_a_folder_alone_is_enough(photos, capsys, tmp_path):
    pytest.importorskip("imagehash")
    # In folders that are made.
    files = {name: tmp_path / "out" / "new" / name for name in ("images.csv", "classes.png")}
    text = said(capsys, photos, "--csv", files["images.csv"], "--figure", files["classes.png"])
    assert said(capsys, photos, "--csv", files["images.csv"], "--figure", files["classes.png"]) == text
    assert "3 classes, 22 training images: 11 in the largest class, 1 in the smallest" in text
    assert "evaluation: 6 images of 2 classes: 20 % of each class, drawn with seed 0" in text
    assert "classes of one training image: 1 (lynx)" in text
    assert "classes without an evaluation image: 1 (lynx)" in text
    assert "warning: left out: images outside class folders: 1 (stray.png)" in text
    assert "warning: left out: class folders without images: 1 (owl)" in text
    assert "kinds: PNG RGB: 26, JPEG RGB: 1" in text
    assert "sizes: 80 x 60: 26, 64 x 48: 1" in text
    assert "shorter side: 48 to 60 pixels, median 60" in text
    assert f"unreadable: 1:\n  {photos / 'fox' / 'site C' / '9.png'}: not an image, or damaged, or of a kind" in text
    assert "exact duplicates: 2 images in one set" in text
    assert "further near duplicates: 3 images in one set\n  sets with images of several classes: 1" in text
    table = [line.split() for line in text.splitlines() if line.startswith(("fox", "hare", "lynx"))]
    assert sorted(table) == [["fox", "11", "3", "few"], ["hare", "10", "3", "few"], ["lynx", "1", "–", "few"]]
    rows = list(csv.DictReader(files["images.csv"].open(encoding="utf-8")))
    assert len(rows) == 28
    by_path = {row["path"]: row for row in rows}
    same = [by_path[str(photos / "fox" / name)] for name in ("site A/0.png", "site D/same.png")]
    near = by_path[str(photos / "hare" / "site B" / "near.png")]
    assert same[0]["exact_set"] == same[1]["exact_set"] != ""
    assert near["exact_set"] == ""
    assert near["near_set"] == same[0]["near_set"] != ""
    assert (near["width"], near["height"], near["kind"], near["label"]) == ("64", "48", "PNG RGB", "hare")
    assert "not an image, or damaged, or of a kind" in by_path[str(photos / "fox" / "site C" / "9.png")]["error"]
    assert Image.open(files["classes.png"]).size[1] > 300


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_a_written_split_is_read_back(photos, capsys, tmp_path, kind):
    place = photos
    if kind == "archive":
        names = {str(file.relative_to(photos)): file.read_bytes() for file in photos.rglob("*.png")}
        place = write(tmp_path / "photos.tar", tar_bytes(names))
    file = tmp_path / "split.csv"
    text = said(capsys, place, "--group-by", "folder:1", "--write-split", file)
    assert f"--dataset table --table {file} --data-dir {place} --group-by column\n" in text
    assert "about 20 % of each class, drawn with seed 0, in whole groups by folder:1" in text
    keys = dict(data_dir=str(place), workers=0)
    for name in ("train", "validation"):
        expected = open_split(Recipe(dataset="folder", group_by="folder:1", **keys), name)
        split = open_split(Recipe(dataset="table", table=str(file), group_by="column", **keys), name)
        assert [split.path(i) for i in range(len(split))] == [expected.path(i) for i in range(len(expected))]
        assert split.groups.tolist() == expected.groups.tolist()
        given = [expected.class_names[label] for label in expected.targets]
        assert [split.class_names[label] for label in split.targets] == given
    again = said(capsys, file, "--data-dir", place)
    assert again.splitlines()[0] == text.splitlines()[0]


def test_every_split_is_written_and_the_command_that_is_said_reads_them(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        f"{split}/{label}/{i}.png": png(i) for split in ("train", "val", "test") for label in "ab" for i in range(3)
    }
    unpacked(tmp_path / "my data", names)
    rows = [f"{name},{name.split('/')[1]},{name.split('/')[0]}" for name in names]
    write(tmp_path / "my data" / "t.csv", "\n".join(["path,label,split", *rows]).encode())
    for target in ("my data", "my data/t.csv"):
        text = said(capsys, target, "--write-split", "out/my split.csv")
        words = shlex.split(text.splitlines()[-1].split(" with ")[1])
        assert words == ["--dataset", "table", "--table", "out/my split.csv", "--data-dir", "my data"]
        again = Recipe(dataset="table", table=words[3], data_dir=words[5])
        for name in ("train", "validation", "test"):
            expected = open_split(Recipe(dataset="folder", data_dir="my data"), name)
            assert [*open_split(again, name).files()] == [*expected.files()]


def test_tables_that_may_be_edited_by_hand_are_kept(photos, capsys, tmp_path):
    files = {flag: tmp_path / f"{flag[2:]}.csv" for flag in ("--write-split", "--csv")}
    for flag, file in files.items():
        for _ in range(2):
            said(capsys, photos, flag, file)
        file.write_text("path,label,split\nfox/site A/0.png,hare,train\n")
        before = file.read_bytes()
        assert main(["data", str(photos), "--workers", "0", flag, str(file)]) == 2
        assert f"{flag} {file}: the existing file " in capsys.readouterr().err
        assert file.read_bytes() == before


def test_classes_that_share_a_name_stay_two(capsys, tmp_path):
    unpacked(tmp_path, {f"{label}/{i}.png": png(i) for label in range(3) for i in range(4)})
    for name, images in (("train", (0, 1)), ("val", (2, 3))):
        lines = "".join(f"{label}/{i}.png {label}\n" for label in range(3) for i in images)
        write(tmp_path / f"{name}.txt", lines.encode())
    write(tmp_path / "names.txt", b"crane\nheron\ncrane\n")
    keys = f"data_dir: {tmp_path}\ntrain_list: train.txt\nval_list: val.txt\nclass_map: {tmp_path}/names.txt\n"
    file = write(tmp_path / "own.yaml", f"dataset: list\n{keys}".encode())
    text = said(capsys, file, "--write-split", tmp_path / "split.csv")
    assert re.search(r"(?m)^crane \[0\] .*\n(.*\n)*crane \[2\] ", text)
    again = open_split(Recipe(dataset="table", table=str(tmp_path / "split.csv")), "train")
    assert again.class_names == ("crane [0]", "crane [2]", "heron")


@pytest.mark.parametrize("label", [" lead", "trail ", "re\rturn"])
def test_names_that_a_table_cannot_hold_are_refused(capsys, tmp_path, label):
    root = unpacked(tmp_path / "data", {f"{each}/{i}.png": png(i) for each in (label, "ant") for i in range(2)})
    assert main(["data", str(root), "--workers", "0", "--write-split", str(tmp_path / "x.csv")]) == 2
    assert f"a table cannot hold {label!r}".removesuffix("'") in capsys.readouterr().err
    assert not (tmp_path / "x.csv").exists()


def test_data_of_a_recipe(capsys):
    text = said(capsys, "mbib_resnet20.digits", "--imbalance-max", "40")
    assert "unreadable: 0" in text
    assert "sizes: 16 x 16: " in text
    assert "kinds: L: " in text


def test_without_imagehash_the_rest_is_shown(photos, capsys, monkeypatch):
    monkeypatch.setattr(inspection, "find_spec", lambda name: None)
    text = said(capsys, photos)
    assert "exact duplicates: 2 images in one set" in text
    assert "near duplicates: not looked for; that needs ImageHash: pip install 'mbib-timm[data]'" in text


def test_of_images_in_two_splits_of_the_data_the_advice_is_what_can_be_done(capsys, tmp_path):
    line = "  evaluated images that are also in training: "
    same = {f"{label}/{i}.png": png(90 * (label == "bee")) for label in ("ant", "bee") for i in range(5)}
    text = said(capsys, unpacked(tmp_path / "one", same))
    assert f"{line}2; --group-by keeps together what belongs together" in text
    splits = {"train/ant/0.png": png(0), "train/bee/0.png": png(90), "val/ant/0.png": png(0), "val/bee/0.png": png(45)}
    text = said(capsys, unpacked(tmp_path / "two", splits))
    assert f"{line}1; take them out of one of the data's own splits" in text
    assert "--group-by" not in text


def test_classes_whose_names_differ_in_case_alone_are_noted(capsys, tmp_path):
    labels = ("Fox", "fox", "hare", "a\x1b")
    root = unpacked(
        tmp_path / "data", {f"{label}/{year}/{i}.png": png(i) for label in labels for year in (1, 2) for i in (3, 4)}
    )
    text = said(capsys, root)
    assert "\nnote: classes whose names differ in case or spaces only: 'Fox' and 'fox'; if they are the" in text
    assert "\nnote: no image lies directly in a class folder; all lie deeper, such as a\\x1b/1/3.png;" in text


def test_names_do_not_speak_to_the_terminal(capsys, tmp_path):
    root = unpacked(
        tmp_path / "data", {f"{label}/{i}.png": png(i) for label in ("a\x1b[31m", "b\nc") for i in range(3)}
    )
    (root / "b\nc" / "bad\r.png").write_bytes(b"no image")
    text = said(capsys, root)
    assert not {"\x1b", "\r"} & set(text)
    assert "b\\nc" in text
    assert "bad\\r.png" in text


def test_names_of_any_bytes_go_through_tables_figures_and_splits(capsys, tmp_path, monkeypatch):
    """Control characters, formulas, mathematics, long names; what is no text, no file or no folder is passed over."""
    root = tmp_path / "data"
    labels = ("ant", "b\x1b[31mee", "c\nat", "=cmd|x", "$$", "x" * 250)
    images = ("0.png", "a\nb.png", "e\x1b[2J.png", "=1+1.png", 'q"u,o.png', f"{'y' * 240}.png")
    unpacked(root, {f"{label}/{name}": png(i) for i, (label, name) in enumerate(itertools.product(labels, images))})
    for name in (b"ant/\xe4.png", b"\xe4/0.png"):
        place = os.fsencode(root) + b"/" + name
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "wb") as file:
            file.write(png(1))
    os.mkfifo(root / "ant" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as opened, monkeypatch.context() as there:
        there.chdir(root / "ant")  # a socket's path has room for about 100 bytes
        opened.bind("socket.png")
    names = [tmp_path / name for name in ("images.csv", "classes.png", "split.csv")]
    text = said(capsys, root, "--csv", names[0], "--figure", names[1], "--write-split", names[2])
    assert text.isascii() or all(char.isprintable() for char in text.replace("\n", ""))
    assert "names that are not UTF-8: 2 (ant/\\udce4.png, \\udce4)" in text
    assert "devices, pipes and sockets: 2 (ant/pipe.png, ant/socket.png)" in text
    rows = list(csv.DictReader(names[0].open(encoding="utf-8", newline="")))
    assert {row["path"] for row in rows} == {to_cell(str(root / label / name)) for label in labels for name in images}
    shown = {"ant", "b\\x1b[31mee", "c\\nat", "'=cmd|x", "$$", "x" * 250}
    assert {row["label"] for row in rows} == {*map(to_cell, labels)} == shown
    again = Recipe(dataset="table", table=str(names[2]), data_dir=str(root))
    assert set(open_split(again, "train").class_names) == set(labels)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["./nowhere"],
            "there is no ./nowhere: expected a folder or archive (.tar, .tar.gz, .tgz) of images, a table",
        ),
        (["digitz"], "or a recipe; unknown recipe 'digitz'"),
        (["--dataset", "table", "--table", "my t.csv", "--data-dir", "D"], "mbib data 'my t.csv' --data-dir D\n"),
        (["--data-dir", "D"], "the folder, table or recipe goes first, without a flag: mbib data D\n"),
        ([], "without a flag: mbib data DIR\n"),
        (["PHOTOS", "--lr", "3"], "unknown flag of mbib data '--lr'"),
        (["mbib_resnet20.digits", "--write-split", "x.csv"], "the images of dataset digits are not in files"),
        (
            ["PHOTOS", "--imbalance", "exp", "--val-split", "left_out", "--write-split", "x.csv"],
            "no table says what a long-tailed subset leaves out, and split 'left_out' has",
        ),
    ],
)
def test_what_cannot_be_done_is_said(photos, capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    given = [str(photos) if word == "PHOTOS" else word for word in words]
    assert main(["data", *given, *([] if "--lr" in words else ["--workers", "0"])]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


# Duplicates


def distance(one, other):
    return bin(one ^ other).count("1")


# Photographs and small inputs

SHRUNK = "note: images of median size 320 x 240 are shrunk to {} px"


def photographs(root):
    """Six pictures of 320 x 240 pixels, one of which lies on its side, as cameras leave them, and a small one."""
    for seed, (label, i) in enumerate(itertools.product(("fox", "hare"), range(3))):
        image, exif = photo(seed).resize((320, 240)), Image.Exif()
        exif[0x0112] = 6 if seed == 5 else 1
        path = root / label / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        (image.rotate(90, expand=True) if seed == 5 else image).save(path, exif=exif)
    photo(9).save(root / "hare" / "small.jpg")
    return root


@pytest.mark.parametrize("table", [False, True])
def test_photographs_that_a_small_input_loses_are_noted(tmp_path, capsys, table):
    root = photographs(tmp_path / "photos")
    given = [root]
    if table:
        files = sorted(path.relative_to(root) for path in root.glob("*/*.jpg"))
        (root / "t.csv").write_text("path,label\n" + "".join(f"{file},{file.parent}\n" for file in files))
        given = [root / "t.csv"]
    recipes = "; recipes for photographs: frozen/mbib_efficientnet_lite0, finetune/mbib_efficientnet_lite0, "
    assert f"{SHRUNK.format(32)} by the recipe finetune/mbib_resnet32{recipes}" in said(capsys, *given)
    flags = ["--dataset", "folder", "--data-dir", root, "--imbalance", "none"]
    assert f"{SHRUNK.format(16)}{recipes}" in said(capsys, "mbib_resnet20.digits", *flags)
    assert "are shrunk to" not in said(capsys, FOR_PHOTOGRAPHS[0], *flags)


def test_training_notes_them_once(tmp_path, capsys):
    root = photographs(tmp_path / "photos")
    flags = ["--dataset", "folder", "--data-dir", str(root), "--imbalance", "none", "--device", "cpu", "--workers", "0"]
    flags += ["--stage1.epochs", "1", "--stage2.epochs", "1", "--warmup-epochs", "0", "--val-split", "validation"]
    assert main(["train", "cifar_resnet32.crt_digits", *flags, "--output", str(tmp_path), "--image-cache", "none"]) == 0
    assert capsys.readouterr().out.count(SHRUNK.format(16)) == 1


def test_a_median_size_takes_headers_alone(tmp_path):
    root = photographs(tmp_path / "photos")
    for path in root.glob("fox/*.jpg"):
        path.write_bytes(path.read_bytes()[:1000])  # more than the header, and no picture
    (root / "fox" / "broken.jpg").write_bytes(b"none")
    whole = Source(Recipe(dataset="folder", data_dir=str(root))).splits(["all"])[0]
    assert median_size(whole) == (320, 240)
    assert median_size(whole.subset(np.array([], dtype=np.int64))) is None


NEITHER = [((32, 32), 32), ((100, 127), 16), ((250, 400), 64), ((1024, 768), 128), (None, 32), ((512, 512), None)]


@pytest.mark.parametrize(("size", "side"), NEITHER)
def test_what_is_no_photograph_or_no_small_input_is_not_noted(size, side):
    assert shrunk_note(size, side) is None


@pytest.mark.parametrize("name", [FOR_SMALL_IMAGES, *FOR_PHOTOGRAPHS])
def test_the_recipes_named_are_for_images_of_ones_own(name):
    recipe = load_recipe(find_recipe(name))
    assert recipe.dataset == "folder"
    assert (declared_side(recipe) > SMALL_INPUT) == (name != FOR_SMALL_IMAGES)


@pytest.mark.parametrize("form", FIGURES)
def test_a_figure_says_what_it_is_to_be_replaced_by_another(tmp_path, form):
    content = render(lambda: canvas(1, 1)[0], (form,), title=FIGURE_TITLE)[form]
    write(tmp_path / "own", content)
    require_own("--figure", tmp_path / "own", contains(FIGURE_TITLE.encode()), "is another")
    write(tmp_path / "other", render(lambda: canvas(1, 1)[0], (form,))[form])
    with pytest.raises(MbibError, match="other: the existing file is another"):
        require_own("--figure", tmp_path / "other", contains(FIGURE_TITLE.encode()), "is another")


def test_near_pairs_are_those_of_a_comparison_of_all():
    rng = np.random.RandomState(0)
    hashes = {int(value) for value in rng.randint(0, 1 << 62, 150, dtype=np.int64)}
    for value in list(hashes)[:60]:
        for bits in (1, 3, 4, 5, 8):
            hashes.add(value ^ sum(1 << int(bit) for bit in rng.choice(64, bits, replace=False)))
    expected = {pair for pair in itertools.combinations(sorted(hashes), 2) if distance(*pair) <= 4}
    assert len(expected) > 100
    assert {tuple(sorted(pair)) for pair in near_pairs(hashes)} == expected
    assert list(near_pairs([])) == list(near_pairs([5])) == []


def test_many_hashes_of_one_part_are_compared(monkeypatch):
    monkeypatch.setattr(inspection, "COMPARED", 7)
    hashes = list(range(0, 1 << 13, 64))
    expected = {pair for pair in itertools.combinations(hashes, 2) if distance(*pair) <= 4}
    assert {tuple(sorted(pair)) for pair in near_pairs(hashes)} == expected


def test_the_hash_is_imagehashs_own():
    imagehash = pytest.importorskip("imagehash")
    for seed in range(5):
        assert f"{perceptual_hash(photo(seed)):016x}" == str(imagehash.phash(photo(seed)))


def test_sets_are_joined_and_only_evaluated_images_leak():
    splits = ["train", "train", "validation", "validation", "validation", "train"]
    pictures = [Picture(str(i), split, "fox", "", Look()) for i, split in enumerate(splits)]
    found = duplicates(pictures, "train", ["a", "b", "c", "d", "d", None], [("a", "b"), ("b", "c")])
    assert found.sets == [[0, 1, 2], [3, 4]]
    assert found.leaks == {2: 1}, "near the second image, and not the first"


def test_a_terminal_of_few_letters_gets_escapes(tmp_path, monkeypatch):
    unpacked(tmp_path / "data", {f"{label}/{i}.png": png(i) for label in ("Bär", "ant") for i in range(2)})
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["data", str(tmp_path / "data"), "--workers", "0"]) == 0
    terminal.flush()
    assert rb"B\xe4r" in terminal.buffer.getvalue()
