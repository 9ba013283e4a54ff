"""Trained weights: a model by any name, and strict loading, in which a key that does not fit is named.

timm loads leniently whenever the number of classes differs: a renamed layer would stay random without a word.
`filter_state_dict` runs before timm's loading and refuses such checkpoints.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from mbib_timm.errors import CheckpointError, MbibError, few, first_line, unknown_name
from mbib_timm.models.backbones import PREFIX, classifier_names, skeleton
from mbib_timm.models.zoo import ZooModel

TRAINING_HEADS = "training_heads."


def filter_state_dict(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a checkpoint under the model's own keys; timm calls this as ``pretrained_filter_fn``.

    Accepts a checkpoint of the same model, or, where the model holds a backbone, one of the plain backbone. What the
    checkpoint cannot give keeps its fresh initialisation: the classifiers, where it is of another number of classes;
    heads that serve training only, where it was published without them; all but the backbone, where it is of that.

    Raises:
        CheckpointError: missing or unexpected keys, by name.
    """
    own: dict[str, Tensor] = model.state_dict()
    if hasattr(model, "backbone_name") and not any(key.startswith(PREFIX) for key in state_dict):
        heads = {key: value for key, value in own.items() if not key.startswith(PREFIX)}
        return {**heads, **prefix_backbone(state_dict, model)}
    fresh: tuple[str, ...] = ()
    if not any(key.startswith(TRAINING_HEADS) for key in state_dict):
        fresh += (TRAINING_HEADS,)
    cfg: Any = getattr(model, "pretrained_cfg", {})
    if model.num_classes != cfg.get("num_classes"):
        fresh += tuple(f"{name}." for name in classifier_names(model))
    kept = {key: value for key, value in state_dict.items() if not key.startswith(fresh)}
    kept |= {key: value for key, value in own.items() if key.startswith(fresh)}
    _require_same_keys(kept, own, "checkpoint")
    return kept


def prefix_backbone(state_dict: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return a plain backbone's checkpoint under the keys of a model that holds the backbone, such as an MBIB model.

    Every key of the plain backbone but its classifier's must be there and no other. What the model has no use for,
    such as the layers behind its last tap, is left out.

    Raises:
        CheckpointError: missing or unexpected keys, by name.
    """
    plain = skeleton(model.backbone_name, model.backbone_args)
    cfg: Any = plain.pretrained_cfg
    classifiers = cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    expected = [key for key in plain.state_dict() if not key.startswith(prefixes)]
    given = [key for key in state_dict if not key.startswith(prefixes)]
    _require_same_keys(given, expected, f"checkpoint of backbone {model.backbone_name!r}")
    sources = {key: model.plain_key(key) for key in model.backbone.state_dict()}
    return {PREFIX + key: state_dict[source] for key, source in sources.items() if source in state_dict}


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
class ModelConfig:
    """What ``config.json`` says of a model; None for what it does not say.

    Attributes:
        architecture: the name that builds it.
        tag: of its weights.
        model_args: keyword arguments of the architecture.
        class_names: in label order.
        class_counts: training images of each class, (K,), int64.
        logit_prior: the class frequencies that its logits are for, see `LoadedModel`.
    """

    architecture: str | None
    tag: str | None
    model_args: Mapping[str, Any]
    class_names: tuple[str, ...] | None
    class_counts: np.ndarray | None
    logit_prior: str | None


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
        repository, _, revision = self.repository.partition("@")
        try:
            return Path(hf_hub_download(repository, name, revision=revision or None))
        except (LocalEntryNotFoundError, RepositoryNotFoundError) as error:
            raise hub_error(self.repository, error) from None
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, OSError) as error:
            raise hub_error(self.repository, error) from None

    def config(self) -> ModelConfig:
        """Return what its ``config.json`` says; nothing where there is none."""
        file = self.file("config.json")
        content = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
        names, counts = content.get("label_names"), content.get("class_counts")
        return ModelConfig(
            architecture=content.get("architecture"),
            tag=content.get("pretrained_cfg", {}).get("tag"),
            model_args=content.get("model_args", {}),
            class_names=tuple(map(str, names)) if names else None,
            class_counts=np.asarray(counts, dtype=np.int64) if counts else None,
            logit_prior=content.get("logit_prior"),
        )


def hub_error(repository: str, error: Exception) -> MbibError:
    """Return what to tell a user of an error of the Hub's client: one line, without the request's address."""
    if isinstance(error, RepositoryNotFoundError):
        return MbibError(
            f"hf-hub:{repository}: there is no such repository, or it is private and needs a token (hf auth login)"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return MbibError(f"hf-hub:{repository}: the Hub cannot be reached, and there is no copy in the cache")
    return MbibError(f"hf-hub:{repository}: {first_line(error)}")


def find_source(target: str) -> Source:
    """Find a trained model.

    Args:
        target: a run's folder, ``local-dir:FOLDER``, ``hf-hub:REPO[@REVISION]``, or a timm model name with or without
            tag.

    Raises:
        MbibError: neither a folder nor a model.
    """
    folder = Path(target.removeprefix("local-dir:"))
    if folder.is_dir() or target.startswith("local-dir:"):
        if not folder.is_dir():
            raise MbibError(f"there is no folder {folder}")
        if not (folder / "config.json").is_file():
            raise MbibError(f"{folder} holds no config.json: the run is not finished, or this is not a run's folder")
        return Source(f"local-dir:{folder}", folder=folder)
    scheme, colon, repository = target.partition(":")
    if colon:
        if scheme not in ("hf-hub", "hf_hub"):
            raise unknown_name("source of models", scheme, ("hf-hub", "local-dir"))
        return Source(target, repository=repository)
    architecture, _, tag = target.partition(".")
    if not timm.is_model(architecture):
        raise unknown_name("model or folder", target, timm.list_models())
    try:
        cfg = timm.get_pretrained_cfg(target, allow_unregistered=True)
    except RuntimeError:
        raise unknown_name("tag of a model", target, timm.list_models(f"{architecture}.*", include_tags=True)) from None
    model = ZooModel(f"{architecture}.{tag or (cfg.tag if cfg else '')}")
    if not model.is_trained:
        return Source(target)
    return Source(model.name, folder=model.folder)


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


def create_trained(source: Source, **kwargs: Any) -> nn.Module:
    """Create a trained model, in evaluation mode.

    Raises:
        MbibError: it cannot be loaded; one line says why.
    """
    try:
        return timm.create_model(source.name, pretrained=True, **kwargs).eval()
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError) as error:
        raise hub_error(source.repository or source.name, error) from None
    except (RuntimeError, OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"cannot load {source.name}: {first_line(error)}") from None


def load_model(target: str) -> LoadedModel:
    """Load a trained model by any name; see `find_source`.

    Raises:
        MbibError: there is no such model, or it cannot be loaded.
    """
    source = find_source(target)
    module = create_trained(source)
    config = source.config()
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
