"""The tutorials in docs/: their blocks run in order, on photographs made here, and what they say of the output is so."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
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
    background = scene.randint(-50, 50, (4, 5, 3)) + (80, 130, 80)
    picture = Image.fromarray(background.clip(0, 255).astype(np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)
    x, y, size = scene.randint(2, 30), scene.randint(2, 18), scene.randint(22, 28)
    draw = ImageDraw.Draw(picture)
    draw_shape = draw.ellipse if [*ANIMALS].index(name) % 2 else draw.rectangle
    draw_shape((x + frame, y, x + frame + size, y + size), fill=ANIMALS[name][0])
    return picture


def make_photographs(root):
    """Make what the tutorials have: photos in class folders, later photos in a table, and new ones of no known class."""
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


def run_block(language, text, folder):
    """Run a block as a reader would, and return what it writes to the terminal."""
    if language == "sh":
        mbib = f'mbib() {{ {shlex.quote(sys.executable)} -W ignore -m mbib_timm "$@"; }}\n'
        command = ["bash", "-e", "-c", mbib + text]
    else:
        command = [sys.executable, "-W", "ignore", "-c", text]
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent), "PYTHONIOENCODING": "utf-8", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def masked(line):
    """A line of a table without what another machine may measure: numbers, and how wide they make the columns."""
    return " ".join(re.sub(r"\d+(\.\d+)?", "#", re.sub(r"-{3,}", "---", line)).split())


def run_page(page, folder):
    """Run a page's blocks in order; what a ``text`` block shows must have been printed by the block before it.

    Returns:
        What each block printed.
    """
    printed = []
    for language, text in blocks_of(page):
        if language == "text":
            exact = "mbib data" in before
            lines = [line if exact else masked(line) for line in printed[-1].splitlines()]
            for line in text.splitlines():
                assert (line if exact else masked(line)) in [*lines, "...", ""], f"{line}\nis not in\n{printed[-1]}"
        else:
            before = text
            printed.append(run_block(language, text, folder))
    return printed


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_your_own_images(tmp_path):
    make_photographs(tmp_path)
    printed = run_page("your_own_images.md", tmp_path)
    print("\n=====\n".join(printed))
