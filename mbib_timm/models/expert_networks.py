"""Networks of several experts on a shared trunk: RIDE's and SADE's, and MBIB's heads on them.

                   +-> stage 2 -> stage 3 -> pooling -> cosine classifier    expert 1
    x -> trunk ----+-> stage 2 -> stage 3 -> pooling -> cosine classifier    expert 2
                   +-> stage 2 -> stage 3 -> pooling -> cosine classifier    expert 3

The trunk is the stem and the first stage of a CIFAR ResNet, or the stem and the first two stages of a ResNet or ResNeXt
(RIDE, SADE). Experts have 3/4 of the usual width, unless the network is not `reduced`. The prediction is the mean of
the experts' logits. With MBIB's heads an expert is an MBIB network of its own behind the trunk:

    trunk -> v1 -> stage 2 -> v2 -> stage 3 -> v3 -> FC -> z
             h(v1)            u(v2)            f(v3)       g(z)
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import timm
import torch
from timm.layers import get_device_dtype
from timm.models.resnet import ResNet
from torch import Tensor, nn

from mbib_timm.errors import MbibError
from mbib_timm.models.backbones import MultiHeadModel, prefixed_levels, skeleton
from mbib_timm.models.head_outputs import POOLED, head_of_expert
from mbib_timm.models.heads import Observation, ObservationWithBottleneck, create_classifier
from mbib_timm.models.plain_resnets import CifarResNet

__all__ = ["Experts", "MBIBExperts"]


class ExpertStage(nn.Module):
    """A stage of every expert: what they give, side by side along the channels.

    One after another: on a CPU the same as grouped convolutions takes 18 to 21 % longer in channels-last or compiled.

    Args:
        experts: the stage of each.
        shared_input: they all read one map (B, C, H, W); else each its own part of (B, E C, H, W).
    """

    def __init__(self, experts: Sequence[nn.Module], shared_input: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.parts = 1 if shared_input else len(experts)

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps (B, E C, H, W)."""
        parts = x.chunk(self.parts, dim=1)
        outputs = []
        for i, expert in enumerate(self.experts):
            outputs.append(expert(parts[i % self.parts]))
        return torch.cat(outputs, dim=1)


class _Family(NamedTuple):
    """How a kind of backbone is divided.

    Attributes:
        own: stages that every expert has for itself.
        reduced: channels of all stages where those of the experts are reduced.
    """

    own: tuple[str, ...]
    reduced: tuple[int, ...]


_CIFAR = _Family(("layer2", "layer3"), (16, 24, 48))
_IMAGENET = _Family(("layer3", "layer4"), (64, 128, 192, 384))
# What an expert of MBIB observes for training alone, and what predicts.
SHALLOW, PREDICTING = ("v1", "v2"), ("v3", "z")
# In the names of the backbone's parameters, what says that they are an expert's.
_OF_EXPERT = re.compile(r"\.0\.experts\.\d+\.")


def _family(backbone: str, backbone_args: dict[str, Any]) -> _Family:
    """Return how a backbone is divided. Raises MbibError for one that has other stages."""
    plain = skeleton(backbone, backbone_args)
    if isinstance(plain, CifarResNet):
        return _CIFAR
    if isinstance(plain, ResNet):
        return _IMAGENET
    raise MbibError(
        f"backbone {backbone!r} has no stages to copy for experts: expected a CIFAR ResNet or one of "
        "timm's, such as cifar_resnet32, classic_resnet10, resnet50 or resnext50_32x4d"
    )


def share_trunk(backbones: Sequence[Any], own: Sequence[str]) -> Any:
    """Return the first of several backbones, with the named last stages of all of them in it.

    Its other methods stay as they are: a stage of experts takes the place of a stage. It is one level of
    ``feature_info``.

    Args:
        backbones: of one structure, with weights of their own.
        own: names of the stages that are not shared, in order.
    """
    trunk = backbones[0]
    levels = [info for info in trunk.feature_info if info["module"].partition(".")[0] not in own]
    for name in own:
        last = [info for info in trunk.feature_info if info["module"].partition(".")[0] == name][-1]
        levels.append(dict(last, num_chs=len(backbones) * last["num_chs"], module=name))
        stages = [getattr(backbone, name) for backbone in backbones]
        setattr(trunk, name, nn.Sequential(ExpertStage(stages, shared_input=name == own[0])))
    trunk.feature_info = levels
    trunk.num_features = levels[-1]["num_chs"]
    return trunk


