"""The card of a trained model, rendered from what its runs wrote, and nothing else."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
import numpy as np
import timm
from huggingface_hub import EvalResult, ModelCardData
from markupsafe import Markup

from mbib_timm.data.long_tail import named, shot_groups
from mbib_timm.errors import few
from mbib_timm.files import printable
from mbib_timm.methods import METHODS
from mbib_timm.methods.mbib import CITATION
from mbib_timm.models import pip_weights
from mbib_timm.models.head_outputs import heads_of_expert
from mbib_timm.models.origin import data_text
from mbib_timm.models.pretraining import UNKNOWN
from mbib_timm.models.zoo import HEADS, split_tag
from mbib_timm.recipe import Recipe, data_of
from mbib_timm.results.columns import DEFINITIONS, INTERVALS, MODEL_COLUMNS
from mbib_timm.results.redact import last_part, redact_value
from mbib_timm.results.run_text import (
    before_finish_text,
    broken_lines,
    chosen_text,
    extended_text,
    left_out_text,
    other_best,
    raw_text,
    stages_text,
    time_text,
)
from mbib_timm.results.runs import FinishedRun
from mbib_timm.results.tables import (
    NOTHING,
    Table,
    code_span,
    markdown_text,
    mean_and_deviation,
    percent,
    table_by_head,
)

FIGURES = {
    "class_accuracy.png": "Accuracy of each class, in the order of its training images.",
    "shot_groups.png": "Accuracy by head and shot group.",
    "training_curves.png": "Training loss, learning rate, and accuracy after each evaluated epoch.",
}
# Images of one's own, by the key `dataset`, and what they are called where that is not stated.
OWN_IMAGES, CUSTOM = ("folder", "table", "list", "wds"), "custom images"
# Rows of the table of classes; of more the largest and the smallest are listed.
LISTED_CLASSES = 200
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


@dataclass(frozen=True)
class Stated:
    """What whoever publishes a model says of it, and no run can know.

    Attributes:
        dataset_name: what people call the training data; when None what the run calls them, if it does.
        license: of the weights, as the Hub spells it; None for the zoo's own, and for none elsewhere.
    """

    dataset_name: str | None = None
    license: str | None = None


NOTHING_STATED = Stated()


def render_card(
    run: FinishedRun,
    repository: str,
    runs: Sequence[FinishedRun] = (),
    figures: str = "figures",
    inference_only: bool = False,
    stated: Stated = NOTHING_STATED,
) -> str:
    """Return the card as Markdown, with its metadata as YAML at the top. What runs say is escaped.

    Args:
        run: whose weights these are.
        repository: on the Hub, ``organisation/name``.
        runs: as they were trained, this one among them, where there are several that differ in the seed alone.
        figures: folder of the figures, relative to the card.
        inference_only: the weights lack the heads that serve training only.
        stated: name of the data, and licence of the weights.
    """
    record, recipe = run.record, run.recipe
    heads, counts = record.result.heads, np.array(record.class_counts)
    runs = sorted(runs or (run,), key=lambda each: each.record.seed)
    epochs = _epochs(recipe)

    def spread(head: str, column: str) -> str:
        return mean_and_deviation([each.heads[head].numbers()[column] for each in runs], digits=2)

    citations = [Markup(BIBTEX if paper == CITATION else f"{markdown_text(paper)}.") for paper in _papers(run)]
    return _template().render(
        metadata=Markup(card_metadata(run, stated).to_yaml()),
        name=run.name,
        what=_what(run, inference_only, stated),
        repository=repository,
        run=run,
        record=record,
        result=record.result,
        when=stages_text(record.stages) if record.result.epoch is None else f"the last epoch ({epochs})",
        results=table_by_head(heads, lambda head, column: percent(heads[head].numbers()[column], 2)),
        chosen=chosen_text(record),
        raw=raw_text(record),
        seeds=[each.record.seed for each in runs],
        spread=table_by_head(runs[0].heads, spread, f"95 % interval, seed {runs[0].record.seed}"),
        definitions=f"{DEFINITIONS} {INTERVALS}",
        best=other_best(record),
        before_finish=before_finish_text(record),
        paper=_paper_text(run) if run.zoo_model is not None else "",
        differing="" if run.zoo_model is not None else few([code_span(key) for key in run.differing]),
        figures=[(f"{figures}/{name}", FIGURES[name]) for name in figures_of(run)],
        dataset=_dataset(run, stated),
        counts=counts,
        groups=_groups(counts),
        overlap=run.overlap,
        classes=_classes(run),
        left_out=max(0, len(counts) - LISTED_CLASSES),
        start=_start(run),
        stages=[_stage(stage) for stage in recipe.chain()],
        duration=time_text([record]),
        left_out_files=left_out_text(record),
        broken="; ".join(broken_lines(record)),
        extended=extended_text(record),
        last_stage_only=len(record.stages) > 1 and not record.inputs,
        environment=record.environment,
        train=run.command_today,
        lacks_data=run.command_lacks_data,
        few=len(shot_groups(counts)["few"]),
        licence=licence_of(run, stated),
        data_licence=run.dataset.licence if run.dataset is not None else "",
        start_licence=_start_licence(run),
        citations=citations,
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mbib_timm.publishing", "."),
        undefined=jinja2.StrictUndefined,
        # Jinja escapes for HTML alone, which would show in Markdown's code. Names go through the filters below.
        finalize=lambda value: value if isinstance(value, Markup) else Markup(str(value).replace("<", "&lt;")),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "fenced": _fenced,
        "text": lambda value: Markup(markdown_text(value)),
        "code": lambda value: Markup(code_span(value)),
    }
    return environment.get_template("card.md.j2")


def _fenced(text: str, language: str) -> Markup:
    """Return a block of code behind a fence that is longer than any in it."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return Markup(f"{fence}{language}\n{text}\n{fence}")


