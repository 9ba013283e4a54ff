"""The keys of a recipe, each typed, ranged, documented and in a group; and a recipe as a value."""

import copy
import dataclasses
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mbib_timm.errors import unknown_name
from mbib_timm.options import build_options, check_option, check_options, option, option_types
from mbib_timm.recipe.checks import WHOLE_IMAGES, check_recipe, checked_groups, view_of
from mbib_timm.recipe.declared import find_method, packaged_samplers, packaged_sources, resolve_settings
from mbib_timm.recipe.plugins import load_plugin

STAGES = "stages"
# Of timm's learning-rate schedules those whose constants recipes have: not step, which multistep can do too.
SCHEDULES = ("cosine", "tanh", "multistep", "poly", "wsd", "rsqrt", "constant")
# What numpy's and torch's generators take; and more than any run has of the rest, so that a slip of the finger is found
# before it fills the memory or never ends.
LARGEST_SEED = 2**32 - 1
MOST_CLASSES, MOST_EPOCHS, LARGEST_BATCH, LARGEST_SIDE, MOST_WORKERS = 1_000_000, 100_000, 65_536, 8192, 128
MOST_PASSES = 1000
LARGEST_RATE, LARGEST_ALPHA, LARGEST_RANK = 10**12, 10**6, 1024
# How images become a model's input: keys that a recipe leaves to the model, whose weights know them.
MODEL_KEYS = ("img_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
# Values by which a recipe leaves a choice to the machine or the model; a run's recipe.yaml has what was chosen.
OPEN_CHOICES = {"loader": "auto", "amp": None, "cuda_graph": None, **dict.fromkeys(MODEL_KEYS)}

# What is known of a key beside its type and range. `location`: it says where a run happens and not what it computes;
# a run may be resumed with other values. `evaluation`: an evaluation of a trained model depends on it too.
_data, _input, _augmentation, _mixing, _model, _method, _optimisation, _machine, _output = (
    partial(option, group=group, location=False, evaluation=group == "data")
    for group in ("data", "input", "augmentation", "mixing", "model", "method", "optimisation", "machine", "output")
)


@dataclass(frozen=True)
class LoraSettings:
    """The settings of the recipe key ``lora``. Raises MbibError where `build_options` does."""

    rank: int = option(8, "rank r of an adapter", minimum=1, maximum=LARGEST_RANK)
    alpha: float = option(16.0, "an adapter's output is multiplied by alpha / r", above=0, maximum=LARGEST_ALPHA)
    dropout: float = option(0.0, "dropout before an adapter", minimum=0, below=1)
    targets: list[str] | None = option(
        None, "names of the layers, or the ends of them; all that can have one when not given"
    )


@dataclass(frozen=True)
class Recipe:
    """One run, completely described. Raises MbibError for values that cannot be."""

    # Data
    dataset: str = _data("digits", f"data source: {', '.join(packaged_sources())}")
    data_dir: str | None = _data(
        None, "root folder (or .tar) of the data; for a table, its own folder when not given", location=True
    )
    dataset_download: bool = _data(False, "let torchvision download the data set into data_dir", location=True)
    train_split: str = _data("train", "name of the training split")
    val_split: str = _data(
        "validation",
        "name of the split that is evaluated during training; left_out, for choosing settings, has up to 50 images per "
        "class that a long-tailed subset leaves out of training",
    )
    test_split: str | None = _data(None, "name of a further split, evaluated once with the last epoch's weights")
    train_list: str | None = _data(None, "training list file or json (dataset: list, inat2018)", location=True)
    val_list: str | None = _data(None, "validation list file or json (dataset: list, inat2018)", location=True)
    test_list: str | None = _data(None, "test list file, evaluated once at the end (dataset: list)", location=True)
    class_map: str | None = _data(
        None, "file with one class name per line, in label order (dataset: list, wds)", location=True
    )
    table: str | None = _data(
        None, "CSV or Parquet file with the paths and classes of the images (dataset: table)", location=True
    )
    path_column: str = _data("path", "column with the images' paths, absolute or relative to data_dir")
    label_column: str = _data("label", "column with the names of the classes")
    split_column: str | None = _data(None, "column with the names of the splits; when not given, split if there is one")
    group_column: str | None = _data(None, "column with the groups of group_by: column; group when not given")
    val_fraction: float = _data(
        0.2, "fraction of each class held out if the data have no validation split", above=0, maximum=0.9
    )
    group_by: str | None = _data(
        None,
        "hold out whole groups of images: column (of a table), folder:N (the N-th folder below the class), "
        "pattern:REGEX (what its first parentheses match in the path below data_dir)",
    )
    broken: str = _data(
        "replace",
        "unreadable images: replace (training takes the next image instead, an evaluation leaves them out), skip (find "
        "them first, and leave them out everywhere), stop (find them first, and end with an error)",
        choices=("replace", "skip", "stop"),
    )
    num_classes: int | None = _data(
        None, "number of classes; taken from the data when not given", minimum=2, maximum=MOST_CLASSES
    )
    imbalance: str = _data(
        "none",
        "long-tailed training subset: none, exp (class counts fall exponentially), step (half of the classes are rare)",
        choices=("none", "exp", "step"),
    )
    imbalance_factor: float = _data(100.0, "images in the largest class over images in the smallest", minimum=1)
    imbalance_max: int | None = _data(
        None, "images in the largest class; as many as the data allow when not given", minimum=1
    )
    holdout: float = _data(
        0.0,
        "fraction of each class's training images that is kept out of training, for methods that choose a "
        "hyperparameter; without it, they use the images that a long-tailed subset leaves out, or the validation split "
        "if a test split is evaluated",
        minimum=0,
        maximum=0.9,
        evaluation=False,
    )
    subset_seed: int = _data(
        0, "seed that chooses the images of the long-tailed subset", minimum=0, maximum=LARGEST_SEED
    )

    loader: str = _data(
        "auto",
        "resident (decoded once, kept and augmented on the device), timm (decoded in every epoch), auto (resident if "
        "the data fit)",
        choices=("auto", "resident", "timm"),
        evaluation=False,
    )
    image_cache: str = _data(
        "auto",
        "folder that keeps decoded images for the next run, auto (in the user's cache), or none",
        location=True,
        evaluation=False,
    )

    # Input
    img_size: int | None = _input(
        None,
        "height and width of the model's input; the model's own when not given",
        minimum=1,
        maximum=LARGEST_SIDE,
        evaluation=True,
    )
    train_crop_mode: str = _input(
        "rrc",
        "training crop: pad (pad by 1/8 and crop), rrc (random resized crop), none",
        choices=("pad", "rrc", "none"),
        evaluation=True,
    )
    interpolation: str | None = _input(
        None,
        "resampling of images; the model's own when not given",
        choices=("bilinear", "bicubic", "random"),
        evaluation=True,
    )
    crop_pct: float | None = _input(
        None,
        "side of the model's input divided by that of the resized test image; the model's own when not given",
        minimum=0.01,
        maximum=2,
        evaluation=True,
    )
    crop_mode: str | None = _input(
        None,
        "how test images are cropped: center (shorter side resized, centre cropped), squash (both sides resized), "
        "border (longer side resized, the rest filled); when not given, the model's own, or with train_crop_mode: pad, "
        "squash with a crop_pct of 1",
        choices=("center", "squash", "border"),
        evaluation=True,
    )
    mean: list[float] | None = _input(
        None,
        "channel means of the normalisation; the model's own when not given",
        minimum=0,
        maximum=1,
        evaluation=True,
    )
    std: list[float] | None = _input(
        None,
        "channel standard deviations of the normalisation; the model's own when not given",
        minimum=0.001,
        maximum=1000,
        evaluation=True,
    )

    # Augmentation
    scale: list[float] = _augmentation([0.08, 1.0], "area range of the random resized crop")
    ratio: list[float] = _augmentation([0.75, 1.3333333333333333], "aspect-ratio range of the random resized crop")
    hflip: float = _augmentation(0.5, "probability of a horizontal flip", minimum=0, maximum=1)
    rotation: float = _augmentation(0.0, "largest angle of a random rotation, in degrees", minimum=0, maximum=180)
    aa: str | None = _augmentation(
        None,
        "policy: cifar10 (AutoAugment's for CIFAR), rand-m9-n2-mstd0.5-inc1 (RandAugment), or another one of timm's",
    )
    color_jitter: float = _augmentation(0.0, "brightness, contrast and saturation jitter", minimum=0, maximum=1)
    hue: float = _augmentation(0.0, "hue jitter, as a fraction of the colour wheel", minimum=0, maximum=0.5)
    color_jitter_prob: float = _augmentation(1.0, "probability of the jitter", above=0, maximum=1)
    grayscale_prob: float = _augmentation(
        0.0, "probability that an image is converted to greyscale", minimum=0, maximum=1
    )
    gaussian_blur_prob: float = _augmentation(0.0, "probability that an image is blurred", minimum=0, maximum=1)
    cutout: int = _augmentation(
        0, "side of a black square put into each image, in pixels", minimum=0, maximum=LARGEST_SIDE
    )
    views: list[dict[str, Any]] | None = _augmentation(
        None,
        "views of each image: a list with one mapping per view, of the augmentation keys that differ from the "
        "recipe's; the method's own when not given",
    )

    # Mixing: with any of these on, targets are soft
    mixup: float = _mixing(
        0.0,
        "alpha of mixup, whose weight lambda is drawn from Beta(alpha, alpha); 0 for none",
        minimum=0,
        maximum=LARGEST_ALPHA,
    )
    cutmix: float = _mixing(
        0.0,
        "alpha of CutMix, whose weight lambda is drawn from Beta(alpha, alpha); 0 for none",
        minimum=0,
        maximum=LARGEST_ALPHA,
    )
    cutmix_sampler: str | None = _mixing(
        None,
        "sampler of the images that CutMix pastes (for CMO, reverse or balanced); the same batch when not given",
    )
    mixup_prob: float = _mixing(1.0, "probability that a batch is mixed", above=0, maximum=1)
    mixup_switch_prob: float = _mixing(
        0.5, "probability of CutMix, rather than mixup, if both are on", above=0, below=1
    )
    mixup_off_epochs: int = _mixing(
        0, "epochs without mixing at the beginning, and as many at the end", minimum=0, maximum=MOST_EPOCHS
    )
    smoothing: float = _mixing(0.0, "label smoothing: fraction of a target spread over all classes", minimum=0, below=1)

    # Model
    model: str = _model(
        "mbib_resnet20", "any timm model name, e.g. mbib_resnet32; a run's folder; hf-hub:REPO; local-dir:FOLDER"
    )
    model_kwargs: dict[str, Any] = _model({}, "further keyword arguments of the model, as name=value", evaluation=True)
    pretrained: bool = _model(False, "start from the model's published weights")
    initial_checkpoint: str | None = _model(None, "start from this weights file, or a run's folder", location=True)
    feature_passes: int | None = _model(
        None,
        "train the heads alone, on features of the frozen backbone that are computed once; the first pass is over the "
        "images as an evaluation sees them, and further passes are augmented",
        minimum=1,
        maximum=MOST_PASSES,
    )

    # Method
    method: dict[str, Any] = _method(
        {"name": "mbib"}, "training method, by name, with its settings; see mbib train RECIPE --help"
    )
    plugin: list[str] = _method(
        [],
        "files or modules that register further methods; the flag takes one, and is repeated for several",
        location=True,
    )
    sampler: str | None = _method(
        None,
        f"how an epoch draws images: {', '.join(packaged_samplers())}, some with a number, as in effective:0.999; or "
        "two streams side by side, such as instance+reverse; the method's own when not given",
    )
    class_weights: str = _method(
        "none",
        "weights of the classes in the loss: none, balanced (1/n), effective[:beta] (beta 0.9999 if not given), "
        "power[:p] (n^-p; p 0.5 if not given), or a CSV, JSON or YAML file of weights by class name; scaled to a mean "
        "of 1 over the training images",
    )
    train: str | None = _method(
        None,
        "the part that trains: all, none, classifier, heads (all but the backbone), norm, bias, several of these as in "
        "heads+norm+bias, or a regular expression for parameter names; when not given, the method's own, or with lora "
        "the heads",
    )
    reset: str | None = _method(
        None,
        "the part that is initialised anew even if weights are given, named as in train; the method's own when not "
        "given",
    )
    lora: dict[str, Any] | None = _method(
        None,
        "low-rank adapters (peft) in the backbone's linear layers and 1x1 convolutions, merged when saved, as "
        "name=value: rank (8), alpha (16), dropout (0), targets (layers by the end of their names, as in [qkv, proj])",
    )
    classifier_start: str | None = _method(
        None,
        "how classifiers start before the first epoch: random, or class_means (for cosine classifiers: the class means "
        "of their inputs, standardised and scaled to length 1); the method's own when not given",
        choices=("random", "class_means"),
    )
    frozen_bn: str | None = _method(
        None,
        "batch normalisation outside the part that trains: train (batches are normalised by their own statistics, and "
        "the running ones updated) or eval (running statistics stay as they are; if everything trains, those of the "
        "backbone); the method's own when not given",
        choices=("train", "eval"),
    )

    # Optimisation
    epochs: int = _optimisation(
        200, "training epochs; 0 for a method that only changes a trained model", minimum=0, maximum=MOST_EPOCHS
    )
    batch_size: int = _optimisation(128, "training images per step and device", minimum=2, maximum=LARGEST_BATCH)
    validation_batch_size: int = _optimisation(
        256, "images per evaluation step", minimum=1, maximum=LARGEST_BATCH, evaluation=True
    )
    grad_accum_steps: int = _optimisation(1, "batches whose gradients are accumulated before a step", minimum=1)
    opt: str = _optimisation("sgd", "timm optimizer")
    opt_kwargs: dict[str, Any] = _optimisation({}, "further keyword arguments of the optimizer, as name=value")
    lr: float = _optimisation(0.1, "learning rate", above=0, maximum=LARGEST_RATE)
    momentum: float = _optimisation(0.9, "momentum of the optimizer", minimum=0, maximum=1)
    weight_decay: float = _optimisation(3e-4, "weight decay", minimum=0, maximum=LARGEST_RATE)
    filter_bias_and_bn: bool = _optimisation(False, "exclude biases and normalisation from weight decay")
    layer_decay: float | None = _optimisation(
        None, "factor on the learning rate from each layer to the one before it", above=0, maximum=1
    )
    param_groups: dict[str, Any] = _optimisation(
        {},
        "parts with their own learning rate or weight decay, as PART={lr_scale: 10, weight_decay: 0}: a factor on lr, "
        "and a value; PART is named as in train, except all and none",
    )
    clip_grad: float | None = _optimisation(None, "clip gradients at this value", above=0)
    clip_mode: str = _optimisation("norm", "how gradients are clipped", choices=("norm", "value", "agc"))
    sched: str = _optimisation("cosine", "timm learning-rate schedule", choices=SCHEDULES)
    sched_on_updates: bool = _optimisation(False, "step the learning rates after every update, not every epoch")
    warmup_epochs: int = _optimisation(0, "epochs of linear warm-up", minimum=0, maximum=MOST_EPOCHS)
    warmup_lr: float = _optimisation(1e-5, "learning rate at the start of the warm-up", minimum=0, maximum=LARGEST_RATE)
    min_lr: float = _optimisation(0.0, "lowest learning rate of the schedule", minimum=0, maximum=LARGEST_RATE)
    decay_milestones: list[int] = _optimisation(
        [161, 181],
        "milestones as timm counts them: multistep decays from each of these epochs on, counted from 1",
        minimum=1,
        maximum=MOST_EPOCHS,
    )
    decay_rate: float = _optimisation(
        0.1, "factor of each decay of multistep; the exponent of poly", above=0, maximum=100
    )
    model_ema: bool = _optimisation(False, "keep an exponential moving average of the weights, and evaluate it")
    model_ema_decay: float = _optimisation(0.9998, "decay of that average", minimum=0, below=1)

    # Machine
    device: str | None = _machine(
        None, "cpu, cuda, cuda:1, mps; detected when not given", location=True, evaluation=True
    )
    workers: int = _machine(
        2, "processes that load data", minimum=0, maximum=MOST_WORKERS, location=True, evaluation=True
    )
    pin_mem: bool | None = _machine(
        None, "pin memory for the transfer to the device; on for CUDA when not given", location=True, evaluation=True
    )
    amp: bool | None = _machine(
        None,
        "mixed precision; when not given, only on CUDA and for images of 64 pixels or more (smaller ones use TF32)",
    )
    amp_dtype: str = _machine("bfloat16", "data type of mixed precision", choices=("bfloat16", "float16"))
    channels_last: bool = _machine(True, "channels-last memory format", evaluation=True)
    torchcompile: bool = _machine(False, "compile the training step and the evaluation")
    cuda_graph: bool | None = _machine(
        None,
        "capture the training step and the evaluation in CUDA graphs; when not given, on CUDA where that is possible",
        location=True,
    )
    sync_bn: bool = _machine(False, "synchronise batch normalisation across processes")
    seed: int = _machine(0, "seed of initialisation, sample order and augmentation", minimum=0, maximum=LARGEST_SEED)

    # Output
    output: str = _output("runs", "folder of the runs", location=True)
    experiment: str | None = _output(None, "name of this run's folder; the recipe's name when not given", location=True)
    resume: str | None = _output(None, "what to resume: auto, a run's folder, or a checkpoint", location=True)
    checkpoint_seconds: float = _output(
        5.0, "minimum seconds between checkpoints, which are written at the end of an epoch", minimum=0, location=True
    )
    checkpoint_steps: int | None = _output(
        None,
        "updates between additional checkpoints within an epoch; timm's loader then draws an image's augmentation by "
        "its place in the epoch",
        minimum=1,
        location=True,
    )
    val_interval: int = _output(1, "epochs between evaluations; the last epoch is always evaluated", minimum=1)
    log_interval: int = _output(50, "steps between log lines and checks of the loss", minimum=1, location=True)
    log_tensorboard: bool = _output(False, "write TensorBoard logs", location=True)
    log_trackio: bool = _output(False, "log to Trackio", location=True)
    log_wandb: bool = _output(False, "log to Weights & Biases", location=True)
    previous: "Recipe | None" = None
    """The stage before, whose weights this one starts from."""

    def __post_init__(self) -> None:
        if isinstance(self.method, str):
            object.__setattr__(self, "method", {"name": self.method})
        check_options(self, "recipe key {!r}")
        object.__setattr__(self, "model", _as_model(self.model))
        object.__setattr__(self, "plugin", [load_plugin(plugin) for plugin in self.plugin])
        declared, settings = resolve_settings(self.method)
        object.__setattr__(self, "method", {"name": declared.name, **settings})
        object.__setattr__(self, "param_groups", checked_groups(self.param_groups))
        if self.lora is not None:
            lora = build_options(LoraSettings, self.lora, "recipe key 'lora'")
            object.__setattr__(self, "lora", dataclasses.asdict(lora))
        check_recipe(self, declared)

    @property
    def stage(self) -> int:
        """The number of stages before this one."""
        return 0 if self.previous is None else self.previous.stage + 1

    @property
    def takes_weights(self) -> bool:
        """Whether this stage starts from weights by itself: published ones, or those of a file."""
        return self.pretrained or self.initial_checkpoint is not None

    @property
    def split_names(self) -> list[str]:
        """Names of the splits for training and validation, and of a further one for testing if there is one."""
        tests = self.test_split is not None or self.test_list is not None
        return [self.train_split, self.val_split, *([self.test_split or "test"] if tests else [])]

    @property
    def root(self) -> str:
        """The folder or archive that the paths of images in a table begin at."""
        return self.data_dir or str(Path(self.table or "").parent)

    @property
    def soft_targets(self) -> bool:
        """Whether training targets are (B, K): images are mixed, or labels smoothed."""
        return self.mixup > 0 or self.cutmix > 0 or self.smoothing > 0

    def choice(self, key: str) -> Any:
        """Return the value of a key that is left to the method where it is None: sampler, views, train, reset,
        classifier_start or frozen_bn."""
        value = getattr(self, key)
        if value is not None:
            return value
        own = getattr(find_method(self.method["name"]), key if key != "train" else "part")
        return "heads" if key == "train" and own == "all" and self.lora is not None else own

    @property
    def adapters(self) -> LoraSettings | None:
        """The settings of the key ``lora``; None without adapters."""
        return None if self.lora is None else LoraSettings(**self.lora)

    def settled(self, key: str) -> Any:
        """Return the value of a key of `MODEL_KEYS`, of a recipe that has a model's; see `settle`.

        Raises:
            ValueError: the recipe leaves it to a model, and has none yet.
        """
        if (value := getattr(self, key)) is None:
            raise ValueError(f"recipe key {key!r} is left to the model: settle the recipe with one")
        return value

    def augmentations(self) -> "list[Recipe]":
        """Return the recipe of each view of an image: this one, with what the view has of its own."""
        return [view_of(self, differing) for differing in self.choice("views")]

    def chain(self) -> "list[Recipe]":
        """Return the stages in order, this one last."""
        return [*(self.previous.chain() if self.previous else []), self]

    def replace(self, **changes: Any) -> "Recipe":
        """Return a copy whose last stage has other values; `everywhere` changes all stages.

        Raises:
            MbibError: unknown keys and impossible values.
        """
        return self.replace_previous(self.previous, **changes)

    def everywhere(self, **changes: Any) -> "Recipe":
        """Return a copy all of whose stages have other values. Raises MbibError as `replace` does."""
        before = None if self.previous is None else self.previous.everywhere(**changes)
        return self.replace_previous(before, **changes)

    def replace_previous(self, previous: "Recipe | None", **changes: Any) -> "Recipe":
        """Return a copy after another stage, with other values. Raises MbibError as `replace` does."""
        for name in changes:
            require_key(name)
        return dataclasses.replace(self, previous=previous, **changes)

    def with_choices_of(self, run: "Recipe") -> "Recipe":
        """Return a copy with what a run has chosen, stage by stage, of the `OPEN_CHOICES` of this recipe.

        How an evaluation crops is chosen by how training does: of a run that crops otherwise it is not taken.
        """
        before = self.previous
        if before is not None and run.previous is not None:
            before = before.with_choices_of(run.previous)
        other = WHOLE_IMAGES if self.train_crop_mode != run.train_crop_mode else ()
        free = [key for key, value in OPEN_CHOICES.items() if getattr(self, key) == value and key not in other]
        chosen = {key: getattr(run, key) for key in free}
        return self.replace_previous(before, **chosen)

    def keys(self) -> dict[str, Any]:
        """Return this stage's keys and values."""
        return {name: copy.deepcopy(getattr(self, name)) for name in KEYS}

    def to_dict(self) -> dict[str, Any]:
        """Return keys and values as ``recipe.yaml`` has them: what the stages share, then under ``stages`` the rest."""
        return _fold([stage.keys() for stage in self.chain()])

    def computation(self) -> dict[str, Any]:
        """Return what decides what is computed: all but paths, device, workers and logging; stages as in `to_dict`."""
        stages = [{name: getattr(stage, name) for name in COMPUTING} for stage in self.chain()]
        for stage, keys in zip(self.chain(), stages, strict=True):
            if stage.checkpoint_steps is not None and stage.loader == "timm":  # it has other draws, however many
                keys["checkpoint_steps"] = "given"
        return _fold(stages)


KEYS: dict[str, dataclasses.Field] = {item.name: item for item in dataclasses.fields(Recipe) if item.name != "previous"}
TYPES: dict[str, Any] = {name: kind for name, kind in option_types(Recipe).items() if name in KEYS}
# Those that decide what is computed: all but paths, device, workers and logging.
COMPUTING = tuple(name for name, item in KEYS.items() if not item.metadata["location"])
# Those that say where the data are.
DATA_PLACES = ("data_dir", "table", "train_list", "val_list", "test_list", "class_map")
# Recipes that agree in these see the same images.
DATA_KEYS = tuple(name for name, item in KEYS.items() if item.metadata["group"] in ("data", "input"))
# Those that decide which images there are, with which labels; the other two say who decodes them, and where they stay.
OPENED_BY = tuple(
    name for name, item in KEYS.items() if item.metadata["group"] == "data" and name not in ("loader", "image_cache")
)


def _as_model(name: str) -> str:
    """Return a model as timm knows it: a folder is ``local-dir:FOLDER``. No name of timm's has a slash."""
    return f"local-dir:{name}" if "/" in name and ":" not in name and os.path.isdir(name) else name


def require_key(name: str) -> None:
    """Raise MbibError for what is no recipe key, with the nearest valid one."""
    if name not in KEYS:
        raise unknown_name("recipe key", name, KEYS)


def check_key(name: str, value: Any) -> None:
    """Raise MbibError for what is no recipe key, and for a value of another type or out of its range."""
    require_key(name)
    check_option(KEYS[name], TYPES[name], value, f"recipe key {name!r}")


def _fold(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what stages have in common, and what they have not, as one mapping."""
    if len(stages) == 1:
        return stages[0]
    common = {key: value for key, value in stages[0].items() if all(stage[key] == value for stage in stages)}
    return {**common, STAGES: [{k: v for k, v in stage.items() if k not in common} for stage in stages]}


def longest_epochs(recipe: Recipe) -> int:
    """Return the epochs of a recipe's longest stage: what is meant by a run's epochs where it has several stages."""
    return max(stage.epochs for stage in recipe.chain())


def in_proportion(recipe: Recipe, epochs: int) -> dict[str, Any]:
    """Return overrides by which a recipe takes other epochs; what counts in epochs moves along.

    That is the warm-up, milestones, epochs without mixing, and the memory of the weights' moving average. Of several
    stages the longest takes `epochs`, and the others keep their share.
    """
    chain = recipe.chain()
    longest = longest_epochs(recipe)
    changes: dict[str, Any] = {}
    for number, stage in enumerate(chain, start=1):
        if longest == epochs or stage.epochs == 0:
            continue
        share = epochs / longest
        own = max(1, round(share * stage.epochs))
        warmup = min(max(1, round(share * stage.warmup_epochs)), own - 1) if stage.warmup_epochs else 0
        # As timm counts them, milestone m ends m - 1 epochs, and that number moves.
        milestones = [1 + max(min(1, m - 1), round(share * (m - 1))) for m in stage.decay_milestones]
        off = min(max(1, round(share * stage.mixup_off_epochs)), (own - 1) // 2) if stage.mixup_off_epochs else 0
        prefix = f"stage{number}." if len(chain) > 1 else ""
        scaled: dict[str, Any] = {
            "epochs": own,
            "warmup_epochs": warmup,
            "decay_milestones": milestones,
            "mixup_off_epochs": off,
        }
        if stage.model_ema:  # its memory, which is 1 / (1 - decay) steps, is as long a part of the training as before
            scaled["model_ema_decay"] = 1 - min(1.0, (1 - stage.model_ema_decay) / share)
        changes |= {f"{prefix}{key}": value for key, value in scaled.items()}
    return changes
