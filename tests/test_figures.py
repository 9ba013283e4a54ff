"""The figures of runs can be drawn from every shape that results take. How they look is for a person to judge."""

import io
import re
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from made_up_results import made_up_record
from PIL import Image

from mbib_timm import drawing
from mbib_timm.drawing import DARK, LIGHT, Illustration, render, write_illustrations
from mbib_timm.errors import MbibError
from mbib_timm.results import run_figures as figures
from mbib_timm.results.columns import macro_is_overall
from mbib_timm.results.record import Epoch, HeadMetrics
from mbib_timm.results.run_figures import draw_figures, run_figures

pytestmark = pytest.mark.filterwarnings("error")


def result(classes, few=None):
    rng = np.random.RandomState(0)
    return HeadMetrics(
        top1=50.0, top5=90.0, macro=45.0, many=70.0, medium=40.0, few=few, ece=5.0, nll=1.5, images=1000,
        classes={"many": classes, "medium": 0, "few": 0},
        per_class=[None, *rng.uniform(0, 100, classes - 1).tolist()],
    )  # fmt: skip


def drawn(draw, theme=LIGHT):
    """Return the figure's pixels; it must hold more than its background, which is the theme's."""
    image = Image.open(io.BytesIO(render(draw, ("png",), theme)["png"])).convert("RGB")
    background = np.array([int(theme.background[i : i + 2], 16) for i in (1, 3, 5)])
    pixels = np.asarray(image).astype(int)
    assert (pixels[0, 0] == background).all()
    assert (np.abs(pixels - background).max(axis=-1) > 100).mean() > 0.002
    return pixels


@pytest.mark.parametrize("classes", [2, 10, 30, 400])
@pytest.mark.parametrize("named", [True, False])
def test_class_accuracy(classes, named):
    names = [f"class {i}" for i in range(classes)] if named else None
    counts = np.linspace(500, 1, classes).astype(int)
    drawn(lambda: figures.class_accuracy({"prediction": result(classes)}, counts, names))


def test_bars_of_classes_follow_their_training_images():
    accuracies = [None, 20.0, 30.0, 40.0]
    results = {"prediction": replace(result(4), per_class=accuracies)}
    figure = figures.class_accuracy(results, np.array([5, 500, 50, 200]))
    heights = [bar.get_height() for container in figure.axes[0].containers for bar in container]
    assert heights == [20.0, 40.0, 30.0, 0.0]
    assert figure.axes[1].lines[0].get_ydata().tolist() == [500, 200, 50, 5]


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ([32, 16, 7, 2], ["2", "5", "10", "20"]),
        ([7, 6, 4, 3], ["3", "7"]),
        ([1500, 80, 20, 5], ["5", "10", "20", "50", "100", "200", "500", "1,000"]),
    ],
)
def test_the_axis_of_training_images_has_round_numbers(counts, shown):
    figures_drawn = []
    render(
        lambda: (
            figures_drawn.append(figures.class_accuracy({"prediction": result(4)}, np.array(counts)))
            or figures_drawn[0]
        )
    )
    axis = figures_drawn[0].axes[1].yaxis
    assert [label.get_text() for label in axis.get_ticklabels(which="both")] == shown


def test_both_figures_say_how_many_classes_are_evaluated():
    counts = np.array([500, 200, 50, 5, 4, 3])
    metrics = replace(
        result(6), classes={"many": 2, "medium": 1, "few": 3}, per_class=[10.0, 20.0, 30.0, 40.0, None, 50.0],
        measured={"overall": (90, 5), "many": (40, 2), "medium": (20, 1), "few": (30, 2)},
    )  # fmt: skip
    legend = figures.class_accuracy({"prediction": metrics}, counts).legends[0]
    by_class = [text.get_text() for text in legend.get_texts()]
    assert by_class == ["no test images", "many (2 classes)", "medium (1 class)", "few (2 of 3 classes evaluated)"]
    ticks = figures.shot_groups_figure({"prediction": metrics}).axes[0].get_xticklabels()
    assert [text.get_text().replace("\n", " ") for text in ticks] == [
        *("overall 1,000 images", "macro 5 of 6 classes evaluated"),
        *("many 2 classes", "medium 1 class", "few 2 of 3 classes evaluated"),
    ]


@pytest.mark.parametrize(("macro", "shown"), [(50.0, False), (50.0 + 1e-6, False), (50.01, True), (None, False)])
def test_macro_stands_beside_overall_where_it_is_another_number_in_figures_and_tables(macro, shown):
    metrics = replace(result(5), top1=50.0, macro=macro)
    assert macro_is_overall([(50.0, macro), (None, 3.0)]) == (not shown)
    ticks = figures.shot_groups_figure({"prediction": metrics}).axes[0].get_xticklabels()
    assert any(text.get_text().startswith("macro") for text in ticks) == shown
    row = Epoch(1, 0.1, 1.0, {"loss": 6.0}, {"top1": 50.0, "macro": macro})
    assert ("macro" in [line.get_label() for line in figures.training_curves([row]).axes[1].lines]) == shown


