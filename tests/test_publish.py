"""Publishing, over LFS and Xet, to a Hub on loopback: what arrives, what is refused, what survives a bad connection."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import timm
import torch
import yaml
from huggingface_hub import HfApi, constants
from loopback_hub import TestHub
from small_data import class_folders

from mbib_timm.cli import main
from mbib_timm.data.sources import open_split
from mbib_timm.errors import MbibError
from mbib_timm.licences import check_licence
from mbib_timm.publishing import publish as publish_module
from mbib_timm.publishing.card import Stated, render_card
from mbib_timm.publishing.publish import Publisher, PublishError
from mbib_timm.publishing.release import git_oid, make_release
from mbib_timm.recipe import KEYS, Recipe, load_recipe
from mbib_timm.recipe.checks import TABLE_KEYS
from mbib_timm.reporting.sections import render_page, run_section
from mbib_timm.results.redact import redact_command, redact_recipe, redact_text, redact_value
from mbib_timm.results.run_text import time_text
from mbib_timm.results.runs import group_runs, read_run, read_seeds

REPOSITORY = "tester/mbib_resnet20.digits"
FILES = {
    "README.md", "config.json", "model.safetensors", "recipe.yaml", "metrics.json", "figures/class_accuracy.png",
    "figures/shot_groups.png", "figures/training_curves.png",
}  # fmt: skip


@pytest.fixture
def hub(tmp_path):
    hub = TestHub(tmp_path / "hub").start()
    yield hub
    hub.stop()


def environment(hub, home):
    return {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": hub.token, "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip


def fresh(hub, home, *arguments):
    """Run Python in a process of its own, which finds the Hub by the environment."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(hub, home),
        capture_output=True,
        text=True,
        timeout=120,
    )


def publisher(hub, release, waits=None):
    api = HfApi(endpoint=hub.url, token=hub.token)
    return Publisher(api, release, wait=(waits if waits is not None else []).append)


def state(hub):
    return hub.load(REPOSITORY)


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LOAD = """
import sys
import mbib_timm, timm, torch
images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
for name, file in zip(sys.argv[1::2], sys.argv[2::2]):
    with torch.no_grad():
        torch.save(timm.create_model(name, pretrained=True).eval()(images), file)
"""


def load_elsewhere(hub, home, files, **further):
    """Load models by timm alone, in a process with a cache of its own; what they give goes into files."""

    def work():
        for name, file in files.items():
            with torch.no_grad():
                torch.save(timm.create_model(name, pretrained=True).eval()(IMAGES), file)

    return forked.run_with_hub(hub, home, work, **further)


