"""The README's numbers are those of the results files, and its tree is the tree."""

import json
import re
import shutil
from pathlib import Path

import pytest

import results
from mbib_timm.errors import MbibError

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_readmes_tables_are_those_of_the_results(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(readme.count(marker) == 1 for marker in (*results.RUNS, *results.SPEED))
    copy = tmp_path / "README.md"
    copy.write_text(readme, encoding="utf-8")
    results.write_tables(copy, ROOT / "results")
    assert copy.read_text(encoding="utf-8") == readme


def test_every_result_says_where_it_comes_from():
    for file in (ROOT / "results").glob("*/metrics.json"):
        metrics = json.loads(file.read_text())
        assert {"commit", "torch", "timm", "device", "hardware", "command"} <= metrics["environment"].keys()
        assert metrics["environment"]["commit"], file
        assert sum(metrics["class_counts"]) > 0


def test_only_finished_runs_are_added(tmp_path):
    with pytest.raises(MbibError, match="is not finished"):
        results.add(tmp_path, tmp_path / "results")


def test_what_is_kept_says_nothing_of_the_machines_folders(tmp_path):
    run = tmp_path / "secret"
    shutil.copytree(ROOT / "results" / "cifar_resnet20.ce_digits-60e-seed0", run)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["environment"]["command"] += f" --data-dir {tmp_path}/secret/data"
    metrics["replaced_images"] = [f"{tmp_path}/secret/data/a.png"]
    (run / "metrics.json").write_text(json.dumps(metrics))
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("data_dir: null", f"data_dir: {tmp_path}/secret/data"))
    kept = results.add(run, tmp_path / "results")
    assert "secret" not in "".join((kept / name).read_text() for name in ("metrics.json", "recipe.yaml"))
    assert json.loads((kept / "metrics.json").read_text())["result"] == metrics["result"]


def test_the_readmes_tree_has_a_line_for_every_folder_and_names_the_modules_beside_them():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"```text\n(mbib_timm/.*?)\nrecipes/", readme, re.DOTALL).group(1)
    package = ROOT / "mbib_timm"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)) == {*folders, "zoo"}
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert set(re.findall(r"\w+\.py", tree)) == modules
