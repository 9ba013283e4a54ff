"""A timm backbone inside a model: where it is observed, and what all models around one have in common.

The backbone is timm's model itself, under the keys ``backbone.<timm's key>``; what is the backbone's is left to it.
"""

import dataclasses
import hashlib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_origin

import timm
import torch
from timm.layers import SelectAdaptivePool2d, get_device_dtype
from timm.models import PretrainedCfg, get_model_traits

# timm gives these two no public name: the feature net over `forward_intermediates`, of which ours is a subclass, and
# how timm's models read the `indices` of that method. Whatever else needs them imports them from here.
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from mbib_timm.errors import MbibError, unknown_name
from mbib_timm.models.head_outputs import classifiers_of
from mbib_timm.models.heads import KAIMING, Observation, renew_classifier

# What a model that holds a backbone calls it: the first part of the backbone's keys.
PREFIX = "backbone."


def weights_digest(weights: Mapping[str, Tensor], about: str = "") -> str:
    """Return the SHA-256 of tensors by their names, types, shapes and bits, in the order that they come in.

    Args:
        weights: of any device.
        about: a text that counts as well.
    """
    digest = hashlib.sha256(about.encode())
    for name, value in weights.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def skeleton(backbone: str, backbone_args: Mapping[str, Any]) -> nn.Module:
    """Build the plain backbone on the meta device, without memory, to read its levels and its keys.

    Raises:
        MbibError: timm does not know the backbone.
    """
    require_backbone(backbone)
    return timm.create_model(backbone, device="meta", **backbone_args)


def require_backbone(name: str) -> None:
    """Raise MbibError where timm does not know a backbone, by its name without tag."""
    if not timm.is_model(name):
        raise unknown_name("backbone", name, timm.list_models())


@dataclass(frozen=True)
class Taps:
    """Where a backbone is observed.

    A backbone whose levels are all alike, a transformer mostly, has one normalisation at its end: every level is seen
    through it. What it observes last is the end of the network, cut behind the last tap, and pooled as the backbone
    pools.

    Attributes:
        observed: levels, as ascending indices into the backbone's ``feature_info``; at last, it may be, `FEATURES`.
        tokens: the levels are all alike, and the backbone gives tokens (B, N, C) that it pools itself.
        norm: the backbone's last normalisation is applied to every level.
        prefix: with the class token and registers before those of the patches, where a level is asked for them.
    """

    observed: tuple[int | str, ...]
    tokens: bool
    norm: bool
    prefix: bool

    @property
    def ends_with_backbone(self) -> bool:
        """True if what is observed last is what ``forward_features`` returns."""
        return self.tokens or self.observed[-1] == FEATURES

    def width(self, tap: int | str, backbone: Any) -> int:
        """Return the channels of what is observed at a tap."""
        if self.ends_with_backbone and tap == self.observed[-1]:
            return int(backbone.head_hidden_size if self.tokens else backbone.num_features)
        level = backbone.feature_info[tap]
        return int(level.get("num_chs_norm", level["num_chs"]) if self.norm else level["num_chs"])

    def prune(self, backbone: Any) -> None:
        """Remove from a backbone what lies behind the last tap."""
        if self.observed[-1] == FEATURES or not hasattr(backbone, "prune_intermediate_layers"):
            return
        ends = self.ends_with_backbone
        backbone.prune_intermediate_layers([*self.observed], prune_norm=not self.norm, prune_head=not ends)

    def read(self, backbone: Any, x: Tensor, last: bool, whole: bool = False) -> list[Tensor]:
        """Return what is observed, in order of depth.

        Args:
            backbone: cut by `prune`.
            x: images.
            last: the last observation alone.
            whole: before the last, tokens (B, N, C) with their prefix; else maps (B, C, H, W).
        """
        levels: list[Any] = [*(self.observed[-1:] if last else self.observed)]
        if not self.ends_with_backbone:
            return backbone.forward_intermediates(
                x, indices=levels, norm=self.norm, output_fmt="NCHW", intermediates_only=True
            )
        if len(levels) == 1:
            return [backbone.forward_features(x)]
        options = dict(output_fmt="NLC", return_prefix_tokens=True) if whole else dict(output_fmt="NCHW")
        end, found = backbone.forward_intermediates(x, indices=levels[:-1], norm=self.norm, **options)
        return [*(torch.cat((each[1], each[0]), dim=1) if isinstance(each, tuple) else each for each in found), end]


