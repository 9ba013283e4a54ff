"""Tables and figures of sweeps, of accuracies that are known because they are made up."""

import csv
import io
import json
import re
import statistics
from dataclasses import asdict, replace
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from made_up_results import made_up
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer

from mbib_timm.drawing import DARK, METHOD_COLORS, render
from mbib_timm.errors import MbibError
from mbib_timm.reporting.report_figures import group_colors, sweep_curves
from mbib_timm.sweeps import show_sweep
from mbib_timm.sweeps.show_sweep import (
    markdown,
    mean_and_deviation,
    runs_csv,
    sweep_figure,
    what_was_run,
    write_results,
)
from mbib_timm.sweeps.sweep import Paper, Sweep, find_sweep, list_sweeps
from mbib_timm.sweeps.sweep_plan import on_recipe
from mbib_timm.sweeps.sweep_results import read_results, row_name

pytestmark = pytest.mark.figures
GROUPS = ("overall", "many", "medium", "few")
SMALL = Sweep(
    "small", "mbib_resnet32.cifar100_lt_if{imbalance_factor}",
    {"imbalance_factor": [100, 10], "method.beta": [0, 5]}, [0, 1, 2], title="A trial",
    labels={"imbalance_factor": "factor", "method.beta": "beta"},
    paper=Paper("Table 0", numbers=[{"imbalance_factor": 10, "method.beta": 5, "overall": 41.4, "few": 20.0}]),
)  # fmt: skip


def scattered(place, seed, column):
    """An accuracy that no other run has."""
    return float(np.random.RandomState([place, seed, GROUPS.index(column)]).uniform(10, 90))


def table_of(results):
    """Return the rows of the Markdown table as dictionaries."""
    lines = [line.strip("| ").split(" | ") for line in markdown(results).splitlines() if line.startswith("|")]
    header, rule, *rows = lines
    assert set(rule) == {"---"}
    assert len(set(header)) == len(header)
    return [dict(zip(header, row, strict=True)) for row in rows]


def title_of(results):
    return markdown(results).splitlines()[0]


# Tables


def test_rows_have_the_mean_the_sample_deviation_and_n():
    rows = table_of(made_up(SMALL, scattered))
    assert [(row["factor"], row["beta"]) for row in rows] == [("100", "0"), ("100", "5"), ("10", "0"), ("10", "5")]
    for place, row in enumerate(rows):
        for column in GROUPS:
            values = [scattered(place, seed, column) for seed in range(3)]
            assert row[column] == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
        assert row["n"] == "3"


def test_one_seed_has_no_deviation_and_unequal_numbers_of_seeds_are_told():
    alone = made_up(replace(SMALL, seeds=[1]), scattered)
    assert table_of(alone)[0]["overall"] == f"{scattered(0, 1, 'overall'):.1f}"
    assert title_of(alone) == "# small: A trial (cifar100_lt, 200 epochs, n = 1)"
    results = made_up(SMALL, scattered)
    fewer = replace(results, runs=[run for run in results.runs if run.label != results.runs[0].label])
    assert [row["n"] for row in table_of(fewer)] == ["2", "3", "3", "3"]
    assert title_of(fewer) == "# small: A trial (cifar100_lt, 200 epochs, n = 2 to 3; 11 of 12 runs)"
    assert "11 of 12 runs" in markdown(fewer)


def test_means_and_deviations():
    assert mean_and_deviation([40.0, 42.0]) == "41.0 ± 1.4"
    assert mean_and_deviation([40.0]) == "40.0"
    assert mean_and_deviation([None, 40.0]) == "40.0"
    assert mean_and_deviation([None, None]) == mean_and_deviation([]) == "–"


def test_the_title_says_the_epochs_run_of_those_asked_for():
    assert title_of(made_up(SMALL)) == "# small: A trial (cifar100_lt, 200 epochs, n = 3)"
    short = made_up(replace(SMALL, seeds=[0]), epochs=20)
    assert title_of(short) == "# small-20e: A trial (cifar100_lt, 20 epochs of 200, n = 1)"
    assert "Not the recipe's schedule" in markdown(short)
    assert "Not the recipe's schedule" not in markdown(made_up(SMALL))


