"""What timm holds a registered model to, checked for every name that the package registers.

tools/timm_tests.py runs timm's own tests over the same names.
"""

import copy
import json
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import group_parameters, register_model, resolve_pretrained_cfg, save_for_hf
from torch import nn

from mbib_timm.cli import main
from mbib_timm.errors import CheckpointError, MbibError
from mbib_timm.models import CLASSIFIERS, count_macs, count_parameters, create_classifier, prefix_backbone
from mbib_timm.models.complexity import activation_bytes
from mbib_timm.models.heads import BOTTLENECKS

MODULES = ("mbib_variants", "plain_resnets", "with_classifier")
NAMES = [name for module in MODULES for name in timm.list_models(module=module)]
WRAPPED = timm.list_models(module="mbib_variants")
EXPERTS = [name for name in WRAPPED if name.removeprefix("mbib_").startswith("experts")]
DEPTHS = (20, 32, 44, 56, 10, 18, 34, 50, 101, 152)
VARIANTS = [f"resnet{depth}" for depth in DEPTHS] + ["resnext50", "resnext101", "efficientnet_lite0"]
# A full pass through the deepest ones says nothing that the shallow ones do not; ResNeXt-50 has ResNet-50's blocks, and
# of it there is one of each kind.
SMALL = [
    name
    for name in NAMES
    if not name.endswith(("101", "152", "44", "56", "34", "resnet50", "bib_resnext50")) or name == "mbib_resnext50"
]
SMALL.remove("experts_resnext50")
# Their heads see nothing but pooled features.
POOLED = [name for name in NAMES if name == "with_classifier" or (name in WRAPPED and name not in EXPERTS)]
# One of each kind.
KINDS = [
    "mbib_resnet20", "mbib_resnet10", "cifar_resnet20", "with_classifier", "experts_resnet20", "mbib_experts_resnet20"
]  # fmt: skip
MORE_KINDS = [*KINDS, "bib_resnet20", "classic_resnet10", "mbib_experts_resnet10"]


def create(name, **kwargs):
    """A model of seven classes; those that take any backbone get a small one."""
    torch.manual_seed(0)
    generic = ("mbib", "bib", "with_classifier", "experts", "mbib_experts")
    small = {"backbone": "resnet18"} if name in generic else {}
    return timm.create_model(name, **{"num_classes": 7, **small, **kwargs})


def images(name, batch=2):
    generator = torch.Generator().manual_seed(1)
    side = 32 if "cifar" in name or name[-2:] in ("20", "32") else 64
    return torch.randn(batch, 3, side, side, generator=generator)


def as_tuple(output):
    return output if isinstance(output, tuple) else (output,)


@pytest.fixture(scope="module", params=NAMES)
def described(request):
    """A name, and its model without numbers, which tests only read."""
    return request.param, timm.create_model(request.param, device="meta", dtype=torch.float64)


@pytest.fixture(scope="module", params=SMALL)
def small(request):
    """A name, and a model of seven classes. Tests of one model follow one another, so that it is initialised once and
    there is one at a time; they leave its layers as they are."""
    return request.param, create(request.param)


def test_every_variant_is_registered():
    expected = {f"{method}_{variant}" for method in ("mbib", "bib") for variant in VARIANTS}
    assert expected | {"mbib", "bib"} == set(WRAPPED) - set(EXPERTS)
    shapes = ["", "_resnet20", "_resnet32", "_resnet10", "_resnet50", "_resnext50"]
    assert {f"{method}{shape}" for method in ("experts", "mbib_experts") for shape in shapes} == set(EXPERTS)
    plain = {*(f"cifar_resnet{depth}" for depth in (20, 32, 44, 56)), "classic_resnet10", "with_classifier"}
    assert plain == set(NAMES) - set(WRAPPED)


@pytest.mark.slow
def test_evaluation_returns_one_tensor_and_training_returns_every_head(small):
    name, model = small
    x = images(name, 4)
    model.train()
    assert type(model(x)) is (tuple if name in WRAPPED else torch.Tensor)
    outputs = as_tuple(model(x))
    assert len(outputs) == len(getattr(model, "head_names", ("logits",)))
    assert all(output.shape == (4, 7) for output in outputs)
    sum(output.sum() for output in outputs).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    model.eval()
    assert model(x).shape == (4, 7)


@pytest.mark.parametrize("name", ["mbib_resnet20", "bib_resnet20", "mbib_resnet10"])
def test_prediction_is_the_mean_of_the_last_observation_and_the_bottleneck(name):
    model = create(name).eval()
    x = images(name)
    heads = model.forward_heads(x)
    assert type(heads) is tuple
    assert model.head_names[-2:] == model.prediction_heads
    assert model.bottleneck_head == model.head_names[-1] == "z"
    torch.testing.assert_close(model(x), (heads[-2] + heads[-1]) / 2)
    for parameter in model.training_heads.parameters():
        parameter.data.fill_(float("nan"))  # evaluation must not touch the training-only heads
    assert model(x).isfinite().all()


def test_config_and_state_dict_agree(described):
    _, model = described
    cfg, keys = model.pretrained_cfg, model.state_dict().keys()
    classifiers = (cfg["classifier"],) if isinstance(cfg["classifier"], str) else cfg["classifier"]
    assert all(f"{classifier}.weight" in keys for classifier in classifiers)
    assert len(classifiers) == len(as_tuple(model.get_classifier()))
    assert f"{cfg['first_conv']}.weight" in keys
    assert model.num_classes == cfg["num_classes"]
    assert model.in_chans == cfg["input_size"][0]
    assert model.num_features == model.head_hidden_size
    assert not any(part in ("module", "_orig_mod") for key in keys for part in key.split("."))


