"""Fine-tuning the packaged weights on a folder of one's own, as a user would: by the commands, on photographs."""

import json
import shutil
import tarfile
from pathlib import PurePosixPath

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny import previous_run

from mbib_timm.cli import main
from mbib_timm.errors import CheckpointError, MbibError
from mbib_timm.models.zoo import ZooModel
from mbib_timm.publishing.release import make_release
from mbib_timm.recipe import Recipe
from mbib_timm.training.setup import build_network

# Photographs of CIFAR-100's test set under coarser names: classes that the weights do not know, the last with three.
GROUPS = {
    "people": ("baby", "boy", "girl", "man", "woman"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
}
TRAINING_IMAGES = {"people": 120, "trees": 40, "fish": 10, "flowers": 3}
TEST_IMAGES = 100
PACKAGED = ZooModel("mbib_resnet32.cifar100_lt_if100")


@pytest.fixture(scope="module")
def my_images(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "my_images"
    with tarfile.open(shared / "data" / "cifar100" / "test.tar") as tar:
        images: dict[str, list[tarfile.TarInfo]] = {}
        for member in filter(tarfile.TarInfo.isfile, tar):
            images.setdefault(PurePosixPath(member.name).parent.name, []).append(member)
        for group, classes in GROUPS.items():
            mixed = [member for members in zip(*(images[name] for name in classes), strict=True) for member in members]
            parts = {"train": mixed[: TRAINING_IMAGES[group]], "val": mixed[-TEST_IMAGES:]}
            for part, members in parts.items():
                (folder / part / group).mkdir(parents=True)
                for i, member in enumerate(members):
                    (folder / part / group / f"{i}.png").write_bytes(tar.extractfile(member).read())
    return folder


def train(my_images, folder, *flags):
    arguments = ["--data-dir", str(my_images), "--output", str(folder), "--device", "cpu", "--workers", "0"]
    schedule = ["--epochs", "8", "--val-interval", "8"] if "--epochs" not in flags else ["--warmup-epochs", "0"]
    assert main(["train", "finetune/mbib_resnet32", *arguments, *schedule, *flags]) == 0
    return folder / "mbib_resnet32.finetune"


@pytest.fixture(scope="module")
def tuned(my_images, tmp_path_factory):
    return train(my_images, tmp_path_factory.mktemp("tuned"))


@pytest.mark.slow
def test_it_learns_what_it_could_not_from_scratch(my_images, tuned, tmp_path):
    scratch = train(my_images, tmp_path, "--no-pretrained")
    results = [json.loads((run / "metrics.json").read_text())["result"]["heads"] for run in (tuned, scratch)]
    ours, theirs = (heads["prediction"] for heads in results)
    assert ours["top1"] > theirs["top1"] + 10
    assert ours["few"] > theirs["few"] + 10


@pytest.mark.slow
def test_classes_and_counts_are_the_folders_and_are_saved_with_the_model(tuned, my_images):
    config = json.loads((tuned / "config.json").read_text())
    assert config["label_names"] == sorted(GROUPS)
    assert config["class_counts"] == [TRAINING_IMAGES[name] for name in sorted(GROUPS)]
    model = timm.create_model(f"local-dir:{tuned}", pretrained=True)
    assert model.num_classes == len(GROUPS)
    assert model.pretrained_cfg["label_names"] == sorted(GROUPS)


def test_it_starts_from_the_packaged_backbone_and_bottleneck(my_images, tmp_path):
    """At a learning rate of next to nothing all stays as it was, but the classifiers and the running statistics."""
    run = train(my_images, tmp_path, "--lr", "1e-12", "--epochs", "1")
    before, after = load_file(PACKAGED.weights), load_file(run / "model.safetensors")
    learnt = [key for key in before if ".classifier." not in key and "running_" not in key and "num_batches" not in key]
    assert len(learnt) > 100
    for key in learnt:
        torch.testing.assert_close(after[key], before[key].float(), rtol=0, atol=1e-8, msg=key)


@pytest.mark.slow
def test_predictions_have_the_classes_names(tuned, my_images, capsys):
    assert main(["predict", str(tuned), str(my_images / "val" / "people"), "--top-k", "1", "--format", "jsonl"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == TEST_IMAGES
    named = [line["classes"][0]["name"] for line in lines]
    accuracy = json.loads((tuned / "metrics.json").read_text())["result"]["heads"]["prediction"]["per_class"]
    assert 100 * named.count("people") / TEST_IMAGES == pytest.approx(accuracy[sorted(GROUPS).index("people")])


@pytest.mark.slow
@pytest.mark.parametrize("slim", [False, True], ids=["complete", "inference-only"])
def test_it_goes_on_from_a_model_of_ones_own(tuned, my_images, tmp_path, slim):
    """Of the same classes; what was published for inference gets new heads for training, and keeps the others."""
    start = tmp_path / "start"
    for path, content in make_release(tuned, "me/images", inference_only=slim).files.items():
        (start / path).parent.mkdir(parents=True, exist_ok=True)
        (start / path).write_bytes(content)
    run = train(my_images, tmp_path, "--model", f"local-dir:{start}", "--lr", "1e-12", "--epochs", "1")
    before, after = load_file(start / "model.safetensors"), load_file(run / "model.safetensors")
    assert any(key.startswith("training_heads.") for key in before) != slim
    assert any(key.startswith("training_heads.") for key in after)
    for key in (key for key in before if "running_" not in key and "num_batches" not in key):
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-8, msg=key)


@pytest.mark.parametrize(
    "start",
    [
        {"model": PACKAGED.name, "pretrained": True},
        {"model": f"local-dir:{PACKAGED.folder}", "pretrained": True},
        {"model": "mbib_resnet32", "initial_checkpoint": str(PACKAGED.folder / "model.safetensors")},
    ],
    ids=["packaged", "folder", "checkpoint"],
)
def test_classifiers_that_start_anew_may_be_of_another_kind(start):
    recipe = Recipe(method="mbib", reset="classifier", model_kwargs={"classifier": "cosine"}, **start)
    weights = build_network(recipe, 100).state_dict()
    packaged = load_file(PACKAGED.folder / "model.safetensors")
    anew = {key for key in packaged if "classifier" in key}
    assert weights.keys() == packaged.keys() - {key for key in anew if key.endswith("bias")}
    assert all(torch.equal(weights[key], packaged[key]) == (key not in anew) for key in weights)
    with pytest.raises(CheckpointError, match=r"classifier\.bias"):
        build_network(recipe.replace(reset="none"), 100)


def test_a_models_folder_is_named_as_in_other_commands(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    shutil.copytree(previous_run(5), tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(method="ce", model="runs/mine", pretrained=True)
    assert recipe == Recipe(method="ce", model="local-dir:runs/mine", pretrained=True)
    weights, kept = build_network(recipe, 5).state_dict(), load_file("runs/mine/model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in kept.items())
    with pytest.raises(MbibError, match=r"^there is no folder runs/gone; runs has mine$"):
        build_network(recipe.replace(model="runs/gone"), 5)
    with pytest.raises(MbibError, match=r"^unknown model 'runs'; the folder of that name is './runs'$"):
        build_network(recipe.replace(model="runs"), 5)


@pytest.mark.parametrize("reset", ["none", "classifier", "heads"])
def test_a_plain_backbone_of_another_image_size_starts_whatever_is_anew(tmp_path, reset):
    plain = timm.create_model("vit_tiny_patch16_224").state_dict()
    save_file(plain, tmp_path / "plain.safetensors")
    more = {"model_kwargs": {"backbone": "vit_tiny_patch16_224"}, "img_size": 96, "reset": reset}
    recipe = Recipe(method="mbib", model="mbib", initial_checkpoint=str(tmp_path / "plain.safetensors"), **more)
    weights = build_network(recipe, 7).state_dict()
    key = "blocks.0.attn.qkv.weight"
    assert torch.equal(weights[f"backbone.{key}"], plain[key])


@pytest.mark.slow
def test_where_it_starts_from_is_asked_of_the_model_alone(my_images, tuned, tmp_path, capsys):
    flags = ["--data-dir", str(my_images), "--output", str(tmp_path), "--device", "cpu"]
    both = ["--model", f"local-dir:{tuned}", "--initial-checkpoint", str(tuned)]
    assert main(["train", "finetune/mbib_resnet32", *flags, *both]) == 2
    assert "has weights of its own" in capsys.readouterr().err
    assert main(["train", "finetune/mbib_resnet32", *flags, "--model", f"local-dir:{tmp_path / 'nowhere'}"]) == 2
    assert "there is no folder" in capsys.readouterr().err
