"""The recipe: every setting of a run, typed and checked: data, model, method, optimisation, machine.

A recipe is a YAML file whose keys are the fields of `Recipe`, named as in timm's train.py where timm has the flag.
Every key is also a flag of `mbib train`. What a file leaves out keeps the default below; what it should not hold is
refused, with the nearest valid key. Three keys are more than values:

```yaml
base: cifar100_lt                       # another file, whose keys hold where this one has none of its own
model: cifar_resnet32
method: {name: bsce}                    # with settings of its own, checked by the method
stages:                                 # runs one after another, each from the weights of the one before
  - {method: ce}                        # a stage's keys win over those outside
  - {method: crt, epochs: 30, lr: 0.1}
```
"""

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mbib_timm.errors import MbibError, unknown_name
from mbib_timm.options import check_options, default_of, option, option_types

if TYPE_CHECKING:
    from mbib_timm.methods import Method

DEFAULT_RECIPE = "mbib_resnet20.digits"
BASE, STAGES = "base", "stages"

# What is known of a key beside its type and range. `location`: it says where a run happens and not what it computes;
# a run may be resumed with other values. `evaluation`: an evaluation of a trained model depends on it too.
_data, _input, _augmentation, _mixing, _model, _method, _optimisation, _machine, _output = (
    partial(option, group=group, location=False, evaluation=evaluation)
    for group, evaluation in (
        ("data", True),
        ("input", False),
        ("augmentation", False),
        ("mixing", False),
        ("model", False),
        ("method", False),
        ("optimisation", False),
        ("machine", False),
        ("output", False),
    )
)


