"""`mbib predict`: classes and probabilities for images, written and counted."""

import contextlib
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mbib_timm.data import DataPool
from mbib_timm.data.images import evenly_spaced
from mbib_timm.environment import joined_world
from mbib_timm.errors import MbibError, few, first_line
from mbib_timm.evaluation.priors import ESTIMATE, EstimatedPrior
from mbib_timm.evaluation.trained_images import trained_on_line
from mbib_timm.files import counted, in_words, make_folder, printable
from mbib_timm.inference.cam import GradCam, OverlayFolder, overlay
from mbib_timm.inference.inputs import Columns, FoundImage, find_images, label_by_folder
from mbib_timm.inference.prediction_files import (
    UNSURE,
    Broken,
    Continued,
    EmbeddingsWriter,
    OutputChoice,
    Prediction,
    RowColumns,
    check_replaced,
    check_replaced_embeddings,
    open_writer,
    read_continued,
    written,
)
from mbib_timm.inference.predictor import Predictor, ScoredBatch
from mbib_timm.inference.tally import Tally
from mbib_timm.models.head_outputs import PREDICTION
from mbib_timm.models.weights import LoadedModel, load_model
from mbib_timm.progress import Progress
from mbib_timm.results.record import HeadMetrics
from mbib_timm.results.tables import Table, accuracy_table, cells, interval_row, measured_rows, percent

# Unknown classes that the summary names.
NAMED = 10
# Images of an interrupted run that are predicted again, to see that the model is the same; a probability may differ by
# what its digits in the file leave open, and by this share of it, for devices and batches round differently.
AGAIN, TOLERANCE, DEVIATION = 32, 2e-6, 0.1


@dataclass(frozen=True)
class Predicted:
    """What became of the images.

    Attributes:
        images: how many there were, those of the interrupted run included.
        broken: those that could not be read.
        metrics: of the images whose class is known and is one of the model's; None without one. Of an interrupted run
            that was continued, top5 and nll are not exact.
        unknown: images of each class that the model does not know.
        unsure: how many answers are that.
        prior: the class frequencies, where they were estimated.
    """

    images: int
    broken: list[Broken]
    metrics: HeadMetrics | None
    unknown: dict[str, int]
    unsure: int
    prior: EstimatedPrior | None


def predict(
    target: str,
    images: Sequence[str],
    choice: OutputChoice | None = None,
    *,
    top_k: int = 5,
    head: str = PREDICTION,
    prior: str | None = None,
    threshold: float = 0.0,
    columns: Columns | None = None,
    labels: bool = True,
    batch_size: int = 64,
    workers: int | None = None,
    device: str | None = None,
) -> Predicted:
    """Predict images, write what was found, and say how much of it is right where that is known.

    Args:
        target: a trained model by any name, see `find_source`.
        images: files, folders, archives and tables; ``-`` for names on standard input.
        choice: what is written, and where; by default a table on standard output.
        top_k: classes of each image.
        head: see `Predictor`.
        prior: see `Predictor`; or ``estimate``, for the frequencies that make the images most likely.
        threshold: probability of the first class below which the answer is unsure.
        columns: of tables.
        labels: take folders and the tables' column of labels for the images' classes.
        batch_size: images at once.
        workers: processes that decode; found when None.
        device: where it runs; found when None.

    Raises:
        MbibError: no such model, no such images, or choices that contradict one another.
    """
    choice = choice or OutputChoice()
    format, output, embeddings, cam = choice.check(prior == ESTIMATE), choice.file, choice.embeddings, choice.cam
    if cam is not None and head != PREDICTION:
        raise MbibError("--cam shows what the prediction rests on; omit --head")
    found = find_images(images, columns)
    if output is not None and (taken := next((each for each in images if _is_same_file(output, each)), None)):
        raise MbibError(f"--output {output} is one of the images or tables given, {taken}; choose another file")
    if cam is not None and (taken := next((each for each in images if _is_within(cam, each)), None)):
        # Overlays have the images' names: they would replace them, or be predicted the next time.
        raise MbibError(f"--cam {cam} lies in {taken}, whose images are predicted; choose a folder outside it")
    overlays = None if cam is None else OverlayFolder(cam, [image for each in found for image in each.images])
    if output is not None and not choice.resume:
        check_replaced(output, format)
    if embeddings is not None:
        check_replaced_embeddings(embeddings)
    for each in found:
        if each.left_out:
            print(f"warning: left out of {each.given}: {in_words(each.left_out)}", file=sys.stderr)
    with joined_world(device) as world:
        world.require_alone("mbib predict")
        model = load_model(target)
        predictor = Predictor(model, head, None if prior == ESTIMATE else prior, world.device)
        if threshold > 0 and UNSURE in predictor.names:
            raise MbibError(
                f"--threshold: the model has a class named {UNSURE!r}, which an answer below the threshold could not "
                "be told from; omit the flag: the output has the probabilities"
            )
        grad_cam = None if cam is None else GradCam(predictor.module, model.preprocessing["input_size"])
        todo = [image for each in found for image in label_by_folder(each, predictor.names).images]
        todo = todo if labels else [replace(image, label=None) for image in todo]
        layout = RowColumns(predictor.names, top_k, choice.probabilities)
        continued = read_continued(output, format, layout) if choice.resume and output else Continued()
        done: list[tuple[FoundImage, Prediction | Broken]] = []
        if output is not None and continued.images:
            todo, done = _parted(todo, continued.images, format)
            _check_continued(output, continued.images, done, format, threshold)
            _check_same(predictor, output, done)
        tally = Tally(predictor.names)
        tally.count_done(continued.images)
        # A bar among the lines of the predictions would be in their way.
        visible = output is not None or not sys.stdout.isatty()
        scores = predictor.score(todo, batch_size, workers, with_features=embeddings is not None)
        scored: Iterable[ScoredBatch] = _with_bar(scores, len(todo), visible)
        estimate = None
        if prior == ESTIMATE:
            scored, estimate = predictor.estimate_prior(scored)
        classes = []
        with _Outputs(format, layout, output, continued, embeddings, len(todo)) as outputs:
            for batch in scored:
                items = predictor.items(batch, top_k, threshold, choice.probabilities)
                outputs.write(items, batch.features)
                tally.count(items, predictor.adjust(batch.logits.to(world.device)))
                classes += [None if isinstance(item, Broken) else item.classes[0][0] for item in items]
        if overlays is not None and grad_cam is not None:
            _write_overlays(predictor, grad_cam, overlays, todo, classes, batch_size, workers)
    result = Predicted(
        images=len(todo) + len(continued.images),
        broken=tally.broken,
        metrics=tally.metrics(model.class_counts),
        unknown=dict(tally.unknown),
        unsure=tally.unsure,
        prior=estimate,
    )
    broken = {item.image for item in tally.broken}
    read = [image for image in todo if image.path not in broken]
    read += [image for image, each in done if isinstance(each, Prediction)]
    measured = [image for image in read if image.label is not None and tally.label(image.label) is not None]
    seen = _trained_on(model, measured)
    said_to = sys.stderr if output is None else sys.stdout  # the predictions stand there alone
    for line in _summary(result, tally, model, threshold, seen):
        print(line, file=said_to)
    if output is not None:
        print(printable(f"{output}: {counted(result.images, 'image')}"), file=said_to)
    for place in filter(None, (embeddings, cam)):
        print(printable(str(place)), file=said_to)
    return result


