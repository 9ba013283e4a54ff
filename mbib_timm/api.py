"""Use from Python: the commands as functions, and the losses for a training loop of your own.

    from mbib_timm import create_loss, evaluate, load, predict, shot_groups, train

Each is imported when it is first used, so that `import mbib_timm` alone stays quick.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import IOBase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.utils import ModelEmaV2, ModelEmaV3, unwrap_model
from torch import Tensor, nn

from mbib_timm.data.batch import Batch
from mbib_timm.data.long_tail import shot_groups
from mbib_timm.environment import find_device
from mbib_timm.errors import MbibError
from mbib_timm.evaluation import evaluate as evaluate_batches
from mbib_timm.evaluation.priors import ESTIMATE
from mbib_timm.evaluation.validate import validate
from mbib_timm.files import printable
from mbib_timm.flags import check_prediction
from mbib_timm.inference.inputs import FoundImage, find_images, label_by_folder
from mbib_timm.inference.prediction_files import Broken, Prediction
from mbib_timm.inference.predictor import Predictor, ScoredBatch
from mbib_timm.methods import METHODS, Facts, Method, head_names, resolve_method
from mbib_timm.models.head_outputs import PREDICTION
from mbib_timm.models.weights import load_model
from mbib_timm.recipe import DEFAULT_RECIPE, Recipe, change_recipe, check_given, find_recipe, prepare_run
from mbib_timm.results.record import HeadMetrics
from mbib_timm.results.runs import FinishedRun
from mbib_timm.training import train as train_recipe

__all__ = ["ClassProbability", "ImagePrediction", "Loss", "create_loss", "evaluate", "load", "predict", "shot_groups",
           "train"]  # fmt: skip

PathLike = str | Path
# Around a network, of which they give what it gives. Others, of a caller's own, may change the images.
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, ModelEmaV2, ModelEmaV3)


def train(recipe: PathLike | Recipe = DEFAULT_RECIPE, **keys: Any) -> FinishedRun:
    """Train a recipe to the end, as `mbib train` does; its progress is printed.

        run = train("finetune/mbib_resnet50", data_dir="photos", epochs=8)
        run.folder, run.record.result.prediction.top1

    Args:
        recipe: name of a packaged recipe, a YAML file, or a `Recipe`.
        keys: recipe keys to replace, like the flags; part of a key by its address, as in ``**{"method.beta": 3}``.

    Returns:
        The folder of the run, its record (`RunRecord` with metrics, class names, class counts) and its recipe.

    Raises:
        MbibError: the recipe, the data or the output folder do not allow the run; nothing is written.
        NonFiniteLossError: training diverged; the last good checkpoint is kept.
    """
    overrides = {key: _plain(value) for key, value in keys.items()}
    if isinstance(recipe, Recipe):
        changed = change_recipe(recipe, overrides, print)
        check_given([changed], overrides)
        return train_recipe(changed, changed.experiment or _name_of(changed))
    changed, name, epochs_asked = prepare_run(find_recipe(str(recipe)), overrides, print)
    return train_recipe(changed, name, epochs_asked=epochs_asked)


def _plain(value: Any) -> Any:
    """Return a value as a recipe takes it: paths as text, numpy's numbers and arrays as Python's."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _name_of(recipe: Recipe) -> str:
    """Return the name of a recipe's run that has no file: ``arch.method_data``."""
    architecture = recipe.model.rpartition(":")[2].rpartition("/")[2].partition(".")[0]
    return f"{architecture}.{recipe.method['name']}_{recipe.dataset.rpartition('/')[2]}"


