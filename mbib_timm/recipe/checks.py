"""What a recipe may not say: keys that contradict one another, and keys without an effect.

Types and ranges are those of `mbib_timm.options`; what data, model and weights allow, `mbib_timm.training.setup` finds
out.
"""

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbib_timm.errors import MbibError, shown, unknown_name
from mbib_timm.files import counted
from mbib_timm.options import build_options, check_options, default_of, option
from mbib_timm.recipe.declared import DeclaredMethod, known_methods, packaged_methods, stream_names
from mbib_timm.recipe.policy_names import parse_policy

if TYPE_CHECKING:
    from mbib_timm.recipe.keys import Recipe

# Keys that describe a table.
TABLE_KEYS = ("table", "path_column", "label_column", "split_column", "group_column")
# Keys that some sources alone read, and those sources.
KEYS_OF_SOURCES = {
    **dict.fromkeys(("train_list", "val_list", "test_list"), ("list", "inat2018")),
    "class_map": ("list", "wds"),
}
# Arguments of a model that other keys give, and what timm itself would do with some of them.
OTHER_KEYS = {
    "num_classes": "the number of classes is that of the data; see key 'num_classes'",
    "pretrained": "see key 'pretrained'",
    "checkpoint_path": "see key 'initial_checkpoint'",
    "features_only": "a model of features has no classes",
}
# How evaluated images become the model's input where padded crops of whole images are trained on.
WHOLE_IMAGES: Mapping[str, Any] = {"crop_pct": 1.0, "crop_mode": "squash"}
# Bytes of a batch of images in float32 that are too many for any device: activations take many times as much.
LARGEST_INPUT = 2**33

# timm's optimizers that pass over `momentum`, as far as many use them; and keys that matter to a stage without epochs.
WITHOUT_MOMENTUM = ("adam", "adamw", "adamax", "nadam", "nadamw", "radam", "radamw", "adagrad", "adopt", "lamb", "lion")
ALWAYS_READ = ("epochs", "warmup_epochs", "validation_batch_size")

# Class weights by name, and the number that one takes after a colon where the name gives none.
CLASS_WEIGHTS = {"none": None, "balanced": None, "effective": 0.9999, "power": 0.5}
WEIGHT_FILES = (".csv", ".json", ".yaml", ".yml")


def check_recipe(recipe: "Recipe", method: DeclaredMethod) -> None:
    """Raise MbibError, with the key at fault, for a stage whose values have their types and lie in their ranges."""
    _check_data(recipe)
    _check_sampler(recipe, method)
    _check_mixing(recipe, method)
    _check_class_weights(recipe, method)
    _check_values(recipe)
    _check_model(recipe)
    _check_views(recipe, method)
    _check_features(recipe, method)
    _check_stage(recipe, method)


def _check_data(recipe: "Recipe") -> None:
    of_table = recipe.dataset == "table"
    if of_table and recipe.table is None:
        raise MbibError("recipe key 'table': dataset: table needs the CSV or Parquet file that lists the images")
    needs = dict.fromkeys(TABLE_KEYS, ("dataset: table", of_table))
    for key, sources in KEYS_OF_SOURCES.items():
        needs[key] = f"dataset: {' or '.join(sources)}", recipe.dataset in sources
    needs["group_by"] = ("dataset: folder or table", of_table or recipe.dataset == "folder")
    _require_effect(recipe, needs)
    _require_effect(recipe, {"group_column": ("group_by: column", recipe.group_by == "column")})
    kind, _, argument = (recipe.group_by or "").partition(":")
    if recipe.group_by is None or (kind == "folder" and argument.isdecimal() and int(argument) > 0):
        return
    if recipe.group_by == "column":
        _require_effect(recipe, {"group_by": ("dataset: table, whose column it means", of_table)})
        return
    if kind != "pattern" or not argument:
        raise MbibError(
            "recipe key 'group_by': expected column, folder:N with N from 1, or pattern:REGEX, got "
            f"{shown(recipe.group_by)}"
        )
    if check_part("recipe key 'group_by'", argument).groups == 0:
        raise MbibError(
            f"recipe key 'group_by': {shown(argument)} has no group in parentheses, for what the images of a group "
            "share; such as pattern:(site[0-9]+)"
        )


