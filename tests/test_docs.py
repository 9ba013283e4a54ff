"""The documentation: every command on its pages, the messages that it quotes, its links, and the site that is built."""

import ast
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from browser import find_browser, open_page
from pages import REPOSITORY, ROOT, anchors, blocks, lines_of, make_images, prose, run_commands
from PIL import Image

from mbib_timm.cli import parse
from mbib_timm.errors import MbibError
from mbib_timm.flags import recipe_overrides
from mbib_timm.recipe import find_recipe, load_recipe, packaged_recipes

DOCS = ROOT / "docs"
PAGES = [DOCS / "README.md", *sorted(set(DOCS.glob("*.md")) - {DOCS / "README.md"}), ROOT / "recipes" / "README.md"]

# Commands. Each one in a block of shell on a page is run here, in the order of the pages, unless another test runs it
# or it stands under what it needs.

ELSEWHERE = {
    "your_own_images.md": "test_tutorials.py runs the whole page",
    "pytest tests/test_methods.py --plugin tempered.py": "test_plugins.py",
    "python tools/benchmark.py --only start --results my_results": ".ci/run, with other measurements",
    "hf repos create me/digits-demo --type space --sdk gradio --env MBIB_MODEL=hf-hub:me/digits": "test_space.py",
    "hf upload me/digits-demo space . --type space": "test_space.py",
    "mbib export MODEL --format onnx": "test_export.py",
    "mbib export MODEL --format onnx --softmax": "test_export.py",
    "mbib export MODEL --format torch-export": "test_export.py",
    "mbib models": "test_zoo.py",
    "mbib models --all": "test_zoo.py",
}
NEEDS = {
    "network": [
        "pip install 'mbib-timm[train] @ git+https://github.com/mbib-timm/mbib_timm'",
        "hf auth login",
        "mbib publish runs/mbib_resnet20.digits --repo-id me/digits",
        "mbib publish runs/mine --repo-id me/mine --seeds runs/mine-seed1 runs/mine-seed2",
        "mbib predict hf-hub:me/digits a_digit.png",
        "mbib train finetune/mbib_resnet32 --model hf-hub:me/digits --data-dir my_images",
        "git clone https://github.com/mbib-timm/mbib_timm && cd mbib_timm",
    ],
    "CIFAR-100": [
        "mbib train mbib_resnet32.cifar100_lt_if100",
        "mbib train mbib_resnet32.cifar100_lt_if100 --seed 1 --experiment seed1",
        "mbib train mbib_resnet32.cifar100_lt_if100 --method.beta 3 --experiment beta3",
        "mbib train cifar_resnet32.dive_cifar100_lt_if100",
        "mbib train cifar_resnet32.dive_from_mbib_cifar100_lt_if100 --method.teacher-pass once",
        "mbib train cifar_resnet32.ce_cifar100_lt_if100 --cutmix 1 --cutmix-sampler reverse --mixup-prob 0.5 "
        "--mixup-off-epochs 3",
        "OMP_NUM_THREADS=1 mbib train mbib_resnet32.cifar100_lt_if100 --amp --amp-dtype bfloat16",
        "mbib sweep table1_cifar100_lt --epochs 20",
        "mbib sweep table1_cifar100_lt --jobs 2 --amp",
        "mbib analyze mbib_resnet32.cifar100_lt_if100 bib_resnet32.cifar100_lt_if100",
        "python tools/pack.py mbib_resnet32.cifar100_lt_if100 -o c.tar",
    ],
    "ImageNet and a GPU": ["torchrun --nproc-per-node 4 tools/train.py mbib_resnext50.imagenet_lt --sync-bn"],
}
# What makes a command quick, by how it begins.
SHORT = {
    "mbib train tempered.yaml": "--stage1.epochs 1 --stage1.warmup-epochs 0 --stage2.epochs 1 --stage2.warmup-epochs 0",
    "mbib sweep tempered.yaml": "--epochs 1 --imbalance-max 24",
    "mbib train": "--epochs 1 --warmup-epochs 0",
    "mbib sweep mbib_resnet20": "--epochs 1 --imbalance-max 24",
    "mbib sweep figure9": "--epochs 1 --imbalance-max 24",
    "mbib aggregate": "--targets uniform",
}


