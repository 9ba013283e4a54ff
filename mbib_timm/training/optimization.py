"""The optimizer side of a run, built from the recipe: timm's optimizer, schedule and gradient scaler."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import NativeScaler, unwrap_model

from mbib_timm.errors import MbibError, first_line, unknown_name
from mbib_timm.methods import Method
from mbib_timm.recipe import Recipe

# Torch's own, whose fused kernels update every weight at once and read the learning rate from the device.
FUSED_OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def create_optimizer(recipe: Recipe, method: Method) -> torch.optim.Optimizer:
    """Build timm's optimizer of the parameters that train: the network's in timm's groups, then the method's own.

    Raises:
        MbibError: an unknown name or keyword, a value that the optimizer does not take, or nothing that trains.
    """
    if recipe.opt not in list_optimizers():
        raise unknown_name("optimizer", recipe.opt, list_optimizers())
    kwargs = dict(recipe.opt_kwargs)
    network = unwrap_model(method.trainable_module)
    trained = {id(parameter) for _, parameter in method.trainable_parameters()}
    for parameter in network.parameters():  # timm leaves out what requires no gradient
        parameter.requires_grad_(id(parameter) in trained)
    own = [parameter for _, parameter in method.own_parameters() if id(parameter) in trained]
    if not trained:
        raise MbibError(
            f"recipe key 'train': with {recipe.choice('train')} method {method.name!r} trains nothing of its network"
        )
    if method.device.type == "cuda" and get_optimizer_class(recipe.opt) in FUSED_OPTIMIZERS:
        kwargs.setdefault("fused", True)
        if recipe.cuda_graph and get_optimizer_class(recipe.opt) is not torch.optim.SGD:
            kwargs.setdefault("capturable", True)
    settings = dict(opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum)
    try:
        if recipe.opt_kwargs or get_optimizer_class(recipe.opt) not in FUSED_OPTIMIZERS:
            _try_step({**settings, **kwargs}, method.device)
        optimizer = create_optimizer_v2(
            network,
            **settings,
            filter_bias_and_bn=recipe.filter_bias_and_bn,
            layer_decay=recipe.layer_decay,
            **kwargs,
        )
    except Exception as error:  # timm's and torch's optimizers raise and assert of all kinds
        raise MbibError(
            f"recipe key {'opt_kwargs' if recipe.opt_kwargs else 'opt'!r}: optimizer {recipe.opt!r} does not take what "
            f"it is given: {first_line(error)}"
        ) from None
    if own:
        optimizer.add_param_group({"params": own, "weight_decay": recipe.weight_decay})
    return optimizer


def _try_step(settings: Mapping[str, Any], device: torch.device) -> None:
    """Take a step of an optimizer: what is wrong with some keyword arguments shows in the first at the earliest."""
    parameter = torch.nn.Parameter(torch.ones(2, 2, device=device))
    parameter.grad = torch.ones_like(parameter)
    create_optimizer_v2([parameter], **settings).step()
    if not parameter.isfinite().all():
        raise ValueError("a step leaves no finite weights")


def takes_tensor_rates(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a step of this optimizer can read its learning rates from the device."""
    return isinstance(optimizer, FUSED_OPTIMIZERS) and bool(optimizer.defaults.get("fused"))


def round_learning_rates(optimizer: torch.optim.Optimizer) -> None:
    """Round what the schedule has set to float32, which a tensor on the device holds: every kind of step computes
    with the same numbers."""
    for group in optimizer.param_groups:
        group["lr"] = float(np.float32(group["lr"]))


def create_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer) -> Any:
    """Build timm's schedule, stepped once an epoch."""
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=recipe.sched,
        num_epochs=max(1, recipe.epochs),  # of a stage without epochs nothing is read
        decay_milestones=recipe.decay_milestones,
        decay_rate=recipe.decay_rate,
        min_lr=recipe.min_lr,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.warmup_lr,
    )
    return schedule


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
    def of(cls, recipe: Recipe, device: torch.device) -> "Precision":
        """Choose from the recipe: mixed precision is on for CUDA unless the recipe says otherwise."""
        enabled = device.type == "cuda" if recipe.amp is None else recipe.amp
        if not enabled:
            return cls(None, None)
        dtype = torch.bfloat16 if recipe.amp_dtype == "bfloat16" else torch.float16
        scaler = NativeScaler(device=device.type) if dtype is torch.float16 else None
        return cls(dtype, scaler)
