"""What groups of runs are called in a report, beside one another."""

from collections.abc import Sequence

from mbib_timm.reporting.training_setups import data_title, setup_names
from mbib_timm.results.redact import last_part
from mbib_timm.results.run_text import epochs_text, extended_text, stages_text
from mbib_timm.results.runs import FinishedRun, RunGroup


def short_titles(groups: Sequence[RunGroup], of: Sequence[RunGroup] = (), in_columns: Sequence[str] = ()) -> list[str]:
    """Return names of groups for a reader: the method, and whatever else differs among them.

    Args:
        groups: to tell apart.
        of: all groups, whose training setups have names; `groups` when empty.
        in_columns: of ``epochs`` and ``precision`` what columns of their own say.
    """
    of = of or groups
    names = setup_names(of)
    told = [
        {
            "method": stages_text(group.first.record.stages),
            "data": data_title(group),
            "model": group.first.network,
            "img_size": f"{group.first.training['img_size']} pixels",
            "setup": names[of.index(group)].short,
            **_class_balance(group),
            "epochs": f"{epochs_of(group)} epochs",
            "precision": group.first.precision,
        }
        for group in groups
    ]
    differing = [key for key in told[0] if key != "method" and len({each[key] for each in told}) > 1]
    seen = [tuple(each[key] for key in ("data", "model", "img_size")) for each in told]
    if len({(*shown, each["setup"]) for shown, each in zip(seen, told, strict=True)}) == len(set(seen)):
        differing = [key for key in differing if key != "setup"]  # which the others say already
    titles = []
    for group, each in zip(groups, told, strict=True):
        words = [each["method"], *(each[key] for key in differing if each[key] and key not in in_columns)]
        alone = told.count(each) == 1
        titles.append(", ".join(words) if alone else f"{', '.join(words)} ({_own_title(group)})")
    return titles


def _own_title(group: RunGroup) -> str:
    """Return the group's title, with the name of its folder where somebody has chosen that in place of the run's."""
    chosen, settings = group.first.experiment, group.title.removeprefix(group.first.name)
    return f"{chosen}{settings}".removesuffix(f" ({chosen})") if chosen else group.title


def _class_balance(group: RunGroup) -> dict[str, str]:
    """Return what the longest stage does for rare classes beside its method, in words; empty for nothing."""
    stage = group.first.longest_stage
    weights = "" if stage.class_weights == "none" else last_part(stage.class_weights)
    return {
        "class_weights": f"class weights {weights}" if weights else "",
        "sampler": f"sampler {stage.sampler}" if stage.sampler else "",
    }


def epochs_of_run(run: FinishedRun) -> str:
    """Return the epochs of a run's stages, and how it came by them, where not from the start."""
    epochs, extended = epochs_text(run.recipe), extended_text(run.record)
    return f"{epochs} ({extended})" if extended else epochs


def epochs_of(group: RunGroup) -> str:
    """Return the epochs of runs, and those of their recipe where these are others: ``20 of 200``."""
    return epochs_of_run(group.first) + (f" of {group.recipe_epochs}" if group.is_short else "")
