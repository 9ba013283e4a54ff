"""What a stage trains with: network, method, optimizer and schedule, checked as a whole before anything begins."""

import copy
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import unwrap_model
from torch import Tensor, nn

from mbib_timm.capturing import Graphs
from mbib_timm.data import DataPool, Splits, check_sampler, choose_loader
from mbib_timm.data.augment import check_augmentation
from mbib_timm.data.class_values import loss_weights, require_weights_file
from mbib_timm.data.decoding import free_memory
from mbib_timm.data.overview import held_out_line
from mbib_timm.data.samplers import batches_of, drops_last
from mbib_timm.environment import World, has_bfloat16_instructions, seed_generators
from mbib_timm.errors import CheckpointError, MbibError, few, first_line, shown, unknown_name
from mbib_timm.methods import Facts, Method, resolve_method
from mbib_timm.methods.class_means import CLASS_MEANS, require_class_means
from mbib_timm.models import plain_resnets
from mbib_timm.models.adapters import adapted_layers, add_adapters
from mbib_timm.models.complexity import activation_bytes
from mbib_timm.models.frozen_backbone import FrozenBackbone
from mbib_timm.models.origin import OwnData, origin_of
from mbib_timm.models.parts import part_of
from mbib_timm.models.preprocessing import departures, inherited, input_size, settle
from mbib_timm.models.pretraining import Origin
from mbib_timm.models.weights import (
    Source,
    create_with_weights,
    find_source,
    read_weights,
    start_config,
    under_keys_of,
)
from mbib_timm.recipe import Recipe
from mbib_timm.training.optimization import Precision, create_optimizer, create_schedule, precision_line
from mbib_timm.training.run_folder import RunFolder, config_text
from mbib_timm.training.step import find_graphs

# Times its input, in float32, that a network keeps of an image for its gradients: 100 to 200 of timm's; never less than
# the first, and where a batch times the second is free nothing is counted.
LEAST_KEPT, MOST_KEPT = 4, 1000
# Passes of training images from which on advice on speed is worth a line: a minute of a small network on one thread.
LONG_RUN = 20_000


@dataclass(frozen=True)
class Setup:
    """What a stage trains with.

    Attributes:
        recipe: of the stage, with the preprocessing of its model where it leaves that open.
        method: around its network, on the device, with what does not train frozen.
        input_size: of the images, (C, H, W).
        loader: ``resident`` or ``timm``, as this process would choose.
        optimizer: of what trains.
        schedule: of the optimizer's learning rates.
        precision: of a step.
        graphs: capture steps and evaluations; None where they are not captured.
        frozen: the network's backbone, where the heads train on features of it; None where the images are the input.
        notes: what whoever starts the run should know: a line each.
        advice: on the precision of this device, once for all runs of a process; None where there is none.
        origin: where the run's weights started.
    """

    recipe: Recipe
    method: Method
    input_size: tuple[int, int, int]
    loader: str
    optimizer: torch.optim.Optimizer
    schedule: Any
    precision: Precision
    graphs: Graphs | None
    frozen: FrozenBackbone | None
    notes: tuple[str, ...]
    advice: str | None
    origin: Origin

    def write_result(self, folder: RunFolder, splits: Splits, tag: str) -> None:
        """Write the method's model, and around heads that trained on features their backbone.

        Args:
            folder: where to.
            splits: the stage's data.
            tag: of the run.
        """
        model = self.method.result_model()
        if self.frozen is not None:
            self.frozen.put_back(model)
        folder.write_model(
            model,
            input_size=self.input_size,
            recipe=self.recipe,
            class_counts=splits.class_counts,
            class_names=splits.class_names,
            logit_prior=self.method.result_prior,
            origin=self.origin,
            tag=tag,
        )


def require_named(recipe: Recipe) -> None:
    """Check that the model and the file of class weights that a stage names are there: quicker than to open its data.

    Raises:
        MbibError: an unknown model, or one of a folder or of the Hub that cannot be had.
        DataError: a file of class weights that is missing or cannot be read.
    """
    if ":" in recipe.model or "/" in recipe.model:
        _ = find_source(recipe.model).config
    elif not timm.is_model(recipe.model.partition(".")[0]):
        raise _unknown_model(recipe.model)
    require_weights_file(recipe.class_weights)


