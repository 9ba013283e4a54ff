"""Sweeps' results without their runs: accuracies that follow a rule, in the form in which a sweep keeps them."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import timm

from mbib_timm.environment import Environment
from mbib_timm.methods import head_names
from mbib_timm.results.tables import COLUMNS
from mbib_timm.sweeps.sweep import Sweep
from mbib_timm.sweeps.sweep_results import Curve, SweepResults, SweepRun
from mbib_timm.sweeps.sweep_runs import plan

Accuracy = Callable[[int, int, str], float | None]


def pretty(place: int, seed: int, column: str) -> float | None:
    """An accuracy as long-tailed benchmarks have them, in percent."""
    shift = {"overall": 0.0, "many": 17.3, "medium": 0.6, "few": -21.9}[column]
    return 45.0 + (place * 7 % 11) * 0.4 + (seed - 1) * 0.3 + shift


@cache
def heads_of(model: str, arguments: str) -> tuple[str, ...]:
    """Names under which an evaluation reports: the prediction, and each head where there are several."""
    names = head_names(timm.create_model(model, num_classes=100, device="meta", **json.loads(arguments)))
    return ("prediction", *(names if len(names) > 1 else ()))


def made_up(sweep: Sweep, accuracy: Accuracy = pretty, only: str = "", **overrides: Any) -> SweepResults:
    """Return what a sweep would have found.

    Args:
        sweep: planned, and not run.
        accuracy: of a configuration (its place among those of the sweep), a seed and a column, for the prediction; a
            head of its own is a point lower for each head before it.
        only: keep the runs whose label contains this.
        overrides: recipe keys of all runs.
    """
    planned = plan(sweep, overrides)
    configurations = list(dict.fromkeys(run.configuration for run in planned))
    runs = []
    for run in planned:
        place = configurations.index(run.configuration)
        heads = {}
        for depth, head in enumerate(heads_of(run.recipe.model, json.dumps(run.recipe.model_kwargs))):
            values = {column: accuracy(place, run.recipe.seed, column) for column in COLUMNS}
            heads[head] = {column: None if value is None else value - depth for column, value in values.items()}
        environment = Environment(
            "0", "0123456789ab", "2", "1", "cpu", "an abacus", processes=1, command=f"mbib sweep {sweep.name}"
        )
        record = SweepRun(
            label=run.label,
            configuration=run.configuration,
            coordinates=run.coordinates,
            seed=run.recipe.seed,
            method=run.recipe.method["name"],
            stages=[stage.method["name"] for stage in run.recipe.chain()],
            chosen={},
            epochs=run.epochs,
            recipe_epochs=run.recipe_epochs,
            settings=run.settings,
            dataset=run.recipe.dataset,
            test_images=10_000,
            heads=heads,
            curve=Curve(epoch=[0, 1], train_loss=[4.6, 4.1], val_top1=[None, 45.0]),
            training_seconds=12.5,
            environment=environment,
        )
        runs.append(record)
    paper = sweep.paper
    return SweepResults(
        name=Path(planned[0].recipe.output).name,
        title=sweep.title,
        recipe=sweep.recipe,
        axes={axis: [value.name for value in sweep.values(axis)] for axis in sweep.axes},
        labels={axis: sweep.label(axis) for axis in sweep.axes},
        heads=sweep.heads,
        figure=sweep.figure,
        paper=None if paper is None else replace(paper, recipe=paper.recipe or sweep.recipe),
        planned=len(planned),
        runs=[run for run in runs if only in run.label],
        failed={},
    )
