"""What is kept of runs: files read back exactly, files that hold something else refused by name, tables in any form."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from made_up_results import made_up_record
from rendering import rendered

from mbib_timm.environment import Environment
from mbib_timm.errors import MbibError
from mbib_timm.files import from_plain, to_json
from mbib_timm.publishing.card import render_card
from mbib_timm.reporting.sections import Section, render_page
from mbib_timm.results.record import (
    EPOCH_METRICS,
    Epoch,
    Evaluation,
    HeadMetrics,
    RunRecord,
    is_finished,
    read_history,
    read_record,
    write_history,
    write_record,
)
from mbib_timm.results.runs import read_run
from mbib_timm.results.tables import Table, cells, difference, mean_and_deviation, percent
from mbib_timm.sweeps.sweep_results import read_results

ROOT = Path(__file__).parents[1]
RECORDS = sorted([*(ROOT / "results").glob("*/metrics.json"), *(ROOT / "mbib_timm" / "zoo").glob("*/metrics.json")])
KEPT = [file.parent for file in RECORDS if file.parents[1].name == "results"]
SWEEPS = sorted((ROOT / "results").glob("*/sweep.json"))
MBIB = ROOT / "results" / "mbib_resnet32.cifar100_lt_if100-200e-seed0"


def head(seed):
    """Metrics with all the digits of a float, among them some that no short decimal has."""
    numbers = np.random.RandomState(seed).uniform(0, 100, 9).tolist()
    return HeadMetrics(
        top1=100 / 3, top5=numbers[0], macro=numbers[1], many=numbers[2], medium=50.0, few=None, ece=1e-17,
        nll=0.1 + 0.2, images=10_000, classes={"many": 3, "medium": 2, "few": 0}, per_class=[None, 0.0, *numbers[6:]],
        macro_f1=numbers[3], intervals={"top1": (1 / 3, 100 / 7), "many": (0.0, 1e-17)},
        measured={"overall": (10_000, 4), "many": (1, 1), "medium": (9_999, 2), "few": (0, 0)},
    )  # fmt: skip


HEADS = {"prediction": head(0), "v3": head(1), "z": head(2)}
RECORD = made_up_record(
    HEADS,
    [500, 300, 101, 40, 20],
    class_names=['a "quoted" name', "Käfer, größer", "comma, and\nnew line", "", "名"],
    raw=Evaluation("test", {"prediction": head(3)}, 3),
    best=Evaluation("validation", HEADS, 2, "best.safetensors"),
    chosen={"tau": 0.7000000000000001, "steps": 3.0},
    chosen_on="images that training leaves out",
    training_seconds=1 / 7,
    replaced_images=["a.png"],
)
HISTORY = [
    Epoch(1, 0.1, 1 / 3, {"loss": 4.605170185988092, "loss_z": 1e-300}),
    Epoch(2, 1e-17, 2.0, {"loss": 2 / 3}, {**dict.fromkeys(EPOCH_METRICS, 0.0), "top1": 100 / 3, "few": None}),
    Epoch(3, 0.0, 7.0, {"loss": 0.1 + 0.2, "apart": 5.0}, *[dict.fromkeys(EPOCH_METRICS, t) for t in (1.5, 2.5)]),
]


# The record


def test_a_record_is_read_back_as_it_was_written(tmp_path):
    assert not is_finished(tmp_path)
    write_record(tmp_path, RECORD)
    assert is_finished(tmp_path)
    again = read_record(tmp_path)
    assert again == RECORD
    assert repr(again) == repr(RECORD), "whole numbers stay int or float"
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == json.loads(json.dumps(asdict(RECORD)))
    before = (tmp_path / "metrics.json").read_bytes()
    write_record(tmp_path, again)
    assert (tmp_path / "metrics.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_a_record_gives_what_reports_ask_for():
    assert RECORD.result.prediction == HEADS["prediction"]
    assert HEADS["z"].interval("many") == (0.0, 1e-17)
    assert HEADS["z"].interval("macro F1") is None
    assert list(HEADS["z"].numbers()) == ["overall", "macro", "macro F1", "many", "medium", "few"]
    assert HEADS["z"].numbers()["macro F1"] == HEADS["z"].macro_f1
    by_group = HEADS["prediction"].accuracies()
    assert list(by_group) == ["overall", "many", "medium", "few"]
    assert list(by_group.values()) == [getattr(HEADS["prediction"], name) for name in ("top1", "many", "medium", "few")]


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.parent.name)
def test_every_record_of_the_repository_is_as_it_would_be_written_again(file):
    assert to_json(read_record(file.parent)) == file.read_bytes()


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.parent.name)
def test_every_sweep_of_the_repository_is_as_it_would_be_written_again(file):
    assert to_json(read_results(file), indent=1) == file.read_bytes()


def test_there_are_records_and_sweeps():
    assert len(RECORDS) > 4
    assert len(SWEEPS) > 4


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_written(tmp_path, number):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record(tmp_path, replace(RECORD, training_seconds=number))
    assert not list(tmp_path.iterdir())


def changed(address, value):
    """A record as JSON has it, with another value at an address, or without it for None."""
    content = json.loads(to_json(RECORD))
    place = content
    *way, last = address.split(".")
    for part in way:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return content


@pytest.mark.parametrize(
    ("address", "value", "message"),
    [
        ("seed", "0", r"seed: expected int, got '0'"),
        ("seed", 0.0, r"seed: expected int, got 0\.0"),
        ("seed", True, r"seed: expected int, got True"),
        ("training_seconds", True, r"training_seconds: expected float, got True"),
        ("training_seconds", "1.0", r"training_seconds: expected float, got '1\.0'"),
        ("name", 3, r"name: expected str, got 3"),
        ("stages", "mbib", r"stages: expected list, got 'mbib'"),
        ("class_counts.3", 40.5, r"class_counts\[3\]: expected int, got 40\.5"),
        ("class_names", "ant", r"class_names: expected list, got 'ant'"),
        ("class_names.1", 1, r"class_names\[1\]: expected str, got 1"),
        ("chosen", [0.7], r"chosen: expected dict, got \[0\.7\]"),
        ("chosen.tau", "0.7", r"chosen\.tau: expected float, got '0\.7'"),
        ("result", [], r"result: expected Evaluation, got \[\]"),
        ("result.heads.z", 3, r"result\.heads\.z: expected HeadMetrics, got 3"),
        ("result.heads.z.top1", "45.0", r"result\.heads\.z\.top1: expected float, got '45\.0'"),
        ("result.heads.z.classes.many", 1.5, r"result\.heads\.z\.classes\.many: expected int, got 1\.5"),
        ("best.heads.v3.per_class.2", "x", r"best\.heads\.v3\.per_class\[2\]: expected float, got 'x'"),
        ("selected_on", "test", r"selected_on: unknown field"),
        ("best.selected_on", "test", r"best\.selected_on: unknown field"),
        ("raw.heads.prediction.top_1", 1.0, r"raw\.heads\.prediction\.top_1: unknown field"),
        ("environment.gpu", "none", r"environment\.gpu: unknown field"),
        ("seed", None, r"seed: missing"),
        ("result.heads", None, r"result\.heads: missing"),
        ("result.heads.prediction.nll", None, r"result\.heads\.prediction\.nll: missing"),
        ("environment.torch", None, r"environment\.torch: missing"),
    ],
)
def test_a_field_that_does_not_fit_is_named(tmp_path, address, value, message):
    content = changed(address, value)
    with pytest.raises(ValueError, match=f"^{message}$"):
        from_plain(RunRecord, content)
    (tmp_path / "metrics.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(MbibError, match=rf"metrics\.json does not hold the record of a run: {message}$"):
        read_record(tmp_path)


def test_fields_with_a_default_may_be_missing_and_whole_numbers_are_floats():
    environment = {key: value for key, value in asdict(RECORD.environment).items() if value is not None}
    assert "python" not in environment
    assert from_plain(Environment, environment) == RECORD.environment
    assert from_plain(Evaluation, {"split": "test", "heads": {}}) == Evaluation("test", {}, None, None)
    seconds = from_plain(RunRecord, changed("training_seconds", 12)).training_seconds
    assert (seconds, type(seconds)) == (12.0, float)


def test_a_folder_without_a_record_has_no_result(tmp_path):
    with pytest.raises(MbibError, match=r"has no metrics\.json: the run is not finished"):
        read_record(tmp_path)


# The history


def test_a_history_is_read_back_as_it_was_written(tmp_path):
    assert read_history(tmp_path) == []
    write_history(tmp_path, HISTORY)
    again = read_history(tmp_path)
    assert again == HISTORY
    assert repr(again) == repr(HISTORY), "whole numbers stay int or float"
    assert (tmp_path / "summary.csv").read_text(encoding="utf-8").splitlines()[0] == (
        "epoch,lr,train_loss,val_top1,val_macro,val_macro_f1,val_many,val_medium,val_few,seconds,train_loss_z,train_apart,"
        "raw_top1,raw_macro,raw_macro_f1,raw_many,raw_medium,raw_few"
    )
    before = (tmp_path / "summary.csv").read_bytes()
    write_history(tmp_path, again)
    assert (tmp_path / "summary.csv").read_bytes() == before


def test_a_row_has_a_number_for_each_column_of_its_epoch():
    assert HISTORY[0].row() == {
        "epoch": 1, "lr": 0.1, "train_loss": 4.605170185988092, "train_loss_z": 1e-300, "seconds": 1 / 3
    }  # fmt: skip
    assert list(HISTORY[1].row().values()) == [2, 1e-17, 2 / 3, 100 / 3, *[0.0] * 4, None, 2.0]


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_every_history_of_the_repository_is_as_it_would_be_written_again(folder, tmp_path):
    history = read_history(folder)
    assert history[-1].epoch == len(history) == read_record(folder).epochs
    assert history[0].epoch == 1
    write_history(tmp_path, history)
    assert (tmp_path / "summary.csv").read_bytes() == (folder / "summary.csv").read_bytes()


# Tables


TABLE = Table(
    ["run", "overall", "few"],
    [["mbib", "45.8", "24.2"], ["a longer name", "100.0", "–"], ["x", "<b>9</b>", "1 | 2"]],
    ["", "paper", "difference"],
)


def test_a_table_as_text():
    assert TABLE.text() == (
        "run             overall    few\n"
        "mbib               45.8   24.2\n"
        "a longer name     100.0      –\n"
        "x              <b>9</b>  1 | 2"
    )
    assert TABLE.lines() == TABLE.text().split("\n")
    assert Table(["a", "b"], []).text() == "a  b"
    words = Table(["a", "what", "n"], [["x", "word", "10"], ["y", "longer word", "–"]])
    assert words.text() == "a  what          n\nx  word         10\ny  longer word   –", "words stand to the left"
    assert Table(["a", ""], [["1", ""]]).text() == "a\n1", "no line ends in a space"


def test_a_table_as_markdown():
    assert TABLE.markdown() == (
        "| run | overall | few |\n"
        "| --- | --- | --- |\n"
        "| mbib | 45.8 | 24.2 |\n"
        "| a longer name | 100.0 | – |\n"
        "| x | <b>9</b> | 1 \\| 2 |"
    )


def test_a_table_as_html():
    section = Section("A section")
    section.table(TABLE)
    page = render_page("A page", "A lead", [section])
    rows = [line for line in page.splitlines() if line.startswith("<tr class=")]
    assert rows == [
        '<tr class=""><td>mbib</td><td>45.8</td><td>24.2</td></tr>',
        '<tr class="paper"><td>a longer name</td><td>100.0</td><td>–</td></tr>',
        '<tr class="difference"><td>x</td><td>&lt;b&gt;9&lt;/b&gt;</td><td>1 | 2</td></tr>',
    ]
    heading = '<tr><th scope="col">run</th><th scope="col">overall</th><th scope="col">few</th></tr>'
    assert f"<thead>{heading}</thead>" in page


def test_numbers_in_cells():
    assert cells(HEADS["prediction"], digits=2) == ["33.33", f"{HEADS['prediction'].many:.2f}", "50.00", "–"]
    assert [percent(value) for value in (45.84, 0.0, None)] == ["45.8", "0.0", "–"]
    assert [difference(*pair) for pair in ((1.66, 0.0), (0.0, 1.66), (3.0, 3.0))] == ["+1.7", "−1.7", "+0.0"]
    assert difference(None, 1.0) == difference(1.0, None) == "–"
    assert mean_and_deviation([40.0, None, 42.0], digits=2) == "41.00 ± 1.41"


# What runs say, in cards and pages


@pytest.fixture
def hostile():
    """A run that says HTML wherever it may."""
    run = read_run(MBIB)
    record = run.record
    environment = replace(record.environment, hardware="<u>CPU</u>", commit="<i>", command="mbib train <r>.yaml ```")
    heads = {**record.result.heads, "<s>head</s>": record.result.heads["z"]}
    record = replace(
        record,
        name="<b>net</b>.<script>alert(1)</script>",
        result=replace(record.result, split="<em>", heads=heads),
        best=replace(record.best, split="<em>"),
        chosen={"<sub>": 1.0},
        chosen_on="<sup>",
        environment=environment,
    )
    return replace(run, record=record)


def test_cards_escape_what_runs_say(hostile):
    card = render_card(hostile, "me/model")
    _, _, body = card.split("---\n", 2)
    code = "````sh\nmbib train <r>.yaml ```\n````"
    assert code in body, "a command stands as it is, behind a fence that is longer than any in it"
    page = rendered(body)
    assert not {"b", "script", "u", "i", "s", "em", "sub", "sup"} & set(page.tags)
    for said in ("<b>net</b>", "<script>", "<u>CPU", "<i>", "<s>head</s>", "<em>", "<sub> 1", "<sup>"):
        assert said in page.shown


def test_pages_escape_what_runs_say(hostile, monkeypatch):
    from mbib_timm.reporting import sections
    from mbib_timm.results.runs import group_runs

    monkeypatch.setattr(sections, "render", lambda draw, formats, theme=None, title=None: dict.fromkeys(formats, b"-"))
    page = render_page("<title>", "<lead>", [sections.run_section(group_runs([hostile])[0])])
    for tag in ("b", "script", "u", "i", "s", "em", "sub", "sup", "r", "lead"):
        assert f"<{tag}>" not in page, tag
        assert f"&lt;{tag}&gt;" in page, tag
    assert page.count("<title>") == 1
