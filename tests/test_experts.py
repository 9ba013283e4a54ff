"""Networks of experts: sizes against METHODS 4, and equality with networks of one expert each."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import nn

from mbib_timm.cli import main
from mbib_timm.errors import CheckpointError, MbibError
from mbib_timm.inference.export import for_inference, largest_difference
from mbib_timm.models import count_macs, count_parameters
from mbib_timm.models.head_outputs import head_logits, head_titles, logits_and_features, reported_heads
from mbib_timm.models.heads import Bottleneck, Observation
from mbib_timm.results.run_figures import drawn_heads

SHALLOW = ("v1", "v2")


def create(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 7, **kwargs})


def statistics_of_images(model, x):
    """Give every BatchNorm layer statistics of its own, so that none is the identity, then evaluate."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    return model.eval()


def images(name, batch=8):
    size = 32 if name[-2:] in ("20", "32") else 64
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


# Sizes.


# METHODS 4, the table of parameters and of MACs (in units of 1e5) of convolutions and classifiers.
@pytest.mark.parametrize(
    ("reduced", "experts", "parameters", "macs"),
    [
        (True, 2, 530_512, 749),
        (True, 3, 783_856, 1004),
        (True, 4, 1_037_200, 1258),
        (True, 6, 1_543_888, 1767),
        (False, 1, 469_904, 689),
        (False, 2, 915_984, 1137),
        (False, 3, 1_362_064, 1585),
        (False, 4, 1_808_144, 2034),
        (False, 6, 2_700_304, 2930),
    ],
)
def test_parameters_and_macs(reduced, experts, parameters, macs):
    model = timm.create_model("experts_resnet32", num_classes=100, device="meta", experts=experts, reduced=reduced)
    assert count_parameters(model) == parameters
    counted = count_macs(model.eval(), (3, 32, 32))
    assert round((counted["conv"] + counted["linear"]) / 1e5) == macs


def test_parameters_with_mbib_heads():
    model = timm.create_model("mbib_experts_resnet32", num_classes=100, device="meta")
    assert count_parameters(model) == 819_328
    counted = count_macs(model.eval(), (3, 32, 32))
    assert round((counted["conv"] + counted["linear"]) / 1e5) == 1004
    model.remove_training_heads()
    assert count_parameters(model) == 806_488
    cosine = timm.create_model("mbib_experts_resnet32", num_classes=100, device="meta", classifier="cosine")
    assert count_parameters(cosine) == 818_128


def test_macs_of_table_6():
    """40.69 G at 640x640 with normalisation, activation and pooling, as the paper counts SADE's (METHODS 0.6)."""
    model = timm.create_model("experts_resnet32", num_classes=100, device="meta").eval()
    assert count_macs(model, (3, 640, 640))["total"] == pytest.approx(40.69e9, rel=5e-4)


@pytest.mark.parametrize(("name", "expansion"), [("experts_resnet10", 1), ("experts_resnet50", 4)])
@pytest.mark.parametrize("reduced", [True, False])
def test_widths_of_imagenet_networks(name, expansion, reduced):
    model = timm.create_model(name, device="meta", reduced=reduced)
    own = (192, 384) if reduced else (256, 512)
    widths = [64, *(expansion * width for width in (64, 128, 3 * own[0], 3 * own[1]))]
    assert [level["num_chs"] for level in model.feature_info] == widths
    assert model.num_features == model.head_hidden_size == widths[-1]


# Every expert is a network of its own behind the trunk.


