"""`mbib analyze`: everything the analyses say of trained models, as JSON, as a short text and as figures."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mbib_timm.analysis.analysis_record import (
    FILE,
    FOLDER,
    Analysis,
    Analyzed,
    Subject,
    analysis_figures,
    comparison_figures,
    measure,
    other_images,
    write_analysis,
)
from mbib_timm.analysis.embedding import IMAGES_PER_CLASS, require_scikit_learn
from mbib_timm.analysis.measures import GROUPS, mean_by_shot_group
from mbib_timm.analysis.outputs import collect_outputs
from mbib_timm.drawing import Illustration, write_illustrations
from mbib_timm.environment import World, describe_environment, joined_world
from mbib_timm.errors import MbibError
from mbib_timm.evaluation.target import OpenTarget, Target, find_target, open_target
from mbib_timm.files import composed, has_fields, read_json, require_own
from mbib_timm.models.complexity import TABLE_6_SIZE
from mbib_timm.models.head_outputs import PREDICTION, prediction_heads
from mbib_timm.models.weights import Source
from mbib_timm.results.record import RECORD, RunRecord
from mbib_timm.results.redact import redact_environment, redact_value
from mbib_timm.results.tables import NOTHING, Table, cells, interval_row


def analyze(
    targets: Sequence[str],
    *,
    recipe: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    split: str | None = None,
    output: Path | None = None,
    classes: Sequence[int] | None = None,
    images_per_class: int = IMAGES_PER_CLASS,
) -> list[Analysis]:
    """Analyze trained models: write ``analysis.json``, print a summary, draw, and compare each model with the first.

    Args:
        targets: runs' folders, ``local-dir:FOLDER``, ``hf-hub:REPO``, or timm model names.
        recipe: name of the recipe that says which data, for targets that do not say it.
        overrides: recipe keys to replace.
        split: split to analyze; by default the one that the run's result is on.
        output: folder for the results; of several targets, each gets a folder of its own in it. By default
            ``analysis`` in each run's folder. Figures go into ``figures`` in the folder, and those that compare a run
            with the first into the further run's.
        classes: labels of the classes to embed; by default ten from the head to the tail.
        images_per_class: images of each to embed.

    Returns:
        What the files hold, for each target.

    Raises:
        MbibError: nothing there to analyze, no place for the results, data that do not fit the model, runs with
            different classes, several processes, or no scikit-learn.
    """
    found = [find_target(target, recipe, overrides) for target in targets]
    for target in found[1:]:
        _check_same_classes(found[0], target)
    given = _folders(targets, output)
    for folder in filter(None, given):
        require_own("--output", folder / FILE, has_fields("heads", "class_counts", "reliability"), "holds no analysis")
    folders = [folder or _own_folder(target) for folder, target in zip(given, found, strict=True)]
    analyses: list[Analysis] = []
    for name, target, folder in zip(targets, found, folders, strict=True):
        analysis = _analyze(target, split, classes, images_per_class)
        write_analysis(folder, analysis)
        _draw(folder, analysis_figures(analysis))
        which = f"{name}: " if len(targets) > 1 and name != analysis.name else ""  # of several, as it was asked for
        print(which + summary_text(analysis))
        analyses.append(analysis)
    first, *others = _told_apart(analyses, targets)
    for folder, other in zip(folders[1:], others, strict=True):
        print(comparison_text(first, other))
        _draw(folder, comparison_figures(first, other))
    return analyses


def _told_apart(analyses: Sequence[Analysis], targets: Sequence[str]) -> list[Analysis]:
    """Return analyses by whose titles one knows the run: of several alike each has its folder's name in it, where that
    is another than the run's."""
    titles, named = [analysis.title for analysis in analyses], zip(targets, _short_names(targets), strict=True)
    return [
        replace(analysis, name=f"{analysis.name}, {name}")
        if titles.count(analysis.title) > 1 and _last_part(target) != analysis.name
        else analysis
        for analysis, (target, name) in zip(analyses, named, strict=True)
    ]


