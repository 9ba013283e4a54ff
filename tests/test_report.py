"""Reports: what they say is what the files say, in a real browser, on wide and narrow screens, light and dark."""

import json
import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import yaml
from browser import open_page
from headers import header
from made_up_results import made_up
from matplotlib.backends.backend_agg import FigureCanvasAgg
from small_data import arrays

from mbib_timm.analysis import analyze as analyze_module
from mbib_timm.cli import main
from mbib_timm.drawing import Illustration, canvas, render
from mbib_timm.errors import MbibError
from mbib_timm.evaluation import Answers
from mbib_timm.evaluation.answer_files import write_answers, write_errors
from mbib_timm.evaluation.metrics import wilson_interval
from mbib_timm.files import to_json
from mbib_timm.publishing.card import render_card
from mbib_timm.recipe import packaged_recipes, recipe_name
from mbib_timm.reporting import sections as sections_module
from mbib_timm.reporting.comparison import NOT_ALIKE, comparison_section
from mbib_timm.reporting.differences import differences, known_differences
from mbib_timm.reporting.findings import outcome, student
from mbib_timm.reporting.report import _write_figures, read_inputs
from mbib_timm.reporting.report_figures import comparison_bars, comparison_curves, sweep_curves
from mbib_timm.reporting.sections import Section, give_unique_anchors, inline, render_page, run_section
from mbib_timm.reporting.short_titles import short_titles
from mbib_timm.reporting.terms import terms_section
from mbib_timm.reporting.training_setups import setup_names
from mbib_timm.results.paper import RESULTS
from mbib_timm.results.record import read_record
from mbib_timm.results.run_text import print_report
from mbib_timm.results.runs import RunGroup, group_runs, read_run, read_seeds
from mbib_timm.results.tables import Table
from mbib_timm.sweeps.sweep import find_sweep
from mbib_timm.sweeps.sweep_plan import on_recipe

ROOT = Path(__file__).parents[1]
MBIB = ROOT / "results" / "mbib_resnet32.cifar100_lt_if100-200e-seed0"
STRONG = ROOT / "results" / "mbib_resnet32.strong_cifar100_lt_if100-200e-seed0-bfloat16"
STRONG_400E = ROOT / "results" / "mbib_resnet32.strong_400e_cifar100_lt_if100-400e-seed0-bfloat16"
BIB = ROOT / "results" / "bib_resnet32.cifar100_lt_if100-200e-seed0-bfloat16"
CE = ROOT / "results" / "cifar_resnet32.ce_cifar100_lt_if100-200e-seed0-bfloat16"
DIGITS = [ROOT / "results" / f"{name}-60e-seed0" for name in ("mbib_resnet20.digits", "cifar_resnet20.ce_digits")]


@pytest.fixture
def undrawn(monkeypatch):
    """Figures that take no time: tests of words need no pictures."""
    monkeypatch.setattr(sections_module, "render", lambda draw, formats, *_, **__: dict.fromkeys(formats, b"-"))


def html_of(section):
    """A section as a page shows it."""
    page = render_page("-", "-", [section])
    return page[page.index("<main>") : page.index("</main>")]


# The paper's numbers


def test_the_papers_numbers_are_those_that_the_recipes_claim():
    claims = {recipe_name(path): header(path).get("Paper", "") for path in packaged_recipes().values()}
    assert RESULTS.keys() == {name for name, claim in claims.items() if "(Table" in claim or "Table 2" in claim}
    for name, results in RESULTS.items():
        claimed = {float(number) for number in re.findall(r"\d\d\.\d", claims[name])}
        assert set(results[0].accuracies.values()) <= claimed


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ("BIB(Ours)\t44.9\t<b>49.8</b>\t<b>60.4</b>", "bib_resnet32."),
        ("MBIB(Ours)\t47.5\t51.2\t60.9", "mbib_resnet32."),
        ("CE\t38.3\t43.9\t55.7", "cifar_resnet32.ce_"),
        ("Focal Loss\t38.4\t44.3\t55.8", "cifar_resnet32.focal_"),
        ("BSCE\t42.7\t47.2\t58.5", "cifar_resnet32.bsce_"),
        ("LDAM-DRW\t42.0\t46.6\t58.7", "cifar_resnet32.ldam_drw_"),
        ("cRT\t41.2\t46.8\t57.9", "cifar_resnet32.crt_"),
        ("au-norm\t41.1\t46.7\t57.1", "cifar_resnet32.tau_norm_"),
    ],
)
def test_table_1_is_the_papers(shared, row, name):
    text = next((shared / "paper").glob("*.txt")).read_text(encoding="utf-8")
    assert row in text
    numbers = [float(number) for number in re.findall(r"\d\d\.\d", row)]
    assert numbers == [RESULTS[f"{name}cifar100_lt_if{f}"][0].accuracies["overall"] for f in (100, 50, 10)]


def test_of_a_row_of_table_1_there_may_be_recipes_for_some_factors(shared):
    text = next((shared / "paper").glob("*.txt")).read_text(encoding="utf-8")
    assert "DiVE\t45.4\t51.1\t<u>62.0</u>" in text
    assert RESULTS["cifar_resnet32.dive_cifar100_lt_if100"][0].accuracies == {"overall": 45.4}


def test_table_9_is_the_papers(shared):
    text = next((shared / "paper").glob("*.txt")).read_text(encoding="utf-8")
    table_9 = RESULTS["mbib_resnet32.cifar100_lt_if100"][1]
    row = "\t".join(str(table_9.accuracies[column]) for column in ("overall", "many", "medium", "few"))
    assert f"\nMBIB\t{row}\n" in text


# Runs and their distance from the paper


def changed(folder, tmp_path, called, /, **changes):
    """Copy a result, with other metrics: seed, epochs, or top1, many ... of the prediction."""
    copy = tmp_path / called
    shutil.copytree(folder, copy)
    metrics = json.loads((copy / "metrics.json").read_text())
    for key, value in changes.items():
        place = metrics if key in metrics else metrics["result"]["heads"]["prediction"]
        place[key] = value
    (copy / "metrics.json").write_text(json.dumps(metrics))
    return with_keys(copy, epochs=changes["epochs"]) if "epochs" in changes else copy


def with_keys(folder, **keys):
    """Change keys of a result's recipe."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **keys}))
    return folder


def with_beta(folder, beta):
    """Change that setting of a result's method."""
    return with_keys(folder, method={**yaml.safe_load((folder / "recipe.yaml").read_text())["method"], "beta": beta})


def test_runs_of_other_seeds_are_one_group_and_of_other_settings_another(tmp_path):
    second = changed(MBIB, tmp_path, "second", seed=1, top1=46.84)
    third = with_beta(changed(MBIB, tmp_path, "third", seed=0), 1.0)
    groups, sweeps = read_inputs([str(second), str(MBIB), str(third)])
    assert not sweeps
    assert [len(group.runs) for group in groups] == [2, 1]
    assert [run.record.seed for run in groups[0].runs] == [0, 1]
    assert groups[0].mean("overall") == pytest.approx((45.84 + 46.84) / 2)
    assert [group.title for group in groups] == [
        "mbib_resnet32.cifar100_lt_if100 (method.beta 5.0)",
        "mbib_resnet32.cifar100_lt_if100 (method.beta 1.0)",
    ]
    again = changed(MBIB, tmp_path, "again")
    said = (
        f"{MBIB} and {again} are runs of {MBIB.name.partition('-')[0]} and have the same seed, 0: leave one of them out"
    )
    with pytest.raises(MbibError, match=re.escape(said)):
        read_inputs([str(MBIB), str(again)])


def test_runs_that_differ_in_what_has_no_name_go_by_those_that_somebody_chose(tmp_path, undrawn):
    runs = [changed(MBIB, tmp_path, f"run{beta}", inputs=[{"data": f"{beta}"}]) for beta in (1, 2)]
    assert short_titles(read_inputs(map(str, runs))[0]) == ["MBIB (run1)", "MBIB (run2)"]
    with_beta(runs[0], 1.0)
    titles = ["MBIB (mbib_resnet32.cifar100_lt_if100 (method.beta 5.0))", "MBIB (run1 (method.beta 1.0))"]
    assert short_titles(read_inputs([str(MBIB), str(runs[0])])[0]) == titles