def _check_sampler(recipe: "Recipe", method: DeclaredMethod) -> None:
    try:
        wanted = len(stream_names(method.sampler))
    except MbibError as error:  # a plugin may register it after the method
        raise MbibError(f"method {method.name!r}: {error}") from None
    if recipe.sampler is None:
        return
    given = len(stream_names(recipe.sampler))
    if given != wanted:
        streams = {1: "one stream", 2: "two streams"}
        raise MbibError(
            f"recipe key 'sampler': method {method.name!r} takes {streams[wanted]} of images, as in "
            f"{method.sampler!r}; {recipe.sampler!r} gives {streams[given]}"
        )


def _check_mixing(recipe: "Recipe", method: DeclaredMethod) -> None:
    on = [key for key in ("mixup", "cutmix") if getattr(recipe, key) > 0]
    _require_effect(
        recipe,
        {
            "cutmix_sampler": ("CutMix, and cutmix is 0; 1 is its usual alpha", "cutmix" in on),
            "mixup_prob": ("mixup or cutmix, and both are 0", bool(on)),
            "mixup_switch_prob": ("both mixup and cutmix above 0", len(on) == 2),
            "mixup_off_epochs": ("mixup or cutmix, and both are 0", bool(on)),
        },
    )
    if 2 * recipe.mixup_off_epochs >= recipe.epochs > 0 and on:
        raise MbibError(
            f"recipe key 'mixup_off_epochs': {recipe.mixup_off_epochs} at either end leaves none of the "
            f"{recipe.epochs} epochs to mix in"
        )
    if recipe.cutmix_sampler is not None:
        if len(stream_names(recipe.cutmix_sampler)) > 1:
            raise MbibError(f"recipe key 'cutmix_sampler': expected one sampler, got {shown(recipe.cutmix_sampler)}")
        if len(stream_names(method.sampler)) > 1:
            raise MbibError(
                f"recipe key 'cutmix_sampler': method {method.name!r} takes two streams of images already, "
                f"{recipe.choice('sampler')!r}; without this key CutMix pastes images of the same batch"
            )
    if recipe.soft_targets and not method.soft_targets and not method.post_hoc:
        keys = [*on, *(["smoothing"] if recipe.smoothing else [])]
        able = [name for name, known in known_methods().items() if known.soft_targets]
        raise MbibError(
            f"recipe key{'s' if len(keys) > 1 else ''} {' and '.join(map(repr, keys))}: targets become soft, with "
            f"several classes per image, and method {method.name!r} needs labels; methods that take soft targets: "
            f"{', '.join(able)}{_of_ones_own(method, 'soft_targets')}"
        )


def _of_ones_own(method: DeclaredMethod, attribute: str) -> str:
    """Return how a plugin's method says that it can do something; empty for a method of this package."""
    return "" if method.name in packaged_methods() else f"; if it can, its class says so with {attribute} = True"


def _check_class_weights(recipe: "Recipe", method: DeclaredMethod) -> None:
    kind, _ = parse_class_weights(recipe.class_weights)
    if kind != "none" and not method.takes_class_weights and not method.post_hoc:
        able = [name for name, known in known_methods().items() if known.takes_class_weights]
        raise MbibError(
            f"recipe key 'class_weights': method {method.name!r} does not weight its loss by class; methods that do: "
            f"{', '.join(able)}{_of_ones_own(method, 'takes_class_weights')}"
        )


def parse_class_weights(text: str) -> tuple[str, float]:
    """Return what a recipe's class weights are: a name of `CLASS_WEIGHTS` or ``file``, and the exponent or beta.

    Raises:
        MbibError: neither a name nor a file of a kind that is read, or a number out of range.
    """
    if Path(text).suffix.lower() in WEIGHT_FILES:
        return "file", 0.0
    name, colon, given = text.partition(":")
    if name not in CLASS_WEIGHTS:
        error = unknown_name("value of recipe key 'class_weights'", name, CLASS_WEIGHTS)
        raise MbibError(f"{error} Give weights of your own in a file: {', '.join(WEIGHT_FILES)}")
    default = CLASS_WEIGHTS[name]
    if not colon:
        return name, 1.0 if default is None else default
    try:
        number = float(given)
    except ValueError:
        number = float("nan")
    if default is None:
        raise MbibError(f"recipe key 'class_weights': {name} takes no number, got {shown(text)}")
    if not (0 <= number < 1 if name == "effective" else 0 <= number < float("inf")):
        allowed = "a beta of at least 0 and below 1" if name == "effective" else "an exponent of at least 0"
        raise MbibError(f"recipe key 'class_weights': {name} takes {allowed}, got {shown(text)}")
    return name, number