def require_fit(recipe: Recipe) -> None:
    """Check that a stage's method fits its network, quicker than to open its data: shapes suffice.

    Models of a folder or of the Hub and weights are left to the run, for an earlier one may write them; and so is any
    error but ours, which may be one of a plugin.

    Raises:
        MbibError: what `Method.check_network` says, or whatever builds the network.
    """
    if ":" in recipe.model or "/" in recipe.model or recipe.initial_checkpoint is not None:
        return
    kind, settings = resolve_method(recipe.method)
    for name in ("meta", "cpu"):  # some networks cannot be built of shapes
        try:
            with (device := torch.device(name)):
                network = kind.build_network(settings, lambda **more: _create_model(recipe, 2, False, more))
            # Not the class's own, which may need what only the data say.
            Method.__init__(kind.__new__(kind), network, settings, Facts(np.ones(2, np.int64), recipe.epochs), device)
            return
        except MbibError:
            if name == "cpu":
                raise
        except Exception:
            continue


def _unknown_model(name: str) -> MbibError:
    if os.path.isdir(name):
        return MbibError(f"unknown model {shown(name)}; the folder of that name is './{name}'")
    return unknown_name("model", name, timm.list_models())


def set_up(
    recipe: Recipe, splits: Splits, world: World, previous: Path | None = None, pool: DataPool | None = None
) -> Setup:
    """Build what a stage trains with, a function of recipe and data: every process starts from the same weights.

    Args:
        recipe: of the stage.
        splits: its data.
        world: device and processes.
        previous: folder of the stage before.
        pool: what this process has on its device already.

    Raises:
        MbibError: what recipe, data and weights do not allow.
    """
    recipe = inherited(recipe)
    check_sampler(recipe.choice("sampler"), splits, recipe.cutmix_sampler)
    kind, settings = resolve_method(recipe.method)
    chosen_on = None
    if kind.needs_held_out(settings):
        splits.require_held_out()
        chosen_on = held_out_line(splits) if recipe.holdout == 0 else None  # else it is said of the data
    seed_generators(recipe.seed, -1, 0, recipe.stage)
    network = build_network(recipe, splits.num_classes, previous)
    memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
    network.to(world.device, memory_format=memory_format)  # type: ignore[call-overload]
    network = _synchronized(network, recipe, world)
    recipe = settle(recipe, network)
    departure = departures(recipe, network)
    size = input_size(recipe, network)
    views = recipe.augmentations()
    for number, view in enumerate(views, start=1):
        try:
            check_augmentation(view, size)
        except MbibError as error:
            raise MbibError(f"view {number}: {error}" if len(views) > 1 else str(error)) from None
    precision = Precision.of(recipe, world.device, size)
    if recipe.feature_passes is None:
        frozen, seen = None, size
        loader = choose_loader(splits, recipe, size, world.device, pool)
    else:
        frozen, loader = FrozenBackbone(network, precision.autocast_dtype), "timm"
        seen = (frozen.width, 1, 1)
    _check_memory(network, recipe, len(splits.train), seen, world.device, precision)
    method = kind(network, settings, facts_of(recipe, splits, size, previous), world.device)
    method.to(world.device, memory_format=memory_format)
    _require_result(method, size, recipe, frozen)
    _require_trained(method, recipe, splits.num_classes)
    if recipe.choice("classifier_start") == CLASS_MEANS:
        require_class_means(method.result_model(), splits.class_counts, splits.class_names)
    method.freeze_all_but(recipe.choice("train"), recipe.choice("frozen_bn"))
    optimizer = create_optimizer(recipe, method)
    schedule = create_schedule(recipe, optimizer, updates_of_epoch(recipe, len(splits.train), world))
    graphs = find_graphs(recipe, optimizer, precision, world)
    said = (chosen_on, departure, precision_line(recipe, world.device, size), _trained_line(recipe, method))
    notes = tuple(filter(None, said))
    names = None if splits.class_names is None else list(splits.class_names)
    origin = origin_of(recipe, OwnData(None, splits.class_counts.tolist(), names), previous)
    passes = recipe.epochs * len(splits.train)
    advice = None if frozen is not None else _precision_advice(recipe, precision, network, world.device, passes)
    return Setup(recipe, method, size, loader, optimizer, schedule, precision, graphs, frozen, notes, advice, origin)


def _require_result(method: Method, size: tuple[int, int, int], recipe: Recipe, frozen: FrozenBackbone | None) -> None:
    """Raise MbibError where a method's result could not be saved: before it trains for hours."""
    model, _ = method.get_eval_model(), method.result_prior
    if model is None or not hasattr(model, "pretrained_cfg"):
        raise MbibError(
            f"method {method.name!r}: get_eval_model returns a {type(model).__name__}, which is not a timm model; "
            "expected the part of the network that is evaluated and published"
        )
    if frozen is not None:
        model = copy.deepcopy(model)
        frozen.put_back(model)
    config_text(model, size, recipe, {})


