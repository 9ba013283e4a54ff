"""MBIB on timm's families of backbones, by name and with random weights: what is observed, against plain timm."""

import copy
import json

import pytest
import timm
import torch
from timm.models import save_for_hf

from mbib_timm.errors import CheckpointError, MbibError
from mbib_timm.inference.export import FORMATS, for_inference, largest_difference
from mbib_timm.models.backbones import PoolingError

# The smallest of each family. Transformers are built with fewer blocks, and those of the size of ViT-B with fewer
# channels.
SMALL = dict(depth=6, embed_dim=96, num_heads=3)
# By timm's name: size of the images, further arguments, taps and widths by default, and timm's word for the pooling.
FAMILIES = {
    "convnext_atto.d2_in1k": (64, {}, (1, 2, 3), (80, 160, 320), "avg"),
    "convnext_tiny.dinov3_lvd1689m": (64, dict(depths=(1, 1, 1, 1)), (1, 2, 3), (192, 384, 768), "avg"),
    "efficientnet_b0.ra_in1k": (64, {}, (3, 4, "features"), (112, 320, 1280), "avg"),
    "tf_efficientnet_lite0.in1k": (64, {}, (3, 4, "features"), (112, 320, 1280), "avg"),
    "mobilenetv4_conv_small.e2400_r224_in1k": (64, {}, (2, 3, 4), (64, 96, 960), "avg"),
    "fastvit_t8.apple_in1k": (64, {}, (2, 3, "features"), (192, 384, 768), "avg"),
    "swin_tiny_patch4_window7_224.ms_in1k": (64, dict(depths=(1, 1, 1, 1)), (1, 2, 3), (192, 384, 768), "avg"),
    "vit_tiny_patch16_224.augreg_in21k": (32, {}, (3, 7, 11), (192,) * 3, "token"),
    "vit_small_patch14_dinov2.lvd142m": (42, SMALL, (1, 3, 5), (96,) * 3, "token"),
    "vit_small_patch14_reg4_dinov2.lvd142m": (42, SMALL, (1, 3, 5), (96,) * 3, "token"),
    "vit_small_patch16_dinov3.lvd1689m": (48, SMALL, (1, 3, 5), (96,) * 3, "avg"),
    "vit_base_patch32_siglip_256.v2_webli": (64, SMALL, (1, 3, 5), (96,) * 3, "map"),
    "vit_base_patch32_clip_224.openai": (64, SMALL, (1, 3, 5), (96,) * 3, "token"),
    "eva02_tiny_patch14_224.mim_in22k": (42, dict(depth=6), (1, 3, 5), (192,) * 3, "avg"),
    "deit_tiny_distilled_patch16_224.fb_in1k": (32, dict(depth=6), (1, 3, 5), (192,) * 3, "token"),
    "cait_xxs24_224.fb_dist_in1k": (32, dict(depth=6), (1, 3, 5), (192,) * 3, "token"),
    "mixer_s32_224": (64, {}, (1, 4, 7), (512,) * 3, "avg"),
}
TRANSFORMERS = [name for name, given in FAMILIES.items() if given[-1] != "avg" or "dinov3" in name or "eva" in name]
TRANSFORMERS.remove("convnext_tiny.dinov3_lvd1689m")


def arguments(name):
    """Arguments of the generic models for a backbone, and of the plain one."""
    size, args, *_ = FAMILIES[name]
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    sized = dict(img_size=size) if fixed else {}
    return {"backbone_args": args, **sized}, {**args, **sized}


