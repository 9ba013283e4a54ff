"""The README's numbers are those of the results files, and its tree is the tree."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("results", ROOT / "tools" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readmes_table_is_that_of_the_results(results):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme.partition(results.BEGIN)[2].partition(results.END)[0].strip()
    assert shown == results.table(ROOT / "results").strip()


def test_every_result_says_where_it_comes_from():
    for file in (ROOT / "results").glob("*/metrics.json"):
        metrics = json.loads(file.read_text())
        assert {"commit", "torch", "timm", "device", "hardware", "command"} <= metrics["environment"].keys()
        assert metrics["environment"]["commit"], file
        assert sum(metrics["class_counts"]) > 0


def test_only_finished_runs_are_added(results, tmp_path):
    from mbib_timm.errors import MbibError

    with pytest.raises(MbibError, match="is not finished"):
        results.add(tmp_path, tmp_path / "results")


def test_the_readmes_tree_names_every_module():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"```text\n(mbib_timm/.*?)\nrecipes/", readme, re.DOTALL).group(1)
    named = set(re.findall(r"[\w/]+\.py", tree))
    modules = {
        path.name for path in (ROOT / "mbib_timm").rglob("*.py") if path.name not in ("__init__.py", "__main__.py")
    }
    assert {Path(name).name for name in named} == modules