def test_runs_of_other_code_go_by_the_names_of_their_folders(tmp_path, undrawn):
    inputs = [[{"data": "d", "plugins": {"smooth.py": version}}] for version in "aab"]
    folders = [
        changed(DIGITS[1], tmp_path, name, seed=seed, inputs=given)
        for name, seed, given in zip(("first", "first-seed1", "second"), (0, 1, 0), inputs, strict=True)
    ]
    groups, _ = read_inputs([str(folder) for folder in folders])
    assert [len(group.runs) for group in groups] == [2, 1]
    name = "cifar_resnet20.ce_digits"
    assert [group.title for group in groups] == [f"{name} (first)", f"{name} (second)"]
    (tmp_path / "elsewhere").mkdir()
    folders[2].rename(tmp_path / "elsewhere/first")
    titles = [group.title for group in group_runs([read_run(folders[0]), read_run(tmp_path / "elsewhere/first")])]
    assert len(set(titles)) == 2
    assert all(title.startswith(f"{name} (data and code ") for title in titles)


def test_figures_side_by_side_say_what_is_in_them_and_nothing_else(tmp_path, undrawn):
    text = html_of(comparison_section(read_inputs([str(folder) for folder in DIGITS])[0]))
    assert "Each row is a run.<" in text
    assert "Each line is a run;" in text
    repeated = [str(MBIB), str(changed(MBIB, tmp_path, "second", seed=1))]
    text = unescape(html_of(comparison_section(read_inputs(repeated)[0])))
    assert "bars are means over its seeds with their standard deviation; diamonds are the paper's numbers" in text
    assert "Each line is a run, thin for each seed where there are several, and thick for their mean;" in text


def test_every_difference_of_more_than_a_point_has_a_paragraph():
    (group,) = group_runs([read_run(MBIB)])
    paragraphs = differences(group)
    # Table 1: all; Table 9: all, medium, few. Many is 0.5 above Table 9, all 0.8 below Table 4.
    assert len(paragraphs) == 4
    expected = [("all classes", "1.7", "47.5", "Table 1"), ("all classes", "1.2", "47.0", "Table 9")]
    expected += [("medium-shot", "2.1", "47.7", "Table 9"), ("few-shot", "1.9", "26.1", "Table 9")]
    for paragraph, parts in zip(paragraphs, expected, strict=True):
        assert all(part in paragraph for part in parts)
        assert "below" in paragraph
    (known,) = known_differences([group])
    assert "one seed was run" in known
    assert "other images" in known
    (said,) = re.findall(r"also leaves open (.*); the sweep `open_choices` varies these", known)
    departures = find_sweep(["open_choices"]).axes["departure"].values()
    assert re.split(", (?:and )?", said) == ["what an observation is", "whether z is rectified", "which beta was used"]
    varied = {key.rpartition(".")[2] for departure in departures for key in departure}
    assert {"raw_observations", "bottleneck_layers", "beta"} <= varied


def test_a_run_as_good_as_the_papers_needs_no_paragraph(tmp_path):
    run = read_run(changed(MBIB, tmp_path, "good", top1=47.1, many=64.5, medium=47.5, few=26.0))
    assert differences(group_runs([run])[0]) == known_differences(group_runs([run])) == []


def test_of_a_shortened_schedule_no_difference_is_taken(tmp_path, undrawn):
    group = group_runs([read_run(changed(MBIB, tmp_path, "short", epochs=20, top1=30.0))])[0]
    assert differences(group) == [
        "With 20 of 200 epochs the schedule is not the paper's, so nothing is compared with its numbers."
    ]
    text = html_of(run_section(group))
    assert "Table 1" in text
    assert '<tr class="difference">' not in text
    assert '<tr class="difference">' in html_of(run_section(group_runs([read_run(MBIB)])[0]))


def test_an_extended_run_is_told_from_one_of_the_whole_schedule(tmp_path, undrawn, capsys):
    others = [changed(MBIB, tmp_path, "extended", seed=1, extended_from=[100])]
    others.append(changed(MBIB, tmp_path, "cut", seed=2, extended_from=[200]))
    runs = [read_run(folder) for folder in (MBIB, *others)]
    whole, group, cut = group_runs(runs)
    said, name = "trained for 100 epochs, then extended to 200", "mbib_resnet32.cifar100_lt_if100"
    assert [each.title for each in (whole, group, cut)] == [
        f"{name} (not extended)",
        f"{name} ({said})",
        f"{name} (trained for 200 epochs of a longer schedule)",
    ]
    assert (whole.is_papers, group.is_papers) == (True, False)
    assert differences(group)[0].startswith(f"With 200 of 200 epochs ({said}) the schedule is not the paper's")
    assert f"200 ({said}) of the 200 that the recipe asks for" in html_of(run_section(group))
    card = render_card(group.first, "me/extended")
    assert f"\nThe model was {said}: its first epochs followed another schedule.\n" in card
    assert "It differs from the packaged recipe in `epochs`." in card
    assert "extended" not in render_card(whole.first, "me/whole")
    assert [run.kept_name(0) for run in runs[:2]] == [f"{name}-200e-seed0", f"{name}-200e-extended-seed0"]
    with pytest.raises(MbibError, match="another extension than"):
        read_seeds(MBIB, others)
    print_report(tmp_path, group.first.record)
    assert f"\n{said.capitalize()}.\n" in capsys.readouterr().out


def test_what_was_measured_before_the_last_step_of_a_method_says_so(tmp_path, undrawn, capsys):
    run = read_run(MBIB)
    best = replace(run.record.result, epoch=180, heads={"prediction": replace(run.record.result.prediction, top1=47.0)})
    record = replace(run.record, best=best, raw=run.record.result)
    for method, said in (("mbib", ""), ("tau_norm", ", before the last step of tau-norm")):
        of_method = replace(run, record=replace(record, method=method))
        print_report(tmp_path, of_method.record)
        top1, printed = record.result.prediction.top1, capsys.readouterr().out
        assert f"Best epoch on test, which is not the result: epoch 180, 47.00 %{said}\n" in printed
        raw = f"Weights without the moving average{said}: {top1:.2f}"
        (group,) = group_runs([of_method])
        section, card = html_of(run_section(group)), render_card(of_method, "me/it")
        assert all(raw in text for text in (printed, section, card))
        assert f"The best of the evaluated epochs was 180 with 47.0 %{said}; it was chosen on" in section
        result = "that after it" if said else "the last epoch's"
        assert f"was epoch 180 with 47.00 %{said}; the accuracy reported here is {result}." in card


def test_the_best_epoch_is_not_spoken_of_where_it_is_the_result(tmp_path, undrawn, capsys):
    run = read_run(MBIB)
    result = run.record.result
    worse = replace(result, heads={"prediction": replace(result.prediction, top1=result.prediction.top1 - 1)})
    elsewhere = {"same": result, "rounded": worse, "as accurate": replace(result, epoch=180)}
    elsewhere |= {"on other images": replace(result, epoch=180, split="val"), "earlier": replace(worse, epoch=180)}
    for name, best in elsewhere.items():
        of_best = replace(run, record=replace(run.record, best=best))
        print_report(tmp_path, of_best.record)
        (group,) = group_runs([of_best])
        texts = [capsys.readouterr().out, html_of(run_section(group)), render_card(of_best, "me/it")]
        said = name in ("on other images", "earlier")
        assert [re.search("[Bb]est (of the evaluated )?epoch", text) is not None for text in texts] == [said] * 3, name


def test_seeds_give_a_deviation(tmp_path):
    folders = [changed(MBIB, tmp_path, f"seed{seed}", seed=seed, top1=30.0 + seed) for seed in range(3)]
    (group,) = group_runs([read_run(folder) for folder in folders])
    text = differences(group)[0]
    assert "Over 3 seeds our accuracy has a standard deviation of 1.0 points" in text
    assert "one seed" not in known_differences([group])[0]