def create(name, method="mbib", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(method, backbone=name, num_classes=7, **{**arguments(name)[0], **kwargs})


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A name, and a model. Tests of one backbone follow one another, so that it is initialised once; they leave its
    layers as they are."""
    return request.param, create(request.param)


def images(name, batch=3):
    size = FAMILIES[name][0]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def plain_with_the_weights_of(model, name, **kwargs):
    """timm's own model, complete, with the weights that the model's backbone has."""
    plain = timm.create_model(name.partition(".")[0], num_classes=0, **arguments(name)[1], **kwargs)
    missing = plain.load_state_dict(model.backbone.state_dict(), strict=False)
    assert missing.unexpected_keys == []
    return plain.eval()


@pytest.mark.slow
def test_depths_widths_and_pooling_by_default(family):
    name, model = family
    *_, taps, widths, pool = FAMILIES[name]
    model, x = model.train(), images(name)
    assert (model.taps, model.pooled_widths, model.pool_type) == (taps, widths, pool)
    assert tuple(p.shape for p in model.pool_features(x)) == tuple((3, width) for width in widths)
    assert model.head_names == ("v1", "v2", "v3", "z")
    sum(logits.square().sum() for logits in model(x)).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    single = create(name, "bib")
    assert (single.taps, single.pooled_widths) == (taps[-1:], widths[-1:])


def by_hand(plain, x, taps, pool):
    """What is observed at each tap, out of plain timm's maps and tokens."""
    levels = [tap for tap in taps if tap != "features"]
    norm = len({level["reduction"] for level in plain.feature_info}) == 1
    maps = plain.forward_intermediates(x, indices=levels, norm=norm, intermediates_only=True)
    observed = [each.mean(dim=(2, 3)) for each in maps]
    if pool == "token" and type(plain).__name__ != "Cait":
        blocks = plain.forward_intermediates(
            x, indices=levels, norm=True, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
        prefix = 2 if "Distilled" in type(plain).__name__ else 1  # its own pooling is the mean of both tokens
        observed = [tokens[:, :prefix].mean(dim=1) for _, tokens in blocks]
    if hasattr(plain, "num_prefix_tokens") or "features" in taps:
        end = plain.forward_features(x)
        observed = [*observed[: len(taps) - 1], end.mean(dim=(2, 3)) if end.ndim == 4 else plain.forward_head(end)]
    elif hasattr(plain, "fc_norm"):
        observed = [plain.fc_norm(each) for each in observed]
    return observed


@pytest.mark.slow
def test_what_is_observed_is_plain_timms(family):
    name, model = family
    model, x = model.eval(), images(name)
    plain = plain_with_the_weights_of(model, name)
    expected = by_hand(plain, x, model.taps, model.pool_type)
    if name.startswith("eva02"):  # its normalisation is behind the pooling
        expected = [*map(plain.fc_norm, expected[:-1]), expected[-1]]
    for given, wanted in zip(model.pool_features(x), expected, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
    last, maps = model.forward_intermediates(x)
    torch.testing.assert_close(last, model.forward_features(x))
    assert [m.shape[1] for m in maps] == [level["num_chs"] for level in model.feature_info]


@pytest.mark.slow
def test_a_saved_model_does_not_depend_on_defaults(family, tmp_path):
    name, model = family
    *_, taps, _, pool = FAMILIES[name]
    model, x = model.eval(), images(name)
    save_for_hf(model, tmp_path, safe_serialization=True)
    saved = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert (saved["backbone"], saved["taps"], saved["global_pool"]) == (name, [*taps], pool)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(x), model(x))
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    assert torch.equal(other(x), model.forward_head(model.forward_features(x), pre_logits=True))


@pytest.mark.slow
def test_it_is_reset_pruned_and_scripted_as_any_model_of_timms(family):
    name, model = family
    model, x = copy.deepcopy(model).eval(), images(name)
    if name.startswith("swin"):
        with pytest.raises(MbibError, match=r"is not its last tap; use torch.export or torch.jit.trace"):
            torch.jit.script(model)
    else:
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    model.reset_classifier(5)
    assert model(x).shape == (3, 5)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), model.forward_features(x))
    model.reset_classifier(4)
    assert model.pool_type == FAMILIES[name][-1]
    assert model(x).shape == (3, 4)
    net = timm.create_model("mbib", backbone=name, features_only=True, out_indices=(0, 2), **arguments(name)[0])
    maps = net(x)
    assert [m.shape[1] for m in maps] == net.feature_info.channels()
    sum(m.sum() for m in maps).backward()
    assert [key for key, p in net.named_parameters() if p.grad is None] == []
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert not model.reads_tokens
    model.reset_classifier(3, "avg")
    assert model(x).shape == (3, 3)


# Their code is that of others here, with the same pooling.
SAME_CODE = {
    "convnext_tiny.dinov3_lvd1689m", "tf_efficientnet_lite0.in1k", "vit_small_patch14_dinov2.lvd142m",
    "vit_base_patch32_clip_224.openai",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in SAME_CODE])
def test_it_is_exported_with_a_free_batch(name, tmp_path):
    module, x = for_inference(create(name)), images(name, 2)
    described = type("Described", (), dict(entries=lambda self: {}, output="logits"))()
    file, format = tmp_path / "model", FORMATS["torch-export"]
    format.write(module, x, file, described)
    assert largest_difference(module, format.read(file), x.shape[1:]) < 1e-4