def test_what_some_rows_had_more_of_is_said():
    """Epochs of further stages, and labels of further images."""
    results = made_up(SMALL)
    assert "Stages of" not in markdown(results)
    assert "further images" not in markdown(results)
    first, *others = results.runs
    more = replace(first, stage_epochs=[200, 10], chosen={"tau": 0.5}, chosen_on="990 held-out images")
    said = what_was_run(replace(results, runs=[more, *(replace(run, stage_epochs=[200]) for run in others)]))
    row = "factor 100, beta 0"
    assert f"Stages of 200 + 10 epochs: {row}." in said
    assert f"**Chosen with labels of further images**: tau of {row}, on 990 held-out images." in said
    untrained = replace(results, runs=[replace(run, stage_epochs=[200, 0]) for run in results.runs])
    assert not any("Stages of" in sentence for sentence in what_was_run(untrained)), "nothing is trained there"


def test_an_axis_of_heads_keeps_a_label_of_its_own():
    sweep = replace(find_sweep(["frozen_imbalance"]), labels={"head": "classifier"}, seeds=[0])
    results = made_up(sweep)
    assert row_name(results, results.runs[0].coordinates) == "imbalance factor 50, classifier BSCE, linear"
    assert set(table_of(results)[0]) >= {"imbalance factor", "classifier"}


def test_a_group_without_classes_is_a_dash():
    sweep = replace(SMALL, paper=Paper("Table 0", numbers=[{"few": 1.0}]))
    rows = table_of(made_up(sweep, lambda place, seed, column: None if column == "few" else 50.0))
    assert {(row["few"], row["overall"]) for row in rows} == {("–", "50.0 ± 0.0")}
    assert {(row["paper: few (Table 0)"], row["difference"]) for row in rows} == {("1.0", "–")}


def test_the_difference_is_from_the_papers_number_for_that_row():
    rows = table_of(made_up(SMALL, scattered))
    for column, number in (("overall", 41.4), ("few", 20.0)):
        assert [row[f"paper: {column} (Table 0)"] for row in rows] == ["–", "–", "–", str(number)]
        mean = statistics.mean(scattered(3, seed, column) for seed in range(3))
        assert [row[f"difference: {column}"] for row in rows] == ["–", "–", "–", f"{mean - number:+.1f}"]
    assert "difference: many" not in rows[0]


def test_on_left_out_training_images_no_paper_stands_beside():
    results = made_up(SMALL, scattered)
    results = replace(results, runs=[replace(run, split="left_out") for run in results.runs])
    assert "split left_out" in markdown(results)
    assert not [column for column in table_of(results)[0] if "paper" in column or "difference" in column]
    assert "paper" not in markdown(results)


def test_a_shortened_sweep_differs_from_nothing():
    results = made_up(SMALL, epochs=20)
    assert not [column for column in table_of(results)[0] if "difference" in column]
    assert table_of(results)[3]["paper: overall (Table 0)"] == "41.4"
    one = replace(results.runs[0], epochs=20)
    mixed = made_up(SMALL)
    assert not [c for c in table_of(replace(mixed, runs=[one, *mixed.runs[1:]]))[0] if "difference" in c]


def test_another_recipe_than_the_papers_differs_from_nothing():
    here = made_up(find_sweep(["table7_heads"]))
    assert not [column for column in table_of(here)[0] if "difference" in column]
    assert "The paper's numbers are for another setting, `bib_resnet10.imagenet_lt`" in markdown(here)
    there = made_up(on_recipe(find_sweep(["table7_heads"]), "bib_resnet10.imagenet_lt"))
    assert {f"difference: {column}" for column in GROUPS} <= table_of(there)[0].keys()
    assert "another setting" not in markdown(there)
    elsewhere = made_up(on_recipe(find_sweep(["table7_heads"]), "bib_resnet32.digits"))
    assert not [column for column in table_of(elsewhere)[0] if "paper" in column or "difference" in column]


