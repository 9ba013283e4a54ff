"""`mbib analyze` on a finished run: its file, its text, and what it refuses."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mbib_timm import drawing
from mbib_timm.analysis import analyze as analyze_module
from mbib_timm.analysis.analysis_record import analysis_figures, comparison_figures, read_analysis
from mbib_timm.analysis.analyze import RHO, analyze, comparison_text, summary_text
from mbib_timm.cli import main
from mbib_timm.environment import World
from mbib_timm.errors import MbibError
from mbib_timm.evaluation.validate import validate
from mbib_timm.files import to_json
from mbib_timm.recipe import find_recipe, load_recipe
from mbib_timm.results.tables import NOTHING
from mbib_timm.training import train

HEADS = ["prediction", "v1", "v2", "v3", "z"]


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    """A copy: the fixture's folder is that of other tests too."""
    return shutil.copytree(finished_run, tmp_path_factory.mktemp("copy") / finished_run.name)


@pytest.fixture(scope="module")
def result(run):
    (analysis,) = analyze([str(run)], overrides={"device": "cpu"}, images_per_class=8)
    return analysis


def refuse(constant):
    raise ValueError(constant)


def test_the_file_holds_what_is_returned(run, result):
    text = (run / "analysis" / "analysis.json").read_text()
    content = json.loads(text, parse_constant=refuse)
    assert content == json.loads(to_json(result))
    assert read_analysis(run) == result
    assert read_analysis(run / "analysis") == result  # as results are kept
    assert sorted(path.name for path in (run / "analysis").iterdir()) == ["analysis.json", "figures"]
    drawn = {f"{figure.name}.{form}" for figure in analysis_figures(result) for form in ("png", "pdf")}
    assert {path.name for path in (run / "analysis" / "figures").iterdir()} == drawn
    assert list(content) == [
        "name", "model", "epochs", "seed", "class_names", "split", "images", "class_counts", "prediction_heads",
        "environment", "trained_on", "heads", "trend", "confusion", "positive_posterior", "reliability", "distances",
        "embedding", "efficiency",
    ]  # fmt: skip
    assert (result.name, result.model) == ("mbib_resnet20.digits", "mbib_resnet20")
    assert (result.epochs, result.seed, result.split, result.images) == (3, 0, "test", 340)
    assert result.class_names == json.loads((run / "metrics.json").read_text())["class_names"]


def test_accuracies_are_those_of_validate(run, result, capsys):
    validated = validate(str(run), overrides={"device": "cpu"})
    assert list(result.heads) == HEADS
    for head, values in validated.heads.items():
        for metric in ("top1", "macro", "many", "medium", "few", "nll", "ece"):
            assert getattr(result.heads[head], metric) == pytest.approx(getattr(values, metric), rel=1e-5)
        assert result.heads[head].per_class == pytest.approx(values.per_class, rel=1e-5)
        assert result.reliability[head].ece == pytest.approx(values.ece, rel=1e-4)
    assert result.class_counts == validated.class_counts


def test_the_parts_agree_with_one_another(result):
    prediction = result.heads["prediction"]
    for group, share in result.confusion.shares.items():
        assert share["correct"] == pytest.approx(getattr(prediction, group), rel=1e-5)  # every class has 34 images
    slope = np.polyfit(np.log10(result.class_counts), prediction.per_class, 1)[0]
    assert result.trend.slope == pytest.approx(slope, rel=1e-4)
    for head in HEADS:
        assert len(result.positive_posterior[head]) == 10
        assert all(0 < value < 1 for value in result.positive_posterior[head])
        # By Jensen's inequality log mean q >= mean log q; all classes have as many images.
        mean = sum(result.positive_posterior[head]) / 10
        assert math.log(mean) >= -result.heads[head].nll
    assert list(result.distances) == ["v", "z"]
    for groups in result.distances.values():
        for values in groups.values():
            assert values.rho() == pytest.approx(values.pairs / values.inter, rel=1e-5)
            assert values.pairs > values.centre, "from each image, its own distance 0 included, as from the centre"
    embedding = result.embedding
    assert sorted(embedding.classes) == list(range(10))
    assert embedding.labels == [label for label in embedding.classes for _ in range(8)]
    assert embedding.perplexity == pytest.approx(79 / 3, rel=1e-5)
    for points in embedding.points.values():
        assert np.array(points).shape == (80, 2)
        assert points == np.round(points, 2).tolist()
    assert result.efficiency.input_size == [3, 16, 16], "640 pixels are for the ResNet-32 of the paper"


