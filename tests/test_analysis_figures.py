"""Figures of an analysis hold its numbers, and can be drawn from every shape that it takes."""

import json
import math
import re
import statistics
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from mbib_timm.analysis.analysis_figures import TITLE
from mbib_timm.analysis.analysis_record import (
    Analysis,
    analysis_figures,
    comparison_figures,
    read_analysis,
    rounded,
    write_analysis,
)
from mbib_timm.analysis.analyze import analyze
from mbib_timm.analysis.embedding import Embedding
from mbib_timm.analysis.measures import (
    Distances,
    accuracy_trend,
    group_confusion,
    mean_by_shot_group,
    mean_positive_posterior,
    reliability,
)
from mbib_timm.data.long_tail import exponential_profile
from mbib_timm.drawing import DARK, GROUP_COLORS, LIGHT, render, text_on
from mbib_timm.environment import Environment
from mbib_timm.models.complexity import Cost, Efficiency
from mbib_timm.results.paper import TABLE_5, TABLE_6
from mbib_timm.results.record import HeadMetrics

ROOT = Path(__file__).parents[1]
GROUPS = ["all", "many", "medium", "few"]
FIGURES = [
    "accuracy_by_head", "trend", "confusion", "positive_posterior", "reliability", "distances", "embedding", "costs",
]  # fmt: skip


@pytest.fixture(scope="module")
def real(finished_run, tmp_path_factory):
    """The digits: four shot groups' columns, five heads, v and z."""
    output = tmp_path_factory.mktemp("analysis")
    (analysis,) = analyze([str(finished_run)], overrides={"device": "cpu"}, output=output, images_per_class=8)
    return analysis


def made_up(counts, tested, heads=("prediction",), named=False):
    """An analysis of a model that was never trained; with one head it has no z, and classes not `tested` no images."""
    rng = np.random.default_rng(0)
    counts, classes = np.array(counts), len(counts)
    labels = np.repeat(tested, 2)
    predicted = np.where(rng.random(len(labels)) < 0.6, labels, rng.integers(0, classes, len(labels)))
    confidence = rng.uniform(1 / classes, 1, len(labels))
    correct = np.bincount(labels, labels == predicted, classes)
    place, columns = np.ceil(15 * confidence).astype(int) - 1, (np.ones(len(labels)), confidence, labels == predicted)
    bins = np.stack([np.bincount(place, column, 15) for column in columns], axis=1)
    images = np.bincount(labels, minlength=classes)
    per_class = [100 * float(c / n) if n else None for c, n in zip(correct, images, strict=True)]
    accuracy = mean_by_shot_group(np.array(per_class, dtype=float), counts)
    groups = {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}
    metrics = HeadMetrics(
        top1=accuracy["all"], top5=accuracy["all"], macro=accuracy["all"], **{name: accuracy[name] for name in groups},
        ece=5.0, nll=1.5, images=len(labels), per_class=per_class,
        classes={name: int(chosen.sum()) for name, chosen in groups.items()},
    )  # fmt: skip
    posterior = mean_positive_posterior(confidence, labels, classes).tolist()
    features = ["v", "z"] if len(heads) > 1 else ["v"]
    embedded = list(dict.fromkeys(tested))[:: max(1, len(tested) // 10)]
    rho = {group: Distances(*[None if a is None else d for d in (1.4, 1.0, 2.0, 1.9)]) for group, a in accuracy.items()}
    cost = Cost(parameters=1000, macs=10**9)
    return rounded(
        Analysis(
            name="made_up", model="made_up", epochs=None, seed=None, split="test", images=len(labels),
            class_names=[f"a class with a long name {i}" for i in range(classes)] if named else None,
            class_counts=counts.tolist(),
            prediction_heads=list(heads[-2:]) if len(heads) > 1 else [],
            environment=Environment("0", None, "0", "0", "cpu", "an abacus", 1, "mbib analyze"),
            heads=dict.fromkeys(heads, metrics),
            positive_posterior=dict.fromkeys(heads, posterior),
            distances=dict.fromkeys(features, rho),
            embedding=Embedding(
                classes=embedded, labels=np.repeat(embedded, 2).tolist(), perplexity=1.0, seed=0,
                points={name: rng.normal(size=(2 * len(embedded), 2)).tolist() for name in features},
            ),
            reliability=dict.fromkeys(heads, reliability(bins)),
            confusion=group_confusion(labels, predicted, counts),
            trend=accuracy_trend(per_class, counts),
            efficiency=Efficiency([3, 8, 8], cost, cost),
        )
    )  # fmt: skip


MBIB_HEADS = ("prediction", "x", "v1", "v2", "z")
EXTREMES = {
    "two classes, one without images": made_up([500, 5], [0, 0, 0]),
    "two balanced classes": made_up([100, 100], [0, 1], named=True),
    "a class in each group": made_up([101, 100, 19], [0, 1, 2], MBIB_HEADS, named=True),
    "few only": made_up([3, 2, 1], [0, 1, 2], MBIB_HEADS),
    "iNaturalist": made_up(
        np.maximum(2, 1000 / np.arange(1, 8143) ** 0.62).astype(int), list(range(0, 8142, 2)), MBIB_HEADS
    ),
}


def figure_of(analysis, name, other=None):
    """The figure, as it stands before it is written."""
    illustrations = analysis_figures(analysis) if other is None else comparison_figures(analysis, other)
    kept = []
    draw = next(illustration.draw for illustration in illustrations if illustration.name == name)
    render(lambda: kept.append(draw()) or kept[0], formats=())
    return kept[0]


def bars(axes):
    """Heights of the bars, in the order in which they were drawn."""
    return [patch.get_height() for container in axes.containers for patch in container]


def texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "theme"), list(zip(["real", *EXTREMES], [LIGHT, DARK] * len(EXTREMES), strict=False))
)
def test_every_figure_can_be_drawn(which, theme, request):
    analysis = request.getfixturevalue("real") if which == "real" else EXTREMES[which]
    illustrations = [*analysis_figures(analysis), *comparison_figures(analysis, analysis)]
    assert [illustration.name for illustration in illustrations] == [*FIGURES, "positive_posterior_difference"]
    for illustration in illustrations:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            content = render(illustration.draw, theme=theme)["png"]
        assert content.startswith(b"\x89PNG")