class _ExpertModel(MultiHeadModel):
    """Experts on a shared trunk, without their heads; `Experts` says what the arguments are.

    Attributes:
        expert_heads: the names of each expert's heads, in order of depth, by the expert's name.

    Raises:
        MbibError: a backbone with other stages, no experts, or an unknown pooling or classifier.
    """

    if TYPE_CHECKING:  # TorchScript reads a class's annotations, and takes few
        heads: Any
        expert_heads: dict[str, tuple[str, ...]]

    def __init__(
        self,
        backbone: str = "resnet50",
        experts: int = 3,
        reduced: bool = True,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        training_logits: str = "all",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        classifier: str = "cosine",
        classifier_scale: float | None = None,
        backbone_args: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(experts, int) or experts < 1:
            raise MbibError(f"experts: expected a whole number of at least 1, got {experts!r}")
        self.set_pool(global_pool, num_classes)
        self.set_training_logits(training_logits)
        family = _family(backbone, backbone_args or {})
        self.backbone_name = backbone
        self.backbone_args = {**({"channels": family.reduced} if reduced else {}), **(backbone_args or {})}
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_experts = experts
        self.classifier_kind, self.classifier_scale = classifier, classifier_scale
        optional = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
        build = partial(timm.create_model, backbone, num_classes=0, in_chans=in_chans, device=device, dtype=dtype)
        networks = [build(**optional, **self.backbone_args) for _ in range(experts)]
        self.backbone = share_trunk(networks, family.own)
        self.feature_info = prefixed_levels(self.backbone.feature_info)
        self.num_features = self.head_hidden_size = self.feature_info[-1]["num_chs"]

    def _expert_names(self) -> list[str]:
        return [f"expert{i}" for i in range(1, self.num_experts + 1)]

    def _classifier(self) -> Callable[..., nn.Module]:
        """Return what makes a classifier, from its width, the classes, device and dtype."""
        return partial(create_classifier, self.classifier_kind, scale=self.classifier_scale)

    @torch.jit.ignore
    def plain_key(self, key: str) -> str:
        """Return the key of the plain backbone's weights that a key of `backbone` starts from: every expert's alike."""
        return _OF_EXPERT.sub(".", key)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the parameter groups in order of depth; blocks of different experts at one depth are one group."""
        stage = r"^backbone\.layer(\d+)"
        blocks = stage if coarse else stage + r"\.(?:0\.experts\.\d+\.)?(\d+)"
        return dict(stem=r"^backbone\.(?:conv1|bn1)", blocks=blocks)

    def _heads(self) -> list[Any]:
        return [*self.heads]

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the experts' last maps, side by side along the channels, (B, E C, H, W)."""
        return self.backbone.forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the mean of the experts' predictions (B, K); with `pre_logits` their features (B, E C)."""
        x = self.global_pool(x)
        if self.pool_type == "":
            return x
        parts = x.chunk(len(self.heads), dim=1)
        outputs = []
        for i, head in enumerate(self.heads):
            if pre_logits or self.num_classes == 0:
                outputs.append(head.embed(parts[i]))
            else:
                outputs.append(head(parts[i]))
        if pre_logits or self.num_classes == 0:
            return torch.cat(outputs, dim=1)
        total = outputs[0]
        for output in outputs[1:]:
            total = total + output
        return total / len(outputs)

    @torch.jit.ignore
    def _observe(self, x: Tensor) -> tuple[tuple[Tensor, ...], dict[str, list[Tensor]]]:
        parts = self.global_pool(self.forward_features(x)).chunk(len(self.heads), dim=1)
        vs = [head.embed(parts[i]) for i, head in enumerate(self.heads)]
        return tuple(head.classify(vs[i]) for i, head in enumerate(self.heads)), {POOLED: vs}

    def _replace_heads(self, head: Observation, level: int) -> None:
        """Leave a single head, on the whole of the last map."""
        self.heads = nn.ModuleList([head])
        self.expert_heads = {}
        self.head_names = self.prediction_heads = ("logits",)


class Experts(_ExpertModel):
    """Experts on a shared trunk with a classifier each, on their pooled last maps: the network of RIDE and SADE.

    In training, `forward` returns the logits of every expert, (B, K) each, as a tuple in the order of `head_names`. In
    evaluation it returns their mean (B, K).

    Args:
        kwargs: ``backbone`` (a CIFAR ResNet, or one of timm's ResNets and ResNeXts), ``experts`` (their number),
            ``reduced`` (give the experts' stages 3/4 of the usual channels), ``num_classes``, ``in_chans``,
            ``global_pool``, ``training_logits``, ``drop_rate``, ``drop_path_rate``, ``classifier``,
            ``classifier_scale`` and ``backbone_args``, as for `MBIB`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        width, names = self.num_features // self.num_experts, self._expert_names()
        create, dd = self._classifier(), get_device_dtype(self)
        self.heads = nn.ModuleList(
            Observation(width, self.num_classes, False, self.drop_rate, create, **dd) for _ in names
        )
        self.head_names = self.prediction_heads = tuple(names)
        self.expert_heads = {name: (name,) for name in names}


class MBIBExperts(_ExpertModel):
    """Experts on a shared trunk, each with MBIB's observations, bottleneck and classifiers.

    All experts observe the trunk's map as their v1, under a normalisation and a classifier of their own, and the maps
    of their own stages as v2 and v3. In training, `forward` returns the logits of every head of every expert, (B, K)
    each, as a tuple in the order of `head_names`. In evaluation it returns the mean over the experts of the mean of the
    logits of v3 and z, (B, K).

    Args:
        kwargs: those of `Experts`.
        bottleneck_features: width of z; that of v3 when None.
        training_heads: build the classifiers that serve training only.
        classifier: kind of every classifier, see `create_classifier`.
    """

    def __init__(
        self,
        *,
        bottleneck_features: int | None = None,
        training_heads: bool = True,
        classifier: str = "linear",
        **kwargs: Any,
    ) -> None:
        super().__init__(classifier=classifier, **kwargs)
        experts, shallow = self._expert_names(), SHALLOW * training_heads
        trunk, *own = (level["num_chs"] for level in self.feature_info[-3:])
        v2, v3 = (channels // len(experts) for channels in own)
        create, dd = self._classifier(), get_device_dtype(self)
        self.training_heads = nn.ModuleDict(
            {
                head_of_expert(expert, name): Observation(width, self.num_classes, True, self.drop_rate, create, **dd)
                for expert in experts
                for name, width in zip(shallow, (trunk, v2), strict=False)
            }
        )
        width = v3 if bottleneck_features is None else bottleneck_features
        self.heads = nn.ModuleList(
            ObservationWithBottleneck(v3, self.num_classes, self.drop_rate, create, features=width, **dd)
            for _ in experts
        )
        self._name_heads(shallow)

    def _name_heads(self, shallow: Sequence[str]) -> None:
        experts = self._expert_names()
        self.expert_heads = {
            expert: tuple(head_of_expert(expert, head) for head in (*shallow, *PREDICTING)) for expert in experts
        }
        self.head_names = tuple(name for names in self.expert_heads.values() for name in names)
        self.prediction_heads = tuple(head_of_expert(expert, head) for expert in experts for head in PREDICTING)

    @torch.jit.ignore
    def remove_training_heads(self) -> None:
        """Remove the classifiers that serve training only; the prediction stays the same."""
        self.training_heads = nn.ModuleDict()
        self._name_heads(())
        self.name_classifiers()
        if hasattr(self, "_model_args"):  # what timm saves with the model
            self._model_args: Any = {**self._model_args, "training_heads": False}

    def _heads(self) -> list[Any]:
        if not self.expert_heads:
            return [*self.heads]
        shallow = [*self.training_heads.values()]
        of_each = len(shallow) // self.num_experts
        return [
            each
            for i, head in enumerate(self.heads)
            for each in (*shallow[i * of_each : (i + 1) * of_each], head, head.bottleneck)
        ]

    def _replace_heads(self, head: Observation, level: int) -> None:
        super()._replace_heads(head, level)
        self.training_heads = nn.ModuleDict()

    @torch.jit.ignore
    def _observe(self, x: Tensor) -> tuple[tuple[Tensor, ...], dict[str, list[Tensor]]]:
        if not self.expert_heads:
            return super()._observe(x)
        end = len(self.feature_info) - 1
        levels = [end - 2, end - 1, end] if len(self.training_heads) else [end]
        maps = self.backbone.forward_intermediates(x, indices=levels, intermediates_only=True)
        pooled = [self.global_pool(m) for m in maps]
        # The trunk's map is everybody's, of the others each expert has its part.
        parts = [
            v.chunk(self.num_experts, dim=1) if level > end - 2 else [v] * self.num_experts
            for level, v in zip(levels, pooled, strict=True)
        ]
        logits: list[Tensor] = []
        vs: list[Tensor] = []
        for expert, name in enumerate(self._expert_names()):
            for place, shallow in enumerate(SHALLOW if len(self.training_heads) else ()):
                logits.append(self.training_heads[head_of_expert(name, shallow)](parts[place][expert]))
            head = self.heads[expert]
            vs.append(head.embed(parts[-1][expert]))
            logits += [head.classify(vs[-1]), head.bottleneck(vs[-1])]
        return tuple(logits), {POOLED: vs}
