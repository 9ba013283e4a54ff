"""`mbib export`: a trained model as ONNX, `torch.export` program or TorchScript, checked against the original.

The file holds all that a program needs beside the weights: see `Description`. docs/export.md shows how to use it.
"""

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mbib_timm
from mbib_timm.data.images import pil_mode
from mbib_timm.errors import MbibError
from mbib_timm.files import contains, make_folder, require_own
from mbib_timm.licences import check_licence
from mbib_timm.models.weights import LoadedModel, Source, find_source, load_model
from mbib_timm.registry import Registry

Forward = Callable[[Tensor], Tensor]

# Largest difference that is accepted, relative to the largest output. Formats reorder sums, in float32.
TOLERANCE = 1e-4
LOGITS, PROBABILITIES = "logits", "probabilities"
PACKAGE = "mbib_timm"


@dataclass(frozen=True)
class Description:
    """What an exported file says of its model, under these names, each value as JSON.

    Attributes:
        model: name of the model that was exported.
        output: what the file computes, (B, K): ``logits``, or with softmax ``probabilities``.
        class_names: in label order; None where they are not known.
        class_counts: training images of each class; None where they are not known.
        logit_prior: the class frequencies that the output is for: ``uniform``, ``train``; None where it is not known.
        mode: PIL mode that images are converted to: ``RGB`` or ``L``.
        input_size: of the input, (C, H, W).
        interpolation: resampling of images, by the name that Pillow and timm have for it.
        crop_pct: share of the resized image's side that the crop keeps: it is resized to ``floor(H / crop_pct)``.
        crop_mode: ``center`` resizes the shorter side and crops the centre, ``squash`` resizes both sides, ``border``
            resizes the longer side and fills the rest with the mean.
        mean: of each channel, of values in [0, 1].
        std: of each channel.
        license: of the weights, as the Hub spells it; None where it is not stated.
        written_by: this package and its version.
    """

    model: str
    output: str
    class_names: tuple[str, ...] | None
    class_counts: tuple[int, ...] | None
    logit_prior: str | None
    mode: str
    input_size: tuple[int, int, int]
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    license: str | None
    written_by: str

    def entries(self) -> dict[str, str]:
        """Return every value as JSON, by name."""
        return {name: json.dumps(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Format:
    """A kind of file that models are exported to.

    Attributes:
        suffix: of its files.
        write: writes a model, traced or checked on images (2, C, H, W), to a file, with its description.
        read: gives what a file computes.
    """

    suffix: str
    write: Callable[[nn.Module, Tensor, Path, Description], None]
    read: Callable[[Path], Forward]


FORMATS: Registry[Format] = Registry("export format")


def export(
    target: str, format: str, output: Path | None = None, *, softmax: bool = False, license: str | None = None
) -> Path:
    """Export a trained model, and compare what it computes with the original on random images of three batch sizes.

    Training-only heads are left out; the batch size stays free. The file holds its `Description`.

    Args:
        target: a trained model by any name, see `find_source`.
        format: one of `FORMATS`.
        output: file to write; named after the model when None. One that is there is replaced if it is an export too,
            and only by one that passed the check.
        softmax: give probabilities instead of logits.
        license: of the weights, as the Hub spells it; the one that the model states when None.

    Returns:
        The file.

    Raises:
        MbibError: an unknown format or licence, a licence other than the model's, a file that cannot be written, a
            package that is missing, or an output that differs.
    """
    kind = FORMATS[format]
    license = None if license is None else check_licence(license)
    name = name_of(find_source(target)).rpartition("/")[2].rpartition(":")[2].replace("@", "-")
    file = output or Path(f"{name}{kind.suffix}")
    # Of its `Description`, which no format compresses.
    require_own("--output", file, contains(f'"{PACKAGE} '.encode()), "is not an export of this package")
    if file.suffix.lower() != (ending := Path(f"{name}{kind.suffix}").suffix):
        raise MbibError(f"--output {file}: expected a name that ends in {ending}, for --format {format}")
    model = load_model(target)
    described = describe(model, softmax, license)
    module = for_inference(model.module)
    module = nn.Sequential(module, nn.Softmax(dim=-1)).eval() if softmax else module
    size = described.input_size
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        if not torch.isfinite(module(images)).all():  # the check would compare nothing
            raise MbibError(f"{target}: its logits are not finite; a model that gives no numbers cannot be exported")
    make_folder(file.parent)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".export-") as beside:
        written = Path(beside) / file.name
        kind.write(module, images, written, described)
        difference = largest_difference(module, kind.read(written), size)
        if not difference <= TOLERANCE:
            raise MbibError(
                f"{format}: exported {described.output} differ from the model's by {difference:.1e} of the largest"
            )
        os.replace(written, file)
    print(
        f"{file}: {file.stat().st_size / 2**20:.1f} MiB, {described.output} within {difference:.1e} of the model's; "
        f"it holds {_summary(described)}"
    )
    return file


def name_of(source: Source) -> str:
    """Return the name of a trained model: that of its folder, however it was written, where it has one."""
    return source.name if source.folder is None else Path(os.path.abspath(source.folder)).name


def for_inference(module: nn.Module) -> nn.Module:
    """Return a copy of a model in evaluation mode, without the heads that serve training only."""
    bare: Any = copy.deepcopy(module).eval()
    if hasattr(bare, "remove_training_heads"):
        bare.remove_training_heads()
    return bare


def describe(model: LoadedModel, softmax: bool, license: str | None = None) -> Description:
    """Return what a file says of a model. Raises MbibError where the model states another licence than is given."""
    given, cfg = model.preprocessing, getattr(model.module, "pretrained_cfg", {})
    stated = cfg.get("license")
    if stated and license not in (None, stated):
        raise MbibError(f"--license {license}: {name_of(model.source)} states its own, {stated}; omit the flag")
    channels, height, width = given["input_size"]
    return Description(
        model=name_of(model.source),
        output=PROBABILITIES if softmax else LOGITS,
        class_names=model.class_names,
        class_counts=None if model.class_counts is None else tuple(model.class_counts.tolist()),
        logit_prior=model.prior,
        mode=pil_mode(channels),
        input_size=(channels, height, width),
        interpolation=given["interpolation"],
        crop_pct=given["crop_pct"],
        crop_mode=given["crop_mode"],
        mean=tuple(given["mean"]),
        std=tuple(given["std"]),
        license=license or stated,
        written_by=f"{PACKAGE} {mbib_timm.__version__}",
    )


def _summary(described: Description) -> str:
    names = "no class names" if described.class_names is None else f"{len(described.class_names):,} class names"
    licence = "no licence" if described.license is None else f"licence {described.license}"
    return f"{names}, the preprocessing and {licence}"


@torch.inference_mode()
def largest_difference(module: nn.Module, exported: Forward, size: tuple[int, ...]) -> float:
    """Return the largest difference of outputs over batches of 1, 2 and 5 images, relative to the largest output."""
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    for batch_size in (1, 2, 5):
        images = torch.randn(batch_size, *size, generator=generator)
        expected = module(images)
        difference = (exported(images) - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        worst = max(worst, float(difference)) if difference == difference else float("nan")
    return worst


def _dynamic_batches() -> tuple[dict[int, Any]]:
    # Without a largest size torch 2.7 refuses networks that it cannot trace for all sizes up to 2**63 - 1.
    return ({0: torch.export.Dim("batch", max=2**31 - 1)},)


def _write_program(module: nn.Module, images: Tensor, file: Path, described: Description) -> None:
    program = torch.export.export(module, (images,), dynamic_shapes=_dynamic_batches())
    torch.export.save(program, file, extra_files=described.entries())


def _read_program(file: Path) -> Forward:
    return torch.export.load(file).module()


def _write_torchscript(module: nn.Module, images: Tensor, file: Path, described: Description) -> None:
    with _asked_for():
        torch.jit.save(torch.jit.trace(module, images), str(file), _extra_files=described.entries())


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


def _write_onnx(module: nn.Module, images: Tensor, file: Path, described: Description) -> None:
    if missing := [package for package in ("onnx", "onnxscript", "onnxruntime") if find_spec(package) is None]:
        raise MbibError(f"export to ONNX needs {', '.join(missing)}: pip install 'mbib-timm[onnx]'")
    program = torch.onnx.export(
        module,
        (images,),
        input_names=["images"],
        output_names=[described.output],
        dynamic_shapes=_dynamic_batches(),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(described.entries())
    program.save(str(file), external_data=False)


def _read_onnx(file: Path) -> Forward:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


FORMATS.register("onnx")(Format(".onnx", _write_onnx, _read_onnx))
FORMATS.register("torch-export")(Format(".pt2", _write_program, _read_program))
FORMATS.register("torchscript")(Format(".torchscript.pt", _write_torchscript, _read_torchscript))
