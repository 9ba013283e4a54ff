"""Parameters and multiply-accumulates (MACs) of a model, as Table 6 of the paper counts them."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from mbib_timm.models.heads import CosineClassifier


def count_parameters(model: nn.Module) -> int:
    """Return the number of learnable parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """Count the operations of one forward pass over one image, by kind of layer.

    A multiply-accumulate of a convolution, linear layer or classifier counts 1; BatchNorm counts 2 per output
    element, ReLU and pooling 1 per input element: the convention that gives Table 6's 27.93 G at 3x640x640. Runs in
    the mode the model is in, except that BatchNorm uses its running statistics; on the meta device it needs no memory.

    Args:
        model: a model on any device.
        input_size: image size (C, H, W).

    Returns:
        MACs of ``conv``, ``linear``, ``norm``, ``act`` and ``pool`` layers, and their sum as ``total``.
    """
    macs: Counter[str] = Counter(conv=0, linear=0, norm=0, act=0, pool=0)

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(module, nn.Conv2d):
            macs["conv"] += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear | CosineClassifier):
            macs["linear"] += output.numel() * module.in_features
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            macs["norm"] += 2 * output.numel()
        elif isinstance(module, nn.ReLU):
            macs["act"] += inputs[0].numel()
        elif isinstance(module, nn.AdaptiveAvgPool2d | nn.MaxPool2d | nn.AvgPool2d):
            macs["pool"] += inputs[0].numel()

    leaves = [module for module in model.modules() if not list(module.children())]
    norms = [m for m in leaves if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for norm in norms:
        norm.eval()
    handles = [module.register_forward_hook(count) for module in leaves]
    parameter = next(model.parameters())
    try:
        with torch.no_grad():
            model(torch.empty(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for norm in norms:
            norm.train()
    return {**macs, "total": sum(macs.values())}
