"""Results without runs: a record, and accuracies that follow a rule in the form in which a sweep keeps them."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import timm

from mbib_timm.environment import Environment
from mbib_timm.methods import head_names
from mbib_timm.models.origin import OwnData, origin_of
from mbib_timm.models.pretraining import Origin
from mbib_timm.models.zoo import split_tag
from mbib_timm.results.columns import COLUMNS
from mbib_timm.results.record import Evaluation, HeadMetrics, RunRecord
from mbib_timm.sweeps.sweep import Sweep
from mbib_timm.sweeps.sweep_plan import plan
from mbib_timm.sweeps.sweep_results import Curve, SweepResults, SweepRun

ENVIRONMENT = Environment(
    mbib_timm="0", commit="0123456789ab", torch="2", timm="1", device="cpu", hardware="an abacus", processes=1,
    command="mbib train mbib_resnet20.digits",
)  # fmt: skip
Accuracy = Callable[[int, int, str], float | None]


def made_up_record(heads: dict[str, HeadMetrics], class_counts: list[int], **fields: Any) -> RunRecord:
    """Return the record of a run that ended after its epoch 3.

    Args:
        heads: what it found.
        class_counts: training images of each class.
        fields: that are to be others.
    """
    record = RunRecord(
        name="mbib_resnet20.digits",
        model="mbib_resnet20",
        method="mbib",
        stages=["mbib"],
        prediction_heads=["v3", "z"],
        dataset="digits",
        loader="resident",
        epochs=3,
        seed=0,
        class_counts=class_counts,
        class_names=None,
        result=Evaluation("test", heads, 3, "model.safetensors"),
        raw=None,
        best=None,
        chosen={},
        chosen_on=None,
        training_seconds=12.5,
        replaced_images=[],
        environment=ENVIRONMENT,
        precision="float32",
        origin=Origin(),
    )
    return replace(record, **fields)


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
        runs.append(
            SweepRun(
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
                images=10_000,
                split="test",
                heads=heads,
                curve=Curve(epoch=[1, 2], train_loss=[4.6, 4.1], val_top1=[None, 45.0]),
                training_seconds=12.5,
                environment=replace(ENVIRONMENT, command=f"mbib sweep {sweep.name}"),
                origin=origin_of(run.recipe, OwnData(split_tag(run.name.partition(".")[2])[1])),
            )
        )
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
