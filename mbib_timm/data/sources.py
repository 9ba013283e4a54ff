"""Data sources, found by name: each opens one split of the recipe's data.

Here are the digits that come with the package, torchvision's CIFAR, list files and Hugging Face data sets; folders and
archives have a file of their own.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_reader
from torchvision import datasets

from mbib_timm.data.folders import open_folder
from mbib_timm.data.images import ArrayReader, Split, TimmReader
from mbib_timm.errors import DataError, first_line
from mbib_timm.recipe import Recipe
from mbib_timm.registry import Registry

DIGITS = Path(__file__).with_name("digits.npz")
TEST_IMAGES_PER_CLASS = 34
DIGIT_SIZE = 16
SOURCES: Registry[Callable[[Recipe, str], Split]] = Registry("data source")
HFDS_PREFIX = "hfds/"


def open_split(recipe: Recipe, split: str) -> Split:
    """Open one split of the recipe's data.

    Args:
        recipe: names source and place.
        split: name of the split.

    Raises:
        MbibError: an unknown source.
        DataError: data that are missing or malformed.
    """
    if recipe.dataset.startswith(HFDS_PREFIX):
        return SOURCES["hfds/NAME"](recipe, split)
    return SOURCES[recipe.dataset](recipe, split)


@SOURCES.register("digits")
def _digits(recipe: Recipe, split: str) -> Split:
    return open_digits(split)


@SOURCES.register("folder")
def _folder(recipe: Recipe, split: str) -> Split:
    return open_folder(recipe.data_dir, split, recipe.val_fraction, recipe.subset_seed)


def _list_of(recipe: Recipe, split: str) -> tuple[str | None, str]:
    """Return a split's list file, and the recipe key that gives it."""
    lists = {
        recipe.test_split or "test": (recipe.test_list, "test_list"),
        recipe.val_split: (recipe.val_list, "val_list"),
        recipe.train_split: (recipe.train_list, "train_list"),
    }
    if split not in lists:
        raise DataError(f"there is no list of split {split!r}: the recipe names {', '.join(reversed(lists))}")
    return lists[split]


@SOURCES.register("list")
def _list(recipe: Recipe, split: str) -> Split:
    file, key = _list_of(recipe, split)
    return open_list(file, recipe.data_dir, key, recipe.class_map)


@SOURCES.register("inat2018")
def _inat2018(recipe: Recipe, split: str) -> Split:
    file, key = _list_of(recipe, split)
    return open_inaturalist(file, recipe.data_dir, key)


def _cifar(kind: type[datasets.CIFAR10], recipe: Recipe, split: str) -> Split:
    name = kind.__name__
    if split not in ("train", "test", "validation"):
        raise DataError(f"{name} has the splits train and test, not {split!r}")
    root = Path(recipe.data_dir or "data")
    try:
        cifar = kind(str(root), train=split == "train", download=recipe.dataset_download)
    except (RuntimeError, OSError) as error:
        reason = first_line(error) if recipe.dataset_download else "missing or damaged; --dataset-download fetches it"
        raise DataError(f"cannot open {name} under {root}: {reason}") from None
    return Split(ArrayReader(cifar.data, name), np.array(cifar.targets), class_names=tuple(cifar.classes))


SOURCES.register("torch/cifar10")(partial(_cifar, datasets.CIFAR10))
SOURCES.register("torch/cifar100")(partial(_cifar, datasets.CIFAR100))


@SOURCES.register("hfds/NAME")
def _hugging_face(recipe: Recipe, split: str) -> Split:
    try:
        reader: Any = create_reader(recipe.dataset, root=recipe.data_dir, split=split)
    except ImportError:
        raise DataError("hfds/ needs Hugging Face datasets: pip install 'mbib-timm[hfds]'") from None
    except (ValueError, KeyError, OSError) as error:
        raise DataError(f"cannot open {recipe.dataset}, split {split!r}: {first_line(error)}") from None
    # The whole column at once: the reader's own iteration takes a minute for a million images.
    targets = np.asarray(reader.dataset.select_columns(reader.label_key).with_format("numpy")[:][reader.label_key])
    if targets.dtype.kind not in "iu":
        raise DataError(f"{recipe.dataset}: labels must be integers, column {reader.label_key!r} is {targets.dtype}")
    names = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
    inside = f"{recipe.dataset} {split}"
    return Split(TimmReader(reader, inside), targets.astype(np.int64), class_names=tuple(map(str, names)) or None)


