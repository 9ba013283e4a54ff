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

import timm
import torch
from torch import Tensor, nn

from mbib_timm.errors import MbibError, unknown_name
from mbib_timm.models.backbones import (
    MultiHeadModel,
    PooledModel,
    Taps,
    backbone_traits,
    prefixed_levels,
    resolve_taps,
    set_token_pool,
    token_pools,
)
from mbib_timm.models.head_outputs import POOLED
from mbib_timm.models.heads import BOTTLENECKS, KAIMING, Bottleneck, Observation, create_classifier

__all__ = ["MBIB"]

# The head on the bottleneck, and the bottleneck among the features.
BOTTLENECK = "z"
PREDICTIONS = ("mean", "v", "z")


def _mean(maps: Tensor) -> Tensor:
    """Return the means (B, C) of maps (B, C, H, W)."""
    return maps.mean(dim=(2, 3))


class MBIB(PooledModel, MultiHeadModel):
    """Mixture of Balanced Information Bottlenecks on any timm backbone that has ``forward_intermediates``.

    In training, `forward` returns the logits of every head, (B, K) each, as a tuple in the order of `head_names`. In
    evaluation it returns one tensor (B, K), the mean of the last observation's and z's logits.

    `backbone` is the timm model itself, without the layers that follow the last tap. The keys of its weights are
    ``backbone.<timm's key>``, and `feature_info` has the backbone's levels.

    Args:
        backbone: timm model that is tapped, e.g. ``resnet50`` or ``convnext_tiny``.
        taps: levels to observe, in order of depth. A level is an index into the backbone's ``feature_info`` (negative
            ones count from the end), the name of a module (``layer2.4``), ``"input"`` as the first, or, if the
            backbone has layers behind its last level, ``"features"`` as the last. A number instead of a list lets the
            model choose that many levels. A transformer's levels pass through its last normalisation.
        num_classes: classes K; 0 for none.
        in_chans: channels of the images.
        global_pool: timm pooling type of every observation. For feature maps, any that keeps the width; ``avg`` when
            None. For a transformer with tokens, ``token``, ``avg``, or its own, such as ``map``; its own when None.
            Attention pooling is used only at the end, where it was trained; before that, patches are averaged.
        bottleneck_features: width of z; that of the last observation when None.
        bottleneck_layers: layers that compute z, in order: ``"fc-norm-relu"``, ``"fc-relu-norm"`` or ``"fc-norm"``.
        raw_observations: observations are the pooled maps without normalisation, z is computed from these, and the
            normalisation of each observation belongs to its classifier.
        head_init: initialisation of the heads' linear layers: ``"kaiming"`` or ``"torch"``.
        prediction: the ``"mean"`` of the logits of the last observation and z; or only ``"v"`` or ``"z"``: then the
            other of the two has no classifier. With balanced softmax cross-entropy and one tap, these are BSCE and
            BSCE_MLP of Tables 5 and 7.
        training_heads: build the classifiers that only training uses.
        training_logits: ``"all"``, or ``"mean"`` to return the mean in training too, for training loops that
            expect one tensor, such as timm's train.py; see `set_training_logits`.
        drop_rate: dropout before the classifiers.
        drop_path_rate: stochastic depth of the backbone.
        classifier: kind of every classifier, see `create_classifier`.
        classifier_scale: scale of cosine classifiers.
        img_size: image size, for backbones whose parameters depend on it.
        backbone_args: further keyword arguments of the backbone.

    Raises:
        MbibError: unknown taps, pooling, prediction or classifier, with the valid ones.
    """

    __jit_unused_properties__ = ("pooled_widths", "taps")
    __constants__ = ("reads_tokens",)

    def __init__(
        self,
        backbone: str = "resnet50",
        taps: int | Sequence[int | str] = 3,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str | None = None,
        bottleneck_features: int | None = None,
        bottleneck_layers: str = BOTTLENECKS[0],
        raw_observations: bool = False,
        head_init: str = KAIMING,
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
        if prediction not in PREDICTIONS:
            raise unknown_name("prediction", str(prediction), PREDICTIONS)
        self.backbone_name = backbone
        self.backbone_args = dict(backbone_args or {})
        if img_size is not None:
            self.backbone_args["img_size"] = img_size
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.observes_input = not isinstance(taps, int) and [*taps[:1]] == ["input"]
        observed = taps if isinstance(taps, int) else taps[self.observes_input :]
        self.tapping = resolve_taps(backbone, observed, self.backbone_args)
        optional = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
        # With its classifier, so that a seed gives the weights that it gives the plain backbone.
        self.backbone = timm.create_model(backbone, in_chans=in_chans, **optional, **self.backbone_args, **dd)
        self.backbone.reset_classifier(0)
        self._traits = backbone_traits(self.backbone)
        self.tapping.prune(self.backbone)
        levels = prefixed_levels(self.backbone.feature_info)
        last = self.taps[-1]
        self.feature_info = levels[: last + 1] if isinstance(last, int) else levels
        self.reads_tokens, self.ends_with_backbone = self.tapping.tokens, self.tapping.ends_with_backbone
        self.set_pool(self.default_pool() if global_pool is None else global_pool, num_classes)

        channels = [self.tapping.width(tap, self.backbone) for tap in self.taps]
        names = [*["x"] * self.observes_input, *(f"v{i}" for i in range(1, len(channels) + 1))]
        widths = dict(zip(names, [in_chans] * self.observes_input + channels, strict=True))
        shallow = names[:-1] if training_heads else []
        self.predicts_from_v, self.predicts_from_z = prediction != "z", prediction != "v"
        self.bottleneck_head: str | None = BOTTLENECK if self.predicts_from_z else None
        self.prediction_heads = (names[-1],) * self.predicts_from_v + (BOTTLENECK,) * self.predicts_from_z
        self.head_names = (*shallow, *self.prediction_heads)
        self.set_training_logits(training_logits)

        self.num_features = self.head_hidden_size = channels[-1]
        self.classifier_kind, self.classifier_scale, self.head_init = classifier, classifier_scale, head_init
        create = partial(create_classifier, classifier, scale=classifier_scale, init=head_init)
        self.training_heads = nn.ModuleDict(
            {
                name: Observation(widths[name], num_classes, True, drop_rate, create, raw_observations, **dd)
                for name in shallow
            }
        )
        # Without a classifier of its own the last observation is what z is made of.
        observed_classes = num_classes if self.predicts_from_v else 0
        norm = self.predicts_from_v or not raw_observations  # of a raw one without classifier nothing uses it
        self.observation = Observation(channels[-1], observed_classes, norm, drop_rate, create, raw_observations, **dd)
        self.bottleneck: nn.Module = nn.Identity()
        if self.predicts_from_z:
            width = channels[-1] if bottleneck_features is None else bottleneck_features
            linear = partial(create_classifier, "linear", init=head_init)
            self.bottleneck = Bottleneck(
                channels[-1], width, num_classes, bottleneck_layers, drop_rate, linear, create, **dd
            )

    @torch.jit.ignore
    def remove_training_heads(self) -> None:
        """Remove the classifiers that serve training only; the prediction stays the same."""
        self.training_heads = nn.ModuleDict()
        self.head_names = self.prediction_heads
        self.name_classifiers()
        if hasattr(self, "_model_args"):  # what timm saves with the model
            self._model_args: Any = {**self._model_args, "training_heads": False}

    @torch.jit.ignore
    def record_choices(self) -> None:
        """Record among the arguments that timm saves with a model what later defaults might choose otherwise.

        timm adds the caller's own arguments, and `global_pool`.
        """
        taps = ["input"] * self.observes_input + [*self.taps]
        self._model_args = {**self._model_args, "backbone": self.backbone_name, "taps": taps}

    def _heads(self) -> list[Any]:
        predicting = [self.observation] * self.predicts_from_v + [self.bottleneck] * self.predicts_from_z
        return [*self.training_heads.values(), *predicting]

    @property
    def taps(self) -> tuple[int | str, ...]:
        """What is observed of the backbone: levels, and at last, it may be, ``"features"``."""
        return self.tapping.observed

    @torch.jit.ignore
    def default_pool(self) -> str:
        """Return how observations are pooled where nobody says how: as the backbone does, where it is of tokens."""
        return token_pools(self.backbone)[0] if self.reads_tokens else super().default_pool()

    @torch.jit.ignore
    def set_pool(self, global_pool: str, num_classes: int) -> None:
        """Choose how observations are pooled. Raises PoolingError for a type that the heads cannot take."""
        if not self.reads_tokens or (global_pool == "" and num_classes > 0):
            return super().set_pool(global_pool, num_classes)
        if global_pool:
            set_token_pool(self.backbone, global_pool)
        self.global_pool = self.pool_type = global_pool

    def forward_features(self, x: Tensor) -> Tensor:
        """Return what is observed last: a map (B, C, H, W), or a transformer's tokens (B, N, C)."""
        if not torch.jit.is_scripting():
            return self.tapping.read(self.backbone, x, last=True)[0]
        return self.backbone.forward_features(x)  # see __prepare_scriptable__

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the prediction (B, K) from the last map; with `pre_logits` the last observation v (B, C)."""
        return self._predict(self._pool(x), pre_logits)

    def _pool(self, x: Tensor) -> Tensor:
        """Return what is observed last as vectors (B, C)."""
        if self.reads_tokens:
            return x if self.pool_type == "" else self.backbone.forward_head(x, pre_logits=True)
        return self.global_pool(x)

    def _predict(self, pooled: Tensor, pre_logits: bool = False) -> Tensor:
        """Return what `forward_head` does from the pooled last map (B, C); an unpooled map as it is."""
        if self.pool_type == "":
            return pooled
        v = self.observation.embed(pooled)
        if pre_logits or self.num_classes == 0:
            return v
        if not self.predicts_from_z:
            return self.observation.classify(v)
        if not self.predicts_from_v:
            return self.bottleneck(v)
        return (self.observation.classify(v) + self.bottleneck(v)) / 2

    @property
    def pooled_widths(self) -> tuple[int, ...]:
        """Widths of what `pool_features` returns."""
        observations: list[Any] = [*self.training_heads.values(), self.observation]
        return tuple(observation.num_features for observation in observations)

    @torch.jit.ignore
    def _pool_features(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the pooled vectors (B, C_i) that the heads stand on, in order of depth: one for each observation.

        Nothing else of a forward pass reads the backbone. With ``global_pool=''`` they are unpooled maps.
        """
        last = not len(self.training_heads)
        whole = self.tapping.prefix and getattr(self.backbone, "attn_pool", None) is None
        *shallow, end = self.tapping.read(self.backbone, x, last, whole)
        pool = self._pool if whole or not self.reads_tokens else _mean
        image = [] if last or not self.observes_input else [(_mean if self.reads_tokens else self.global_pool)(x)]
        return (*image, *(pool(each) for each in shallow), self._pool(end))

    @torch.jit.ignore
    def forward_pooled(self, pooled: tuple[Tensor, ...]) -> Any:
        """Return what `forward` does, from what `pool_features` returns."""
        return self._observe_pooled(pooled)[0] if self._gives_all_heads() else self._predict(pooled[-1])

    @torch.jit.ignore
    def _observe(self, x: Tensor) -> tuple[tuple[Tensor, ...], dict[str, list[Tensor]]]:
        return self._observe_pooled(self.pool_features(x))

    @torch.jit.ignore
    def _observe_pooled(self, pooled: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], dict[str, list[Tensor]]]:
        logits = [head(p) for head, p in zip(self.training_heads.values(), pooled[:-1], strict=True)]
        v = self.observation.embed(pooled[-1])
        features = {POOLED: [v]}
        if self.predicts_from_v:
            logits.append(self.observation.classify(v))
        if self.predicts_from_z:
            bottleneck: Any = self.bottleneck
            z = bottleneck.embed(v)
            logits.append(bottleneck.classify(z))
            features[BOTTLENECK] = [z]
        return tuple(logits), features

    def _replace_heads(self, head: Observation, level: int) -> None:
        """Leave a single observation, of a level."""
        self.tapping, self.observes_input = Taps((level,), tokens=False, norm=False, prefix=False), False
        self.reads_tokens = self.ends_with_backbone = False
        self.training_heads = nn.ModuleDict()
        self.observation, self.bottleneck = head, nn.Identity()
        self.predicts_from_v, self.predicts_from_z, self.bottleneck_head = True, False, None
        self.head_names = self.prediction_heads = ("v1",)

    def __prepare_scriptable__(self) -> nn.Module:
        """Return the model to torch.jit.script, which cannot follow ``forward_intermediates`` and takes its last map
        from the backbone's ``forward_features``.

        Raises:
            MbibError: that is another map, as in Swin.
        """
        cfg: Any = getattr(self, "pretrained_cfg", {})
        size = self.backbone_args.get("img_size") or cfg.get("input_size", (3, 224, 224))[1:]
        height, width = (size, size) if isinstance(size, int) else size
        reference = next(self.parameters())
        x = torch.rand(1, self.in_chans, height, width, device=reference.device, dtype=reference.dtype)
        training = [module for module in self.backbone.modules() if module.training]
        self.backbone.eval()
        with torch.no_grad():
            (expected,), given = self.tapping.read(self.backbone, x, last=True), self.backbone.forward_features(x)
        for module in training:
            module.training = True
        if expected.shape != getattr(given, "shape", None) or not (reference.is_meta or torch.equal(expected, given)):
            raise MbibError(
                f"torch.jit.script: forward_features of backbone {self.backbone_name!r} is not its last tap; "
                "use torch.export or torch.jit.trace"
            )
        return self
