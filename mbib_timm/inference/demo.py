"""`mbib demo`: a page in the browser that shows what a model sees in an image, head by head (Gradio)."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from mbib_timm.data.images import convert_image, pil_mode
from mbib_timm.environment import find_device
from mbib_timm.errors import MbibError
from mbib_timm.inference.predict import Predictor
from mbib_timm.models.head_outputs import PREDICTION, head_titles, predicting_parts
from mbib_timm.models.weights import LoadedModel, load_model

LOOPBACK = "127.0.0.1"
TOP = 5


def class_labels(model: LoadedModel) -> list[str]:
    """Return what the page calls each class: its name, its number where two share a name, its training images."""
    names = model.class_names or [f"class {label}" for label in range(model.num_classes)]
    of_a_name = Counter(names)
    labels = [name if of_a_name[name] == 1 else f"{name} [{label}]" for label, name in enumerate(names)]
    if model.class_counts is None:
        return labels
    return [f"{label} (n = {count:,})" for label, count in zip(labels, model.class_counts, strict=True)]


def shown_heads(model: LoadedModel) -> dict[str, str]:
    """Return what the page shows, with its titles: the prediction, and the experts or the heads whose mean it is."""
    parts = predicting_parts(model.module)
    if len(parts) < 2:
        return {PREDICTION: "Prediction"}
    mean = f"{', '.join(parts[:-1])} and {parts[-1]}"
    titles = head_titles(model.module)
    return {PREDICTION: f"Prediction (mean of {mean})", **{part: titles[part] for part in parts}}


def classify(predictors: Sequence[Predictor], labels: Sequence[str], image: Image.Image) -> list[dict[str, float]]:
    """Return the probabilities of the most probable classes by label, for each predictor.

    Args:
        predictors: one per head, of the same model.
        labels: of the classes.
        image: any mode, any size.
    """
    first = predictors[0]
    mode = pil_mode(first.model.preprocessing["input_size"][0])
    batch = first.transform()(convert_image(image, mode))[None]
    found = []
    for predictor in predictors:
        values, indices = predictor.probabilities(batch)[0].topk(min(TOP, len(labels)))
        found.append({labels[i]: p for i, p in zip(indices.tolist(), values.tolist(), strict=True)})
    return found


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

    def show(image: Image.Image | None) -> Any:
        found = [{}] * len(predictors) if image is None else classify(predictors, labels, image)
        return found[0] if len(found) == 1 else found

    with gradio.Blocks(title=f"mbib_timm: {model.source.name}", analytics_enabled=False) as page:
        counted = "" if model.class_counts is None else " n is the number of a class's training images."
        gradio.Markdown(
            f"# {model.source.name}\n\nDrop an image. The model knows {model.num_classes:,} classes, and gives one of "
            f"them whatever it sees.{counted}"
        )
        image = gradio.Image(type="pil", label="Image", height=320)
        with gradio.Row():
            outputs = [gradio.Label(label=t, num_top_classes=TOP, show_heading=False) for t in heads.values()]
        image.change(show, image, outputs)
    return page


def demo(target: str, port: int | None = None, device: str | None = None) -> None:
    """Serve the page on this machine alone, until interrupted.

    Args:
        target: a trained model by any name.
        port: of the page; a free one when None.
        device: where the model runs; found when None.

    Raises:
        MbibError: no such model, a port that is taken, or Gradio is not installed.
    """
    page = build_page(target, device)
    try:
        page.launch(server_name=LOOPBACK, server_port=port, share=False, quiet=True, prevent_thread_lock=True)
    except OSError:
        raise MbibError(f"port {port} is taken; leave --port out to have a free one") from None
    print(f"{target} on {page.local_url} until Ctrl-C", flush=True)
    page.block_thread()
