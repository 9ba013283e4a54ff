"""What is built for PyPI: the wheel holds the package and nothing else, the source distribution what the tests need."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from types import SimpleNamespace

import pytest
from packaging.metadata import Metadata
from pages import PROJECT, ROOT

import mbib_timm
from mbib_timm.models.zoo import ZOO
from mbib_timm.recipe import packaged_recipes

pytestmark = pytest.mark.slow
for tool in ("build", "hatchling", "twine"):
    pytest.importorskip(tool, reason="the tools that build and check a distribution are not installed")

VERSION = mbib_timm.__version__
# In megabytes; PyPI takes 100. The largest file is the report in results/, which packs to a sixth.
LARGEST_WHEEL, LARGEST_SOURCE, LARGEST_SOURCE_FILE = 10, 20, 9
# What git has, and only a clone needs.
LEFT_OUT = {".pre-commit-config.yaml"}
DIST_INFO = f"mbib_timm-{VERSION}.dist-info"


def call(*arguments, **options):
    done = subprocess.run(arguments, capture_output=True, text=True, encoding="utf-8", timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source, output, *kinds):
    """Build a folder, without network and without an environment of its own."""
    call(sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", str(output), str(source))


def wheel_files(path):
    """A wheel's files and their content, without the list of them."""
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist() if name != f"{DIST_INFO}/RECORD"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source distribution of the tree, and what they hold, by path; the latter unpacked, too."""
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, folder, "--wheel", "--sdist")
    wheel, source = folder / f"mbib_timm-{VERSION}-py3-none-any.whl", folder / f"mbib_timm-{VERSION}.tar.gz"
    assert set(folder.iterdir()) == {wheel, source}
    with tarfile.open(source) as archive:
        assert all(member.isfile() for member in archive.getmembers())
        archive.extractall(folder / "unpacked", filter="data")
    tree = folder / "unpacked" / f"mbib_timm-{VERSION}"
    held = {path.relative_to(tree).as_posix(): path for path in tree.rglob("*") if path.is_file()}
    return SimpleNamespace(wheel=wheel, source=source, files=wheel_files(wheel), tree=tree, held=held)


def files_of(folder):
    """The files of a folder of the tree, without Python's caches."""
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT / folder).as_posix(): path.read_bytes() for path in found}


def test_the_wheel_is_the_package_with_the_recipes(built):
    expected = {f"mbib_timm/{name}": content for name, content in files_of("mbib_timm").items()}
    expected |= {f"mbib_timm/recipes/{name}": content for name, content in files_of("recipes").items()}
    suffixes = {name.rpartition(".")[2] for name in expected}
    assert {"py", "j2", "yaml", "npz", "safetensors", "typed"} <= suffixes, "the tree has what a wheel is for"
    own = {name: content for name, content in built.files.items() if not name.startswith(f"{DIST_INFO}/")}
    assert own.keys() == expected.keys()
    assert [name for name in own if own[name] != expected[name]] == []
    assert built.files.keys() - own.keys() == {
        f"{DIST_INFO}/{name}" for name in ("METADATA", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    }


def test_the_source_distribution_holds_what_git_does(built):
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: there is nothing to compare with")
    listed = call("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    known = {name for name in listed if name and (ROOT / name).is_file()}
    assert {name.partition("/")[0] for name in known} >= {"tests", "docs", "results", "space", "tools", ".ci"}
    assert built.held.keys() == known - LEFT_OUT | {"PKG-INFO"}


def test_sizes(built):
    sizes = {path: path.stat().st_size / 1e6 for path in (built.wheel, built.source, *built.held.values())}
    print(f"\nwheel {sizes[built.wheel]:.1f} MB, source distribution {sizes[built.source]:.1f} MB")
    assert sizes[built.wheel] < LARGEST_WHEEL
    assert sizes[built.source] < LARGEST_SOURCE
    assert [name for name, path in built.held.items() if sizes[path] > LARGEST_SOURCE_FILE] == []


def test_the_source_distribution_builds_the_same_wheel(built, tmp_path):
    build(built.tree, tmp_path, "--wheel")
    assert wheel_files(tmp_path / built.wheel.name) == built.files


def test_pypi_takes_the_metadata(built):
    from trove_classifiers import classifiers

    call(sys.executable, "-m", "twine", "check", "--strict", str(built.wheel), str(built.source))
    for content in (built.files[f"{DIST_INFO}/METADATA"], built.held["PKG-INFO"].read_bytes()):
        metadata = Metadata.from_email(content)  # checks every field
        assert (str(metadata.version), metadata.license_expression) == (VERSION, "Apache-2.0")
        assert set(metadata.classifiers) <= classifiers
        extras = re.findall(r"^(\w+) = \[", PROJECT.partition("[project.optional-dependencies]")[2], re.MULTILINE)
        assert set(metadata.provides_extra) <= set(extras)
        assert metadata.description == (ROOT / "README.md").read_text(encoding="utf-8")
        assert metadata.description_content_type == "text/markdown"


def test_the_readme_leads_somewhere_from_pypi(built):
    """Every link and image of the long description, as a parser of Markdown that is not ours finds them."""
    markdown_it = pytest.importorskip("markdown_it")
    text = Metadata.from_email(built.files[f"{DIST_INFO}/METADATA"]).description
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(text)
    inline = [child for token in tokens for child in token.children or ()]
    places = [token.attrGet("href") or token.attrGet("src") for token in inline if token.type in ("link_open", "image")]
    assert len(places) > 20
    assert [place for place in places if not place.startswith("https://")] == []
    html = [token.content for token in (*tokens, *inline) if token.type.startswith("html")]
    assert all(content.startswith("<!-- ") for content in html), "HTML may hold links, too"


def test_an_installed_wheel_works_without_the_clone_and_the_network(built, tmp_path):
    target = tmp_path / "target"
    install = ("install", "--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", "--target", str(target))
    call(sys.executable, "-m", "pip", *install, str(built.wheel))
    environment = {
        **os.environ, "PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"),
        "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(tmp_path / "matplotlib"),
    }  # fmt: skip
    options = dict(cwd=tmp_path, env=environment)
    (command,) = [path for path in (target / "bin").iterdir() if path.is_file()]
    assert command.name == "mbib"
    assert call(str(command), "--version", **options) == f"mbib_timm {VERSION}\n"
    recipes = call(str(command), "recipes", **options)
    assert [name for name in packaged_recipes() if name not in recipes] == []
    packaged = [model.name for model in ZOO if model.weights is not None]
    program = (
        "import sys, timm, mbib_timm, mbib_timm.recipe\n"
        "from mbib_timm.cli import main\n"
        "from safetensors.torch import load_file\n"
        "assert main(['models']) == 0\n"
        "print(mbib_timm.__file__)\n"
        "print(mbib_timm.recipe.find_recipe('mbib_resnet20.digits'))\n"
        "model = timm.create_model('mbib_resnet32.cifar100_lt_if100', pretrained=True)\n"
        "print(model.pretrained_cfg['file'])\n"
        "state, file = model.state_dict(), load_file(sys.argv[1])\n"
        "assert state.keys() == file.keys() and all((state[key] == file[key]).all() for key in file)\n"
    )
    weights = {model.name: model.weights for model in ZOO}["mbib_resnet32.cifar100_lt_if100"]
    printed = call(sys.executable, "-c", program, str(weights), **options)
    assert [name for name in packaged if name not in printed] == []
    places = printed.splitlines()[-3:]
    assert all(line.startswith(f"{target}{os.sep}") for line in places), places
