"""List files, a line ``<relative path> <label>`` an image: ImageNet-LT, iNaturalist 2018; and iNaturalist's json."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mbib_timm.data.images import Split
from mbib_timm.errors import DataError


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
    """Open a list file.

    Args:
        list_file: the list, looked for as it is and then under `data_dir`.
        data_dir: folder that the paths are relative to.
        key: recipe key of the list, for messages.
        class_map: file with a class name a line, in label order.

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
    return Split(reader, np.array(labels, dtype=np.int64), class_names=read_class_names(class_map))


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


def read_class_names(path: str | None) -> tuple[str, ...] | None:
    """Read class names, one a line in label order. Raises DataError for a file that is not there."""
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
