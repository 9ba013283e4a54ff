"""PaCo: one softmax over the classes and over the features of other images, from two views and a momentum encoder.

Cui et al., Parametric Contrastive Learning, ICCV 2021.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import unwrap_model
from torch import Tensor, nn

from mbib_timm.data import Batch
from mbib_timm.environment import is_distributed, share_buffers
from mbib_timm.errors import MbibError
from mbib_timm.methods.base import Method, head_names, register
from mbib_timm.methods.functional import adjusted_cross_entropy, as_counts
from mbib_timm.options import option

NO_LABEL = -1  # of an empty place in the queue
# The view of the key network, as a recipe's keys: SimCLR's augmentation for CIFAR, with blur.
SIM: dict[str, Any] = {
    "train_crop_mode": "rrc",
    "scale": [0.2, 1.0],
    "color_jitter": 0.4,
    "hue": 0.1,
    "color_jitter_prob": 0.8,
    "grayscale_prob": 0.2,
    "gaussian_blur_prob": 0.5,
    "aa": None,
    "cutout": 0,
    "rotation": 0,
}


@dataclass(frozen=True)
class PacoSettings:
    """The constants of PaCo; the defaults are the authors' for CIFAR-100-LT."""

    alpha: float = option(0.01, "weight of each sample of the image's class", minimum=0)
    beta: float = option(1.0, "weight of the image's class itself", above=0)
    gamma: float = option(1.0, "factor on the samples in the softmax's denominator", minimum=0)
    temperature: float = option(0.05, "temperature T of the similarities between samples", above=0)
    queue: int = option(
        1024, "number of samples kept from earlier batches; at most the number of training images", minimum=1
    )
    momentum: float = option(
        0.999, "share of its parameters that the momentum network keeps in each step", minimum=0, maximum=1
    )
    features: int = option(32, "width d of the projected features", minimum=1)


class Projected(nn.Module):
    """A model and a projector of its pooled features; only the model is evaluated and published.

    Args:
        model: with one classifier.
        features: width d of the projection.

    Raises:
        MbibError: a model of several heads, or one that does not separate its features from its classifier.
    """

    def __init__(self, model: Any, features: int) -> None:
        super().__init__()
        heads = head_names(model)
        if len(heads) > 1:
            raise MbibError(
                "method 'paco' compares images and classes on the features of one classifier; this model has "
                f"{len(heads)}: {', '.join(heads)}. Use a model of one head, such as cifar_resnet32"
            )
        needed = ("forward_features", "forward_head", "get_classifier", "head_hidden_size")
        missing = [name for name in needed if not hasattr(model, name)]
        if missing:
            raise MbibError(f"method 'paco' needs a timm model; {type(model).__name__} has no {missing[0]}")
        if not isinstance(model.get_classifier(), nn.Module):
            raise MbibError(f"method 'paco' needs a model of one classifier; {type(model).__name__} has several")
        width = model.head_hidden_size
        self.model = model
        self.projector = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, features)
        )

    def get_classifier(self) -> nn.Module:
        """Return the model's classifier."""
        return self.model.get_classifier()

    def no_weight_decay(self) -> set[str]:
        """Return the names of the model's parameters that take no weight decay."""
        return {f"model.{name}" for name in getattr(self.model, "no_weight_decay", set)()}

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (B, K) and the normalised projections (B, d) of images (B, C, H, W)."""
        pooled = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        logits, projected = self.get_classifier()(pooled), self.projector(pooled)
        with torch.autocast(images.device.type, enabled=False):
            projected = projected.to(torch.promote_types(projected.dtype, torch.float32))
            return logits, F.normalize(projected, dim=1)


# The momentum copy and the queue change in place, by operations of fixed shapes that wait for nothing: a captured step
# stays valid. A checkpoint keeps both, as modules of the method.


class MomentumCopy(nn.Module):
    """A copy of a network whose parameters are a moving average of the network's (He et al. 2020, eq. 2).

    Its BatchNorm statistics are its own, of the images that it sees itself.

    Args:
        network: to copy.
        momentum: m, what an update keeps of the copy's parameters.
    """

    def __init__(self, network: nn.Module, momentum: float) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.momentum = momentum

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        """Return the copy's output, without gradient."""
        return self.network(images)

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        """Move every parameter by ``1 - m`` of its difference from the network's."""
        torch._foreach_lerp_([*self.network.parameters()], [*network.parameters()], 1 - self.momentum)

    def take_modes(self, network: nn.Module) -> None:
        """Take the mode of each of the network's layers: a BatchNorm layer in evaluation mode there is so here."""
        for own, other in zip(self.network.modules(), network.modules(), strict=True):
            own.training = other.training


class Queue(nn.Module):
    """The last Q features of other batches and their labels: a ring buffer. An empty place has the label `NO_LABEL`.

    Args:
        size: places Q.
        width: of a feature, d.
    """

    features: Tensor
    labels: Tensor
    pointer: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(size, width))
        self.register_buffer("labels", torch.full((size,), NO_LABEL))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))  # the oldest place, which is the next one

    @torch.no_grad()
    def put(self, features: Tensor, labels: Tensor) -> None:
        """Replace the oldest features by those of a batch, of which the last Q stay.

        With several processes the batches of all of them go in, in the same order everywhere.

        Args:
            features: (B, d).
            labels: (B,).
        """
        if is_distributed():
            features, labels = _gathered(features), _gathered(labels)
        size = len(self.labels)
        features, labels = features[-size:], labels[-size:]
        places = (self.pointer + torch.arange(len(labels), device=labels.device)) % size
        self.features.index_copy_(0, places, features.to(self.features.dtype))
        self.labels.index_copy_(0, places, labels)
        self.pointer.copy_((self.pointer + len(labels)) % size)