def test_a_reading_is_one_sentence(real):
    for illustration in [*analysis_figures(real), *comparison_figures(real, real)]:
        reading = re.sub(re.escape(f"{real.name} (seed 0)"), "a run", illustration.reading)
        assert re.fullmatch(r"[A-Z][^.!?]*(\d\.\d[^.!?]*)*\.", reading), reading
        assert len(illustration.title) > 5


def test_what_an_older_file_has_not_measured_is_not_shown(real, tmp_path):
    write_analysis(tmp_path, real)
    file = tmp_path / "analysis.json"
    content = json.loads(file.read_text())
    del content["trend"]
    file.write_text(json.dumps(content))
    read = read_analysis(tmp_path)
    assert replace(read, trend=real.trend) == real
    assert [figure.name for figure in analysis_figures(read)] == [name for name in FIGURES if name != "trend"]


def test_posterior_bars_follow_the_order_of_training_images(real):
    order = np.random.default_rng(0).permutation(10)
    values = real.positive_posterior["prediction"]
    shuffled = replace(
        real,
        class_counts=[real.class_counts[i] for i in order],
        positive_posterior={"prediction": [values[i] for i in order]},
        class_names=[real.class_names[i] for i in order],
    )
    for analysis in (real, shuffled):
        figure = figure_of(analysis, "positive_posterior")
        axes = figure.axes[0]
        assert bars(axes) == pytest.approx(values)  # the digits are sorted
        assert [label.get_text() for label in axes.get_xticklabels()] == [str(i) for i in range(10)]
        means = mean_by_shot_group(np.array(values), real.counts)
        lines = [line for line in axes.lines if len(line.get_ydata()) == 2]
        assert [line.get_ydata()[0] for line in lines] == pytest.approx([means[name] for name in GROUPS[1:]])
        assert [tuple(line.get_xdata()) for line in lines] == [(0.5, 2.5), (2.5, 6.5), (6.5, 10.5)]
        assert texts(figure) == [
            f"many (2 classes): {means['many']:.2f}", f"medium (4 classes): {means['medium']:.2f}",
            f"few (4 classes): {means['few']:.2f}", "mean of the shot group",
        ]  # fmt: skip


