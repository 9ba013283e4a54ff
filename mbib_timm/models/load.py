"""A trained model by any name, with what is known of it: preprocessing, class names, training counts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from torch import nn

from mbib_timm.errors import CheckpointError, MbibError, unknown_name
from mbib_timm.models.zoo import ZooModel


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

    def config(self) -> dict[str, Any]:
        """Return the content of ``config.json``; empty where there is none."""
        file = self.file("config.json")
        content: dict[str, Any] = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
        return content


def hub_error(repository: str, error: Exception) -> MbibError:
    """Return what to tell a user of an error of the Hub's client: one line, without the request's address."""
    if isinstance(error, RepositoryNotFoundError):
        return MbibError(
            f"hf-hub:{repository}: there is no such repository, or it is private and needs a token (hf auth login)"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return MbibError(f"hf-hub:{repository}: the Hub cannot be reached, and there is no copy in the cache")
    return MbibError(f"hf-hub:{repository}: {str(error).strip().splitlines()[0]}")


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
        if not (folder / "config.json").is_file():
            raise MbibError(f"{folder} holds no config.json: the run is not finished, or this is no run's folder")
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
        raise CheckpointError(f"cannot load {source.name}: {str(error).splitlines()[0]}") from None


def load_model(target: str) -> LoadedModel:
    """Load a trained model by any name; see `find_source`.

    Raises:
        MbibError: there is no such model, or it cannot be loaded.
    """
    source = find_source(target)
    module = create_trained(source)
    config = source.config()
    names, counts = config.get("label_names"), config.get("class_counts")
    return LoadedModel(
        source,
        module,
        resolve_model_data_config(module),
        tuple(map(str, names)) if names else _imagenet_names(module),
        np.asarray(counts, dtype=np.int64) if counts else None,
        config.get("logit_prior"),
    )


def _imagenet_names(module: nn.Module) -> tuple[str, ...] | None:
    """Return the names of ImageNet's classes, for timm's own models of them."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(module)
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(i) for i in range(info.num_classes()))
