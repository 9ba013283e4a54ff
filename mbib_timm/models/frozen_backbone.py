"""A backbone taken out of its model while the model's heads train on features of it that are at hand.

A stand-in without weights takes its place: the model's images are then features (B, D, 1, 1), maps of one pixel whose
channels are all that the backbone observes, side by side. Losses, evaluation, moving averages and checkpoints see an
ordinary model, of heads alone. `FrozenBackbone.put_back` makes it whole.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mbib_timm.errors import MbibError
from mbib_timm.models.backbones import PREFIX, PooledModel, StoredFeatures, weights_digest
from mbib_timm.models.head_outputs import cache_sized


class FrozenBackbone:
    """A backbone that observes images and does not train.

    Args:
        network: a model that holds a backbone, or one around it, on its device; a stand-in takes the backbone's place.
        autocast_dtype: of mixed precision; None for full precision.

    Attributes:
        width: D, of all that it observes of an image.
        dtype: of the features: float16 in mixed precision, else float32.
        digest: of the weights, and of what is observed.

    Raises:
        MbibError: a network whose heads do not stand on one backbone.
    """

    def __init__(self, network: nn.Module, autocast_dtype: torch.dtype | None = None) -> None:
        model = _model_in(network)
        self.autocast_dtype = autocast_dtype
        self.backbone: Any = model.backbone.eval().requires_grad_(False)
        self.width = sum(model.pooled_widths)
        self.dtype = torch.float32 if autocast_dtype is None else torch.float16
        self.digest = _digest(model)
        model.backbone = StoredFeatures(model.pooled_widths)
        self._observer: Any = copy.deepcopy(model).eval()
        self._observer.backbone = self.backbone

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features (B, D) of images (B, C, H, W)."""
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return torch.cat([self._observed(batch) for batch in cache_sized(images)])

    def _observed(self, images: Tensor) -> Tensor:
        return torch.cat([pooled.float() for pooled in self._observer.pool_features(images)], dim=1)

    def put_back(self, model: nn.Module) -> None:
        """Give the backbone back to a model that has the stand-in."""
        _model_in(model).backbone = self.backbone

    def state_dict(self) -> dict[str, Tensor]:
        """Return the backbone's weights under the model's keys."""
        return {PREFIX + name: value for name, value in self.backbone.state_dict().items()}


def _model_in(network: nn.Module) -> Any:
    for module in network.modules():
        if isinstance(module, PooledModel):
            return module
    raise MbibError(
        f"recipe key 'feature_passes': the heads of {type(network).__name__} do not stand on one backbone; expected a "
        "plain timm model, or mbib, bib or with_classifier on one"
    )


def _digest(model: Any) -> str:
    observed = [type(model).__name__, model.backbone_name, model.backbone_args, model.pooled_widths]
    observed += [getattr(model, "taps", None), str(getattr(model, "global_pool", None))]
    return weights_digest(model.backbone.state_dict(), repr(observed))
