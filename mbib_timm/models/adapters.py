"""Low-rank adapters (LoRA) in a network's backbone, through peft, and the plain weights that they come to.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022. A layer with weights W computes with
``W + alpha / r B A``: B (out, r), zero at the start, and A (r, in) train. Saved is the sum, under the layer's own key.
"""

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from mbib_timm.errors import MbibError, few, unknown_name
from mbib_timm.recipe import LoraSettings

ADAPTER = "default"
FITTING = "linear layers and 1x1 convolutions"


def add_adapters(model: nn.Module, settings: LoraSettings, heads: Collection[str], size: tuple[int, int, int]) -> None:
    """Put adapters into layers of a model, in place; what else requires gradients stays as it is.

    Args:
        model: with its weights, on the CPU.
        settings: of the adapters.
        heads: names of the parameters outside the backbone.
        size: of the images (C, H, W).

    Raises:
        MbibError: peft is missing, or no layer fits.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MbibError("recipe key 'lora' needs peft: pip install 'mbib-timm[lora]'") from None
    names = _targets(model, settings.targets, heads, size)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=settings.dropout,
        target_modules="|".join(map(re.escape, names)),
    )
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    inject_adapter_in_model(config, model, ADAPTER)
    plain = plain_names(model)
    for name, parameter in model.named_parameters():
        if name in plain:
            parameter.requires_grad_(required[plain[name]])


def _targets(
    model: nn.Module, wanted: list[str] | None, heads: Collection[str], size: tuple[int, int, int]
) -> list[str]:
    """Return the names of the layers that get adapters; see `add_adapters`."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
        and not any(f"{name}.{key}" in heads for key, _ in module.named_parameters(recurse=False))
    }
    fitting = [name for name, layer in layers.items() if _fits(layer)]
    called = _called(model, fitting, size)
    if not called:
        raise MbibError(f"recipe key 'lora': {type(model).__name__} has no {FITTING} outside its heads to adapt")
    if wanted is None:
        return called
    chosen: set[str] = set()
    for target in wanted:

        def is_meant(name: str, target: str = target) -> bool:
            return f".{name}".endswith(f".{target}")

        meant, able = [*filter(is_meant, layers)], [*filter(is_meant, called)]
        chosen.update(able)
        if able:
            continue
        if meant:
            why = "reads their weights without calling them" if _fits(layers[meant[0]]) else "has other layers there"
            raise MbibError(
                f"recipe key 'lora': target {target!r} is {few(meant, 1)}; expected {FITTING} that a forward pass "
                f"calls, and {type(model).__name__} {why}; of these there are "
                f"{few(sorted({name.rpartition('.')[2] for name in called}), 20)}"
            )
        if any(is_meant(name.rpartition(".")[0]) for name in heads):
            raise MbibError(f"recipe key 'lora': target {target!r} belongs to the heads, which train in full")
        raise unknown_name(
            "target of recipe key 'lora':",
            target,
            {name.rpartition(".")[2] for name in called},
        )
    return [name for name in called if name in chosen]


def _fits(layer: nn.Module) -> bool:
    # Subclasses may do something else with their weights, such as standardise them: a sum is then not what they learnt.
    return type(layer) is nn.Linear or (
        type(layer) is nn.Conv2d and layer.kernel_size == (1, 1) and layer.groups == 1 and layer.padding == (0, 0)
    )


def _called(model: nn.Module, names: Collection[str], size: tuple[int, int, int]) -> list[str]:
    """Return which layers a forward pass calls. Some networks take a layer's weights to a function of their own, as
    BEiT's attention does; an adapter there would do nothing."""
    seen: set[nn.Module] = set()
    layers = {name: model.get_submodule(name) for name in names}
    hooks = [layer.register_forward_pre_hook(lambda layer, _: seen.add(layer)) for layer in layers.values()]
    training = model.training
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, *size))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return [name for name, layer in layers.items() if layer in seen]


def adapted_layers(network: nn.Module) -> dict[str, Any]:
    """Return peft's layers in a network by name, each around a layer of the network; it is not imported for this."""
    return {name: module for name, module in network.named_modules() if hasattr(module, "get_delta_weight")}


def plain_names(network: nn.Module) -> dict[str, str]:
    """Return the names of a network's parameters and buffers, and what each is called without adapters; these are left
    out."""
    prefixes = tuple(f"{name}." for name in adapted_layers(network))
    names = {}
    for name in network.state_dict():
        prefix = next(filter(name.startswith, prefixes), "")
        inner = name[len(prefix) :]
        if not prefix or inner.startswith("base_layer."):
            names[name] = prefix + (inner.removeprefix("base_layer.") if prefix else inner)
    return names


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's weights with those of its adapters added, under the keys of the model without them."""
    state = model.state_dict()
    weights = {plain: state[name] for name, plain in plain_names(model).items()}
    for name, layer in adapted_layers(model).items():
        weights[f"{name}.weight"] = layer.base_layer.weight + layer.get_delta_weight(ADAPTER)
    return weights