def figures_of(run: FinishedRun) -> list[str]:
    """Return the figures of a card that the run's folder holds."""
    return [name for name in FIGURES if (run.folder / "figures" / name).is_file()]


def licence_of(run: FinishedRun, stated: Stated) -> str | None:
    """Return the licence that card and config.json give to the weights; None where none is stated."""
    return stated.license or ("apache-2.0" if run.zoo_model is not None else None)


def card_metadata(run: FinishedRun, stated: Stated = NOTHING_STATED) -> ModelCardData:
    """Return the card's metadata, the results in the form of the Hub's model-index."""
    result = run.record.result
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Long-tailed image classification",
            dataset_type=_data_name(run),
            dataset_name=dataset_title(run, stated),
            dataset_split=result.split,
            metric_type=MODEL_COLUMNS[column].kind,
            metric_name=MODEL_COLUMNS[column].title,
            metric_value=round(value, 2),
        )
        for column, value in result.prediction.numbers().items()
        if value is not None
    ]
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license=licence_of(run, stated),
        base_model=run.origin.base_model,
        tags=["image-classification", "timm", "mbib-timm", "long-tailed-recognition", "class-imbalance"],
        metrics=["accuracy"],
        model_name=run.name,
        eval_results=results,
    )


def dataset_title(run: FinishedRun, stated: Stated = NOTHING_STATED) -> str:
    """Return what people call the data set of a run; images of one's own are called as stated, or as the recipe is."""
    title = run.dataset.title if run.dataset is not None else CUSTOM if _is_custom(run) else _data_name(run)
    return printable(stated.dataset_name or title)


def _dataset(run: FinishedRun, stated: Stated) -> Markup:
    """Return the data set's title as Markdown; a name that is only the recipe's as code."""
    title = dataset_title(run, stated)
    is_title = stated.dataset_name is not None or run.dataset is not None or _is_custom(run)
    return Markup(markdown_text(title) if is_title else code_span(title))


def _data_name(run: FinishedRun) -> str:
    """Return what the data are called where that is not stated: what the run's name calls them, if it can be relied on.

    A file of any other name than a model's says nothing of data.
    """
    if run.dataset is not None:
        return split_tag(run.name.partition(".")[2])[1]
    return _named_data(run) or str(redact_value(run.recipe.dataset))