@pytest.fixture
def without_xet(monkeypatch):
    """Large files go through LFS, also those of this process."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def expected(finished_run):
    model = timm.create_model(f"local-dir:{finished_run}", pretrained=True).eval()
    with torch.no_grad():
        return model(IMAGES)


def require_published(hub, done, xet):
    assert done.returncode == 0, done.stderr
    assert f"published: hf-hub:{REPOSITORY}@v1 (8 of 8 files new)" in done.stdout
    repo = state(hub)
    tree = repo["commits"][repo["refs"]["main"]]["tree"]
    assert set(tree) == FILES | {".gitattributes"}
    assert ("xet" in tree["model.safetensors"]) == xet
    assert repo["tags"] == {"v1": repo["refs"]["main"]}
    assert len(repo["commits"]) == 2, "the initial commit, and one for everything"


def require_loaded(hub, done, files, expected):
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(torch.equal(torch.load(file), expected) for file in files.values())
    assert hub.token not in done.stdout + done.stderr


ON_THE_HUB = [f"hf-hub:{REPOSITORY}", f"hf-hub:{REPOSITORY}@v1"]


@pytest.mark.slow
def test_round_trip_over_xet_in_fresh_processes(hub, finished_run, expected, tmp_path):
    """The second of them loads by `import mbib_timm` and timm alone."""
    call = ["-m", "mbib_timm", "publish", finished_run, "--repo-id", REPOSITORY]
    require_published(hub, fresh(hub, tmp_path / "home", *call), xet=True)
    files = {name: tmp_path / f"{i}.pt" for i, name in enumerate(ON_THE_HUB)}
    done = fresh(hub, tmp_path / "other home", "-c", LOAD, *(word for pair in files.items() for word in pair))
    require_loaded(hub, done, files, expected)


@pytest.mark.slow
def test_round_trip_over_lfs(hub, finished_run, expected, tmp_path):
    call = ["publish", finished_run, "--repo-id", REPOSITORY]
    require_published(hub, forked.mbib_and_hub(hub, tmp_path / "home", *call), xet=False)
    files = {name: tmp_path / f"{i}.pt" for i, name in enumerate(ON_THE_HUB)}
    require_loaded(hub, load_elsewhere(hub, tmp_path / "other home", files), files, expected)
    hub.stop()  # what is in the cache needs no network
    files = {ON_THE_HUB[0]: tmp_path / "cached.pt"}
    require_loaded(hub, load_elsewhere(hub, tmp_path / "other home", files, HF_HUB_OFFLINE="1"), files, expected)


def test_a_second_time_nothing_is_committed(hub, finished_run):
    release = make_release(finished_run, REPOSITORY)
    publisher(hub, release).publish(private=False, revision=None)
    before = state(hub)
    publisher(hub, release).publish(private=False, revision=None)
    assert state(hub) == before
    publisher(hub, release).publish(private=False, revision="paper")
    assert state(hub)["commits"] == before["commits"]
    assert state(hub)["tags"] == {"v1": before["refs"]["main"], "paper": before["refs"]["main"]}


def test_other_content_is_a_new_release(hub, finished_run):
    publisher(hub, make_release(finished_run, REPOSITORY)).publish(private=False, revision=None)
    smaller = make_release(finished_run, REPOSITORY, inference_only=True)
    with pytest.raises(PublishError, match="already has a revision v1"):
        publisher(hub, smaller).publish(private=False, revision="v1")
    publisher(hub, smaller).publish(private=False, revision=None)
    repo = state(hub)
    assert repo["tags"]["v2"] == repo["refs"]["main"] != repo["tags"]["v1"]


def test_figures_that_are_no_more_go_and_other_files_stay(hub, finished_run, capsys):
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo(REPOSITORY)
    for path in ("figures/old.png", "notes.txt"):
        api.upload_file(path_or_fileobj=b"by hand", path_in_repo=path, repo_id=REPOSITORY)
    publisher(hub, make_release(finished_run, REPOSITORY)).publish(private=False, revision=None)
    tree = state(hub)["commits"][state(hub)["refs"]["main"]]["tree"]
    assert set(tree) == FILES | {".gitattributes", "notes.txt"}
    assert f"({len(FILES)} of {len(FILES)} files new)" in capsys.readouterr().out, "one that goes is not new"


@pytest.mark.slow
@pytest.mark.usefixtures("without_xet")
def test_inference_only_loads_and_predicts_the_same(hub, finished_run, expected, tmp_path):
    publisher(hub, make_release(finished_run, REPOSITORY, inference_only=True)).publish(False, None)
    file = tmp_path / "logits.pt"
    files = {ON_THE_HUB[0]: file}
    require_loaded(hub, load_elsewhere(hub, tmp_path / "home", files), files, expected)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/api/repos/create", "/preupload/", "/commit/", "/tag/", "/tree/", "/api/models/"])
def test_a_busy_hub_is_asked_again(hub, finished_run, path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.fail.append([".*", path, 503, 2])
    waits = []
    publisher(hub, make_release(finished_run, REPOSITORY), waits).publish(private=False, revision=None)
    repo = state(hub)
    assert repo["tags"] == {"v1": repo["refs"]["main"]}
    assert len(repo["commits"]) == 2


def test_a_hub_that_stays_away_leaves_nothing_half_published(hub, finished_run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.fail.append(["POST", "/commit/", 503, 1000])
    waits = []
    with pytest.raises(PublishError, match=r"cannot commit, after 5 attempts: .*; publish again later"):
        publisher(hub, make_release(finished_run, REPOSITORY), waits).publish(private=False, revision=None)
    assert waits == [1, 2, 4, 8]
    repo = state(hub)
    assert set(repo["commits"][repo["refs"]["main"]]["tree"]) == {".gitattributes"}
    assert repo["tags"] == {}
    hub.fail.clear()
    publisher(hub, make_release(finished_run, REPOSITORY)).publish(private=False, revision=None)
    assert len(state(hub)["commits"]) == 2


def test_a_commit_whose_answer_is_lost_is_found_again(hub, finished_run, monkeypatch):
    publishing = publisher(hub, make_release(finished_run, REPOSITORY))
    arrived = publishing.api.create_commit

    def drop_the_answer(*arguments, **options):
        arrived(*arguments, **options)
        raise ConnectionError("connection reset by peer")

    monkeypatch.setattr(publishing.api, "create_commit", drop_the_answer)
    publishing.publish(private=False, revision=None)
    repo = state(hub)
    assert len(repo["commits"]) == 2
    assert repo["tags"] == {"v1": repo["refs"]["main"]}


def test_what_somebody_else_pushes_meanwhile_is_not_overwritten(hub, finished_run, monkeypatch):
    publishing = publisher(hub, make_release(finished_run, REPOSITORY))
    ours = publishing.api.create_commit
    other = HfApi(endpoint=hub.url, token=hub.token)

    def late(*arguments, **options):
        other.upload_file(path_or_fileobj=b"theirs", path_in_repo="README.md", repo_id=REPOSITORY)
        return ours(*arguments, **options)

    monkeypatch.setattr(publishing.api, "create_commit", late)
    with pytest.raises(PublishError, match="was changed by someone else"):
        publishing.publish(private=False, revision=None)
    repo = state(hub)
    assert set(repo["commits"][repo["refs"]["main"]]["tree"]) == {".gitattributes", "README.md"}
    assert repo["tags"] == {}


@pytest.mark.slow
def test_tokens(hub, finished_run, tmp_path):
    call = ["publish", finished_run, "--repo-id", REPOSITORY]
    done = forked.mbib_and_hub(hub, tmp_path, *call, HF_TOKEN="hf_secret_but_wrong")
    assert done.returncode == 1
    assert "does not accept the token" in done.stderr
    assert "hf_secret_but_wrong" not in done.stdout + done.stderr
    done = forked.mbib_and_hub(hub, tmp_path, *call, HF_TOKEN="")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert state(hub) is None


@pytest.mark.slow
@pytest.mark.usefixtures("without_xet")
def test_a_private_repository(hub, finished_run, expected, tmp_path):
    publisher(hub, make_release(finished_run, REPOSITORY)).publish(private=True, revision=None)
    assert state(hub)["private"]
    file = tmp_path / "logits.pt"
    files = {ON_THE_HUB[0]: file}
    require_loaded(hub, load_elsewhere(hub, tmp_path, files), files, expected)
    call = ["predict", f"hf-hub:{REPOSITORY}", __file__]
    done = forked.mbib_and_hub(hub, tmp_path / "new", *call, HF_TOKEN="wrong")
    assert done.returncode == 2
    assert "is private and needs a token" in done.stderr


@pytest.mark.slow
def test_missing_repositories_and_no_network(hub, tmp_path):
    call = ["predict", "hf-hub:tester/nothing", __file__]
    done = forked.mbib_and_hub(hub, tmp_path, *call)
    assert done.returncode == 2
    assert "there is no such repository" in done.stderr
    done = forked.mbib_and_hub(hub, tmp_path, *call, HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "cannot be reached, and there is no copy in the cache" in done.stderr


def test_a_dry_run_asks_no_hub(finished_run, capsys, monkeypatch):
    monkeypatch.setattr(publish_module, "HfApi", None)
    assert main(["publish", str(finished_run), "--repo-id", REPOSITORY, "--dry-run"]) == 0
    out = capsys.readouterr().out
    for path, content in make_release(finished_run, REPOSITORY).files.items():
        assert f"{path}  " in out or f"{path} " in out
        assert f"{len(content):,}" in out
    assert "library_name: timm" in out


def test_nothing_of_the_machine_is_published(finished_run):
    release = make_release(finished_run, REPOSITORY)
    assert str(finished_run.parent).encode() not in b"".join(release.files.values())
    recipe = yaml.safe_load(release.files["recipe.yaml"])
    assert "lr" in recipe
    assert not {"data_dir", "output", "device", "workers"} & set(recipe)
    assert not [path for path in release.files if path.endswith((".ckpt", ".bin", ".pt", ".pth", ".pkl"))]


def test_a_model_of_ones_own_goes_where_its_owner_says_and_claims_no_licence(finished_run, capsys):
    assert main(["publish", str(finished_run), "--dry-run"]) == 2
    assert "name a repository with --repo-id YOU/mbib_resnet20.digits" in capsys.readouterr().err
    card = render_card(read_run(finished_run), REPOSITORY)
    assert "license" not in card
    assert "Apache" not in card
    assert "The paper reports" not in card


@pytest.mark.parametrize(("slip", "meant"), [("CCBY", "cc-by-4.0"), ("gpl2", "gpl-2.0"), ("Apache2", "apache-2.0")])
def test_a_licence_written_otherwise_is_answered_with_one_that_is_no_family(slip, meant):
    with pytest.raises(MbibError, match=f"did you mean '{meant}'"):
        check_licence(slip)


def test_the_licence_is_the_same_in_card_and_config(finished_run, capsys):
    for license in ("cc-by-nc-4.0", None):
        files = make_release(finished_run, REPOSITORY, stated=Stated(license=license)).files
        metadata = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
        assert metadata.get("license") == license
        assert json.loads(files["config.json"])["pretrained_cfg"]["license"] == license
        assert ("The weights are under `cc-by-nc-4.0`." in files["README.md"].decode()) == (license is not None)
    arguments = ["publish", str(finished_run), "--repo-id", REPOSITORY, "--dry-run"]
    assert main([*arguments, "--license", "cc-by-nc"]) == 2
    assert "unknown licence of the Hub 'cc-by-nc': did you mean 'cc-by-nc-" in capsys.readouterr().err
    for repository in ("birds", "me/birds/2", "me/two words", "me/a..b"):
        assert main(["publish", str(finished_run), "--repo-id", repository, "--dry-run"]) == 2
        message = capsys.readouterr().err
        assert message.startswith("mbib: error: --repo-id")
        assert message.count("\n") == 1


def test_the_card_lists_every_class_with_its_images_and_accuracy(finished_run):
    record = read_run(finished_run).record
    card = render_card(read_run(finished_run), REPOSITORY)
    images = [34] * 10  # of the digits' test split
    rows = zip(record.class_names, record.class_counts, images, record.result.prediction.per_class, strict=True)
    expected = [f"| {name} | {count} | {of} | {accuracy:.1f} |" for name, count, of, accuracy in rows]
    assert "\n".join(expected) in card, "from most to fewest images, which is the digits' order"


def test_the_card_says_how_the_evaluated_images_were_chosen(finished_run, tmp_path):
    assert read_run(finished_run).record.held_out is None, "the digits have a test split"
    assert "were not trained on in this run" not in render_card(read_run(finished_run), REPOSITORY)
    whole = class_folders(tmp_path)
    for name in ("train", "val"):
        shutil.copytree(whole, tmp_path / "splits" / name)
    recipe = Recipe(dataset="folder", data_dir=str(whole), subset_seed=3)
    assert open_split(recipe.replace(data_dir=str(tmp_path / "splits")), "val").chosen == ""
    assert open_split(recipe, "train").chosen == "all but 20 % of each class, drawn with seed 3"
    chosen = open_split(recipe, "val").chosen
    assert chosen == "20 % of each class, drawn with seed 3"
    run = read_run(finished_run)
    card = render_card(replace(run, record=replace(run.record, held_out=chosen)), REPOSITORY)
    assert f"The evaluated images come from the same source and were not trained on in this run: {chosen}." in card


def test_the_card_of_a_run_on_own_images_says_that_its_command_lacks_their_folder(finished_run):
    run = read_run(finished_run)
    own = replace(run, recipe=run.recipe.replace(dataset="folder", data_dir="/home/me/images"))
    said = "\n```\n\nThe command is without the folder of the images: add `--data-dir FOLDER`.\n\n## Intended use"
    assert said in render_card(own, REPOSITORY)
    assert "--data-dir" not in render_card(run, REPOSITORY)


def test_commands_lose_their_paths():
    command = "mbib train r.yaml --data-dir '/home/me/my images' --lr 0.1 --output=/x --sync-bn --workers 8 --seed 1"
    assert redact_command(command) == "mbib train r.yaml --lr 0.1 --sync-bn --seed 1"
    command = "mbib train r.yaml --stage2.workers 4 --stage2.lr 0.1 --plugin /home/me/mine.py"
    assert redact_command(command) == "mbib train r.yaml --stage2.lr 0.1 --plugin mine.py"
    # A flag takes one value at most: what comes after it stays.
    assert redact_command("mbib sweep --device cuda:1 methods --seeds 0 1") == "mbib sweep methods --seeds 0 1"
    assert redact_command("mbib train --dataset-download --no-pin-mem digits/a --lr 1") == "mbib train digits/a --lr 1"
    assert redact_command("mbib train r --model-kwargs file=/home/me/w.pt") == "mbib train r --model-kwargs file=w.pt"
    teachers = """mbib train r --method.teacher '["/home/jo hn/runs/b", a]'"""
    assert redact_command(teachers) == "mbib train r --method.teacher '[b, a]'"
    assert redact_value({"/a/run": 1, "/b/run": 2, "c": 3}) == {"run": 1, "run-2": 2, "c": 3}
    assert redact_command("mbib train it's.yaml") == shlex.join(["mbib", "train", "it's.yaml"])
    assert redact_command("mbib train /home/me/r.yaml --seed 1") == "mbib train r.yaml --seed 1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/data has no train folder", "data has no train folder"),
        (
            "no such file: '/home/me/a/b.yaml'; did you mean /srv/x/c.yaml?",
            "no such file: 'b.yaml'; did you mean c.yaml?",
        ),
        (
            "images/s and/or data/cifar100 at https://example.org/a/b",
            "images/s and/or data/cifar100 at https://example.org/a/b",
        ),
    ],
)
def test_messages_keep_the_last_part_of_a_path(text, expected):
    assert redact_text(text) == expected


def test_of_a_folder_that_training_started_from_the_name_is_left(finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    for file, quote in (("recipe.yaml", ""), ("metrics.json", '"')):
        before = (run / file).read_text()
        after = before.replace(f"{quote}mbib_resnet20{quote}", f"{quote}local-dir:/home/me/start{quote}")
        (run / file).write_text(after)
    assert "local-dir:/home" in (run / "recipe.yaml").read_text()
    published = b"".join(make_release(run, REPOSITORY).files.values())
    assert b"local-dir:start" in published
    assert b"/home/me" not in published


def test_git_names_contents_as_git_does(tmp_path):
    (tmp_path / "file").write_bytes(b"content\n")
    done = subprocess.run(["git", "hash-object", str(tmp_path / "file")], capture_output=True, text=True)
    assert git_oid(b"content\n") == done.stdout.strip()


def seeded(run, folder, seed, top1):
    """Write a run of another seed, as far as cards need one."""
    folder.mkdir()
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "seed": seed}))
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["seed"] = seed
    metrics["result"]["heads"]["prediction"]["top1"] = top1
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_the_card_says_of_which_time_it_speaks(finished_run):
    run, alone = read_run(finished_run), "(epochs and their evaluations only)"
    known = replace(run.record, training_seconds=1.2, other_seconds=48.9)
    card = render_card(replace(run, record=known), REPOSITORY)
    assert "Training took 50 seconds (preparation and evaluations included) on " in card
    older = replace(known, other_seconds=None)
    assert f"Training took 1 second {alone} on " in render_card(replace(run, record=older), REPOSITORY)
    assert time_text([known, replace(known, other_seconds=148.9)]) == "1.7 minutes"
    assert time_text([known, older]) == f"1 second {alone}"


def test_the_card_gives_the_spread_between_seeds(finished_run, tmp_path):
    own = json.loads((finished_run / "metrics.json").read_text())["result"]["heads"]["prediction"]["top1"]
    others = [seeded(finished_run, tmp_path / "one", 1, own + 1), seeded(finished_run, tmp_path / "two", 2, own + 2)]
    run, *_ = runs = read_seeds(finished_run, others)
    card = render_card(run, REPOSITORY, runs)
    assert f"| {own + 1:.2f} ± 1.00 |" in card
    result = replace(run.record.result, heads={"prediction": replace(run.record.result.prediction, top1=own - 7)})
    record = replace(run.record, result=result, rounded_from=own)
    rounded = render_card(replace(run, record=record), REPOSITORY, runs)
    assert f"| prediction | {own - 7:.2f} |" in rounded
    assert f"| {own + 1:.2f} ± 1.00 |" in rounded, "the spread is of the runs as they were trained"
    assert "(seeds 0, 1, 2), before rounding:" in rounded
    assert "n = 3 runs (seeds 0, 1, 2)" in card
    assert "One run" not in card
    alone = render_card(read_run(finished_run), REPOSITORY)
    assert "This is one run" in alone
    with pytest.raises(MbibError, match="same seed"):
        read_seeds(finished_run, [finished_run])
    other = tmp_path / "one" / "recipe.yaml"
    other.write_text(other.read_text().replace("lr: 0.05", "lr: 0.06"))
    with pytest.raises(MbibError, match="more than the seed differs"):
        read_seeds(finished_run, others)


@pytest.mark.slow
def test_the_card_of_a_method_that_trains_nothing(post_hoc_run):
    """Of its own numbers, what it chose, and both stages."""
    metrics = json.loads((post_hoc_run / "metrics.json").read_text())
    release = make_release(post_hoc_run, "me/decoupled")
    card = release.files["README.md"].decode()
    assert "trained from scratch on `digits` for 3 epochs with CE, then tau-norm, by `mbib_timm`." in card
    assert "of the split `test`, after CE, then tau-norm.\n" in card
    assert f"Chosen by tau-norm: tau {metrics['chosen']['tau']:g}, on {metrics['chosen_on']}." in card
    assert "1. CE: 3 epochs of batches of 32" in card
    assert "2. tau-norm, without training\n" in card
    assert card.count("Kang et al., Decoupling Representation and Classifier") == 2, "the method, and the citation"
    assert "best of the evaluated epochs" not in card
    assert "training_curves.png" not in card
    assert "lan2025mbib" not in card
    assert "figures/training_curves.png" not in release.files


@pytest.mark.slow
def test_a_stage_that_started_from_a_run_says_so_without_its_folder(post_hoc_run, tmp_path):
    recipe = yaml.safe_load((post_hoc_run / "recipe.yaml").read_text())
    shutil.copytree(post_hoc_run, tmp_path / "run")
    keys = {key: value for key, value in recipe.items() if key != "stages"} | recipe["stages"][1]
    keys["initial_checkpoint"] = str(post_hoc_run / "stage1-ce")
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(keys))
    release = make_release(tmp_path / "run", "me/decoupled")
    assert yaml.safe_load(release.files["recipe.yaml"])["initial_checkpoint"] == "stage1-ce"
    (tmp_path / "public.yaml").write_bytes(release.files["recipe.yaml"])
    assert load_recipe(tmp_path / "public.yaml").method["name"] == "tau_norm"
    assert str(post_hoc_run.parent).encode() not in b"".join(release.files.values())


def test_the_card_says_what_the_metrics_say(finished_run):
    metrics = json.loads((finished_run / "metrics.json").read_text())
    card = render_card(read_run(finished_run), REPOSITORY)
    _, metadata, body = card.split("---\n", 2)
    content = yaml.safe_load(metadata)
    (result,) = content["model-index"][0]["results"]
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    prediction = metrics["result"]["heads"]["prediction"]
    assert values["Top-1 accuracy, %"] == round(prediction["top1"], 2)
    assert values["Top-1 accuracy on few-shot classes, %"] == round(prediction["few"], 2)
    assert values["Macro F1, %"] == round(prediction["macro_f1"], 2)
    interval = " | ".join("{:.1f}-{:.1f}".format(*prediction["intervals"][metric]) for metric in ("top1", "macro"))
    assert f"| 95 % interval | {interval} |" in body
    assert "| evaluated images | 340 | 340 | 340 | 68 | 136 | 136 |" in body
    assert content["library_name"] == "timm"
    for head, numbers in metrics["result"]["heads"].items():
        columns = ("top1", "macro", "macro_f1", "many", "medium", "few")
        row = " | ".join(f"{numbers[metric]:.2f}" for metric in columns)
        assert row in body, head
    assert "import mbib_timm" in body
    assert f"hf-hub:{REPOSITORY}" in body
    assert "467 training images in 10 classes" in body
    assert "for 3 epochs with MBIB, by `mbib_timm`. The method is from [Mixture of Balanced" in body
    assert "The prediction is the mean of the logits of v3 and z." in body


PUBLISHED = Path(__file__).parents[1] / "results" / "mbib_resnet32.cifar100_lt_if100-200e-seed0"


def claimed(folder, recipe=None, record=None):
    """A run under a packaged recipe's name, with other keys in its recipe or its record."""
    folder.mkdir()
    keys, numbers = yaml.safe_load((PUBLISHED / "recipe.yaml").read_text()), (PUBLISHED / "metrics.json").read_text()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**keys, **(recipe or {})}))
    (folder / "metrics.json").write_text(json.dumps({**json.loads(numbers), **(record or {})}))
    return read_run(folder)