def _check_values(recipe: "Recipe") -> None:
    for name in ("scale", "ratio"):
        low_high = getattr(recipe, name)
        if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1]:
            raise MbibError(f"recipe key {name!r}: expected two numbers, 0 < low <= high, got {shown(low_high)}")
    for name in ("mean", "std"):
        values = getattr(recipe, name)
        if values is not None and len(values) not in (1, 3):
            raise MbibError(f"recipe key {name!r}: expected 1 or 3 numbers, got {shown(values)}")
    if recipe.experiment is not None and Path(recipe.experiment).name != recipe.experiment:
        raise MbibError(f"recipe key 'experiment': expected the name of a folder, got {shown(recipe.experiment)}")
    for name in ("train", "reset"):
        check_part(f"recipe key {name!r}", getattr(recipe, name) or "")
    for name in ("batch_size", "validation_batch_size"):
        needed = 12 * getattr(recipe, name) * (recipe.img_size or 1) ** 2
        if needed > LARGEST_INPUT:
            raise MbibError(
                f"recipe keys {name!r} and 'img_size': a batch of {getattr(recipe, name):,} images of "
                f"{recipe.img_size:,} x {recipe.img_size:,} pixels takes {needed / 2**30:,.0f} GiB; expected fewer or "
                "smaller images"
            )
    if recipe.min_lr > recipe.lr:
        raise MbibError(f"recipe key 'min_lr': expected at most lr, {recipe.lr:g}, got {recipe.min_lr:g}")
    if recipe.warmup_epochs >= recipe.epochs > 0 and recipe.warmup_epochs > 0:
        raise MbibError(
            f"recipe key 'warmup_epochs': a warm-up of {counted(recipe.warmup_epochs, 'epoch')} does not fit into a "
            f"run of {counted(recipe.epochs, 'epoch')}"
        )
    if recipe.sched == "rsqrt" and recipe.warmup_epochs == 0:
        raise MbibError("recipe key 'warmup_epochs': sched: rsqrt is measured in epochs of warm-up; expected 1 or more")
    if recipe.sched == "multistep" and sorted(recipe.decay_milestones) != recipe.decay_milestones:
        raise MbibError(
            f"recipe key 'decay_milestones': expected ascending epochs, got {shown(recipe.decay_milestones)}"
        )


def check_part(where: str, part: str) -> re.Pattern[str]:
    """Return the expression that names a part of a network, or of a path. Raises MbibError where it is none."""
    try:
        return re.compile(part)
    except (re.error, OverflowError, RecursionError) as error:
        raise MbibError(f"{where}: {shown(part)} is not a regular expression: {error}") from None


@dataclass(frozen=True)
class ParamGroup:
    """What a part of what trains has of its own: a value of the recipe key ``param_groups``."""

    lr_scale: float = option(1.0, "factor on the learning rate", above=0, maximum=1e6)
    weight_decay: float = option(0.0, "weight decay of what has any", minimum=0, maximum=1e12)


