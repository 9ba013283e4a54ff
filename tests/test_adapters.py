"""Parts of a network that train, and low-rank adapters: against naive loops, sums by hand and plain timm models."""

import builtins
import json
import re

import faults
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from tiny import Tiny
from torch import nn

from mbib_timm.api import evaluate
from mbib_timm.errors import MbibError
from mbib_timm.methods import METHODS, Facts, part_of
from mbib_timm.methods.paco import Projected
from mbib_timm.models.adapters import adapted_layers, add_adapters, merged_weights, plain_names
from mbib_timm.recipe import LoraSettings, Recipe, dump_recipe
from mbib_timm.training import run as run_module
from mbib_timm.training import train
from mbib_timm.training.checkpoint import load_checkpoint
from mbib_timm.training.optimization import create_optimizer

CPU = torch.device("cpu")
VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32}
NETWORKS = {
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT),
    "lite0": lambda: timm.create_model("tf_efficientnet_lite0", num_classes=5),
    "mbib_vit": lambda: timm.create_model(
        "mbib", backbone="vit_tiny_patch16_224", img_size=32, num_classes=5, backbone_args={"depth": 3}
    ),
    "mbib_lite0": lambda: timm.create_model("mbib", backbone="tf_efficientnet_lite0", num_classes=5),
    "convnextv2": lambda: timm.create_model("convnextv2_atto", num_classes=5),
    "paco": lambda: Projected(timm.create_model("cifar_resnet20", num_classes=5), 8),
    "experts": lambda: timm.create_model("experts_resnet20", num_classes=5),
}
SIZES = {"vit": 32, "mbib_vit": 32, "lite0": 64, "mbib_lite0": 64}


def network_of(name):
    torch.manual_seed(0)
    return NETWORKS[name]()


def adapted(name, **settings):
    """A network with adapters that say something, and one like it without."""
    network, plain = network_of(name), network_of(name)
    size = SIZES[name]
    add_adapters(network, LoraSettings(**settings), part_of(network, "heads"), (3, size, size))
    for key, value in network.named_parameters():
        if ".lora_B." in key:
            nn.init.normal_(value, std=0.05)
    return network.eval(), plain.eval(), torch.randn(2, 3, size, size)


# Parts


def naive_part(network, part):
    """The names of parameters in a part, written out."""
    heads = {
        "vit": ("head.",),
        "lite0": ("classifier.",),
        "convnextv2": ("head.fc.",),
        "paco": ("model.fc.", "projector."),
    }
    found = set()
    for name, module in network.named_modules():
        for key, _ in module.named_parameters(recurse=False):
            whole = f"{name}.{key}" if name else key
            is_head = whole.startswith(heads[part[1]]) if part[1] in heads else not whole.startswith("backbone.")
            norm = type(module).__name__ in (
                *("LayerNorm", "LayerNorm2d", "BatchNorm2d", "BatchNorm1d", "BatchNormAct2d", "GlobalResponseNorm"),
            )
            if {"heads": is_head, "norm": norm, "bias": key == "bias"}[part[0]]:
                found.add(whole)
    return found


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("part", ["heads", "norm", "bias", "heads+norm+bias", "bias + heads"])
def test_a_part_trains_what_a_naive_loop_finds_and_a_step_changes_nothing_else(name, part):
    network = network_of(name)
    pieces = part.replace(" ", "").split("+")
    expected = set().union(*(naive_part(network, (piece, name)) for piece in pieces))
    assert expected
    method = METHODS["ce"](network, None, Facts(np.ones(5, dtype=int), 1), CPU)
    method.freeze_all_but(part, "eval")
    assert {key for key, _ in method.trainable_parameters()} == expected
    before = {key: value.clone() for key, value in network.state_dict().items()}
    optimizer = create_optimizer(Recipe(weight_decay=0.1), method)
    method.train()
    heads = naive_part(network, ("heads", name)) if "heads" in pieces else set()
    for key, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.training is (f"{key}.weight" in heads), key
    sum(value.sum() for value in network.parameters() if value.requires_grad).backward()
    optimizer.step()
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == expected