def _gathered(values: Tensor) -> Tensor:
    """Return the values (B, ...) of all processes, (P B, ...), in order of their ranks."""
    whole = values.new_empty(torch.distributed.get_world_size() * len(values), *values.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, values.contiguous())
    return whole


def paco_loss(
    logits: Tensor,
    similarities: Tensor,
    targets: Tensor,
    *,
    present: Tensor,
    positive: Tensor,
    log_prior: Tensor,
    alpha: float,
    beta: float,
    gamma: float,
) -> Tensor:
    """``-sum_j w_j log p_j / sum_j w_j``, mean over the batch (eq. 8): p over K classes and S samples together.

    The logits of p are ``z + log pi`` for the classes and ``q.s / T`` for the samples; w is beta for the image's class,
    alpha for each sample of that class, else 0.

    Args:
        logits: z, (B, K).
        similarities: q.s / T, (B, S).
        targets: (B,).
        present: which samples an image is compared with, (B, S), boolean.
        positive: which samples are of its class, (B, S), boolean.
        log_prior: log pi, (K,).
        alpha: weight of a sample.
        beta: weight of the class.
        gamma: factor on the samples in the denominator of p.

    Returns:
        A scalar.
    """
    with torch.autocast(logits.device.type, enabled=False):
        classes = logits.to(similarities.dtype) + log_prior
        shifted = similarities + (math.log(gamma) if gamma else -math.inf)
        denominator = torch.cat([classes, shifted.masked_fill(~present, -math.inf)], dim=1).logsumexp(dim=1)
        weights = alpha * (present & positive).to(similarities.dtype)
        weighted = beta * classes.gather(1, targets[:, None]).squeeze(1) + (weights * similarities).sum(dim=1)
        return (denominator - weighted / (beta + weights.sum(dim=1))).mean()


@register("paco")
class Paco(Method):
    """Parametric contrastive learning: the classifier's rows and the features of other images in one softmax.

    A query, the first view, is compared with the other queries of the batch, with the keys, which a momentum copy of
    the network makes of the second view, and with the keys of earlier batches. Keys enter the queue after the loss, so
    that it never holds the batch's own. With several processes each compares with its own batch, and the queue takes
    all keys; the authors' shuffling of images between processes is left out.

    Raises:
        MbibError: a model of several heads, a queue larger than the training data, or a class without training images.
    """

    title = "PaCo"
    citation = "Cui et al., Parametric Contrastive Learning, ICCV 2021"
    logit_prior = "uniform"
    Settings = PacoSettings
    views = ({}, SIM)

    log_prior: Tensor

    def __init__(self, network: nn.Module, *args: Any) -> None:
        super().__init__(network, *args)
        counts, settings = as_counts(self.facts.class_counts), self.settings
        if settings.queue > counts.sum():
            raise MbibError(
                f"setting 'queue' of method {self.name!r}: expected at most the number of training images, "
                f"{int(counts.sum())}, got {settings.queue}"
            )
        self.key = MomentumCopy(network, settings.momentum)
        self.queue = Queue(settings.queue, settings.features)
        self.register_buffer("log_prior", (counts / counts.sum()).log().float(), persistent=False)

    @classmethod
    def build_network(cls, settings: PacoSettings, build: Callable[..., nn.Module]) -> nn.Module:
        """Build the model, and a projector beside its classifier."""
        return Projected(build(), settings.features)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the model without the projector."""
        whole: Any = super().get_eval_model(module, ema)
        return None if whole is None else whole.model

    def forward(self, *batches: Batch) -> dict[str, Tensor]:
        """Return ``loss``, and for comparison ``bsce``, the balanced softmax of the classes alone."""
        (batch,) = batches
        first, second = batch.views
        settings, targets = self.settings, batch.targets
        logits, queries = self.trainable_module(first)
        _, keys = self.key(second)
        samples = torch.cat([queries, keys, self.queue.features])
        labels = torch.cat([targets, targets, self.queue.labels])
        places = torch.arange(len(labels), device=labels.device)
        present = (labels >= 0) & (places != places[: len(targets), None])  # all but the query itself
        with torch.autocast(first.device.type, enabled=False):
            similarities = queries @ samples.T / settings.temperature
        loss = paco_loss(
            logits,
            similarities,
            targets,
            present=present,
            positive=labels == targets[:, None],
            log_prior=self.log_prior,
            alpha=settings.alpha,
            beta=settings.beta,
            gamma=settings.gamma,
        )
        self.queue.put(keys, targets)
        return {"loss": loss, "bsce": adjusted_cross_entropy(logits.detach(), targets, offset=self.log_prior)}

    def synchronize(self) -> None:
        """Take the first process's buffers of the key network in all, as a resumed run does, which has these alone."""
        share_buffers(self.key.network)

    def after_step(self) -> None:
        """Let the key network follow."""
        self.key.follow(unwrap_model(self.trainable_module))

    def train(self, mode: bool = True) -> "Paco":
        """Set the mode; the key network has the query network's, layer by layer."""
        super().train(mode)
        self.key.take_modes(unwrap_model(self.trainable_module))
        return self
