"""The optimizer side of a run, built from the recipe: timm's optimizer, schedule and gradient scaler."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import NativeScaler, unwrap_model
from torch import nn

from mbib_timm.errors import MbibError, few, first_line, unknown_name
from mbib_timm.methods import Method
from mbib_timm.methods.base import parameters_that_train
from mbib_timm.models.parts import PARTS, model_in, part_of
from mbib_timm.recipe import Recipe

# Torch's own, whose fused kernels update every weight at once and read the learning rate from the device.
FUSED_OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
# How an optimizer computes on its device: not a checkpoint's to say, which may come from another.
DEVICE_CHOICES = ("foreach", "fused", "capturable")
# Side of images, in pixels, from which on mixed precision is faster on CUDA.
SMALLEST_MIXED = 64


def create_optimizer(recipe: Recipe, method: Method) -> torch.optim.Optimizer:
    """Build timm's optimizer of the parameters that train: the network's in timm's groups, then the method's own.

    Raises:
        MbibError: an unknown name or keyword, a value that the optimizer does not take, or nothing that trains.
    """
    if recipe.opt not in list_optimizers():
        raise unknown_name("optimizer", recipe.opt, list_optimizers())
    kwargs = dict(recipe.opt_kwargs)
    network = unwrap_model(method.trainable_module)
    trained = {id(parameter) for _, parameter in parameters_that_train(method)}
    for parameter in network.parameters():  # timm leaves out what requires no gradient
        parameter.requires_grad_(id(parameter) in trained)
    own = {name: parameter for name, parameter in method.own_parameters() if id(parameter) in trained}
    if not trained:
        raise MbibError(
            f"recipe key 'train': with {recipe.choice('train')} method {method.name!r} trains nothing of its network"
        )
    if recipe.layer_decay is not None and not hasattr(network, "group_matcher"):
        raise MbibError(
            f"recipe key 'layer_decay': method {method.name!r} trains a network whose layers are not known to timm; "
            "expected a method that trains the model as it is, or param_groups"
        )
    if method.device.type == "cuda" and get_optimizer_class(recipe.opt) in FUSED_OPTIMIZERS:
        kwargs.setdefault("fused", True)
        if recipe.cuda_graph is not False and get_optimizer_class(recipe.opt) is not torch.optim.SGD:
            kwargs.setdefault("capturable", True)
    settings = dict(opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum)
    # Before timm takes a recipe without weight decay for a network none of whose parameters may have any.
    decays = recipe.weight_decay or 1.0 if recipe.param_groups else recipe.weight_decay
    where, model = model_in(network)
    if where and not hasattr(network, "no_weight_decay"):
        # timm asks the network alone, and a wrapper of a method's own need not repeat what the model in it says.
        spares: Callable[[], Collection[str]] = getattr(model, "no_weight_decay", set)
        network.no_weight_decay = partial(set, [f"{where}.{name}" for name in spares()])
    try:
        if recipe.opt_kwargs or get_optimizer_class(recipe.opt) not in FUSED_OPTIMIZERS:
            _try_step({**settings, **kwargs}, method.device)
        optimizer = create_optimizer_v2(
            network,
            **{**settings, "weight_decay": decays},
            filter_bias_and_bn=recipe.filter_bias_and_bn,
            layer_decay=recipe.layer_decay,
            **kwargs,
        )
    except Exception as error:  # timm's and torch's optimizers raise and assert of all kinds
        raise MbibError(
            f"recipe key {'opt_kwargs' if recipe.opt_kwargs else 'opt'!r}: optimizer {recipe.opt!r} does not take what "
            f"it is given: {first_line(error)}"
        ) from None
    by_decay: dict[float, list[nn.Parameter]] = {}
    for name, parameter in own.items():
        spared = recipe.filter_bias_and_bn and (parameter.ndim <= 1 or name.endswith(".bias"))  # timm's rule
        by_decay.setdefault(0.0 if spared else decays, []).append(parameter)
    for decay, parameters in by_decay.items():
        optimizer.add_param_group({"params": parameters, "weight_decay": decay})
    if recipe.param_groups:
        parts = _parts(recipe, network, own)
        _require_decays(recipe, parts, optimizer.param_groups)
        optimizer.param_groups = _divided(optimizer.param_groups, recipe, parts)
    return optimizer


def require_optimized(method: Method, optimizer: torch.optim.Optimizer) -> None:
    """Raise MbibError where a parameter would train that no optimizer updates: one that was made after `__init__`."""
    updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    late = [name for name, parameter in method.trainable_parameters() if id(parameter) not in updated]
    if late:
        raise MbibError(
            f"method {method.name!r}: {few(late)}: parameters that were made after training began, and that nothing "
            "updates; make them in __init__"
        )


def _divided(groups: Sequence[dict[str, Any]], recipe: Recipe, parts: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return parameter groups, divided into those of the recipe's parts and the rest.

    A part's `lr_scale` multiplies that of ``layer_decay``. Its weight decay is for those of its parameters that have
    any: not for biases and norms that ``filter_bias_and_bn`` excludes, nor for what the network itself does.

    Args:
        groups: of what trains; those that have weight decay have some above 0.
        recipe: has the parts.
        parts: of the parameters, see `_parts`.
    """
    divided: list[dict[str, Any]] = []
    for group in groups:
        members: dict[str, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            members.setdefault(parts.get(id(parameter), ""), []).append(parameter)
        for part, parameters in members.items():
            own = recipe.param_groups.get(part, {})
            changed = {**group, "params": parameters}
            if "lr_scale" in own:
                changed["lr_scale"] = group.get("lr_scale", 1.0) * own["lr_scale"]
            if group["weight_decay"] > 0:
                changed["weight_decay"] = own.get("weight_decay", recipe.weight_decay)
            divided.append(changed)
    return divided


def _require_decays(recipe: Recipe, parts: Mapping[int, str], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise MbibError for a part's weight decay that none of its parameters may have; see `_divided`."""
    decaying = [group["params"] for group in groups if group["weight_decay"] > 0]
    reached = {parts.get(id(parameter)) for parameters in decaying for parameter in parameters}
    for part, own in recipe.param_groups.items():
        if "weight_decay" in own and part not in reached:
            raise MbibError(
                f"recipe key 'param_groups': {part}: weight_decay has no effect: filter_bias_and_bn or the network "
                "itself excludes all of that part from weight decay"
            )


def _parts(recipe: Recipe, network: nn.Module, own: Mapping[str, nn.Parameter]) -> dict[int, str]:
    """Return the part of ``param_groups`` that a parameter is in, by the parameter's id, of those that train.

    Args:
        recipe: has the parts.
        network: that trains.
        own: the method's own parameters by name, which expressions for names see too.

    Raises:
        MbibError: a part without a parameter that trains, or two parts with one parameter.
    """
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    parts: dict[int, str] = {}
    for part in recipe.param_groups:
        is_named = all(piece.strip() in PARTS for piece in part.split("+"))
        of_method = [] if is_named else [(name, each) for name, each in own.items() if re.search(part, name)]
        try:
            names = part_of(network, part, "param_groups")
        except MbibError as error:
            if not of_method:
                raise MbibError(f"{error}{f', the method has {few([*own])}' if own else ''}") from None
            names = set()
        found = [*((name, trained[name]) for name in sorted(names & trained.keys())), *of_method]
        if not found:
            raise MbibError(f"recipe key 'param_groups': {part} has no effect: no parameter of that part trains")
        for name, parameter in found:
            if (first := parts.setdefault(id(parameter), part)) != part:
                raise MbibError(f"recipe key 'param_groups': {name} is in {first} and in {part}; expected one part")
    return parts


def unscaled_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the recipe's learning rate at this time: without the factor that a layer or a part has of its own."""
    scales = [(group.get("lr_scale", 1.0), group["lr"]) for group in optimizer.param_groups]
    scale, rate = min(scales, key=lambda each: abs(each[0] - 1))  # exact, where a group has the factor 1
    return float(rate) / scale


def _try_step(settings: Mapping[str, Any], device: torch.device) -> None:
    """Take a step of an optimizer: what is wrong with some keyword arguments shows in the first at the earliest."""
    parameter = nn.Parameter(torch.ones(2, 2, device=device))
    parameter.grad = torch.ones_like(parameter)
    create_optimizer_v2([parameter], **settings).step()
    if not parameter.isfinite().all():
        raise ValueError("a step leaves no finite weights")


def takes_tensor_rates(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a step of this optimizer can read its learning rates from the device."""
    return isinstance(optimizer, FUSED_OPTIMIZERS) and bool(optimizer.defaults.get("fused"))


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimizer's state; how it computes stays that of this device.

    Raises:
        KeyError, TypeError, ValueError: a state that does not fit.
    """
    own = optimizer.param_groups
    groups = [
        {**group, **{name: mine[name] for name in DEVICE_CHOICES if name in mine}}
        for group, mine in zip(state["param_groups"], own, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})


def round_learning_rates(optimizer: torch.optim.Optimizer) -> None:
    """Round what the schedule has set to float32, which a tensor on the device holds: every kind of step computes
    with the same numbers."""
    for group in optimizer.param_groups:
        group["lr"] = float(np.float32(group["lr"]))


def create_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, updates: int = 0) -> Any:
    """Build timm's schedule, stepped once an epoch, or with ``sched_on_updates`` after each update.

    Args:
        recipe: names it.
        optimizer: whose learning rates it sets.
        updates: of an epoch, where they count.

    Raises:
        MbibError: too few epochs, or updates, for a schedule that falls in the last ones.
    """
    milestones: list[Any] = recipe.decay_milestones
    if recipe.sched_on_updates:
        # timm applies a milestone one step early: that of updates too is to act from the epoch before it on.
        milestones = [milestone - 1 + 0.5 / updates for milestone in milestones]
    trains = recipe.epochs > 0  # else nothing is read of the schedule, and not all can be that short
    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            sched=recipe.sched if trains else "constant",
            num_epochs=recipe.epochs,
            decay_milestones=milestones,
            decay_rate=recipe.decay_rate,
            min_lr=recipe.min_lr,
            warmup_epochs=recipe.warmup_epochs if trains else 0,
            warmup_lr=recipe.warmup_lr,
            step_on_epochs=not recipe.sched_on_updates,
            updates_per_epoch=updates,
        )
    except ValueError:
        unit, number = ("updates", updates) if recipe.sched_on_updates else ("epochs", 1)
        number *= recipe.epochs - recipe.warmup_epochs
        raise MbibError(
            f"recipe key 'sched': {recipe.sched} falls in the last fifth of what follows warmup_epochs: expected at "
            f"least 3 {unit} there, got {number}, or another schedule, such as cosine"
        ) from None
    return schedule


def _has_bfloat16(device: torch.device) -> bool:
    """Return whether a CUDA device computes bfloat16: from Ampere on."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _prefers_mixed(device: torch.device, size: tuple[int, int, int]) -> bool:
    """Return whether mixed precision is faster on a device: networks for small images do not fill a GPU either way."""
    return device.type == "cuda" and min(size[1:]) >= SMALLEST_MIXED


def precision_line(recipe: Recipe, device: torch.device, size: tuple[int, int, int]) -> str | None:
    """Return a line where a recipe leaves the precision open and the device lacks what it would be; None otherwise."""
    wanted = recipe.amp is None and recipe.amp_dtype == "bfloat16" and _prefers_mixed(device, size)
    if not wanted or _has_bfloat16(device):
        return None
    return (
        f"computes in float32: {torch.cuda.get_device_name(device)} has no bfloat16, which needs compute capability "
        "8.0; --amp --amp-dtype float16 is faster"
    )


@dataclass(frozen=True)
class Precision:
    """How a step computes: autocast dtype, or None for full precision; and the scaler that float16 needs."""

    autocast_dtype: torch.dtype | None
    scaler: NativeScaler | None

    @property
    def name(self) -> str:
        """``float32``, or the type of mixed precision: ``bfloat16`` or ``float16``."""
        return str(self.autocast_dtype or torch.float32).removeprefix("torch.")

    @classmethod
    def of(cls, recipe: Recipe, device: torch.device, size: tuple[int, int, int]) -> "Precision":
        """Choose from the recipe; where it says nothing, mixed precision is for CUDA and images that are not small.

        Args:
            recipe: says whether precision is mixed, and of which type.
            device: of the run.
            size: of the images, (C, H, W).

        Raises:
            MbibError: the recipe asks for bfloat16, which the CUDA device lacks.
        """
        dtype = torch.bfloat16 if recipe.amp_dtype == "bfloat16" else torch.float16
        lacking = device.type == "cuda" and dtype is torch.bfloat16 and not _has_bfloat16(device)
        if recipe.amp and lacking:
            raise MbibError(
                f"recipe key 'amp_dtype': {torch.cuda.get_device_name(device)} computes no bfloat16, which needs "
                "compute capability 8.0; expected float16, or amp: false"
            )
        if not (_prefers_mixed(device, size) and not lacking if recipe.amp is None else recipe.amp):
            return cls(None, None)
        scaler = NativeScaler(device=device.type) if dtype is torch.float16 else None
        return cls(dtype, scaler)