def test_8142_classes_become_means_of_neighbours():
    analysis = EXTREMES["iNaturalist"]
    values = np.array(analysis.positive_posterior["prediction"], dtype=float)
    figure = figure_of(analysis, "positive_posterior")
    axes = figure.axes[0]
    assert "mean of 55 neighbours" in axes.get_title()
    assert 148 <= len(bars(axes)) <= 150
    order = np.argsort(-analysis.counts, kind="stable")
    many = order[: min(55, analysis.heads["prediction"].classes["many"])]
    assert bars(axes)[0] == pytest.approx(np.nanmean(values[many]))


def test_difference_is_other_minus_first(real):
    values = np.array(real.positive_posterior["prediction"])
    changed = np.clip(values + np.linspace(-0.2, 0.3, 10), 0, 1)
    counts = real.class_counts[::-1]  # the first's training images decide the order
    posterior = {"prediction": changed.tolist()}
    other = replace(real, name="other", seed=None, class_counts=counts, positive_posterior=posterior)
    figure = figure_of(real, "positive_posterior_difference", other)
    assert bars(figure.axes[0]) == pytest.approx(changed - values)
    assert figure.axes[0].get_title() == "other\nminus mbib_resnet20.digits (seed 0)"
    assert f"many (2 classes): −{abs((changed - values)[:2].mean()):.3f}" in texts(figure)
    low, high = figure_of(real, "positive_posterior_difference", real).axes[0].get_ylim()
    assert (low, high) == (-0.005, 0.005)  # no axis of rounding errors
    title = figure_of(real, "positive_posterior_difference", replace(other, name="x" * 200)).axes[0].get_title()
    assert len(title.splitlines()[0]) == TITLE


def test_distances_are_rho_with_the_papers_beside_it(real):
    figure = figure_of(real, "distances")
    readings = [("centre", "inter"), ("pairs", "inter"), ("centre", "inter_within"), ("pairs", "inter_within")]
    for axes, of in zip(figure.axes, readings, strict=True):
        rhos = [real.distances[name][group].rho(*of) for name in ("v", "z") for group in GROUPS]
        assert bars(axes) == pytest.approx(rhos)
        assert [text.get_text() for text in axes.texts] == [f"{rho:.2f}" for rho in rhos]
        assert not axes.lines
        title = axes.get_title()
        assert ("centre" in title, "pairs" in title) == (of[0] == "centre", of[0] == "pairs")
        assert ("all classes" in title, "group" in title) == (of[1] == "inter", of[1] == "inter_within")
    assert texts(figure) == ["v", "z"]
    assert {name: sum(map(len, table.values())) for name, table in TABLE_5.items()} == {
        "cifar_resnet32.bsce_cifar100_lt_if100": 4,
        "bib_resnet32.cifar100_lt_if100": 7,
        "mbib_resnet32.cifar100_lt_if100": 7,
    }
    for name, table in TABLE_5.items():
        short = figure_of(replace(real, name=name), "distances")
        assert not any(axes.lines for axes in short.axes), "the paper's numbers are not for three epochs"
        others = figure_of(replace(real, name=name, epochs=200), "distances")
        assert not any(axes.lines for axes in others.axes), "nor for other data under the name"
        counts = exponential_profile(100, 500, float(name.rpartition("_if")[2]))
        heads = {head: replace(one, per_class=[50.0] * 100, class_images=[]) for head, one in real.heads.items()}
        own = replace(
            real,
            name=name,
            epochs=200,
            class_counts=counts,
            class_names=None,
            heads=heads,
            positive_posterior={"prediction": [0.5] * 100},
        )
        figure = figure_of(own, "distances")
        papers = [table[f][group] for f in table for group in GROUPS if group in table[f]]
        for axes in figure.axes:
            markers = [float(line.get_ydata()[0]) for line in axes.lines if len(line.get_ydata())]
            assert markers == papers, "beside every reading"
        assert texts(figure) == ["v", "z", "paper (Table 5)"]