COMMANDS = [(page, command) for page in PAGES for block in blocks(page, "sh") for command in lines_of(block)]
LISTED = [command for commands in NEEDS.values() for command in commands]
RUN_HERE = dict.fromkeys(  # once, where several pages have it
    command for page, command in COMMANDS
    if page.name not in ELSEWHERE and command not in ELSEWHERE and command not in LISTED
)  # fmt: skip


def test_no_command_is_listed_that_is_on_no_page():
    written = {command for _, command in COMMANDS}
    assert [
        command for command in (*LISTED, *ELSEWHERE) if command not in written and not (DOCS / command).is_file()
    ] == []


@pytest.mark.parametrize("command", [command for command in LISTED if "mbib " in command])
def test_commands_that_are_not_run_are_understood(command):
    words = shlex.split(command.partition("mbib ")[2] if " mbib " in f" {command}" else "")
    if not words:
        return  # a tool's
    given = parse(words)
    if getattr(given, "recipe", None) in packaged_recipes():
        load_recipe(find_recipe(given.recipe), recipe_overrides(given))


# Flags with values stand in sentences and in cells of tables too; these are what they may belong to.
TRAIN = ("train mbib_resnet20.digits", "train mbib_resnet20.digits --method se_mbib")
PROGRAMS = (*TRAIN, "sweep figure9", "validate M", "predict M images", "publish M", "export M")
FLAGS = {flag for page in PAGES for flag in re.findall(r"`(--[a-z][^`]* [^`]*)`", page.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("flag", sorted(FLAGS))
def test_flags_with_values_are_understood(flag):
    refused = []
    for program in TRAIN if flag.startswith("--method.") else PROGRAMS:
        try:
            given = parse(shlex.split(f"{program} {flag}".replace(" N", " 2")))
            if program.startswith("train"):
                load_recipe(find_recipe(given.recipe), recipe_overrides(given))
            return
        except (SystemExit, MbibError) as error:
            refused.append(error)
    pytest.fail(f"no command takes {flag}: {refused}")


def make_folder(root):
    """What the pages have: small images in class folders, new ones, a digit, a recipe, and the method of methods.md."""
    make_images(root)
    digit = np.random.default_rng(0).integers(0, 255, (16, 16), dtype=np.uint8)
    Image.fromarray(digit).save(root / "a_digit.png")
    (root / "my_recipe.yaml").write_text("base: digits\nmodel: cifar_resnet20\nmethod: ce\n")
    for suffix, language in (("py", "python"), ("yaml", "yaml")):
        (root / f"tempered.{suffix}").write_text(blocks(DOCS / "methods.md", language)[0], encoding="utf-8")


def as_run(command):
    """A command as it is run: briefly, and with a model in the place of the placeholder."""
    start = next((start for start in SHORT if command.startswith(start)), None)
    more = f" {SHORT[start]}" if start is not None and "--help" not in command and "--dry-run" not in command else ""
    return command.replace(" tools/", f" {ROOT}/tools/").replace("MODEL", "runs/mbib_resnet20.digits") + more


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_other_command_runs(tmp_path):
    pytest.importorskip("matplotlib")
    make_folder(tmp_path)
    first, second = blocks(DOCS / "README.md", "python")
    quick = first.replace("epochs=8", 'epochs=1, warmup_epochs=0, experiment="from_python"')
    assert quick != first
    (tmp_path / "quickstart.py").write_text(quick + second, encoding="utf-8")
    commands = ["mbib train experts_resnet32.sade_digits", *RUN_HERE, "python quickstart.py"]
    printed = run_commands(map(as_run, commands), tmp_path)
    assert printed[-1].count("new_images/") == 21


# Messages


def templates():
    """What the package's texts look like, with an ellipsis where a value goes in."""
    for file in (ROOT / "mbib_timm").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_that_troubleshooting_quotes_are_the_packages():
    known = [re.sub(r"…+", "…", text) for text in templates()]
    quoted = [block.strip() for block in blocks(DOCS / "troubleshooting.md", "text")]
    assert len(quoted) > 20
    # A template may go on, or say with a value what the page has in words.
    assert [text for text in quoted if not any(text.rstrip("…").rstrip() in each for each in known)] == []


# Links


OUTSIDE = [ROOT / "CONTRIBUTING.md", ROOT / "results" / "README.md"]


@pytest.mark.parametrize("page", [*PAGES, *OUTSIDE], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        place, _, anchor = link.partition("#")
        if link.startswith(REPOSITORY):
            place = re.fullmatch(rf"{REPOSITORY}/(?:blob|tree)/main/(.+)", place)[1]
            file = ROOT / place
        elif "://" in link:
            continue
        else:
            file = page if not place else (page.parent / place).resolve()
        assert file.exists(), link
        if anchor:
            assert anchor in anchors(file), link


class Links(HTMLParser):
    """The links, sources and anchors of a page."""

    def __init__(self, page):
        super().__init__()
        self.links, self.sources, self.ids = [], [], set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids.add(given.get("id") or given.get("name"))
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif given.get("src") or (tag == "link" and given.get("href")):
            self.sources.append(given.get("src") or given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly; .ci/run has done so already."""
    pytest.importorskip("mkdocs")
    folder = Path(os.environ.get("MBIB_SITE", tmp_path_factory.mktemp("docs") / "site"))
    if not folder.exists():
        command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
        here = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "NO_MKDOCS_2_WARNING": "1"}
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **here}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_generated_part_takes_the_place_of_the_text_before_it_on_its_line():
    pytest.importorskip("mkdocs")
    part = runpy.run_path(str(DOCS / "generate.py"))["PART"]
    page = "Above.\n*In [results](../results).* <!-- generated: runs -->\n<!-- generated: runs -->\nBelow."
    assert part.sub(r"the \1", page) == "Above.\nthe runs\nthe runs\nBelow."


@pytest.mark.slow
def test_links_of_the_site_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    pages = {page: Links(page) for page in site.rglob("*.html")}
    assert len(pages) > 18
    for page, found in pages.items():
        for link in (*found.links, *found.sources):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert link not in found.sources, f"{page.name} loads {link}"
                continue
            if page.name == "404.html":
                continue  # its links are those of a server
            file = page if not parts.path else (page.parent / unquote(parts.path)).resolve()
            assert file.is_file() or (file / "index.html").is_file(), f"{page.name}: {link}"
            if parts.fragment and file.suffix == ".html":
                assert unquote(parts.fragment) in pages[file].ids, f"{page.name}: {link}"
        assert "<!-- generated" not in page.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.browser
def test_search_works_without_a_server(site, tmp_path):
    command = [
        find_browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--virtual-time-budget=10000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
        f"{(site / 'index.html').as_uri()}?q=beta",
    ]  # fmt: skip
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert re.search(r"\d+ matching documents", dumped)


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(420, True), (1300, False)])
def test_pages_fit_into_a_window(site, tmp_path, width, dark):
    # Of each test its own: the probed page lies beside what it needs, and the browser remembers the colours.
    own = shutil.copytree(site, tmp_path / "site")
    seen = open_page(own / "sweeps.html", own, width=width, dark=dark)
    assert seen["width"] <= seen["window"]
    assert all(image["loaded"] for image in seen["images"])
    assert not seen["errors"]
    assert not [name for name in seen["requests"] if not name.startswith("file:")]
    light = max(map(int, re.findall(r"\d+", seen["background"])[:3])) > 200
    assert light != dark