def _is_same_file(one: Path, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):  # one of them is not there
        return False


def _is_within(folder: Path, images: str) -> bool:
    """Return whether a folder is a given folder of images, or inside it; of an image, whether it is the image's."""
    given, folder = Path(images).resolve(), folder.resolve()
    return folder == given.parent if given.is_file() else folder.is_relative_to(given)


def _parted(
    images: Sequence[FoundImage], done: Sequence[Prediction | Broken], format: str
) -> tuple[list[FoundImage], list[tuple[FoundImage, Prediction | Broken]]]:
    """Return the images that are still to be predicted, and those that are done with what the file says of them."""
    by_path: dict[str, list[Prediction | Broken]] = defaultdict(list)
    for each in reversed(done):
        by_path[each.image].append(each)
    todo, pairs = [], []
    for image in images:
        if found := by_path.get(written(image.path, format)):
            pairs.append((image, found.pop()))
        else:
            todo.append(image)
    return todo, pairs


def _check_continued(
    file: Path,
    done: Sequence[Prediction | Broken],
    pairs: Sequence[tuple[FoundImage, Prediction | Broken]],
    format: str,
    threshold: float,
) -> None:
    """Raise MbibError where an interrupted run had other images, labels or another threshold."""
    remedy = f"repeat what was given before, or remove {file}"
    if not pairs:
        raise MbibError(f"--resume: {file} holds none of the images given, but {done[0].image}; {remedy}")
    for image, each in pairs:
        now, before = (written(label or "", format) for label in (image.label, each.label))
        if now != before:
            raise MbibError(
                f"--resume: {file} has the class {before!r} for {each.image}, which is {now!r} now; {remedy}"
            )
    for each in done:
        if isinstance(each, Broken):
            continue
        probability = each.classes[0][1]
        if (probability < threshold) != each.unsure and abs(probability - threshold) > TOLERANCE:
            raise MbibError(
                f"--resume: {file} was written with another --threshold: {each.image} has probability {probability:g} "
                f"and is {'' if each.unsure else 'not '}{UNSURE}; {remedy}"
            )