@pytest.mark.parametrize("heads", [[], ["v3", "z"], ["x", "v1", "v2", "v3", "v4", "v5", "v6", "z"]])
def test_shot_groups(heads):
    results = {"prediction": result(5)} | {head: result(5, few=10.0) for head in heads}
    drawn(lambda: figures.shot_groups_figure(results))


def test_training_curves_show_the_loss_and_the_accuracy():
    rows = [Epoch(e, 0.1, 1.0, {"loss": 6.0 - e}) for e in (1, 2, 3, 4)]
    assert "not evaluated" in [text.get_text() for text in figures.training_curves(rows).axes[1].texts]
    for row in rows[1::2]:
        row.val = {"top1": 20.0 * row.epoch, "macro": 20.0 * row.epoch, "many": 30.0, "medium": None, "few": 5.0}
    left, right, _ = figures.training_curves(rows).axes
    assert left.lines[0].get_ydata().tolist() == [5.0, 4.0, 3.0, 2.0]
    lines = {line.get_label(): line for line in right.lines}
    assert lines.keys() == {"overall", "many", "few"}
    assert (lines["overall"].get_xdata().tolist(), lines["overall"].get_ydata().tolist()) == ([2, 4], [40.0, 80.0])
    rows[1].val["macro"] = 35.0
    right = figures.training_curves(rows).axes[1]
    macro = next(line for line in right.lines if line.get_label() == "macro")
    assert macro.get_ydata().tolist() == [35.0, 80.0], "where classes have unequally many images"
    drawn(lambda: figures.training_curves(rows))


def history_of(seed, epochs=4):
    return [
        Epoch(e, 0.1, 1.0, {"loss": 6.0 - e + seed}, {"top1": 10.0 * e + seed, "many": 30.0 + seed, "few": 5.0})
        for e in range(1, epochs + 1)
    ]


def test_training_curves_show_every_seed_and_their_mean():
    left, right, _ = figures.training_curves(history_of(0), history_of(1), history_of(5, epochs=3)).axes
    *thin, mean = left.lines
    assert [line.get_ydata()[0] for line in thin] == [5.0, 6.0, 10.0]
    assert mean.get_ydata().tolist() == [7.0, 6.0, 5.0], "after the epochs that all have"
    overall = [line for line in right.lines if line.get_color() == figures.foreground()]
    assert [line.get_ydata()[0] for line in overall] == [10.0, 11.0, 15.0, 12.0]
    assert [line.get_label() for line in overall if not line.get_label().startswith("_")] == ["overall"]
    assert overall[0].get_linewidth() < overall[-1].get_linewidth()
    drawn(lambda: figures.training_curves(history_of(0), history_of(1)))


def test_training_curves_of_an_average_say_so_and_show_the_raw_weights():
    rows = history_of(0)
    for row in rows:
        row.raw = {"top1": 8.0 * row.epoch}
    right = figures.training_curves(rows).axes[1]
    assert "(moving average of the weights)" in right.get_title()
    lines = {line.get_label(): line.get_ydata().tolist() for line in right.lines}
    assert lines["overall,\nraw weights"] == [8.0, 16.0, 24.0, 32.0]
    said = (
        "Accuracies are of the moving average of the weights, but for the line of the raw weights. Thin lines are the"
    )
    assert f"{said} 2 seeds, and thick ones their mean." in run_figures(rows, RECORD, [history_of(1)])[0].reading
    assert "average" not in run_figures(history_of(0), RECORD)[0].reading
    assert "average" not in figures.training_curves(history_of(0)).axes[1].get_title()
    drawn(lambda: figures.training_curves(rows))


@pytest.mark.parametrize("rates", [[0.1, 0.05, 0.0], [0.1, 0.1, 0.1], [0.0, 0.0, 0.0], [0.1, 0.001, 0.00001]])
def test_learning_rates_of_any_schedule(rates):
    rows = [Epoch(e, lr, 1.0, {"loss": 1.0}) for e, lr in enumerate(rates)]
    drawn(lambda: figures.training_curves(rows))


def test_balanced_training_counts():
    drawn(lambda: figures.class_accuracy({"prediction": result(10)}, np.full(10, 500)))


EPOCH = Epoch(0, 0.1, 1.0, {"loss": 5.0}, {"top1": 1.0, "many": 1.0, "medium": 0.0, "few": None})


def test_one_epoch_can_be_drawn():
    drawn(lambda: figures.training_curves([EPOCH]))


RECORD = made_up_record({"prediction": result(10)}, [500] * 10)


ILLUSTRATIONS = run_figures([EPOCH], RECORD)