def test_a_difference_stands_beside_the_interval_of_the_test_images(tmp_path):
    text = differences(group_runs([read_run(MBIB)])[0])
    low, high = read_record(MBIB).result.prediction.intervals["top1"]
    assert f"from the 10,000 test images alone, {low:.1f} to {high:.1f}, does not contain that number." in text[0]
    assert "The 95 % interval from the 3,500 test images alone" in text[2]
    seeds = []
    for seed, top1 in {4: 43.0, 5: 46.9}.items():
        interval = {"top1": wilson_interval(100 * top1, 10_000)}
        seeds.append(read_run(changed(MBIB, tmp_path, f"seed{seed}", seed=seed, top1=top1, intervals=interval)))
    low, high = wilson_interval(4495, 10_000)  # of the mean share
    said = (
        f"The 95 % interval of this mean from the 10,000 test images alone, {low:.1f} to {high:.1f}, does not contain"
    )
    assert said in differences(group_runs(seeds)[0])[0]
    wide = read_run(changed(MBIB, tmp_path, "wide", intervals={"top1": [40.0, 50.0]}))
    assert "40.0 to 50.0, contains that number." in differences(group_runs([wide])[0])[0]
    unknown = read_run(changed(MBIB, tmp_path, "unknown", intervals={}, measured={}))
    assert "interval" not in differences(group_runs([unknown])[0])[0]


def test_paragraphs_are_sentences(tmp_path):
    run = read_run(changed(MBIB, tmp_path, "worse", top1=40.0))
    text = " ".join(differences(group_runs([run])[0]))
    assert "the paper's Table 4, with a = 0.3 instead of 0.1. The" in text
    assert ",." not in text


def test_a_changed_recipe_is_named_and_compares_with_nothing(tmp_path, undrawn):
    folder = with_beta(changed(MBIB, tmp_path, "changed"), 1.0)
    (own,), (other,) = group_runs([read_run(MBIB)]), group_runs([read_run(folder)])
    assert (own.settings, own.is_papers) == ({}, True)
    assert (other.settings, other.is_papers) == ({"method.beta": 1.0}, False)
    assert "the recipe was changed in `method.beta`" in known_differences([other])[0]
    assert "the recipe was changed" not in known_differences([own])[0]
    page = tmp_path / "r.html"
    assert main(["report", str(MBIB), str(folder), "-o", str(page)]) == 0
    assert "<dt>changed from the recipe</dt><dd><code>method.beta</code> 1.0</dd>" in page.read_text()


def by_another_method(tmp_path, class_counts=None, **keys):
    """The run on the digits by cross-entropy in place of its recipe's method, with other keys, as `mbib train` would
    name it."""
    counts = {} if class_counts is None else {"class_counts": class_counts}
    named = {"name": "mbib_resnet20.ce_digits", "method": "ce", "stages": ["ce"]}
    folder = changed(DIGITS[0], tmp_path, "mine-ce", **named, **counts)
    return with_keys(folder, method={"name": "ce"}, **keys)


def test_a_run_by_another_method_is_compared_with_the_recipe_that_it_was_made_from(tmp_path, undrawn):
    folder = by_another_method(tmp_path, class_weights="balanced", epochs=3)
    groups = group_runs([read_run(DIGITS[0]), read_run(folder)])
    other = groups[1]
    assert (other.is_short, other.recipe_epochs) == (True, 60)
    assert other.settings == {"class_weights": "balanced", "method": "ce"}
    assert short_titles(groups) == ["MBIB, 60 epochs", "CE, class weights balanced, 3 of 60 epochs"]
    section = comparison_section(groups)
    assert [row[:2] for table in tables_of(section) for row in table.rows] == [
        ["MBIB", "60"],
        ["CE, class weights balanced", "3 of 60"],
    ]
    assert "<code>class_weights</code> balanced, <code>method</code> ce</dd>" in html_of(run_section(other))


def test_of_two_recipes_the_command_says_which_a_run_by_another_method_was_made_from(tmp_path):
    run, name, found = read_run(DIGITS[0]), "cifar_resnet32.mbib_cifar100_lt_if100", {}
    assert name not in map(recipe_name, packaged_recipes().values())
    for made_from in ("cifar_resnet32.ce_cifar100_lt_if100", "cifar_resnet32.bsce_cifar100_lt_if100", "mine.yaml"):
        environment = replace(run.record.environment, command=f"mbib train {made_from} --method mbib")
        of_other = replace(run, record=replace(run.record, name=name, environment=environment))
        found[made_from] = of_other.packaged and of_other.packaged.method["name"]
    assert [*found.values()] == ["ce", "bsce", None]


def test_samplers_are_in_the_titles_where_they_differ(tmp_path):
    folder = by_another_method(tmp_path, sampler="balanced")
    assert short_titles(group_runs([read_run(DIGITS[1]), read_run(folder)])) == ["CE", "CE, sampler balanced"]


def test_baselines_are_not_said_to_have_a_z():
    (baseline,), (own,) = group_runs([read_run(CE)]), group_runs([read_run(MBIB)])
    assert "z is rectified" not in known_differences([baseline])[0]
    assert "z is rectified" in known_differences([baseline, own])[0]


@pytest.mark.slow
def test_a_run_of_a_method_that_trains_nothing_is_reported(post_hoc_run, undrawn, capsys):
    metrics = json.loads((post_hoc_run / "metrics.json").read_text())
    assert (metrics["result"]["epoch"], metrics["best"], metrics["stages"]) == (None, None, ["ce", "tau_norm"])
    (group,) = group_runs([read_run(post_hoc_run)])
    assert (group.epochs, group.recipe_epochs, group.is_short) == (3, 60, True)
    assert group.settings == {"stage1.warmup_epochs": 1}
    text = html_of(run_section(group))
    assert "of the split <code>test</code> after tau-norm." in text
    assert "CE, then tau-norm (Kang et al., Decoupling Representation" in text
    assert "<dd>3 + 0 of the 60 that the recipe asks for" in text
    assert f"Chosen by tau-norm: tau {metrics['chosen']['tau']:g}, on {metrics['chosen_on']} (seed 0)." in text
    assert "best of the evaluated epochs" not in text
    print_report(post_hoc_run, read_record(post_hoc_run))
    out = capsys.readouterr().out
    assert "\nAfter tau-norm, on test:\n" in out
    assert f"\nChosen by tau-norm: tau {metrics['chosen']['tau']:g}, on {metrics['chosen_on']}\n" in out
    assert "Best epoch" not in out
    print_report(post_hoc_run / "stage1-ce", read_record(post_hoc_run / "stage1-ce"))
    out = capsys.readouterr().out
    assert "\nEpoch 3 (the last), on test:\n" in out
    assert "Chosen" not in out
    assert "Best epoch" not in out, "it is the last"


def test_figures_of_several_comparisons_and_of_sections_alike_have_files_of_their_own(tmp_path, undrawn):
    runs = [with_beta(changed(MBIB, tmp_path, f"run{beta}"), float(beta)) for beta in range(3)]
    page = tmp_path / "r.html"
    assert main(["report", *map(str, runs), "-o", str(page)]) == 0
    assert len(list((tmp_path / "r_figures").glob("*.png"))) == page.read_text().count("<figure>")
    sections = [Section("Alike"), Section("Alike"), Section("Other")]
    give_unique_anchors(sections)
    assert [section.anchor for section in sections] == ["Alike-1", "Alike-2", "Other"]


def test_figures_that_no_report_has_drawn_are_not_replaced(tmp_path):
    section = Section("One")
    section.figure(Illustration("empty", "Empty", "Nothing to read.", lambda: canvas(1, 1)[0]))
    for _ in range(2):  # those of a report are
        _write_figures(tmp_path, [section])
    png, pdf = tmp_path / "One-empty.png", tmp_path / "One-empty.pdf"
    png.unlink()
    pdf.write_text("mine")
    with pytest.raises(
        MbibError, match=r"One-empty\.pdf: the existing file is not a figure of this command, and is not"
    ):
        _write_figures(tmp_path, [section])
    assert not png.exists()
    assert pdf.read_text() == "mine"


def test_kept_intervals_are_those_of_drawn_test_sets():
    record = read_record(MBIB)
    prediction = record.result.prediction
    chances = np.array(prediction.per_class) / 100
    drawn = np.random.default_rng(0).binomial(100, chances, size=(4000, 100)) / 100
    few = np.array(record.class_counts) < 20
    for column, classes in {"macro": slice(None), "few": few}.items():
        low, high = prediction.interval(column)
        assert (high - low) / 2 == pytest.approx(1.96 * 100 * drawn[:, classes].mean(axis=1).std(), rel=0.1)


