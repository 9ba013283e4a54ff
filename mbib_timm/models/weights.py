"""Trained weights: a model by any name, and strict loading, in which a key that does not fit is named.

timm loads leniently whenever the number of classes differs: a renamed layer would stay random without a word.
`filter_state_dict` runs before timm's loading and refuses such checkpoints; `create_trained` refuses a model of which
any part is still as it was initialised.
"""

import dataclasses
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from timm.data import resolve_model_data_config
from timm.models import load_state_dict
from torch import Tensor, nn

from mbib_timm.errors import CheckpointError, MbibError, few, first_line, unknown_name
from mbib_timm.files import printable
from mbib_timm.models.backbones import PREFIX, classifier_names, skeleton
from mbib_timm.models.hub import hub_error, limited_sockets, patience, prepare_hub, split_repository
from mbib_timm.models.model_config import ModelConfig, read_config
from mbib_timm.models.pip_weights import BACKBONE, packaged_weights
from mbib_timm.models.zoo import ZooModel
from mbib_timm.options import default_of
from mbib_timm.recipe.keys import KEYS

TRAINING_HEADS = "training_heads."
# Files of a folder's weights, the first that is there: ours, and what timm writes without safetensors.
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
# What a tensor may hold; torch would take integers and quantised numbers for a layer's as if they were its own.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool)
_REAL = ("weight", "bias", "running_mean", "running_var")