def _check_same(predictor: Predictor, file: Path, pairs: Sequence[tuple[FoundImage, Prediction | Broken]]) -> None:
    """Predict some images of an interrupted run again.

    Raises:
        MbibError: their probabilities were others: of another model, head or prior.
    """
    readable = [(image, each) for image, each in pairs if isinstance(each, Prediction)]
    if not readable:
        return
    some = [readable[place] for place in evenly_spaced(len(readable), AGAIN)]
    classes_before = {id(image): each.classes for image, each in some}
    for batch in predictor.score([image for image, _ in some], AGAIN, workers=0):
        now = torch.softmax(predictor.adjust(batch.logits.to(predictor.device)), dim=-1).tolist()
        for image, probabilities in zip(batch.readable(), now, strict=True):
            for label, before in classes_before[id(image)]:
                found = probabilities[label]
                if abs(found - before) > TOLERANCE + DEVIATION * before:
                    raise MbibError(
                        f"--resume: {file} was written by another model, or with another --head or --prior: of "
                        f"{image.path} it has {before:g} for {predictor.names[label]!r}, which is {found:g} now; "
                        f"repeat what was given before, or remove {file}"
                    )


def _with_bar(batches: Iterable[ScoredBatch], images: int, visible: bool) -> Iterator[ScoredBatch]:
    progress = Progress(images, visible=visible, unit="image")
    try:
        for batch in batches:
            yield batch
            progress.step(len(batch.images))
    finally:
        progress.close()


class _Outputs:
    """The files that are written together: closed when all is well, and else left as far as they make sense."""

    def __init__(
        self,
        format: str,
        layout: RowColumns,
        file: Path | None,
        continued: Continued,
        embeddings: Path | None,
        images: int,
    ) -> None:
        for path in (file, embeddings):
            if path is not None:
                make_folder(path.parent)
        self.path, self.embeddings = file, embeddings
        with _writing(file):
            self.writer = open_writer(format, layout, file, continued)
        self.vectors = None if embeddings is None else EmbeddingsWriter(embeddings, images)

    def write(self, items: Sequence[Prediction | Broken], features: Tensor | None) -> None:
        """Write a batch."""
        with _writing(self.path):
            self.writer.write(items)
        if self.vectors is not None and features is not None:
            with _writing(self.embeddings):
                self.vectors.write(items, features.cpu().numpy())

    def __enter__(self) -> "_Outputs":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for output, path in ((self.writer, self.path), (self.vectors, self.embeddings)):
            if output is not None and kind is None:
                with _writing(path):
                    output.close()
            elif output is not None:
                with contextlib.suppress(OSError):  # the first error is told
                    output.abandon()


@contextlib.contextmanager
def _writing(file: Path | None) -> Iterator[None]:
    """Say of a full disk or a folder without permission which file it concerns; None for standard output."""
    try:
        yield
    except OSError as error:
        if file is None:
            raise
        raise MbibError(f"cannot write {file}: {error.strerror or first_line(error)}") from None


def _write_overlays(
    predictor: Predictor,
    grad_cam: GradCam,
    overlays: OverlayFolder,
    images: Sequence[FoundImage],
    classes: Sequence[int | None],
    batch_size: int,
    workers: int | None,
) -> None:
    """Write an overlay for each image that can be read, of its class."""
    progress = Progress(len(images), unit="overlay")
    places = iter(range(len(images)))
    for batch, readable, _ in predictor.batches(images, batch_size, workers):
        shown = {place: label for place in islice(places, len(batch)) if (label := classes[place]) is not None}
        if readable is not None:
            heat = grad_cam.heat(predictor.normalize(readable.to(predictor.device)), [*shown.values()])
            for place, pixels, warm in zip(shown, readable, heat, strict=True):
                overlays.save(place, overlay(pixels, warm))
        progress.step(len(batch))
    progress.close()


def _trained_on(model: LoadedModel, images: Sequence[FoundImage]) -> str:
    """Return a line on the images that a run's model was trained on; see `trained_on_line`."""
    files = {image.file for image in images}
    folder = model.source.folder
    return "" if folder is None else trained_on_line(folder, files, f"these {counted(len(files), 'image')}", DataPool())


def _summary(result: Predicted, tally: Tally, model: LoadedModel, threshold: float, seen: str) -> Iterator[str]:
    """Give what is said at the end, line by line."""
    if result.prior is not None:
        yield printable(result.prior.describe(tally.names))
    if result.unsure:
        readable = counted(result.images - len(result.broken), "image")
        yield f"{UNSURE} (below {threshold:g}): {result.unsure:,} of {readable}"
    metrics = result.metrics
    if metrics is not None:
        yield "on the images whose class is known:"
        if model.class_counts is None:
            columns = ("overall", "macro", "macro F1")
            rows = [[PREDICTION, *cells(metrics, 2, columns)], *interval_row(metrics, columns)]
            yield from Table(["%", *columns], [*measured_rows(metrics, columns), *rows]).lines()
        else:
            yield accuracy_table({PREDICTION: metrics}, model.class_counts)
        if seen:
            yield f"warning: {seen}"
        if result.unsure and tally.sure:
            yield (
                f"overall without the unsure: {percent(100 * tally.right / tally.sure, 2)} on "
                f"{counted(tally.sure, 'image')}, {100 * tally.sure / metrics.images:.1f} % of them"
            )
    if result.unknown:
        images = sum(result.unknown.values())
        listed = few([f"{printable(name)} ({count:,})" for name, count in tally.unknown.most_common()], NAMED)
        yield f"not counted: {counted(images, 'image')} of classes that the model was not trained on: {listed}"