def test_numbers_stand_with_their_intervals_and_what_is_behind_them(undrawn):
    text = html_of(run_section(group_runs([read_run(MBIB)])[0]))
    heads = re.findall(r'<tr class="(\w*)"><td>([^<]+)</td>(.*)</tr>', text)
    rows = {name.strip(): re.findall(r"<td>(.*?)</td>", cells) for _, name, cells in heads}
    assert rows["prediction"][:2] == ["45.8", "45.8"]
    assert rows["95 % interval"] == ["44.9-46.8", "44.9-46.7", "63.0-66.1", "44.2-47.2", "22.7-25.6"]
    assert rows["evaluated images"] == ["10,000", "10,000", "3,500", "3,500", "3,000"]
    assert rows["evaluated classes"] == ["100", "100", "35", "35", "30"]
    assert "bootstrap over the images" in html_of(terms_section(group_runs([read_run(MBIB)])))


def test_a_figure_is_left_out_for_the_analysis_only_where_it_has_the_same_numbers(undrawn):
    same = run_section(group_runs([read_run(MBIB)])[0])
    assert {"shot_groups", "accuracy_by_head"} & same.figures.keys() == {"accuracy_by_head"}
    assert "are of the analysis" not in html_of(same)
    mixed = run_section(group_runs([read_run(BIB)])[0])
    assert {"shot_groups", "accuracy_by_head"} <= mixed.figures.keys()
    text = html_of(mixed)
    assert "<code>Accuracy by shot group and head</code> on are of the analysis, in float32 on 10,000 images" in text
    assert "those before, and the tables, are of the result, in bfloat16 on 10,000 images" in text
    titles = re.findall(r"<figcaption>(?:<[^>]+>)*([^<]+)<", text)
    assert [title for title in titles if title.startswith("Accuracy by ")] == [
        "Accuracy by class.", "Accuracy by head and shot group.", "Accuracy by shot group and head.",
    ]  # fmt: skip


def test_side_by_side_a_record_that_says_less_is_not_taken_for_one_of_other_images(undrawn):
    said = "These runs were not evaluated on the same images"
    strong, longer = (group_runs([read_run(folder)])[0] for folder in (STRONG, STRONG_400E))
    counts = longer.first.record.result.prediction.class_images
    assert len(counts) == 100
    assert not strong.first.record.result.prediction.class_images, "written before they were recorded"
    assert said not in html_of(comparison_section([strong, longer]))
    twice = [longer, *group_runs([read_run(STRONG_400E)])]
    assert said not in html_of(comparison_section(twice))
    counts = twice[1].first.record.result.prediction.class_images
    counts[0], counts[1] = counts[0] - 1, counts[1] + 1
    assert said in html_of(comparison_section(twice))
    assert said in html_of(comparison_section([strong, *twice]))


def test_of_the_same_data_the_same_images_may_be_held_out_in_two_ways(tmp_path, undrawn):
    """By a share of each class, and by the table that `mbib data --write-split` made of the same split."""
    said = "These runs were not evaluated on the same images"
    for digest in ("a", "b"):
        ways = {"20 % of each class, drawn with seed 0": "a", "the rows of split.csv": digest}
        folders = [
            changed(run, tmp_path, f"{place}{digest}", held_out=way, inputs=[{"data": data}])
            for place, (run, (way, data)) in enumerate(zip((MBIB, CE), ways.items(), strict=True))
        ]
        section = comparison_section(group_runs([read_run(folder) for folder in folders]))
        assert (said in html_of(section)) == (digest == "b")


def test_runs_side_by_side_stand_with_what_the_images_leave_uncertain(undrawn):
    groups, _ = read_inputs([str(MBIB), str(CE)])
    text = html_of(comparison_section(groups))
    # Wilson's interval is widest for the run closest to 50 %: 45.84 % of 10,000 images, by hand 44.87 to 46.82.
    assert "leaves overall accuracy uncertain by up to 1.0 points (95 % interval)" in text
    small, _ = read_inputs([str(DIGITS[0]), str(DIGITS[1])])
    (reach,) = re.findall(r"uncertain by up to ([\d.]+) points", html_of(comparison_section(small)))
    widest = 0.0
    for group in small:
        result = group.first.record.result.prediction
        n, p, z = result.images, result.top1 / 100, 1.96
        half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        low, high = (100 * (p + z * z / (2 * n) + sign * half) / (1 + z * z / n) for sign in (-1, 1))
        widest = max(widest, result.top1 - low, high - result.top1)
    assert float(reach) == pytest.approx(widest, abs=0.06)


def with_answers(tmp_path, classes, name="own"):
    """The run on the digits with made-up answers, of so many classes."""
    folder = changed(DIGITS[0], tmp_path, name, class_counts=list(range(1, classes + 1)))
    rng = np.random.RandomState(0)
    names = [f"<b>class {label}$" for label in range(classes)]
    content = json.loads((folder / "metrics.json").read_text())
    content["class_names"] = names
    for evaluation in filter(None, (content["result"], content["raw"], content["best"])):
        for metrics in evaluation["heads"].values():
            metrics["per_class"] = (classes * metrics["per_class"])[:classes]
    (folder / "metrics.json").write_text(json.dumps(content))
    split = replace(arrays(90)[0], targets=np.arange(90) % classes)
    predicted = np.where(np.arange(90) % 3 == 0, (split.targets + 1) % classes, split.targets)
    answers = Answers(np.arange(90), split.targets, predicted, rng.rand(90))
    write_answers(folder, answers, split, np.arange(1, classes + 1), names, None)
    write_errors(folder, answers, split, names, None)
    return folder


def test_a_report_shows_the_confusion_matrix_and_the_most_confident_errors(tmp_path):
    folder = with_answers(tmp_path, 10)
    section = run_section(group_runs([read_run(folder)])[0])
    assert "confusion_matrix" in section.figures
    text = html_of(section)
    assert text.count("<li>") == 24
    assert text.count('<img src="data:image/png;base64,') == 24
    assert "<b>" not in text
    assert "&lt;b&gt;class 1$" in text
    section = run_section(group_runs([read_run(DIGITS[0])])[0])
    assert "confusion_matrix" not in section.figures
    assert "gallery" not in html_of(section)


def test_of_many_classes_the_most_confused_are_a_table(tmp_path, undrawn):
    text = html_of(run_section(group_runs([read_run(with_answers(tmp_path, 45))])[0]))
    assert "confusion_matrix" not in text
    table = text[text.index("Most confused classes") :]
    assert "<td>&lt;b&gt;class 0$</td><td>&lt;b&gt;class 1$</td><td>2</td><td>100.0</td>" in table
    assert table[: table.index("</table>")].count("<tr class=") == 15