def single(name, model, expert):
    """A plain network with the weights of the trunk and of one expert."""
    backbone = {"resnet20": "cifar_resnet20", "resnet10": "classic_resnet10"}[name.rpartition("_")[2]]
    plain = timm.create_model(backbone, num_classes=0, **model.backbone_args)
    state = {}
    for key, value in model.backbone.state_dict().items():
        before, of_expert, after = key.partition(".0.experts.")
        number, _, rest = after.partition(".")
        if not of_expert:
            state[key] = value
        elif int(number) == expert:
            state[f"{before}.{rest}"] = value
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("name", ["experts_resnet20", "experts_resnet10"])
def test_a_network_of_experts_is_as_many_networks_on_one_trunk(name):
    experts = 2
    model, x = create(name, experts=experts), images(name, 4)
    statistics_of_images(model, x)
    logits = model.forward_heads(x)
    assert len(logits) == experts
    for expert in range(experts):
        plain = single(name, model, expert).eval()
        pooled = plain.forward_features(x).mean(dim=(2, 3))
        weight = model.heads[expert].classifier.weight
        cosine = torch.stack([F.cosine_similarity(pooled, row[None]) for row in weight], dim=1)
        torch.testing.assert_close(logits[expert], 30 * cosine, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x), torch.stack(logits).mean(dim=0))
    assert not torch.allclose(logits[0], logits[1])


def test_gradients_are_those_of_the_single_networks():
    """The trunk's are the sum over the experts, in training mode, where BatchNorm sees the batch."""
    name = "experts_resnet20"
    model, x = create(name), images(name, 4)
    sum(output.square().sum() for output in model(x)).backward()
    of_trunk = torch.zeros_like(model.backbone.conv1.weight)
    for expert in range(3):
        plain = single(name, model, expert)
        head = model.heads[expert]
        head.zero_grad()
        head(plain(x)).square().sum().backward()
        of_trunk += plain.conv1.weight.grad
        ours = dict(model.backbone.layer3[0].experts[expert].named_parameters())
        for key, parameter in plain.layer3.named_parameters():
            torch.testing.assert_close(ours[key].grad, parameter.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.backbone.conv1.weight.grad, of_trunk, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["mbib_experts_resnet20", "mbib_experts_resnet10"])
def test_mbib_heads_of_every_expert_by_hand(name):
    model, x = create(name), images(name)
    statistics_of_images(model, x)
    heads = dict(zip(model.head_names, model.forward_heads(x), strict=True))
    expected = {}
    for expert in range(3):
        plain = single(name, model, expert).eval()
        maps = plain.forward_intermediates(x, intermediates_only=True)
        ends = (3, 6, 9) if name.endswith("20") else (2, 3, 4)
        v1, v2, v3 = (maps[level].mean(dim=(2, 3)) for level in ends)
        for name_of_v, v in (("v1", v1), ("v2", v2)):
            head = model.training_heads[f"expert{expert + 1}_{name_of_v}"]
            expected[f"expert{expert + 1}_{name_of_v}"] = head.classifier(head.norm(v))
        head = model.heads[expert]
        normalised = head.norm(v3)
        z = head.bottleneck.norm(head.bottleneck.fc(normalised)).clamp(min=0)
        expected[f"expert{expert + 1}_v3"] = head.classifier(normalised)
        expected[f"expert{expert + 1}_z"] = head.bottleneck.classifier(z)
    assert list(heads) == list(expected)
    for head, logits in expected.items():
        torch.testing.assert_close(heads[head], logits, rtol=1e-4, atol=1e-4)
    six = [heads[head] for head in model.prediction_heads]
    assert len(six) == 6
    torch.testing.assert_close(model(x), torch.stack(six).mean(dim=0))


def test_experts_share_the_trunk_and_nothing_else():
    model = create("mbib_experts_resnet20")
    assert model.expert_heads == {
        f"expert{i}": tuple(f"expert{i}_{v}" for v in ("v1", "v2", "v3", "z")) for i in (1, 2, 3)
    }
    norms = [m for m in (*model.training_heads.modules(), *model.heads.modules()) if isinstance(m, nn.BatchNorm1d)]
    assert len({id(norm) for norm in norms}) == 3 * 4
    assert sum(isinstance(m, Observation) for m in model.modules()) == 3 * 3
    assert sum(isinstance(m, Bottleneck) for m in model.modules()) == 3
    outputs = dict(zip(model.head_names, model(images("resnet20")), strict=True))
    outputs["expert2_z"].sum().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert not any(".experts.0." in name or ".experts.2." in name for name in touched)
    assert any(".experts.1." in name for name in touched)
    assert any(name.startswith("backbone.layer1.") for name in touched)