def _named_data(run: FinishedRun) -> str:
    """Return what a run's name says of its data; empty where it says nothing."""
    if split_tag(run.name.partition(".")[2])[1] or not _has_models_name(run):
        return ""
    # Packaged recipes for images of one's own, such as finetune/mbib_resnet32, are named after how they train.
    packaged = run.packaged
    named = packaged is None or (run.has_packaged_data and packaged.dataset not in OWN_IMAGES)
    return data_of(run.name) if named else ""


def _is_custom(run: FinishedRun) -> bool:
    """Return whether a run was trained on images of somebody's own, and nothing says what they are called."""
    return run.dataset is None and run.recipe.dataset in OWN_IMAGES and not _named_data(run)


def _has_models_name(run: FinishedRun) -> bool:
    """Return whether a run's name begins with its model's; of one that lies elsewhere, with any model's."""
    start, model = run.name.partition(".")[0], run.record.model
    return timm.is_model(start) if ":" in model else start == model.partition(".")[0]


def _what(run: FinishedRun, inference_only: bool, stated: Stated) -> Markup:
    names = [code_span(each.name) for each in run.origin.weights[-1:]]
    start = f", started from the weights of {names[0]}," if names else ""
    epochs = _epochs(run.recipe)
    data = _dataset(run, stated)
    from_scratch = " from scratch" if run.origin.is_scratch else ""
    # A name such as "CIFAR-100-LT, imbalance factor 100" ends with a comma of its own.
    data += "," * (", " in data)
    how = f"trained{from_scratch} on {data} for {epochs} with" if epochs else f"changed on {data} by"
    methods = markdown_text(stages_text(run.record.stages))
    model = run.name.partition(".")[0] if _has_models_name(run) else run.record.model
    text = f"{code_span(model)}{start} {how} {methods}, by `mbib_timm`."
    papers = _papers(run)
    if papers:
        listing = "; ".join(f"[{paper}]({PAPER})" if paper == CITATION else markdown_text(paper) for paper in papers)
        text += f" The method is from {listing}; the authors were not involved in this implementation."
    if len(_heads(run)) > 1:
        text += f" Each of the heads {_listed(_heads(run))} has a classifier. {_prediction(run)}"
    if inference_only:
        text += " These weights lack the classifiers that only training uses."
    return Markup(text)


def _start(run: FinishedRun) -> list[Markup]:
    """Return a line for each of the weights and teachers that the model has learnt from; none from scratch."""
    lines = []
    for step, each in enumerate((*run.origin.weights, *run.origin.teachers)):
        role = "Weights" if step < len(run.origin.weights) else "Teacher"
        place = markdown_text(_PLACES.get(each.source, each.source))
        if each.repository is not None:
            place += f", on the Hub {code_span(each.repository)}"
        data = data_text(each.data) if each.data else "the same data as this model"
        lines.append(Markup(f"{role} {code_span(each.name)} ({place}), trained on {markdown_text(data)}"))
    return lines


def _start_licence(run: FinishedRun) -> Markup:
    """Return under which terms the weights are that a model started from, where a pip package brings them."""
    if all(each.source != "package" for each in run.origin.weights):
        return Markup("")
    text = f"It started from weights of the pip package {code_span(pip_weights.PACKAGE)}, under {pip_weights.LICENCE}."
    packaged = run.zoo_model.weights if run.zoo_model is not None else None
    if packaged is not None and packaged.name == HEADS:
        text += " Its backbone has kept them, and the package `mbib_timm` holds the heads alone."
    return Markup(text)


# Where weights are from, by `Weights.source`.
_PLACES = {
    "timm": "from timm, whose tag names the data",
    "package": "from a pip package",
    "run": "from a run of mbib_timm",
    "hub": "from another repository",
    "file": "from a file",
    UNKNOWN: "not recorded",
}


def _epochs(recipe: Recipe) -> str:
    """Return the epochs of the stages that have any: ``200 epochs``, ``200 + 30 epochs``; empty where none has."""
    epochs = [str(stage.epochs) for stage in recipe.chain() if stage.epochs]
    return f"{' + '.join(epochs)} epoch{'s' * (epochs != ['1'])}" if epochs else ""