def test_norms_train_with_the_statistics_that_frozen_bn_says():
    for mode, training in (("train", True), ("eval", False)):
        network = Tiny()
        method = METHODS["ce"](network, None, Facts(np.ones(5, dtype=int), 1), CPU)
        method.freeze_all_but("norm", mode)
        assert network.norm.weight.requires_grad
        before = network.norm.running_mean.clone()
        method.train()
        network(torch.randn(4, 3, 6, 6) + 1)
        assert (not torch.equal(network.norm.running_mean, before)) is training
    method = METHODS["ce"](Tiny(), None, Facts(np.ones(5, dtype=int), 1), CPU)
    with pytest.raises(MbibError, match=r"'frozen_bn': with train: heads\+norm the statistics of layer norm"):
        method.freeze_all_but("heads+norm", None)
    with pytest.raises(MbibError, match=r"'train': 'heads\+nrom' matches no .*; did you mean 'norm'\?"):
        part_of(Tiny(), "heads+nrom")


@pytest.mark.parametrize("name", ["mbib_lite0", "lite0", "paco"])
def test_with_eval_the_backbones_statistics_stay_where_all_trains(name):
    network = network_of(name)
    method = METHODS["ce"](network, None, Facts(np.ones(5, dtype=int), 1), CPU)
    method.freeze_all_but("all", "eval")
    assert all(value.requires_grad for value in network.parameters())
    method.train()
    heads = naive_part(network, ("heads", name))
    for key, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.training is (f"{key}.weight" in heads), key
    method.freeze_all_but("all", None)
    assert all(module.training for module in method.train().trainable_module.modules())


# Adapters