def _check_same_classes(first: Target, other: Target) -> None:
    """Raise MbibError for other classes: another number of them, or other names where both have names."""
    size, own_size = len(first.class_counts()), len(other.class_counts())
    if size != own_size:
        raise MbibError(
            f"runs of different data cannot be compared: {first.name} has {size} classes, {other.name} has {own_size}"
        )
    names, own_names = (each.source.config.class_names or () for each in (first, other))
    for label, (name, own) in enumerate(zip(names, own_names, strict=False)):  # of none, nothing is compared
        if composed(name) != composed(own):
            raise MbibError(
                f"runs of different classes cannot be compared: class {label} is {name!r} in {first.name}, {own!r} in "
                f"{other.name}"
            )


def _draw(folder: Path, illustrations: Sequence[Illustration]) -> None:
    try:
        write_illustrations(folder / "figures", illustrations)
    except MbibError as error:
        print(f"no figures: {error}")


def _folders(targets: Sequence[str], output: Path | None) -> Sequence[Path | None]:
    """Return where each target's results go; of several, into folders named after them, which may be alike."""
    if output is None or len(targets) == 1:
        return [output] * len(targets)
    return [output / name for name in _short_names(targets)]


def _short_names(targets: Sequence[str]) -> list[str]:
    """Return the last parts of targets; of those that are alike each with its place."""
    names = [_last_part(target) for target in targets]
    return [name if names.count(name) == 1 else f"{name}-{place}" for place, name in enumerate(names, start=1)]


def _last_part(target: str) -> str:
    return target.removeprefix("local-dir:").rstrip("/").replace(":", "/").rpartition("/")[2]


def _own_folder(target: Target) -> Path:
    # Not the folder of a published model, which is the package's.
    source = target.source
    if source.folder is None or not source.name.startswith("local-dir:"):
        raise MbibError(f"{target.name} is not a run's folder: give a folder for the results with --output DIR")
    return source.folder / FOLDER


def _analyze(found: Target, split: str | None, classes: Sequence[int] | None, images_per_class: int) -> Analysis:
    require_scikit_learn()
    with joined_world(found.recipe.device) as world:
        world.require_alone("mbib analyze")
        opened = open_target(found, world, split)
        for note in opened.notes:
            print(note)
        model, counts = opened.model, opened.class_counts
        _check_classes(classes, len(counts))
        outputs = collect_outputs(
            model,
            opened.loader,
            counts,
            channels_last=found.recipe.channels_last,
            groups=opened.images.groups,
        )
        described = _describe(found.source, opened, len(outputs.labels), world)
        # The paper counts the costs of its ResNet-32 for images of another size than those that it classifies.
        is_papers = described.model.endswith("_resnet32") and len(counts) == 100
        size = (opened.input_size[0], *TABLE_6_SIZE) if is_papers else opened.input_size
        return measure(described, Subject(model, outputs, counts, size, classes, images_per_class))


def _check_classes(classes: Sequence[int] | None, num_classes: int) -> None:
    for label in classes or ():
        if not 0 <= label < num_classes:
            raise MbibError(f"there is no class {label} to embed: labels lie in 0..{num_classes - 1}")


def _describe(source: Source, opened: OpenTarget, images: int, world: World) -> Analyzed:
    """Return which run it is and what it is analyzed on; None for what is not known."""
    config, file, names = source.config, source.file(RECORD), opened.class_names
    record = None if file is None else read_json(RunRecord, file, "the record of a run")
    architecture = config.architecture or (record.model if record else source.name.partition(".")[0])
    published = f"{architecture}.{config.tag}" if config.tag else redact_value(source.name)
    return Analyzed(
        name=record.name if record else published,
        model=architecture,
        epochs=record.epochs if record else None,
        seed=record.seed if record else None,
        class_names=None if names is None else list(names),
        split=opened.split,
        images=images,
        class_counts=opened.class_counts.tolist(),
        prediction_heads=list(prediction_heads(opened.model)),
        environment=redact_environment(describe_environment(world)),
        trained_on=opened.trained_on or None,
    )