@pytest.fixture
def undrawn(monkeypatch):
    """Files of figures that take no time: what is in them, those of `result` show."""
    monkeypatch.setattr(drawing, "render", lambda draw, formats, *_, **__: dict.fromkeys(formats, b"-"))


@pytest.mark.slow
def test_two_runs_are_compared(run, result, undrawn, tmp_path, capsys):
    recipe = load_recipe(
        find_recipe("cifar_resnet20.ce_digits"),
        dict(epochs=1, warmup_epochs=0, device="cpu", output=str(tmp_path / "runs"), seed=5),
    )
    plain = str(train(recipe, "cifar_resnet20.ce_digits").folder)
    capsys.readouterr()
    output = tmp_path / "analyses"
    options = dict(overrides={"device": "cpu"}, output=output, classes=[2, 9], images_per_class=6)
    results = analyze([str(run), plain, plain], **options)
    written = sorted(path.relative_to(output).as_posix() for path in output.rglob("*.json"))
    assert written == [
        "cifar_resnet20.ce_digits-2/analysis.json",
        "cifar_resnet20.ce_digits-3/analysis.json",
        "mbib_resnet20.digits/analysis.json",
    ]
    compared = sorted(path.relative_to(output).as_posix() for path in output.rglob("*difference.png"))
    assert compared == [f"cifar_resnet20.ce_digits-{i}/figures/positive_posterior_difference.png" for i in (2, 3)]
    assert list(results[1].heads) == ["prediction"]
    assert list(results[1].distances) == list(results[1].embedding.points) == ["v"]
    assert results[0].embedding.classes == [2, 9]
    # But for the embedding, where it goes changes nothing.
    for part in ("heads", "positive_posterior", "distances", "confusion", "reliability"):
        assert getattr(results[0], part) == getattr(result, part)

    text = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split()[-4:] for line in text.splitlines()}
    for name in ("v", "z"):
        for said, of in RHO.items():
            rhos = [result.distances[name][group].rho(*of) for group in ("all", "many", "medium", "few")]
            shown = [None if x is None else f"{x:.3f}" for x in rhos]
            row = ["rho", "of", f"{name},", *said.split(), *(x or NOTHING for x in shown)]
            assert any(line.split() == row for line in text.splitlines())
    title = "mean positive posterior, cifar_resnet20.ce_digits (seed 5) minus mbib_resnet20.digits (seed 0)"
    assert text.count(title) == 2
    few = [i for i, n in enumerate(result.class_counts) if n < 20]
    first, other = (r.positive_posterior["prediction"] for r in results[:2])
    assert rows["difference"][3] == f"{sum(other[i] - first[i] for i in few) / len(few):+.3f}"
    assert f"accuracy: {result.trend.slope:+.1f} points per tenfold training images" in text


def test_the_text_of_few_classes_states_no_slope_and_no_errors_to_groups_without_classes(result):
    metrics = result.heads["prediction"]
    few = replace(metrics, per_class=[50.0] * 9 + [None], classes={**metrics.classes, "many": 0})
    text = summary_text(replace(result, heads={**result.heads, "prediction": few}))
    assert "points per tenfold" not in text
    lines = [line.split() for line in text.splitlines()]
    low, high = metrics.intervals["macro"]
    assert ["95", "%", "interval", f"{low:.1f}-{high:.1f}"] in [line[:4] for line in lines]
    start = next(place for place, line in enumerate(lines) if "(evenly:" in line)
    (row,) = (line for line in lines[start:] if line[:1] == ["few"])
    assert [row[2], row[5]] == [NOTHING] * 2


def test_two_runs_of_one_recipe_and_seed_go_by_their_folders(run, result, monkeypatch, capsys):
    monkeypatch.setattr(analyze_module, "find_target", lambda target, *_: target)
    monkeypatch.setattr(analyze_module, "_check_same_classes", lambda *_: None)
    monkeypatch.setattr(analyze_module, "_own_folder", Path)
    monkeypatch.setattr(analyze_module, "_analyze", lambda *_: result)
    monkeypatch.setattr(analyze_module, "write_analysis", lambda *_: None)
    monkeypatch.setattr(analyze_module, "analysis_figures", lambda _: [])
    drawn = []
    monkeypatch.setattr(analyze_module, "_draw", lambda _, figures: drawn.extend(figure.title for figure in figures))
    said = "mean positive posterior, mbib_resnet20.digits, mine (seed 0) minus mbib_resnet20.digits{} (seed 0)"
    for first, named in (("runs/ctrlc", ", ctrlc"), ("runs/mbib_resnet20.digits", "")):
        given = [first, "local-dir:runs/mine/"]
        analyze(given)
        text = capsys.readouterr().out
        assert said.format(named) in text
        heads = [line for line in text.splitlines() if line.endswith(" on test: 340 images")]
        assert heads == [f"{name}: mbib_resnet20.digits on test: 340 images" for name in given]
        assert drawn.pop().lower() == said.format(named)


