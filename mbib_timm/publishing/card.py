"""The card of a trained model, rendered from what its runs wrote: recipe.yaml and metrics.json, and nothing else."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData

from mbib_timm.data.class_counts import shot_groups
from mbib_timm.models.zoo import DATASETS, ZooModel
from mbib_timm.publishing.record import FIGURES, Record
from mbib_timm.recipe import find_recipe, recipe_claims
from mbib_timm.training.public import public_model

COLUMNS = {"overall": "top1", "many": "many", "medium": "medium", "few": "few"}
METRICS = {
    "top1": "Top-1 accuracy, %",
    "many": "Top-1 accuracy on many-shot classes, %",
    "medium": "Top-1 accuracy on medium-shot classes, %",
    "few": "Top-1 accuracy on few-shot classes, %",
}
HEADS = {
    "prediction": "prediction: mean of the logits of the last observation and of z",
    "z": "z, the bottleneck",
}
PAPER = "https://openreview.net/forum?id=9eiALSuZGA"


def render_card(record: Record, repository: str, figures: str = "figures", inference_only: bool = False) -> str:
    """Return the card as Markdown, with its metadata as YAML at the top.

    Args:
        record: what the card is about.
        repository: on the Hub, ``organisation/name``.
        figures: folder of the figures, relative to the card.
        inference_only: the weights lack the heads that serve training only.
    """
    metadata = card_metadata(record).to_yaml()
    sections = [
        f"---\n{metadata}\n---",
        f"# {record.name}",
        _what(record, inference_only),
        _how_to_load(record, repository),
        _results(record),
        _figures(record, figures),
        _data(record),
        _training(record),
        _use(record),
        _licence(record),
        _citation(),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def card_metadata(record: Record) -> ModelCardData:
    """Return the card's metadata, the results in the form of the Hub's model-index."""
    prediction = record.metrics["result"]["heads"]["prediction"]
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Long-tailed image classification",
            dataset_type=_tag(record),
            dataset_name=dataset_title(record).strip("`"),
            dataset_split=record.metrics["result"]["split"],
            metric_type="accuracy",
            metric_name=name,
            metric_value=round(float(prediction[metric]), 2),
        )
        for metric, name in METRICS.items()
        if prediction[metric] is not None
    ]
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license="apache-2.0" if record.in_zoo else None,
        tags=["image-classification", "timm", "mbib-timm", "long-tailed-recognition", "class-imbalance"],
        metrics=["accuracy"],
        model_name=record.name,
        eval_results=results,
    )


def dataset_title(record: Record) -> str:
    """Return what people call the data set of a record; images of one's own have no name but the recipe's."""
    tag = _tag(record)
    return DATASETS[tag].title if tag in DATASETS else f"`{tag}`"


def _tag(record: Record) -> str:
    return record.name.partition(".")[2] or record.recipe.dataset


def _what(record: Record, inference_only: bool) -> str:
    observed = [head for head in record.metrics["result"]["heads"] if head not in ("prediction", "z")]
    epochs = record.metrics["epochs"]
    recipe = record.recipe
    architecture = record.name.partition(".")[0]
    start = f", started from the weights of `{public_model(recipe.model)}`," if recipe.pretrained else ""
    text = (
        f"`{architecture}`{start} trained on {dataset_title(record)} for {epochs} epochs with the loss `{recipe.loss}`"
    )
    if observed:
        text += (
            f", by `mbib_timm`: an implementation, independent of the authors', of "
            f"[Mixture of Balanced Information Bottlenecks for Long-Tailed Visual Recognition]({PAPER}) (TMLR 2025). "
            f"The network observes itself at {len(observed)} depth{'s' if len(observed) > 1 else ''} "
            f"({', '.join(observed)}) and compresses the last observation into a bottleneck z; each has a classifier. "
            "The prediction is the mean of the logits of the last observation and of z."
        )
    else:
        text += ", by `mbib_timm`, as a baseline."
    if inference_only:
        text += " These weights lack the classifiers that serve training only."
    return text


def _how_to_load(record: Record, repository: str) -> str:
    return f"""## How to load it

```python
import mbib_timm  # registers the models; without it timm says "Unknown model"
import timm

model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image).unsqueeze(0))  # of a PIL image
```

Or from the command line, after `pip install mbib-timm`:

```sh
mbib predict hf-hub:{repository} my_images/
```"""


def _results(record: Record) -> str:
    result, runs = record.metrics["result"], record.runs
    images = result["heads"]["prediction"]["images"]
    lines = [
        "## Results",
        "",
        f"Top-1 accuracy in percent on {images:,} images of the split `{result['split']}`, after the last epoch "
        f"({result['epoch'] + 1} of {record.metrics['epochs']}), of these weights (seed {record.metrics['seed']}). "
        "Shot groups are by training images of a class: many more than 100, medium 20 to 100, few fewer than 20.",
        "",
        *_table(result["heads"], lambda head, metric: _percent(result["heads"][head][metric])),
    ]
    if len(runs) > 1:
        seeds = ", ".join(str(metrics["seed"]) for metrics in runs)
        lines += [
            "",
            f"Mean ± sample standard deviation over n = {len(runs)} runs (seeds {seeds}):",
            "",
            *_table(
                result["heads"], lambda head, metric: _spread([run["result"]["heads"][head][metric] for run in runs])
            ),
        ]
    else:
        lines += ["", "One run: the spread between seeds has not been measured."]
    best = record.metrics["best"]
    lines += [
        "",
        f"The best of the evaluated epochs on `{best['selected_on']}` was epoch {best['epoch'] + 1} with "
        f"{best['heads']['prediction']['top1']:.2f} %; the last epoch is the result.",
    ]
    if record.in_zoo:
        claims = recipe_claims(find_recipe(ZooModel(record.name).recipe))
        lines += ["", f"The paper reports {claims['Paper']}."]
    return "\n".join(lines)


def _table(heads: Mapping[str, Any], cell: Any) -> list[str]:
    order = ["prediction", *(head for head in heads if head != "prediction")]
    rows = [
        f"| {HEADS.get(head, head)} | {' | '.join(cell(head, metric) for metric in COLUMNS.values())} |"
        for head in order
    ]
    return [f"| head | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}", *rows]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _spread(values: Sequence[float | None]) -> str:
    measured = [value for value in values if value is not None]
    if not measured:
        return "–"
    return f"{statistics.mean(measured):.2f} ± {statistics.stdev(measured):.2f}"


def _figures(record: Record, folder: str) -> str:
    return "\n\n".join(f"![{FIGURES[name]}]({folder}/{name})" for name in record.figures)


def _data(record: Record) -> str:
    counts = np.array(record.metrics["class_counts"])
    rows = [
        f"| {group} | {len(classes)} | {counts[classes].sum():,} | "
        + (f"{counts[classes].min()} to {counts[classes].max()} |" if len(classes) else "– |")
        for group, classes in shot_groups(counts).items()
    ]
    return "\n".join(
        [
            "## Training data",
            "",
            f"{dataset_title(record)}: {counts.sum():,} training images in {len(counts):,} classes, the largest "
            f"{counts.max() / counts.min():.0f} times as large as the smallest.",
            "",
            "| classes | number | training images | in a class |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def _training(record: Record) -> str:
    environment, recipe = record.metrics["environment"], record.recipe
    seconds = record.metrics["training_seconds"]
    cost = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
    machine = f"{environment['hardware']} ({environment['device']}, processes: {environment['processes']})"
    versions = ", ".join(f"{name} {environment[name]}" for name in ("mbib_timm", "torch", "timm"))
    return (
        f"## Training\n\n{record.metrics['epochs']} epochs of batches of {recipe.batch_size} with {recipe.opt}, "
        f"learning rate {recipe.lr:g}, weight decay {recipe.weight_decay:g}, schedule `{recipe.sched}`; every "
        f"setting is in `recipe.yaml`. It took {cost} on {machine}, evaluation included, with {versions}, at commit "
        f"{environment['commit'] or 'unknown'}:\n\n```sh\n{environment['command']}\n```"
    )


def _use(record: Record) -> str:
    few = len(shot_groups(np.array(record.metrics["class_counts"]))["few"])
    text = (
        "## Intended use and limits\n\nFor research on long-tailed recognition, for comparison, and as a start for "
        "fine-tuning. It knows the classes of its training data and no others: an image of anything else gets one of "
        "them, often with a high probability."
    )
    if few:
        text += (
            f" {few} classes were learnt from fewer than 20 images each; look at the accuracy of the few-shot group "
            "before relying on them."
        )
    return text


def _licence(record: Record) -> str:
    if not record.in_zoo:
        return "## Licence\n\nNeither the terms of these weights nor those of the training images are stated here."
    return f"## Licence\n\nThe weights are under Apache-2.0. {DATASETS[_tag(record)].licence}"


def _citation() -> str:
    return f"""## Citation

```bibtex
@article{{lan2025mbib,
  title   = {{Mixture of Balanced Information Bottlenecks for Long-Tailed Visual Recognition}},
  author  = {{Yifan Lan and Xin Cai and Jun Cheng and Shan Tan}},
  journal = {{Transactions on Machine Learning Research}},
  year    = {{2025}},
  url     = {{{PAPER}}}
}}
```"""
