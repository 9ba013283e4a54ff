"""Names that somebody else has given: they show as they are, in cards, reports, figures, tables and errors, and do
nothing."""

import json
import re
import shutil
from xml.etree import ElementTree

import pytest
import torch
import yaml
from PIL import Image
from rendering import rendered

from mbib_timm.cli import main
from mbib_timm.drawing import render
from mbib_timm.environment import World
from mbib_timm.evaluation.target import find_target, open_target
from mbib_timm.files import printable
from mbib_timm.models.weights import load_model
from mbib_timm.publishing.card import Stated
from mbib_timm.publishing.release import make_release
from mbib_timm.reporting.report import report
from mbib_timm.results.run_figures import run_figures, shortened
from mbib_timm.results.runs import read_run
from mbib_timm.results.tables import Table, code_span, markdown_text

NASTY = [
    "<script>alert(1)</script>", "a|b", "**bold** _em_ `code`", "[x](http://evil.example) ![y](z.png)",
    "x: 'y' # \"z\"", "\x1b[31mred\x1b[0m\x07", "Größe\u202egnp.exe", "two\nlines\r\n---\n", "$\\frac{1}{2}$ & &amp;",
    "{{ 7 * 7 }}{% raw %}",
]  # fmt: skip
MORE = [
    "---", "# heading", "1. item", "- item", "+", "> quote", "~~gone~~", "https://evil.example/a?b=c",
    "www.evil.example",
    "me@evil.example", "\\", "\\|", "`", "``", "_private_", "snake_case_name", "*", "<!--", "&lt;", "null", "=",
    "\udcff.jpg", "क्\u200dष", "👩\u200d🔬", " padded ", "1) x", "*a_b*c_",
]  # fmt: skip


@pytest.mark.parametrize("name", NASTY + MORE)
def test_a_name_in_markdown_is_only_text(name):
    expected = printable(name).strip()
    table = rendered(Table(["class", "n"], [[markdown_text(name), "1"]]).markdown())
    assert table.tags.count("td") == 2
    assert not set(table.tags) - {"table", "thead", "tbody", "tr", "th", "td"}
    assert expected in table.shown
    for markdown, tags in ((markdown_text(name), ["p"]), (f"# {markdown_text(name)}", ["h1"])):
        page = rendered(markdown)
        assert page.tags == tags
        assert page.shown.strip() == expected
    assert not re.search(r"://|www\.|\w@", markdown_text(name)), "GitHub makes links of these"
    code = rendered(f"before {code_span(name)} after")
    assert code.tags == ["p", "code"]
    assert code.shown.strip() == f"before {printable(name)} after"


@pytest.mark.parametrize("name", NASTY + MORE)
def test_a_name_in_a_terminal_is_one_line_that_it_shows(name):
    text = Table(["class"], [[name]]).text()
    assert text.count("\n") == 1
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    text.encode()


def test_what_a_terminal_shows_is_left_alone():
    for name in ("Größe", "Füchse (jung)", "狐", "क्\u200dष", "👩\u200d🔬", "a\\b"):
        assert printable(name) == name
    assert printable("\x1b[0m\n") == "\\x1b[0m\\n"


@pytest.fixture(scope="module")
def nasty_run(finished_run, tmp_path_factory):
    """A finished run whose classes have such names."""
    folder = tmp_path_factory.mktemp("nasty") / finished_run.name
    shutil.copytree(finished_run, folder)
    for file, key in (("metrics.json", "class_names"), ("config.json", "label_names")):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, key: NASTY}))
    return folder


def test_card_and_config(nasty_run):
    dataset = "<b>Käfer</b> | *2024*: \x1b[31m #1"
    release = make_release(nasty_run, "me/x", stated=Stated(dataset, "cc-by-4.0"))
    card = release.files["README.md"].decode()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", card)
    _, metadata, body = card.split("---\n", 2)
    content = yaml.safe_load(metadata)
    assert content["license"] == "cc-by-4.0"
    assert content["model-index"][0]["results"][0]["dataset"]["name"] == printable(dataset)
    page = rendered(body)
    assert not {"script", "b", "em", "strong", "del"} & set(page.tags)
    for name in (*NASTY, dataset):
        assert printable(name).strip() in page.shown, name
    counts = json.loads((nasty_run / "metrics.json").read_text())["class_counts"]
    for name, count in zip(NASTY, counts, strict=True):
        assert f"| {markdown_text(name)} | {count} |" in body
    config = json.loads(release.files["config.json"])
    assert config["label_names"] == NASTY, "exactly as they are: a program reads them"
    assert config["pretrained_cfg"]["license"] == "cc-by-4.0"
    assert json.loads(release.files["metrics.json"])["class_names"] == NASTY
    assert load_model(str(nasty_run)).class_names == tuple(NASTY)


def test_a_dry_run_shows_them_in_a_terminal(nasty_run, capsys):
    name = "Traps \x1b[2J of `2024`"
    arguments = ["--repo-id", "me/x", "--dataset-name", name, "--license", "MIT", "--dry-run"]
    assert main(["publish", str(nasty_run), *arguments]) == 0
    out = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", out)
    assert "license: mit" in out
    assert f"trained from scratch on {markdown_text(name)} for 3 epochs" in out


def test_report_and_figures(nasty_run, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "report.html"
    report([str(nasty_run)], page, "\x1b<title>")
    html = page.read_text()
    assert "<script" not in html
    assert "\\x1b&lt;title&gt;" in html
    run = read_run(nasty_run)
    (bars,) = [each for each in run_figures(run.history, run.record) if each.name == "class_accuracy"]
    files = render(bars.draw, ("svg", "png"))
    texts = ["".join(node.itertext()) for node in ElementTree.fromstring(files["svg"]).iter() if "text" in node.tag]
    for name in NASTY:
        assert printable(name if len(name) <= 20 else f"{name[:19]}…") in texts
    assert shortened("5 $ or $ 6") == r"5 \$ or \$ 6"


def test_what_is_said_of_evaluated_images_is_lines_that_do_nothing(nasty_run, tmp_path):
    """Here of the classes without images, in which a published model's names stand."""
    (tmp_path / NASTY[1]).mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / NASTY[1] / "0.png")
    found = find_target(str(nasty_run), overrides={"data_dir": str(tmp_path), "device": "cpu", "workers": 0})
    notes = open_target(found, World(torch.device("cpu"))).notes
    assert any("\\x1b[31mred" in note for note in notes)
    assert all(note.isprintable() for note in notes)


def test_an_error_is_a_line_that_does_nothing(nasty_run, capsys):
    assert main(["predict", str(nasty_run), "\x1b[31mno.png\x07"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("at \\x1b[31mno.png\\x07")