def test_rows_of_heads():
    results = made_up(find_sweep(["table7_heads"]), scattered)
    rows = {(row["method"], row["head"]): row for row in table_of(results)}
    assert list(rows) == [("BSCE", ""), ("BSCE_MLP", ""), ("BIB", "v"), ("BIB", "z"), ("BIB", "ensemble")]
    mean = statistics.mean(scattered(2, seed, "overall") for seed in range(3))
    # What is made up has each head a point below the one before it, first the ensemble.
    assert [rows["BIB", head]["overall"][:4] for head in ("ensemble", "v", "z")] == [
        f"{mean - depth:.1f}" for depth in range(3)
    ]
    papers = [row["paper: overall (Table 7)"] for row in rows.values()]
    assert papers == ["41.3", "39.9", "43.1", "42.1", "43.2"]


def test_methods_are_called_by_their_titles():
    rows = table_of(made_up(find_sweep(["figure9_structures"])))
    assert [row["structure"] for row in rows] == ["MBIB", "SE-MBIB", "ALL-MBIB"]


def test_every_run_is_a_row_of_the_csv():
    results = made_up(find_sweep(["table7_heads"]), scattered)
    rows = list(csv.DictReader(io.StringIO(runs_csv(results).decode())))
    assert [row["run"] for row in rows] == [run.label for run in results.runs]
    assert len(rows) == 9
    for row, run in zip(rows, results.runs, strict=True):
        assert (row["method"], int(row["seed"])) == (run.coordinates["method"], run.seed)
        place = ["BSCE", "BSCE_MLP", "BIB"].index(row["method"])
        assert [float(row[column]) for column in GROUPS] == [scattered(place, run.seed, c) for c in GROUPS]
        assert (row["head_v1"] != "") == (row["method"] == "BIB")


def test_failed_runs_are_named():
    results = replace(made_up(SMALL), failed={"a-seed0": "loss became nan"})
    assert "Failed: a-seed0: loss became nan" in markdown(results)


@pytest.mark.parametrize("name", list_sweeps())
def test_what_is_written_is_read_back(tmp_path, monkeypatch, name):
    monkeypatch.setattr(show_sweep, "render", lambda draw, formats: dict.fromkeys(formats, b"-"))  # drawn below
    results = made_up(replace(find_sweep([name]), seeds=[0]), scattered)
    folder = tmp_path / "results" / results.name
    assert write_results(folder, results) == markdown(results) == (folder / "table.md").read_text(encoding="utf-8")
    assert read_results(folder) == read_results(folder / "sweep.json") == results
    assert json.loads((folder / "sweep.json").read_text()) == asdict(results)
    assert sorted(file.name for file in folder.iterdir()) == [
        "figure.pdf", "figure.png", "runs.csv", "sweep.json", "table.md"
    ]  # fmt: skip


def test_a_figure_that_cannot_be_drawn_does_not_end_a_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mbib_timm.sweeps.show_sweep.sweep_figure", lambda results: 1 / 0)
    write_results(tmp_path, made_up(SMALL))
    assert "no figure: division by zero" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"runs.csv", "sweep.json", "table.md"}