def test_runs_with_other_classes_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(analyze_module, "collect_outputs", lambda *_, **__: pytest.fail("a pass over data"))
    other = shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("analysis"))
    config = json.loads((other / "config.json").read_text())
    names = config["label_names"]
    (other / "config.json").write_text(json.dumps({**config, "label_names": [*names[:3], *names[:2:-1]]}))
    said = rf"class 3 is '{names[3]}' in .*{run.name}, '{names[-1]}' in .*other"
    with pytest.raises(MbibError, match=f"runs of different classes cannot be compared: {said}"):
        analyze([str(run), str(other)], overrides={"device": "cpu"})


def test_a_comparison_says_where_the_images_are_others(result):
    other = replace(result, split="val", images=1200)
    said = "the first is of 340 images of the split 'test', the other of 1,200 images of the split 'val'."
    (figure,) = comparison_figures(result, other)
    assert said in comparison_text(result, other)
    assert figure.reading.endswith(said)
    (figure,) = comparison_figures(result, result)
    assert "images of" not in comparison_text(result, result) + figure.reading


def test_what_is_refused(run, tmp_path, monkeypatch):
    cpu = {"device": "cpu"}
    with pytest.raises(MbibError, match=r"no class 10 to embed: labels lie in 0\.\.9"):
        analyze([str(run)], overrides=cpu, output=tmp_path / "new", classes=[3, 10])
    with pytest.raises(MbibError, match=r"holds no config\.json"):
        analyze([str(tmp_path)], overrides=cpu)
    with pytest.raises(MbibError, match=r"is not a run's folder: give a folder for the results with --output DIR"):
        analyze(["mbib_resnet32.cifar100_lt_if100"], overrides=cpu)
    other = shutil.copytree(run, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "class_counts": [50] * 7}))
    with pytest.raises(MbibError, match="class_counts: expected 10 entries, as num_classes says, got 7"):
        analyze([str(other)], overrides=cpu, output=tmp_path / "new")
    monkeypatch.setattr("mbib_timm.environment.join_world", lambda device: World(torch.device("cpu"), 0, 2))
    with pytest.raises(MbibError, match="one process, not in 2"):
        analyze([str(run)], overrides=cpu, output=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_file_that_is_no_analysis_is_not_replaced(run, tmp_path, monkeypatch):
    monkeypatch.setattr(analyze_module, "_analyze", lambda *arguments: pytest.fail("analyzed"))
    (tmp_path / "analysis.json").write_text('{"heads": 2}')
    with pytest.raises(MbibError, match=r"^--output \S+/analysis.json: the existing file holds no analysis, and"):
        analyze([str(run)], output=tmp_path)
    assert (tmp_path / "analysis.json").read_text() == '{"heads": 2}'


def test_without_scikit_learn_nothing_is_started(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    monkeypatch.setattr(analyze_module, "collect_outputs", lambda *_, **__: pytest.fail("a pass over data"))
    with pytest.raises(MbibError, match=r"pip install 'mbib-timm\[analyze\]'"):
        analyze([str(run)], overrides={"device": "cpu"})


@pytest.mark.slow
def test_the_command_writes_where_it_is_told(run, undrawn, tmp_path, capsys):
    """Into a folder of the analysis, which is not where runs go."""
    own = shutil.copytree(run, tmp_path / "own", ignore=shutil.ignore_patterns("analysis"))
    command = ["analyze", str(own), "--device", "cpu", "--images-per-class", "5"]
    assert main([*command, "--output", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "analysis.json").is_file()
    assert not (own / "analysis").exists()
    assert main(command) == 0
    assert (own / "analysis" / "analysis.json").is_file()
    assert "mean positive posterior" in capsys.readouterr().out
