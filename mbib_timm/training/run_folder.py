"""A run's folder: everything a run leaves behind, each file written whole or not at all.

recipe.yaml         every key as it was used            environment.json    versions, hardware, commit
summary.csv         a row an epoch                      metrics.json        the result, when the run is done
predictions.csv, confusion.csv, classes.csv, errors.json    the result by image and by class: evaluation/answer_files.py
model.safetensors   the last epoch's weights            config.json         loads them with timm (local-dir:)
best.safetensors    the best epoch's weights            last.ckpt, previous.ckpt    to resume from
figures/            training curves, accuracy by class and by shot group
.lock               held while a process trains here
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors.torch import save as save_tensors

# Private: timm's public `save_for_hf` writes the weights too, which it refuses in the channels-last memory format.
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from mbib_timm.data.images import channelwise
from mbib_timm.data.transforms import evaluation_crop
from mbib_timm.environment import Environment
from mbib_timm.errors import BusyFolderError, CheckpointError, MbibError, few, first_line
from mbib_timm.evaluation.answer_files import CLASSES, CONFUSION, ERRORS, PREDICTIONS
from mbib_timm.files import check_folder, counted, printable, read_json, remove_debris, to_json, write_bytes
from mbib_timm.models.adapters import merged_weights
from mbib_timm.models.pretraining import Origin
from mbib_timm.models.zoo import data_set_of, split_tag
from mbib_timm.recipe import Recipe, dump_recipe, load_recipe
from mbib_timm.results.record import RECORD
from mbib_timm.results.redact import redact_value
from mbib_timm.training.checkpoint import LAST, NEXT, PREVIOUS, load_newest, set_aside, take_next

WEIGHTS, BEST_WEIGHTS = "model.safetensors", "best.safetensors"
LOCK = ".lock"
PATIENCE = 0.5  # seconds: `require_idle` of another process holds the lock for a moment
# What `mbib train`, `mbib aggregate` and `mbib analyze` have measured of a run's weights.
MEASURED = (RECORD, PREDICTIONS, CONFUSION, CLASSES, ERRORS, "aggregation.json", "analysis/analysis.json")
# What of an environment decides the bits that come out.
CONDITIONS = (
    "device", "hardware", "processes", "threads", "mbib_timm", "commit", "torch", "timm", "torchvision", "numpy",
)  # fmt: skip
LONGEST_NAME = 255  # bytes that file systems take
# Keys that count in epochs: where a run goes on for another number of them, these may differ as well.
COUNTED_IN_EPOCHS = ("epochs", "warmup_epochs", "decay_milestones", "mixup_off_epochs")


def same_computation(recipe: Recipe, run: Recipe) -> bool:
    """Return whether a run computed what a recipe asks for; what the recipe leaves open is as the run has it."""
    return recipe.with_choices_of(run).computation() == run.computation()


def _in_short(there: Any, asked: Any) -> tuple[str, str]:
    """Return two values of a key that differ, in text: two methods, which are mappings, by their names."""
    if isinstance(there, Mapping) and isinstance(asked, Mapping) and there.get("name") != asked.get("name"):
        return str(there.get("name")), str(asked.get("name"))
    return repr(there), repr(asked)


def place_of(output: str, name: str) -> Path:
    """Return the folder of a run inside the folder of all.

    Raises:
        MbibError: a name that is none of a folder, or leads out of it.
    """
    fits = printable(name) == name and name == name.strip() and 0 < len(os.fsencode(name)) <= LONGEST_NAME
    if not fits or name in (os.curdir, os.pardir) or set(name) & {"/", os.sep}:
        raise MbibError(
            f"recipe key 'experiment': expected the name of a folder in {output}, of at most {LONGEST_NAME} bytes "
            f"and without control characters, got {name[:40]!r}"
        )
    if "\0" in output:
        raise MbibError(f"recipe key 'output': {output!r} is not the name of a folder")
    if Path(output).parts[:1] == ("~",):
        check_folder(Path(output))
    return Path(output) / name


class RunFolder:
    """The files of one run.

    Args:
        path: the folder; made by `begin`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / LOCK, timeout=0)  # the system lets go of it when a process is killed
        self._seen = self._checkpoints()
        self._unsound: list[Path] = []

    def _checkpoints(self) -> list[tuple[str, int]]:
        """Return the checkpoints that there are, each with the time when it was written, in nanoseconds."""
        found = []
        for name in (NEXT, LAST, PREVIOUS):
            # Another process renames them as it writes.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                found.append((name, (self.path / name).lstat().st_mtime_ns))
        return found

    def has_checkpoint(self) -> bool:
        """Return whether there is anything to resume from."""
        return any(os.path.lexists(self.path / name) for name in (NEXT, LAST, PREVIOUS))

    def newest(self, warn: Callable[[str], None]) -> dict[str, Any]:
        """Return the state of the newest sound checkpoint; see `load_newest`. `begin` removes those that are not."""
        state, self._unsound = load_newest(self.path, warn)
        return state

    def require_free(self) -> None:
        """Raise MbibError if another run lives here, or another process trains here."""
        places = (self, *map(RunFolder, self.path.glob("stage*-*")))
        for place in places:
            place.require_idle()
        if any((place.path / "recipe.yaml").exists() or place.has_checkpoint() for place in places):
            raise MbibError(
                f"{self.path} already holds a run: resume it with --resume auto, choose another folder with "
                "--experiment NAME or --output DIR, or remove the folder"
            )
        there = next(place for place in (self.path, *self.path.parents) if place.exists())
        if not there.is_dir():
            raise MbibError(f"{there} is a file; choose another folder with --experiment or --output")

    def require_idle(self) -> None:
        """Raise BusyFolderError if another process is training here; whoever is told so should neither wait in vain nor
        remove what it writes."""
        if self._lock.is_locked or not (self.path / LOCK).exists():
            return
        try:
            with self._lock:
                return
        except Timeout:
            raise self._busy() from None
        except OSError:  # a folder that cannot be written is an error of its own
            return

    def _busy(self) -> BusyFolderError:
        return BusyFolderError(f"another process is training in {self.path}; wait for it, or choose another folder")

    def recipe(self, plugins: Sequence[str] = ()) -> Recipe:
        """Return the recipe of the run here. Raises CheckpointError where there is none.

        Args:
            plugins: instead of its own, which may lie elsewhere by now.
        """
        file = self.path / "recipe.yaml"
        if not file.is_file():
            raise CheckpointError(f"{self.path} has checkpoints but no recipe.yaml to compare with")
        return load_recipe(file, {"plugin": [*plugins]} if plugins else None)

    def changed_conditions(self, environment: Environment, amp: bool | None) -> str | None:
        """Return in what a run that goes on finds other conditions than it has had until now; None for nothing.

        Args:
            environment: of now.
            amp: whether the run has mixed precision, which it keeps.

        Raises:
            MbibError: the folder's environment.json holds something else.
        """
        file = self.path / "environment.json"
        if not os.path.lexists(file):
            return f"{self.path} has no environment.json: the conditions of its run so far are unknown"
        there = read_json(Environment, file, "the environment of a run")
        pairs = {name: (getattr(there, name), getattr(environment, name)) for name in CONDITIONS}
        changed = {name: f"{name} ({a!r} there, {b!r} here)" for name, (a, b) in pairs.items() if a not in (None, b)}
        if not changed:
            return None
        listing = ", ".join(changed.values())
        said = f"{self.path} continues under other conditions, and may not give identical numbers: {listing}"
        if "device" in changed:
            said += f"; precision stays as it was (amp: {str(amp).lower()})"
        if "processes" in changed:
            before, now = pairs["processes"]
            said += f"; an update takes the batches of {counted(now, 'process')}, and before took those of {before}"
        return said

    def agree(self, recipe: Recipe, extend: bool = False, instead: str = "--experiment") -> Recipe:
        """Return a recipe with what the run here has chosen, where it leaves that open: see `OPEN_CHOICES`.

        Args:
            recipe: what is asked for.
            extend: the last stage may have other epochs than here, and with them another schedule.
            instead: flag by which the caller would go elsewhere.

        Raises:
            CheckpointError: the run here computes something else.
            BusyFolderError: so it does, and another process trains it.
        """
        there = self.recipe(recipe.plugin)
        # Graphs change nothing of what is computed, and another device may have none: that choice is made anew.
        recipe = recipe.with_choices_of(there).replace(cuda_graph=recipe.cuda_graph)
        if extend and there.epochs != recipe.epochs:
            there = there.replace(**{key: getattr(recipe, key) for key in COUNTED_IN_EPOCHS})
        before, now = there.computation(), recipe.computation()
        changed = [key for key in {**now, **before} if now.get(key) != before.get(key)]
        if changed:
            self.require_idle()  # nobody should be told to remove what another process writes
            first = sorted((key for key in changed if key != "stages"), key=lambda key: key not in ("model", "method"))
            pairs = {key: _in_short(before.get(key), now.get(key)) for key in first}
            listing = few([f"{key} ({there} there, {asked} asked for)" for key, (there, asked) in pairs.items()], 4)
            listing = listing or "its stages differ"
            raise CheckpointError(
                f"{self.path} holds a run of another recipe: {listing}; resume it as it began, choose another "
                f"{instead}, or remove the folder"
            )
        return recipe

    def occupy(self) -> None:
        """Make the folder, and keep other processes out until `end`.

        Raises:
            BusyFolderError: another process trains in the folder, or has trained since this object was made.
            MbibError: the folder cannot be written.
        """
        if self._lock.is_locked:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise self._busy() from None
        except OSError as error:
            raise MbibError(f"cannot write to the output folder {self.path}: {error.strerror}") from None
        if self._checkpoints() != self._seen:
            self._lock.release()
            raise BusyFolderError(f"another process has trained in {self.path} in the meantime; run the command again")

    def begin(self, recipe: Recipe, environment: Environment, trains: bool = True) -> None:
        """Record what is about to run, in a folder that is this process's own; see `occupy`, which raises.

        Args:
            recipe: as it runs.
            environment: in which.
            trains: the weights train on: what was measured of them goes before the recipe is written, of which it would
                be taken for the result.
        """
        self.occupy()
        for path in self._unsound:
            set_aside(path)
        take_next(self.path)  # as the process would have done that wrote it, had it not been killed
        for part in ("", "figures", "analysis"):
            remove_debris(self.path / part)
        for name in MEASURED if trains else ():
            (self.path / name).unlink(missing_ok=True)
        write_bytes(self.path / "recipe.yaml", dump_recipe(recipe))
        write_bytes(self.path / "environment.json", to_json(environment))

    def clear(self) -> None:
        """Remove what a run wrote here as it began, for the next one to begin."""
        for name in (NEXT, LAST, PREVIOUS, "recipe.yaml", "environment.json"):
            (self.path / name).unlink(missing_ok=True)

    def end(self) -> None:
        """Let other processes in."""
        self._lock.release()

    def write_weights(self, name: str, state_dict: Mapping[str, Tensor]) -> None:
        """Write weights as safetensors."""
        content = save_tensors({key: value.detach().cpu().contiguous() for key, value in state_dict.items()})
        write_bytes(self.path / name, content)

    def write_model(
        self,
        model: nn.Module,
        *,
        input_size: tuple[int, int, int],
        recipe: Recipe,
        class_counts: np.ndarray,
        class_names: Sequence[str] | None,
        logit_prior: str | None,
        origin: Origin,
        tag: str,
    ) -> None:
        """Write ``model.safetensors`` and the ``config.json`` by which ``local-dir:`` loads it.

        The config carries the preprocessing, the class names, the training images of each class, the class frequencies
        that the logits are for, what the model was trained on, and where that started. The tag is the run's, and the
        licence is left open: the model's own are those of other weights.
        """
        cfg = {"tag": tag, "license": None}
        # Those of the model that training started from may be of other classes.
        known: Any = getattr(model, "pretrained_cfg", {})
        cfg |= {key: None for key in ("label_names", "label_descriptions") if known.get(key) is not None}
        config: dict[str, Any] = {"class_counts": [int(n) for n in class_counts], "pretrained_cfg": cfg}
        is_zoos = data_set_of(f".{tag}", class_counts.tolist(), class_names) is not None
        config["training_data"] = split_tag(tag)[1] if is_zoos else redact_value(recipe.dataset)
        config["origin"] = asdict(origin)
        if logit_prior is not None:
            config["logit_prior"] = logit_prior
        if class_names is not None:
            config["label_names"] = list(class_names)
        text = config_text(model, input_size, recipe, config)
        self.write_weights(WEIGHTS, merged_weights(model))
        write_bytes(self.path / "config.json", text)


def config_text(model: nn.Module, input_size: tuple[int, int, int], recipe: Recipe, config: Mapping[str, Any]) -> bytes:
    """Return the ``config.json`` of a model of timm's.

    Args:
        model: as it is to be built again.
        input_size: of its images, (C, H, W).
        recipe: has their preprocessing.
        config: what else the file says.

    Raises:
        MbibError: the file cannot say how the model is built.
    """
    data_config = {
        "input_size": input_size,
        "mean": channelwise(recipe.settled("mean"), input_size[0]),
        "std": channelwise(recipe.settled("std"), input_size[0]),
        **evaluation_crop(recipe),
    }
    with tempfile.TemporaryDirectory() as beside:
        file = Path(beside) / "config.json"
        try:
            save_config_for_hf(model, str(file), model_config={**config}, data_config=data_config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise MbibError(f"model {recipe.model!r} cannot be saved: {first_line(error)}") from None
        return file.read_bytes()