# Pooling


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_is_pooled_as_it_is_asked_to_be(name, pool):
    if (pool == "token" and "siglip" in name) or (pool == "avg" and "distilled" in name):
        with pytest.raises(PoolingError, match="unknown global_pool"):
            create(name, global_pool=pool)
        return
    model, x = create(name, global_pool=pool).eval(), images(name)
    tokens, prefix = model.forward_features(x), model.backbone.num_prefix_tokens
    chosen = tokens[:, prefix:] if pool == "avg" else tokens[:, : 1 + ("distilled" in name)]
    pooled = getattr(model.backbone, "fc_norm", torch.nn.Identity())(chosen.mean(dim=1))
    torch.testing.assert_close(model.pool_features(x)[-1], pooled)
    assert [key for key in model.state_dict() if "attn_pool" in key] == []


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        (
            "vit_tiny_patch16_224.augreg_in21k",
            dict(global_pool="map"),
            "unknown global_pool of VisionTransformer 'map'",
        ),
        ("vit_tiny_patch16_224.augreg_in21k", dict(global_pool="max"), "choose from avg, token"),
        ("vit_base_patch32_siglip_256.v2_webli", dict(global_pool="token"), "choose from avg, map"),
        ("vit_tiny_patch16_224.augreg_in21k", dict(taps=13), "expected from 1 to 12, got 13"),
        ("vit_tiny_patch16_224.augreg_in21k", dict(taps=0), "expected from 1 to 12, got 0"),
        ("vit_tiny_patch16_224.augreg_in21k", dict(taps=("features",)), "unknown tap of vit_tiny_patch16_224"),
        ("tf_efficientnet_lite0.in1k", dict(taps=("features", 4)), "in order of depth"),
        ("tf_efficientnet_lite0.in1k", dict(taps=("feature",)), "did you mean 'features'"),
        (
            "tf_efficientnet_lite0.in1k",
            dict(taps=(5,)),
            "unknown tap 5 of tf_efficientnet_lite0: its levels are 0: blocks.0",
        ),
    ],
)
def test_what_cannot_be_observed_is_refused(name, kwargs, message):
    with pytest.raises(MbibError, match=message):
        create(name, **kwargs)


def test_a_number_of_taps_is_spread_over_a_transformer_and_taken_from_the_end_of_stages():
    assert create("vit_tiny_patch16_224.augreg_in21k", taps=4).taps == (2, 5, 8, 11)
    assert create("convnext_atto.d2_in1k", taps=2).taps == (2, 3)
    assert create("tf_efficientnet_lite0.in1k", taps=("input", 2, "features")).pooled_widths == (3, 40, 1280)


def test_a_transformer_cut_before_its_end_is_normalised_there():
    name = "vit_tiny_patch16_224.augreg_in21k"
    model, x = create(name, taps=(2, 5)).eval(), images(name)
    assert len(model.backbone.blocks) == 6
    tokens = model.backbone.forward_intermediates(
        x, indices=[5], norm=True, output_fmt="NLC", return_prefix_tokens=True
    )
    torch.testing.assert_close(model.pool_features(x)[-1], tokens[1][0][1][:, 0])


# Weights of another image size


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_weights_of_another_image_size_are_resampled_as_timm_does(name):
    args = dict(depths=(1, 1, 1, 1)) if "swin" in name else dict(depth=3)
    weights = timm.create_model(name, **args).state_dict()
    overlay = dict(state_dict=weights, hf_hub_id=None, url=None)
    plain = timm.create_model(name, pretrained=True, img_size=64, pretrained_cfg_overlay=dict(overlay), **args)
    for method in ("mbib", "with_classifier"):
        model = timm.create_model(
            method,
            backbone=name,
            pretrained=True,
            img_size=64,
            num_classes=7,
            backbone_args=args,
            pretrained_cfg_overlay=dict(overlay),
        )
        for key, value in model.backbone.state_dict().items():
            assert torch.equal(value, plain.state_dict()[key]), key


def test_weights_of_another_width_are_refused_by_name():
    weights = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=96).state_dict()
    with pytest.raises(CheckpointError, match=r"cls_token is of shape \(1, 1, 96\), expected \(1, 1, 192\)"):
        timm.create_model(
            "mbib",
            backbone="vit_tiny_patch16_224",
            backbone_args=dict(depth=3),
            pretrained=True,
            pretrained_cfg_overlay=dict(state_dict=weights, hf_hub_id=None, url=None),
        )
