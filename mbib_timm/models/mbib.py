"""The MBIB network: a backbone tapped at several depths, a bottleneck z, and a classifier on each.

    x -> CNN1 -> v1 -> CNN2 -> v2 -> CNN3 -> v3 -> FC -> z        (figure 2)
                 |            |            |            |
               h(v1)        u(v2)        f(v3)        g(z)

The prediction is the mean of the logits f(v3) and g(z). All other classifiers serve training only; evaluation
does not compute them. BIB is the same network with v3 alone (figure 1).
"""

from collections import namedtuple
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers import SelectAdaptivePool2d, get_device_dtype
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from mbib_timm.errors import MbibError, unknown_name
from mbib_timm.models.heads import Bottleneck, Observation, linear
from mbib_timm.models.taps import resolve_taps, truncate

__all__ = ["MBIB"]

PREDICTIONS = ("mean", "v", "z")
POOL_TYPES = ("avg", "max", "avgmax", "fastavg", "fastmax", "fastavgmax")

# A training forward pass returns its logits under the heads' names. The types are kept here and not in the model,
# so that models can be pickled.
_LOGITS_TYPES: dict[tuple[str, ...], Any] = {}


def _logits_type(names: tuple[str, ...]) -> Any:
    if names not in _LOGITS_TYPES:
        _LOGITS_TYPES[names] = namedtuple("Logits", names)
    return _LOGITS_TYPES[names]