def test_without_matplotlib_the_tables_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    write_results(tmp_path, made_up(SMALL))
    assert "no figure: figures need matplotlib" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"runs.csv", "sweep.json", "table.md"}


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"name": "x"}'])
def test_a_file_that_holds_no_sweep_is_refused(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(MbibError, match=r"sweep\.json does not hold results of a sweep"):
        read_results(tmp_path)
    with pytest.raises(MbibError, match=r"cannot read .*nowhere: No such file"):
        read_results(tmp_path / "nowhere")


# Figures


def draw(results):
    """Return a sweep's figure as it has been rendered."""
    figures = []
    render(lambda: figures.append(sweep_figure(results)) or figures[0])
    return figures[0]


def lying(axes):
    return axes.get_xlabel() == "top-1 accuracy, %"


def bars_of(axes):
    """Return the bars as (place, height, deviation, colour), from left to right, or from the top where they lie."""
    found = []
    for container in axes.containers:
        if isinstance(container, BarContainer):
            (bar,) = container
            along, across = (bar.get_y(), bar.get_height()), (bar.get_x(), bar.get_width())
            (start, width), (zero, height) = (along, across) if lying(axes) else (across, along)
            assert zero == 0
            deviation = 0.0
            if container.errorbar is not None:
                (ends,) = container.errorbar[2][0].get_segments()
                low, high = (end[0 if lying(axes) else 1] for end in ends)
                deviation = (high - low) / 2
            found.append((start + width / 2, height, deviation, to_hex(bar.get_facecolor()).upper()))
    return sorted(found)


def places_of(axes):
    labels = axes.get_yticklabels() if lying(axes) else axes.get_xticklabels()
    return [label.get_text().replace("\n", " ") for label in labels]


@pytest.mark.filterwarnings("error")
def test_bars_are_the_means_and_their_lines_the_deviations():
    results = made_up(find_sweep(["table1_cifar100_lt"]), scattered)
    (axes,) = draw(results).axes
    # The axis of the methods is the outer one; x is the imbalance factor.
    places = [3 * method + factor for factor in range(3) for method in range(8)]
    values = [[scattered(place, seed, "overall") for seed in range(3)] for place in places]
    bars = bars_of(axes)
    assert [height for _, height, *_ in bars] == pytest.approx([statistics.mean(v) for v in values])
    assert [deviation for _, _, deviation, _ in bars] == pytest.approx([statistics.stdev(v) for v in values])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["100", "50", "10"]
    assert [round(x) for x, *_ in bars] == [0] * 8 + [1] * 8 + [2] * 8
    assert axes.get_ylabel() == "top-1 accuracy, %"
    title = " ".join(axes.figure.get_suptitle().split())
    assert title == "Methods and imbalance factors (cifar100_lt, 200 epochs, n = 3)"
    written = sorted(text.get_text() for text in axes.texts)
    assert written == sorted(f"{statistics.mean(v):.1f}" for v in values)


@pytest.mark.filterwarnings("error")
def test_shot_groups_side_by_side():
    results = made_up(find_sweep(["figure9_structures"]), scattered)
    (axes,) = draw(results).axes
    means = [statistics.mean(scattered(p, s, column) for s in range(3)) for column in GROUPS for p in range(3)]
    assert [height for _, height, *_ in bars_of(axes)] == pytest.approx(means)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["all", "many", "medium", "few"]
    assert axes.get_xlabel() == "classes"


@pytest.mark.filterwarnings("error")
def test_lines_run_through_the_means():
    results = made_up(find_sweep(["figure3_beta"]), scattered)
    (axes,) = draw(results).axes
    lines = {container.get_label(): container.lines[0] for container in axes.containers}
    assert len(lines) == 6
    for i, method in enumerate(("MBIB", "BIB")):
        for j, factor in enumerate((100, 50, 10)):
            line = lines[f"{method}, imbalance factor {factor}"]
            assert line.get_xdata().tolist() == [0, 1, 2, 3, 4, 5]
            places = [18 * i + 6 * j + beta for beta in range(6)]
            means = [statistics.mean(scattered(place, s, "overall") for s in range(3)) for place in places]
            assert line.get_ydata().tolist() == pytest.approx(means)
            assert line.get_linestyle() == ("-" if method == "MBIB" else "--"), "as in the paper's Figure 3"
    assert len({line.get_color() for line in lines.values()}) == 3
    assert axes.get_xlabel() == "beta"


@pytest.mark.filterwarnings("error")
def test_a_single_line_needs_no_legend(caplog):
    figure = {"kind": "lines", "x": "method.beta"}
    (axes,) = draw(made_up(replace(SMALL, axes={**SMALL.axes, "imbalance_factor": [10]}, figure=figure))).axes
    assert axes.get_legend() is None
    assert not caplog.text


@pytest.mark.filterwarnings("error")
def test_cells_of_the_heat_map_are_the_means():
    results = made_up(find_sweep(["figure4_weights"]), scattered)
    axes, bar = draw(results).axes
    means = np.array(
        [[statistics.mean(scattered(5 * a + b, s, "overall") for s in range(3)) for a in range(5)] for b in range(5)]
    )
    np.testing.assert_allclose(axes.images[0].get_array(), means)
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(a, b): f"{means[b, a]:.1f}" for a in range(5) for b in range(5)}
    assert (axes.get_xlabel(), axes.get_ylabel(), bar.get_ylabel()) == ("a", "b", "top-1 accuracy, %")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.0", "0.1", "0.3", "0.5", "1.0"]


def legend_colors(results):
    legend = draw(results).axes[0].get_legend()
    pairs = zip(legend.get_texts(), legend.legend_handles, strict=True)
    return {text.get_text(): handle for text, handle in pairs}


