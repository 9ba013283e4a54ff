"""The pages of the README and of docs/ as their tests read them, and the images that their commands are for."""

import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import forked
import numpy as np
from huggingface_hub import constants
from PIL import Image

from mbib_timm.cli import main

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
REPOSITORY = re.search(r'^Repository = "(\S+)"$', PROJECT, re.MULTILINE)[1]


def run_commands(commands, folder):
    """Run commands in a folder, without a network and on one thread; return what each of them prints.

    They run in one process, forked from this one: torch is imported already, and runs draw no figures.
    """
    commands = list(commands)

    def work():
        os.dup2(1, 2)
        sys.stderr = sys.stdout
        warnings.simplefilter("ignore")
        constants.HF_HUB_OFFLINE = True
        for command in commands:
            print("$", command, flush=True)
            words = shlex.split(command)
            if words[0] == "mbib":
                try:
                    status = main(words[1:])
                except SystemExit as end:  # of --help
                    status = end.code
            elif words[0] == "python":
                status = subprocess.run([sys.executable, *words[1:]]).returncode
            else:
                status = subprocess.run(command, shell=True).returncode
            if status:
                print(f"{command}: exit status {status}")
                return status
        return 0

    here = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "PYTHONWARNINGS": "ignore"}
    done = forked.run(work, folder, **here, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    printed, rest = [], done.stdout
    for command in reversed(commands):
        rest, _, own = rest.rpartition(f"$ {command}\n")
        printed.append(own)
    return printed[::-1]


def run_program(program, folder):
    """Run a Python program in a folder, without a network and on one thread; return what it prints.

    In a process that is forked from this one, as `run_commands`.
    """

    def work():
        warnings.simplefilter("ignore")
        constants.HF_HUB_OFFLINE = True
        sys.path.insert(0, "")
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})

    done = forked.run(work, folder, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, f"{program}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def lines_of(block):
    """The commands of a block of shell, on a line each and without comments."""
    lines = [re.sub(r"(^|\s+)#.*", "", line) for line in block.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split()) for line in lines if line]


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