class MBIB(nn.Module):
    """Mixture of Balanced Information Bottlenecks on any timm backbone that supports ``features_only``.

    In training, `forward` returns the logits of every head, (B, K) each, as a named tuple in the order of
    `head_names`. In evaluation it returns one tensor (B, K), the mean of the last observation's and z's logits.

    Args:
        backbone: timm model that is tapped, e.g. ``resnet50`` or ``convnext_tiny``.
        taps: levels to observe, in order of depth: indices into the backbone's ``feature_info`` (negative ones
            count from the end), names of its modules (``layer2.4``), and first, if wanted, ``"input"``.
        num_classes: classes K; 0 for none.
        in_chans: channels of the images.
        global_pool: timm pooling type of every observation; those that keep the width.
        bottleneck_features: width of z; that of the last observation when None.
        bottleneck_act: ReLU after z's normalisation.
        observation_norm: normalise the pooled observations.
        prediction: what predicts: the ``"mean"`` of the last observation's and z's logits; or ``"v"`` or ``"z"``, a
            network whose last observation, or whose z, is the only one of the two to have a classifier. With balanced
            softmax cross-entropy and one tap these are BSCE and BSCE_MLP of Tables 5 and 7.
        training_heads: build the classifiers that serve training only.
        training_logits: ``"all"``, or ``"mean"`` to return the mean in training too, for training loops that
            expect one tensor, such as timm's train.py; see `set_training_logits`.
        drop_rate: dropout before the classifiers.
        drop_path_rate: stochastic depth of the backbone.
        img_size: image size, for backbones whose parameters depend on it.
        backbone_args: further keyword arguments of the backbone.

    Raises:
        MbibError: unknown taps, pooling or prediction, with the valid ones.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        taps: Sequence[int | str] = (-3, -2, -1),
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        bottleneck_features: int | None = None,
        bottleneck_act: bool = True,
        observation_norm: bool = True,
        prediction: str = "mean",
        training_heads: bool = True,
        training_logits: str = "all",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
        backbone_args: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if global_pool not in POOL_TYPES:
            raise unknown_name("global_pool (of the types that keep the width)", str(global_pool), POOL_TYPES)
        if prediction not in PREDICTIONS:
            raise unknown_name("prediction", str(prediction), PREDICTIONS)
        self.backbone_name = backbone
        self.backbone_args = dict(backbone_args or {})
        if img_size is not None:
            self.backbone_args["img_size"] = img_size
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.observes_input = len(taps) > 0 and taps[0] == "input"
        levels = resolve_taps(backbone, taps[1:] if self.observes_input else taps, self.backbone_args)

        optional = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
        self.backbone = timm.create_model(
            backbone,
            features_only=True,
            out_indices=levels,
            in_chans=in_chans,
            **optional,
            **self.backbone_args,
            **dd,
        )
        self.channels_last = str(getattr(self.backbone, "output_fmt", "NCHW")).endswith("NHWC")
        # The levels of this model are the tapped levels of the backbone.
        self.feature_info = [
            dict(num_chs=info["num_chs"], reduction=info["reduction"], module=f"backbone.{info['module']}")
            for info in self.backbone.feature_info.get_dicts()
        ]
        channels = [info["num_chs"] for info in self.feature_info]
        names = [*["x"] * self.observes_input, *(f"v{i}" for i in range(1, len(levels) + 1))]
        widths = dict(zip(names, [in_chans] * self.observes_input + channels, strict=True))
        shallow = names[:-1] if training_heads else []
        self.predicts_from_v, self.predicts_from_z = prediction != "z", prediction != "v"
        self.prediction_heads = (names[-1],) * self.predicts_from_v + ("z",) * self.predicts_from_z
        self.head_names = (*shallow, *self.prediction_heads)
        self.training_logits = "all"
        self.set_training_logits(training_logits)

        self.global_pool = self._pool(global_pool)
        self.input_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        self.num_features = self.head_hidden_size = channels[-1]
        self.training_heads = nn.ModuleDict(
            {name: Observation(widths[name], num_classes, observation_norm, drop_rate, **dd) for name in shallow}
        )
        # Without a classifier of its own the last observation is what z is made of.
        observed_classes = num_classes if self.predicts_from_v else 0
        self.observation = Observation(channels[-1], observed_classes, observation_norm, drop_rate, **dd)
        self.bottleneck: nn.Module = nn.Identity()
        if self.predicts_from_z:
            self.bottleneck = Bottleneck(
                channels[-1], bottleneck_features or channels[-1], num_classes, bottleneck_act, drop_rate, **dd
            )

    def _pool(self, pool_type: str) -> SelectAdaptivePool2d:
        return SelectAdaptivePool2d(
            pool_type=pool_type, flatten=bool(pool_type), input_fmt="NHWC" if self.channels_last else "NCHW"
        )

    @torch.jit.ignore
    def set_training_logits(self, mode: str) -> None:
        """Choose what training returns.

        Args:
            mode: ``"all"``: the logits of every head; ``"mean"``: what evaluation returns. With ``"mean"`` the
                training-only heads get no gradient; build the model with ``training_heads=False`` for DDP.
        """
        if mode not in ("all", "mean"):
            raise unknown_name("training_logits", str(mode), ("all", "mean"))
        self.training_logits = mode

    @torch.jit.ignore
    def remove_training_heads(self) -> None:
        """Remove the classifiers that serve training only; the prediction stays the same."""
        self.training_heads = nn.ModuleDict()
        self.head_names = self.prediction_heads

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass, where the backbone can."""
        if not hasattr(self.backbone, "set_grad_checkpointing"):
            raise MbibError(f"backbone {self.backbone_name!r} does not support gradient checkpointing")
        self.backbone.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of the backbone's parameters that take no weight decay."""
        inner = getattr(self.backbone, "model", self.backbone)
        listed: set[str] = getattr(inner, "no_weight_decay", set)()
        prefix = "backbone." if inner is self.backbone else "backbone.model."
        return {prefix + name for name in listed}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the parameter groups in order of depth: stem, then stages (coarse) or blocks; heads come last."""
        stages = r"(?:model\.|body\.)?(?:layers?|stages?|blocks?|features|s)[._]?"
        stage = rf"^backbone\.{stages}(\d+)"
        block = r"[._](?:blocks[._]|b)?(\d+)\."
        return dict(
            stem=rf"^backbone\.(?!{stages}\d)",
            blocks=stage if coarse else [(stage + block, None), (stage, None)],
        )

    @torch.jit.ignore
    def get_classifier(self) -> tuple[nn.Module, ...]:
        """Return the classifiers, in the order of `head_names`."""
        return tuple(head.classifier for head in self._heads())

    def _heads(self) -> list[Any]:
        predicting = [self.observation] * self.predicts_from_v + [self.bottleneck] * self.predicts_from_z
        return [*self.training_heads.values(), *predicting]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace every classifier.

        Args:
            num_classes: classes K; with 0, `forward` returns the last observation, (B, `head_hidden_size`).
            global_pool: pooling type; None keeps it, ``""`` (with no classes) returns the unpooled map.
        """
        if global_pool is not None:
            if global_pool == "" and num_classes > 0:
                raise MbibError("the classifiers need pooled observations: global_pool='' goes with num_classes=0")
            if global_pool not in (*POOL_TYPES, ""):
                raise unknown_name("global_pool (of the types that keep the width)", global_pool, POOL_TYPES)
            self.global_pool = self._pool(global_pool)
        self.num_classes = num_classes
        for head in self._heads():
            fresh = linear(head.num_features, num_classes, **get_device_dtype(self))
            reference = next(head.classifier.parameters(), None)
            if reference is not None:
                fresh.requires_grad_(reference.requires_grad)
            head.classifier = fresh.train(head.classifier.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last tapped map, in the backbone's format, e.g. (B, C, H, W)."""
        return self.backbone(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the prediction (B, K) from the last map; with `pre_logits` the last observation v (B, C)."""
        x = self.global_pool(x)
        if self.global_pool.pool_type == "":
            return x
        v = self.observation.norm(x)
        if pre_logits or self.num_classes == 0:
            return v
        if not self.predicts_from_z:
            return self.observation.classifier(self.observation.drop(v))
        if not self.predicts_from_v:
            return self.bottleneck(v)
        return (self.observation.classifier(self.observation.drop(v)) + self.bottleneck(v)) / 2

    @torch.jit.ignore
    def forward_heads(self, x: Tensor) -> Any:
        """Return the logits (B, K) of every head, as a named tuple in the order of `head_names`, in any mode."""
        maps = self.backbone(x)
        logits = []
        if len(self.training_heads):
            pooled = [self.input_pool(x)] if self.observes_input else []
            pooled += [self.global_pool(m) for m in maps[:-1]]
            logits = [head(p) for head, p in zip(self.training_heads.values(), pooled, strict=True)]
        v = self.observation.norm(self.global_pool(maps[-1]))
        if self.predicts_from_v:
            logits.append(self.observation.classifier(self.observation.drop(v)))
        if self.predicts_from_z:
            logits.append(self.bottleneck(v))
        return _logits_type(self.head_names)(*logits)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.training_logits == "all" and self.num_classes > 0 and not torch.jit.is_scripting():
            return self.forward_heads(x)
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the last map and the chosen tapped maps (all by default), as timm's models do.

        `indices` count the levels of `feature_info`, which are the taps. `norm` and `stop_early` are accepted for
        timm's callers: the maps have no final norm, and the backbone ends at the last tap.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        take_indices, _ = feature_take_indices(len(self.feature_info), indices)
        maps = list(self.backbone(x))
        if self.channels_last:
            maps = [m.permute(0, 3, 1, 2).contiguous() for m in maps]
        intermediates = [maps[i] for i in take_indices]
        return intermediates if intermediates_only else (maps[-1], intermediates)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what lies after the last chosen tap, and the classifiers with it."""
        take_indices, last = feature_take_indices(len(self.feature_info), indices)
        shortened = last < len(self.feature_info) - 1
        if shortened:
            truncate(self.backbone, last)
            self.feature_info = self.feature_info[: last + 1]
            channels = self.feature_info[-1]["num_chs"]
            self.num_features = self.head_hidden_size = channels
            dd = get_device_dtype(self)
            self.training_heads = nn.ModuleDict()
            self.observation = Observation(channels, 0, **dd)
            if self.predicts_from_z:
                self.bottleneck = Bottleneck(channels, channels, 0, **dd)
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take_indices