OWN_COUNTS = [520, *[100] * 98, 5]


@pytest.mark.parametrize(
    ("recipe", "record", "said"),
    [
        (dict(lr=0.2), {}, "lr"),
        (dict(epochs=20, warmup_epochs=2), {}, "epochs"),
        (dict(model="mbib_resnet20"), {}, "model"),
        (dict(dataset="torch/cifar10"), {}, "dataset"),
        (dict(imbalance_factor=50.0), {}, "imbalance_factor"),
        (dict(val_split="validation"), {}, "val_split"),
        (dict(method={"name": "mbib", "beta": 1.0}), {}, "method.beta"),
        ({}, dict(class_counts=OWN_COUNTS), "classes"),
        ({}, dict(class_names=[f"species {i}" for i in range(100)]), "classes"),
    ],
    ids=str,
)
def test_a_run_is_the_zoos_only_if_all_it_computed_is_the_packaged_recipes(tmp_path, recipe, record, said, capsys):
    own = claimed(tmp_path / "own", recipe, record)
    assert own.zoo_model is None
    assert said in own.differing
    assert main(["publish", str(tmp_path / "own"), "--dry-run"]) == 2
    assert "is not in the zoo (it differs from it in" in capsys.readouterr().err
    card = render_card(own, "me/own")
    assert "The paper reports" not in card
    assert "apache" not in card.lower()
    assert f"It differs from the packaged recipe in `{said}`" in card or "more" in card
    other_data = said in ("dataset", "imbalance_factor", "val_split", "classes")
    assert ("CIFAR-100-LT" in card) == (not other_data)
    assert (own.paper == ()) == (other_data or said == "model")
    (group,) = group_runs([own])
    page = render_page("runs", "", [run_section(group)])
    assert ("Beside the paper" in page) == (own.paper != ())


