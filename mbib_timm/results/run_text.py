"""What a run says of itself on the terminal: a line per epoch, and the result."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mbib_timm.files import counted, in_words
from mbib_timm.methods import METHODS, Method, method_title
from mbib_timm.models.origin import origin_text
from mbib_timm.models.pretraining import Origin
from mbib_timm.recipe import Recipe
from mbib_timm.results.columns import MODEL_COLUMNS
from mbib_timm.results.record import Epoch, Evaluation, RunRecord
from mbib_timm.results.tables import accuracy_table, percent

# What broken images can mean for classes.
UNREAD = "classes whose training images are all broken, so that the model has seen none of them"
UNMEASURED = "classes that are not measured, for their evaluated images are all broken"


def epoch_line(epoch: Epoch, epochs: int) -> str:
    """Return the numbers of one of a run's epochs as a line."""
    line = f"epoch {epoch.epoch:>{len(str(epochs))}}/{epochs}  lr {epoch.lr:.2e}  loss {epoch.losses['loss']:.3f}"
    if epoch.val is not None:
        line += "".join(f"  {name} {percent(epoch.val.get(each.metric))}" for name, each in MODEL_COLUMNS.items())
    return f"{line}  {epoch.seconds:.1f} s"


def print_report(folder: Path, record: RunRecord) -> None:
    """Print the result's table, what is particular about the run, the best epoch for what it is, and where all lies."""
    print(f"\n{_when(record)}, on {record.result.split}:")
    print(accuracy_table(record.result.heads, np.array(record.class_counts)))
    if start := start_text(record.origin):
        print(start)
    if extended := extended_text(record):
        print(f"{extended.capitalize()}.")
    if chosen := chosen_text(record):
        print(chosen)
    if raw := raw_text(record):
        print(raw)
    if (best := other_best(record)) is not None:
        measured = f"epoch {best.epoch}, {best.prediction.top1:.2f} %{before_finish_text(record)}"
        print(f"Best epoch on {best.split}, which is not the result: {measured}")
    for line in broken_lines(record):
        print(f"warning: {line}; see metrics.json")
    print(f"\n{folder}")


def _when(record: RunRecord) -> str:
    """Return when in a run its result was measured: ``Epoch 59 (the last)``, ``After tau-norm``."""
    epoch, stages = record.result.epoch, record.stages
    if epoch is None:
        return f"After {method_title(record.method)}"
    stage = f" of stage {len(stages)}, {method_title(stages[-1])}" if len(stages) > 1 else ""
    return f"Epoch {epoch} (the last{stage})"


def start_text(origin: Origin) -> str:
    """Return what a run started from, and what its numbers do not compare with; empty for one from scratch."""
    if origin.is_scratch:
        return ""
    return f"Not from scratch: started from {origin_text(origin)}. Do not compare it with results from scratch."


def extended_text(record: RunRecord) -> str:
    """Return how a run came by its epochs that had fewer at first: ``trained for 2 epochs, then extended to 4``; empty
    for one that had them from the start."""
    if not record.extended_from:
        return ""
    first, *later = dict.fromkeys([*record.extended_from, record.epochs])
    rest = f", then extended to {', then to '.join(map(str, later))}" if later else " of a longer schedule"
    return f"trained for {counted(first, 'epoch')}{rest}"


def chosen_text(record: RunRecord) -> str:
    """Return what the method has chosen by itself, as ``Chosen by tau-norm: tau 0.7, on ...``; empty for nothing."""
    chosen = ", ".join(f"{name} {value:g}" for name, value in record.chosen.items())
    where = f", on {record.chosen_on}" if record.chosen_on else ""
    return f"Chosen by {method_title(record.method)}: {chosen}{where}" if chosen else ""


def raw_text(record: RunRecord) -> str:
    """Return the accuracy of the last weights where the result is their moving average; empty for no average."""
    if record.raw is None:
        return ""
    overall, *groups = record.raw.prediction.accuracies().items()
    listed = ", ".join(f"{name} {value:.2f}" for name, value in groups if value is not None)
    return f"Weights without the moving average{before_finish_text(record)}: {overall[1]:.2f} ({listed})"


def other_best(record: RunRecord) -> Evaluation | None:
    """Return the best of the evaluated epochs; None where it is the result, or only as accurate on the same images."""
    best, result = record.best, record.result
    if best is None or before_finish_text(record):  # the result is measured after another step
        return best
    is_as_accurate = best.split == result.split and best.prediction.top1 == result.prediction.top1
    return None if best.epoch == result.epoch or is_as_accurate else best


def before_finish_text(record: RunRecord) -> str:
    """Return ``, before the last step of tau-norm`` where the method changes the network after training; else nothing.

    The best epoch and the weights without the moving average are measured without that step.
    """
    if record.method not in METHODS or METHODS[record.method].finish is Method.finish:
        return ""
    return f", before the last step of {method_title(record.method)}"


def left_out_text(record: RunRecord) -> str:
    """Return how many files the data's source has passed over, by the reason; empty where there are none."""
    return ", ".join(f"{len(names):,} ({why})" for why, names in record.left_out.items())


def time_text(records: Sequence[RunRecord]) -> str:
    """Return how long runs took, the mean of several: ``1.2 hours``; of older ones the epochs alone, and it says so."""
    others = [record.other_seconds for record in records]
    known = [other for other in others if other is not None]
    whole = len(known) == len(records)
    seconds = (sum(record.training_seconds for record in records) + whole * sum(known)) / len(records)
    text = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
    if seconds < 60:
        text = f"{seconds:.0f} second{'s' * (round(seconds) != 1)}"
    return text if whole else f"{text} (epochs and their evaluations only)"


def broken_lines(record: RunRecord) -> list[str]:
    """Return what broken images have meant for a run, a line each; none where there were none."""
    lines = {
        f"broken training images that were replaced: {len(record.replaced_images):,}": record.replaced_images,
        in_words({UNREAD: record.unread_classes}): record.unread_classes,
        f"broken images that were left out of the evaluation: {len(record.left_out_images):,}": record.left_out_images,
        in_words({UNMEASURED: record.unmeasured_classes}): record.unmeasured_classes,
    }
    return [line for line, found in lines.items() if found]


def stages_text(stages: Sequence[str]) -> str:
    """Return the methods of a run's stages by their titles: ``CE, then cRT``."""
    return ", then ".join(method_title(stage) for stage in stages)


def epochs_text(recipe: Recipe) -> str:
    """Return the epochs of a recipe's stages: ``200 + 30``."""
    return " + ".join(str(stage.epochs) for stage in recipe.chain())
