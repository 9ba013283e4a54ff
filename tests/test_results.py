"""The README's numbers are those of the results files; what is kept of a run."""

import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

import results
from mbib_timm.errors import MbibError
from mbib_timm.results.runs import read_run

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["README.md", "recipes/README.md", "results/README.md", "docs/pretrained.md"])
def test_pages_tables_are_those_of_the_results(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    bare = results.TABLE.sub(r"\1\4", text)
    assert len(bare) < len(text)
    assert results.with_tables(bare, ROOT / "results") == text


def test_the_readmes_table_has_the_numbers_of_the_records_and_of_the_paper():
    lines = results.readme_table(ROOT / "results").splitlines()
    rows = {cells[0]: cells[1:] for line in lines if len(cells := line.strip("| ").split(" | ")) > 5}
    assert [*rows] == [
        "ResNet-32 from scratch", *["---"] * ("---" in rows), *results.SHOWN.values(),
        "ResNet-32 from scratch, strong recipe", *results.STRONG.values(),
        "EfficientNet-Lite0 with ImageNet-1k weights", *results.PRETRAINED.values(),
    ]  # fmt: skip
    records = (ROOT / "results").glob("bib_resnet32.cifar100_lt_if100-200e-seed*-bfloat16/metrics.json")
    heads = [json.loads(record.read_text(encoding="utf-8"))["result"]["heads"] for record in records]
    accuracies = [each["prediction"]["top1"] for each in heads]
    said = f"{statistics.mean(accuracies):.1f} ± {statistics.stdev(accuracies):.1f}"
    assert rows["BIB"][:2] == [str(len(heads)), said]
    assert [rows[title][-1] for title in results.SHOWN.values()] == ["38.3", "42.7", "44.9", "47.5"]
    beside = (*results.STRONG.values(), *results.PRETRAINED.values())
    assert all(len(rows[title]) == 5 for title in beside), "no number of the paper beside them"


def test_the_table_of_runs_has_the_epochs_of_every_stage():
    rows = [line.strip("| ").split(" | ") for line in results.table(ROOT / "results").splitlines()]
    epochs = {cells[0].partition("]")[0].removeprefix("["): cells[1] for cells in rows if len(cells) > 5}
    assert epochs["mbib_efficientnet_lite0.finetune_cifar100_lt_if100"] == "20 + 6"
    assert epochs["cifar_resnet32.bsce_cifar100_lt_if100"] == "200"
    run = read_run(ROOT / "results" / "cifar_resnet32.ce_cifar100_lt_if100-200e-seed0-bfloat16")
    assert results.epochs(replace(run, recipe=run.recipe.replace(epochs=20))) == "20 of 200"


def test_runs_of_sweeps_count_with_any_seed_and_those_of_values_that_are_gone_do_not(tmp_path):
    kept = json.loads((ROOT / "results" / "table9_rebalancing" / "sweep.json").read_text(encoding="utf-8"))
    kept["axes"]["rebalancing"].append("gone")
    (run,) = kept["runs"]
    kept["runs"] = []
    for value, seed in (("both", 7), ("gone", 0)):
        configuration = run["configuration"].replace("=none", f"={value}")
        own = {"coordinates": {"rebalancing": value}, "seed": seed, "settings": {}}
        kept["runs"].append({**run, **own, "configuration": configuration, "label": f"{configuration}-seed{seed}"})
    (tmp_path / "table9_rebalancing").mkdir()
    (tmp_path / "table9_rebalancing" / "sweep.json").write_text(json.dumps(kept), encoding="utf-8")
    accuracy = run["heads"]["prediction"]["overall"]
    assert results.runs_of_sweeps(tmp_path) == {"mbib_resnet32.cifar100_lt_if100": [accuracy]}


def test_notes_that_are_no_text_are_named(tmp_path):
    kept = ROOT / "results" / "cifar_resnet20.ce_digits-60e-seed0"
    run = shutil.copytree(kept, tmp_path / "run", ignore=shutil.ignore_patterns("figures"))
    (run / "notes.md").write_bytes("Für später".encode("latin-1"))
    with pytest.raises(MbibError, match=r"notes\.md: byte 1 is not UTF-8"):
        print(read_run(run).notes)


def test_a_recipe_without_a_whole_run_is_named(tmp_path):
    with pytest.raises(MbibError, match=r"no whole run of cifar_resnet32\.ce_cifar100_lt_if100"):
        results.readme_table(tmp_path)


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