def test_a_run_of_the_packaged_recipe_is_the_zoos(tmp_path):
    """Also with other seeds, and whatever leaves the result as it is."""
    for number, keys in enumerate((dict(), dict(seed=3), dict(torchcompile=False, loader="timm"))):
        own = claimed(tmp_path / str(number), keys, dict(seed=keys.get("seed", 0)))
        assert own.zoo_model.name == "mbib_resnet32.cifar100_lt_if100"
        card = render_card(own, own.zoo_model.repository)
        assert "The paper reports 47.5 %" in card
        assert "not the published model" not in card
        other = "has as many images of each class as one from `torch/cifar100`, but other images"
        assert other in card
    torchvisions = claimed(tmp_path / "torchvision", dict(dataset="torch/cifar100"))
    assert other not in render_card(torchvisions, torchvisions.zoo_model.repository)


def test_other_data_under_the_name_of_a_recipe_are_called_what_they_are(finished_run, tmp_path):
    run = tmp_path / finished_run.name
    shutil.copytree(finished_run, run)
    assert "trained from scratch on `digits` for 3 epochs" in render_card(read_run(run), REPOSITORY)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "dataset": "folder"}))
    card = render_card(read_run(run), REPOSITORY)
    assert "trained from scratch on custom images for 3 epochs" in card
    assert "name: custom images\n      type: folder\n" in card
    stated = render_card(read_run(run), REPOSITORY, stated=Stated("Scans of 1998"))
    assert "trained from scratch on Scans of 1998 for 3 epochs" in stated