@pytest.mark.parametrize("name", SIZES)
def test_merged_weights_are_the_sum_and_those_of_a_plain_model(name):
    network, plain, images = adapted(name, rank=3, alpha=5.0)
    weights = merged_weights(network)
    assert [*weights] == [*plain.state_dict()]
    modules = dict(network.named_modules())
    changed = set()
    for key, value in plain.state_dict().items():
        layer = modules.get(key.removesuffix(".weight"))
        if key.endswith(".weight") and hasattr(layer, "lora_A"):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert a.shape[0] == b.shape[1] == 3
            expected = value + 5 / 3 * (b.flatten(1) @ a.flatten(1)).reshape(value.shape)
            torch.testing.assert_close(weights[key], expected)
            assert not torch.equal(weights[key], value)
            changed.add(key)
        else:
            assert torch.equal(weights[key], value), key
    assert len(changed) == len(adapted_layers(network)) > 0
    assert not changed & part_of(plain, "heads")
    before = plain(images)
    plain.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(plain(images), network(images), rtol=1e-3, atol=1e-3 * float(before.abs().max()))
        assert (plain(images) - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", SIZES)
def test_what_trains_with_adapters_is_these_and_the_part(name):
    network, _, _ = adapted(name)
    kept = set(plain_names(network))
    adapters = {key for key, _ in network.named_parameters() if key not in kept}
    method = METHODS["ce"](network, None, Facts(np.ones(5, dtype=int), 1), CPU)
    method.freeze_all_but("heads", "eval")
    heads = {key for key in part_of(network, "heads") if key in dict(network.named_parameters())}
    assert {key for key, _ in method.trainable_parameters()} == heads | adapters
    assert all(".lora_A.default." in key or ".lora_B.default." in key for key in adapters)


TARGETS = {
    "vit_tiny_patch16_224": (VIT, 32, {"qkv", "proj", "fc1", "fc2"}),
    "eva02_base_patch14_224": ({"depth": 1, "img_size": 28, "embed_dim": 96, "num_heads": 3}, 28,
                               {"q_proj", "k_proj", "v_proj", "proj", "fc1_g", "fc1_x", "fc2"}),
    # Its attention reads the weights of qkv.
    "beit_base_patch16_224": (
        {"depth": 1, "img_size": 32, "embed_dim": 96, "num_heads": 3}, 32, {"proj", "fc1", "fc2"}
    ),
    "convnext_atto": ({}, 64, {"fc1", "fc2"}),
    "tf_efficientnet_lite0": ({}, 64, {"conv_pw", "conv_pwl", "conv_head"}),
    # It has a module of its own called base_layer.
    "dla34": ({}, 64, {"0", "conv"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_the_layers_of_a_network_that_get_adapters(name):
    kwargs, size, expected = TARGETS[name]
    model = timm.create_model(name, num_classes=5, **kwargs)
    keys = [*model.state_dict()]
    add_adapters(model, LoraSettings(), part_of(model, "heads"), (3, size, size))
    assert {layer.rpartition(".")[2] for layer in adapted_layers(model)} == expected
    assert [*merged_weights(model)] == keys
    assert model.training


def test_targets_by_the_end_of_their_names():
    network = network_of("mbib_vit")
    settings = LoraSettings(targets=["proj", "blocks.1.mlp.fc1"])
    add_adapters(network, settings, part_of(network, "heads"), (3, 32, 32))
    expected = {*(f"backbone.blocks.{i}.attn.proj" for i in range(3)), "backbone.blocks.1.mlp.fc1"}
    assert set(adapted_layers(network)) == expected  # and not patch_embed.proj, a convolution of 16x16


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("name", "layers"), [("mbib_vit", 3), ("mbib_lite0", 16)])
def test_layer_decay_goes_by_blocks_through_the_backbone_with_and_without_adapters(name, layers, lora):
    network = adapted(name)[0] if lora else network_of(name)
    method = METHODS["ce"](network, None, Facts(np.ones(5, dtype=int), 1), CPU)
    optimizer = create_optimizer(Recipe(layer_decay=0.5), method)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    place: dict[str, int] = {}
    for key, value in network.named_parameters():
        block = re.match(r"backbone\.blocks\.\d+" if "vit" in name else r"backbone\.blocks\.\d+\.\d+", key)
        if block:
            above = layers - place.setdefault(block[0], len(place))
            assert scales[id(value)] == pytest.approx(0.5**above), key
        elif not key.startswith("backbone."):
            assert scales[id(value)] == 1, key
        else:  # what follows the last block goes with it, as timm says of both backbones
            last = key.startswith(("backbone.norm", "backbone.conv_head", "backbone.bn2"))
            assert scales[id(value)] == pytest.approx(0.5 if last else 0.5 ** (layers + 1)), key
    assert len(place) == layers


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vit", {"targets": ["qvk"]}, "unknown target of recipe key 'lora': 'qvk': did you mean 'qkv'"),
        ("vit", {"targets": ["qkv", "head"]}, "target 'head' belongs to the heads, which train in full"),
        ("mbib_vit", {"targets": ["classifier"]}, "target 'classifier' belongs to the heads"),
        ("vit", {"targets": ["patch_embed.proj"]}, "target 'patch_embed.proj' is patch_embed.proj; expected linear"),
        ("experts", {}, "Experts has no linear layers and 1x1 convolutions outside its heads to adapt"),
    ],
)
def test_networks_and_targets_that_do_not_fit(name, settings, message):
    network, size = network_of(name), SIZES.get(name, 32)
    before = [*network.state_dict()]
    with pytest.raises(MbibError, match=message):
        add_adapters(network, LoraSettings(**settings), part_of(network, "heads"), (3, size, size))
    assert [*network.state_dict()] == before


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora": {"rank": 0}}, "setting 'rank' of recipe key 'lora': expected at least 1, got 0"),
        ({"lora": {"rank": 2.5}}, "setting 'rank' of recipe key 'lora': expected int"),
        ({"lora": {"rank": 10**6}}, "setting 'rank' of recipe key 'lora': expected at most 1,024"),
        ({"lora": {"alpha": 0}}, "'alpha' of recipe key 'lora': expected more than 0"),
        ({"lora": {"dropout": 1.0}}, "'dropout' of recipe key 'lora': expected less than 1"),
        ({"lora": {"rnk": 4}}, "unknown setting of recipe key 'lora': 'rnk': did you mean 'rank'"),
        ({"lora": {"targets": []}}, "'targets' of recipe key 'lora': expected names of layers, got none"),
        ({"lora": {"targets": [1]}}, "'targets' of recipe key 'lora': expected str, got 1"),
        ({"lora": 8}, "'lora': expected dict, got 8"),
        ({"lora": {}, "train": "all"}, "'lora' has no effect with train: all; expected train: heads"),
        ({"lora": {}, "epochs": 0, "initial_checkpoint": "x"}, "'lora' has no effect with epochs: 0"),
        ({"lora": {}, "feature_passes": 1, "pretrained": True}, "'feature_passes' and 'lora': adapters change"),
    ],
)
def test_recipes_that_cannot_be(keys, message):
    with pytest.raises(MbibError, match=message):
        Recipe(**keys)