def test_meta_device_and_dtype(described):
    _, model = described
    tensors = [*model.parameters(), *model.buffers()]
    assert all(t.is_meta for t in tensors)
    assert {t.dtype for t in tensors} <= {torch.float64, torch.int64}


@pytest.mark.parametrize("name", MORE_KINDS)
def test_unknown_keyword_is_a_type_error(name):
    with pytest.raises(TypeError):
        timm.create_model(name, device="meta", not_an_argument=1)


@pytest.mark.slow
def test_reset_classifier(small):
    name, model = small
    model = copy.deepcopy(model).eval()
    x = images(name)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.requires_grad_(False).double()
    model.reset_classifier(4)
    assert not any(p.requires_grad for p in model.parameters())
    assert model(x.double()).shape == (2, 4)
    model.reset_classifier(0)
    assert model(x.double()).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model(x.double()).ndim == 4
    model.reset_classifier(5, "max")
    assert not any(module.training for module in model.modules()), "it stays in evaluation mode"
    assert create(name, num_classes=0).eval()(x).shape == (2, model.head_hidden_size)
    unpooled = create(name, num_classes=0, global_pool="").eval()
    torch.testing.assert_close(unpooled(x), unpooled.forward_features(x))


@pytest.mark.parametrize("name", ["mbib_resnet20", "bib_resnet20", "experts_resnet20", "mbib_experts_resnet20"])
def test_classes_after_no_pooling_are_on_pooled_observations(name):
    model = create(name, num_classes=0, global_pool="").eval()
    model.reset_classifier(3)
    assert model(images(name)).shape == (2, 3)
    with pytest.raises(MbibError, match="goes with num_classes=0"):
        model.reset_classifier(3, "")


@pytest.mark.slow
def test_features_and_head_compose_to_the_forward_pass(small):
    name, model = small
    model.eval()
    x = images(name)
    features = model.forward_features(x)
    assert features.ndim == 4
    assert features.shape[1] == model.num_features
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.forward_head(features), model(x))


def test_pooled_features_are_of_models_whose_heads_see_nothing_else(described):
    name, model = described
    assert hasattr(model, "pool_features") == (name in POOLED)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SMALL if name in POOLED])
def test_pooled_features_and_heads_compose_to_the_forward_pass(name):
    model, x = create(name), images(name, 4)
    for training in (True, False):
        model.train(training)
        # Training mode moves BatchNorm's running statistics, which nothing reads there.
        pooled = model.pool_features(x)
        assert tuple(p.shape[1] for p in pooled) == model.pooled_widths
        assert all(p.ndim == 2 for p in pooled)
        for given, expected in zip(as_tuple(model.forward_pooled(pooled)), as_tuple(model(x)), strict=True):
            assert torch.equal(given, expected)


def test_pooled_features_are_the_means_of_the_tapped_maps():
    model, x = create("mbib_resnet20", taps=("input", 3, 9)).eval(), images("mbib_resnet20")
    maps = [x, *model.forward_intermediates(x, indices=[3, 9], intermediates_only=True)]
    torch.testing.assert_close(model.pool_features(x), tuple(each.mean(dim=(2, 3)) for each in maps))
    model.remove_training_heads()
    torch.testing.assert_close(model.pool_features(x), (maps[-1].mean(dim=(2, 3)),))
    assert model.pooled_widths == (64,)


def test_dropout_is_the_heads():
    """What `pool_features` gives does not drop anything, so that it can be kept."""
    for name in ("mbib_resnet20", "with_classifier"):
        model, x = create(name, drop_rate=0.9), images(name, 4)
        assert torch.equal(model.pool_features(x)[-1], model.pool_features(x)[-1])
        pooled = model.pool_features(x)
        different = zip(as_tuple(model.forward_pooled(pooled)), as_tuple(model.forward_pooled(pooled)), strict=True)
        assert not any(torch.equal(*pair) for pair in different)