@pytest.mark.slow
@pytest.mark.parametrize("illustration", ILLUSTRATIONS, ids=lambda illustration: illustration.name)
def test_every_figure_of_a_run_in_every_format_and_theme(illustration):
    draw = illustration.draw
    light, again, dark = (render(draw, ("png", "pdf", "svg"), theme) for theme in (LIGHT, LIGHT, DARK))
    assert light == again, "the same numbers give the same bytes"
    for form, start in {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}.items():
        assert light[form].startswith(start)
        assert light[form] != dark[form]
    drawn(draw, DARK)
    # An SVG takes the background of the page that it stands in, and a foreground that is legible there.
    for files, theme in ((light, LIGHT), (dark, DARK)):
        assert theme.background not in re.findall(r"fill: (#\w{6})", files["svg"].decode())
    assert DARK.foreground in dark["svg"].decode()


def test_drawing_leaves_matplotlibs_settings_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    render(lambda: figures.shot_groups_figure({"prediction": result(5)}), ("png", "svg"), DARK)
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(ZeroDivisionError):
        render(lambda: 1 / 0, ("png",), DARK)
    assert dict(matplotlib.rcParams) == before


def test_a_runs_figures_are_written(tmp_path):
    draw_figures(tmp_path, [EPOCH], RECORD)
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    assert names == {"training_curves.png", "class_accuracy.png", "shot_groups.png"}


def test_illustrations_are_written_as_png_and_pdf(tmp_path):
    draw = ILLUSTRATIONS[-1].draw
    write_illustrations(tmp_path / "new", [Illustration("groups", "Shot groups", "Higher is better.", draw)])
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"groups.png", "groups.pdf"}
    assert (tmp_path / "new" / "groups.png").read_bytes() == render(draw)["png"]


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MbibError, match=r"pip install 'mbib-timm\[train\]'"):
        render(lambda: figures.shot_groups_figure({"prediction": result(5)}))
    draw_figures(tmp_path, [EPOCH], RECORD)
    assert "no figure class_accuracy.png: figures need matplotlib" in capsys.readouterr().out


NAMES = [
    "$$",
    "a$b$c",
    "$\\frac{",
    "^_{}",
    "%s{}",
    "\udcff",
    "\ud83d",
    "\x1b[31m",
    "a\nb",
    "\u202ex",
    "",
    " ",
    "\0",
    "x" * 300,
]


def test_any_class_name_can_be_drawn(tmp_path, capsys):
    counts = list(range(len(NAMES), 0, -1))
    heads = {"prediction": result(len(NAMES))}
    record = replace(RECORD, class_names=NAMES, class_counts=counts, result=replace(RECORD.result, heads=heads))
    draw_figures(tmp_path, [EPOCH], record)
    assert capsys.readouterr().out == ""
    assert len(list((tmp_path / "figures").iterdir())) == 3


def test_a_figure_that_cannot_be_drawn_ends_nothing(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise ValueError("ParseFatalException: Expected end of text\nand more")

    monkeypatch.setattr(figures, "class_accuracy", broken)
    draw_figures(tmp_path, [EPOCH], RECORD)
    assert capsys.readouterr().out == "no figure class_accuracy.png: ParseFatalException: Expected end of text\n"
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {"training_curves.png", "shot_groups.png"}


def own_fonts(monkeypatch):
    """Leave matplotlib the fonts that it brings, whatever this machine has."""
    from matplotlib import get_data_path
    from matplotlib.font_manager import fontManager

    monkeypatch.setattr(fontManager, "ttflist", [e for e in fontManager.ttflist if e.fname.startswith(get_data_path())])
    drawing._fonts_with.cache_clear()
    monkeypatch.setattr(drawing, "_unreadable", set())


def labelled(text):
    figure, axes = drawing.canvas(3, 2)
    axes.set_xticks([0, 1], [text, "Füchse"])
    axes.set_title(text)
    return figure


def test_letters_that_the_font_lacks_come_from_another_one(monkeypatch, capsys):
    import matplotlib

    own_fonts(monkeypatch)
    found = render(lambda: labelled("a ˯"))["png"]
    assert capsys.readouterr().out == ""
    with matplotlib.rc_context({"font.family": ["DejaVu Sans", "DejaVu Serif"]}):
        assert found == render(lambda: labelled("a ˯"))["png"]


def test_letters_that_no_font_has_are_said_once(monkeypatch, capsys):
    own_fonts(monkeypatch)
    for _ in range(2):
        assert set(render(lambda: labelled("狐狸"), ("png", "pdf", "svg"))) == {"png", "pdf", "svg"}
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "狐, 狸, which no font" in said
    render(lambda: labelled("狼"))
    assert "狼, which no font" in capsys.readouterr().out


def test_other_warnings_of_a_drawing_are_not_kept_back():
    def draw():
        warnings.warn("of the drawing", UserWarning, stacklevel=1)
        return labelled("a")

    with pytest.warns(UserWarning, match="of the drawing"):
        render(draw)