def _require_trained(method: Method, recipe: Recipe, num_classes: int) -> None:
    """Raise MbibError for a stage without epochs whose result would have classifiers that nothing has trained."""
    if recipe.epochs > 0 or method.post_hoc or recipe.choice("classifier_start") == CLASS_MEANS:
        return
    of_weights = getattr(method.get_eval_model(), "pretrained_cfg", {}).get("num_classes")
    if recipe.choice("reset") != "none" or (recipe.previous is None and of_weights != num_classes):
        raise MbibError(
            "recipe key 'epochs': 0 trains nothing, and classifiers start anew: expected 1 or more, or "
            "classifier_start: class_means"
        )


def _precision_advice(
    recipe: Recipe, precision: Precision, network: nn.Module, device: torch.device, passes: int
) -> str | None:
    """Return a line on bfloat16 on a CPU, where it would be faster, or is slower; None where nothing is to say.

    The factor is that of ResNets, measured on AVX-512 BF16 with one thread. Networks with depthwise convolutions are no
    faster, of other grouped ones and of transformers nothing is known.

    Args:
        recipe: of the stage.
        precision: of a step.
        network: to train.
        device: where.
        passes: images that go through it in training, each as often as there are epochs.
    """
    if device.type != "cpu":
        return None
    if precision.autocast_dtype is torch.bfloat16 and has_bfloat16_instructions() is False:
        return (
            "warning: this processor has no bfloat16 instructions: --amp-dtype bfloat16 works here, but more slowly "
            "than float32 (--no-amp)"
        )
    if recipe.amp is not None or not _is_plainly_convolutional(network) or not has_bfloat16_instructions():
        return None
    if torch.get_num_threads() > 1 or passes < LONG_RUN:
        return None
    return (
        "note: with --amp --amp-dtype bfloat16, ResNets train about 1.5 times as fast on this processor, on one thread "
        "as here"
    )


def _is_plainly_convolutional(network: nn.Module) -> bool:
    """Return whether most of a network's parameters are those of convolutions, none of which is grouped."""
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return (
        all(each.groups == 1 for each in convolutions)
        and 2 * sum(each.weight.numel() for each in convolutions) > parameters
    )


def updates_of_epoch(recipe: Recipe, images: int, world: World) -> int:
    """Return the updates of the weights in an epoch of so many training images."""
    share = -(-images // world.world_size)
    steps = batches_of(share, recipe.batch_size, drops_last(share, recipe.batch_size))
    return -(-steps // recipe.grad_accum_steps)


def _trained_line(recipe: Recipe, method: Method) -> str | None:
    """Return a line on what trains, where not all of the network does; None otherwise."""
    network = unwrap_model(method.trainable_module)
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    total, trained = sum(n for n, _ in counts), sum(n for n, trains in counts if trains)
    if trained in (0, total):
        return None
    share = 100 * trained / total
    what = str(recipe.choice("train"))
    if (adapters := recipe.adapters) is not None:
        what += f", and LoRA of rank {adapters.rank} in {len(adapted_layers(network))} layers"
    return f"trains {share:.{2 if share < 10 else 3}g} % of {total / 1e6:.1f} M parameters: {what}"


def _try_image(model: nn.Module, size: tuple[int, int, int], recipe: Recipe) -> None:
    """Raise MbibError where a model fails with a first image, and the recipe gives keys that may be at fault."""
    keys = [key for key in ("img_size", "model_kwargs") if getattr(recipe, key)]
    if not keys:
        return
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, *size, device=next(model.parameters()).device))
    except Exception as error:
        raise MbibError(
            f"recipe key{'s' if len(keys) > 1 else ''} {' and '.join(map(repr, keys))}: so the model takes no images "
            f"of {'x'.join(map(str, size))}: {first_line(error)}"
        ) from None
    model.train()