@pytest.mark.slow
def test_intermediates_over_every_level(small):
    name, model = small
    model.eval()
    x = images(name)
    last, maps = model.forward_intermediates(x)
    info = model.feature_info
    assert len(info) >= 3
    assert {level["module"] for level in info} <= {module for module, _ in model.named_modules()}
    assert [m.shape[1] for m in maps] == [level["num_chs"] for level in info]
    assert [x.shape[-1] // m.shape[-1] for m in maps] == [level["reduction"] for level in info]
    torch.testing.assert_close(last, model.forward_features(x))
    (only,) = model.forward_intermediates(x, indices=[0], intermediates_only=True)
    torch.testing.assert_close(only, maps[0])
    features = timm.create_model(name, features_only=True)
    features.set_grad_checkpointing()
    outputs = features(x)
    assert [f.shape[1] for f in outputs] == features.feature_info.channels()
    assert len(outputs) >= 3
    sum(f.sum() for f in outputs).backward()
    assert [n for n, p in features.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["mbib_resnet20", "mbib_resnet10", "with_classifier"])
def test_hooks_give_the_features_that_timms_getter_gives(name):
    x, maps = torch.randn(2, 3, 32, 32), []
    for kind in ({}, {"feature_cls": "hook"}):
        torch.manual_seed(0)
        maps.append(timm.create_model(name, features_only=True, **kind).eval()(x))
    torch.testing.assert_close(*maps)


@pytest.mark.parametrize("name", ["mbib_resnet20", "bib_resnet20"])
def test_features_of_a_cifar_model_are_its_stages(name):
    assert timm.create_model(name, features_only=True).feature_info.channels() == [16, 32, 64]
    two = timm.create_model(name, features_only=True, out_indices=(0, 4))
    assert two.feature_info.module_name() == ["backbone.act1", "backbone.layer2.0"]


@pytest.mark.parametrize("name", [*KINDS, "bib_resnet20", "mbib_experts_resnet10"])
def test_pruning_keeps_the_maps_before_it(name):
    model = create(name).eval()
    x = images(name)
    expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    parameters = count_parameters(model)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    torch.testing.assert_close(model.forward_intermediates(x, indices=[0, 1], intermediates_only=True), expected)
    assert count_parameters(model) < parameters
    model.train().forward_features(x).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    model.reset_classifier(5, "avg")
    assert model(x)[0].shape[-1] == 5 or model(x).shape == (2, 5)
    assert model.eval()(x).shape == (2, 5)


# Classifiers are scripted by themselves below, whatever the network.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        *((name, "linear") for name in MORE_KINDS),
        *((name, kind) for kind in CLASSIFIERS if kind != "linear" for name in ("mbib_resnet20", "cifar_resnet20")),
        ("mbib_experts_resnet20", "cosine"),
    ],
)
def test_torchscript_and_fx(name, classifier):
    model = create(name, classifier=classifier).eval()
    x = images(name)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_torchscript_ends_at_the_last_tap():
    model = create("mbib_resnet20", taps=(2, "layer2.1")).eval()
    x = images("mbib_resnet20")
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mbib_resnet20", "experts_resnet20", "mbib_experts_resnet20"])
def test_training_compiles_without_a_graph_break(name):
    model = create(name)
    x = images(name, 4)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mbib_resnet20", "experts_resnet20", "mbib_experts_resnet20"])
def test_pickle_deepcopy_and_export(name):
    model = create(name).eval()
    x = images(name)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), model(x))
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("name", KINDS)
def test_gradient_checkpointing_changes_nothing(name):
    x = images(name, 4)
    gradients = []
    for enabled in (False, True):
        model = create(name)
        model.set_grad_checkpointing(enabled)
        sum(output.sum() for output in as_tuple(model(x))).backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


# Of the deep ones those whose blocks have numbers of two digits.
@pytest.mark.slow
@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("name", [*SMALL, "mbib_resnet101", "cifar_resnet56"])
def test_parameter_groups_follow_depth(name, coarse):
    model = timm.create_model(name, device="meta")
    group_of = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    # Experts follow one another; at one depth they are one group.
    order = [group_of[n] for n, _ in model.named_parameters() if ".experts." not in n or ".experts.0." in n]
    copies = {n: re.sub(r"\.experts\.\d+\.", ".experts.0.", n) for n in group_of}
    assert all(group_of[n] == group_of[first] for n, first in copies.items())
    assert order == sorted(order)
    assert order[0] == 0
    assert max(order) >= 4


def test_without_training_heads_the_prediction_is_the_same():
    model = create("mbib_resnet20").eval()
    bare = create("mbib_resnet20", training_heads=False).eval()
    missing = bare.load_state_dict(model.state_dict(), strict=False)
    assert missing.missing_keys == []
    assert all(key.startswith("training_heads.") for key in missing.unexpected_keys)
    x = images("mbib_resnet20")
    torch.testing.assert_close(bare(x), model(x))
    assert bare.head_names == ("v3", "z")
    assert len(bare.train()(x)) == 2
    assert bare.pretrained_cfg["classifier"] == ("observation.classifier", "bottleneck.classifier")


# Table 6 and its parts.


def test_parameters_of_table_6():
    model = timm.create_model("mbib_resnet32", num_classes=100)
    parts = {name: count_parameters(part) for name, part in model.named_children()}
    assert count_parameters(model) == 486_016
    assert parts["backbone"] == 463_504
    assert count_parameters(model.training_heads.v1.classifier) == 1_700
    assert count_parameters(model.training_heads.v2.classifier) == 3_300
    assert count_parameters(model.observation.classifier) == 6_500
    assert count_parameters(model.bottleneck.fc) == 4_160
    assert count_parameters(model.bottleneck.classifier) == 6_500


def test_macs_of_table_6():
    model = timm.create_model("mbib_resnet32", num_classes=100, device="meta")
    macs = count_macs(model, (3, 640, 640))
    assert macs["conv"] == pytest.approx(27.545e9, rel=1e-4)
    assert macs["total"] == pytest.approx(27.93e9, rel=5e-4)
    assert model.training
    assert all(module.training for module in model.modules())


