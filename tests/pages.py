"""The pages of the README and of docs/ as their tests read them, and the images that their commands are for."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
REPOSITORY = re.search(r'^Repository = "(\S+)"$', PROJECT, re.MULTILINE)[1]


def blocks(page, language):
    """A page's blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def prose(page):
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def slug(heading):
    """The anchor that GitHub and mkdocs give a heading."""
    return re.sub(r"[^\w -]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")


def anchors(page):
    """The anchors of a page's headings."""
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)}


def make_images(root):
    """Write ``my_images``, small images in class folders, and ``new_images``, 21 without classes."""
    random = np.random.default_rng(0)
    for number, (name, count) in enumerate({"fox": 12, "badger": 6, "hare": 3}.items()):
        for folder in (root / "my_images" / name, root / "new_images"):
            folder.mkdir(parents=True, exist_ok=True)
            for image in range(count):
                pixels = random.integers(80 * number, 80 * number + 60, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}{image}.png")