def test_initialisation_is_that_of_one_expert():
    """Kaiming-normal by an expert's own fan in; experts start apart."""
    model = create("experts_resnet32")
    stage = model.backbone.layer3[0]
    weights = [expert[2].conv1.weight for expert in stage.experts]
    for weight in weights:
        assert weight.shape == (48, 48, 3, 3)
        assert weight.std().item() == pytest.approx((2 / (48 * 9)) ** 0.5, rel=0.03)
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


# Heads that serve training only.


def test_without_training_heads_the_prediction_is_bit_equal():
    model, x = create("mbib_experts_resnet20"), images("resnet20")
    statistics_of_images(model, x)
    before = model(x)
    for parameter in model.training_heads.parameters():
        parameter.data.fill_(float("nan"))
    assert torch.equal(model(x), before)
    bare = create("mbib_experts_resnet20", training_heads=False).eval()
    missing = bare.load_state_dict(model.state_dict(), strict=False)
    assert missing.missing_keys == []
    assert all(key.startswith("training_heads.") for key in missing.unexpected_keys)
    model.remove_training_heads()
    for one in (model, bare):
        assert torch.equal(one(x), before)
        assert one.head_names == one.prediction_heads == tuple(f"expert{i}_{v}" for i in (1, 2, 3) for v in ("v3", "z"))
        assert all(f"{name}.weight" in one.state_dict() for name in one.pretrained_cfg["classifier"])
        assert len(one.pretrained_cfg["classifier"]) == 6
        assert len(one.train()(x)) == 6


def test_mean_in_training_serves_loops_that_expect_a_tensor():
    for name, heads in (("experts_resnet20", 3), ("mbib_experts_resnet20", 12)):
        model = create(name, training_logits="mean")
        assert model(images("resnet20")).shape == (8, 7)
        model.set_training_logits("all")
        assert len(model(images("resnet20"))) == heads
        with pytest.raises(MbibError, match="unknown training_logits"):
            model.set_training_logits("sum")


# What is reported.


def test_evaluation_reports_every_expert():
    x = images("resnet20")
    model = create("experts_resnet20").eval()
    assert reported_heads(model) == ("expert1", "expert2", "expert3")
    assert head_titles(model) == {"expert1": "Expert 1", "expert2": "Expert 2", "expert3": "Expert 3"}
    logits = head_logits(model, x)
    torch.testing.assert_close(logits["prediction"], model(x))
    torch.testing.assert_close(logits["expert2"], model.forward_heads(x)[1])

    model = create("mbib_experts_resnet20").eval()
    logits = head_logits(model, x)
    assert tuple(logits) == ("prediction", *model.head_names, "expert1", "expert2", "expert3")
    torch.testing.assert_close(logits["prediction"], model(x))
    torch.testing.assert_close(logits["expert3"], (logits["expert3_v3"] + logits["expert3_z"]) / 2)
    assert head_titles(model)["expert3"] == "Expert 3"
    assert head_titles(model)["expert3_z"] == "Head expert3_z"


@pytest.mark.parametrize("name", ["experts_resnet20", "mbib_experts_resnet20"])
@pytest.mark.parametrize("training_heads", [True, False])
@torch.no_grad()
def test_features_are_those_of_every_expert_side_by_side(name, training_heads):
    x = images("resnet20")
    model = statistics_of_images(create(name), x)
    if not training_heads and hasattr(model, "remove_training_heads"):
        model.remove_training_heads()
    logits, features = logits_and_features(model, x)
    expected = head_logits(model, x)
    assert list(logits) == list(expected)
    assert all(torch.equal(logits[head], expected[head]) for head in expected)
    assert list(features) == ["v"]
    assert torch.equal(features["v"], model.forward_head(model.forward_features(x), pre_logits=True))


def test_a_figure_of_many_heads_shows_the_experts():
    model = create("mbib_experts_resnet20")
    assert drawn_heads(reported_heads(model)) == ["expert1", "expert2", "expert3"]
    for few in (["v1", "v2", "v3", "z"], ["expert1", "expert1_v3"]):
        assert drawn_heads(few) == few


def test_export_leaves_the_training_heads_out():
    model = for_inference(create("mbib_experts_resnet20"))
    assert not len(model.training_heads)
    traced = torch.jit.trace(model, torch.randn(2, 3, 32, 32))
    assert largest_difference(model, traced, (3, 32, 32)) < 1e-4