def open_digits(split: str) -> Split:
    """Open the embedded data: 1,797 handwritten digits of 8x8 pixels, enlarged to 16x16. Nothing is downloaded.

    E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998),
    doi:10.24432/C50P49, CC BY 4.0: the test part, in the order in which scikit-learn has it; grey values 0 to 16. The
    last 34 images of each class are the test set, the other 1,457 the training set.

    Args:
        split: ``train``, or ``test`` or ``validation`` for the test set.

    Raises:
        DataError: an unknown split.
    """
    if split not in ("train", "test", "validation"):
        raise DataError(f"digits have the splits train and test, not {split!r}")
    with np.load(DIGITS) as digits:
        grey, targets = digits["images"], digits["targets"].astype(np.int64)
    in_test = np.zeros(len(targets), dtype=bool)
    for label in range(10):
        in_test[np.flatnonzero(targets == label)[-TEST_IMAGES_PER_CLASS:]] = True
    chosen = ~in_test if split == "train" else in_test
    grey = np.rint(grey[chosen] * (255 / 16)).astype(np.uint8)
    size = (DIGIT_SIZE, DIGIT_SIZE)
    images = np.stack([np.asarray(Image.fromarray(g).resize(size, Image.Resampling.BICUBIC)) for g in grey])
    return Split(ArrayReader(images, "digits"), targets[chosen], class_names=tuple("0123456789"))


class PathReader:
    """Images at paths under a root. The paths are kept as one buffer, not as half a million objects.

    Args:
        root: folder that the paths are relative to.
        names: relative paths.
    """

    def __init__(self, root: Path, names: list[str]) -> None:
        self.root = root
        encoded = [name.encode() for name in names]
        self.ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self.buffer = b"".join(encoded)
        self.class_folders: dict[str, str] | None = None  # of flat validation images, looked up when first needed

    def name(self, index: int) -> str:
        """Return a relative path."""
        start = self.ends[index - 1] if index else 0
        return self.buffer[start : self.ends[index]].decode()

    def path(self, index: int) -> str:
        """Return a path as it is on the disk.

        ImageNet's validation images lie in class folders (``val/n01440764/X.JPEG``) or flat (``val/X.JPEG``), and
        lists name either: what is not there is looked for in the other layout.
        """
        path = self.root / self.name(index)
        if "val" in (path.parent.name, path.parent.parent.name) and not path.exists():
            path = self._in_other_layout(path)
        return str(path)

    def _in_other_layout(self, path: Path) -> Path:
        if path.parent.name != "val":
            flat = path.parent.parent / path.name
            return flat if flat.exists() else path
        if self.class_folders is None:
            self.class_folders = {file.name: file.parent.name for file in path.parent.glob("*/*")}
        return path.parent / self.class_folders.get(path.name, "") / path.name

    def read(self, index: int) -> Image.Image:
        """Open an image."""
        return Image.open(self.path(index))


def open_list(list_file: str | None, data_dir: str | None, key: str, class_map: str | None) -> Split:
    """Open a list file, one line ``<relative path> <label>`` per image, as of ImageNet-LT and iNaturalist 2018.

    Args:
        list_file: the list, looked for as it is and then under `data_dir`.
        data_dir: folder that the paths are relative to.
        key: recipe key of the list, for messages.
        class_map: file with one class name per line, in label order.

    Raises:
        DataError: no file, or a line that is malformed, absolute, or leads out of the root; names file and line.
    """
    file, root = _locate(list_file, data_dir, key)
    names: list[str] = []
    labels: list[int] = []
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                name, label = _parse_line(line, f"{file}, line {number}")
                names.append(name)
                labels.append(label)
    except UnicodeDecodeError:
        raise DataError(f"{file} is not a text file of lines '<relative path> <label>'") from None
    if not names:
        raise DataError(f"{file} lists no images")
    _require_images(reader := PathReader(root, names), file)
    return Split(reader, np.array(labels, dtype=np.int64), class_names=_read_class_names(class_map))


