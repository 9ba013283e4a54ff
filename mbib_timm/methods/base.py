"""What a method is: all that distinguishes one way to train a long-tailed classifier from another, in one class; and
the registry of methods.

A method is a `TrainingTask` of timm's. Most need a few lines: `head_loss` sees the logits of one head, `loss` those of
all heads, `forward` whole batches and the network. Everything else (stages, samplers, optimizers, checkpoints,
evaluation) is the frame's, and reads off the class what the method wants.
"""

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from mbib_timm.data import Batch, Passes, class_probabilities, parse_sampler
from mbib_timm.errors import MbibError, few, shown
from mbib_timm.methods.method_checks import misspelt, require_fitting
from mbib_timm.models.adapters import plain_names
from mbib_timm.models.parts import part_of
from mbib_timm.recipe.declared import resolve_settings
from mbib_timm.registry import Registry, is_inside

# In the names of a method's parameters and buffers, what says that they are its network's, or of the average of that.
NETWORKS = ("trainable_module.", "trainable_module_ema.")
# Class weights up to n^-0.1, MBIB's own, leave logits for the frequencies that they would be for without.
NEGLIGIBLE_POWER = 0.1


class Facts(NamedTuple):
    """What a method may know about its run.

    Attributes:
        class_counts: training images of each class, (K,), int64.
        epochs: epochs of the stage.
        previous: folder of the previous stage; None for the first.
        input_size: size of the images, (C, H, W); None if it is not known.
        mean: means that the images are normalised with: one for all channels, or three.
        std: standard deviations that they are normalised with, likewise.
        class_names: in label order; None if they are not known.
        mixed: whether images are mixed with one another.
        class_weights: class weights of the recipe, (K,), with a mean of 1 over the training images; None for none.
        sampler: of the training images; None for the method's own.
    """

    class_counts: np.ndarray
    epochs: int
    previous: Path | None = None
    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    class_names: tuple[str, ...] | None = None
    mixed: bool = False
    class_weights: np.ndarray | None = None
    sampler: str | None = None


@dataclass(frozen=True)
class NoSettings:
    """The settings of a method that has none."""