def _check_memory(
    network: nn.Module,
    recipe: Recipe,
    train_images: int,
    size: tuple[int, int, int],
    device: torch.device,
    precision: Precision,
) -> None:
    """Raise MbibError where a batch and what the network keeps of it for its gradients are more than is free."""
    images = min(recipe.batch_size, train_images) * len(recipe.choice("views"))
    batch, free = 4 * images * math.prod(size), free_memory(device)
    if MOST_KEPT * batch <= free:
        return
    kept = images * (activation_bytes(network, size) or 0)
    if recipe.torchcompile or precision.autocast_dtype is not None:
        kept //= 2  # what is fused is not kept, and half-precision numbers have half the bytes
    needed = max(batch + kept, LEAST_KEPT * batch)
    if needed > free:
        raise MbibError(
            f"recipe keys 'batch_size' and 'img_size': a step with {images:,} images of {'x'.join(map(str, size))} "
            f"takes {needed / 2**30:,.1f} GiB or more, and {free / 2**30:,.1f} are free; expected fewer or smaller "
            "images (grad_accum_steps keeps the batch of an update)"
        )


def _synchronized(network: nn.Module, recipe: Recipe, world: World) -> nn.Module:
    if world.world_size == 1 or not recipe.sync_bn:
        return network
    if world.device.type != "cuda":
        raise MbibError(f"sync_bn needs CUDA devices; torch has no such layer for {world.device.type}")
    # Not torch's, which loses the activation of a layer that is both.
    synchronized: nn.Module = convert_sync_batchnorm(network)
    return synchronized


def build_network(recipe: Recipe, num_classes: int, previous: Path | None = None) -> nn.Module:
    """Build what a stage trains, with the weights that it starts from.

    Args:
        recipe: gives the method, the model, its keyword arguments, image size and initial weights.
        num_classes: classes K of the classifiers.
        previous: folder of the stage before.

    Raises:
        MbibError: an unknown model or keyword, or weights that do not exist.
        CheckpointError: weights that do not fit.
    """
    kind, settings = resolve_method(recipe.method)

    def build(**kwargs: Any) -> nn.Module:
        model = _with_start(recipe, num_classes, previous, kwargs)
        size = input_size(recipe, model)
        # Here, and not of what a method builds around the model: its faults are no key's.
        _try_image(model, size, recipe)
        if (adapters := recipe.adapters) is not None:
            add_adapters(model, adapters, part_of(model, "heads"), size)
        return model

    return kind.build_network(settings, build)


def _with_start(recipe: Recipe, num_classes: int, previous: Path | None, kwargs: dict[str, Any]) -> nn.Module:
    """Build the recipe's model: all anew, or with weights but for the part that starts anew (key `reset`)."""
    reset = recipe.choice("reset")
    pretrained = recipe.takes_weights
    if previous is None and (not pretrained or reset == "none"):
        return _create_model(recipe, num_classes, pretrained, kwargs)
    state = torch.get_rng_state()
    model = _create_model(recipe, num_classes, False, kwargs)
    anew = part_of(model, reset, "reset")
    if previous is not None:
        weights = under_keys_of(model, read_weights(previous))
    else:
        torch.set_rng_state(state)
        try:
            weights = _create_model(recipe, num_classes, True, kwargs).state_dict()
        except CheckpointError:  # classifiers that start anew may be of another kind than those of the weights
            if not part_of(model, "classifier", "reset") <= anew:
                raise
            weights = _create_model(recipe, num_classes, True, kwargs, ignore_classifiers=True).state_dict()
    own = model.state_dict()
    check_fit(own, weights, anew, previous.name if previous else str(recipe.initial_checkpoint or recipe.model))
    model.load_state_dict({name: own[name] if name in anew else weights[name] for name in own})
    return model


def check_fit(own: dict[str, Tensor], weights: dict[str, Tensor], anew: set[str], source: str) -> None:
    """Raise CheckpointError unless weights have the names and shapes of a model, but for what starts anew.

    Where all of it starts anew, the weights may be another model's.

    Args:
        own: the model's.
        weights: to start from.
        anew: names of what starts anew.
        source: of the weights, for the message.
    """
    if anew == own.keys():
        return
    # A layer that starts anew may be of another kind: what it has no more, such as a bias, is not asked for.
    layers = {name.rpartition(".")[0] for name in anew}
    missing = {name for name in weights.keys() - own.keys() if name.rpartition(".")[0] not in layers}
    differing = missing | (own.keys() - weights.keys() - anew)
    differing |= {name for name in own.keys() & weights.keys() - anew if own[name].shape != weights[name].shape}
    if differing:
        raise CheckpointError(f"the weights of {source} do not fit this stage's model: {few(sorted(differing))}")


