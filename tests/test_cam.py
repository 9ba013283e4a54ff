"""Grad-CAM: against gradients by hand; on convolutional networks, stages and transformers; what has no map."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from mbib_timm.errors import MbibError

pytest.importorskip("pytorch_grad_cam", reason="the extra of Grad-CAM is not installed")

from mbib_timm.inference.cam import GradCam, overlay


def scaled(maps, size):
    """Maps (B, h, w) as those of a picture: each from 0 to 1."""
    maps = F.interpolate(maps[:, None], size, mode="bilinear")[:, 0]
    lowest, highest = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return ((maps - lowest) / (highest - lowest + 1e-7)).numpy()


def by_hand(maps, logits, labels):
    """Equations 1 and 2 of Selvaraju et al.: the mean gradient weighs a channel, and the positive sum is kept."""
    gradients = torch.autograd.grad(sum(row[label] for row, label in zip(logits, labels, strict=True)), maps)[0]
    return (gradients.mean((2, 3), keepdim=True) * maps).sum(1).relu().detach()


@pytest.mark.parametrize(
    ("name", "size"),
    [("cifar_resnet20", 32), ("mbib_resnet20", 32), ("mbib_experts_resnet32", 32), ("resnet10t", 64)],
)
def test_it_is_the_equations_on_the_last_map(name, size):
    torch.manual_seed(0)
    module = timm.create_model(name, num_classes=5).eval()
    images, labels = torch.randn(2, 3, size, size), [1, 3]
    maps = module.forward_features(images)
    expected = scaled(by_hand(maps, module.forward_head(maps), labels), (size, size))
    found = GradCam(module, (3, size, size)).heat(images, labels)
    assert found.shape == (2, size, size)
    np.testing.assert_allclose(found, expected, atol=0.02)  # another library's interpolation
    assert not np.allclose(found, GradCam(module, (3, size, size)).heat(images, [0, 0]), atol=0.02)


def test_a_transformer_that_reads_its_class_token_is_seen_at_its_last_block():
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=(64, 96)).eval()
    images, labels = torch.randn(2, 3, 64, 96), [1, 3]
    tokens = module.forward_features(images)
    assert torch.autograd.grad(module.forward_head(tokens)[0, 1], tokens)[0][:, 1:].abs().sum() == 0
    kept = []
    hook = module.blocks[-1].norm1.register_forward_hook(lambda *arguments: kept.append(arguments[2]))
    logits = module(images)
    hook.remove()
    gradients = torch.autograd.grad(logits[0, 1] + logits[1, 3], kept[0])[0]
    weighted = (gradients[:, 1:].mean(1, keepdim=True) * kept[0][:, 1:]).sum(2).relu().detach()
    found = GradCam(module, (3, 64, 96)).heat(images, labels)
    np.testing.assert_allclose(found, scaled(weighted.view(2, 4, 6), (64, 96)), atol=0.02)


@pytest.mark.parametrize(
    ("name", "size", "arguments"),
    [
        ("vit_tiny_patch16_224", 64, {"img_size": 64, "global_pool": "avg", "class_token": False}),
        ("swin_tiny_patch4_window7_224", 64, {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 24}),
        ("convnext_atto", 64, {}),
        ("with_classifier", 64, {"backbone": "vit_tiny_patch16_224", "img_size": 64}),
    ],
)
def test_networks_of_other_kinds(name, size, arguments):
    torch.manual_seed(0)
    module = timm.create_model(name, num_classes=5, **arguments).eval()
    heat = GradCam(module, (3, size, size)).heat(torch.randn(2, 3, size, size), [0, 4])
    assert heat.shape == (2, size, size)
    assert heat.min() >= 0
    assert heat.max() == pytest.approx(1, abs=1e-3)


def test_what_has_no_map_says_so():
    with pytest.raises(MbibError, match="Sequential has no forward_features"):
        GradCam(torch.nn.Sequential(torch.nn.Linear(2, 2)), (3, 8, 8))
    with pytest.raises(MbibError, match="is a single point for images of 32x32"):
        GradCam(timm.create_model("resnet10t", num_classes=5).eval(), (3, 32, 32))
    with pytest.raises(MbibError, match=r"Cait cannot be shown; convolutional networks, .* can be shown"):
        GradCam(timm.create_model("cait_xxs24_224", num_classes=5, depth=1).eval(), (3, 224, 224))


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pytorch_grad_cam", None)
    with pytest.raises(MbibError, match=r"pip install 'mbib-timm\[cam\]'"):
        GradCam(timm.create_model("cifar_resnet20"), (3, 32, 32))


@pytest.mark.parametrize("channels", [1, 3])
def test_an_overlay_is_warm_where_the_heat_is(channels):
    heat = np.zeros((40, 60), dtype=np.float32)
    heat[:, 50:] = 1
    shown = np.asarray(overlay(torch.full((channels, 40, 60), 128, dtype=torch.uint8), heat)).astype(int)
    assert shown.shape == (240, 360, 3)
    assert shown[120, 350, 0] > shown[120, 350, 2]  # red
    assert shown[120, 10, 2] > shown[120, 10, 0]  # blue
