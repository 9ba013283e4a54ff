"""`mbib export`: a trained model as ONNX, `torch.export` program or TorchScript, checked against the original."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mbib_timm.errors import MbibError, unknown_name
from mbib_timm.files import to_json, write_bytes
from mbib_timm.models.weights import LoadedModel, load_model

Forward = Callable[[Tensor], Tensor]

# Largest difference that is accepted, relative to the largest logit. Formats reorder sums, in float32.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Description:
    """What a program needs to know beside an exported model.

    Attributes:
        model: its name.
        input: timm's data config: input_size (C, H, W), interpolation, crop_pct, mean, std.
        class_names: in label order; None where they are not known.
        class_counts: training images of each class; None where they are not known.
        logit_prior: the class frequencies that its logits are for; None where it is not known.
    """

    model: str
    input: dict[str, Any]
    class_names: list[str] | None
    class_counts: list[int] | None
    logit_prior: str | None


def export(target: str, format: str, output: Path | None = None) -> Path:
    """Export a trained model, and compare its logits with the original's on random images of three batch sizes.

    Training-only heads are left out; the batch size stays free. Beside the model goes a JSON file of its name with the
    preprocessing and the class names.

    Args:
        target: a trained model by any name, see `find_source`.
        format: one of `FORMATS`.
        output: file to write; named after the model when None.

    Returns:
        The file.

    Raises:
        MbibError: an unknown format, a package that is missing, or logits that differ.
    """
    if format not in FORMATS:
        raise unknown_name("export format", format, FORMATS)
    suffix, write, read = FORMATS[format]
    model = load_model(target)
    name = target.rstrip("/").rpartition("/")[2].rpartition(":")[2].replace("@", "-")
    file = output or Path(f"{name}{suffix}")
    module = for_inference(model.module)
    size = tuple(model.preprocessing["input_size"])
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    file.parent.mkdir(parents=True, exist_ok=True)
    write(module, images, file)
    difference = largest_difference(module, read(file), size)
    if not difference <= TOLERANCE:
        file.unlink()
        raise MbibError(f"{format}: exported logits differ from the model's by {difference:.1e} of the largest")
    described = file.with_suffix(".json")
    write_bytes(described, to_json(describe(model)))
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB, logits within {difference:.1e} of the model's; {described}")
    return file


def for_inference(module: nn.Module) -> nn.Module:
    """Return a copy of a model in evaluation mode, without the heads that serve training only."""
    bare: Any = copy.deepcopy(module).eval()
    if hasattr(bare, "remove_training_heads"):
        bare.remove_training_heads()
    return bare


def describe(model: LoadedModel) -> Description:
    """Return what a program needs to know beside the exported model."""
    return Description(
        model.source.name,
        dict(model.preprocessing),
        None if model.class_names is None else list(model.class_names),
        None if model.class_counts is None else model.class_counts.tolist(),
        model.prior,
    )


@torch.inference_mode()
def largest_difference(module: nn.Module, exported: Forward, size: tuple[int, ...]) -> float:
    """Return the largest difference of logits over batches of 1, 2 and 5 images, relative to the largest logit."""
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    for batch_size in (1, 2, 5):
        images = torch.randn(batch_size, *size, generator=generator)
        expected = module(images)
        difference = (exported(images) - expected).abs().max() / expected.abs().max()
        worst = max(worst, float(difference)) if difference == difference else float("nan")
    return worst


def _dynamic_batch(module: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _write_program(module: nn.Module, images: Tensor, file: Path) -> None:
    torch.export.save(_dynamic_batch(module, images), file)


def _read_program(file: Path) -> Forward:
    return torch.export.load(file).module()


def _write_torchscript(module: nn.Module, images: Tensor, file: Path) -> None:
    with _asked_for():
        torch.jit.save(torch.jit.trace(module, images), str(file))


def _read_torchscript(file: Path) -> Forward:
    with _asked_for():
        return torch.jit.load(str(file))


@contextmanager
def _asked_for() -> Iterator[None]:
    """Leave torch's advice unsaid, to whoever asks for TorchScript, to choose another format."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.jit.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*torch.jit.*")
        yield


def _write_onnx(module: nn.Module, images: Tensor, file: Path) -> None:
    _require("onnx", "onnxscript", "onnxruntime")
    torch.onnx.export(
        module,
        (images,),
        str(file),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def _read_onnx(file: Path) -> Forward:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _require(*packages: str) -> None:
    from importlib.util import find_spec

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MbibError(f"export to ONNX needs {', '.join(missing)}: pip install 'mbib-timm[onnx]'")


# By name: suffix, what writes the file, and what gives its logits.
FORMATS: dict[str, tuple[str, Callable[[nn.Module, Tensor, Path], None], Callable[[Path], Forward]]] = {
    "onnx": (".onnx", _write_onnx, _read_onnx),
    "torch-export": (".pt2", _write_program, _read_program),
    "torchscript": (".torchscript.pt", _write_torchscript, _read_torchscript),
}