# Behind the last level, where a backbone has layers there: EfficientNet's last convolution. The name of that tap.
FEATURES = "features"


def resolve_taps(backbone: str, taps: int | Sequence[int | str], backbone_args: Mapping[str, Any]) -> Taps:
    """Return where a backbone is observed.

    Args:
        backbone: timm model name.
        taps: indices of levels, negative ones from the end, or names of the levels' modules, or at last `FEATURES`. A
            number of taps instead is spread over a backbone whose levels are all alike, and is of the last levels, and
            of what lies behind them, of any other: 3 are levels 3, 7 and 11 of 12, or the ends of the last stages.
        backbone_args: keyword arguments of the backbone.

    Raises:
        MbibError: an unknown backbone or tap, a backbone that timm cannot tap, no tap, or taps that are not in order
            of depth.
    """
    plain: Any = skeleton(backbone, backbone_args)
    if not hasattr(plain, "forward_intermediates") or not getattr(plain, "feature_info", None):
        raise MbibError(f"backbone {backbone!r} cannot be tapped: it has no forward_intermediates, as timm's models do")
    levels: list[Any] = [*plain.feature_info]
    alike = len(levels) > 1 and len({(level["num_chs"], level["reduction"]) for level in levels}) == 1
    tokens = alike and isinstance(getattr(plain, "global_pool", None), str)
    names = [level["module"] for level in levels]
    if (
        not alike
        and plain.num_features != levels[-1]["num_chs"]
        # Those of CrossViT and EfficientViM are several maps, as they must tell TorchScript.
        and get_origin(inspect.signature(plain.forward_features).return_annotation) is not list
    ):
        names.append(FEATURES)
    if isinstance(taps, int):
        if not 1 <= taps <= len(names):
            raise MbibError(f"taps of {backbone}: expected from 1 to {len(names)}, got {taps}")
        every = range(1, taps + 1)
        places = [len(names) * i // taps - 1 if alike else len(names) - taps + i - 1 for i in every]
    else:
        places = [_place(tap, names, len(levels), backbone) for tap in taps]
        if not places or places != sorted(set(places)):
            raise MbibError(f"taps of {backbone} must be one or more levels in order of depth, got {list(taps)}")
    prefix = tokens and "return_prefix_tokens" in inspect.signature(plain.forward_intermediates).parameters
    return Taps(tuple(i if i < len(levels) else FEATURES for i in places), tokens, alike, prefix)


def _place(tap: int | str, names: Sequence[str], levels: int, backbone: str) -> int:
    """Return the place of a tap among the names of all. Raises MbibError for what is none of them."""
    if isinstance(tap, str):
        if tap not in names:
            raise unknown_name(f"tap of {backbone}", tap, names)
        return names.index(tap)
    if -levels <= tap < levels:
        return tap % levels
    listing = ", ".join(f"{i}: {name}" for i, name in enumerate(names[:levels]))
    raise MbibError(f"unknown tap {tap} of {backbone}: its levels are {listing}")


class FeatureNet(FeatureGetterNet):
    """timm's feature net over ``forward_intermediates``, with gradient checkpointing: `features_only` of our models."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass instead of keeping them."""
        self.model.set_grad_checkpointing(enable)


def prefixed_levels(feature_info: Any) -> list[dict[str, Any]]:
    """Return a backbone's ``feature_info`` as that of the model that holds it."""
    return [dict(info, module=PREFIX + info["module"]) for info in feature_info]


def prefixed_groups(backbone: Any, coarse: bool) -> Any:
    """Return a backbone's ``group_matcher`` as that of the model that holds it; what follows the backbone comes last.

    timm matches a pattern from the start of a name: ``^`` says nothing there and is left out, except in ``[^...]``. A
    backbone that has no groups is one.
    """

    def prefixed(pattern: str) -> str:
        unanchored = re.sub(r"(?<!\[)\^", "", pattern)
        return f"^{re.escape(PREFIX)}(?:{unanchored})"

    if not hasattr(backbone, "group_matcher"):
        return {"stem": prefixed("")}
    matcher = backbone.group_matcher(coarse=coarse)
    if callable(matcher):
        return lambda name: matcher(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else float("inf")
    return {
        name: prefixed(spec) if isinstance(spec, str) else [(prefixed(pattern), suffix) for pattern, suffix in spec]
        for name, spec in matcher.items()
        if spec is not None
    }


def prefixed_names(names: str | Sequence[str] | None) -> Any:
    """Return a cfg's name or names of a backbone's layers as those of the model that holds it."""
    if names is None or isinstance(names, str):
        return PREFIX + names if names else None
    return tuple(PREFIX + name for name in names)


def backbone_cfg(backbone: str, classifier: str | Sequence[str]) -> PretrainedCfg:
    """Return the cfg of a backbone, with its weights' location, as that of the model that holds it.

    Args:
        backbone: timm model name, with or without tag.
        classifier: name or names of the model's classifiers.

    Raises:
        MbibError: timm does not know the backbone, or the tag of its weights.
    """
    architecture = backbone.partition(".")[0]
    require_backbone(architecture)
    try:
        cfg = timm.get_pretrained_cfg(backbone) or PretrainedCfg()
    except RuntimeError:
        tagged = timm.list_models(f"{architecture}.*", include_tags=True)
        raise unknown_name("tag of a backbone", backbone, tagged) from None
    return dataclasses.replace(
        cfg,
        url=None,
        architecture=None,
        tag=None,
        classifier=classifier if isinstance(classifier, str) else tuple(classifier),
        first_conv=prefixed_names(cfg.first_conv),
    )


def backbone_traits(backbone: nn.Module) -> dict[str, Any]:
    """Return the traits that a model declares for its backbone, in whose layers alone timm could see them.

    Whether it takes images of one size only: a cfg says so of many that take any.
    """
    return {"fixed_input_size": get_model_traits(backbone).get("fixed_input_size", False)}


class StoredFeatures(nn.Module):
    """In the place of a backbone, where the images are features of it already: (B, D, 1, 1), D being all its widths.

    Args:
        widths: of the pooled vectors that the model's heads stand on, in order.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = tuple(widths)

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return the pooled vectors (B, C_i) that features (B, D, 1, 1) hold side by side."""
        return features.flatten(1).split(self.widths, dim=1)


POOL_TYPES = ("avg", "max", "avgmax", "fastavg", "fastmax", "fastavgmax")


class PoolingError(MbibError, AssertionError):
    """A pooling type that the model cannot take; an AssertionError as well, as timm's callers expect."""


class BackboneModel(nn.Module):
    """A model that holds a timm backbone.

    Attributes:
        backbone: timm's model.
        backbone_name: its name, without tag.
        backbone_args: keyword arguments that it was built with.
    """

    if TYPE_CHECKING:  # TorchScript reads a class's annotations, and takes few
        backbone: Any
        backbone_name: str
        backbone_args: dict[str, Any]

    @torch.jit.ignore
    def plain_key(self, key: str) -> str:
        """Return the key of the plain backbone's weights that a key of `backbone` starts from."""
        return key

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
        """Return the backbone's parameter groups, in order of depth; what follows the backbone comes last."""
        return prefixed_groups(self.backbone, coarse)

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
        """Return the last map and the maps of the chosen levels: the backbone's own."""
        return self.backbone.forward_intermediates(
            x,
            indices=indices,
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
        )


class PooledModel(BackboneModel):
    """A model whose heads stand on pooled features of one backbone: a forward pass is two steps.

    Nothing but the first step sees the backbone, in whose place `StoredFeatures` may stand.
    """

    if TYPE_CHECKING:
        forward_features: Any
        forward_head: Any

    @torch.jit.ignore
    def pool_features(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the pooled vectors (B, C_i) that the heads stand on, in order of depth; see `pooled_widths`."""
        if isinstance(self.backbone, StoredFeatures):
            return tuple(self.backbone(x))
        return self._pool_features(x)

    @torch.jit.ignore
    def _pool_features(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what `pool_features` does, of images."""
        raise NotImplementedError

    @torch.jit.ignore
    def forward_pooled(self, pooled: tuple[Tensor, ...]) -> Any:
        """Return what `forward` does, from what `pool_features` returns."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        """Return the prediction (B, K); in training of a model with several heads the logits of each."""
        if torch.jit.is_scripting():
            return self.forward_head(self.forward_features(x))
        return self.forward_pooled(self.pool_features(x))


class MultiHeadModel(BackboneModel):
    """A model with several classifiers: in training it returns the logits of each, in evaluation their prediction.

    Attributes:
        head_names: of the logits that training returns, in order.
        prediction_heads: those whose mean is the prediction.
        training_logits: see `set_training_logits`.
        pool_type: timm's word for the pooling of every map that a head is on.
        global_pool: that pooling.
        feature_info: the backbone's levels, up to the last that is used.
        head_init: how linear layers of the heads start.
        ends_with_backbone: the last map is what the backbone ends with, and may lie behind its last level.
    """

    head_init: str = KAIMING
    ends_with_backbone: bool = False

    if TYPE_CHECKING:
        global_pool: Any
        pool_type: str
        head_names: tuple[str, ...]
        prediction_heads: tuple[str, ...]
        num_classes: int
        num_features: int
        head_hidden_size: int
        drop_rate: float
        training_logits: str
        feature_info: list[dict[str, Any]]
        classifier_kind: str
        classifier_scale: float | None

    @torch.jit.ignore
    def default_pool(self) -> str:
        """Return how maps are pooled where nobody says how."""
        return "avg"

    @torch.jit.ignore
    def set_pool(self, global_pool: str, num_classes: int) -> None:
        """Choose how maps are pooled. Raises PoolingError for a type that heads of so many classes cannot take."""
        self.global_pool = create_pool(global_pool, num_classes).train(self.training)
        self.pool_type = global_pool

    def _heads(self) -> Sequence[Any]:
        """Return the heads, in the order of `head_names`: each has a `classifier` on `num_features`."""
        raise NotImplementedError

    @torch.jit.ignore
    def _observe(self, x: Tensor) -> tuple[tuple[Tensor, ...], dict[str, list[Tensor]]]:
        """Return what `forward_heads` does, and the features by name, in parts (B, C) that stand side by side."""
        raise NotImplementedError

    @torch.jit.ignore
    def _gives_all_heads(self) -> bool:
        """Return whether `forward` returns the logits of every head."""
        return self.training and self.training_logits == "all" and self.num_classes > 0

    @torch.jit.ignore
    def forward_heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the logits (B, K) of every head, in the order of `head_names`, in any mode."""
        logits, _ = self._observe(x)
        return logits

    @torch.jit.ignore
    def heads_and_features(self, x: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Return what `forward_heads` does, and from the same pass the features that the prediction rests on.

        Returns:
            The logits, and the features by name, (B, C) each, before dropout: ``v``, the last observation, of
            experts side by side; and where the network has one bottleneck ``z``, its embedding.
        """
        logits, parts = self._observe(x)
        return logits, {name: torch.cat(values, dim=1) for name, values in parts.items()}

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
    def name_classifiers(self) -> None:
        """Write the classifiers' names into the model's cfg, where it has one: they depend on its arguments."""
        cfg: Any = getattr(self, "pretrained_cfg", None)
        if cfg is not None and self.num_classes > 0:
            cfg["classifier"] = classifier_names(self)

    @torch.jit.ignore
    def get_classifier(self) -> tuple[nn.Module, ...]:
        """Return the classifiers, in the order of `head_names`."""
        return tuple(head.classifier for head in self._heads())

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace every classifier by one of the same kind.

        Args:
            num_classes: classes K; with 0, `forward` returns the pooled features, (B, `head_hidden_size`).
            global_pool: pooling type; None keeps it, ``""`` (with no classes) returns the unpooled map. Classes after
                ``""``, without a type, are on maps pooled as they are by default.

        Raises:
            PoolingError: a pooling type that the heads cannot take.
        """
        if global_pool is None and self.pool_type == "" and num_classes > 0:
            global_pool = self.default_pool()
        if global_pool is not None:
            self.set_pool(global_pool, num_classes)
        self.num_classes = num_classes
        choices = (num_classes, self.classifier_scale, self.head_init)
        for head in self._heads():
            head.classifier = renew_classifier(
                head.classifier, self.classifier_kind, head.num_features, *choices, **get_device_dtype(self)
            )

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
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        head = Observation(self.num_features, 0, norm=False, drop_rate=self.drop_rate)
        self._replace_heads(head.train(self.training), last)
        self.reset_classifier(0, "")
        return take

    def _replace_heads(self, head: Observation, level: int) -> None:
        """Leave a single head, on the whole of the map at a level."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map, (B, C, H, W)."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the prediction (B, K) from the last map; with `pre_logits` the features (B, C)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        """Return the prediction (B, K); in training the logits of every head."""
        if not torch.jit.is_scripting() and self._gives_all_heads():
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
        """Return what `forward_features` does and the maps of the chosen levels (all of them by default), as timm's
        models do. The levels are those of `feature_info`."""
        if self.ends_with_backbone and not stop_early:
            return super().forward_intermediates(x, indices, norm, stop_early, output_fmt, intermediates_only)
        take, last = feature_take_indices(len(self.feature_info), indices)
        kwargs: dict[str, Any] = dict(norm=norm, stop_early=stop_early, output_fmt=output_fmt, intermediates_only=True)
        if intermediates_only:
            return self.backbone.forward_intermediates(x, indices=take, **kwargs)
        end = last if stop_early else len(self.feature_info) - 1
        levels = sorted({*take, end})
        maps = self.backbone.forward_intermediates(x, indices=levels, **kwargs)
        return maps[-1], [m for level, m in zip(levels, maps, strict=True) if level in take]


def create_pool(pool_type: str, num_classes: int) -> SelectAdaptivePool2d:
    """Return a pooling of maps to vectors; with ``""`` none.

    Raises:
        PoolingError: the heads cannot take what it gives.
    """
    if pool_type == "" and num_classes > 0:
        raise PoolingError("the classifiers need pooled maps: global_pool='' goes with num_classes=0")
    if pool_type not in (*POOL_TYPES, ""):
        error = unknown_name("global_pool (of the types that keep the width)", str(pool_type), POOL_TYPES)
        raise PoolingError(str(error))
    return SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))


def token_pools(backbone: Any) -> tuple[str, ...]:
    """Return how a transformer can pool its tokens, in timm's words, its own way first: ``token``, ``avg``, ``map``."""
    own = [backbone.global_pool] if backbone.global_pool else []
    if getattr(backbone, "dist_token", None) is not None:  # two tokens, and their mean whatever is asked for
        return tuple(own)
    token = ["token"] if getattr(backbone, "cls_token", None) is not None else []
    return tuple(dict.fromkeys([*own, *token, "avg"]))


def set_token_pool(backbone: Any, pool_type: str) -> None:
    """Let a transformer pool its tokens in one of its ways. Raises PoolingError for another."""
    choices = token_pools(backbone)
    if pool_type not in choices:
        name = f"global_pool of {type(backbone).__name__}"
        raise PoolingError(str(unknown_name(name, str(pool_type), choices)))
    if pool_type != backbone.global_pool:
        backbone.reset_classifier(0, pool_type)  # attention pooling goes


def classifier_names(model: Any) -> tuple[str, ...]:
    """Return the names of a model's classifiers, in the order in which it gives their logits."""
    names = {id(module): name for name, module in model.named_modules()}
    return tuple(names[id(classifier)] for classifier in classifiers_of(model))