@dataclass(frozen=True)
class Recipe:
    """One run, completely described. Raises MbibError for values that cannot be."""

    # Data
    dataset: str = _data(
        "digits", "data source: digits, torch/cifar10, torch/cifar100, folder, list, inat2018, hfds/NAME"
    )
    data_dir: str | None = _data(None, "root folder (or .tar) of the data", location=True)
    dataset_download: bool = _data(False, "let torchvision download the data set into data_dir", location=True)
    train_split: str = _data("train", "name of the training split")
    val_split: str = _data("validation", "name of the split that is evaluated during training")
    test_split: str | None = _data(None, "name of a further split, evaluated once with the last epoch's weights")
    train_list: str | None = _data(None, "training list file or json (dataset: list, inat2018)", location=True)
    val_list: str | None = _data(None, "validation list file or json (dataset: list, inat2018)", location=True)
    test_list: str | None = _data(None, "test list file, evaluated once at the end (dataset: list)", location=True)
    class_map: str | None = _data(
        None, "file with one class name a line, in label order (dataset: list)", location=True
    )
    val_fraction: float = _data(
        0.2, "share of each class held out where the data have no validation split", above=0, maximum=0.9
    )
    num_classes: int | None = _data(None, "number of classes; taken from the data when not given", minimum=2)
    imbalance: str = _data("none", "shape of the long-tailed training subset", choices=("none", "exp", "step"))
    imbalance_factor: float = _data(100.0, "images of the largest class over images of the smallest", minimum=1)
    imbalance_max: int | None = _data(
        None, "images of the largest class; the most that the data allow when not given", minimum=1
    )
    holdout: float = _data(
        0.0,
        "share of each class's training images that is never trained on, for methods that choose a constant; without "
        "it they take the images that a long-tailed subset leaves out, or the validation split where a test split is "
        "evaluated",
        minimum=0,
        maximum=0.9,
        evaluation=False,
    )
    subset_seed: int = _data(0, "seed that chooses the images of the long-tailed subset", minimum=0)

    loader: str = _data(
        "auto",
        "resident (decoded once, kept and augmented on the device), timm (decoded in every epoch), auto (resident if "
        "the data fit)",
        choices=("auto", "resident", "timm"),
        evaluation=False,
    )
    image_cache: str = _data(
        "auto",
        "folder that keeps decoded images for the next run; auto: in the user's cache; none",
        location=True,
        evaluation=False,
    )

    # Input
    img_size: int | None = _input(
        None, "height and width of the model's input; the model's own when not given", minimum=1, evaluation=True
    )
    train_crop_mode: str = _input(
        "rrc",
        "training crop: pad (pad by 1/8 and crop), rrc (random resized crop), none",
        choices=("pad", "rrc", "none"),
        evaluation=True,
    )
    interpolation: str = _input(
        "bicubic", "resampling of images", choices=("bilinear", "bicubic", "random"), evaluation=True
    )
    crop_pct: float = _input(
        0.875, "share of the resized test image that the centre crop keeps", above=0, maximum=1, evaluation=True
    )
    mean: list[float] = _input([0.485, 0.456, 0.406], "channel means of the normalisation", evaluation=True)
    std: list[float] = _input(
        [0.229, 0.224, 0.225], "channel standard deviations of the normalisation", evaluation=True
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
    hue: float = _augmentation(0.0, "hue jitter, in turns of the colour wheel", minimum=0, maximum=0.5)
    color_jitter_prob: float = _augmentation(1.0, "probability of the jitter", above=0, maximum=1)
    grayscale_prob: float = _augmentation(0.0, "probability that an image turns grey", minimum=0, maximum=1)
    gaussian_blur_prob: float = _augmentation(0.0, "probability that an image is blurred", minimum=0, maximum=1)
    cutout: int = _augmentation(0, "side of a square of each image that is blackened, in pixels", minimum=0)
    views: list[dict[str, Any]] | None = _augmentation(
        None,
        "views of each image: for each a mapping of the augmentation keys in which it differs; the method's own when "
        "not given",
    )

    # Mixing: with any of these on, targets are soft
    mixup: float = _mixing(0.0, "alpha of mixup, whose share lambda is of Beta(alpha, alpha); 0 for none", minimum=0)
    cutmix: float = _mixing(0.0, "alpha of CutMix, whose share lambda is of Beta(alpha, alpha); 0 for none", minimum=0)
    cutmix_sampler: str | None = _mixing(
        None,
        "sampler of the images that CutMix pastes, reverse or balanced for CMO; those of the same batch when not given",
    )
    mixup_prob: float = _mixing(1.0, "probability that a batch is mixed", above=0, maximum=1)
    mixup_switch_prob: float = _mixing(
        0.5, "probability of CutMix where a batch is mixed and both are on", above=0, below=1
    )
    mixup_off_epochs: int = _mixing(0, "epochs at the beginning, and as many at the end, without mixing", minimum=0)
    smoothing: float = _mixing(0.0, "label smoothing: share of a target that all classes share", minimum=0, below=1)

    # Model
    model: str = _model("mbib_resnet20", "any timm model name, e.g. mbib_resnet32; hf-hub:REPO; local-dir:FOLDER")
    model_kwargs: dict[str, Any] = _model({}, "further keyword arguments of the model, as name=value", evaluation=True)
    pretrained: bool = _model(False, "start from the model's published weights")
    initial_checkpoint: str | None = _model(None, "start from this weights file, or a run's folder", location=True)

    # Method
    method: dict[str, Any] = _method(
        {"name": "mbib"}, "how to train, by name, with the settings of that method; see mbib train RECIPE --help"
    )
    plugin: list[str] = _method([], "files or modules that bring methods of their own", location=True)
    sampler: str | None = _method(
        None,
        "what an epoch draws: instance, balanced, sqrt, progressive, reverse, effective[:beta], class_aware[:m], or "
        "two streams side by side as instance+reverse; the method's own when not given",
    )
    train: str | None = _method(
        None,
        "the part that trains: all, classifier, or a regular expression of parameters' names; the method's own when "
        "not given",
    )
    reset: str | None = _method(
        None,
        "the part that starts anew where weights are given: none, classifier, all, or a regular expression of names; "
        "the method's own when not given",
    )
    frozen_bn: str | None = _method(
        None,
        "batch normalisation in the part that does not train: train (its running statistics go on) or eval; the "
        "method's own when not given",
        choices=("train", "eval"),
    )

    # Optimisation
    epochs: int = _optimisation(200, "epochs of training; 0 for a method that changes a trained model", minimum=0)
    batch_size: int = _optimisation(128, "training images of a step on one device", minimum=2)
    validation_batch_size: int = _optimisation(256, "images of an evaluation step", minimum=1, evaluation=True)
    grad_accum_steps: int = _optimisation(1, "batches whose gradients are added before a step", minimum=1)
    opt: str = _optimisation("sgd", "timm optimizer")
    opt_kwargs: dict[str, Any] = _optimisation({}, "further keyword arguments of the optimizer, as name=value")
    lr: float = _optimisation(0.1, "learning rate", above=0)
    momentum: float = _optimisation(0.9, "momentum of the optimizer", minimum=0, maximum=1)
    weight_decay: float = _optimisation(3e-4, "weight decay", minimum=0)
    filter_bias_and_bn: bool = _optimisation(False, "leave biases and normalisation out of the weight decay")
    layer_decay: float | None = _optimisation(
        None, "factor on the learning rate from each layer to the one before it", above=0, maximum=1
    )
    clip_grad: float | None = _optimisation(None, "clip gradients at this value", above=0)
    clip_mode: str = _optimisation("norm", "how gradients are clipped", choices=("norm", "value", "agc"))
    sched: str = _optimisation("cosine", "timm learning-rate schedule")
    warmup_epochs: int = _optimisation(0, "epochs of linear warm-up", minimum=0)
    warmup_lr: float = _optimisation(1e-5, "learning rate at the start of the warm-up", minimum=0)
    min_lr: float = _optimisation(0.0, "lowest learning rate of the schedule", minimum=0)
    decay_milestones: list[int] = _optimisation(
        [161, 181], "timm's milestones: multistep decays from the epoch before each"
    )
    decay_rate: float = _optimisation(0.1, "factor of each decay", above=0)
    model_ema: bool = _optimisation(False, "keep an exponential moving average of the weights, and evaluate it")
    model_ema_decay: float = _optimisation(0.9998, "decay of that average", minimum=0, maximum=1)

    # Machine
    device: str | None = _machine(None, "cpu, cuda, cuda:1, mps; found when not given", location=True, evaluation=True)
    workers: int = _machine(2, "processes that load data", minimum=0, location=True, evaluation=True)
    pin_mem: bool | None = _machine(
        None, "pin memory for the transfer to the device; on for CUDA when not given", location=True, evaluation=True
    )
    amp: bool | None = _machine(None, "mixed precision; on for CUDA when not given")
    amp_dtype: str = _machine("bfloat16", "precision of mixed precision", choices=("bfloat16", "float16"))
    channels_last: bool = _machine(True, "channels-last memory format", evaluation=True)
    torchcompile: bool = _machine(False, "compile the training step and the evaluation")
    cuda_graph: bool = _machine(False, "capture the training step in a CUDA graph")
    sync_bn: bool = _machine(False, "synchronise batch normalisation across processes")
    seed: int = _machine(0, "seed of initialisation, sample order and augmentation", minimum=0)

    # Output
    output: str = _output("runs", "folder of the runs", location=True)
    experiment: str | None = _output(None, "name of this run's folder; the recipe's name when not given", location=True)
    resume: str | None = _output(None, "auto, or a run's folder or checkpoint, to continue from", location=True)
    checkpoint_seconds: float = _output(
        5.0, "least time between checkpoints, which are written at the end of an epoch", minimum=0, location=True
    )
    val_interval: int = _output(1, "epochs between evaluations; the last epoch is always evaluated", minimum=1)
    log_interval: int = _output(50, "steps between log lines and checks of the loss", minimum=1, location=True)
    log_tensorboard: bool = _output(False, "write TensorBoard logs", location=True)
    log_wandb: bool = _output(False, "log to Weights & Biases", location=True)
    previous: "Recipe | None" = None
    """The stage before, whose weights this one starts from."""

    def __post_init__(self) -> None:
        from mbib_timm.methods import load_plugin, resolve_method  # methods need torch; what only lists names does not

        if isinstance(self.method, str):
            object.__setattr__(self, "method", {"name": self.method})
        check_options(self, "recipe key {!r}")
        object.__setattr__(self, "plugin", [load_plugin(plugin) for plugin in self.plugin])
        kind, settings = resolve_method(self.method)
        object.__setattr__(self, "method", {"name": kind.name, **settings})
        self._check_sampler(kind)
        self._check_mixing(kind)
        self._check_ranges()
        self._check_views(kind)
        self._check_stage(kind)

    def _check_sampler(self, kind: "type[Method]") -> None:
        if self.sampler is None:
            return
        from mbib_timm.data.samplers import parse_sampler

        given, wanted = len(parse_sampler(self.sampler)), len(parse_sampler(kind.sampler))
        if given != wanted:
            streams = {1: "one stream", 2: "two streams"}
            raise MbibError(
                f"recipe key 'sampler': method {kind.name!r} takes {streams[wanted]} of images, as in "
                f"{kind.sampler!r}; {self.sampler!r} gives {streams[given]}"
            )

    def _check_mixing(self, kind: "type[Method]") -> None:
        on = [key for key in ("mixup", "cutmix") if getattr(self, key) > 0]
        self._require_effect(
            {
                "cutmix_sampler": ("CutMix, and cutmix is 0; 1 is its usual alpha", "cutmix" in on),
                "mixup_prob": ("mixup or cutmix, and both are 0", bool(on)),
                "mixup_switch_prob": ("both mixup and cutmix above 0", len(on) == 2),
                "mixup_off_epochs": ("mixup or cutmix, and both are 0", bool(on)),
            }
        )
        if 2 * self.mixup_off_epochs >= self.epochs > 0 and on:
            raise MbibError(
                f"recipe key 'mixup_off_epochs': {self.mixup_off_epochs} at either end leaves none of the "
                f"{self.epochs} epochs to mix in"
            )
        if self.cutmix_sampler is not None:
            from mbib_timm.data.samplers import parse_sampler

            if len(parse_sampler(self.cutmix_sampler)) > 1:
                raise MbibError(f"recipe key 'cutmix_sampler': expected one sampler, got {self.cutmix_sampler!r}")
            if len(parse_sampler(kind.sampler)) > 1:
                raise MbibError(
                    f"recipe key 'cutmix_sampler': method {kind.name!r} takes two streams of images already, "
                    f"{self.choice('sampler')!r}; without this key CutMix pastes images of the same batch"
                )
        if self.soft_targets and not kind.soft_targets and not kind.post_hoc:
            from mbib_timm.methods import METHODS

            keys = [*on, *(["smoothing"] if self.smoothing else [])]
            able = [name for name in METHODS if METHODS[name].soft_targets]
            raise MbibError(
                f"recipe key{'s' if len(keys) > 1 else ''} {' and '.join(map(repr, keys))}: targets become soft, each "
                f"image of several classes, and method {kind.name!r} needs labels; methods that take soft targets: "
                f"{', '.join(able)}"
            )

    def _check_ranges(self) -> None:
        for name in ("scale", "ratio"):
            low_high = getattr(self, name)
            if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1]:
                raise MbibError(f"recipe key {name!r}: expected two numbers, 0 < low <= high, got {low_high}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, 3):
                raise MbibError(f"recipe key {name!r}: expected 1 or 3 numbers, got {getattr(self, name)}")
        if min(self.std) <= 0:
            raise MbibError(f"recipe key 'std': expected positive numbers, got {self.std}")
        if self.experiment is not None and Path(self.experiment).name != self.experiment:
            raise MbibError(f"recipe key 'experiment': expected the name of a folder, got {self.experiment!r}")
        if self.warmup_epochs >= self.epochs > 0 and self.warmup_epochs > 0:
            raise MbibError(f"recipe key 'warmup_epochs': {self.warmup_epochs} leaves none of the {self.epochs} epochs")
        if self.sched == "multistep" and sorted(self.decay_milestones) != self.decay_milestones:
            raise MbibError(f"recipe key 'decay_milestones': expected ascending epochs, got {self.decay_milestones}")

    def _check_augmentation(self, given: Iterable[str]) -> None:
        """Raise MbibError for a key, of those that were given, that has no effect, and for an unknown policy."""
        rrc = self.train_crop_mode == "rrc"
        needs = {
            "scale": ("train_crop_mode: rrc", rrc),
            "ratio": ("train_crop_mode: rrc", rrc),
            "hflip": ("train_crop_mode: pad or rrc", self.train_crop_mode != "none" or self.hflip == 0),
            "color_jitter_prob": ("color_jitter or hue", self.color_jitter > 0 or self.hue > 0),
        }
        self._require_effect({key: need for key, need in needs.items() if key in given})
        if self.aa is not None and "aa" in given:
            from mbib_timm.data.policies import create_policy

            create_policy(self.aa)

    def _require_effect(self, needs: Mapping[str, tuple[str, bool]]) -> None:
        """Raise MbibError for a key that is not its default, and has no effect.

        Args:
            needs: what a key needs to have one, in words, and whether it is there.
        """
        for key, (needed, there) in needs.items():
            if not there and getattr(self, key) != default_of(KEYS[key]):
                raise MbibError(f"recipe key {key!r} has no effect without {needed}")

    def _check_views(self, kind: "type[Method]") -> None:
        self._check_augmentation(KEYS)
        if self.views is not None and len(self.views) != len(kind.views):
            raise MbibError(
                f"recipe key 'views': method {kind.name!r} takes {len(kind.views)} of each image, got {len(self.views)}"
            )
        for number, differing in enumerate(self.choice("views"), start=1):
            for key in differing:
                if key not in VIEW_KEYS:
                    raise unknown_name(f"key of view {number}", str(key), VIEW_KEYS)
            try:
                self._view(differing)
            except MbibError as error:
                raise MbibError(f"view {number}: {error}") from None

    def _view(self, differing: Mapping[str, Any]) -> "Recipe":
        """Return a copy with the augmentation of a view."""
        view = copy.copy(self)
        for key, value in differing.items():
            object.__setattr__(view, key, value)
        check_options(view, "recipe key {!r}")
        view._check_ranges()
        view._check_augmentation(differing)
        # Views are cut from the images that the run holds: whole ones after pad, of any size after rrc.
        if view.train_crop_mode != self.train_crop_mode != "pad":
            raise MbibError(
                f"recipe key 'train_crop_mode': with {self.train_crop_mode} all views of an image have it, "
                f"not {view.train_crop_mode}"
            )
        return view

    def augmentations(self) -> "list[Recipe]":
        """Return the recipe of each view of an image: this one, with what the view has of its own."""
        return [self._view(differing) for differing in self.choice("views")]

    def _check_stage(self, kind: "type[Method]") -> None:
        starts = self.previous is not None or self.initial_checkpoint is not None or self.pretrained
        if self.previous is not None:
            for key in ("initial_checkpoint", "pretrained"):
                if getattr(self, key):
                    raise MbibError(f"recipe key {key!r}: stage {self.stage + 1} starts from the stage before")
        if self.choice("reset") == "all":
            for key in ("initial_checkpoint", "pretrained"):
                if getattr(self, key):
                    hint = "; the model to learn from is its setting 'teacher'" if "teacher" in self.method else ""
                    raise MbibError(
                        f"recipe key {key!r} has no effect: with method {kind.name!r} the whole network starts "
                        f"anew{hint}"
                    )
        if kind.needs_start and not starts:
            raise MbibError(
                f"method {kind.name!r} starts from a trained model, and this recipe gives none: put a stage before it "
                "(stages: [{method: ce}, ...]), or give --initial-checkpoint RUN"
            )
        if kind.post_hoc and self.epochs > 0:
            raise MbibError(f"recipe key 'epochs': method {kind.name!r} trains nothing; expected 0, got {self.epochs}")
        if self.epochs == 0 and not starts:
            raise MbibError("recipe key 'epochs': 0 trains nothing, and there are no weights to start from")

    @property
    def stage(self) -> int:
        """The number of stages before this one."""
        return 0 if self.previous is None else self.previous.stage + 1

    @property
    def soft_targets(self) -> bool:
        """Whether training targets are (B, K): images are mixed, or labels smoothed."""
        return self.mixup > 0 or self.cutmix > 0 or self.smoothing > 0

    def choice(self, key: str) -> Any:
        """Return the value of a key that is left to the method where it is None: sampler, views, train, reset or
        frozen_bn."""
        from mbib_timm.methods import METHODS

        value = getattr(self, key)
        return getattr(METHODS[self.method["name"]], key if key != "train" else "part") if value is None else value

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

    def keys(self) -> dict[str, Any]:
        """Return this stage's keys and values."""
        return {name: copy.deepcopy(getattr(self, name)) for name in KEYS}

    def to_dict(self) -> dict[str, Any]:
        """Return keys and values as ``recipe.yaml`` has them: what the stages share, then under ``stages`` the rest."""
        return _fold([stage.keys() for stage in self.chain()])

    def computation(self) -> dict[str, Any]:
        """Return what decides what is computed: all but paths, device, workers and logging; stages as in `to_dict`."""
        kept = [name for name, item in KEYS.items() if not item.metadata["location"]]
        return _fold([{name: getattr(stage, name) for name in kept} for stage in self.chain()])


KEYS: dict[str, dataclasses.Field] = {item.name: item for item in dataclasses.fields(Recipe) if item.name != "previous"}
TYPES: dict[str, Any] = {name: kind for name, kind in option_types(Recipe).items() if name in KEYS}
# Recipes that agree in these see the same images.
DATA_KEYS = tuple(name for name, item in KEYS.items() if item.metadata["group"] in ("data", "input"))
# What a view of an image may have of its own.
VIEW_KEYS = (
    "train_crop_mode",
    *(name for name, item in KEYS.items() if item.metadata["group"] == "augmentation" and name != "views"),
)


def require_key(name: str) -> None:
    """Raise MbibError for what is no recipe key, with the nearest valid one."""
    if name not in KEYS:
        raise unknown_name("recipe key", name, KEYS)


def _fold(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what stages have in common, and what they have not, as one mapping."""
    if len(stages) == 1:
        return stages[0]
    common = {key: value for key, value in stages[0].items() if all(stage[key] == value for stage in stages)}
    return {**common, STAGES: [{k: v for k, v in stage.items() if k not in common} for stage in stages]}


def recipes_folder() -> Path:
    """Return the folder of the recipes that come with the package."""
    installed = Path(__file__).parent / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "recipes"


def list_recipes() -> list[str]:
    """Return the names of the recipes that come with the package, such as ``mbib_resnet32.cifar100_lt_if100``."""
    return sorted(_packaged())


def _packaged() -> dict[str, Path]:
    """The packaged recipes' files by name: a file named ``arch.tag`` has that name, any other one its folder's too."""
    root = recipes_folder()
    files = (path.relative_to(root) for path in root.glob("*/*.yaml"))
    return {
        path.stem if "." in path.stem else path.with_suffix("").as_posix(): root / path
        for path in files
        if path.parts[0] not in ("bases", "sweeps")
    }


def find_recipe(name: str) -> Path:
    """Return the file of a recipe, given the path of a file or the name of a packaged recipe.

    Raises:
        MbibError: neither exists; the nearest names are given.
    """
    if Path(name).is_file():
        return Path(name)
    packaged = _packaged()
    if name.removesuffix(".yaml") not in packaged:
        raise unknown_name("recipe", name, packaged)
    return packaged[name.removesuffix(".yaml")]


def recipe_name(path: Path, method: str | None = None) -> str:
    """Return a run's name: the file's, where it is a model's arch.tag; else ``<file stem>.<folder>``.

    The recipe.yaml that a run leaves in its folder has the name of that run.

    Args:
        path: of the recipe.
        method: another one than the recipe's, which the name then says: ``cifar_resnet32.focal_digits``.
    """
    if path.name == "recipe.yaml":
        return path.resolve().parent.name
    name = path.stem if "." in path.stem else f"{path.stem}.{path.resolve().parent.name}"
    own = load_recipe(path).method["name"] if method is not None else None
    if method == own:
        return name
    architecture, _, tag = name.partition(".")
    return f"{architecture}.{method}_{tag.removeprefix(f'{own}_')}"


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
        path: a YAML file with keys of `Recipe`, and ``base`` and ``stages`` as the module's description has them.
        overrides: values that replace the file's, by address: a key, ``method.beta`` and ``model_kwargs.taps`` for a
            part of one, ``method.observation_weights.0`` for an element, ``stage2.lr`` for the key of a stage. A key
            without stage holds for all stages that do not set it themselves, as in the file.

    Raises:
        MbibError: the file is no mapping, or holds an unknown key, a wrong type or an impossible value.
    """
    content = read_recipe(path)
    for address in sorted(overrides or {}, key=lambda address: address.count(".")):
        _override(content, address, (overrides or {})[address], path)
    return _resolve(content, path.name)


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the content of a recipe file over that of its base, unresolved.

    Raises:
        MbibError: not a mapping, an unknown key, a base that is missing or has a base of its own.
    """
    content = _read_mapping(path)
    base = content.pop(BASE, None)
    if base is None:
        return content
    beside, packaged = path.parent / f"{base}.yaml", recipes_folder() / "bases" / f"{base}.yaml"
    files = [file for file in (Path(str(base)), beside, packaged) if file.is_file()]
    if not files:
        names = [file.stem for file in packaged.parent.glob("*.yaml")]
        raise unknown_name(f"base in {path.name}", str(base), names)
    below = _read_mapping(files[0])
    for key in (BASE, STAGES):
        if key in below:
            raise MbibError(f"{files[0]}: a base has no {key!r} of its own")
    return {**below, **content}


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MbibError(f"{path}: not a YAML file ({str(error).splitlines()[0]})") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise MbibError(f"{path}: expected 'key: value' lines, got a {type(content).__name__}")
    _check_keys(content, path.name, (BASE, STAGES))
    stages = content.get(STAGES, [])
    if not isinstance(stages, list) or (STAGES in content and not stages):
        raise MbibError(f"{path}: key 'stages': expected a list of stages, got {stages!r}")
    for number, stage in enumerate(stages, start=1):
        if not isinstance(stage, dict):
            raise MbibError(f"{path}: stage {number}: expected keys and values, got {stage!r}")
        _check_keys(stage, f"stage {number} of {path.name}")
    return content


def _check_keys(content: Mapping[str, Any], where: str, others: tuple[str, ...] = ()) -> None:
    for name in content:
        if name not in KEYS and name not in others:
            raise unknown_name(f"key in {where}", str(name), [*KEYS, *others])


def _resolve(content: Mapping[str, Any], where: str) -> Recipe:
    """Build the recipe of a file's content, stage by stage; an error in one of several names the stage."""
    shared = {key: value for key, value in content.items() if key != STAGES}
    stages = content.get(STAGES, [{}])
    recipe: Recipe | None = None
    for number, stage in enumerate(stages, start=1):
        # What a recipe starts from, its first stage does.
        keys = {
            key: value
            for key, value in shared.items()
            if number == 1 or key not in ("initial_checkpoint", "pretrained")
        }
        try:
            recipe = Recipe(**{**keys, **stage, "previous": recipe})
        except MbibError as error:
            if len(stages) == 1:
                raise
            raise MbibError(f"stage {number} of {where}: {error}") from None
    assert recipe is not None
    return recipe


def _override(content: dict[str, Any], address: str, value: Any, path: Path) -> None:
    """Set what an address names in a file's content; see `load_recipe`."""
    first, *rest = address.split(".")
    stages, target, shared = content.get(STAGES, []), content, content
    number = re.fullmatch(r"stage(\d+)", first)
    if number and rest:
        if not 1 <= int(number[1]) <= len(stages):
            raise MbibError(f"{address}: {path.name} has {len(stages) or 'no'} stages")
        target = stages[int(number[1]) - 1]
        first, *rest = rest
    require_key(first)
    if target is content and stages and all(first in stage for stage in stages):
        flags = " or ".join(f"stage{i}.{'.'.join([first, *rest])}" for i in range(1, len(stages) + 1))
        raise MbibError(f"every stage of {path.name} sets {first!r} itself; say which: {flags}")
    if not rest:
        target[first] = value
        return
    whole: Any
    if first in target or first in shared:
        whole = copy.deepcopy(target.get(first, shared.get(first)))
    else:
        whole = default_of(KEYS[first])
    if first == "method":
        whole = {"name": whole} if isinstance(whole, str) else whole
        if len(rest) > 1:  # an element of a setting, which the file may leave to the method
            from mbib_timm.methods import load_plugin, resolve_method

            for plugin in target.get("plugin", shared.get("plugin", [])):
                load_plugin(plugin)
            whole = {**resolve_method(whole)[1], **whole}
    inner = whole
    for part in rest[:-1]:
        inner = _element(inner, part, address)
    _element(inner, rest[-1], address, create=True)
    inner[int(rest[-1]) if isinstance(inner, list) else rest[-1]] = value
    target[first] = whole


def _element(whole: Any, part: str, address: str, create: bool = False) -> Any:
    """Return an element of a list or a mapping. Raises MbibError where there is none, and where none can be."""
    try:
        if isinstance(whole, list):
            return whole[int(part)]
        if isinstance(whole, dict) and (create or part in whole):
            return whole.get(part)
    except (ValueError, IndexError):
        pass
    raise MbibError(f"{address}: there is no element {part!r} in {whole!r}")


def longest_epochs(recipe: Recipe) -> int:
    """Return the epochs of a recipe's longest stage: what is meant by a run's epochs where it has several stages."""
    return max(stage.epochs for stage in recipe.chain())


def in_proportion(recipe: Recipe, epochs: int) -> dict[str, Any]:
    """Return overrides by which a recipe takes other epochs; warm-up, milestones and epochs without mixing move along.

    Of several stages the longest takes `epochs`, and the others keep their share.
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
        milestones = [max(1, round(share * milestone)) for milestone in stage.decay_milestones]
        off = min(max(1, round(share * stage.mixup_off_epochs)), (own - 1) // 2) if stage.mixup_off_epochs else 0
        prefix = f"stage{number}." if len(chain) > 1 else ""
        scaled = {"epochs": own, "warmup_epochs": warmup, "decay_milestones": milestones, "mixup_off_epochs": off}
        changes |= {f"{prefix}{key}": value for key, value in scaled.items()}
    return changes


def dump_recipe(recipe: Recipe) -> bytes:
    """Return the resolved recipe as YAML."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True).encode()