def load(model: PathLike, *, head: str = PREDICTION, prior: str | None = None, device: str | None = None) -> Predictor:
    """Load a trained model, with its preprocessing and class names.

    Args:
        model: a run's folder, ``local-dir:FOLDER``, ``hf-hub:REPO``, or a timm model name.
        head: ``prediction``, or the name of one of the model's heads or experts.
        prior: class frequencies that the probabilities assume: ``train``, ``uniform``, or a file of shares or counts;
            None leaves the logits as they are.
        device: device of the model; detected when None.

    Returns:
        The predictor, for `predict`. Its ``model`` has the network (``model.module``), class names, class counts and
        preprocessing.

    Raises:
        MbibError: there is no such model or head, or the model does not record the class frequencies of its training.
    """
    if prior == ESTIMATE:
        raise MbibError("prior: class frequencies are estimated from images: give 'estimate' to predict()")
    if not isinstance(model, PathLike):
        raise MbibError(
            f"expected the name or folder of a trained model, got {type(model).__name__}: call a network of your own"
        )
    return Predictor(load_model(str(model)), head, prior, find_device(device))


@dataclass(frozen=True)
class ClassProbability:
    """A class with its probability.

    Attributes:
        name: name of the class; its label as text if the model has no names.
        label: number of the class.
        probability: from 0 to 1.
    """

    name: str
    label: int
    probability: float


@dataclass(frozen=True)
class ImagePrediction:
    """A model's prediction for an image. A list of them makes a table: ``pandas.DataFrame(predictions)``.

    Attributes:
        image: path of the image; ``image 0`` for the first PIL image.
        name: name of the most probable class; None for an image that cannot be read.
        probability: probability of that class.
        classes: the most probable classes, in order.
        label: name of the true class, if a folder or a table states it.
        unsure: whether the most probable class is less probable than the threshold.
        error: why the image cannot be read; None for all others.
    """

    image: str
    name: str | None
    probability: float | None
    classes: tuple[ClassProbability, ...]
    label: str | None = None
    unsure: bool = False
    error: str | None = None


ImageLike = PathLike | Image.Image


def predict(
    model: PathLike | Predictor,
    images: ImageLike | Iterable[ImageLike],
    *,
    top_k: int = 5,
    threshold: float = 0.0,
    batch_size: int = 64,
    workers: int | None = None,
    head: str = PREDICTION,
    prior: str | None = None,
    device: str | None = None,
) -> list[ImagePrediction]:
    """Classify images, as `mbib predict` does.

        for each in predict("runs/birds", ["photos", "one more.jpg"]):
            print(each.image, each.name, each.probability)

    Args:
        model: name or folder of a trained model, or the result of `load`, which saves loading it again.
        images: path of an image, a folder, an archive or a table; a PIL image; or several of these.
        top_k: number of classes to return per image.
        threshold: a prediction is `unsure` if its most probable class has a lower probability.
        batch_size: images per batch.
        workers: processes that decode images; detected when None.
        head: as in `load`; like `prior` and `device`, not allowed for a loaded model.
        prior: as in `load`; or ``estimate``, for the class frequencies under which these images are most likely, which
            are printed; with a loaded model too.
        device: device of the model; detected when None.

    Returns:
        A prediction for each image, in order. For one that cannot be read or is not there, it has an `error` and no
        class.

    Raises:
        MbibError: no such model, no image there, a number out of range, or an option that belongs in `load`.
    """
    check_prediction(top_k, threshold, batch_size, workers)
    if isinstance(model, Predictor):
        if (head, device) != (PREDICTION, None) or prior not in (None, ESTIMATE):
            raise MbibError("head, prior and device are those of the loaded model: give them to load()")
        predictor = copy.copy(model)  # which an estimate changes, and the caller's stays as it is
    else:
        predictor = load(model, head=head, prior=None if prior == ESTIMATE else prior, device=device)
    scored: Iterable[ScoredBatch] = predictor.score(list(_find(images, predictor.names)), batch_size, workers)
    if prior == ESTIMATE:
        scored, found = predictor.estimate_prior(scored)
        if found is not None:
            print(printable(found.describe(predictor.names)))
    items = [item for batch in scored for item in predictor.items(batch, top_k, threshold)]
    return [_typed(item, predictor.names) for item in items]


def _typed(item: Prediction | Broken, names: Sequence[str]) -> ImagePrediction:
    if isinstance(item, Broken):
        return ImagePrediction(item.image, None, None, (), item.label, error=item.reason)
    classes = tuple(ClassProbability(names[label], label, probability) for label, probability in item.classes)
    return ImagePrediction(item.image, classes[0].name, classes[0].probability, classes, item.label, item.unsure)