def filter_state_dict(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a checkpoint under the model's own keys; timm calls this as ``pretrained_filter_fn``.

    Accepts a checkpoint of the same model, or, where the model holds a backbone, one of the plain backbone. What the
    checkpoint cannot give keeps its fresh initialisation: the classifiers, where it is of another number of classes;
    heads that serve training only, where it was published without them; all but the backbone, where it is of that. The
    model's attribute ``untrained`` has the names of what does. A model without heads that serve training only takes a
    checkpoint that has them.

    Raises:
        CheckpointError: missing or unexpected keys, by name.
    """
    own: dict[str, Tensor] = model.state_dict()
    if _is_of_plain_backbone(state_dict, model):
        heads = {key: value for key, value in own.items() if not key.startswith(PREFIX)}
        model.untrained = tuple(heads)  # type: ignore[assignment]
        return {**heads, **prefix_backbone(state_dict, model)}
    fresh: tuple[str, ...] = ()
    if not all(any(key.startswith(TRAINING_HEADS) for key in each) for each in (own, state_dict)):
        fresh += (TRAINING_HEADS,)
    cfg: Any = getattr(model, "pretrained_cfg", {})
    if model.num_classes != cfg.get("num_classes"):
        fresh += tuple(f"{name}." for name in classifier_names(model))
    kept = {key: value for key, value in state_dict.items() if not key.startswith(fresh)}
    anew = {key: value for key, value in own.items() if key.startswith(fresh)}
    model.untrained = tuple(anew)  # type: ignore[assignment]
    kept |= anew
    _require_same_keys(kept, own, "checkpoint")
    return kept


def under_keys_of(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as they are, or those of the plain backbone that a model holds under the model's keys.

    Raises:
        CheckpointError: missing or unexpected keys, by name.
    """
    return prefix_backbone(state_dict, model) if _is_of_plain_backbone(state_dict, model) else state_dict


def _is_of_plain_backbone(state_dict: Mapping[str, Tensor], model: nn.Module) -> bool:
    return hasattr(model, "backbone_name") and not any(key.startswith(PREFIX) for key in state_dict)


def prefix_backbone(state_dict: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return a plain backbone's checkpoint under the keys of a model that holds the backbone, such as an MBIB model.

    Every key of the plain backbone but its classifier's must be there and no other. What the model has no use for,
    such as the layers behind its last tap, is left out. A checkpoint of other keys or shapes is what timm makes of it
    for the plain backbone: position embeddings of another image size are resampled, keys of the authors' are timm's.

    Raises:
        CheckpointError: missing or unexpected keys, by name, or another shape.
    """
    plain = skeleton(model.backbone_name, model.backbone_args)
    cfg: Any = plain.pretrained_cfg
    classifiers = cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))

    def of_features(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in weights.items() if not key.startswith(prefixes)}

    expected, given = of_features(plain.state_dict()), of_features(state_dict)
    if {key: value.shape for key, value in given.items()} != {key: value.shape for key, value in expected.items()}:
        given = of_features(_converted(state_dict, model) or state_dict)
    _require_same_keys(given, expected, f"checkpoint of backbone {model.backbone_name!r}")
    for key, value in given.items():
        if value.shape != expected[key].shape:
            raise CheckpointError(
                f"checkpoint of backbone {model.backbone_name!r} does not fit the model: {key} is of shape "
                f"{tuple(value.shape)}, expected {tuple(expected[key].shape)}"
            )
    sources = {key: model.plain_key(key) for key in model.backbone.state_dict()}
    return {PREFIX + key: given[source] for key, source in sources.items() if source in given}


def _converted(state_dict: Mapping[str, Tensor], model: Any) -> dict[str, Tensor] | None:
    """Return what timm makes of a checkpoint for the plain backbone of a model; None if it cannot load it."""
    cfg: Any = getattr(model, "pretrained_cfg", {})
    overlay = {key: cfg[key] for key in ("input_size", "num_classes") if cfg.get(key) is not None}
    # Of other classes than the checkpoint's timm would load what fits, and leave the rest random.
    args = {"num_classes": overlay.get("num_classes"), **model.backbone_args}
    overlay |= {"state_dict": dict(state_dict), "source": None, "file": None}
    try:
        plain = timm.create_model(model.backbone_name, pretrained=True, pretrained_cfg_overlay=overlay, **args)
    except (RuntimeError, KeyError, ValueError, AttributeError, AssertionError, TypeError):  # of a family's conversion
        return None
    weights: dict[str, Tensor] = plain.state_dict()
    return weights


def _require_same_keys(given: Iterable[str], expected: Iterable[str], what: str) -> None:
    given, expected = set(given), set(expected)
    problems = [
        f"{label} {few(sorted(keys))}"
        for label, keys in (("missing keys:", expected - given), ("unexpected keys:", given - expected))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{what} does not fit the model; {'; '.join(problems)}")


@dataclass(frozen=True)
class Source:
    """Where a trained model is.

    Attributes:
        name: by which timm creates it.
        folder: holds its files; None where they are on the Hub, or where there are none but timm's.
        repository: on the Hub, with ``@revision`` where one is asked for.
    """

    name: str
    folder: Path | None = None
    repository: str | None = None

    @property
    def has_files(self) -> bool:
        """True for a model that carries its own arguments: no bare name of timm's."""
        return self.folder is not None or self.repository is not None

    def file(self, name: str) -> Path | None:
        """Return one of its files, from the Hub if need be; None where there is none.

        Raises:
            MbibError: the Hub cannot be reached, or refuses.
        """
        if self.folder is not None:
            file = self.folder / name
            return file if file.is_file() else None
        if self.repository is None:
            return None
        prepare_hub()
        repository, revision = split_repository(self.repository)
        try:
            with patience():
                return Path(hf_hub_download(repository, name, revision=revision))
        except (LocalEntryNotFoundError, RepositoryNotFoundError) as error:
            raise hub_error(self.repository, error) from None
        except EntryNotFoundError:
            return None
        except Exception as error:  # whatever the Hub's client makes of an answer
            raise hub_error(self.repository, error) from None

    @cached_property
    def config(self) -> ModelConfig:
        """Return what its ``config.json`` says; nothing where there is none. Raises as `file` and `read_config` do."""
        file = self.file("config.json")
        return ModelConfig() if file is None else read_config(file)

    def weights(self) -> dict[str, Tensor] | None:
        """Return the weights of a folder; None where timm knows where they are.

        Raises:
            CheckpointError: there are none, or they cannot be read, see `read_weights`.
        """
        if self.folder is None or not self.name.startswith("local-dir:"):
            return None
        return read_weights(self.folder)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a weights file, or that of a run's folder.

    Raises:
        CheckpointError: missing or unreadable, or a tensor of numbers that are not finite or of no layer's kind.
    """
    file = path
    if path.is_dir():
        file = next((path / name for name in WEIGHTS_FILES if (path / name).exists()), path / WEIGHTS_FILES[0])
    if not file.exists():
        raise CheckpointError(f"no weights at {printable(str(file))}")
    if not file.is_file():  # a pipe would keep us waiting
        raise CheckpointError(f"{file} is not a weights file: it is not a regular file")
    try:
        weights = load_state_dict(str(file), weights_only=True)
    except Exception as error:  # of safetensors, pickle, zip, the file system
        raise CheckpointError(f"{file} is not a weights file ({first_line(error)})") from None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{file} is not a weights file (it holds something else than tensors)")
    for name, value in weights.items():
        if value.dtype not in _DTYPES or (not value.is_floating_point() and name.rpartition(".")[2] in _REAL):
            kind = str(value.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{file}: tensor {printable(name)!r} is {kind}; expected float32, float16 or bfloat16"
            )
    require_finite(weights, str(file))
    return weights


def start_config(path: Path) -> ModelConfig:
    """Return what is known of weights to start from: the ``config.json`` of a folder, or of the run that a file is of.

    Raises:
        CheckpointError: as `read_config`.
    """
    folder = path if path.is_dir() else path.parent
    known = (folder / "config.json").is_file() and (path.is_dir() or (folder / "recipe.yaml").is_file())
    return read_config(folder / "config.json") if known else ModelConfig()


def require_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Raise CheckpointError for weights that are not finite, by the name of the tensor; `where` is for the message."""
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(f"{where}: tensor {name!r} holds numbers that are not finite")


def find_source(target: str) -> Source:
    """Find a trained model.

    Args:
        target: a run's folder, ``local-dir:FOLDER``, ``hf-hub:REPO[@REVISION]``, or a timm model name with or without
            tag.

    Raises:
        MbibError: neither a folder nor a model.
    """
    place = target.removeprefix("local-dir:")
    shown, folder = printable(target)[:200], Path(place)
    try:
        is_folder = bool(place) and folder.is_dir() and "\0" not in place
    except OSError:  # a name that is too long, or a folder that may not be entered
        is_folder = False
    if is_folder or target.startswith("local-dir:"):
        if not is_folder:
            raise MbibError(_no_folder(place))
        if not (folder / "config.json").is_file():
            if runs := _runs_in(folder):
                raise MbibError(f"{folder} is no run's folder; it holds {few(runs)}: give one of these")
            if (folder / "recipe.yaml").is_file():
                raise MbibError(
                    f"{folder} holds no config.json: its run is not finished; repeat its command with --resume auto"
                )
            raise MbibError(f"{folder} holds no config.json: the run is not finished, or this is not a run's folder")
        return Source(f"local-dir:{folder}", folder=folder)
    scheme, colon, repository = target.partition(":")
    if colon:
        if scheme not in ("hf-hub", "hf_hub"):
            raise unknown_name("source of models", printable(scheme), ("hf-hub", "local-dir"))
        split_repository(repository)
        return Source(target, repository=repository)
    architecture, _, tag = target.partition(".")
    if not timm.is_model(architecture):
        if "/" in target or os.path.isfile(place):
            raise MbibError(_no_folder(place))
        if place and os.path.isdir(run := Path(default_of(KEYS["output"])) / place):
            raise MbibError(f"unknown model or folder {shown!r}: did you mean {str(run)!r}?")
        raise unknown_name("model or folder", shown, timm.list_models())
    try:
        cfg = timm.get_pretrained_cfg(target, allow_unregistered=True)
    except RuntimeError:
        raise unknown_name("tag of a model", shown, timm.list_models(f"{architecture}.*", include_tags=True)) from None
    model = ZooModel(f"{architecture}.{tag or (cfg.tag if cfg else '')}")
    if not model.is_trained:
        return Source(target)
    return Source(model.name, folder=model.folder)


def _runs_in(folder: Path) -> list[str]:
    """Return the names of the finished runs in a folder."""
    try:
        return sorted(file.parent.name for file in folder.glob("*/config.json"))
    except (OSError, ValueError):  # a name that no folder can have
        return []


def _no_folder(place: str) -> str:
    """Return the text that there is no such folder, with the runs that are beside it, or that of the file."""
    parent = Path(place).parent
    if os.path.isfile(place):
        is_run = (parent / "config.json").is_file()
        instead = f"give its run's, {printable(str(parent))}" if is_run else "expected that of a run"
        return f"{printable(place)[:200]} is a file, not a folder: {instead}"
    runs = _runs_in(parent)
    beside = f"; {printable(str(parent))} has {few(runs)}" if runs else ""
    return f"there is no folder {printable(place)[:200]}{beside}"


@dataclass(frozen=True)
class LoadedModel:
    """A trained model, ready for images.

    Attributes:
        source: where it came from.
        module: the model, in evaluation mode.
        preprocessing: timm's data config: input_size (C, H, W), interpolation, crop_pct, mean, std.
        class_names: in label order; None where they are not known.
        class_counts: training images of each class, (K,), int64; None where they are not known.
        prior: the class frequencies that its logits are for: ``uniform`` after training with a balanced loss, ``train``
            after training with a plain one; None where it is not known.
    """

    source: Source
    module: nn.Module
    preprocessing: Mapping[str, Any]
    class_names: tuple[str, ...] | None
    class_counts: np.ndarray | None
    prior: str | None

    @property
    def num_classes(self) -> int:
        """Classes K."""
        return int(getattr(self.module, "num_classes", 0) or 0)


def create_with_weights(source: Source, **kwargs: Any) -> nn.Module:
    """Create a model with its weights, by whatever arguments; of other classes than these its classifiers start anew.

    Raises:
        MbibError: it cannot be loaded; one line says why.
        TypeError: an argument that the architecture does not take.
    """
    config, weights = source.config, source.weights()
    if weights is not None:
        if config.num_classes and not any(len(value) == config.num_classes for value in weights.values() if value.ndim):
            raise CheckpointError(f"{source.name}: its weights are not for {config.num_classes:,} classes")
        given = kwargs.get("pretrained_cfg_overlay", {})
        kwargs["pretrained_cfg_overlay"] = {**given, "state_dict": weights, "source": None, "file": None}
    prepare_hub()
    try:
        with limited_sockets(), patience(), _overlaid(source, kwargs) as arguments:
            model = timm.create_model(source.name, pretrained=True, **arguments)
    except TypeError:
        raise
    except MbibError as error:
        if not source.has_files:
            raise
        raise CheckpointError(f"{source.name}: {error}") from None
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError) as error:
        raise hub_error(_asked_for(source, kwargs), error) from None
    except Exception as error:  # of whatever an architecture makes of its arguments and of its weights
        # torch names what does not fit in the second line.
        reason = " ".join(str(error).split("\n")[:2]) if isinstance(error, RuntimeError) else first_line(error)
        raise CheckpointError(f"cannot load {source.name}: {' '.join(reason.split())}") from None
    getattr(model, "pretrained_cfg", {}).pop("state_dict", None)
    if weights is None:
        require_finite(model.state_dict(), source.name)
    return model


def _asked_for(source: Source, kwargs: Mapping[str, Any]) -> str:
    """Return the repository that timm asks for a model's weights, which may be its backbone's."""
    if source.has_files:
        return source.repository or source.name
    name, entry = source.name, inspect.signature(timm.model_entrypoint(source.name.partition(".")[0])).parameters
    if "backbone" in entry:  # a name without a backbone of its own
        name = kwargs.get("backbone", entry["backbone"].default)
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return (cfg.hf_hub_id if cfg is not None else None) or name


@contextmanager
def _overlaid(source: Source, kwargs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Give a model's arguments, for timm's own model whose weights a pip package brings with those."""
    if source.has_files or source.name.partition(".")[0] != BACKBONE:
        yield dict(kwargs)
        return
    given = kwargs.get("pretrained_cfg_overlay")
    cfg = dataclasses.replace(timm.get_pretrained_cfg(source.name), **(given or {}))
    with packaged_weights(cfg, given) as overlay:
        yield {**kwargs, "pretrained_cfg_overlay": overlay}


def create_trained(source: Source, **kwargs: Any) -> nn.Module:
    """Create a trained model, in evaluation mode.

    Raises:
        MbibError: it cannot be loaded, or a part of it is not trained; one line says why.
    """
    try:
        model: Any = create_with_weights(source, **kwargs).eval()
    except TypeError as error:
        raise CheckpointError(f"cannot load {source.name}: {first_line(error)}") from None
    given = int(getattr(model, "num_classes", 0))
    known = getattr(model, "pretrained_cfg", {}).get("num_classes", given)
    if given == 0:
        raise CheckpointError(f"{source.name} has no classifier: it is only a starting point for training")
    if known != given:
        raise CheckpointError(f"{source.name}: its weights are for {known} classes, and {given} are asked for")
    if untrained := getattr(model, "untrained", ()):
        raise CheckpointError(
            f"{source.name} is only a starting point for training: its weights leave {few(untrained, 3)} untrained"
        )
    source.config.require_classes(given, source.name)
    return model


def load_model(target: str) -> LoadedModel:
    """Load a trained model by any name; see `find_source`.

    Raises:
        MbibError: there is no such model, or it cannot be loaded.
    """
    source = find_source(target)
    module = create_trained(source)
    config = source.config
    names = config.class_names or _imagenet_names(module)
    preprocessing = resolve_model_data_config(module)
    return LoadedModel(source, module, preprocessing, names, config.class_counts, config.logit_prior)


def _imagenet_names(module: nn.Module) -> tuple[str, ...] | None:
    """Return the names of ImageNet's classes, for timm's own models of them."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(module)
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(i) for i in range(info.num_classes()))
