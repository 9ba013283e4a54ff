"""The MBIB network: a backbone tapped at several depths, a bottleneck z, and a classifier on each.

    x -> CNN1 -> v1 -> CNN2 -> v2 -> CNN3 -> v3 -> FC -> z        (figure 2)
                 |            |            |            |
               h(v1)        u(v2)        f(v3)        g(z)

The prediction is the mean of the logits f(v3) and g(z). All other classifiers serve training only; evaluation
does not compute them. BIB is the same network with v3 alone (figure 1).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d, get_device_dtype
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from mbib_timm.errors import MbibError, unknown_name
from mbib_timm.models.classifiers import create_classifier, renew_classifier
from mbib_timm.models.heads import Bottleneck, Observation
from mbib_timm.models.taps import PREFIX, create_tapped, prefixed_groups, prefixed_levels, resolve_taps
from mbib_timm.models.weights import classifier_names

__all__ = ["MBIB"]

PREDICTIONS = ("mean", "v", "z")
POOL_TYPES = ("avg", "max", "avgmax", "fastavg", "fastmax", "fastavgmax")


class PoolingError(MbibError, AssertionError):
    """A pooling type that the model cannot take; an AssertionError as well, as timm's callers expect."""


class MBIB(nn.Module):
    """Mixture of Balanced Information Bottlenecks on any timm backbone that has ``forward_intermediates``.

    In training, `forward` returns the logits of every head, (B, K) each, as a tuple in the order of `head_names`. In
    evaluation it returns one tensor (B, K), the mean of the last observation's and z's logits.

    `backbone` is timm's model itself, without what follows its last tap: the keys of its weights are
    ``backbone.<timm's key>``. The levels of `feature_info` are the backbone's.

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
        classifier: kind of every classifier, see `create_classifier`.
        classifier_scale: of cosine classifiers.
        img_size: image size, for backbones whose parameters depend on it.
        backbone_args: further keyword arguments of the backbone.

    Raises:
        MbibError: unknown taps, pooling, prediction or classifier, with the valid ones.
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
        classifier: str = "linear",
        classifier_scale: float | None = None,
        img_size: int | tuple[int, int] | None = None,
        backbone_args: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self._require_pooling(global_pool, num_classes)
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
        self.taps = resolve_taps(backbone, taps[1:] if self.observes_input else taps, self.backbone_args)
        optional = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
        self.backbone = create_tapped(backbone, self.taps, in_chans=in_chans, **optional, **self.backbone_args, **dd)
        self.feature_info = prefixed_levels(self.backbone.feature_info)[: self.taps[-1] + 1]

        channels = [self.feature_info[level]["num_chs"] for level in self.taps]
        names = [*["x"] * self.observes_input, *(f"v{i}" for i in range(1, len(channels) + 1))]
        widths = dict(zip(names, [in_chans] * self.observes_input + channels, strict=True))
        shallow = names[:-1] if training_heads else []
        self.predicts_from_v, self.predicts_from_z = prediction != "z", prediction != "v"
        self.bottleneck_head: str | None = "z" if self.predicts_from_z else None
        self.prediction_heads = (names[-1],) * self.predicts_from_v + ("z",) * self.predicts_from_z
        self.head_names = (*shallow, *self.prediction_heads)
        self.training_logits = "all"
        self.set_training_logits(training_logits)

        self.global_pool = _pool(global_pool)
        self.num_features = self.head_hidden_size = channels[-1]
        self.classifier_kind, self.classifier_scale = classifier, classifier_scale
        create = partial(create_classifier, classifier, scale=classifier_scale)
        self.training_heads = nn.ModuleDict(
            {
                name: Observation(widths[name], num_classes, observation_norm, drop_rate, create, **dd)
                for name in shallow
            }
        )
        # Without a classifier of its own the last observation is what z is made of.
        observed_classes = num_classes if self.predicts_from_v else 0
        self.observation = Observation(channels[-1], observed_classes, observation_norm, drop_rate, create, **dd)
        self.bottleneck: nn.Module = nn.Identity()
        if self.predicts_from_z:
            width = bottleneck_features or channels[-1]
            self.bottleneck = Bottleneck(channels[-1], width, num_classes, bottleneck_act, drop_rate, create, **dd)

    def _require_pooling(self, pool_type: str, num_classes: int) -> None:
        """Raise PoolingError unless the heads can take what the pooling gives."""
        if pool_type == "" and num_classes > 0:
            raise PoolingError("the classifiers need pooled observations: global_pool='' goes with num_classes=0")
        if pool_type not in (*POOL_TYPES, ""):
            error = unknown_name("global_pool (of the types that keep the width)", str(pool_type), POOL_TYPES)
            raise PoolingError(str(error))

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
        self.name_classifiers()

    @torch.jit.ignore
    def name_classifiers(self) -> None:
        """Write the classifiers' names into the model's cfg, where it has one: they depend on its arguments."""
        cfg: Any = getattr(self, "pretrained_cfg", None)
        if cfg is not None and self.num_classes > 0:
            cfg["classifier"] = classifier_names(self)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass instead of keeping them."""
        self.backbone.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of the backbone's parameters that take no weight decay."""
        return {PREFIX + name for name in getattr(self.backbone, "no_weight_decay", set)()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Any:
        """Return the backbone's parameter groups, in order of depth; the heads come last."""
        return prefixed_groups(self.backbone, coarse)

    @torch.jit.ignore
    def get_classifier(self) -> tuple[nn.Module, ...]:
        """Return the classifiers, in the order of `head_names`."""
        return tuple(head.classifier for head in self._heads())

    def _heads(self) -> list[Any]:
        predicting = [self.observation] * self.predicts_from_v + [self.bottleneck] * self.predicts_from_z
        return [*self.training_heads.values(), *predicting]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace every classifier by one of the same kind.

        Args:
            num_classes: classes K; with 0, `forward` returns the last observation, (B, `head_hidden_size`).
            global_pool: pooling type; None keeps it, ``""`` (with no classes) returns the unpooled map. Classes after
                ``""``, without a type, are on average-pooled observations.

        Raises:
            PoolingError: a pooling type that the heads cannot take.
        """
        if global_pool is None and self.global_pool.pool_type == "" and num_classes > 0:
            global_pool = "avg"
        if global_pool is not None:
            self._require_pooling(global_pool, num_classes)
            self.global_pool = _pool(global_pool).train(self.training)
        self.num_classes = num_classes
        kind, scale, dd = self.classifier_kind, self.classifier_scale, get_device_dtype(self)
        for head in self._heads():
            head.classifier = renew_classifier(head.classifier, kind, head.num_features, num_classes, scale, **dd)

    @torch.jit.ignore
    def _maps(self, x: Tensor, levels: Sequence[int]) -> list[Tensor]:
        """Return the backbone's maps (B, C, H, W) at some levels, in order of depth."""
        return self.backbone.forward_intermediates(x, indices=list(levels), output_fmt="NCHW", intermediates_only=True)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last tapped map, (B, C, H, W)."""
        if not torch.jit.is_scripting():
            return self._maps(x, self.taps[-1:])[0]
        return self.backbone.forward_features(x)  # see __prepare_scriptable__

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
    def forward_heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the logits (B, K) of every head, in the order of `head_names`, in any mode."""
        maps = self._maps(x, self.taps if len(self.training_heads) else self.taps[-1:])
        logits = []
        if len(self.training_heads):
            pooled = [self.global_pool(m) for m in ([x] if self.observes_input else []) + maps[:-1]]
            logits = [head(p) for head, p in zip(self.training_heads.values(), pooled, strict=True)]
        v = self.observation.norm(self.global_pool(maps[-1]))
        if self.predicts_from_v:
            logits.append(self.observation.classifier(self.observation.drop(v)))
        if self.predicts_from_z:
            logits.append(self.bottleneck(v))
        return tuple(logits)

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
        """Return the last map and the maps of the chosen levels (all of them by default), as timm's models do.

        The levels are those of `feature_info`: the backbone's, up to its last tap.
        """
        take, last = feature_take_indices(len(self.feature_info), indices)
        kwargs: dict[str, Any] = dict(norm=norm, stop_early=stop_early, output_fmt=output_fmt, intermediates_only=True)
        if intermediates_only:
            return self.backbone.forward_intermediates(x, indices=take, **kwargs)
        end = last if stop_early else len(self.feature_info) - 1
        levels = sorted({*take, end})
        maps = self.backbone.forward_intermediates(x, indices=levels, **kwargs)
        return maps[-1], [m for level, m in zip(levels, maps, strict=True) if level in take]

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what lies behind the last chosen level, and the heads with it.

        What is left is the backbone, with a classifier on its pooled last map where `reset_classifier` asks for one.
        """
        take, last = feature_take_indices(len(self.feature_info), indices)
        if not prune_head and last == len(self.feature_info) - 1:
            return take
        self.backbone.prune_intermediate_layers(take, prune_norm=prune_norm)
        self.feature_info = self.feature_info[: last + 1]
        self.taps, self.observes_input = (last,), False
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        self.training_heads = nn.ModuleDict()
        self.observation = Observation(self.num_features, 0, norm=False, drop_rate=self.drop_rate).train(self.training)
        self.bottleneck = nn.Identity()
        self.predicts_from_v, self.predicts_from_z, self.bottleneck_head = True, False, None
        self.head_names = self.prediction_heads = ("v1",)
        self.reset_classifier(0, "")
        return take

    def __prepare_scriptable__(self) -> nn.Module:
        """Return the model to torch.jit.script, which cannot follow ``forward_intermediates`` and takes its last map
        from the backbone's ``forward_features``.

        Raises:
            MbibError: that is another map, as in transformers.
        """
        cfg: Any = getattr(self, "pretrained_cfg", {})
        size = self.backbone_args.get("img_size") or cfg.get("input_size", (3, 224, 224))[1:]
        height, width = (size, size) if isinstance(size, int) else size
        reference = next(self.parameters())
        x = torch.rand(1, self.in_chans, height, width, device=reference.device, dtype=reference.dtype)
        training = [module for module in self.backbone.modules() if module.training]
        self.backbone.eval()
        with torch.no_grad():
            expected, given = self._maps(x, self.taps[-1:])[0], self.backbone.forward_features(x)
        for module in training:
            module.training = True
        if expected.shape != given.shape or not (reference.is_meta or torch.equal(expected, given)):
            raise MbibError(
                f"torch.jit.script: forward_features of backbone {self.backbone_name!r} is not its last tap; "
                "use torch.export or torch.jit.trace"
            )
        return self


def _pool(pool_type: str) -> SelectAdaptivePool2d:
    return SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