class _Pictures:
    """Images that are in memory, as a reader of images gives them."""

    def __init__(self, images: Sequence[Image.Image]) -> None:
        self.images = images

    def read(self, index: int) -> Image.Image:
        return self.images[index].copy()  # which may be turned and converted

    def path(self, index: int) -> str:
        return f"image {index}"


def _find(images: ImageLike | Iterable[ImageLike], class_names: Sequence[str]) -> Iterator[FoundImage]:
    """Give the images in order, with the names of their classes where folders or tables give them."""
    if isinstance(images, Mapping) or hasattr(images, "columns"):  # which would give the names of columns
        kind = type(images).__name__
        raise MbibError(f"expected paths or PIL images, got {kind}; give the column of the paths, as in frame['path']")
    # A file and bytes give parts of themselves.
    single = isinstance(images, ImageLike | bytes | bytearray | IOBase) or not isinstance(images, Iterable)
    given: list[Any] = [images] if single else [*images]  # type: ignore[misc]
    pictures = _Pictures([each for each in given if isinstance(each, Image.Image)])
    paths = iter(find_images([str(each) for each in given if isinstance(each, str | Path)]))
    number = 0
    for each in given:
        if isinstance(each, Image.Image):
            yield FoundImage(pictures, number, pictures.path(number))
            number += 1
        elif isinstance(each, str | Path):
            yield from label_by_folder(next(paths), class_names).images
        else:
            kind = type(each).__name__
            raise MbibError(
                f"expected paths or PIL images, got {kind}; PIL's Image.open and Image.fromarray make images"
            )


def evaluate(
    model: PathLike | nn.Module,
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    class_counts: Sequence[int] | np.ndarray | None = None,
    *,
    recipe: PathLike | None = None,
    split: str | None = None,
    prior: str | None = None,
    **keys: Any,
) -> dict[str, HeadMetrics]:
    """Measure every head of a model: accuracy over all images, by class and by shot group, and calibration.

    For a trained model it also prints the table of `mbib validate`. In a process group, every process calls this, and
    each gets the metrics of all.

        evaluate("runs/birds")["prediction"].macro              # a trained model, on its own data
        evaluate("runs/birds", data_dir="more photos")          # or on other data, as `mbib validate` does
        evaluate(model, loader, class_counts)["prediction"].few # any network, on your own batches

    Args:
        model: name or folder of a trained model; or a network that returns logits (B, K) in evaluation mode. The
            network is put into that mode for the measurement, and stays on its device.
        data: for a network, batches of images (B, C, H, W) and labels (B,); in a process group, this process's share.
        class_counts: for a network, the training images of each class, (K,), which decide the shot groups.
        recipe: recipe that names the data, for a trained model that does not name them itself.
        split: split of a trained model's data; the one that its run reports when None.
        prior: class frequencies to which a trained model's logits are shifted, as in `predict`; experts are left out.
        keys: recipe keys to replace, like the flags of `mbib validate`.

    Returns:
        Metrics of ``prediction`` and, if there are several, of each head and expert by name.

    Raises:
        MbibError: nothing to evaluate, data that do not fit the model, or arguments for the other kind of model.
    """
    if isinstance(model, Predictor):
        raise MbibError("evaluate takes the name or folder of a loaded model, or its network, model.model.module")
    if not isinstance(model, nn.Module):
        if data is not None or class_counts is not None:
            raise MbibError("data and class_counts go with a network; a trained model's data are named by recipe keys")
        overrides = {key: _plain(value) for key, value in keys.items()}
        file = None if recipe is None else str(recipe)
        return validate(str(model), recipe=file, overrides=overrides, split=split, prior=prior).heads
    if data is None or class_counts is None:
        raise MbibError("a network is evaluated on batches: evaluate(model, data, class_counts)")
    given = {"recipe": recipe, "split": split, "prior": prior}
    if named := [*(name for name, value in given.items() if value is not None), *keys]:
        raise MbibError(f"{', '.join(named)}: only for a trained model that is given by name")
    network: nn.Module = model
    while isinstance(network, _WRAPPERS):
        network = network.module
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    counts = _whole_counts(class_counts)
    classes = int(getattr(network, "num_classes", len(counts)))
    batches = (_checked_batch(batch, classes, device) for batch in data)
    return evaluate_batches(network, batches, counts, device=device)