def test_the_same_method_has_the_same_colour_everywhere():
    seen = {}
    for name in ("table1_cifar100_lt", "figure9_structures", "table7_heads"):
        handles = legend_colors(made_up(find_sweep([name])))
        for title in handles.keys() - {"the paper"}:
            seen.setdefault(title, set()).add(to_hex(handles[title].get_facecolor()).upper())
    for method, color in METHOD_COLORS.items():
        assert seen.get(method, {color}) == {color}, method
    assert seen["BIB v"] == seen["BIB z"] == seen["BIB ensemble"] == {METHOD_COLORS["BIB"]}
    handles = legend_colors(made_up(find_sweep(["table7_heads"])))
    hatches = [handles[f"BIB {head}"].get_hatch() or "" for head in ("v", "z", "ensemble")]
    assert len(set(hatches)) == 3
    assert hatches[2] == "", "the prediction looks as BIB does elsewhere"


def test_bars_that_each_name_a_method_have_its_colour():
    (axes,) = draw(made_up(find_sweep(["methods"]))).axes
    titles = places_of(axes)
    assert len(titles) == 15
    assert [color for *_, color in bars_of(axes)] == [METHOD_COLORS[title].upper() for title in titles]
    assert axes.get_legend() is None


@pytest.mark.filterwarnings("error")
def test_many_bars_with_long_names_lie_below_one_another():
    results = made_up(find_sweep(["open_choices"]), scattered)
    (axes,) = draw(results).axes
    assert places_of(axes) == results.axes["departure"]
    assert axes.yaxis_inverted(), "the first is on top, as in the table"
    values = [[scattered(place, seed, "overall") for seed in range(3)] for place in range(len(places_of(axes)))]
    assert [height for _, height, *_ in bars_of(axes)] == pytest.approx([statistics.mean(v) for v in values])
    assert [deviation for _, _, deviation, _ in bars_of(axes)] == pytest.approx([statistics.stdev(v) for v in values])


def test_departures_from_a_recipe_have_the_colours_of_their_methods():
    results = made_up(find_sweep(["strong_recipe"]))
    methods = {"BIB": "BIB", "balanced softmax": "BSCE"}
    (axes,) = draw(results).axes
    expected = [METHOD_COLORS[methods.get(place, "MBIB")].upper() for place in places_of(axes)]
    assert [color for *_, color in bars_of(axes)] == expected


def test_methods_of_ones_own_have_colours_of_their_own_in_every_figure(monkeypatch):
    for title in ("BIB", "SE-MBIB"):  # as if they were nobody's
        monkeypatch.delitem(METHOD_COLORS, title)
    results = made_up(find_sweep(["methods"]))
    (axes,) = draw(results).axes
    titles = places_of(axes)
    colors = dict(zip(titles, (color for *_, color in bars_of(axes)), strict=True))
    assert colors["BIB"] != colors["SE-MBIB"]
    figure = sweep_curves(results)
    lines = {re.sub(r"\s*\(n = .*", "", line.get_label()): line.get_color().upper() for line in figure.axes[0].lines}
    assert {title: lines[title] for title in titles} == colors
    records = [SimpleNamespace(method=run) for run in ("bib", "se_mbib")]
    groups = [SimpleNamespace(first=SimpleNamespace(record=record)) for record in records]
    assert len({color for color, _ in group_colors(groups)}) == 2, "and in a report"


def looks_of_curves(name):
    """Colour and line style of each curve of a sweep that has a packaged file, in the legend's order."""
    lines = sweep_curves(made_up(find_sweep([name]))).axes[0].lines
    return [(line.get_color(), line.get_linestyle()) for line in lines if not line.get_label().startswith("_")]


def test_curves_have_the_colours_of_their_methods_where_line_styles_suffice_for_the_rest():
    methods = ("BSCE", "BIB", "MBIB")
    assert looks_of_curves("frozen_imbalance") == [
        (METHOD_COLORS[each], line) for line in ("-", "--") for each in methods
    ]
    assert [color for color, _ in looks_of_curves("table7_heads")] == [
        METHOD_COLORS[each] for each in ("BSCE", "BSCE_MLP", "BIB")
    ]
    for name in ("table4_observations", "strong_recipe"):  # of one method, and of one in more rows than styles
        looks = looks_of_curves(name)
        assert len({color for color, _ in looks}) == min(len(looks), 8)
        assert len(set(looks)) == len(looks)


