"""`mbib demo`: a page in the browser that shows what a model sees in an image, head by head (Gradio)."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mbib_timm.data.class_values import label_names
from mbib_timm.data.images import convert_image, pil_mode, why_unreadable
from mbib_timm.environment import find_device
from mbib_timm.errors import DataError, MbibError
from mbib_timm.inference.cam import GradCam, overlay
from mbib_timm.inference.predictor import Predictor
from mbib_timm.models.head_outputs import PREDICTION, head_titles, predicting_parts
from mbib_timm.models.weights import LoadedModel, load_model

LOOPBACK = "127.0.0.1"
TOP = 5
# Of an upload. A small file may unpack to many pixels; a decoded image takes three or four bytes for each.
LARGEST_UPLOAD_BYTES, LARGEST_UPLOAD_PIXELS = 20 * 2**20, 50_000_000
# How often files that were uploaded are looked at, and after how long they go; all of them go when the page closes.
CLEANING_SECONDS, KEPT_SECONDS = 60, 600


def class_labels(model: LoadedModel) -> list[str]:
    """Return what the page calls each class: its name, its number where two share a name, its training images."""
    labels = label_names(
        model.class_names or [f"class {label}" for label in range(model.num_classes)], model.num_classes
    )
    if model.class_counts is None:
        return list(labels)
    return [f"{label} (n = {count:,})" for label, count in zip(labels, model.class_counts, strict=True)]


def shown_heads(model: LoadedModel) -> dict[str, str]:
    """Return what the page shows, with its titles: the prediction, and the experts or the heads whose mean it is."""
    parts = predicting_parts(model.module)
    if len(parts) < 2:
        return {PREDICTION: "Prediction"}
    mean = f"{', '.join(parts[:-1])} and {parts[-1]}"
    titles = head_titles(model.module)
    return {PREDICTION: f"Prediction (mean of {mean})", **{part: titles[part] for part in parts}}


@dataclass(frozen=True)
class Seen:
    """What a model sees in an image.

    Attributes:
        heads: probabilities of the most probable classes by label, for each predictor.
        overlay: where the first predictor's class was seen (Grad-CAM); None where that is not shown.
    """

    heads: list[dict[str, float]]
    overlay: Image.Image | None = None


def open_upload(path: str | Path) -> Image.Image:
    """Decode an uploaded image.

    Raises:
        DataError: it cannot be read, or is too large; the message says why.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            image = Image.open(path)
        pixels = image.width * image.height
        if pixels > LARGEST_UPLOAD_PIXELS:
            raise Image.DecompressionBombError(f"{pixels} pixels")
        image.load()
        return image
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, EOFError and more
        why = why_unreadable(error, LARGEST_UPLOAD_PIXELS).rstrip(".")
        raise DataError(f"This file cannot be read: {why}.") from None


def classify(
    predictors: Sequence[Predictor], labels: Sequence[str], image: Image.Image, grad_cam: GradCam | None = None
) -> Seen:
    """Return what the predictors see in an image.

    Args:
        predictors: one per head, of the same model.
        labels: of the classes.
        image: any mode, any size; turned as its EXIF data say, as `mbib predict` turns it.
        grad_cam: of the model; None to leave the overlay out.
    """
    first = predictors[0]
    mode = pil_mode(first.model.preprocessing["input_size"][0])
    pixels = first.transform()(convert_image(image, mode))
    batch = first.normalize(pixels[None].to(first.device))
    found, best = [], []
    for predictor in predictors:
        values, indices = predictor.probabilities(batch)[0].topk(min(TOP, len(labels)))
        best.append(int(indices[0]))
        found.append({labels[i]: p for i, p in zip(indices.tolist(), values.tolist(), strict=True)})
    if grad_cam is None:
        return Seen(found)
    return Seen(found, overlay(pixels, grad_cam.heat(batch, best[:1])[0]))


def find_grad_cam(predictor: Predictor) -> GradCam | None:
    """Return Grad-CAM of the predictor's model; None where it is not installed, or the model has no map to show."""
    try:
        return GradCam(predictor.module, predictor.model.preprocessing["input_size"])
    except MbibError:
        return None


def build_page(target: str, device: str | None = None) -> Any:
    """Build the page of a model.

    Args:
        target: a trained model by any name, see `find_source`.
        device: where it runs; found when None.

    Raises:
        MbibError: no such model, or Gradio is not installed.
    """
    try:
        import gradio
    except ImportError:
        raise MbibError("the demo needs Gradio: pip install 'mbib-timm[demo]'") from None
    model = load_model(target)
    heads, labels = shown_heads(model), class_labels(model)
    predictors = [Predictor(model, head, device=torch.device(find_device(device))) for head in heads]

    grad_cam = find_grad_cam(predictors[0])
    nothing = Seen([{}] * len(predictors))

    def show(path: str | None) -> list[Any]:
        seen, reason = nothing, ""
        if path is not None:
            try:
                seen = classify(predictors, labels, open_upload(path), grad_cam)
            except DataError as error:
                reason = str(error)
        shown = [gradio.Markdown(reason, visible=bool(reason)), *seen.heads]
        return shown if grad_cam is None else [*shown, seen.overlay]

    cleaning = (CLEANING_SECONDS, KEPT_SECONDS)
    with gradio.Blocks(title=f"mbib_timm: {model.source.name}", analytics_enabled=False, delete_cache=cleaning) as page:
        counted = "" if model.class_counts is None else " n is the number of a class's training images."
        gradio.Markdown(
            f"# {model.source.name}\n\nDrop an image. The model knows {model.num_classes:,} classes, and answers "
            f"with one of them whatever it sees.{counted}"
        )
        with gradio.Row():
            image = gradio.Image(type="filepath", label="Image", height=320)
            # As the file that it is: Gradio would open it, and not say why it cannot.
            image.preprocess = lambda payload: None if payload is None else payload.path
            warm = [] if grad_cam is None else [gradio.Image(label="Where its class is seen (Grad-CAM)", height=320)]
        reason = gradio.Markdown(visible=False)
        with gradio.Row():
            outputs = [gradio.Label(label=t, num_top_classes=TOP, show_heading=False) for t in heads.values()]
        image.change(show, image, [reason, *outputs, *warm])
    return page


def demo(target: str, port: int | None = None, device: str | None = None) -> None:
    """Serve the page of `build_page` on this machine alone, until interrupted; on a free port when that is None.

    Raises:
        MbibError: as `build_page`, or the port is taken.
    """
    page = build_page(target, device)
    try:
        page.launch(
            server_name=LOOPBACK,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=LARGEST_UPLOAD_BYTES,
        )
    except OSError:
        remedy = "no port is free; give one with --port"
        raise MbibError(remedy if port is None else f"port {port} is taken; omit --port to use a free one") from None
    print(f"{target} on {page.local_url} until Ctrl-C", flush=True)
    page.block_thread()