def checked_groups(groups: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return a recipe's ``param_groups``, each with the values that were given for it, as numbers.

    Raises:
        MbibError: a part that cannot be, or a value that is none of `ParamGroup`.
    """
    checked = {}
    for part, given in groups.items():
        where = f"recipe key 'param_groups': {part}"
        if part in ("all", "none"):
            raise MbibError(f"{where} is not a part; what all have in common are the keys 'lr' and 'weight_decay'")
        check_part("recipe key 'param_groups'", part)
        if not isinstance(given, Mapping) or not given:
            raise MbibError(
                f"{where}: expected a mapping such as {{lr_scale: 10, weight_decay: 0}}, got {shown(given)}"
            )
        group = dataclasses.asdict(build_options(ParamGroup, given, where))
        checked[part] = {name: group[name] for name in given}
    return checked


def _check_model(recipe: "Recipe") -> None:
    inside = recipe.model_kwargs.get("backbone_args")
    for name in (*recipe.model_kwargs, *(inside if isinstance(inside, dict) else ())):
        if name in OTHER_KEYS:
            raise MbibError(f"recipe key 'model_kwargs': it gives no {name!r}: {OTHER_KEYS[name]}")
    for name, value in recipe.model_kwargs.items():
        if re.fullmatch(r"\w*drop\w*_rate", name) and value is not None:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value < 1:
                raise MbibError(
                    f"recipe key 'model_kwargs': {name}: expected a number of at least 0 and below 1, got "
                    f"{shown(value)}"
                )


def _check_augmentation(recipe: "Recipe", given: Iterable[str]) -> None:
    """Raise MbibError for a key, of those that were given, that has no effect, and for an unknown policy."""
    rrc, pad = recipe.train_crop_mode == "rrc", recipe.train_crop_mode == "pad"
    # A run with padded crops records what its evaluation does, which is no contradiction.
    needs = {
        **{
            key: ("train_crop_mode: rrc or none", not pad or getattr(recipe, key) in (None, whole))
            for key, whole in WHOLE_IMAGES.items()
        },
        "scale": ("train_crop_mode: rrc", rrc),
        "ratio": ("train_crop_mode: rrc", rrc),
        "hflip": ("train_crop_mode: pad or rrc", recipe.train_crop_mode != "none" or recipe.hflip == 0),
        "color_jitter_prob": ("color_jitter or hue", recipe.color_jitter > 0 or recipe.hue > 0),
    }
    _require_effect(recipe, {key: need for key, need in needs.items() if key in given})
    if recipe.aa is not None and "aa" in given:
        parse_policy(recipe.aa)


def _require_effect(recipe: "Recipe", needs: Mapping[str, tuple[str, bool]]) -> None:
    """Raise MbibError for a key that is not its default, and has no effect.

    Args:
        recipe: has the values.
        needs: what a key needs to have one, in words, and whether it is there.
    """
    keys = {item.name: item for item in dataclasses.fields(recipe)}
    for key, (needed, there) in needs.items():
        if not there and getattr(recipe, key) != default_of(keys[key]):
            raise MbibError(f"recipe key {key!r} has no effect without {needed}")


def check_given(recipes: Iterable["Recipe"], addresses: Iterable[str]) -> None:
    """Raise MbibError for a key that no stage reads. Recipes may hold such values for others; what is given is meant.

    Args:
        recipes: with what was given in them.
        addresses: of what was given, see `load_recipe`.
    """
    stages = [(str(number), stage) for recipe in recipes for number, stage in enumerate(recipe.chain(), start=1)]
    for address in addresses:
        number, key = re.findall(r"^(?:stage(\d+)\.)?(\w+)", address)[0]
        lacking = [_lacking(stage, key) for own, stage in stages if number in ("", own)]
        if lacking and all(lacking):
            raise MbibError(f"recipe key {address!r} has no effect without {lacking[0]}")


def _lacking(stage: "Recipe", key: str) -> str | None:
    """Return what a stage would need to read a key; None where it does."""
    known: Mapping[str, Any] = {item.name: item.metadata for item in dataclasses.fields(stage)}.get(key, {})
    if stage.epochs == 0 and (
        key in ("sampler", "class_weights", "train", "frozen_bn")
        or (known.get("group") in ("optimisation", "mixing") and key not in ALWAYS_READ)
    ):
        return f"epochs, and method {stage.method['name']!r} trains for none"
    needs = {
        **dict.fromkeys(
            ("imbalance_factor", "imbalance_max", "subset_seed"), ("imbalance: exp or step", stage.imbalance != "none")
        ),
        "momentum": (f"an optimizer that has one, unlike {stage.opt}", stage.opt not in WITHOUT_MOMENTUM),
        "clip_mode": ("clip_grad", stage.clip_grad is not None),
        "min_lr": ("sched: cosine, tanh, poly, wsd or rsqrt", stage.sched not in ("multistep", "constant")),
        "decay_milestones": ("sched: multistep", stage.sched == "multistep"),
        "decay_rate": ("sched: multistep or poly", stage.sched in ("multistep", "poly")),
        "model_ema_decay": ("model_ema", stage.model_ema),
        "amp_dtype": ("mixed precision, and amp is false", stage.amp is not False),
    }
    needed, there = needs.get(key, ("", True))
    return None if there else needed


def _check_views(recipe: "Recipe", method: DeclaredMethod) -> None:
    _check_augmentation(recipe, [item.name for item in dataclasses.fields(recipe)])
    if recipe.views is not None and len(recipe.views) != len(method.views):
        raise MbibError(
            f"recipe key 'views': method {method.name!r} takes {len(method.views)} "
            f"view{'s' * (len(method.views) != 1)} of each image, got {len(recipe.views)}"
        )
    for number, differing in enumerate(recipe.choice("views"), start=1):
        check_view_keys(number, differing, dataclasses.fields(recipe))
        try:
            view_of(recipe, differing)
        except MbibError as error:
            raise MbibError(f"view {number}: {error}") from None


def check_view_keys(number: int, differing: Mapping[str, Any], keys: Iterable[dataclasses.Field]) -> None:
    """Raise MbibError for a key in which no view of an image may differ."""
    allowed = [
        item.name
        for item in keys
        if item.name == "train_crop_mode" or (item.metadata.get("group") == "augmentation" and item.name != "views")
    ]
    for key in differing:
        if key not in allowed:
            raise unknown_name(f"key of view {number}", str(key), allowed)


def view_of(recipe: "Recipe", differing: Mapping[str, Any]) -> "Recipe":
    """Return a recipe with the augmentation of a view of each image, which differs in some keys.

    Raises:
        MbibError: values that cannot be, or that have no effect.
    """
    if not differing:
        return recipe
    view = copy.copy(recipe)
    for key, value in differing.items():
        object.__setattr__(view, key, value)
    check_options(view, "recipe key {!r}")
    _check_values(view)
    _check_augmentation(view, differing)
    # Views are cut from the images that the run holds: whole ones after pad, of any size after rrc.
    if view.train_crop_mode != recipe.train_crop_mode != "pad":
        raise MbibError(
            f"recipe key 'train_crop_mode': {recipe.train_crop_mode} applies to all views of an image; "
            f"got {view.train_crop_mode}"
        )
    return view


def _check_stage(recipe: "Recipe", method: DeclaredMethod) -> None:
    starts = recipe.previous is not None or recipe.takes_weights
    given = [key for key in ("initial_checkpoint", "pretrained") if getattr(recipe, key)]
    if given and recipe.previous is not None:
        raise MbibError(f"recipe key {given[0]!r}: stage {recipe.stage + 1} starts from the stage before")
    if given and recipe.choice("reset") == "all":
        hint = "; the model to learn from is its setting 'teacher'" if "teacher" in recipe.method else ""
        raise MbibError(
            f"recipe key {given[0]!r} has no effect: with method {method.name!r} the whole network starts anew{hint}"
        )
    if method.post_hoc and recipe.choice("classifier_start") != method.classifier_start:
        raise MbibError(
            f"recipe key 'classifier_start': method {method.name!r} trains nothing, and its classifiers are "
            f"{'class means' if method.classifier_start == 'class_means' else 'those of the model that it starts from'}"
        )
    if method.needs_start and not starts:
        raise MbibError(
            f"method {method.name!r} starts from a trained model, and this recipe gives none: put a stage before it "
            "(stages: [{method: ce}, ...]), or give --initial-checkpoint RUN"
        )
    if method.post_hoc and recipe.epochs > 0:
        raise MbibError(f"recipe key 'epochs': method {method.name!r} trains nothing; expected 0, got {recipe.epochs}")
    if recipe.lora is not None and recipe.epochs == 0:
        raise MbibError("recipe key 'lora' has no effect with epochs: 0, which trains nothing")
    if recipe.lora is not None and recipe.lora["targets"] == []:
        raise MbibError("setting 'targets' of recipe key 'lora': expected names of layers, got none")
    if recipe.lora is not None and recipe.train == "all":
        raise MbibError("recipe key 'lora' has no effect with train: all; expected train: heads, or another part")
    if recipe.epochs == 0 and not starts:
        raise MbibError("recipe key 'epochs': 0 trains nothing, and there are no weights to start from")


def _check_features(recipe: "Recipe", method: DeclaredMethod) -> None:
    """Raise MbibError where the heads are to train on stored features, and something else asks for images."""
    if recipe.feature_passes is None:
        return
    if method.needs_images or len(recipe.choice("views")) > 1:
        able = [name for name, known in known_methods().items() if not known.needs_images and len(known.views) == 1]
        raise MbibError(
            f"recipe key 'feature_passes': method {method.name!r} looks at images, not at features alone; methods that "
            f"train heads on features: {', '.join(able)}"
        )
    if recipe.lora is not None:
        raise MbibError(
            "recipe keys 'feature_passes' and 'lora': adapters change the backbone, and its features are stored"
        )
    if recipe.cutmix:
        raise MbibError("recipe keys 'feature_passes' and 'cutmix': CutMix cannot cut features; use mixup")
    starts = recipe.previous is not None or recipe.takes_weights
    if not starts or recipe.choice("reset") == "all":
        raise MbibError(
            "recipe key 'feature_passes': the frozen backbone needs weights: expected pretrained: true, "
            "initial_checkpoint, or a stage before"
        )