def test_the_papers_numbers_are_marked_only_where_they_compare():
    def marks(results):
        lines = draw(results).axes[0].lines
        return sorted(line.get_ydata()[0] for line in lines if line.get_marker() == "D")

    sweep = find_sweep(["table4_observations"])
    assert marks(made_up(sweep)) == [45.2, 45.4, 46.1, 46.6, 46.8, 46.9]
    assert "the paper" in legend_colors(made_up(sweep))
    assert marks(made_up(sweep, epochs=20)) == []
    assert marks(made_up(find_sweep(["table7_heads"]))) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", list_sweeps())
def test_nothing_overlaps_and_nothing_is_clipped(name):
    figure = draw(made_up(find_sweep([name])))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    for axes in figure.axes:
        low, high = axes.get_xlim()
        along_x = [label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
        along_y, inside = axes.get_yticklabels(), axes.texts
        for texts in (along_x, along_y, inside):
            boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
            for i, box in enumerate(boxes):
                assert not any(box.overlaps(other) for other in boxes[i + 1 :]), texts[i].get_text()
        outside = [figure._suptitle, axes.xaxis.label, axes.yaxis.label, *along_x, *inside]
        legend = axes.get_legend()
        parts = [text for text in outside if text.get_text()] + ([legend] if legend else [])
        for part in parts:
            box = part.get_window_extent(renderer)
            assert box.x0 >= 0, part
            assert box.y0 >= 0, part
            assert box.x1 <= figure.bbox.x1, part
            assert box.y1 <= figure.bbox.y1, part
        if legend:
            assert not legend.get_window_extent(renderer).overlaps(
                axes.get_window_extent(renderer).shrunk(0.999, 0.999)
            )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", list_sweeps())
def test_a_sweep_that_has_just_begun_can_be_drawn(name):
    results = made_up(find_sweep([name]))
    figure = draw(replace(results, runs=results.runs[:1]))
    assert re.search(
        r"\d+ epochs, n = 1; 1 of \d+ runs(, started from \S+ \((ImageNet-1k|the same data)\))?\)$",
        " ".join(figure.get_suptitle().split()),
    )


@pytest.mark.filterwarnings("error")
def test_axes_that_a_figure_does_not_name_are_all_drawn():
    axes = {"imbalance_factor": [100, 10], "method.beta": [0, 5], "method.gamma": [0.0, 0.5]}
    for figure in (
        {"kind": "bars"},
        {"kind": "bars", "color": "method.beta"},
        {"kind": "bars", "x": "method.beta", "color": "method.gamma"},
    ):
        (drawn,) = draw(made_up(replace(SMALL, axes=axes, figure=figure, labels={}), scattered)).axes
        means = [statistics.mean(scattered(place, s, "overall") for s in range(3)) for place in range(8)]
        assert sorted(height for _, height, *_ in bars_of(drawn)) == pytest.approx(sorted(means)), figure


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table7_heads", "figure3_beta", "figure4_weights"])
def test_the_same_numbers_give_the_same_bytes_and_leave_no_trace(name):
    results = made_up(replace(find_sweep([name]), seeds=[0]))
    before = dict(matplotlib.rcParams)
    first, second = (render(lambda: sweep_figure(results), ("png", "pdf", "svg"), DARK) for _ in range(2))
    assert first == second
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("settings", "comparable"),
    [
        ({}, True),
        ({"val_interval": 20, "torchcompile": False}, True),
        ({"dataset": "folder", "data_dir": "elsewhere"}, False),
        ({"dataset": "digits"}, False),
        ({"lr": 0.01}, False),
        ({"val_interval": 20, "batch_size": 64}, False),
    ],
)
def test_what_was_set_from_outside_is_told_and_decides_whether_the_paper_compares(settings, comparable):
    results = made_up(find_sweep(["table9_rebalancing"]), **settings)
    text = markdown(results)
    assert ("difference" in text) == results.is_papers == comparable
    for key, value in settings.items():
        assert (f"`{key}` {value}" in text) == (key != "data_dir"), "where data lie decides nothing, and is private"
    assert ("Changed from the recipe" in text) == bool(settings)
