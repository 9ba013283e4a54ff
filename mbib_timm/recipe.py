"""The recipe: every setting of a run in one flat, typed, checked record.

A recipe is a YAML file whose keys are the fields of `Recipe`, named as in timm's train.py where timm has the
flag. Every key is also a flag of `mbib train`. What a file leaves out keeps the default below; what it should
not hold is refused, with the nearest valid key.
"""

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mbib_timm.errors import MbibError, unknown_name

DEFAULT_RECIPE = "digits/mbib_resnet20"


def key(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
    location: bool = False,
) -> Any:
    """Declare a recipe key: its default, its help text and the values it accepts.

    Args:
        default: value when neither the file nor the command line gives one.
        help: one line for ``mbib train --help``.
        minimum: smallest value accepted.
        above: value that must be exceeded.
        maximum: largest value accepted.
        choices: the strings accepted.
        location: True for keys that say where a run happens and not what it computes. A run may be resumed
            with other values for these.
    """
    metadata = dict(help=help, minimum=minimum, above=above, maximum=maximum, choices=choices, location=location)
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Recipe:
    """One run, completely described. Raises MbibError for values that cannot be."""

    # Data
    dataset: str = key(
        "digits", "data source: digits, torch/cifar10, torch/cifar100, folder, list, inat2018, hfds/NAME, wds"
    )
    data_dir: str | None = key(None, "root folder (or .tar) of the data", location=True)
    dataset_download: bool = key(False, "let torchvision download the data set into data_dir", location=True)
    train_split: str = key("train", "name of the training split")
    val_split: str = key("validation", "name of the split that is evaluated during training")
    test_split: str | None = key(None, "name of a further split, evaluated once with the last epoch's weights")
    train_list: str | None = key(None, "training list file or json (dataset: list, inat2018)", location=True)
    val_list: str | None = key(None, "validation list file or json (dataset: list, inat2018)", location=True)
    test_list: str | None = key(None, "test list file, evaluated once at the end (dataset: list)", location=True)
    class_map: str | None = key(
        None, "file with one class name a line, in label order (dataset: list, wds)", location=True
    )
    class_counts: str | None = key(
        None, "file with the training images of each class, for sources that stream", location=True
    )
    val_fraction: float = key(
        0.2, "share of each class held out where the data have no validation split", above=0, maximum=0.9
    )
    num_classes: int | None = key(None, "number of classes; taken from the data when not given", minimum=2)
    imbalance: str = key("none", "shape of the long-tailed training subset", choices=("none", "exp", "step"))
    imbalance_factor: float = key(100.0, "images of the largest class over images of the smallest", minimum=1)
    imbalance_max: int | None = key(
        None, "images of the largest class; the most that the data allow when not given", minimum=1
    )
    subset_seed: int = key(
        0, "seed that chooses the images of the long-tailed subset, and of those the held-out ones", minimum=0
    )
    holdout: float = key(
        0.0,
        "share of each class's training images that is held out, for methods that choose a constant; at 0 they take "
        "the training images that the long-tailed subset leaves out, else the validation split where there is a test "
        "split as well",
        minimum=0,
        maximum=0.9,
    )

    loader: str = key(
        "auto",
        "resident (decoded once, kept and augmented on the device), timm (decoded in every epoch), auto (resident if "
        "the data fit)",
        choices=("auto", "resident", "timm"),
    )
    image_cache: str = key(
        "auto", "folder that keeps decoded images for the next run; auto: in the user's cache; none", location=True
    )

    # Input
    img_size: int | None = key(None, "height and width of the model's input; the model's own when not given", minimum=1)
    train_crop_mode: str = key(
        "rrc",
        "training crop: pad (pad by 1/8 and crop), rrc (random resized crop), none",
        choices=("pad", "rrc", "none"),
    )
    scale: list[float] = key([0.08, 1.0], "area range of the random resized crop")
    ratio: list[float] = key([0.75, 1.3333333333333333], "aspect-ratio range of the random resized crop")
    hflip: float = key(0.5, "probability of a horizontal flip", minimum=0, maximum=1)
    color_jitter: float = key(0.0, "brightness, contrast and saturation jitter", minimum=0, maximum=1)
    aa: str | None = key(None, "timm auto-augment policy, e.g. rand-m9-mstd0.5")
    interpolation: str = key("bicubic", "resampling of images", choices=("bilinear", "bicubic", "random"))
    crop_pct: float = key(0.875, "share of the resized test image that the centre crop keeps", above=0, maximum=1)
    mean: list[float] = key([0.485, 0.456, 0.406], "channel means of the normalisation")
    std: list[float] = key([0.229, 0.224, 0.225], "channel standard deviations of the normalisation")

    # Model
    model: str = key("mbib_resnet20", "any timm model name, e.g. mbib_resnet32; hf-hub:REPO; local-dir:FOLDER")
    model_kwargs: dict[str, Any] = key({}, "further keyword arguments of the model, as name=value")
    pretrained: bool = key(False, "start from the model's published weights")
    initial_checkpoint: str | None = key(None, "start from this weights file, or a run's folder", location=True)

    # Loss
    loss: str = key("mbib", "ce, focal, bsce, bib, mbib, se_mbib, all_mbib")
    beta: float = key(5.0, "weight of the self-distillation loss (eq. 9)", minimum=0)
    gamma: float = key(0.0, "exponent of the class temperatures (eq. 8)", minimum=0)
    class_weight_power: float = key(0.1, "exponent m of the class weights (eq. 7)", minimum=0)
    normalize_class_weights: bool = key(
        True, "divide a batch's class-weighted loss by the sum of the weights, and not by the number of images"
    )
    logit_adjustment: bool = key(True, "add log n to the logits in the losses bib to all_mbib (eq. 4)")
    observation_weights: list[float] = key(
        [0.1, 0.3, 1.0], "weights a, b, ..., 1 of the observations' BIB terms (eq. 11)"
    )
    focal_gamma: float = key(2.0, "focusing exponent of the focal loss", minimum=0)

    # Optimisation
    sampler: str | None = key(
        None,
        "training images of an epoch: instance, balanced, sqrt, progressive, reverse, effective[:beta], "
        "class_aware[:m]; two streams as instance+reverse",
    )
    task: str = key("classification", "training task")
    epochs: int = key(200, "epochs of training", minimum=1)
    batch_size: int = key(128, "training images of a step on one device", minimum=2)
    validation_batch_size: int = key(256, "images of an evaluation step", minimum=1)
    grad_accum_steps: int = key(1, "batches whose gradients are added before a step", minimum=1)
    opt: str = key("sgd", "timm optimizer")
    opt_kwargs: dict[str, Any] = key({}, "further keyword arguments of the optimizer, as name=value")
    lr: float = key(0.1, "learning rate", above=0)
    momentum: float = key(0.9, "momentum of the optimizer", minimum=0, maximum=1)
    weight_decay: float = key(3e-4, "weight decay", minimum=0)
    filter_bias_and_bn: bool = key(False, "leave biases and normalisation out of the weight decay")
    layer_decay: float | None = key(
        None, "factor on the learning rate from each layer to the one before it", above=0, maximum=1
    )
    clip_grad: float | None = key(None, "clip gradients at this value", above=0)
    clip_mode: str = key("norm", "how gradients are clipped", choices=("norm", "value", "agc"))
    sched: str = key("cosine", "timm learning-rate schedule")
    warmup_epochs: int = key(0, "epochs of linear warm-up", minimum=0)
    warmup_lr: float = key(1e-5, "learning rate at the start of the warm-up", minimum=0)
    min_lr: float = key(0.0, "lowest learning rate of the schedule", minimum=0)
    decay_milestones: list[int] = key([161, 181], "timm's milestones: multistep decays from the epoch before each")
    decay_rate: float = key(0.1, "factor of each decay", above=0)
    model_ema: bool = key(False, "keep an exponential moving average of the weights, and evaluate it")
    model_ema_decay: float = key(0.9998, "decay of that average", minimum=0, maximum=1)

    # Machine
    device: str | None = key(None, "cpu, cuda, cuda:1, mps; found when not given", location=True)
    workers: int = key(2, "processes that load data", minimum=0, location=True)
    pin_mem: bool | None = key(
        None, "pin memory for the transfer to the device; on for CUDA when not given", location=True
    )
    amp: bool | None = key(None, "mixed precision; on for CUDA when not given")
    amp_dtype: str = key("bfloat16", "precision of mixed precision", choices=("bfloat16", "float16"))
    channels_last: bool = key(True, "channels-last memory format")
    torchcompile: bool = key(False, "compile the training step and the evaluation")
    cuda_graph: bool = key(False, "capture the training step in a CUDA graph")
    sync_bn: bool = key(False, "synchronise batch normalisation across processes")
    seed: int = key(0, "seed of initialisation, sample order and augmentation", minimum=0)

    # Output
    output: str = key("runs", "folder of the runs", location=True)
    experiment: str | None = key(None, "name of this run's folder; the recipe's name when not given", location=True)
    resume: str | None = key(None, "auto, or a run's folder or checkpoint, to continue from", location=True)
    checkpoint_seconds: float = key(
        5.0, "least time between checkpoints, which are written at the end of an epoch", minimum=0, location=True
    )
    val_interval: int = key(1, "epochs between evaluations; the last epoch is always evaluated", minimum=1)
    log_interval: int = key(50, "steps between log lines and checks of the loss", minimum=1, location=True)
    log_tensorboard: bool = key(False, "write TensorBoard logs", location=True)
    log_wandb: bool = key(False, "log to Weights & Biases", location=True)

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = _typed(item.name, getattr(self, item.name), TYPES[item.name])
            object.__setattr__(self, item.name, value)
            _check_range(item, value)
        for name in ("scale", "ratio"):
            low_high = getattr(self, name)
            if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1]:
                raise MbibError(f"recipe key {name!r}: expected two numbers, 0 < low <= high, got {low_high}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, 3):
                raise MbibError(f"recipe key {name!r}: expected 1 or 3 numbers, got {getattr(self, name)}")
        if min(self.std) <= 0:
            raise MbibError(f"recipe key 'std': expected positive numbers, got {self.std}")
        if not self.observation_weights or min(self.observation_weights) < 0:
            raise MbibError(
                f"recipe key 'observation_weights': expected numbers of at least 0, got {self.observation_weights}"
            )
        if self.experiment is not None and Path(self.experiment).name != self.experiment:
            raise MbibError(f"recipe key 'experiment': expected the name of a folder, got {self.experiment!r}")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs > 0:
            raise MbibError(f"recipe key 'warmup_epochs': {self.warmup_epochs} leaves none of the {self.epochs} epochs")
        if self.sched == "multistep" and sorted(self.decay_milestones) != self.decay_milestones:
            raise MbibError(f"recipe key 'decay_milestones': expected ascending epochs, got {self.decay_milestones}")

    def replace(self, **changes: Any) -> "Recipe":
        """Return a copy with other values. Raises MbibError for unknown keys and impossible values."""
        for name in changes:
            if name not in TYPES:
                raise unknown_name("recipe key", name, TYPES)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the keys and values, as written to ``recipe.yaml``."""
        return dataclasses.asdict(self)

    def computation(self) -> dict[str, Any]:
        """Return the keys that decide what is computed: all but paths, device, workers and logging."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata["location"]}


TYPES: dict[str, Any] = typing.get_type_hints(Recipe)
# The sections Data and Input: recipes that agree in these see the same images.
DATA_KEYS = tuple(TYPES)[: list(TYPES).index("std") + 1]


def _typed(name: str, value: Any, expected: Any) -> Any:
    """Return `value` as the type that the key `name` expects, or raise MbibError."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is types.UnionType:
        if value is None:
            return None
        return _typed(name, value, arguments[0])
    if origin is list and isinstance(value, list | tuple):
        return [_typed(name, item, arguments[0]) for item in value]
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if expected is float and isinstance(value, str):
        # YAML reads 3e-4 (no dot) as a string.
        with contextlib.suppress(ValueError):
            value = float(value)
    if expected is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise MbibError(f"recipe key {name!r}: expected a finite number, got {value}")
        return float(value)
    if expected is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if expected in (str, bool) and isinstance(value, expected):
        return value
    wanted = (origin or expected).__name__
    if origin is list:
        wanted = f"list of {arguments[0].__name__}"
    raise MbibError(f"recipe key {name!r}: expected {wanted}, got {value!r}")


def _check_range(item: dataclasses.Field, value: Any) -> None:
    limits = item.metadata
    if value is None:
        return
    if limits["choices"] and value not in limits["choices"]:
        raise unknown_name(f"value of recipe key {item.name!r}", value, limits["choices"])
    if isinstance(value, int | float):
        if limits["minimum"] is not None and value < limits["minimum"]:
            raise MbibError(f"recipe key {item.name!r}: expected at least {limits['minimum']:g}, got {value:g}")
        if limits["above"] is not None and value <= limits["above"]:
            raise MbibError(f"recipe key {item.name!r}: expected more than {limits['above']:g}, got {value:g}")
        if limits["maximum"] is not None and value > limits["maximum"]:
            raise MbibError(f"recipe key {item.name!r}: expected at most {limits['maximum']:g}, got {value:g}")


def recipes_folder() -> Path:
    """Return the folder of the recipes that come with the package."""
    installed = Path(__file__).parent / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "recipes"


def list_recipes() -> list[str]:
    """Return the names of the recipes that come with the package, e.g. ``cifar100_lt_if100/mbib_resnet32``."""
    root = recipes_folder()
    names = (path.relative_to(root).with_suffix("").as_posix() for path in root.glob("**/*.yaml"))
    return sorted(name for name in names if not name.startswith("sweeps/"))


def find_recipe(name: str) -> Path:
    """Return the file of a recipe, given the path of a file or the name of a packaged recipe.

    Raises:
        MbibError: neither exists; the nearest names are given.
    """
    if Path(name).is_file():
        return Path(name)
    packaged = recipes_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if packaged.is_file():
        return packaged
    raise unknown_name("recipe", name, list_recipes())


def recipe_name(path: Path) -> str:
    """Return a run's name, ``<file stem>.<folder>``: ``mbib_resnet32.cifar100_lt_if100`` is a model's arch.tag.

    The recipe.yaml that a run leaves in its folder has the name of that run.
    """
    if path.name == "recipe.yaml":
        return path.resolve().parent.name
    return f"{path.stem}.{path.resolve().parent.name}"


def recipe_claims(path: Path) -> dict[str, str]:
    """Return what a recipe's first comment says: Yields, Hardware, Time, Command, Paper."""
    claims: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").split("\n\n")[0].splitlines():
        key, text = line[2:12].strip(), line[12:].strip()
        if key[:1].isupper():
            claims[key] = text
        elif not key and claims:  # goes on on the next line
            claims[list(claims)[-1]] += f" {text}"
    return claims


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file and apply overrides.

    Args:
        path: a YAML file with keys of `Recipe`.
        overrides: values that replace the file's.

    Raises:
        MbibError: the file is not a flat mapping, or holds an unknown key, a wrong type or an impossible value.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MbibError(f"{path}: not a YAML file ({str(error).splitlines()[0]})") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise MbibError(f"{path}: expected 'key: value' lines, got a {type(content).__name__}")
    for name in content:
        if name not in TYPES:
            raise unknown_name(f"key in {path.name}", str(name), TYPES)
    return Recipe(**{**content, **(overrides or {})})


def dump_recipe(recipe: Recipe) -> bytes:
    """Return the resolved recipe as YAML."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True).encode()