INTRA = ("pairs", "centre")


@pytest.mark.parametrize(
    "folder", sorted(file.parent for file in (ROOT / "results").glob("*/analysis.json")), ids=lambda folder: folder.name
)
def test_the_page_has_our_rho_beside_the_papers(folder):
    analysis = read_analysis(folder)
    if analysis.name not in TABLE_5:
        pytest.skip("the paper's table has no such run")
    page = (ROOT / "docs/sweeps.md").read_text()
    method = analysis.name.removeprefix("cifar_resnet32.").partition("_")[0].upper()
    groups = ("many", "medium", "few")
    for head, papers in TABLE_5[analysis.name].items():
        ours = [[f"{analysis.distances[head][each].rho(intra, 'inter'):.2f}" for each in groups] for intra in INTRA]
        paper = [f"{papers[each]:.2f}" if each in papers else "not legible" for each in groups]
        assert f"\n| {method}, {head} | {' | '.join(map(' / '.join, [*ours, paper]))} |\n" in page

    def misfit(intra, inter):
        found = [
            (head, each, paper) for head, papers in TABLE_5[analysis.name].items() for each, paper in papers.items()
        ]
        return statistics.mean(
            (analysis.distances[head][each].rho(intra, inter) - paper) ** 2 for head, each, paper in found
        )

    fits = [math.sqrt(misfit(intra, inter)) for intra in INTRA for inter in ("inter", "inter_within")]
    assert max(abs(fits[0] - fits[1]), abs(fits[2] - fits[3])) < 0.025
    assert (fits[0] < fits[2]) == (method == "BSCE"), "which of them fits better"


def test_embedding_has_a_panel_for_v_and_z(real):
    figure = figure_of(real, "embedding")
    assert [axes.get_title() for axes in figure.axes] == ["v", "z"]
    shown = real.embedding
    for axes, points in zip(figure.axes, shown.points.values(), strict=True):
        assert sum(len(line.get_xdata()) for line in axes.lines) == len(points) == 80
        assert not len(axes.get_xticks())
        for label, line in zip(range(10), axes.lines, strict=True):  # the digits are sorted
            mine = [point for point, of in zip(points, shown.labels, strict=True) if of == label]
            assert np.column_stack(line.get_data()).tolist() == mine
    looks = [[(line.get_color(), line.get_marker()) for line in axes.lines] for axes in figure.axes]
    assert looks[0] == looks[1]
    assert len(set(looks[0])) == 10
    counts = real.class_counts
    assert texts(figure) == [f"{i} ({counts[i]})" for i in range(10)]
    assert [axes.get_title() for axes in figure_of(EXTREMES["two balanced classes"], "embedding").axes] == ["v"]


def test_a_head_and_its_features_have_one_colour_in_every_figure(real):
    bars = figure_of(real, "accuracy_by_head").axes[0].containers
    colors = {each.get_label().partition(" ")[0]: to_hex(each.patches[0].get_facecolor()) for each in bars}
    curves = {line.get_label().partition(":")[0]: line for line in figure_of(real, "reliability").axes[0].lines}
    features = figure_of(real, "distances").axes[0].containers
    of_features = {each.get_label(): to_hex(each.patches[0].get_facecolor()) for each in features}
    for head, feature in (("v3", "v"), ("z", "z")):
        assert to_hex(curves[head].get_color()) == of_features[feature] == colors[head]
    assert len({colors[name] for name in ("prediction", "v1", "v2", "v3", "z")}) == 5


