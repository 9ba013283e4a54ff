"""`mbib predict`: classes and probabilities for images, in batches."""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.utils.misc import natural_key
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mbib_timm.data.folders import ArchiveReader, image_kinds, is_archive, open_archive
from mbib_timm.data.images import Reader, convert_image, pil_mode
from mbib_timm.environment import join_world, leave_world
from mbib_timm.errors import DataError, MbibError, first_line, unknown_name
from mbib_timm.models.head_outputs import PREDICTION, head_logits, reported_heads
from mbib_timm.models.weights import LoadedModel, load_model


class FileReader:
    """Images in files of their own.

    Args:
        paths: of the files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def read(self, index: int) -> Image.Image:
        """Open an image."""
        return Image.open(self.paths[index])

    def path(self, index: int) -> str:
        """Return its path."""
        return str(self.paths[index])


def find_images(paths: Sequence[str]) -> list[tuple[Reader, int]]:
    """Find the images in files, folders and tars, in natural order within each.

    Returns:
        A reader and an index for each image.

    Raises:
        DataError: a path that does not exist, or a folder or tar without images.
    """
    found: list[tuple[Reader, int]] = []
    for given in map(Path, paths):
        reader: Reader
        if is_archive(given):
            archive = open_archive(given)
            names = sorted(archive.members, key=natural_key)
            places = np.array([archive.members[name] for name in names], dtype=np.int64).reshape(-1, 2)
            reader, count = ArchiveReader(given, names, places, archive.tar), len(names)
        elif given.is_dir():
            kinds = image_kinds()
            inside = (path for path in given.rglob("*") if path.suffix.lower() in kinds and path.is_file())
            files = sorted(inside, key=lambda path: natural_key(str(path)))
            reader, count = FileReader(files), len(files)
        elif given.is_file():
            reader, count = FileReader([given]), 1
        else:
            raise DataError(f"there is no image, folder or tar at {given}")
        if count == 0:
            raise DataError(f"no images in {given} (looked for {', '.join(image_kinds())})")
        found += [(reader, index) for index in range(count)]
    return found


class Photos(Dataset):
    """Images for a model, or what is wrong with them.

    Args:
        images: what `find_images` found.
        mode: PIL mode that every image is converted to.
        transform: from a PIL image to (C, H, W).
    """

    def __init__(self, images: Sequence[tuple[Reader, int]], mode: str, transform: Callable[..., Tensor]) -> None:
        self.images, self.mode, self.transform = images, mode, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[str, Tensor | None, str]:
        reader, index = self.images[place]
        path = reader.path(index)
        try:
            return path, self.transform(convert_image(reader.read(index), self.mode)), ""
        except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, EOFError and more
            return path, None, first_line(error)


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, the first the most probable.

    Attributes:
        image: its path.
        classes: label and probability of each.
    """

    image: str
    classes: list[tuple[int, float]]


@dataclass(frozen=True)
class Broken:
    """An image that cannot be read."""

    image: str
    reason: str


