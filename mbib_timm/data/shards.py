"""Webdataset shards through timm's reader, made strict: no image is skipped in silence, none is counted twice."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import webdataset
from PIL import Image
from timm.data import IterableImageDataset
from timm.data.readers import reader_wds
from torch import multiprocessing
from torch.utils.data import get_worker_info

from mbib_timm.data.class_counts import read_class_counts
from mbib_timm.data.images import first_line
from mbib_timm.errors import DataError
from mbib_timm.recipe import Recipe

LOG_BYTES = 1 << 18


class SharedLog:
    """Distinct lines that any process appends and any reads. It holds 256 KB; what does not fit is left out."""

    def __init__(self) -> None:
        self.lock = multiprocessing.Lock()
        self.used = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.content = torch.zeros(LOG_BYTES, dtype=torch.uint8).share_memory_()

    def lines(self) -> list[str]:
        """Return what was appended so far."""
        return self.content[: int(self.used)].numpy().tobytes().decode().splitlines()

    def append(self, line: str) -> None:
        """Append a line unless it is there."""
        with self.lock:
            encoded, start = f"{line}\n".encode(), int(self.used)
            if line not in self.lines() and start + len(encoded) <= LOG_BYTES:
                self.content[start : start + len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
                self.used += len(encoded)


class ShardReader(reader_wds.ReaderWds):
    """timm's reader with another answer to what cannot be read.

    Evaluation raises, and reads every shard once over all processes; training replaces, and remembers.

    Args:
        num_classes: classes K that labels are held against; None where they are not known.
        kwargs: those of timm's reader.
    """

    def __init__(self, num_classes: int | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.broken = SharedLog()

    ds: Any  # the pipeline; None until the first iteration

    def _lazy_init(self) -> None:
        super()._lazy_init()
        # timm's stages end with ..., read shards, [shuffle,] decode, rename; those that read log an error and go on.
        self.ds.pipeline[-2] = webdataset.map(self._decode, handler=webdataset.reraise_exception)
        if not self.is_training:
            self.ds.pipeline[-3] = webdataset.tarfile_to_samples(handler=webdataset.reraise_exception)

    def _decode(self, sample: dict[str, Any]) -> dict[str, Any] | None:
        where = f"{sample['__url__']}/{sample['__key__']}"
        if not self.split_info.alt_label:
            self._check_label(sample.get("cls"), where)
        try:
            return reader_wds._decode(sample, self.input_key, self.input_img_mode, alt_label=self.split_info.alt_label)
        except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, EOFError and more
            if not self.is_training:
                raise DataError(f"cannot read image {where}: {first_line(error)}") from None
            self.broken.append(where)
            return None

    def _check_label(self, label: bytes | None, where: str) -> None:
        try:
            number = int(label or b"")
        except ValueError:
            raise DataError(f"{where}: label {(label or b'').decode(errors='replace')!r} is not an integer") from None
        if self.num_classes is not None and not 0 <= number < self.num_classes:
            raise DataError(f"{where}: label {number} is not in 0..{self.num_classes - 1}")

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        if self.is_training:
            if get_worker_info() is None:
                # Without workers one shuffle buffer would serve all epochs, and a resumed run could not repeat it.
                self.ds, self.worker_seed = None, self.common_seed + self.epoch_count.value
            yield from super().__iter__()
            return
        # timm's own evaluation over several processes repeats and leaves out images to give each the same number.
        if self.ds is None:
            self._lazy_init()
        try:
            for sample in self.ds:
                yield sample["image"], sample["target"]
        except (tarfile.TarError, OSError, ValueError) as error:
            raise DataError(f"cannot read the shards in {self.root}: {first_line(error)}") from None


class ShardStream(IterableImageDataset):
    """Images of a split's shards, in the order that they stream.

    Args:
        recipe: place and name of the data, batch sizes, seed, class counts.
        split: a split of the shards' ``_info.json``, or a brace pattern of shards with their number of images
            (``demo-train-{000..007}.tar|8000``).
        training: shuffle, and replace broken images.
        mode: PIL mode of the images.

    Raises:
        DataError: no such split, or fewer shards than processes that train on them.
    """

    def __init__(self, recipe: Recipe, split: str, training: bool, mode: str) -> None:
        root = str(recipe.data_dir)
        num_classes = recipe.num_classes if recipe.class_counts is None else len(read_class_counts(recipe.class_counts))
        try:
            reader = ShardReader(
                num_classes,
                root=root,
                split=split,
                is_training=training,
                batch_size=recipe.batch_size if training else recipe.validation_batch_size,
                seed=recipe.seed,
                input_img_mode=mode,
            )
        except (ValueError, KeyError, OSError, RuntimeError, AssertionError) as error:
            raise DataError(f"cannot open split {split!r} of the shards in {root}: {first_line(error)}") from None
        missing = [name for name in reader.split_info.filenames if not (Path(root) / name).is_file()]
        if missing:
            raise DataError(f"split {split!r} names the shard {missing[0]}, which is not in {root}")
        shards, processes = len(reader.split_info.filenames), max(1, recipe.workers) * reader.dist_num_replicas
        if training and shards < processes:
            raise DataError(f"{shards} shards cannot feed {processes} loading processes: lower --workers")
        super().__init__(root, reader=reader)

    def broken(self) -> list[str]:
        """Return the images that were replaced so far, as shard/key, in any worker."""
        return self.reader.broken.lines()