def _parse_line(line: str, where: str) -> tuple[str, int]:
    """Return path and label of a line. Raises DataError naming the line."""
    parts = line.rsplit(maxsplit=1)
    if len(parts) != 2:
        raise DataError(f"{where}: expected '<relative path> <label>', got {line.strip()!r}")
    name, label = parts[0].lstrip(), parts[1]
    if name[0] in "/\\" or ".." in name or ":" in name:
        _check_path(name, where)
    try:
        number = int(label)
    except ValueError:
        raise DataError(f"{where}: label {label!r} is not an integer") from None
    if not 0 <= number < 2**31:
        raise DataError(f"{where}: label {label} is {'negative' if number < 0 else 'too large'}")
    return name, number


def open_inaturalist(json_file: str | None, data_dir: str | None, key: str) -> Split:
    """Open iNaturalist's own json (``train2018.json``): images, annotations and categories.

    Args:
        json_file: the json, looked for as it is and then under `data_dir`.
        data_dir: folder that the images' paths are relative to.
        key: recipe key of the json, for messages.

    Raises:
        DataError: no file, another format, an image without annotation, or a path that leads out of the root.
    """
    file, root = _locate(json_file, data_dir, key)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        label_of = {entry["image_id"]: entry["category_id"] for entry in content["annotations"]}
        ids = [entry["id"] for entry in content["images"]]
        names = [str(entry["file_name"]) for entry in content["images"]]
        categories = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not iNaturalist's json of images, annotations and categories ({error!r})") from None
    if not names:
        raise DataError(f"{file} lists no images")
    if set(categories) != set(range(len(categories))):
        raise DataError(f"{file}: category ids must be 0..{len(categories) - 1}")
    for image, name in zip(ids, names, strict=True):
        _check_path(name, str(file))
        if label_of.get(image) not in categories:
            raise DataError(f"{file}: image {image!r} ({name}) has no annotation with a known category")
    _require_images(reader := PathReader(root, names), file)
    targets = np.array([label_of[image] for image in ids], dtype=np.int64)
    return Split(reader, targets, class_names=tuple(categories[i] for i in range(len(categories))))


def _read_class_names(path: str | None) -> tuple[str, ...] | None:
    """Read class names, one per line in label order. Raises DataError for a file that is not there."""
    if path is None:
        return None
    try:
        return tuple(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    except OSError as error:
        raise DataError(f"cannot read the class map {path}: {error.strerror}") from None


def _locate(file: str | None, data_dir: str | None, key: str) -> tuple[Path, Path]:
    if file is None:
        raise DataError(f"recipe key {key!r} is needed: the file that lists the images")
    if data_dir is None:
        raise DataError("recipe key 'data_dir' is needed: the folder that the listed paths are relative to")
    root = Path(data_dir)
    if not root.is_dir():
        raise DataError(f"data_dir {root} does not exist")
    for candidate in (Path(file), root / file):
        if candidate.is_file():
            return candidate, root
    raise DataError(f"recipe key {key!r}: no file {file}, here or in {root}")


def _check_path(name: str, where: str) -> None:
    parts = Path(name.replace("\\", "/")).parts
    if not parts or Path(name).is_absolute() or name[0] in "/\\" or ":" in parts[0] or ".." in parts:
        raise DataError(f"{where}: {name!r} must be a path below the data folder")


def _require_images(reader: PathReader, file: Path) -> None:
    """Look for a few of the images: a wrong data_dir shows at once, and a single missing file is no wrong data_dir."""
    sample = np.linspace(0, len(reader.ends) - 1, num=5, dtype=np.int64)
    if not any(Path(reader.path(int(i))).is_file() for i in sample):
        raise DataError(f"{file} lists {reader.name(0)}, which is not under data_dir {reader.root}")