# Of which the text says how accuracy rises with training images: a line through fewer points says nothing.
LEAST_CLASSES = 10
# Rho by its readings: what is said of it, and the distances that it is the ratio of.
RHO = {
    "from the centre": ("centre", "inter"),
    "over pairs (eq. 15)": ("pairs", "inter"),
    "from the centre, within the group": ("centre", "inter_within"),
    "over pairs, within the group": ("pairs", "inter_within"),
}


def summary_text(analysis: Analysis) -> str:
    """Return rho and the posterior by shot group, where errors go, the trend, the calibration and the costs."""
    metrics = analysis.heads[PREDICTION]
    columns = ("macro", "many", "medium", "few")
    groups = Table(
        ["means over classes", *GROUPS],
        [
            ["accuracy, %", *cells(metrics, 2, columns)],
            *interval_row(metrics, columns),
            *(
                [f"rho of {name}, {said}", *_cells({group: d.rho(*of) for group, d in by_group.items()}, "{:.3f}")]
                for name, by_group in analysis.distances.items()
                for said, of in RHO.items()
            ),
            ["mean positive posterior", *_cells(mean_by_shot_group(analysis.posterior, analysis.counts), "{:.3f}")],
        ],
    )
    confusion = []
    for group, shares in analysis.confusion.shares.items():
        even = analysis.confusion.even[group]
        if shares is not None and even is not None:
            named = [*shares.items(), *((name, value) for name, value in even.items() if name != "correct")]
            lacking = {f"wrong_to_{name}" for name, number in metrics.classes.items() if number == 0}
            confusion.append([group, *(NOTHING if name in lacking else f"{value:.1f}" for name, value in named)])
    header = [
        "of the true group's classes, %",
        "correct",
        "wrong to many",
        "medium",
        "few",
        "(evenly: many",
        "medium",
        "few)",
    ]
    lines = [
        f"{analysis.name} on {analysis.split}: {analysis.images} images",
        *groups.lines(),
        "",
        *Table(header, confusion).lines(),
        "",
    ]
    trend = analysis.trend
    if trend.slope is not None and sum(value is not None for value in metrics.per_class) >= LEAST_CLASSES:
        explained = "" if trend.r2 is None else f" (R^2 {trend.r2:.2f})"
        lines.append(f"accuracy: {trend.slope:+.1f} points per tenfold training images{explained}")
    errors = [f"{head} {values.ece:.2f}" for head, values in analysis.reliability.items()]
    lines.append(f"calibration error, %: {', '.join(errors)}")
    size = "x".join(map(str, analysis.efficiency.input_size))
    for name, cost in (("inference", analysis.efficiency.inference), ("all heads", analysis.efficiency.all_heads)):
        lines.append(f"{name} at {size}: {cost.parameters / 1e3:.2f} k parameters, {cost.macs / 1e9:.2f} GMACs")
    return "\n".join(lines) + "\n"


def comparison_text(first: Analysis, other: Analysis) -> str:
    """Return how the mean positive posterior of a run differs from the first run's, by shot group (figure 7).

    Their classes are the same; the first run's training counts decide the shot groups.
    """
    difference = mean_by_shot_group(other.posterior - first.posterior, first.counts)
    title = f"mean positive posterior, {other.title} minus {first.title}"
    table = Table(["", *GROUPS], [["difference", *_cells(difference, "{:+.3f}")]])
    return "\n".join(filter(None, [title, *table.lines(), other_images(first, other)])) + "\n"


def _cells(values: Mapping[str, float | None], form: str) -> list[str]:
    return [NOTHING if value is None else form.format(value) for value in (values[group] for group in GROUPS)]