def test_without_peft_it_says_how_to_get_it(monkeypatch):
    own = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "peft":
            raise ImportError(name)
        return own(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MbibError, match=re.escape("recipe key 'lora' needs peft: pip install 'mbib-timm[lora]'")):
        adapted("vit")


# Runs


def digits(folder, **keys):
    kwargs = {key: value for key, value in VIT.items() if key != "img_size"}
    data = dict(dataset="digits", imbalance="exp", imbalance_factor=20, imbalance_max=32, img_size=32)
    model = dict(model="vit_tiny_patch16_224", model_kwargs=kwargs, method={"name": "bsce"})
    training = dict(epochs=2, batch_size=32, lr=0.05, lora={"rank": 2, "dropout": 0.1}, train_crop_mode="pad")
    machine = dict(workers=0, device="cpu", loader="resident", image_cache="none", output=str(folder))
    settings = {**data, **model, **training, **machine}
    return Recipe(**{**settings, **keys})


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Weights to start from."""
    folder = tmp_path_factory.mktemp("start")
    return train(digits(folder, lora=None, epochs=1, val_interval=1), "start").folder


@pytest.mark.parametrize("ema", [False, True], ids=["raw", "ema"])
def test_a_run_leaves_a_plain_model_that_gives_its_answers(start, tmp_path, monkeypatch, capsys, ema):
    finished = []
    own = run_module.Run._finish
    monkeypatch.setattr(run_module.Run, "_finish", lambda run: (finished.append(run), own(run))[1])
    recipe = digits(tmp_path, initial_checkpoint=str(start), model_ema=ema, model_ema_decay=0.5)
    folder = train(recipe, "adapted").folder
    printed = capsys.readouterr().out
    line = re.search(r"trains ([\d.]+) % of 0\.1 M parameters: heads, and LoRA of rank 2 in 8 layers", printed)
    (run,) = finished
    network = run.method.trainable_module
    sizes = {key: value.numel() for key, value in network.named_parameters()}
    trained = sum(size for key, size in sizes.items() if ".lora_" in key or key.startswith("head."))
    assert float(line[1]) == pytest.approx(100 * trained / sum(sizes.values()), rel=0.05)

    before, after = load_file(start / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys() == load_file(folder / "best.safetensors").keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers} | {"head.weight", "head.bias"}
    assert changed == expected
    raw = network.state_dict()
    for key, name in plain_names(network).items():
        if not name.startswith("head."):
            assert torch.equal(raw[key], before[name]), key

    plain = timm.create_model("vit_tiny_patch16_224", num_classes=10, **VIT).eval()
    plain.load_state_dict(after)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(images), run.method.result_model().eval()(images), rtol=1e-4, atol=1e-4)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), plain(images))
    result = json.loads((folder / "metrics.json").read_text())["result"]["heads"]["prediction"]
    assert evaluate(folder, device="cpu", workers=0)["prediction"].top1 == pytest.approx(result["top1"])


def test_a_run_resumes_bit_identically(start, tmp_path, monkeypatch):
    keys = dict(epochs=3, initial_checkpoint=str(start), model_ema=True, model_ema_decay=0.5, checkpoint_seconds=0)
    whole = train(digits(tmp_path, **keys), "whole")
    own = run_module.Run._train_epoch

    def until_two(run, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        own(run, epoch)

    monkeypatch.setattr(run_module.Run, "_train_epoch", until_two)
    with pytest.raises(KeyboardInterrupt):
        train(digits(tmp_path, **keys), "broken")
    monkeypatch.undo()
    resumed = train(digits(tmp_path, **keys, resume="auto"), "broken")
    for file in ("model.safetensors", "best.safetensors"):
        assert (whole.folder / file).read_bytes() == (resumed.folder / file).read_bytes()
    states = [load_checkpoint(run.folder / "last.ckpt") for run in (whole, resumed)]
    for part in ("state_dict", "state_dict_ema"):
        first, second = (state[part] for state in states)
        assert any(".lora_A." in key for key in first)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(MbibError, match="lora"):
        train(digits(tmp_path, **{**keys, "lora": {"rank": 3}}, resume="auto"), "broken")


@pytest.mark.slow
def test_heads_first_then_all_starts_from_the_heads(tmp_path):
    """On features first, then adapters at a rate of next to nothing: all stays as the first stage left it."""
    small = {"backbone": "vit_tiny_patch16_224", "img_size": 32, "backbone_args": {"depth": 3, "embed_dim": 48}}
    keys = dict(model="mbib", model_kwargs=small, method={"name": "mbib", "beta": 1.0})
    start = train(digits(tmp_path, **keys, lora=None, epochs=1), "start").folder
    first = digits(tmp_path, **keys, initial_checkpoint=str(start), lora=None, feature_passes=1)
    run = train(digits(tmp_path, **keys, lr=1e-12).replace_previous(first), "two")
    before, heads, both = (
        load_file(folder / "model.safetensors") for folder in (start, run.folder / "stage1-mbib", run.folder)
    )
    assert before.keys() == heads.keys() == both.keys()
    for key, value in both.items():
        if "running_" not in key and "num_batches" not in key:
            torch.testing.assert_close(value, heads[key], rtol=0, atol=1e-7)
        assert torch.equal(heads[key], before[key]) is key.startswith("backbone."), key


@pytest.mark.slow
def test_two_processes_train_the_same_adapters(tmp_path, start):
    """Only adapted layers and heads move; the merged weights give, in one process, what two have measured."""
    file = tmp_path / "own.yaml"
    recipe = digits(tmp_path, initial_checkpoint=str(start), experiment="two", epochs=1)
    file.write_bytes(dump_recipe(recipe))
    assert faults.run(["train", str(file)], tmp_path / "log", ranks=2) == [0, 0], (tmp_path / "log").read_text()
    before, after = (load_file(folder / "model.safetensors") for folder in (start, tmp_path / "two"))
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert moved == {k for k, v in before.items() if k.startswith("head.") or (k.startswith("blocks.") and v.ndim == 2)}
    assert (tmp_path / "log").read_text().count(f"\n{tmp_path / 'two'}\n") == 1, "one process writes and prints"
    record = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert record["environment"]["processes"] == 2
    alone = evaluate(tmp_path / "two", device="cpu", workers=0)
    assert alone["prediction"].per_class == record["result"]["heads"]["prediction"]["per_class"]


def test_adapters_compile_to_one_graph():
    network, _, images = adapted("vit")
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), network(images))