def test_reliability_shows_the_prediction_and_the_heads_it_is_made_of(real):
    figure = figure_of(real, "reliability")
    shown = ["prediction", "v3", "z"]
    eces = [f"{name}: ECE {real.reliability[name].ece:.1f} %" for name in shown]
    assert texts(figure)[:4] == [*eces, "perfectly calibrated"]
    curves = {line.get_label(): line for line in figure.axes[0].lines}
    for name, label in zip(shown, eces, strict=True):
        bins = real.reliability[name]
        drawn = np.column_stack(curves[label].get_data()).tolist()
        pairs = zip(bins.confidence, bins.accuracy, strict=True)
        assert drawn == [list(pair) for pair in pairs if None not in pair]
    shares = [patch.get_data().values for patch in figure.axes[1].patches if hasattr(patch, "get_data")]
    assert [share.sum() for share in shares] == pytest.approx([100] * 4)  # the prediction's is filled too
    single = figure_of(EXTREMES["two balanced classes"], "reliability")
    assert texts(single)[0].startswith("prediction: ECE")
    assert not any(text.startswith(("v", "z")) for text in texts(single))


def test_confusion_stacks_every_group(real):
    axes = figure_of(real, "confusion").axes[0]
    widths = [patch.get_width() for patch in axes.patches][:24]
    content = real.confusion
    expected = [
        value for group in GROUPS[1:] for kind in ("shares", "even") for value in getattr(content, kind)[group].values()
    ]
    assert widths == pytest.approx(expected)
    assert axes.get_yticklabels()[0].get_text() == "many\n68 images"
    for place, group in enumerate(GROUPS[1:]):
        assert sum(widths[8 * place : 8 * place + 4]) == pytest.approx(100), group
    empty = figure_of(EXTREMES["two balanced classes"], "confusion").axes[0]
    assert [text.get_text() for text in empty.texts].count("no images") == 2


def test_numbers_stand_out_from_their_bars():
    assert [text_on(color) for color in ("#000000", "#0072B2", "#D55E00", "#F0E442", "#ffffff")] == [
        "#ffffff", "#ffffff", "#000000", "#000000", "#000000",
    ]  # fmt: skip


def test_trend_has_a_point_for_each_class_and_the_line(real):
    figure = figure_of(real, "trend")
    axes = figure.axes[0]
    *groups, line = axes.lines
    points = np.concatenate([np.column_stack(group.get_data()) for group in groups])
    expected = np.column_stack([real.class_counts, real.heads["prediction"].per_class])
    np.testing.assert_allclose(points, expected)
    assert [group.get_color() for group in groups] == list(GROUP_COLORS.values())
    trend = real.trend
    x, y = line.get_data()
    assert y == pytest.approx(trend.intercept + trend.slope * np.log10(x))
    assert texts(figure)[-1].startswith(f"{trend.slope:+.1f} points".replace("-", "−"))
    assert axes.get_xscale() == "log"
    # Classes without images have no point, balanced ones no line, and many classes are means of neighbours.
    assert len(figure_of(EXTREMES["two classes, one without images"], "trend").axes[0].lines) == 1
    many = figure_of(EXTREMES["iNaturalist"], "trend")
    assert 148 <= sum(len(line.get_xdata()) for line in many.axes[0].lines[:-1]) <= 150


def test_costs_are_ours_beside_table_6(real):
    papers = replace(real, efficiency=replace(real.efficiency, input_size=[3, 640, 640]))
    panels = figure_of(papers, "costs").axes
    rows = [real.efficiency.inference, real.efficiency.all_heads, *(Cost(**values) for values in TABLE_6.values())]
    for axes, key, unit in zip(panels, ("parameters", "macs"), (1e3, 1e9), strict=True):
        assert [patch.get_width() for patch in axes.patches] == pytest.approx(
            [getattr(row, key) / unit for row in rows]
        )
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    assert names[0] == "this model, inference"
    assert "SADE, paper" in names
    # At another size of image, which is another network's, Table 6 has nothing; and with one head there is one bar.
    assert [len(axes.patches) for axes in figure_of(real, "costs").axes] == [2, 2]
    assert [len(axes.patches) for axes in figure_of(EXTREMES["two balanced classes"], "costs").axes] == [1, 1]


def test_accuracy_by_head_has_every_head(real):
    legend = figure_of(real, "accuracy_by_head").axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        "v1 (map 1 of 3)", "v2 (map 2 of 3)", "v3 (last map)", "z (bottleneck)", "prediction",
    ]  # fmt: skip
