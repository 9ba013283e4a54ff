"""`mbib analyze`: everything the analyses say of trained models, as JSON, as a short text and as figures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mbib_timm.analysis.embedding import IMAGES_PER_CLASS, require_scikit_learn
from mbib_timm.analysis.figures import analysis_figures, comparison_figures
from mbib_timm.analysis.outputs import collect_outputs
from mbib_timm.analysis.results import all_analyses, rounded, write_analysis
from mbib_timm.analysis.summary import comparison_text, summary_text
from mbib_timm.drawing import Illustration, write_illustrations
from mbib_timm.environment import describe_environment, join_world, leave_world
from mbib_timm.errors import MbibError
from mbib_timm.evaluation.target import Target, find_target, open_target
from mbib_timm.files import read_json
from mbib_timm.models.weights import Source
from mbib_timm.results.record import RECORD, RunRecord
from mbib_timm.results.redact import redact_environment, redact_model


def analyze(
    targets: Sequence[str],
    *,
    recipe: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    split: str | None = None,
    output: Path | None = None,
    classes: Sequence[int] | None = None,
    images_per_class: int = IMAGES_PER_CLASS,
) -> list[dict[str, Any]]:
    """Analyze trained models, print a summary of each, and compare each further one with the first.

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
        What `analyze_run` returns, for each target.

    Raises:
        MbibError: what `analyze_run` raises, and runs with different numbers of classes.
    """
    found = [find_target(target, recipe, overrides) for target in targets]
    sizes = [len(target.class_counts()) for target in found]
    for name, size in zip(targets, sizes, strict=True):
        if size != sizes[0]:
            raise MbibError(
                f"runs of different data cannot be compared: {targets[0]} has {sizes[0]} classes, {name} has {size}"
            )
    given = _folders(targets, output)
    folders = [folder or _own_folder(target) for folder, target in zip(given, found, strict=True)]
    results: list[dict[str, Any]] = []
    for target, folder in zip(found, folders, strict=True):
        results.append(_analyze(target, folder, split, classes, images_per_class))
        print(summary_text(results[-1]))
    for folder, other in zip(folders[1:], results[1:], strict=True):
        print(comparison_text(results[0], other))
        _draw(folder, comparison_figures(results[0], other))
    return results


def _draw(folder: Path, illustrations: Sequence[Illustration]) -> None:
    try:
        write_illustrations(folder / "figures", illustrations)
    except MbibError as error:
        print(f"no figures: {error}")


def _folders(targets: Sequence[str], output: Path | None) -> Sequence[Path | None]:
    """Return where each target's results go; of several, into folders named after them, which may be alike."""
    if output is None or len(targets) == 1:
        return [output] * len(targets)
    names = [target.removeprefix("local-dir:").rstrip("/").replace(":", "/").rpartition("/")[2] for target in targets]
    unique = [name if names.count(name) == 1 else f"{name}-{place}" for place, name in enumerate(names, start=1)]
    return [output / name for name in unique]


def analyze_run(
    target: str,
    *,
    recipe: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    split: str | None = None,
    output: Path | None = None,
    classes: Sequence[int] | None = None,
    images_per_class: int = IMAGES_PER_CLASS,
) -> dict[str, Any]:
    """Analyze a trained model over a split, write the results as ``analysis.json``, and draw them.

    Args:
        target: a run's folder, ``local-dir:FOLDER``, ``hf-hub:REPO``, or a timm model name.
        recipe: name of the recipe that says which data; a run's folder and a published model have their own.
        overrides: recipe keys to replace.
        split: split to analyze; by default the one that the run's result is on.
        output: folder of the file; by default ``analysis`` in the run's folder.
        classes: labels of the classes to embed; by default ten from the head to the tail.
        images_per_class: images of each to embed.

    Returns:
        The file's content: numbers with six digits, and None for what cannot be measured.

    Raises:
        MbibError: nothing there to analyze, no place for the results, data that do not fit the model, several
            processes, or no scikit-learn.
    """
    found = find_target(target, recipe, overrides)
    return _analyze(found, output or _own_folder(found), split, classes, images_per_class)


def _analyze(
    found: Target, folder: Path, split: str | None, classes: Sequence[int] | None, images_per_class: int
) -> dict[str, Any]:
    require_scikit_learn()
    world = join_world(found.recipe.device)
    try:
        if world.world_size > 1:
            raise MbibError(f"mbib analyze runs in one process, not in {world.world_size}: leave torchrun out")
        opened = open_target(found, world, split)
        model, counts = opened.model, opened.class_counts
        _check_classes(classes, len(counts))
        channels_last = found.recipe.channels_last
        outputs = collect_outputs(model, opened.loader, counts, device=world.device, channels_last=channels_last)
        result = {
            **_description(found.source),
            "split": opened.split,
            "images": len(outputs.labels),
            "class_counts": counts.tolist(),
            "prediction_heads": list(getattr(model, "prediction_heads", ())),
            **all_analyses(model, outputs, counts, opened.input_size, classes, images_per_class),
            "environment": asdict(redact_environment(describe_environment(world))),
        }
    finally:
        leave_world()
    content: dict[str, Any] = rounded(result)
    write_analysis(folder, content)
    _draw(folder, analysis_figures(content))
    return content


def _own_folder(target: Target) -> Path:
    # Not the folder of a published model, which is the package's.
    source = target.source
    if source.folder is None or not source.name.startswith("local-dir:"):
        raise MbibError(f"{target.name} is no run's folder: say with --output DIR where the analysis goes")
    return source.folder / "analysis"


def _check_classes(classes: Sequence[int] | None, num_classes: int) -> None:
    for label in classes or ():
        if not 0 <= label < num_classes:
            raise MbibError(f"there is no class {label} to embed: labels lie in 0..{num_classes - 1}")


def _description(source: Source) -> dict[str, Any]:
    """Return what is known of the run: its name, model, class names, epochs and seed; None for what is not."""
    config, file = source.config(), source.file(RECORD)
    record = None if file is None else read_json(RunRecord, file, "the record of a run")
    architecture = config.get("architecture") or (record.model if record else source.name.partition(".")[0])
    tag = config.get("pretrained_cfg", {}).get("tag")
    names = config.get("label_names") or (record.class_names if record else None)
    return {
        "name": record.name if record else f"{architecture}.{tag}" if tag else redact_model(source.name),
        "model": architecture,
        "epochs": record.epochs if record else None,
        "seed": record.seed if record else None,
        "class_names": None if names is None else list(names),
    }
