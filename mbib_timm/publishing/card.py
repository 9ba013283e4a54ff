"""The card of a trained model, rendered from what its runs wrote: recipe.yaml and metrics.json, and nothing else."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData

from mbib_timm.data.long_tail import shot_groups
from mbib_timm.evaluation.evaluate import heads_of_expert
from mbib_timm.methods import METHODS
from mbib_timm.methods.mbib import CITATION
from mbib_timm.models.zoo import DATASETS, ZooModel
from mbib_timm.names import data_of
from mbib_timm.publishing.record import FIGURES, Record
from mbib_timm.recipe import Recipe, find_recipe, recipe_claims
from mbib_timm.training.public import public_model
from mbib_timm.training.report import chosen_text, raw_text, stages_text

COLUMNS = {"overall": "top1", "many": "many", "medium": "medium", "few": "few"}
METRICS = {
    "top1": "Top-1 accuracy, %",
    "many": "Top-1 accuracy on many-shot classes, %",
    "medium": "Top-1 accuracy on medium-shot classes, %",
    "few": "Top-1 accuracy on few-shot classes, %",
}
PAPER = "https://openreview.net/forum?id=9eiALSuZGA"
BIBTEX = f"""```bibtex
@article{{lan2025mbib,
  title   = {{Mixture of Balanced Information Bottlenecks for Long-Tailed Visual Recognition}},
  author  = {{Yifan Lan and Xin Cai and Jun Cheng and Shan Tan}},
  journal = {{Transactions on Machine Learning Research}},
  year    = {{2025}},
  url     = {{{PAPER}}}
}}
```"""


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
        _citation(record),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def card_metadata(record: Record) -> ModelCardData:
    """Return the card's metadata, the results in the form of the Hub's model-index."""
    prediction = record.metrics["result"]["heads"]["prediction"]
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Long-tailed image classification",
            dataset_type=_data_name(record),
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
    data = _data_name(record)
    return DATASETS[data].title if data in DATASETS else f"`{data}`"


def _data_name(record: Record) -> str:
    return data_of(record.name) or record.recipe.dataset


def _what(record: Record, inference_only: bool) -> str:
    metrics, first = record.metrics, record.recipe.chain()[0]
    start = f", started from the weights of `{public_model(first.model)}`," if first.pretrained else ""
    epochs = _epochs(record)
    data = dataset_title(record)
    how = f"trained on {data} for {epochs} with" if epochs else f"changed on {data} by"
    text = f"`{record.name.partition('.')[0]}`{start} {how} {stages_text(metrics)}, by `mbib_timm`."
    papers = _papers(record)
    if papers:
        listing = "; ".join(f"[{paper}]({PAPER})" if paper == CITATION else paper for paper in papers)
        text += f" The method is that of {listing}; the implementation is independent of the authors'."
    if len(_heads(record)) > 1:
        text += f" Each of the heads {_listed(_heads(record))} has a classifier. {_prediction(record)}"
    if inference_only:
        text += " These weights lack the classifiers that serve training only."
    return text


def _epochs(record: Record) -> str:
    """Return the epochs of the stages that have any: ``200 epochs``, ``200 + 30 epochs``; empty where none has."""
    epochs = [str(stage.epochs) for stage in record.recipe.chain() if stage.epochs]
    return f"{' + '.join(epochs)} epochs" if epochs else ""


def _papers(record: Record) -> list[str]:
    """Return the papers of the methods, each once."""
    return list(dict.fromkeys(filter(None, (METHODS[stage].citation for stage in record.metrics["stages"]))))


def _heads(record: Record) -> list[str]:
    # An expert of several heads has its row in the results, and no classifier but theirs.
    names = [head for head in record.metrics["result"]["heads"] if head != "prediction"]
    return [name for name in names if not heads_of_expert(name, names)]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _prediction(record: Record) -> str:
    heads = record.metrics["prediction_heads"]
    return f"The prediction is the mean of the logits of {_listed(heads)}." if len(heads) > 1 else ""


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
    when = f"the last epoch ({_epochs(record)})" if result["epoch"] >= 0 else stages_text(record.metrics)
    lines = [
        "## Results",
        "",
        f"Top-1 accuracy in percent on {images:,} images of the split `{result['split']}`, after {when}, "
        f"of these weights (seed {record.metrics['seed']}). Shot groups are by training images per class: many more "
        "than 100, medium 20 to 100, few fewer than 20.",
        "",
        *_table(result["heads"], lambda head, metric: _percent(result["heads"][head][metric])),
    ]
    if chosen := chosen_text(record.metrics):
        lines += ["", f"{chosen}."]
    if raw := raw_text(record.metrics):
        lines += ["", f"{raw}."]
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
    if best is not None:
        lines += [
            "",
            f"The best of the evaluated epochs on `{best['selected_on']}` was epoch {best['epoch'] + 1} with "
            f"{best['heads']['prediction']['top1']:.2f} %; the accuracy reported here is the last epoch's.",
        ]
    if record.in_zoo:
        claims = recipe_claims(find_recipe(ZooModel(record.name).recipe))
        if "Paper" in claims:
            lines += ["", f"The paper reports {claims['Paper']}."]
    return "\n".join(lines)


def _table(heads: Mapping[str, Any], cell: Any) -> list[str]:
    order = ["prediction", *(head for head in heads if head != "prediction")]
    rows = [f"| {head} | {' | '.join(cell(head, metric) for metric in COLUMNS.values())} |" for head in order]
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
            "| classes | number | training images | per class |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def _training(record: Record) -> str:
    environment, recipe = record.metrics["environment"], record.recipe
    seconds = record.metrics["training_seconds"]
    cost = f"{seconds:.0f} seconds"
    if seconds >= 60:
        cost = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
    machine = f"{environment['hardware']} ({environment['device']}, processes: {environment['processes']})"
    versions = ", ".join(f"{name} {environment[name]}" for name in ("mbib_timm", "torch", "timm"))
    stages = [_stage(stage) for stage in recipe.chain()]
    how = f"{stages[0]}."
    if len(stages) > 1:
        how = "\n".join(f"{number}. {stage}" for number, stage in enumerate(stages, start=1)) + "\n"
    which = "The last stage" if len(stages) > 1 else "It"
    return (
        f"## Training\n\n{how}\nEvery setting is in `recipe.yaml`. {which} took {cost} on {machine}, evaluation "
        f"included, with {versions}, at commit {environment['commit'] or 'unknown'}:\n\n"
        f"```sh\n{environment['command']}\n```"
    )


def _stage(stage: Recipe) -> str:
    """Return how a stage was trained, in a line."""
    title = METHODS[stage.method["name"]].title or stage.method["name"]
    if not stage.epochs:
        return f"{title}, without training"
    plural = "s" if stage.epochs > 1 else ""
    return (
        f"{title}: {stage.epochs} epoch{plural} of batches of {stage.batch_size} with {stage.opt}, learning rate "
        f"{stage.lr:g}, weight decay {stage.weight_decay:g}, schedule `{stage.sched}`{_strength(stage)}"
    )


def _strength(stage: Recipe) -> str:
    """Return what makes a stage's training stronger than a plain one: its policy, holes, mixing and average."""
    strong = {
        key: getattr(stage, key)
        for key in ("aa", "cutout", "mixup", "cutmix", "cutmix_sampler", "smoothing", "model_ema_decay")
        if key != "model_ema_decay" or stage.model_ema
    }
    named = [f"{key} {value}" for key, value in strong.items() if value]
    return f", {', '.join(named)}" if named else ""


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
    return f"## Licence\n\nThe weights are under Apache-2.0. {DATASETS[_data_name(record)].licence}"


def _citation(record: Record) -> str:
    cited = [BIBTEX if paper == CITATION else f"{paper}." for paper in _papers(record)]
    if not cited:
        return ""
    return "\n\n".join(["## Citation", *cited])