def head_names(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the logits that a network returns in training; ``("logits",)`` for one tensor."""
    names: Any = getattr(unwrap_model(network), "head_names", ("logits",))
    return tuple(names)


class Method(TrainingTask):
    """A training method. Subclasses are registered with ``@register("name")``.

    Attributes:
        title: name of the method in tables and on cards.
        citation: its paper, in one line.
        Settings: a frozen dataclass of `option` fields: its constants, which recipes and flags set.
        logit_prior: the class frequencies that trained logits are for, with the method's own sampler, and without the
            recipe's class weights and `own_weights`: ``train`` after a plain loss, ``uniform`` after one that
            compensates for the class counts, or on balanced classes, None for neither. May be a property.
        sampler: default of the recipe key ``sampler``.
        part: default of the recipe key ``train``.
        reset: default of the recipe key ``reset``.
        classifier_start: default of the recipe key ``classifier_start``.
        frozen_bn: default of the recipe key ``frozen_bn``.
        views: the views of each image in a batch. Each is a mapping with the augmentation keys that differ from the
            recipe's. ``({}, {})`` are two draws of the same augmentation. The recipe key ``views`` takes precedence.
        soft_targets: whether it accepts targets (B, K), which recipes have that mix images or smooth labels.
        takes_class_weights: whether it multiplies the loss of an image by the entry of ``label_weights`` for its class,
            for recipes with ``class_weights``; for targets (B, K), label by label.
        needs_start: whether it must start from a trained model.
        needs_images: whether more than the heads of its network needs the images, so that precomputed features of a
            backbone are not enough.
        post_hoc: whether it trains nothing, and acts only on how classifiers start, or in `finish`.

    Args:
        network: the result of `build_network`, with its weights, on the device.
        settings: an instance of `Settings`.
        facts: facts about the run.
        device: device of the network.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    Settings: ClassVar[type] = NoSettings
    logit_prior: Any = "train"
    sampler: ClassVar[str] = "instance"
    views: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    soft_targets: ClassVar[bool] = False
    takes_class_weights: ClassVar[bool] = False
    part: ClassVar[str] = "all"
    reset: ClassVar[str] = "none"
    classifier_start: ClassVar[str] = "random"
    frozen_bn: ClassVar[str | None] = None
    needs_start: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False
    post_hoc: ClassVar[bool] = False

    label_weights: Tensor | None

    def __init__(self, network: nn.Module, settings: Any, facts: Facts, device: torch.device) -> None:
        super().__init__(device=device, verbose=False)
        self.trainable_module = network
        self.settings, self.facts = settings, facts
        self.head_names = head_names(network)
        self._frozen_norms: list[nn.Module] = []
        weights = None if facts.class_weights is None else torch.tensor(facts.class_weights, dtype=torch.float32)
        self.register_buffer("label_weights", weights, persistent=False)
        self.check_network()

    @classmethod
    def build_network(cls, settings: Any, build: Callable[..., nn.Module]) -> nn.Module:
        """Build the network that trains.

        Args:
            settings: an instance of `Settings`.
            build: returns the recipe's model; takes keyword arguments of the model, such as ``classifier="cosine"``.

        Returns:
            The model, or a network around it, of which `get_eval_model` then returns the part to evaluate and publish.
        """
        return build()

    @classmethod
    def needs_held_out(cls, settings: Any) -> bool:
        """Return whether `finish` needs held-out images; if there are none, the run is refused before it begins."""
        return False

    def check_network(self) -> None:
        """Raise MbibError for a network that the method does not fit, by `head_names`, `settings` and modules alone.

        It comes before what a subclass's `__init__` adds: what it reads is set by the class or by `Method.__init__`. A
        sweep asks it before its first run begins, with neither data nor weights, and leaves any other error to the run.
        """

    # What a step computes: one of these three is a method's own.

    def head_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of one head's logits (B, K) for targets (B,), with `soft_targets` also (B, K); a scalar."""
        raise NotImplementedError(f"{type(self).__name__} defines none of head_loss, loss and forward")

    def loss(self, logits: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return named scalars, ``loss`` first, for each head's logits (B, K) by name; by default the heads' mean."""
        losses = {name: self.head_loss(values, targets) for name, values in logits.items()}
        for value in losses.values():
            if found := no_scalar(value):
                raise MbibError(f"method {self.name!r}: head_loss: expected a scalar tensor, got {found}")
        parts = {f"loss_{name}": value.detach() for name, value in losses.items()} if len(losses) > 1 else {}
        return {"loss": torch.stack([*losses.values()]).mean(), **parts}

    def forward(self, *batches: Batch) -> dict[str, Tensor]:
        """Return named scalars on the device, ``loss`` first: the one to differentiate.

        Args:
            batches: one batch, or two from a sampler with two streams.
        """
        (batch,) = batches
        return self.loss(self.logits(batch.images), batch.targets)

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return the logits (B, K) of every head of the network, by name, for images (B, C, H, W)."""
        output = self.trainable_module(images)
        outputs = output if isinstance(output, tuple) else (output,)
        if len(outputs) != len(self.head_names):
            raise MbibError(
                f"method {self.name!r}: the network returned {len(outputs)} outputs, and has the heads "
                f"{few(self.head_names)} ({len(self.head_names)}); a network that returns more needs a `forward` of "
                "its own"
            )
        return dict(zip(self.head_names, outputs, strict=True))

    def weighted(self, weights: Tensor) -> Tensor:
        """Return a method's own class weights (K,), times those of the recipe."""
        return weights if self.label_weights is None else weights * self.label_weights

    @property
    def own_weights(self) -> Tensor | None:
        """The method's own class weights (K,), where `logit_prior` leaves them out; None for none."""
        return None

    @property
    def result_prior(self) -> str | None:
        """The class frequencies that the result's logits are for, ``train`` or ``uniform``; None if they are neither.

        Raises MbibError where `logit_prior` is none of the three.

        Logits that are for frequencies p after sampling with frequencies q are for p q' w / q after sampling with q',
        with class weights w, the recipe's times the method's own: balanced samples or balanced weights make those of a
        plain loss uniform.

        MBIB's weights n^-0.1 count as no weights, and so does whatever is as near to ``train`` or ``uniform``: with
        balanced softmax its logits are uniform but for a factor of (n_max / n_min)^0.1, 1.6 at an imbalance factor of
        100. The paper tests them as uniform, and to balanced softmax's argument weights are of second order.
        """
        declared, facts = self.logit_prior, self.facts
        if declared not in ("train", "uniform", None):
            raise MbibError(f"method {self.name!r}: logit_prior: expected train, uniform or None, got {declared!r}")
        if declared is None:
            return None
        if facts.epochs == 0 and not self.post_hoc:  # nothing is trained: they are for what they were for before
            return None
        sampler = facts.sampler or self.sampler
        given = [weights for weights in (facts.class_weights, self.own_weights) if weights is not None]
        if self.post_hoc or (sampler == self.sampler and not given):
            return declared
        own, now = _sampled(self.sampler, facts), _sampled(sampler, facts)
        if own is None or now is None:
            return None
        counts = facts.class_counts
        found = (counts if declared == "train" else 1.0) * now / own
        for weights in given:
            found = found * torch.as_tensor(weights).cpu().numpy()
        most = (1 + 1e-4) * (counts.max() / counts.min()) ** NEGLIGIBLE_POWER
        for name, frequencies in (("uniform", 1.0), ("train", counts)):
            ratios = found / frequencies
            if ratios.max() <= most * ratios.min():
                return name
        return None

    # When something happens beside the step. Nothing here may branch inside a step: it may have been captured.

    def begin(self, data: Passes) -> None:
        """Prepare a stage before its first epoch, and again, with the same effect, when a run is resumed.

        The network is as it starts, in evaluation mode, and there are no gradients but under ``torch.enable_grad()``.
        What a checkpoint holds is restored afterwards.

        Args:
            data: passes over the training images and over held-out ones, preprocessed as in an evaluation.
        """

    def start_epoch(self, epoch: int) -> None:
        """Prepare an epoch, counted from 0, once: write into buffers, in place.

        Where a run is resumed within an epoch, this is called again, with the same random numbers, but of the network
        as it starts. The buffers that it writes, persistent or not, then take their values from the checkpoint. No
        checkpoint has other attributes: a number, a list or a tensor that it sets there is an error in a run with
        `checkpoint_steps`, unless it is the epoch's number.
        """

    def synchronize(self) -> None:
        """Make alike what differs between processes, at the start of an epoch and before a checkpoint within one: a
        resumed run has what the first process saved."""

    def after_step(self) -> None:
        """Act after each update of the weights, as part of the step, with which it is captured."""

    def finish(self, data: Passes) -> None:
        """Change the trained network (`result_model`) in place, before it is evaluated and saved.

        It does so once, and again where a finished run is resumed, from the weights that training left, with the same
        random numbers.
        The network is in evaluation mode, and there are no gradients but under ``torch.enable_grad()``.

        Args:
            data: passes over the training images and over those that were never trained on.
        """

    def report(self) -> dict[str, float]:
        """Return the numbers that the method has chosen itself, by name; the results record them."""
        return {}

    # What trains, and what is kept

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that train, by name: those of the network that are not frozen, and the method's own."""
        network = unwrap_model(self.trainable_module)
        yield from ((name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad)
        yield from ((name, parameter) for name, parameter in self.own_parameters() if parameter.requires_grad)

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the method's own parameters, which the network does not have, by name."""
        return ((name, value) for name, value in self.named_parameters() if not name.startswith(NETWORKS))

    def freeze_all_but(self, part: str, frozen_bn: str | None) -> None:
        """Freeze the network outside a part: its parameters, and with ``eval`` the statistics of its BatchNorm layers.

        Adapters always train. If only some tensors of a BatchNorm layer are in the part, such as its bias, its
        statistics count as frozen. If everything trains, ``eval`` freezes the statistics of the backbone.

        Args:
            part: see `part_of`.
            frozen_bn: ``train`` or ``eval``: the mode of the BatchNorm layers whose statistics are not in the part.

        Raises:
            MbibError: there are such layers, and `frozen_bn` is None.
        """
        network = unwrap_model(self.trainable_module)
        kept, plain = part_of(network, part), plain_names(network)
        updated = part_of(network, "heads") if part == "all" and frozen_bn == "eval" else kept
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and (name in kept or name not in plain))
        norms = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.track_running_stats
            and f"{name}.running_mean" not in updated
        }
        if norms and frozen_bn is None:
            raise MbibError(
                f"recipe key 'frozen_bn': with train: {part} the statistics of layer {next(iter(norms))} are frozen; "
                "say whether they are still updated (train) or not (eval)"
            )
        self._frozen_norms = list(norms.values()) if frozen_bn == "eval" else []

    def train(self, mode: bool = True) -> "Method":
        """Set the mode of the network; frozen BatchNorm layers may stay in evaluation mode."""
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> "Method":
        """Wrap the network for several processes; the gradients of the method's own parameters are averaged."""
        world_size = torch.distributed.get_world_size()

        def average(gradient: Tensor) -> Tensor:
            gradient = gradient / world_size
            torch.distributed.all_reduce(gradient)
            return gradient

        for _, parameter in self.own_parameters():
            if parameter.requires_grad:
                parameter.register_hook(average)
        network = self.trainable_module
        if any(parameter.requires_grad for parameter in network.parameters()):  # torch refuses one that does not train
            self.trainable_module = nn.parallel.DistributedDataParallel(network, device_ids=device_ids, **ddp_kwargs)
        return self

    def get_clip_parameters(self, exclude_head: bool = False) -> Iterator[nn.Parameter]:
        """Yield the parameters whose gradients are clipped, on request without those of the classifiers."""
        network = unwrap_model(self.trainable_module)
        excluded = part_of(network, "classifier") if exclude_head else set()
        return (parameter for name, parameter in self.trainable_parameters() if name not in excluded)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the model that is evaluated and published: the network, unless `build_network` wraps the model.

        Args:
            module: the network to look in; None for the method's own.
            ema: look in that of the weights' moving average; None is returned where there is no average.
        """
        module = self.get_trainable_module(ema=ema) if module is None else module
        return None if module is None else unwrap_model(module)

    def result_model(self) -> nn.Module:
        """Return the model whose weights are the result: of the moving average, where there is one."""
        model = self.get_eval_model(ema=self.has_ema())
        assert model is not None
        return model

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the evaluated model: the network's rest, own parameters and buffers."""
        network = unwrap_model(self.get_trainable_module(ema=ema) if module is None else module)
        model = self.get_eval_model(ema=ema)
        inside = next((f"{name}." if name else "" for name, each in network.named_modules() if each is model), None)
        rest = {k: v for k, v in network.state_dict().items() if inside is None or not k.startswith(inside)}
        own = {k: v for k, v in self.state_dict().items() if not k.startswith(NETWORKS)}
        state = {"network": rest, "method": {} if ema else own}
        return state if rest or own else {}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Load what `get_task_state` has returned. Raises RuntimeError where the keys differ."""
        expected = self.get_task_state(ema=ema)
        given = state or {}
        for kind in ("network", "method"):
            if strict and given.get(kind, {}).keys() != expected.get(kind, {}).keys():
                differing = given.get(kind, {}).keys() ^ expected.get(kind, {}).keys()
                raise RuntimeError(
                    f"the state of method {self.name!r} has other keys: {', '.join(sorted(differing)[:5])}"
                )
        network = unwrap_model(self.get_trainable_module(ema=ema) if module is None else module)
        network.load_state_dict(given.get("network", {}), strict=False)
        if not ema:
            self.load_state_dict(given.get("method", {}), strict=False)


def no_scalar(value: object) -> str | None:
    """Return what a value is that is no scalar tensor; None for one, whose number nothing waits for."""
    if isinstance(value, Tensor):
        return f"one of shape {tuple(value.shape)}" if value.ndim else None
    return shown(value)


def require_average(method: Method) -> None:
    """Raise MbibError where what is evaluated as the weights' moving average is no part of it."""
    average, model = method.get_trainable_module(ema=True), method.get_eval_model(ema=True)
    if average is None or all(each is not model for each in average.modules()):
        raise MbibError(
            f"recipe key 'model_ema': get_eval_model(ema=True) of method {method.name!r} returns no part of the moving "
            "average; expected the part of super().get_eval_model(module, ema) that is evaluated"
        )


def unkept_buffers(method: Method) -> dict[str, Tensor]:
    """Return a method's own buffers that its state does not hold, since they are not persistent, by name."""
    kept = method.state_dict().keys()
    return {k: v for k, v in method.named_buffers() if not k.startswith(NETWORKS) and k not in kept}


# Attributes of every module; and values that a loss may be computed with.
_OF_MODULES = vars(nn.Module()).keys()
_VALUES = (bool, int, float, str, Tensor, np.ndarray, np.generic, list, tuple, dict, set)


def attribute_marks(method: Method) -> dict[str, object]:
    """Return what differs once an attribute that no checkpoint has holds another value, by name: of numbers, texts,
    tensors, arrays, and lists and the like of these. What lies in objects of other kinds is not looked at."""
    return {k: _mark(v) for k, v in vars(method).items() if k not in _OF_MODULES and isinstance(v, _VALUES)}


def _mark(value: Any) -> object:
    if isinstance(value, Tensor):  # nothing waits for the device
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return [(repr(key), _mark(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [_mark(item) for item in value]
    return repr(value) if isinstance(value, _VALUES) else id(value)


def require_kept(method: Method, before: Mapping[str, object], epoch: int) -> None:
    """Raise MbibError where the start of an epoch has left something that a checkpoint within it would not have.

    Args:
        method: after `start_epoch`.
        before: its `attribute_marks` then.
        epoch: which it was; an attribute that holds it is right wherever a run goes on.
    """
    allowed = _mark(epoch)
    changed = [name for name, mark in attribute_marks(method).items() if mark not in (before.get(name), allowed)]
    if changed:
        raise MbibError(
            f"method {method.name!r}: start_epoch sets {few(changed)}, which no checkpoint has, and with "
            "checkpoint_steps a run may go on within an epoch: keep it in a buffer (register_buffer), written in place"
        )


def reported_numbers(method: Method) -> dict[str, float]:
    """Return what a method's `report` does. Raises MbibError where that is anything but finite numbers by name."""
    reported: Any = method.report()
    try:
        numbers = {str(name): float(value) for name, value in reported.items()}
    except (AttributeError, RuntimeError, TypeError, ValueError):
        numbers = {"": math.nan}
    if not all(map(math.isfinite, numbers.values())):
        raise MbibError(f"method {method.name!r}: report(): expected finite numbers by name, got {shown(reported)}")
    return numbers


def parameters_that_train(method: Method) -> list[tuple[str, nn.Parameter]]:
    """Return what a method's `trainable_parameters` does. Raises MbibError for anything but parameters by name."""
    given: Any = method.trainable_parameters()
    pairs = list(given) if isinstance(given, Iterable) else [given]
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(map(isinstance, pair, (str, nn.Parameter)))):
            raise MbibError(
                f"method {method.name!r}: trainable_parameters(): expected pairs of a name and a parameter, as "
                f"named_parameters() gives them, got a {type(pair).__name__}"
            )
    return pairs


def _sampled(sampler: str, facts: Facts) -> np.ndarray | None:
    """Return the class frequencies (K,) of the images that a sampler draws; None where they change, or of two streams.

    Args:
        sampler: as recipes name it.
        facts: of the stage.
    """
    streams, epochs = parse_sampler(sampler), facts.epochs
    if len(streams) > 1:
        return None
    first, last = (class_probabilities(streams[0], facts.class_counts, epoch, epochs) for epoch in (0, epochs - 1))
    return first if np.allclose(first, last) else None


METHODS: Registry[type[Method]] = Registry("method")

M = TypeVar("M", bound=type[Method])


def register(name: str) -> Callable[[M], M]:
    """Decorator that files a `Method` under a name: that of the recipe key ``method``, and of models' tags.

    Of a class from outside the package, a line on stderr says which of its attributes look misspelt.

    Raises:
        MbibError: the name is taken, or the class is no method, defines no loss, or overrides what it cannot be called
            as.
    """

    def decorate(method: M) -> M:
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise MbibError(f"method {name!r}: expected a subclass of mbib_timm.methods.Method, got {method!r}")
        require_fitting(name, method, Method)
        METHODS.register(name)(method)
        if not is_inside(method.__module__, "mbib_timm") and os.environ.get("RANK", "0") == "0":
            for line in misspelt(method, Method):
                print(f"warning: method {name!r} {line}", file=sys.stderr)
        method.name = name
        return method

    return decorate


def resolve_method(method: Mapping[str, Any]) -> tuple[type[Method], Any]:
    """Return the class of a recipe's method and its `Settings`, checked; see `resolve_settings`."""
    declared, given = resolve_settings(method)
    kind = METHODS[declared.name]
    return kind, kind.Settings(**given)


def method_title(name: object) -> str:
    """Return what a method is called in tables; anything else as it is."""
    return METHODS[str(name)].title or str(name) if str(name) in METHODS else str(name)