def _papers(run: FinishedRun) -> list[str]:
    """Return the papers of the methods, each once."""
    return list(dict.fromkeys(filter(None, (METHODS[stage].citation for stage in run.record.stages))))


def _heads(run: FinishedRun) -> list[str]:
    # An expert of several heads has its row in the results, and no classifier but theirs.
    names = [head for head in run.heads if head != "prediction"]
    return [name for name in names if not heads_of_expert(name, names)]


def _listed(names: Sequence[str]) -> str:
    names = [markdown_text(name) for name in names]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _prediction(run: FinishedRun) -> str:
    heads = run.record.prediction_heads
    return f"The prediction is the mean of the logits of {_listed(heads)}." if len(heads) > 1 else ""


def _groups(counts: np.ndarray) -> Table:
    rows = [
        [
            group,
            str(len(classes)),
            f"{counts[classes].sum():,}",
            f"{counts[classes].min()} to {counts[classes].max()}" if len(classes) else NOTHING,
        ]
        for group, classes in shot_groups(counts).items()
    ]
    return Table(["classes", "number", "training images", "per class"], rows)


def _classes(run: FinishedRun) -> Table:
    """Return the classes with their names, from most to fewest training images, and what the prediction achieves."""
    counts, prediction = run.record.class_counts, run.record.result.prediction
    names = named(run.record.class_names, len(counts))
    order = sorted(range(len(counts)), key=lambda label: -counts[label])
    if len(order) > LISTED_CLASSES:
        order = order[: LISTED_CLASSES // 2] + order[-LISTED_CLASSES // 2 :]
    columns = {
        "class": [markdown_text(names[i]) for i in order],
        "training images": [f"{counts[i]:,}" for i in order],
        "evaluated images": [f"{prediction.class_images[i]:,}" for i in order] if prediction.class_images else [],
        "top-1, %": [percent(prediction.per_class[i]) for i in order],
    }
    known = {name: cells for name, cells in columns.items() if cells}  # older records do not have all
    return Table([*known], [*zip(*known.values(), strict=True)])


def _paper_text(run: FinishedRun) -> str:
    """Return what the paper reports of such a run: ``47.5 % (Table 1), 47.0 % (Table 9; many 64.1, ...)``."""
    said = []
    for result in run.paper:
        groups = ", ".join(f"{name} {value:.1f}" for name, value in result.accuracies.items() if name != "overall")
        overall = result.accuracies.get("overall")
        number, rest = (groups, "") if overall is None else (f"{overall:.1f} %", groups)
        said.append(f"{number} ({'; '.join(filter(None, [result.source, rest, result.setting]))})")
    return ", ".join(said)


def _stage(stage: Recipe) -> Markup:
    """Return how a stage was trained, in a line."""
    title = markdown_text(METHODS[stage.method["name"]].title or stage.method["name"])
    if not stage.epochs:
        return Markup(f"{title}, without training")
    plural, opt, sched = "s" if stage.epochs > 1 else "", redact_value(stage.opt), redact_value(stage.sched)
    return Markup(
        f"{title}: {stage.epochs} epoch{plural} of batches of {stage.batch_size} with {markdown_text(opt)}, "
        f"learning rate {stage.lr:g}, weight decay {stage.weight_decay:g}, schedule {code_span(sched)}"
        f"{markdown_text(_strength(stage))}"
    )


def _strength(stage: Recipe) -> str:
    """Return what makes a stage's training stronger than a plain one: its policy, holes, mixing, average, weights."""
    strong = {
        key: getattr(stage, key)
        for key in ("aa", "cutout", "mixup", "cutmix", "cutmix_sampler", "smoothing", "model_ema_decay")
        if key != "model_ema_decay" or stage.model_ema
    }
    if stage.class_weights != "none":
        strong["class_weights"] = last_part(stage.class_weights)
    named = [f"{key} {redact_value(value)}" for key, value in strong.items() if value]
    return f", {', '.join(named)}" if named else ""