def test_images_of_ones_own_are_not_called_what_a_recipe_for_them_is(finished_run):
    """The recipe is finetune/mbib_resnet32, and the data are no data set called finetune."""
    run = read_run(finished_run)
    model, recipe = "mbib_resnet32", run.recipe.replace(model="mbib_resnet32", dataset="folder", data_dir="photos")

    def named(name):
        return replace(run, recipe=recipe, record=replace(run.record, name=name, model=model, dataset="folder"))

    card = render_card(named("mbib_resnet32.finetune"), REPOSITORY)
    assert "trained from scratch on custom images for" in card
    assert "\ncustom images: 467 training images" in card
    assert "name: custom images\n      type: folder\n" in card
    assert "on `birds` for" in render_card(named("mbib_resnet32.birds"), REPOSITORY), "a recipe of one's own says it"


def test_a_commit_that_is_not_known_is_not_mentioned(finished_run):
    run = read_run(finished_run)
    for commit in (None, "0123456789ab"):
        environment = replace(run.record.environment, commit=commit)
        card = render_card(replace(run, record=replace(run.record, environment=environment)), REPOSITORY)
        assert (", at commit 0123456789ab:\n\n```sh\n" in card) == (commit is not None)
        assert ("at commit" in card) == (commit is not None)


def test_a_recipe_whose_name_is_no_models_names_neither_model_nor_data(finished_run):
    run = read_run(finished_run)
    for name in ("anything.mytag", "own.folder", f"anything.{run.name.partition('.')[2]}"):
        card = render_card(replace(run, record=replace(run.record, name=name)), REPOSITORY)
        assert f"\n`{run.record.model}` trained from scratch on `digits` for 3 epochs" in card
        assert "name: digits\n" in card
    placed = replace(run.record, name="mbib_resnet20.mytag", model="hf-hub:me/it")
    card = render_card(replace(run, record=placed), REPOSITORY)
    assert "\n`mbib_resnet20` trained from scratch on `mytag` for 3 epochs" in card, "as it is called where it lies"