def test_macs_agree_with_torch():
    from torch.utils.flop_counter import FlopCounterMode

    model = timm.create_model("mbib_resnet20", num_classes=10, device="meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 32, 32, device="meta"))
    macs = count_macs(model, (3, 32, 32))
    assert counter.get_total_flops() == 2 * (macs["conv"] + macs["linear"])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mobilenetv3_small_050"])
def test_products_of_attention_are_counted_as_torch_does(name, monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    macs = {}
    for fused in (1, 0):
        monkeypatch.setattr("timm.layers.config._USE_FUSED_ATTN", fused)
        model = timm.create_model(name, num_classes=10).eval()
        macs[fused] = count_macs(model, (3, 224, 224))
    with FlopCounterMode(display=False) as counter:  # which does not know every kernel of the fused kind
        model(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() == 2 * sum(macs[0][kind] for kind in ("conv", "linear", "attention"))
    assert macs[0] == macs[1]
    assert (macs[0]["attention"] > 0) == ("mobile" not in name)


def test_norms_that_hold_their_activation_are_counted_and_left_as_they_were():
    model = timm.create_model("tf_efficientnet_lite0", num_classes=10).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    modes = {name: module.training for name, module in model.named_modules()}
    sizes = []
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    handles = [norm.register_forward_hook(lambda norm, inputs, output: sizes.append(output.numel())) for norm in norms]
    macs = count_macs(model, (3, 64, 64))
    for handle in handles:
        handle.remove()
    assert macs["norm"] == 2 * sum(sizes)
    assert len(sizes) == len(norms) == 49
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert {name: module.training for name, module in model.named_modules()} == modes
    acts = [module for module in model.modules() if isinstance(module, nn.ReLU6)]
    assert len(acts) == 33
    assert 0 < macs["act"] < macs["norm"] / 2


@pytest.mark.parametrize("name", ["mbib_resnet20", "mbib_experts_resnet20"])
def test_what_has_lost_its_training_heads_is_saved_and_loaded_so(name, tmp_path):
    model = create(name).eval()
    model.remove_training_heads()
    save_for_hf(model, tmp_path, {}, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert {*again.state_dict()} == {*model.state_dict()}
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), model(images))


def test_published_weights_load_without_training_heads():
    name, images = "mbib_resnet32.cifar100_lt_if100", torch.randn(2, 3, 32, 32)
    whole = timm.create_model(name, pretrained=True).eval()
    bare = timm.create_model(name, pretrained=True, training_heads=False).eval()
    assert not any("training_heads" in key for key in bare.state_dict())
    assert torch.equal(bare(images), whole(images))


def test_bytes_that_a_step_keeps_are_those_that_autograd_holds():
    """A convolution keeps its input; ReLU its output, which the linear layer keeps too; weights are no activations."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, 5))
    assert activation_bytes(model, (3, 16, 16)) == 4 * (3 + 8) * 16 * 16
    assert next(model.parameters()).device.type == "cpu"
    wide, narrow = (activation_bytes(create("mbib_resnet20"), (3, side, side)) for side in (64, 32))
    assert wide / narrow == pytest.approx(4, rel=0.01)

    class Undecided(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    assert activation_bytes(Undecided(), (3, 16, 16)) is None


# Taps.


def test_taps_block_by_block_and_the_input():
    taps = ("input", "layer1.1", "layer1.2", "layer2.2", 8, "layer3.2")
    model = create("mbib_resnet20", taps=taps)
    assert model.head_names == ("x", "v1", "v2", "v3", "v4", "v5", "z")
    assert len(model(images("mbib_resnet20"))) == 7
    assert len(model.pretrained_cfg["classifier"]) == 7
    assert model.training_heads.x.num_features == 3
    assert model.eval()(images("mbib_resnet20")).shape == (2, 7)


def test_tapped_maps_are_the_backbones_own():
    model = create("mbib_resnet32", taps=(3, "layer2.1", 14)).eval()
    plain = create("cifar_resnet32").eval()
    own = {key.removeprefix("backbone."): v for key, v in model.state_dict().items() if key.startswith("backbone.")}
    loaded = plain.load_state_dict(own, strict=False)
    assert loaded.unexpected_keys == []
    assert all(key.startswith(("layer3.4.", "fc.")) for key in loaded.missing_keys)
    x = images("mbib_resnet32")
    assert len(model.feature_info) == 15
    expected = plain.forward_intermediates(x, indices=[3, 7, 14], intermediates_only=True)
    given = model.forward_intermediates(x, indices=[3, 7, 14], intermediates_only=True)
    for ours, theirs in zip(given, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    pooled = [m.mean(dim=(2, 3)) for m in expected]
    logits = [head(v) for head, v in zip(model.training_heads.values(), pooled, strict=False)]
    torch.testing.assert_close(model.forward_heads(x)[:2], tuple(logits))


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        (("layer2.9", 15), "did you mean 'layer2"),
        ((40,), "its levels are 0: act1"),
        ((9, 3), "in order of depth"),
        ((), "one or more"),
    ],
)
def test_impossible_taps_are_refused(taps, message):
    with pytest.raises(MbibError, match=message):
        create("mbib_resnet32", taps=taps)


@pytest.mark.parametrize("error", [MbibError, AssertionError], ids=["ours", "timm's"])
@pytest.mark.parametrize("pool", ["catavgmax", "", "median"])
def test_pooling_that_changes_the_width_is_refused(pool, error):
    with pytest.raises(error, match="global_pool"):
        create("mbib_resnet20", global_pool=pool)
    model = create("mbib_resnet20")
    with pytest.raises(error, match="global_pool"):
        model.reset_classifier(3, pool)
    assert model.num_classes == 7


@pytest.mark.parametrize(
    ("backbone", "size", "taps"), [("crossvit_9_240", 240, (3, 4, 5)), ("efficientvim_m1", 64, (0, 1, 2))]
)
def test_features_that_are_several_maps_are_no_tap(backbone, size, taps):
    model = create("mbib", backbone=backbone).eval()
    assert model.taps == taps
    assert model(torch.randn(2, 3, size, size)).shape == (2, 7)
    with pytest.raises(MbibError, match="unknown tap of"):
        create("mbib", backbone=backbone, taps=[1, "features"])
    with pytest.raises(MbibError, match=r"forward_features of backbone .* is not its last tap"):
        torch.jit.script(model)


def test_a_backbone_that_timm_cannot_tap_is_refused():
    class Untapped(torch.nn.Module):
        feature_info = [dict(num_chs=4, reduction=2, module="conv")]  # noqa: RUF012

    @register_model
    def untapped_net(pretrained=False, **kwargs):
        return Untapped()

    with pytest.raises(MbibError, match="backbone 'untapped_net' cannot be tapped: it has no forward_intermediates"):
        create("mbib", backbone="untapped_net")


# A matcher that is a function, one of several patterns per group, and one with `^` in an alternative.
@pytest.mark.parametrize("backbone", ["inception_v3", "convnext_atto", "resnet18"])
@pytest.mark.parametrize("name", ["mbib", "with_classifier"])
def test_parameter_groups_are_the_backbones(name, backbone):
    model = timm.create_model(name, backbone=backbone, device="meta")
    plain = timm.create_model(backbone, device="meta")
    group_of = group_parameters(model, model.group_matcher(), reverse=True)
    own = {n.removeprefix("backbone."): group for n, group in group_of.items() if n.startswith("backbone.")}
    expected = group_parameters(plain, plain.group_matcher(), reverse=True)
    assert own == {n: expected[n] for n in own}
    heads = {group for n, group in group_of.items() if not n.startswith("backbone.")}
    assert heads == {max(group_of.values())}


def test_a_backbone_without_groups_is_one():
    model = timm.create_model("with_classifier", backbone="pit_ti_224", device="meta")
    group_of = group_parameters(model, model.group_matcher(), reverse=True)
    assert all(group == (not n.startswith("backbone.")) for n, group in group_of.items())


BACKBONES = {
    "convnext_atto": {},
    "efficientnet_b0": {},
    "mobilenetv3_small_100": {},
    "vit_tiny_patch16_224": {"img_size": 32},
    "swin_tiny_patch4_window7_224": {"img_size": 64},
    "regnetx_002": {},
}


@pytest.mark.parametrize("architecture", ["mbib", "bib", "experts", "with_classifier"])
@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("convnext_tny.fb_in22k", "unknown backbone 'convnext_tny': did you mean 'convnext_tiny'"),
        ("convnext_tiny.fb_in22q", r"unknown tag of a backbone 'convnext_tiny\.fb_in22q': did you mean .*fb_in22k"),
    ],
)
def test_backbones_that_timm_does_not_know_are_named(architecture, pretrained, backbone, message):
    with pytest.raises(MbibError, match=message):
        timm.create_model(architecture, backbone=backbone, pretrained=pretrained)


# One head: BSCE and BSCE_MLP of Tables 5 and 7.


def by_hand(model, x, head, layers="fc-norm-relu"):
    """The logits of v, or of z, out of the parts: pooled map, BatchNorm, and for z a layer more."""
    pooled = model.forward_features(x).mean(dim=(2, 3))
    v = model.observation.norm(pooled)
    if head == "v":
        return torch.nn.functional.linear(v, *model.observation.classifier.parameters())
    z = torch.nn.functional.linear(pooled if model.observation.raw else v, *model.bottleneck.fc.parameters())
    norm = model.bottleneck.norm
    z = {
        "fc-norm-relu": lambda: norm(z).clamp(min=0),
        "fc-relu-norm": lambda: norm(z.clamp(min=0)),
        "fc-norm": lambda: norm(z),
    }[layers]()
    return torch.nn.functional.linear(z, *model.bottleneck.classifier.parameters())


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("layers", BOTTLENECKS)
def test_what_the_paper_leaves_open_of_the_heads(layers, raw):
    torch.manual_seed(0)
    model = create("mbib_resnet20", bottleneck_layers=layers, raw_observations=raw)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):  # a trained one
            torch.nn.init.uniform_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    model.eval()
    x = images("mbib_resnet20", 4)
    v, z = (by_hand(model, x, head, layers) for head in "vz")
    torch.testing.assert_close(model(x), (v + z) / 2)
    torch.testing.assert_close(torch.stack(model.forward_heads(x)[-2:]), torch.stack([v, z]))
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    pooled = model.forward_features(x).mean(dim=(2, 3))
    expected = pooled if raw else model.observation.norm(pooled)
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), expected)
    torch.testing.assert_close(model.heads_and_features(x)[1]["v"], expected)


@torch.no_grad()
def test_how_the_linear_layers_of_the_heads_start():
    torch.manual_seed(0)
    kaiming, torchs = create("mbib_resnet20"), create("mbib_resnet20", head_init="torch")
    layers = lambda model: [*model.get_classifier(), model.bottleneck.fc]  # noqa: E731
    for own, other in zip(layers(kaiming), layers(torchs), strict=True):
        width = own.in_features
        assert own.bias.abs().max() == 0
        assert own.weight.std() == pytest.approx((2 / width) ** 0.5, rel=0.2)
        for values in other.parameters():  # torch's: uniform within 1 / sqrt(width)
            assert values.std() == pytest.approx((3 * width) ** -0.5, rel=0.35)
            assert values.abs().max() <= width**-0.5
    torchs.reset_classifier(7)
    assert all(layer.bias.abs().max() > 0 for layer in torchs.get_classifier())
    with pytest.raises(MbibError, match="unknown head_init 'zero'"):
        create("mbib_resnet20", head_init="zero")
    with pytest.raises(MbibError, match="unknown bottleneck_layers 'relu'"):
        create("mbib_resnet20", bottleneck_layers="relu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "prediction", "heads", "raw"),
    [
        ("bib_resnet20", "v", ("v1",), False),
        ("bib_resnet20", "z", ("z",), False),
        ("bib_resnet20", "z", ("z",), True),
        ("mbib_resnet20", "v", ("v1", "v2", "v3"), False),
        ("mbib_resnet20", "z", ("v1", "v2", "z"), False),
    ],
)
def test_a_network_that_predicts_by_one_head(name, prediction, heads, raw):
    model = create(name, prediction=prediction, raw_observations=raw)
    x = images(name, 4)
    outputs = model(x)
    assert model.head_names == heads
    assert len(outputs) == len(heads)
    assert model.bottleneck_head == ("z" if prediction == "z" else None)
    assert len(model.get_classifier()) == len(heads)
    assert all(f"{name}.weight" in model.state_dict() for name in model.pretrained_cfg["classifier"])
    sum(output.sum() for output in outputs).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    model.eval()
    torch.testing.assert_close(model(x), by_hand(model, x, prediction))
    torch.testing.assert_close(model(x), model.forward_heads(x)[-1])
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
    both = create(name, raw_observations=raw).eval()
    both.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(both.forward_heads(x)[-2 if prediction == "v" else -1], model(x))
    model.remove_training_heads()
    torch.testing.assert_close(model(x), by_hand(model, x, prediction))


@pytest.mark.parametrize("prediction", ["v", "z"])
def test_one_head_can_be_replaced(prediction):
    model = create("bib_resnet20", prediction=prediction).eval()
    x = images("bib_resnet20")
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    torch.testing.assert_close(model(x), by_hand(model, x, prediction))
    assert len(model.train()(x)) == 1
    model.eval().reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    assert model.prune_intermediate_layers([0]) == [0]


# FACTS, section 1: ResNet-32's backbone has 463,504 parameters, BatchNorms 2 a channel, all layers with bias.
@pytest.mark.parametrize(
    ("prediction", "parameters"),
    [
        ("v", 463_504 + 2 * 64 + 65 * 100),
        ("z", 463_504 + 2 * 64 + 65 * 64 + 2 * 64 + 65 * 100),
        ("mean", 463_504 + 2 * 64 + 65 * 64 + 2 * 64 + 2 * 65 * 100),
    ],
)
def test_parameters_of_one_head(prediction, parameters):
    model = timm.create_model("bib_resnet32", num_classes=100, device="meta", prediction=prediction)
    assert count_parameters(model) == parameters


def test_an_unknown_prediction_is_refused():
    with pytest.raises(MbibError, match="unknown prediction 'zz': did you mean 'z'"):
        create("bib_resnet20", prediction="zz")


@pytest.mark.parametrize("prediction", ["v", "z"])
def test_a_model_of_one_head_is_loaded_and_predicts(tmp_path, capsys, prediction):
    folder = tmp_path / "one_head"
    save_for_hf(create("bib_resnet20", prediction=prediction), folder, safe_serialization=True)
    weights = load_file(folder / "model.safetensors")
    for num_classes in (7, 4):
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=num_classes).eval()
        assert model.head_names == ("v1" if prediction == "v" else "z",)
        assert model.state_dict().keys() == weights.keys()
        same = {key for key, value in model.state_dict().items() if torch.equal(value, weights[key])}
        fresh = {key for key in weights if "classifier" in key} if num_classes != 7 else set()
        assert weights.keys() - same <= fresh
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    arguments = ["predict", str(folder), str(tmp_path / "image.png"), "--device", "cpu", "--workers", "0"]
    assert main(arguments) == 0
    capsys.readouterr()
    for head in ("v", "z"):
        assert main([*arguments, "--head", head]) == 2
        error = capsys.readouterr().err
        assert f"'{head}': choose from prediction." in error
        assert error.count("\n") == 1


# Classifiers.


def naive_logits(kind, features, state, scale=1.0):
    """The logits of METHODS 0.1 and 3.2, number by number."""
    rows = []
    for f in features.double():
        row = []
        for j, w in enumerate(state["weight"].double()):
            if kind == "cosine":
                row.append(scale * sum(a * b for a, b in zip(f, w, strict=True)) / (f.norm() * w.norm()))
                continue
            logit = sum(a * b for a, b in zip(f, w, strict=True)) + state["bias"][j].double()
            row.append(state["scale"][j].double() * logit if kind == "scaled" else logit)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "scale"), [("linear", None), ("cosine", 1.0), ("cosine", 16), ("scaled", None)])
def test_classifiers_against_loops(kind, scale, dtype):
    torch.manual_seed(0)
    classifier = create_classifier(kind, 6, 4, scale, dtype=dtype)
    if kind == "scaled":
        torch.nn.init.uniform_(classifier.scale, 0.5, 2)
    features = torch.randn(5, 6, dtype=dtype)
    expected = naive_logits(kind, features, classifier.state_dict(), scale or 1.0)
    torch.testing.assert_close(classifier(features), expected.to(dtype))
    torch.testing.assert_close(torch.jit.script(classifier)(features), classifier(features))
    classifier(features).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in classifier.parameters())


def test_a_scale_of_one_is_the_linear_classifier():
    linear, scaled = create_classifier("linear", 64, 100), create_classifier("scaled", 64, 100)
    assert scaled.load_state_dict(linear.state_dict(), strict=False).missing_keys == ["scale"]
    features = torch.randn(8, 64)
    assert torch.equal(scaled(features), linear(features))


def test_a_cosine_classifier_sees_directions_alone():
    classifier = create_classifier("cosine", 64, 100)
    torch.testing.assert_close(classifier.weight.norm(dim=1), torch.ones(100))
    features = torch.randn(8, 64)
    logits = classifier(features)
    assert logits.abs().max() <= 30
    torch.testing.assert_close(classifier(100 * features), logits, rtol=1e-4, atol=1e-4)
    classifier.weight.data *= torch.rand(100, 1) + 0.1
    torch.testing.assert_close(classifier(features), logits, rtol=1e-4, atol=1e-4)
    assert not torch.equal(classifier(-features), logits)


def test_a_cosine_classifier_normalises_in_float32_under_autocast():
    classifier = create_classifier("cosine", 64, 100)
    features = 1e-4 * torch.randn(8, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = classifier(features.bfloat16())
    assert logits.dtype == torch.float32
    assert (logits - classifier(features)).abs().max() < 0.3  # 2^-8 of the scale, and of it the product's rounding
    assert classifier.bfloat16()(features.bfloat16()).dtype == torch.bfloat16


# METHODS 0.1: 470,004 parameters with a linear head, 469,904 with a cosine one; 3.2: a scale for each class.
@pytest.mark.parametrize(("kind", "parameters"), [("linear", 470_004), ("cosine", 469_904), ("scaled", 470_104)])
def test_parameters_and_macs_of_a_classifier(kind, parameters):
    model = timm.create_model("cifar_resnet32", num_classes=100, classifier=kind, device="meta")
    assert count_parameters(model) == parameters
    assert count_macs(model, (3, 32, 32))["linear"] == 6_400


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize("name", MORE_KINDS)
def test_every_model_takes_every_classifier_and_keeps_its_kind(name, kind):
    model = timm.create_model(name, num_classes=7, device="meta", classifier=kind)
    before = [type(classifier) for classifier in as_tuple(model.get_classifier())]
    assert len({*before}) == 1
    model.reset_classifier(0)
    model.reset_classifier(5)
    assert [type(classifier) for classifier in as_tuple(model.get_classifier())] == before
    assert [type(create_classifier(kind, 1, 1))] == [*{*before}]


def test_classifiers_that_do_not_exist_are_refused():
    with pytest.raises(MbibError, match="unknown classifier 'cosin': did you mean 'cosine'"):
        create("cifar_resnet20", classifier="cosin")
    with pytest.raises(MbibError, match="classifier_scale is for the cosine classifier"):
        create("cifar_resnet20", classifier_scale=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_any_backbone_with_a_classifier(backbone):
    arguments = BACKBONES[backbone]
    model = create("with_classifier", backbone=backbone, classifier="cosine", classifier_scale=16, **arguments)
    plain = create(backbone, **arguments)
    model.load_state_dict(prefix_backbone(plain.state_dict(), model), strict=False)
    x = torch.randn(2, 3, *[arguments.get("img_size", 64)] * 2)
    features = model.eval().forward_features(x)
    torch.testing.assert_close(features, plain.eval().forward_features(x))
    pooled = plain.forward_head(features, pre_logits=True)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    expected = naive_logits("cosine", pooled, model.classifier.state_dict(), 16)
    torch.testing.assert_close(model(x), expected.float())


@pytest.mark.parametrize(("backbone", "pool"), [("test_vit", "avg"), ("test_resnet", "max"), ("test_vit3", "avg")])
@pytest.mark.parametrize("name", ["mbib", "with_classifier"])
def test_another_pooling_is_saved_and_loaded(name, backbone, pool, tmp_path):
    model = create(name, backbone=backbone)
    model.reset_classifier(5, pool)
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 160, 160)
    assert torch.equal(loaded(images), model.eval()(images))


@pytest.mark.parametrize("name", ["mbib", "with_classifier"])
def test_a_model_takes_images_of_the_sizes_that_its_backbone_takes(name, tmp_path):
    """timm's cfg of this backbone says one size, and the backbone takes any: so it is saved, and loaded."""
    model = create(name, backbone="test_vit", img_size=48).eval()
    save_for_hf(model, tmp_path, data_config={"input_size": (3, 64, 64)}, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))
    assert loaded.pretrained_cfg["input_size"] == (3, 64, 64)
    fixed = create(name, backbone="test_vit", img_size=48, backbone_args={"dynamic_img_size": False})
    with pytest.raises(ValueError, match=r"the model requires \(48, 48\)"):
        save_for_hf(fixed, tmp_path, data_config={"input_size": (3, 64, 64)})


# Weights.


def plain_weights(name="resnet18", **kwargs):
    torch.manual_seed(3)
    return timm.create_model(name, **kwargs).state_dict()


@pytest.mark.parametrize("num_classes", [7, 1000])
def test_backbone_weights_load_into_any_number_of_classes(num_classes):
    weights = plain_weights()
    model = timm.create_model(
        "mbib_resnet18",
        pretrained=True,
        num_classes=num_classes,
        pretrained_cfg_overlay=dict(state_dict=weights, hf_hub_id=None),
    )
    torch.testing.assert_close(model.backbone.layer4[1].conv2.weight.data, weights["layer4.1.conv2.weight"])
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, num_classes)