def test_an_errors_file_that_loads_from_elsewhere_is_refused(tmp_path):
    folder = with_answers(tmp_path, 10)
    content = (folder / "errors.json").read_text()
    (folder / "errors.json").write_text(content.replace("data:image/png", "http://example.org/x", 1))
    with pytest.raises(MbibError, match="a thumbnail is not an image"):
        run_section(group_runs([read_run(folder)])[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.write_text(""), "nowhere is a file: expected the folder"),
        (lambda folder: folder.mkdir(), "holds neither metrics.json nor sweep.json"),
        (
            lambda folder: [
                (folder / run).mkdir(parents=True) or (folder / run / "metrics.json").touch() for run in "ba"
            ],
            r"or a sweep's results; there are .*/nowhere/a, .*/nowhere/b$",
        ),
        (lambda folder: (folder.mkdir(), (folder / "sweep.json").write_text("{}")), "does not hold results of a sweep"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, make, message):
    make(tmp_path / "nowhere")
    with pytest.raises(MbibError, match=message):
        read_inputs([str(tmp_path / "nowhere")])


# For a reader who knows none of it

TABLE_1 = [
    *(ROOT / "results" / f"cifar_resnet32.{run}-bfloat16" for run in (
        "ce_cifar100_lt_if100-200e-seed0", "focal_cifar100_lt_if100-200e-seed0",
        "bsce_cifar100_lt_if100-200e-seed0", "bsce_cifar100_lt_if100-200e-seed1",
    )),
    *(ROOT / "results" / f"{run}-bfloat16" for run in (
        "bib_resnet32.cifar100_lt_if100-200e-seed0", "bib_resnet32.cifar100_lt_if100-200e-seed1",
        "mbib_resnet32.cifar100_lt_if100-200e-seed0", "mbib_resnet32.cifar100_lt_if100-200e-seed1",
    )),
    MBIB, STRONG, STRONG_400E,
]  # fmt: skip


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def tables_of(section):
    return [block.content for block in section.blocks if block.kind == "table"]


@pytest.fixture(scope="module")
def table_1():
    """The runs of the kept report, side by side, with its titles and its figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections_module, "render", lambda draw, formats, *_, **__: dict.fromkeys(formats, b"-"))
        groups = read_inputs([str(folder) for folder in TABLE_1])[0]
        return groups, comparison_section(groups)


def test_runs_that_were_not_trained_alike_stand_apart_and_it_says_so(table_1, undrawn):
    _, section = table_1
    differing, plain, strong = tables_of(section)
    kept = [yaml.safe_load((folder / "recipe.yaml").read_text()) for folder in (TABLE_1[0], STRONG)]
    shown = {re.search("`(.+?)`", row[0])[1]: row[1:] for row in differing.rows}
    assert shown == {
        "aa": ["none", "AutoAugment's for CIFAR"],
        "cutout": ["none", "16 pixels"],
        "opt": ["SGD with classical momentum (not Nesterov's)", "SGD with Nesterov momentum"],
        **{key: [str(recipe[key]) for recipe in kept] for key in ("weight_decay", "decay_rate")},
        "model_ema": ["no", "yes"],
    }
    assert [*differing.header] == ["setting", "paper's recipe", "strong recipe"]
    assert not [row[0] for row in differing.rows if row[0].startswith("`")], "words come before keys"
    length = {"model_ema_decay"}  # which counts in epochs
    assert {key for key in kept[1] if kept[0].get(key, kept[1][key]) != kept[1][key]} - length == {
        *shown, "model", "method",
    }  # fmt: skip
    assert [row[0] for row in plain.rows] == ["CE", "Focal", "BSCE", "BIB", "MBIB", "MBIB"]
    assert [row[:4] for row in strong.rows] == [["MBIB", "200", "bfloat16", "1"], ["MBIB", "400", "bfloat16", "1"]]
    assert "paper" not in strong.header, "which has no number for it"
    text = html_of(section)
    assert [block.content for block in section.blocks].count(NOT_ALIKE) == 1
    assert "<h3>With the strong recipe</h3>" in text
    assert {"accuracy-1", "accuracy-2", "curves-1", "curves-2"} <= section.figures.keys()
    alike = html_of(comparison_section(read_inputs([str(CE), str(BIB)])[0]))
    assert NOT_ALIKE not in alike
    assert "recipe</h3>" not in alike
    two = comparison_section(read_inputs([str(CE), str(STRONG)])[0])
    assert [row[0] for row in tables_of(two)[1].rows] == ["CE, paper's recipe", "MBIB, strong recipe"]
    assert NOT_ALIKE in html_of(two)


def test_networks_and_image_sizes_that_differ_are_said(tmp_path, undrawn):
    for key, value, shown in (("model", "mbib_resnet32", "resnet32"), ("img_size", 32, "32 pixels")):
        folder = with_keys(changed(DIGITS[0], tmp_path, key), **{key: value})
        groups = group_runs([read_run(DIGITS[1]), read_run(folder)])
        before = {"model": "resnet20", "img_size": "16 pixels"}[key]
        assert short_titles(groups) == [f"CE, {before}", f"MBIB, {shown}"]
        section = comparison_section(groups)
        assert NOT_ALIKE in html_of(section)
        (row,) = tables_of(section)[0].rows
        assert row[0] == {"model": "network (`model`)", "img_size": "image size (`img_size`)"}[key]
        assert row[1:] == [before, shown]


def test_what_was_found_is_what_the_files_say(table_1):
    (text, *_) = outcome(table_1[0])

    def mean(folders, metric):
        return np.mean([metrics_of(folder)["result"]["heads"]["prediction"][metric] for folder in folders])

    bsce, mbib = TABLE_1[2:4], TABLE_1[6:8]
    assert f"it classifies {mean(mbib, 'top1'):.1f} % of the 10,000 images" in text
    assert f"more than BSCE with {mean(bsce, 'top1'):.1f} % (mean of 2 runs)" in text
    assert f"BSCE is ahead: {mean(bsce, 'few'):.1f} % against {mean(mbib, 'few'):.1f} % of MBIB" in text


def test_only_runs_in_one_precision_are_ranked(table_1):
    groups = [group for group in table_1[0] if not group.first.name.count("strong")]
    ranking, beside = outcome(groups)
    assert "float32" not in ranking
    assert beside.startswith("Not ranked, because no other run here was trained with the same settings and precision")
    assert "MBIB, float32 with 45.8 %" in beside
    for alone in ((CE, MBIB), (MBIB, TABLE_1[6])):
        (said,) = outcome(read_inputs([str(folder) for folder in alone])[0])
        assert said.startswith("These runs are not ranked, because no two were trained with the same settings")


def test_only_runs_of_the_same_data_network_and_length_are_ranked(tmp_path):
    def said(*folders):
        return outcome(read_inputs([str(ROOT / "results" / folder) for folder in folders])[0])

    rival = "cifar_resnet32.bsce_strong_cifar100_lt_if100-200e-seed0-bfloat16"
    ranking, longer = said(rival, STRONG.name, STRONG_400E.name)
    assert "BSCE has the highest accuracy of 2 methods" in ranking
    assert "51.0 %" in ranking
    assert "0.1 points more than MBIB with 50.9 %" in ranking
    assert "MBIB is ahead: 34.3 % against 32.9 % of BSCE" in ranking
    assert "53.2" in longer
    bfloat16 = [
        f"{name}_cifar100_lt_if100-200e-seed0-bfloat16" for name in ("cifar_resnet32.ce", "cifar_resnet32.bsce")
    ]
    other_data = "mbib_resnet32.cifar100_lt_if10-200e-seed0-bfloat16"
    ranking, beside = said(*bfloat16, other_data)
    assert "of 2 methods" in ranking
    assert "60.6 %" in beside
    tuned, frozen = (f"mbib_efficientnet_lite0.{how}_cifar100_lt_if100-20e-seed0" for how in ("finetune", "frozen"))
    for apart in ((bfloat16[0], other_data), (tuned, frozen)):
        assert said(*apart)[0].startswith("These runs are not ranked")
    # Of another draw of the long-tailed subset, or of a source with another order.
    for key, value in {"subset_seed": 1, "dataset": "torch/cifar100"}.items():
        other = with_keys(changed(CE, tmp_path, key), **{key: value})
        assert said(other, bfloat16[1])[0].startswith("These runs are not ranked"), key


def test_every_set_of_runs_that_compare_has_a_paragraph(tmp_path):
    """Those in two precisions: neither is said to have no counterpart."""
    folders = [*DIGITS]
    for run in DIGITS:
        other = changed(run, tmp_path, f"{run.name}-bfloat16")
        (other / "metrics.json").write_text(json.dumps({**metrics_of(other), "precision": "bfloat16"}))
        with_keys(other, amp=True)
        folders.append(other)
    said = outcome(group_runs([read_run(folder) for folder in folders]))
    assert ["has the highest accuracy of 2 methods" in text for text in said] == [True, True]


def test_printed_differences_are_those_of_the_printed_numbers(table_1, undrawn):
    groups, section = table_1
    _, plain, _ = tables_of(section)
    for row in plain.rows:
        cells = dict(zip(plain.header, row, strict=True))
        ours, theirs = (float(cells[name].split()[0]) for name in ("overall", "paper"))
        assert f"{ours - theirs:+.1f}".replace("-", "−") == cells["difference"]
    for group in groups:
        for paragraph in differences(group):
            ours, apart, theirs = map(float, re.findall(r"(\d+\.\d) (?:%|points)", paragraph)[:3])
            assert apart == round(abs(ours - theirs), 1)
    (group,) = group_runs([read_run(CE)])
    assert "40.0 %, 1.7 points above the 38.3 %" in differences(group)[0]


def test_rows_and_figures_are_named_by_method_and_precision_and_not_by_folder(table_1):
    groups, section = table_1
    text = html_of(section)
    assert not re.search(r"cifar100_lt_if100|resnet32", text.replace("<wbr>", ""))
    titles = short_titles(groups)
    assert len(set(titles)) == len(groups)
    assert titles[0] == "CE, paper's recipe, 200 epochs, bfloat16"
    assert titles[-1] == "MBIB, strong recipe, 400 epochs, bfloat16"
    assert "MBIB, float32 (seed 0) minus BSCE, bfloat16 (seed 0)" in text
    assert "single runs, one in float32 and one in bfloat16, so that the difference is not of the method alone" in text


def test_what_is_known_to_differ_stands_once(table_1, undrawn):
    groups, section = table_1
    sections = [section, *(run_section(group, "-", alone=False) for group in groups)]
    assert "".join(map(html_of, sections)).count("What is known to differ:") == 1
    (known,) = known_differences(groups)
    assert "training used bfloat16 mixed precision (CE, BSCE, BIB, MBIB)" in known
    assert "only one seed was run in float32, so the spread between seeds is unknown (MBIB)" in known
    assert html_of(run_section(groups[0])).count("What is known to differ:") == 1


def test_what_sweeps_of_the_report_have_compared_is_said_and_nothing_more(undrawn):
    groups, _ = read_inputs([str(MBIB)])
    (alone,) = known_differences(groups)
    assert alone.endswith("runs that differ in one thing alone, and this report has no sweep of these recipes.")
    names = ("open_choices_screened-40e", "open_choices_on_test", "table9_rebalancing", "strong_recipe")
    groups, sweeps = read_inputs([str(MBIB), *(str(ROOT / "results" / name) for name in names)])
    first, screened, full, table_9 = known_differences(groups, sweeps)
    assert "in full" not in first
    assert "no sweep" not in first
    assert "none is known" not in first
    rows = {sweep.name: [run.heads["prediction"]["overall"] for run in sweep.runs] for sweep in sweeps}
    low, high = (f"{end(rows['open_choices_screened-40e']):.1f}" for end in (min, max))
    assert f"on training images that the long-tailed subset leaves out: 13 rows between {low} and {high} %." in screened
    assert "paper's number" not in screened, "40 of 200 epochs, on other images"
    for value in rows["open_choices_on_test"]:
        assert f"{value:.1f} % (−{47.5 - round(value, 1):.1f})" in full
    assert full.endswith("None of them is within a point of the paper's number.")
    assert "re-balancing none 40.8 % (−2.7)" in table_9
    section = run_section(groups[0], sweeps=sweeps)
    assert {first, screened, full, table_9} <= {block.content for block in section.blocks if block.kind == "paragraph"}
    assert known_differences(read_inputs([str(CE)])[0], sweeps)[0].endswith("no sweep of these recipes."), "of another"


def test_the_page_opens_with_what_was_found():
    rival = ROOT / "results" / "cifar_resnet32.bsce_strong_cifar100_lt_if100-200e-seed0-bfloat16"
    groups, _ = read_inputs([str(folder) for folder in (*TABLE_1, rival)])
    plain, strong, beside = outcome(groups)
    assert plain.startswith(
        "On CIFAR-100-LT, imbalance factor 100, with the paper's recipe, after 200 epochs, MBIB has the highest "
        "accuracy of 5 methods: it classifies 45.6 % of the 10,000 images of the split `test` correctly (mean of 2 "
        "runs), 1.0 points more than BSCE with 44.6 % (mean of 2 runs). That is no clear difference: of differences by "
        "chance, 95 % are within 1.5 points with these seeds and images."
    )
    assert re.search(
        r"BSCE is ahead: 26\.2 % against 23\.9 % of MBIB\. That is no clear difference: .* images\.", plain
    )
    assert plain.endswith(
        "The paper has 47.5 % for MBIB (Table 1); ours is 1.9 points below, and the others are −1.6 to +1.9 points "
        "from the paper's."
    )
    assert strong.startswith("With the strong recipe, after 200 epochs, BSCE has the highest accuracy of 2 methods")
    assert "within 1.4 points with these images; how much other seeds would add is not known." in strong
    assert "paper has" not in strong
    assert "MBIB, strong recipe, 400 epochs, bfloat16 with 53.2 % (one run)" in beside
    assert "float32 with 45.8 % (one run; 1.7 points below the paper's 47.5 % in Table 1)" in beside


def test_a_difference_is_called_clear_only_beyond_what_seeds_and_images_leave_open(tmp_path):
    def said(ours, theirs, **changes):
        folders = [
            changed(run, tmp_path, f"{run.name}{seed}{len(list(tmp_path.iterdir()))}", seed=seed, top1=top1, **changes)
            for run, values in ((DIGITS[0], ours), (DIGITS[1], theirs))
            for seed, top1 in enumerate(values)
        ]
        return outcome(group_runs([read_run(folder) for folder in folders]))[0]

    # Pooled standard deviation 1, of two groups of three: 2.78 * sqrt(2 / 3) points, by the seeds alone.
    reach = 2.78 * (2 / 3) ** 0.5
    text = said((69.0, 70.0, 71.0), (59.0, 60.0, 61.0), intervals={})
    assert "MBIB has the highest accuracy of 2 methods: it classifies 70.0 %" in text
    assert "10.0 points more than CE with 60.0 % (mean of 3 runs). That is more than chance makes likely" in text
    assert f"95 % are within {reach:.1f} points with these seeds; the records do not say what the number of" in text
    assert "no clear difference: of differences by chance" in said((60.0, 61.0, 62.0), (59.0, 60.0, 61.0), intervals={})
    wide = {"top1": [50.0, 70.0]}  # each reaches 10 points to either side
    text = said((69.0, 70.0, 71.0), (59.0, 60.0, 61.0), intervals=wide)
    assert (
        f"no clear difference: of differences by chance, 95 % are within {(200 + reach**2) ** 0.5:.1f} points" in text
    )
    narrow = {"top1": [64.0, 66.0]}
    text = said((70.0,), (60.0,), intervals=narrow)
    assert "more than the limited number of images explains: of differences by chance, 95 % are within 1.4" in text
    assert text.count("how much other seeds would add is not known") == 1
    # Equal seeds say nothing of the spread, and neither does one of several methods that has none.
    for ours in ((70.0,), (70.0, 70.0)):
        assert "Whether this is chance, the records do not say." in said(ours, (60.0,), intervals={})
    assert "are level, with the highest accuracy of 2 methods: each classifies 60.0 %" in said((60.0,), (60.0,))


def test_a_method_that_is_not_compared_adds_no_spread(tmp_path):
    folders = [
        changed(run, tmp_path, f"{method}{seed}", seed=seed, top1=top1, intervals={}, method=method, stages=[method])
        for method, run, values in (
            ("mbib", DIGITS[0], (89.9, 90.0, 90.1)),
            ("ce", DIGITS[1], (84.9, 85.0, 85.1)),
            ("focal", DIGITS[1], (30.0, 45.0, 60.0)),
        )
        for seed, top1 in enumerate(values)
    ]
    for folder in folders:
        with_keys(folder, method=folder.name[:-1])
    said = outcome(group_runs([read_run(folder) for folder in folders]))[0]
    assert "of 3 methods" in said
    assert "That is more than chance makes likely" in said


def test_students_t_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom in range(1, 60):
        assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=0.01)


def test_one_run_and_runs_of_different_data_have_an_outcome_too():
    assert outcome(read_inputs([str(MBIB)])[0]) == [
        "On CIFAR-100-LT, imbalance factor 100, MBIB classifies 45.8 % of 10,000 images of the split `test` correctly "
        "(one run), 1.7 points below the paper's 47.5 % in Table 1."
    ]
    other = ROOT / "results" / "mbib_resnet32.cifar100_lt_if10-200e-seed0-bfloat16"
    (text,) = outcome(read_inputs([str(DIGITS[0]), str(MBIB), str(other)])[0])
    assert text.startswith("These runs are not ranked, because no two were trained")
    assert "MBIB, digits, resnet20, 16 pixels, 60 epochs, float32 with 95.0 % (one run); " in text
    assert outcome([]) == []


def test_setups_are_named_after_what_sets_them_apart(tmp_path):
    def names(*changes):
        folders = []
        for seed, keys in enumerate(changes):
            folder = changed(DIGITS[0], tmp_path, f"{len(list(tmp_path.iterdir()))}", seed=seed)
            folders.append(with_keys(folder, **keys))
        return [name.short for name in setup_names(group_runs([read_run(folder) for folder in folders]))]

    assert names({}, {"weight_decay": 0.002}) == ["weight decay 0.0005", "weight decay 0.002"]
    assert names({}, {"opt": "momentum"})[1] == "optimizer SGD with classical momentum (not Nesterov's)"
    assert names({}, {"model_ema": True}) == ["no moving average of the weights", "moving average of the weights"]
    many = {"weight_decay": 0.002, "lr": 0.1, "batch_size": 64}
    assert names({}, many) == ["setup 1", "setup 2"]
    assert names({}, {**many, "model": "mbib_resnet32"}) == ["resnet20", "resnet32"]
    groups = read_inputs([str(DIGITS[0]), str(MBIB)])[0]
    assert [name.phrase for name in setup_names(groups)] == ["on digits", "on CIFAR-100-LT, imbalance factor 100"]


def test_of_two_seeds_both_are_said_and_their_mean_is_drawn(undrawn):
    folders = TABLE_1[4:6]
    (group,) = group_runs([read_run(folder) for folder in folders])
    section = run_section(group)
    text = unescape(html_of(section))
    for folder in folders:
        metrics = metrics_of(folder)
        assert f"<code>{metrics['environment']['command']}</code>" in text
        assert metrics["environment"]["commit"] in text
    assert "best of the evaluated epochs" not in text, "the last was the best of both"
    best = replace(group.runs[1].record.best, epoch=180, heads={"prediction": group.first.heads["prediction"]})
    earlier = replace(group.runs[1], record=replace(group.runs[1].record, best=best))
    said = f"was the last (seed 0); 180 with {best.prediction.top1:.1f} % (seed 1); it was chosen on"
    assert said in html_of(run_section(group_runs([group.first, earlier])[0]))
    seconds = np.mean([metrics_of(folder)["training_seconds"] for folder in folders])
    assert f"{seconds / 3600:.1f} hours (epochs and their evaluations only), the mean of the seeds" in text
    assert "the better the tail is learnt. Numbers are means over the 2 seeds." in text
    assert "are of the analysis (seed 0), in float32" in text
    predictions = [metrics_of(folder)["result"]["heads"]["prediction"] for folder in folders]
    mean = group.heads["prediction"]
    assert mean.per_class == pytest.approx(np.mean([each["per_class"] for each in predictions], axis=0).tolist())
    assert mean.few == pytest.approx(np.mean([each["few"] for each in predictions]))
    assert group.first.heads["prediction"].few == predictions[0]["few"]


def test_a_network_of_one_head_has_no_figure_of_heads_and_heads_say_what_they_see(tmp_path, undrawn):
    (ce,), (bib,), (mbib,) = (group_runs([read_run(folder)]) for folder in (CE, BIB, MBIB))
    assert "shot_groups" not in run_section(ce).figures
    analyzed, content = changed(CE, tmp_path, "analyzed"), json.loads((MBIB / "analysis.json").read_text())
    content["heads"] = {"prediction": content["heads"]["prediction"]}
    (analyzed / "analysis.json").write_text(json.dumps(content))
    section = run_section(group_runs([read_run(analyzed)])[0])
    assert "trend" in section.figures
    assert not {"shot_groups", "accuracy_by_head"} & section.figures.keys()
    rows = [[row[0] for row in tables_of(run_section(group))[0].rows] for group in (bib, mbib)]
    assert [name for name in rows[0] if "(" in name] == ["v1 (last map)", "z (bottleneck)"]
    assert [name for name in rows[1] if "(" in name] == [
        "v1 (map 1 of 3)", "v2 (map 2 of 3)", "v3 (last map)", "z (bottleneck)",
    ]  # fmt: skip


def test_a_command_of_an_older_name_has_todays_beside_it(undrawn):
    for folder in (MBIB, STRONG_400E, CE):
        (group,) = group_runs([read_run(folder)])
        text, name = html_of(run_section(group)), folder.name.partition("-")[0]
        assert (f"Today, <code>mbib train {name}</code> trains this recipe." in text) == (folder != CE)
        recorded = metrics_of(folder)["environment"]["command"].split()[2]
        assert (recorded == name) == (folder == CE)
        assert name in map(recipe_name, packaged_recipes().values())


def test_the_words_of_a_report_are_explained(table_1):
    groups, _ = table_1
    terms = dict(terms_section(groups).blocks[0].content)
    data = terms["CIFAR-100-LT, imbalance factor 100"]
    assert "10,847 training images in 100 classes; the largest class has 500, the smallest 5" in data
    assert "an imbalance factor (IF) of 500 / 5 = 100." in data
    assert "10,000 images of the split `test`" in data
    assert {"CE", "Focal", "BSCE", "BIB", "MBIB", "heads", "moving average of the weights", "precision"} <= terms.keys()
    assert "for BIB of v1 (last map) and z (bottleneck), for MBIB of v3 (last map) and z (bottleneck)" in terms["heads"]
    assert terms["CE"] == "Plain cross-entropy on every head: the baseline, which does nothing about the imbalance."
    assert terms["BSCE"].endswith(
        "From Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, NeurIPS 2020."
    )
    assert {"top-1 accuracy", "logits", "chance"} <= terms.keys()
    macro_f1 = re.search("Macro F1 is, (.*?)[.]", terms["overall, macro, many, medium, few"])[1]
    assert "F1" not in macro_f1
    assert "harmonic mean" in macro_f1
    small = dict(terms_section(group_runs([read_run(CE)])).blocks[0].content)
    assert not {"heads", "MBIB", "moving average of the weights"} & small.keys()


def test_data_are_described_for_each_run_that_has_others(tmp_path):
    """Of images of somebody's own, which no data set of the zoo's is."""
    own = {"dataset": "folder", "data_dir": "mine", "experiment": None}
    folders = [
        by_another_method(tmp_path / str(place), class_counts=[*range(most, most - 10, -1)], **own, epochs=epochs)
        for place, (most, epochs) in enumerate([(40, 60), (50, 20), (40, 10)])
    ]

    def said(*folders):
        terms = dict(terms_section(group_runs([read_run(folder) for folder in folders])).blocks[0].content)
        return {name: text.partition(" training")[0][-3:] for name, text in terms.items() if name.startswith("data")}

    assert said(*folders) == {
        "data of CE, 60 epochs, and of CE, 10 of 60 epochs": "355",
        "data of CE, 20 of 60 epochs": "455",
    }
    assert said(folders[0], folders[2]) == {"data": "355"}
    assert said(folders[0]) == {"data of mbib_resnet20.ce_digits": "355"}


def test_an_older_record_describes_the_same_data_in_the_same_words():
    """It has no numbers of images by class."""
    runs = [read_run(folder) for folder in (MBIB, CE.with_name(CE.name.replace(".ce", ".focal")))]
    assert [bool(run.record.result.prediction.class_images) for run in runs] == [False, True]
    terms = [text for name, text in terms_section(group_runs(runs)).blocks[0].content if name.startswith("CIFAR")]
    assert len(terms) == 1
    assert terms[0].endswith("Evaluated on 10,000 images of the split `test`, equally many of each class.")


# The page


def test_text_is_escaped():
    assert inline("a < b & `x <y>`") == "a &lt; b &amp; <code>x &lt;y&gt;</code>"
    section = Section('<img src=x onerror="alert(1)">')
    section.paragraphs("<script>alert(1)</script>")
    section.table(Table(["<b>"], [["</table>"]]))
    page = render_page("<title>", "</p>", [section, section])
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "</table></td>" not in page


@pytest.fixture(scope="module")
def reported(tmp_path_factory, finished_run):
    """A report of every kind: an analyzed run, two that are not, and a sweep."""
    root = tmp_path_factory.mktemp("report")
    run = root / "analyzed"
    shutil.copytree(finished_run, run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyze_module, "_draw", lambda *_: None)  # the report draws them
        analyze_module.analyze([str(run)], images_per_class=10)
    (run / "notes.md").write_text("Trained for a test.\n\nIts `few` classes <are> few.\n")
    # What a sweep itself leaves is for the tests of sweeps.
    sweep = made_up(on_recipe(find_sweep(["figure9_structures"]), "mbib_resnet20.digits"), epochs=2)
    (root / sweep.name).mkdir()
    (root / sweep.name / "sweep.json").write_bytes(to_json(sweep))
    plain = root / "not_analyzed"
    shutil.copytree(MBIB, plain, ignore=shutil.ignore_patterns("analysis.json", "figures", "notes.md"))
    inputs = [run, DIGITS[1], plain, root / sweep.name]
    page = root / "out" / "report.html"
    assert main(["report", *map(str, inputs), "-o", str(page), "--title", "A <report>"]) == 0
    return page, inputs


@pytest.mark.slow
def test_the_report_says_what_the_files_say(reported):
    page, inputs = reported
    text = page.read_text(encoding="utf-8")
    for folder in inputs[:-1]:
        metrics = json.loads((folder / "metrics.json").read_text())
        for head in metrics["result"]["heads"].values():
            assert f"<td>{head['top1']:.1f}</td>" in text
        assert metrics["environment"]["commit"] in text
    for row in json.loads((inputs[-1] / "sweep.json").read_text())["runs"]:
        assert row["environment"]["commit"] in text
    assert "A &lt;report&gt;" in text
    assert "Its <code>few</code> classes &lt;are&gt; few." in text
    assert "<td>−1.7</td>" in text
    assert "3 of the 60 that the recipe asks for" in text
    assert "2 epochs of 60" in text


def test_the_words_are_folded_and_come_after_the_outcome(tmp_path, undrawn):
    page = tmp_path / "r.html"
    assert main(["report", str(DIGITS[0]), str(DIGITS[1]), "-o", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    found = ["</h1>", 'class="outcome">On digits, MBIB has', "<nav", "Side by side</h2>", "What the words mean</h2>"]
    places = [text.index(each) for each in (*found, "<details><summary>", "</details>")]
    assert places == sorted(places)
    assert text.count("<details>") == text.count("</details>") == 1


@pytest.mark.slow
def test_the_report_needs_nothing_and_names_no_place_of_this_machine(reported):
    page, inputs = reported
    text = page.read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href|srcset)="(?!data:|#)', text)
    assert "@import" not in text
    assert "url(" not in text
    for place in (page.parents[1], inputs[0].parent, Path.home(), ROOT):
        assert str(place) not in text


@pytest.mark.slow
def test_every_figure_is_there_as_png_and_pdf(reported):
    page, _ = reported
    text = page.read_text(encoding="utf-8")
    folder = page.with_name("report_figures")
    pngs = sorted(folder.glob("*.png"))
    assert len(pngs) == text.count("<figure>") == text.count("<figcaption>") > 12
    for png in pngs:
        assert png.read_bytes().startswith(b"\x89PNG")
        assert png.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (360, True)])
def test_a_browser_shows_all_of_it_and_complains_of_nothing(reported, tmp_path, width, dark):
    page, inputs = reported
    found = open_page(page, tmp_path, width=width, dark=dark, picture=dark)
    assert (found["errors"], found["console"], found["requests"]) == ([], [], [])
    assert found["scripts"] == 0
    assert all(image["loaded"] for image in found["images"])
    figures = [image for image in found["images"] if image["source"].startswith("data:image/svg+xml")]
    assert len(figures) == page.read_text(encoding="utf-8").count("<figure>")
    assert all(image["dark"] == dark and len(image["alternative"]) > 40 for image in figures)
    errors = [image["alternative"] for image in found["images"] if image not in figures]
    assert len(errors) == 24
    assert all(re.fullmatch(r"digits\[\d+\], of class \d, taken for \d", text) for text in errors)
    assert found["width"] <= found["window"] == width  # nothing sticks out of the page
    light = [int(value) for value in re.findall(r"\d+", found["background"])]
    assert (sum(light) < 150) == dark
    assert len(found["titles"]) == len(inputs) + 2  # the words, and side by side
    assert found["dangling"] == 0
    assert not dark or (tmp_path / "screenshot.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_same_results_give_the_same_report(tmp_path):
    for name in ("one", "two"):
        assert main(["report", str(DIGITS[0]), "-o", str(tmp_path / name / "r.html")]) == 0
    first, second = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    )
    assert first == second


def test_a_published_name_is_reported(tmp_path, undrawn):
    assert main(["report", "mbib_resnet32.cifar100_lt_if100", "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    ours, below = re.search(r"accuracy is (\d\d\.\d) %, (\d\.\d) points below the 47\.5 %", text).groups()
    assert round(47.5 - float(ours), 1) == float(below)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(DIGITS[0]), "-o", str(tmp_path / "r.html")]) == 2
    assert "pip install 'mbib-timm[train]'" in capsys.readouterr().err


def labelled(figure):
    """The lines of a figure that its legend has, and those behind them."""
    lines = figure.axes[0].lines
    shown = {line.get_label(): line.get_ydata().tolist() for line in lines if not line.get_label().startswith("_")}
    return shown, [line.get_ydata().tolist() for line in lines if line.get_label().startswith("_")]


def test_curves_side_by_side_show_every_seed_and_which_weights(undrawn):
    twins = [ROOT / "results" / f"bib_resnet32.cifar100_lt_if100-200e-seed{seed}-bfloat16" for seed in (0, 1)]
    groups = group_runs([read_run(folder) for folder in (*twins, STRONG)])
    bib, strong = titles = short_titles(groups)
    assert titles == ["BIB, paper's recipe", "MBIB, strong recipe"]
    shown, thin = labelled(comparison_curves(groups, titles))
    label = f"{bib} (n = 2), raw weights"
    assert {" ".join(name.split()) for name in shown} == {label, f"{strong}, moving average of the weights"}
    expected = [[row.val["top1"] for row in run.history if row.val] for run in groups[0].runs]
    assert thin == expected
    assert shown[label] == pytest.approx(np.mean(expected, axis=0).tolist())
    shown, thin = labelled(comparison_curves(groups[:1], [groups[0].title]))
    assert [*shown] == [f"{groups[0].title} (n = 2)"]
    page = html_of(comparison_section(groups))
    assert "Each line is a run, thin for each seed where there are several, and thick for their mean; where" in page
    assert "when training stops; the legend says which weights a line is of." in page


def test_curves_of_a_sweep_show_every_seed_and_which_weights():
    results = made_up(find_sweep(["table7_heads"]))
    runs = [
        replace(run, averaged=run.method == "bsce", curve=replace(run.curve, val_top1=[10.0, 40.0 + run.seed]))
        for run in results.runs
    ]
    shown, thin = labelled(sweep_curves(replace(results, runs=runs)))
    assert len(thin) == len(runs) == 9
    assert set(map(tuple, shown.values())) == {(10.0, 41.0)}
    assert all("(n = 3)" in label for label in shown)
    averages = [label for label in shown if label.endswith(", moving average of the weights")]
    assert 0 < len(averages) < len(shown)
    assert all(label.endswith(", raw weights") for label in shown if label not in averages)
    assert not any("weights" in label for label in labelled(sweep_curves(results))[0]), "of older results"


@pytest.mark.parametrize("draw", [comparison_bars, comparison_curves])
def test_long_names_stay_inside_the_figure(draw):
    """Those of runs that differ in many keys."""
    results = Path(__file__).parents[1] / "results"
    runs = [results / f"mbib_resnet32.cifar100_lt_if100-200e-{end}" for end in ("seed0", "seed1-bfloat16")]
    groups = [
        RunGroup(f"{run.name} ({'some_key 0.25, ' * 12}{run.folder.name})", (run,)) for run in map(read_run, runs)
    ]
    drawn = []

    def measured():
        figure = draw(groups, [group.title for group in groups])
        FigureCanvasAgg(figure).draw()
        texts = [*figure.legends[0].get_texts(), *figure.axes[0].get_yticklabels()]
        drawn.extend((text.get_window_extent(), figure.bbox.width) for text in texts)
        return figure

    render(measured)  # in the style of reports
    assert len(drawn) >= 2
    assert all(0 <= place.x0 < place.x1 <= width for place, width in drawn)