def _create_model(
    recipe: Recipe, num_classes: int, pretrained: bool, more: dict[str, Any], ignore_classifiers: bool = False
) -> nn.Module:
    for name in more.keys() & recipe.model_kwargs.keys():
        if more[name] != recipe.model_kwargs[name]:
            raise MbibError(
                f"recipe key 'model_kwargs': method {recipe.method['name']!r} sets {name} to {more[name]!r}"
            )
    name, kwargs = recipe.model, {"num_classes": num_classes, **recipe.model_kwargs, **more}
    source = find_source(name) if ":" in name else None
    # Weights of another run: of images as that run had them.
    overlay = start_config(Path(recipe.initial_checkpoint)).preprocessing if recipe.initial_checkpoint else {}
    if source is not None:
        if recipe.initial_checkpoint is not None:
            raise MbibError(f"recipe key 'initial_checkpoint': {name} has weights of its own; see key 'pretrained'")
        if source.config.model_args.get("training_heads") is False:
            kwargs.setdefault("training_heads", True)  # it was published for inference; training needs them
    elif not timm.is_model(name.partition(".")[0]):
        if "/" in name:
            find_source(name)  # says which folders there are
        raise _unknown_model(name)
    else:
        architecture, _, tag = name.partition(".")
        try:
            cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
        except RuntimeError:
            tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{architecture}.*")]
            if not (known := list(filter(None, tags))):
                raise MbibError(f"model {architecture} has no tag {tag!r}; expected {architecture} alone") from None
            raise unknown_name(f"tag of model {architecture}", tag, known) from None
        if timm.is_model(str(kwargs.get("backbone", "")).partition(".")[0]):  # whose size it is, in `mbib` and others
            cfg = timm.get_pretrained_cfg(kwargs["backbone"].partition(".")[0])
        if cfg is not None and cfg.fixed_input_size and recipe.img_size is not None:
            own = overlay.get("input_size", cfg.input_size)
            if tuple(own[1:]) != (recipe.img_size, recipe.img_size):
                kwargs.setdefault("img_size", recipe.img_size)
        module = timm.model_entrypoint(architecture).__module__
        plain = not module.startswith("mbib_timm.")
        if (more and plain) or (recipe.feature_passes and (plain or module == plain_resnets.__name__)):
            # timm's own models take no other classifiers than theirs, and no plain one says what they stand on.
            kwargs, name = {"backbone": name, **kwargs}, "with_classifier"
    if pretrained and recipe.initial_checkpoint is not None:
        overlay = {**overlay, **weights_overlay(read_weights(Path(recipe.initial_checkpoint)), name)}
    if ignore_classifiers:
        overlay = {**overlay, "num_classes": 0}  # as of weights for other classes, whose classifiers are left out
    if overlay:
        kwargs["pretrained_cfg_overlay"] = overlay
    try:
        if pretrained:
            return create_with_weights(source or Source(name), **kwargs)
        return timm.create_model(name, **kwargs)
    except MbibError:
        raise
    except Exception as error:  # whatever a model makes of arguments that it does not take; no way to a repository
        where = f"model {name!r}" if isinstance(error, RuntimeError | OSError) else "recipe key 'model_kwargs'"
        raise MbibError(f"{where}: {first_line(error)}") from None


def weights_overlay(weights: dict[str, Tensor], model_name: str) -> dict[str, Any]:
    """Return the cfg entries that make timm load `weights`, and see of how many classes their classifiers are."""
    cfg = timm.get_pretrained_cfg(model_name, allow_unregistered=True)
    classifiers = (cfg.classifier if cfg else None) or ()
    names = (classifiers,) if isinstance(classifiers, str) else classifiers
    overlay: dict[str, Any] = {"state_dict": weights, "hf_hub_id": None, "url": None}
    for name in names:
        if f"{name}.weight" in weights:
            overlay["num_classes"] = len(weights[f"{name}.weight"])
    return overlay


def facts_of(recipe: Recipe, splits: Splits, size: tuple[int, int, int], previous: Path | None = None) -> Facts:
    """Return what a stage's method may know.

    Args:
        recipe: of the stage.
        splits: its data.
        size: of the images (C, H, W).
        previous: folder of the stage before.

    Raises:
        DataError: class weights that do not fit the classes.
    """
    return Facts(
        splits.class_counts,
        recipe.epochs,
        previous,
        size,
        tuple(recipe.settled("mean")),
        tuple(recipe.settled("std")),
        splits.class_names,
        mixed=recipe.mixup > 0 or recipe.cutmix > 0,
        class_weights=loss_weights(recipe.class_weights, splits.class_counts, splits.class_names),
        sampler=recipe.choice("sampler"),
    )