def test_backbone_weights_adapt_to_grey_images():
    overlay = dict(state_dict=plain_weights(), hf_hub_id=None)
    model = timm.create_model("mbib_resnet18", pretrained=True, in_chans=1, pretrained_cfg_overlay=overlay)
    assert model.backbone.conv1.weight.shape[1] == 1


@pytest.mark.parametrize("num_classes", [7, 1000])
@pytest.mark.parametrize("name", ["mbib", "with_classifier"])
def test_any_backbones_weights_load_through_its_own_cfg(name, num_classes):
    weights = plain_weights("regnetx_002")
    cfg = resolve_pretrained_cfg("regnetx_002", None, dict(state_dict=weights, hf_hub_id=None, url=None)).to_dict()
    overlay = dict(state_dict=weights, hf_hub_id=None, url=None)
    arguments = dict(backbone="regnetx_002.pycls_in1k", pretrained=True, num_classes=num_classes)
    model = timm.create_model(name, pretrained_cfg_overlay=overlay, **arguments)
    assert model.pretrained_cfg["mean"] == cfg["mean"]
    assert model.pretrained_cfg["first_conv"] == "backbone.stem.conv"
    for key, value in model.state_dict().items():
        if key.startswith("backbone."):
            torch.testing.assert_close(value, weights[key.removeprefix("backbone.")])
    overlay["state_dict"] = {key.replace("s4.", "s5."): value for key, value in weights.items()}
    with pytest.raises(CheckpointError, match=r"missing keys: s4.*unexpected keys: s5"):
        timm.create_model(name, pretrained_cfg_overlay=overlay, **arguments)