CANARY = "canary"
PATHS = (
    f"/home/{CANARY}/w.csv",
    f"/home/{CANARY}/my files (old)/w.csv",
    f"~/{CANARY}/w.csv",
    f"~{CANARY}/x/w.csv",
    f"../../{CANARY}/w.csv",
    f"C:\\Users\\{CANARY}\\w.csv",
    f"C:/Users/{CANARY}/w.csv",
    f"\\\\server\\{CANARY}\\w.csv",
    f"file:///home/{CANARY}/w.csv",
    f"local-dir:/home/{CANARY}/my run/w.csv",
    f"local-dir:../{CANARY}/w.csv",
)
# Values that hold a path, by the key's type; a regular expression and a slice, too.
HOLDERS = {
    str: (*PATHS, f"pattern:/home/{CANARY}/(\\d+)", f"train of /home/{CANARY}/w.csv[:80%]"),
    list: tuple([path] for path in PATHS),
    dict: (*({"file": path, "nested": {"a": [path]}} for path in PATHS), {"taps": [f"x:/home/{CANARY}/w.csv"]}),
}
# Keys that take any text, of all that there are.
FREE = {
    "model", "model_kwargs", "opt_kwargs", "initial_checkpoint", "class_weights", "train_split", "val_split",
    "test_split", "path_column", "label_column", "split_column", "group_column", "train", "reset", "data_dir", "output",
    "experiment", "resume", "table", "train_list", "val_list", "test_list", "class_map", "image_cache",
}  # fmt: skip


