"""The files of a published model, made of a run's folder: what the repository holds, and nothing of the machine."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from mbib_timm.errors import MbibError
from mbib_timm.files import parse_json, to_json
from mbib_timm.models.weights import LoadedModel, load_model
from mbib_timm.publishing.card import NOTHING_STATED, Stated, figures_of, licence_of, render_card
from mbib_timm.results.record import RECORD, RunRecord
from mbib_timm.results.redact import redact_recipe, redact_value
from mbib_timm.results.runs import read_seeds

TRAINING_HEADS = "training_heads"


@dataclass(frozen=True)
class Release:
    """A model to be published.

    Attributes:
        name: ``arch.tag``.
        repository: on the Hub, ``organisation/name``.
        files: contents by path in the repository.
    """

    name: str
    repository: str
    files: dict[str, bytes]

    def listing(self) -> str:
        """Return every file with its size in bytes."""
        width = max(map(len, self.files))
        return "\n".join(f"{path.ljust(width)}  {len(content):>12,} bytes" for path, content in self.files.items())


def git_oid(content: bytes) -> str:
    """Return the name by which git knows a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def make_release(
    run: Path,
    repository: str,
    others: Sequence[Path] = (),
    inference_only: bool = False,
    stated: Stated = NOTHING_STATED,
) -> Release:
    """Collect the files of a finished run.

    Args:
        run: the run's folder.
        repository: on the Hub; the card says how to load from it.
        others: folders of runs that differ in the seed alone; the card gives the spread.
        inference_only: leave out the classifiers that serve training only.
        stated: name of the data, and licence of the weights: the same in card and config.json.

    Raises:
        MbibError: a run that is not finished, or whose files are damaged.
    """
    own, *_ = runs = read_seeds(run, others)
    for name in ("model.safetensors", "config.json"):
        if not (run / name).is_file():
            raise MbibError(f"{run} has no {name}: the run is not finished")
    _check_same_run(run, load_model(f"local-dir:{run}"), own.record)  # as whoever downloads it will
    weights = (run / "model.safetensors").read_bytes()
    config = parse_json((run / "config.json").read_bytes())
    config |= {key: redact_value(config[key]) for key in ("model_args", "pretrained_cfg", "origin") if key in config}
    if inference_only:
        config, weights = without_training_heads(config, weights)
    config["pretrained_cfg"]["license"] = licence_of(own, stated)
    if stated.dataset_name is not None:
        config["training_data"] = stated.dataset_name
    files = {
        "README.md": render_card(own, repository, runs, inference_only=inference_only, stated=stated).encode(),
        "config.json": to_json(config),
        "model.safetensors": weights,
        "recipe.yaml": redact_recipe(own.recipe),
        RECORD: to_json(own.record),
    }
    files |= {f"figures/{name}": (run / "figures" / name).read_bytes() for name in figures_of(own)}
    return Release(own.name, repository, files)


def _check_same_run(run: Path, model: LoadedModel, record: RunRecord) -> None:
    """Raise MbibError where config.json and metrics.json are not of the same run."""
    names, counts = model.class_names, None if model.class_counts is None else model.class_counts.tolist()
    for key, stated, recorded in (
        ("label_names", names, record.class_names and tuple(record.class_names)),
        ("class_counts", counts, list(record.class_counts)),
    ):
        if stated is not None and recorded is not None and stated != recorded:
            raise MbibError(f"{run}: {key} of config.json are not those of metrics.json")


def without_training_heads(config: dict[str, Any], weights: bytes) -> tuple[dict[str, Any], bytes]:
    """Return config.json and model.safetensors of the model without the heads that serve training only."""
    cfg = config["pretrained_cfg"]
    names = cfg["classifier"] if isinstance(cfg["classifier"], list) else []
    kept = [name for name in names if not name.startswith(TRAINING_HEADS)]
    if len(kept) == len(names):
        raise MbibError(f"{config['architecture']} has no heads that serve training only; omit --inference-only")
    config = {
        **config,
        "model_args": {**config.get("model_args", {}), "training_heads": False},
        "pretrained_cfg": {**cfg, "classifier": kept},
    }
    tensors = {name: value for name, value in load(weights).items() if not name.startswith(TRAINING_HEADS)}
    return config, save(tensors)