def _whole_counts(class_counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return class counts (K,) as an array. Raises MbibError for what is none."""
    # A copy, for torch warns of arrays that cannot be written to, such as pandas'.
    counts = np.array(class_counts.cpu() if isinstance(class_counts, Tensor) else class_counts)
    if counts.ndim != 1 or len(counts) < 2 or counts.dtype.kind not in "iu":
        raise MbibError(f"class_counts: expected a whole number for each of two classes or more, got {class_counts!r}")
    return counts


def _checked_batch(given: Any, num_classes: int, device: torch.device) -> Batch:
    """Return somebody's batch of images and labels on a device. Raises MbibError for what is none."""
    expected = "data: expected batches of images (B, C, H, W) and labels (B,)"
    if not isinstance(given, tuple | list) or len(given) != 2 or not all(isinstance(each, Tensor) for each in given):
        inside = f" of {', '.join(type(each).__name__ for each in given)}" if isinstance(given, tuple | list) else ""
        raise MbibError(f"{expected}, got a {type(given).__name__}{inside}")
    images, labels = given
    if labels.ndim != 1 or images.ndim < 1 or len(labels) != len(images):
        raise MbibError(f"{expected}, got {tuple(images.shape)} and {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise MbibError(f"{expected}, which are whole numbers, got labels of {labels.dtype}")
    labels = labels.long()
    # Waits for the device where labels are there already; out of range they would end it.
    _check_labels(labels, num_classes, "data")
    return Batch((images.to(device),), labels.to(device), torch.arange(len(labels), device=device))


def _check_labels(labels: Tensor, num_classes: int, what: str) -> None:
    """Raise MbibError for labels out of range; `what` is for the message."""
    if len(wrong := labels[(labels < 0) | (labels >= num_classes)]):
        raise MbibError(f"{what}: labels of {num_classes} classes lie in 0..{num_classes - 1}, got {int(wrong[0])}")


def _shape_of(given: Any) -> str:
    """Return what a value is that should be another tensor."""
    if isinstance(given, Tensor):
        return f"a tensor of {given.dtype} and shape {tuple(given.shape)}"
    return f"a {type(given).__name__}"


class Loss(nn.Module):
    """A method's loss, as a function of what a network returns in training. Use `create_loss` to make one.

    Args:
        method: the method that computes the loss from the logits of each head.
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def parts(self, outputs: Tensor | Sequence[Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return named scalars: ``loss``, the one to differentiate, and its parts.

        Args:
            outputs: logits (B, K), or the logits of every head, as the model returns them in training.
            targets: labels (B,), whole numbers; or soft targets (B, K), whose rows sum to 1.

        Raises:
            MbibError: the number of heads or classes is not the one that the loss is for, or targets that are none.
        """
        heads = self._heads(outputs)
        names = self.method.head_names
        if len(heads) != len(names):
            if len(heads) == 1:
                hint = "a model in evaluation mode returns its prediction alone: model.train()"
            else:
                hint = "give create_loss the model, or let it return one: model.set_training_logits('mean')"
            raise MbibError(
                f"this loss takes logits of {', '.join(names)} ({len(names)}), and got {len(heads)}; {hint}"
            )
        targets = self._targets(targets, len(heads[0]))
        if any(buffer.device != targets.device for buffer in self.method.buffers()):
            self.method.to(targets.device)
        return self.method.loss(dict(zip(names, heads, strict=True)), targets)

    def _heads(self, outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the logits of each head. Raises MbibError for what are none of the loss's classes."""
        heads = tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
        classes = len(self.method.facts.class_counts)
        for head in heads:
            if not isinstance(head, Tensor) or head.ndim != 2 or head.shape[1] != classes:
                raise MbibError(f"this loss: expected logits (B, {classes}), got {_shape_of(head)}")
        return heads

    def _targets(self, targets: Tensor, images: int) -> Tensor:
        """Return targets as losses take them. Raises MbibError for others, which torch would stretch to the logits."""
        classes = len(self.method.facts.class_counts)
        if isinstance(targets, Tensor) and targets.dtype != torch.bool and not targets.is_complex():
            if targets.is_floating_point() and targets.shape == (images, classes):
                return targets
            if not targets.is_floating_point() and targets.shape == (images,):
                # Elsewhere than on the CPU, and in compiled code, one would wait for the labels.
                if targets.device.type == "cpu" and not torch.compiler.is_compiling():
                    _check_labels(targets, classes, "targets")
                return targets.long()
        raise MbibError(
            f"targets: expected labels ({images},) of whole numbers or soft targets ({images}, {classes}), got "
            f"{_shape_of(targets)}"
        )

    def forward(self, outputs: Tensor | Sequence[Tensor], targets: Tensor) -> Tensor:
        """Return the loss, a scalar; arguments as those of `parts`."""
        return self.parts(outputs, targets)["loss"]


def create_loss(
    name: str, class_counts: Sequence[int] | np.ndarray, model: nn.Module | None = None, **settings: Any
) -> Loss:
    """Return a method's loss for a training loop of your own.

        model = timm.create_model("mbib_resnet50", num_classes=len(counts))
        loss = create_loss("mbib", counts, model, beta=3)
        loss(model(images), labels).backward()             # in training mode

    Args:
        name: name of a method that trains with a loss on logits: ``ce``, ``bsce``, ``focal``, ``mbib`` and others.
        class_counts: training images of each class, (K,), in label order.
        model: the model, which says which heads there are; needed if it has several, such as MBIB.
        settings: settings of the method, by name; ``mbib train RECIPE --help`` shows them.

    Raises:
        MbibError: an unknown method or setting, a method that trains by more than a loss, a class without training
            images, or a model that does not have the heads.
    """
    kind, given = resolve_method({"name": name, **{key: _plain(value) for key, value in settings.items()}})
    if not _is_loss(kind):
        able = [other for other in METHODS if _is_loss(METHODS[other])]
        raise MbibError(f"method {name!r} trains by more than a loss of logits: use train(); losses: {', '.join(able)}")
    counts = _whole_counts(class_counts)
    classes = getattr(unwrap_model(model), "num_classes", 0)
    if classes and classes != len(counts):
        raise MbibError(f"the model has {classes} classes, and there are class counts of {len(counts)}")
    network = nn.Module() if model is None else _Heads(model)
    try:
        method = kind(network, given, Facts(counts, epochs=1), torch.device("cpu"))
    except MbibError as error:
        hint = f"; give the model: create_loss({name!r}, class_counts, model)" if model is None else ""
        raise MbibError(f"{error}{hint}") from None
    return Loss(method)


class _Heads(nn.Module):
    """What a model says of its heads, without the model: a loss must not own the weights that it trains."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        model = unwrap_model(model)
        # A model that returns its prediction alone in training has one head there.
        one = getattr(model, "training_logits", "all") == "mean"
        self.head_names = ("logits",) if one else head_names(model)
        for name in ("bottleneck_head", "expert_heads", "prediction_heads"):
            if hasattr(model, name) and not one:
                setattr(self, name, getattr(model, name))


def _is_loss(method: type[Method]) -> bool:
    """Return whether all that a method does in training is a loss of each head's logits."""
    own = (
        "forward", "logits", "begin", "start_epoch", "synchronize", "after_step", "finish", "own_parameters",
    )  # fmt: skip
    untouched = all(getattr(method, name) == getattr(Method, name) for name in own)
    plain = method.build_network.__func__ is Method.build_network.__func__  # type: ignore[attr-defined]
    whole = method.part == "all" and len(method.views) == 1 and method.sampler == Method.sampler
    return untouched and plain and whole and not (method.needs_start or method.post_hoc)