def test_no_path_of_the_machine_is_published_whichever_key_holds_it(finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    recipe = load_recipe(run / "recipe.yaml")
    held, published, kept = set(), [], read_run(run)
    for key, item in KEYS.items():
        kind = type(item.default_factory()) if callable(item.default_factory) else str
        own_recipe = recipe
        if key in TABLE_KEYS:
            own_recipe = recipe.replace(dataset="table", table="t.csv", group_by="column")
        if key in ("train_list", "val_list", "test_list", "class_map"):
            own_recipe = recipe.replace(dataset="list", train_list="t.txt", val_list="v.txt")
        turn = zlib.crc32(key.encode()) % len(HOLDERS[kind])  # the same, whatever other keys there are
        for value in (*HOLDERS[kind][turn:], *HOLDERS[kind][:turn]):
            given = {"name": "dive", "teacher": value} if key == "method" else value
            try:
                changed = own_recipe.replace(**{key: given})
            except (MbibError, ImportError, OSError):
                continue
            published.append(redact_recipe(changed))
            if key in held:  # cards and titles, which take longer, of one value of each key
                continue
            held.add(key)
            own = replace(kept, recipe=changed)
            published.append(render_card(own, REPOSITORY).encode())
            group, _ = group_runs([own, replace(own, recipe=recipe.replace(seed=5, epochs=7))])
            published.append(json.dumps([group.title, {k: str(v) for k, v in group.settings.items()}]).encode())
    assert held >= FREE, FREE - held
    for content in published:
        assert not [line for line in content.decode().splitlines() if CANARY in line]


def test_no_path_of_the_machine_is_in_any_published_file(finished_run, tmp_path):
    """In every text of the record, of config.json and of the command."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    path = f"/home/{CANARY}/my files/w.csv"
    record = json.loads((run / "metrics.json").read_text())
    for key in ("name", "model", "dataset", "loader", "chosen_on", "held_out", "precision"):
        record[key] = path
    record["replaced_images"] = record["left_out_images"] = [path]
    record["result"]["split"] = record["best"]["split"] = record["result"]["weights"] = path
    record["environment"]["command"] = shlex.join(
        ["mbib", "train", path, "--model", f"local-dir:{path}", f"--initial-checkpoint={path}", "--data-dir", path,
         "--model-kwargs", f"file={path}", f"--train-split={path}", "--method.teacher", path, f"local-dir:{path}",
         "--plugin", path, f"--test-split=../../{CANARY}/x"]
    )  # fmt: skip
    (run / "metrics.json").write_text(json.dumps(record))
    config = json.loads((run / "config.json").read_text())
    config["pretrained_cfg"] |= {"description": path, "url": path, "notes": [path], "origin_url": f"file://{path}"}
    (run / "config.json").write_text(json.dumps(config))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    changed = {"model": f"local-dir:{path}", "pretrained": True, "train_split": path, "model_kwargs": {"file": path}}
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **changed}))
    for name, content in make_release(run, REPOSITORY).files.items():
        assert CANARY.encode() not in content, name
    (group,) = group_runs([read_run(run)])
    assert CANARY not in render_page("runs", "", [run_section(group)])


def test_the_home_of_who_ran_it_is_no_part_of_a_message(monkeypatch):
    monkeypatch.setenv("HOME", "/home/jo hn")
    text = "held out by the split file /home/jo hn/data/split.csv"
    assert redact_text(text) == "held out by the split file split.csv"
