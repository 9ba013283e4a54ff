"""Parameters and multiply-accumulates (MACs) of a model, as Table 6 of the paper counts them (section 4.7)."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from mbib_timm.models.heads import CosineClassifier

TABLE_6_SIZE = (640, 640)


def count_parameters(model: nn.Module) -> int:
    """Return the number of learnable parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(
    model: nn.Module, input_size: tuple[int, int, int], forward: Callable[[Tensor], Any] | None = None
) -> dict[str, int]:
    """Count the operations of one forward pass over one image, by kind of layer.

    A multiply-accumulate of a convolution, linear layer, classifier or product of attention counts 1; BatchNorm counts
    2 per output element, ReLU and pooling 1 per input element: the convention that gives Table 6's 27.93 G at
    3x640x640. Other normalisations and activations are not counted. Runs in the mode the model is in, except that
    BatchNorm uses its running statistics; on the meta device it needs no memory.

    Args:
        model: a model on any device.
        input_size: image size (C, H, W).
        forward: the model's forward pass, where it is not that of calling it.

    Returns:
        MACs of ``conv``, ``linear``, ``norm``, ``act`` and ``pool`` layers and of ``attention``, and their sum as
        ``total``.
    """
    macs: Counter[str] = Counter(conv=0, linear=0, norm=0, act=0, pool=0, attention=0)

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(module, nn.Conv2d):
            macs["conv"] += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear | CosineClassifier):
            macs["linear"] += output.numel() * module.in_features
        elif isinstance(module, _BatchNorm):
            macs["norm"] += 2 * output.numel()
        elif isinstance(module, nn.ReLU | nn.ReLU6):
            macs["act"] += inputs[0].numel()
        elif isinstance(module, nn.AdaptiveAvgPool2d | nn.MaxPool2d | nn.AvgPool2d):
            macs["pool"] += inputs[0].numel()

    # timm's BatchNorm of several parts is no leaf: it holds its activation.
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) or not list(m.children())]
    norms = [module for module in layers if isinstance(module, _BatchNorm) and module.training]
    for norm in norms:
        norm.training = False
    handles = [module.register_forward_hook(count) for module in layers]
    products = _Products()
    parameter = next(model.parameters())
    try:
        with torch.no_grad(), products:
            (forward or model)(torch.empty(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for norm in norms:
            norm.training = True
    macs["attention"] = products.macs
    return {**macs, "total": sum(macs.values())}


class _Products(TorchFunctionMode):
    """Counts the multiply-accumulates of products of two tensors, which are those of attention: layers have theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is nn.functional.scaled_dot_product_attention:
            query, key, value = args[:3]
            self.macs += query.numel() * key.shape[-2] + result.numel() * value.shape[-2]
        elif function in (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__):
            self.macs += result.numel() * args[0].shape[-1]
        return result


def activation_bytes(model: nn.Module, input_size: tuple[int, int, int]) -> int | None:
    """Return the bytes that a float32 training step keeps of one image for its gradients; without memory of its own.

    Args:
        model: in training mode, on any device; not changed.
        input_size: image size (C, H, W).

    Returns:
        The bytes; None for a model that cannot be tried on the meta device.
    """
    own: Any = copy.deepcopy(model).to("meta")
    weights = {tensor.untyped_storage()._cdata for tensor in (*own.parameters(), *own.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # views share one
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    images = 2  # BatchNorm takes no single value
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = own(torch.empty(images, *input_size, device="meta"))  # holds the graph, and so what it keeps
    except (NotImplementedError, RuntimeError, TypeError):
        return None
    del logits
    return sum(kept.values()) // images


@dataclass(frozen=True)
class Cost:
    """What a forward pass over one image takes.

    Attributes:
        parameters: learnable ones.
        macs: as `count_macs` has them.
    """

    parameters: int
    macs: int


@dataclass(frozen=True)
class Efficiency:
    """Costs of a model at one size of image.

    Attributes:
        input_size: (C, H, W).
        inference: of the prediction alone, without classifiers that serve training only.
        all_heads: of the logits of every head, which Table 6 counts; the same for a model of one head.
    """

    input_size: list[int]
    inference: Cost
    all_heads: Cost


def efficiency(model: nn.Module, input_size: tuple[int, int, int]) -> Efficiency:
    """Count a model's costs at Table 6's 3x640x640, in inference and with all heads.

    Args:
        model: on any device; not changed.
        input_size: of the image, (C, H, W).
    """
    complete: Any = copy.deepcopy(model).to("meta").eval()
    bare: Any = copy.deepcopy(complete)
    if hasattr(bare, "remove_training_heads"):
        bare.remove_training_heads()
    all_heads = getattr(complete, "forward_heads", None)
    return Efficiency(
        list(input_size),
        Cost(count_parameters(bare), count_macs(bare, input_size)["total"]),
        Cost(count_parameters(complete), count_macs(complete, input_size, all_heads)["total"]),
    )