@pytest.mark.parametrize("num_classes", [7, 5])
def test_own_checkpoint_round_trip_is_strict_and_keeps_what_it_can(tmp_path, num_classes):
    model = create("mbib_resnet20", taps=(3, 5, 9))
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=num_classes)
    for key, value in loaded.state_dict().items():
        if num_classes == 7 or "classifier" not in key:
            torch.testing.assert_close(value, model.state_dict()[key])
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["taps"] == [3, 5, 9]

    weights = {k: v for k, v in model.state_dict().items() if k != "bottleneck.fc.weight"}
    with pytest.raises(CheckpointError, match=r"missing keys: bottleneck\.fc\.weight"):
        timm.create_model(
            "mbib_resnet20",
            taps=(3, 5, 9),
            pretrained=True,
            num_classes=5,
            pretrained_cfg_overlay=dict(state_dict=weights),
        )


# The kind that is no default for every network, and all of them for two.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        *((name, "cosine") for name in (*KINDS, "classic_resnet10") if name != "mbib_resnet10"),
        *((name, kind) for kind in CLASSIFIERS if kind != "cosine" for name in ("mbib_resnet20", "cifar_resnet20")),
    ],
)
def test_a_checkpoint_serves_without_classes_and_with_others(tmp_path, name, classifier):
    """timm's idiom for embeddings, ``pretrained=True, num_classes=0``; the arguments come from config.json."""
    model = create(name, classifier=classifier)
    model.eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"]["classifier"] == classifier
    x = images(name)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(x), model(x))
    embedding = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    assert torch.equal(embedding(x), model.forward_head(model.forward_features(x), pre_logits=True))
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=5).eval()
    assert other(x).shape == (2, 5)
    assert torch.equal(other.forward_features(x), model.forward_features(x))
    state = model.state_dict()
    state.popitem()
    overlay = dict(state_dict=state, num_classes=7)
    with pytest.raises(CheckpointError, match="missing keys"):
        timm.create_model(name, pretrained=True, num_classes=7, classifier=classifier, pretrained_cfg_overlay=overlay)


def test_the_packaged_weights_give_the_logits_that_they_always_gave():
    """Logits of every head, written before the weights' keys were renamed, and before they were rounded to half
    precision, which moves a weight by half a thousandth at most."""
    golden = load_file(Path(__file__).parent / "golden" / "mbib_resnet32_logits.safetensors")
    model = timm.create_model("mbib_resnet32.cifar100_lt_if100", pretrained=True).eval()
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    given = {"prediction": model(x), **dict(zip(model.head_names, model.forward_heads(x), strict=True))}
    assert given.keys() == golden.keys()
    for name, logits in given.items():
        torch.testing.assert_close(logits, golden[name], rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("name", ["mbib_resnet20", "mbib_experts_resnet32"])
def test_a_bottleneck_of_no_width_is_refused(name):
    for width in (0, -5):
        with pytest.raises(MbibError, match=f"bottleneck_features: expected at least 1, got {width}"):
            timm.create_model(name, num_classes=10, bottleneck_features=width)