class Predictor:
    """A trained model with everything between an image and its classes.

    Args:
        model: a trained model.
        head: ``prediction``, or the name of one of the model's heads or experts.
        prior: class frequencies that the probabilities are for: ``train``, ``uniform``, or a file with a count for
            each class; None leaves the logits as they are.
        device: where it runs.

    Raises:
        MbibError: a head that the model has not, or a prior where the model's own is not known.
    """

    def __init__(
        self, model: LoadedModel, head: str = PREDICTION, prior: str | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.model, self.head, self.device = model, head, torch.device(device)
        if head not in (PREDICTION, *reported_heads(model.module)):
            raise unknown_name(f"head of {model.source.name}", head, (PREDICTION, *reported_heads(model.module)))
        self.module: nn.Module = model.module.to(self.device)
        self.shift = None if prior is None else log_prior_shift(model, prior).to(self.device)

    def transform(self) -> Callable[..., Tensor]:
        """Return the preprocessing, from a PIL image to (C, H, W)."""
        transform: Callable[..., Tensor] = create_transform(**dict(self.model.preprocessing), is_training=False)
        return transform

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return the probabilities (B, K) of the classes, for preprocessed images (B, C, H, W)."""
        images = images.to(self.device)
        logits = self.module(images) if self.head == PREDICTION else head_logits(self.module, images)[self.head]
        logits = logits.float()
        return torch.softmax(logits if self.shift is None else logits + self.shift, dim=-1)

    def predict(
        self, images: Sequence[tuple[Reader, int]], top_k: int = 5, batch_size: int = 64, workers: int = 0
    ) -> Iterator[Prediction | Broken]:
        """Predict images, in order.

        Args:
            images: what `find_images` found.
            top_k: classes of each.
            batch_size: images at once.
            workers: processes that decode.
        """
        photos = Photos(images, pil_mode(self.model.preprocessing["input_size"][0]), self.transform())
        for batch in DataLoader(photos, batch_size, num_workers=workers, collate_fn=list):
            readable = [image for _, image, _ in batch if image is not None]
            if readable:
                best = self.probabilities(torch.stack(readable)).topk(min(top_k, self.model.num_classes))
                rows = iter(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            for path, image, reason in batch:
                if image is None:
                    yield Broken(path, reason)
                else:
                    yield Prediction(path, list(zip(*next(rows), strict=True)))


def log_prior_shift(model: LoadedModel, prior: str) -> Tensor:
    """Return what is added to logits so that they are for other class frequencies: log of the new over the old, (K,).

    Args:
        model: says what frequencies its logits are for.
        prior: ``train``, ``uniform``, or a file with a number for each class.

    Raises:
        MbibError: the model does not say, or a file of another length.
    """
    if model.prior is None or model.class_counts is None:
        raise MbibError(f"{model.source.name} does not say what class frequencies it was trained on; leave --prior out")
    uniform = np.ones(len(model.class_counts))
    known = {"train": model.class_counts, "uniform": uniform}
    wanted = known[prior] if prior in known else read_class_counts(prior)
    if len(wanted) != len(uniform):
        raise MbibError(f"{prior} has {len(wanted)} classes, the model {len(uniform)}")
    new, old = (torch.log(torch.as_tensor(values / values.sum())) for values in (wanted, known[model.prior]))
    return (new - old).float()


def read_class_counts(path: str | Path) -> np.ndarray:
    """Read training images of each class: a JSON list, or one integer a line.

    Raises:
        DataError: the file is missing or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read the class counts {path}: {error.strerror}") from None
    try:
        values = json.loads(text) if text.lstrip().startswith("[") else [int(line) for line in text.split()]
        counts = np.array(values)
        if counts.ndim != 1 or counts.dtype.kind not in "iu" or len(counts) < 2 or counts.min() < 1:
            raise ValueError
    except ValueError:
        raise DataError(f"{path}: expected a positive integer for each class, one per line, or a JSON list") from None
    return counts.astype(np.int64)


class Writer:
    """Predictions as text.

    Args:
        format: ``table``, ``csv`` or ``jsonl``.
        names: of the classes; None for their numbers alone.
        file: where to.
    """

    def __init__(self, format: str, names: Sequence[str] | None, file: TextIO) -> None:
        self.format, self.names, self.file = format, names, file
        self.csv = csv.writer(file, lineterminator="\n")
        if format == "csv":
            self.csv.writerow(["image", "rank", "class", "name", "probability"])

    def write(self, prediction: Prediction) -> None:
        """Write a prediction."""
        rows = [(label, self._name(label), probability) for label, probability in prediction.classes]
        if self.format == "csv":
            for rank, (label, name, probability) in enumerate(rows, start=1):
                self.csv.writerow([prediction.image, rank, label, name, f"{probability:.6f}"])
        elif self.format == "jsonl":
            classes = [{"class": label, "name": name, "probability": probability} for label, name, probability in rows]
            print(json.dumps({"image": prediction.image, "classes": classes}, ensure_ascii=False), file=self.file)
        else:
            print(prediction.image, file=self.file)
            for _, name, probability in rows:
                print(f"  {100 * probability:6.2f} %  {name}", file=self.file)

    def _name(self, label: int) -> str:
        return str(label) if self.names is None else self.names[label]


def predict(
    target: str,
    images: Sequence[str],
    *,
    top_k: int = 5,
    format: str = "table",
    output: Path | None = None,
    head: str = PREDICTION,
    prior: str | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str | None = None,
) -> list[Broken]:
    """Predict images and write what was found.

    Args:
        target: a trained model by any name, see `find_source`.
        images: files, folders and tars.
        top_k: classes of each image.
        format: ``table``, ``csv`` or ``jsonl``.
        output: file to write to; None for standard output.
        head, prior: see `Predictor`.
        batch_size: images at once.
        workers: processes that decode.
        device: where it runs; found when None.

    Returns:
        The images that could not be read.

    Raises:
        MbibError: no such model, no such images.
    """
    found = find_images(images)
    world = join_world(device)
    try:
        model = load_model(target)
        predictor = Predictor(model, head, prior, world.device)
        broken = []
        with open(output, "w", encoding="utf-8", newline="") if output else nullcontext(sys.stdout) as file:
            writer = Writer(format, model.class_names, file)
            for item in predictor.predict(found, top_k, batch_size, workers):
                if isinstance(item, Broken):
                    broken.append(item)
                else:
                    writer.write(item)
        return broken
    finally:
        leave_world()