# Weights and refusals.


@pytest.mark.parametrize("name", ["experts", "mbib_experts"])
def test_full_width_takes_the_backbones_weights_into_every_expert(name):
    torch.manual_seed(3)
    weights = timm.create_model("resnet18").state_dict()
    overlay = dict(state_dict=weights, hf_hub_id=None, url=None)
    arguments = dict(backbone="resnet18.a1_in1k", pretrained=True, reduced=False, num_classes=7)
    model = timm.create_model(name, pretrained_cfg_overlay=overlay, **arguments)
    for stage in ("layer3", "layer4"):
        for expert in getattr(model.backbone, stage)[0].experts:
            assert torch.equal(expert[1].conv2.weight, weights[f"{stage}.1.conv2.weight"])
    assert torch.equal(model.backbone.layer2[0].conv1.weight, weights["layer2.0.conv1.weight"])
    assert model.pretrained_cfg["first_conv"] == "backbone.conv1"
    overlay["state_dict"] = {key.replace("layer4.", "layer5."): value for key, value in weights.items()}
    with pytest.raises(CheckpointError, match=r"missing keys: layer4.*unexpected keys: layer5"):
        timm.create_model(name, pretrained_cfg_overlay=overlay, **arguments)


def test_imagenet_networks_know_the_weights_of_their_backbones():
    for name in ("experts_resnet50", "mbib_experts_resnext50"):
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.tag == "backbone_a1_in1k"
        assert cfg.hf_hub_id.startswith("timm/")


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("experts_resnet50", {}), ("mbib_experts_resnext50", {}), ("experts", {"backbone": "resnet18"})],
)
def test_reduced_width_refuses_the_backbones_weights(name, kwargs):
    with pytest.raises(CheckpointError, match="do not fit experts of reduced width; pass reduced=False"):
        timm.create_model(name, pretrained=True, **kwargs)


def test_networks_without_weights_say_so():
    with pytest.raises(CheckpointError, match="experts_resnet20 has no weights of its own"):
        timm.create_model("experts_resnet20", pretrained=True)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"backbone": "convnext_atto"}, "backbone 'convnext_atto' has no stages .* such as cifar_resnet32"),
        ({"backbone": "resnet51"}, "unknown backbone 'resnet51': did you mean .*'resnet50'"),
        ({"backbone": "resnet18", "experts": 0}, "experts: expected a whole number of at least 1, got 0"),
        ({"backbone": "resnet18", "classifier": "cosin"}, "did you mean 'cosine'"),
        ({"backbone": "resnet18", "global_pool": "catavgmax"}, "global_pool"),
    ],
)
@pytest.mark.parametrize("name", ["experts", "mbib_experts"])
def test_impossible_networks_are_refused(name, kwargs, message):
    with pytest.raises(MbibError, match=message):
        timm.create_model(name, device="meta", **kwargs)


def test_features_of_a_cifar_network_are_its_stages():
    for name in ("experts_resnet20", "mbib_experts_resnet20"):
        features = timm.create_model(name, features_only=True)
        assert features.feature_info.channels() == [16, 72, 144]
        assert features.feature_info.reduction() == [1, 2, 4]


@pytest.mark.parametrize("name", ["experts_resnet20", "mbib_experts_resnet20"])
def test_a_published_network_predicts_by_every_head(tmp_path, capsys, name):
    from PIL import Image

    folder = tmp_path / "model"
    save_for_hf(create(name, experts=2), folder, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert loaded.num_experts == 2
    assert loaded.state_dict().keys() == load_file(folder / "model.safetensors").keys()
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    arguments = ["predict", str(folder), str(tmp_path / "image.png"), "--device", "cpu", "--workers", "0", "--head"]
    for head in ("prediction", *reported_heads(loaded)):
        assert main([*arguments, head]) == 0
    assert {"expert1", "expert2"} <= {*reported_heads(loaded)}
    assert main([*arguments, "expert3"]) == 2
    assert "did you mean 'expert" in capsys.readouterr().err
