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

    def name(self, index: int) -> str:
        """Return a relative path."""
        start = self.ends[index - 1] if index else 0
        return self.buffer[start : self.ends[index]].decode()

    def path(self, index: int) -> str:
        """Return a path as it is on the disk.

        ImageNet's validation images lie in class folders or flat, and lists name either: what is not there is looked
        for in the other layout.
        """
        path = self.root / self.name(index)
        if path.parent.parent.name == "val" and not path.exists():
            path = path.parent.parent / path.name
        return str(path)

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
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            name, _, label = line.strip().rpartition(" ")
            if not name:
                if line.strip():
                    raise DataError(f"{file}, line {number}: expected '<relative path> <label>', got {line.strip()!r}")
                continue
            if name[0] in "/\\" or ".." in name or ":" in name:
                _check_path(name, f"{file}, line {number}")
            try:
                labels.append(int(label))
            except ValueError:
                raise DataError(f"{file}, line {number}: label {label!r} is not an integer") from None
            names.append(name.rstrip())
    targets = np.array(labels, dtype=np.int64)
    if len(targets) == 0:
        raise DataError(f"{file} lists no images")
    if targets.min() < 0:
        raise DataError(f"{file}, line {int(targets.argmin()) + 1}: label {targets.min()} is negative")
    _require_first_image(reader := PathReader(root, names), file)
    return Split(reader, targets, class_names=read_class_names(class_map))


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
        label_of = {entry["image_id"]: int(entry["category_id"]) for entry in content["annotations"]}
        names = [entry["file_name"] for entry in content["images"]]
        targets = np.array([label_of[entry["id"]] for entry in content["images"]], dtype=np.int64)
        categories = {int(entry["id"]): str(entry["name"]) for entry in content["categories"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not iNaturalist's json of images, annotations and categories ({error!r})") from None
    for name in names:
        _check_path(name, str(file))
    if not names:
        raise DataError(f"{file} lists no images")
    if sorted(categories) != list(range(len(categories))):
        raise DataError(f"{file}: category ids must be 0..{len(categories) - 1}")
    _require_first_image(reader := PathReader(root, names), file)
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


def _require_first_image(reader: PathReader, file: Path) -> None:
    """A wrong data_dir shows at once, and not after the first batch has been looked for."""
    if not Path(reader.path(0)).is_file():
        raise DataError(f"{file} lists {reader.name(0)}, which is not under data_dir {reader.root}")
