"""Finished runs as reports, cards and tools read them: the record with recipe and history, and runs of several
seeds put together. Nothing here says where on a machine a run was made."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbib_timm.errors import MbibError
from mbib_timm.files import read_text
from mbib_timm.models.origin import OwnData, origin_of, origin_text, overlap_text, start_name
from mbib_timm.models.pretraining import Origin
from mbib_timm.models.zoo import Dataset, ZooModel, data_set_of, is_published, split_tag
from mbib_timm.recipe import (
    COMPUTING,
    KEYS,
    Recipe,
    load_recipe,
    longest_epochs,
    packaged_recipes,
    recipe_name,
)
from mbib_timm.results.record import Epoch, HeadMetrics, RunRecord, read_history, read_record
from mbib_timm.results.redact import last_part, redact_record, redact_value
from mbib_timm.results.run_text import extended_text
from mbib_timm.results.tables import mean_of

if TYPE_CHECKING:
    from mbib_timm.results.paper import PaperResult

# Recipe keys that say how a result is reached and reported, and leave it as it is.
SAME_RESULT = {"val_interval", "validation_batch_size", "loader", "torchcompile", "channels_last"}
# Keys that say which images a run sees; broken ones and the loader leave the classes as they are.
DATA = {name for name, item in KEYS.items() if item.metadata["group"] == "data"} - {"broken", "loader"}
# Keys that say how long a run is trained; and those of image size, augmentation and optimisation, apart from that.
LENGTH = {"epochs", "warmup_epochs", "warmup_lr", "decay_milestones", "mixup_off_epochs", "model_ema_decay"}
TRAINING = [
    name
    for name, item in KEYS.items()
    if (item.metadata["group"] in ("augmentation", "mixing", "optimisation") or name in ("img_size", "train_crop_mode"))
    and name not in LENGTH | SAME_RESULT
]
# What a model's name begins with before that of its network, which a method builds on.
BUILT_ON = re.compile("^(mbib_experts|experts|mbib|bib|cifar|tf)_")
# Metrics of a head that are one number each.
NUMBERS = ("top1", "top5", "macro", "many", "medium", "few", "ece", "nll", "macro_f1")


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, or what was kept of it.

    Attributes:
        folder: of the run, or of kept results.
        record: its ``metrics.json``.
        recipe: as it was run.
    """

    folder: Path
    record: RunRecord
    recipe: Recipe

    @property
    def name(self) -> str:
        """``arch.tag``."""
        return self.record.name

    @property
    def precision(self) -> str:
        """``float32``, or the type of mixed precision; records of before this was noted are of full precision."""
        return self.record.precision or "float32"

    def kept_name(self, seed: int | str) -> str:
        """Return the name of the folder that keeps the run's results, or those of its repetition with another seed.

        The epochs are those of the longest stage; an extension and mixed precision are named.
        """
        extended = "-extended" * bool(self.record.extended_from)
        mixed = "" if self.precision == "float32" else f"-{self.precision}"
        return f"{self.name}-{longest_epochs(self.recipe)}e{extended}-seed{seed}{mixed}"

    @property
    def experiment(self) -> str:
        """The name of its folder, where somebody has chosen another than the run's; else empty."""
        name = self.folder.resolve().name
        return "" if name in (self.name, self.kept_name(self.record.seed)) else name

    @property
    def heads(self) -> Mapping[str, HeadMetrics]:
        """The result's metrics by head."""
        return self.record.result.heads

    @cached_property
    def packaged(self) -> Recipe | None:
        """The packaged recipe that the run was made from, also by another method; None where there is none."""
        return packaged_recipe(self.name) or self._recipe_of_other_method

    @property
    def _recipe_of_other_method(self) -> Recipe | None:
        """The packaged recipe whose runs by this run's method have its name; of several the one that its command says.

        ``finetune/mbib_resnet32`` of ``mbib_resnet32.ce_finetune``.
        """
        method, architecture = self.recipe.method["name"], self.name.partition(".")[0]
        named = {
            name: file
            for name, file in packaged_recipes().items()
            if recipe_name(file).startswith(f"{architecture}.") and recipe_name(file, method) == self.name
        }
        said = [file for name, file in named.items() if name in self.record.environment.command.split()]
        found = said or [*named.values()]
        return load_recipe(found[0]) if len(found) == 1 else None

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """Keys with other values than in that recipe that compute something else, beside the epochs, by address."""
        return {} if self.packaged is None else _settings(self.recipe, self.packaged, self._has_named_classes)

    @property
    def _has_named_classes(self) -> bool:
        return data_set_of(self.name, self.record.class_counts, self.record.class_names) is not None

    @cached_property
    def training(self) -> Mapping[str, Any]:
        """Image size, augmentation and optimisation of the longest stage, beside its length: runs that differ in these
        are not compared."""
        return {key: redact_value(getattr(self.longest_stage, key)) for key in TRAINING}

    @property
    def longest_stage(self) -> Recipe:
        """The recipe of the stage with the most epochs, the first of several."""
        return max(self.recipe.chain(), key=lambda stage: stage.epochs)

    @property
    def network(self) -> str:
        """The network that methods build on, without its weights: ``resnet32`` of ``mbib_resnet32``."""
        given = str(self.recipe.model_kwargs.get("backbone") or self.recipe.model)
        return BUILT_ON.sub("", redact_value(given).partition(".")[0])

    @cached_property
    def frame(self) -> tuple[Any, ...]:
        """What runs share whose difference says which method is better: training images as far as the recipe says,
        network, where training started, and length, image size, augmentation and optimisation of every stage."""
        stages = [{key: getattr(stage, key) for key in (*TRAINING, *LENGTH)} for stage in self.recipe.chain()]
        record, recipe = self.record, self.recipe
        images = record.class_counts, record.class_names, recipe.dataset, recipe.subset_seed
        return *images, self.network, record.origin, stages

    @property
    def command_today(self) -> str:
        """The command that trains its packaged recipe where its own, of a sweep or of older names, is another; empty
        for other runs."""
        recipe = "" if self.zoo_model is None else self.zoo_model.recipe
        return "" if recipe in ("", *self.record.environment.command.split()) else f"mbib train {recipe}"

    @property
    def command_lacks_data(self) -> bool:
        """True if its command, whose folders are left out, does not say where images of somebody's own are."""
        return self.dataset is None and self.recipe.data_dir is not None

    @property
    def has_packaged_data(self) -> bool:
        """True if the run saw the images that the packaged recipe of its name names, as far as its keys say."""
        return self.packaged is not None and not _last_parts(self.settings) & DATA

    @property
    def has_other_subset(self) -> bool:
        """True if the zoo's data set was made long-tailed from files, whose order is not that of its recipe's source.

        The subset has as many images of each class, but other images.
        """
        drawn = self.recipe.dataset == "folder" and self.recipe.imbalance != "none"
        return drawn and self.dataset is not None and self.packaged is not None and self.packaged.dataset != "folder"

    @property
    def dataset(self) -> Dataset | None:
        """The zoo's data set that the run was trained on: its name says so, and its recipe and its classes agree."""
        if _last_parts(self.settings) & DATA:
            return None
        return data_set_of(self.name, self.record.class_counts, self.record.class_names)

    @property
    def zoo_model(self) -> ZooModel | None:
        """The model of the zoo that this is: all that it computed is what the packaged recipe asks for."""
        return ZooModel(self.name) if is_published(self.name) and not self.differing else None

    @property
    def differing(self) -> list[str]:
        """What keeps a run from being the packaged recipe's: addresses of keys, or ``classes``; empty for any other."""
        if self.packaged is None or not is_published(self.name):
            return []
        start = [] if self._has_packaged_start or {"model", "pretrained"} & _last_parts(self.settings) else ["start"]
        return [
            *self.settings,
            *([] if self.is_whole else ["epochs"]),
            *start,
            *([] if self._has_named_classes else ["classes"]),
        ]

    @property
    def is_whole(self) -> bool:
        """False if its packaged recipe asks for other epochs, or the run did not have them from the start."""
        if self.packaged is None:
            return True
        return longest_epochs(self.recipe) == longest_epochs(self.packaged) and not self.record.extended_from

    @property
    def _has_packaged_start(self) -> bool:
        """Whether the run started as its packaged recipe does: a run's folder as a start is in no other key."""
        own = OwnData(split_tag(self.name.partition(".")[2])[1])
        packaged = Origin() if self.packaged is None else origin_of(self.packaged, own)
        return packaged.is_scratch == self.origin.is_scratch and packaged.data == self.origin.data

    @property
    def paper(self) -> "tuple[PaperResult, ...]":
        """What the paper reports of such a run; nothing of another model, another method, or other data."""
        others = {"model", "model_kwargs", "method"}
        if self.dataset is None or not self.origin.is_scratch or _last_parts(self.settings) & others:
            return ()
        # Read where it is asked for: training, which is not, would start a tenth later.
        from mbib_timm.results.paper import RESULTS

        return RESULTS.get(self.name, ())

    @property
    def origin(self) -> Origin:
        """Where it started; the paper's runs start from scratch."""
        return self.record.origin

    @property
    def overlap(self) -> str:
        """What is known of whether its classes were in what its weights had seen, in sentences; empty from scratch."""
        data = split_tag(self.name.partition(".")[2])[1] if self.dataset is not None else self.record.dataset
        return overlap_text(self.origin.data, data, self.record.class_names)

    @cached_property
    def history(self) -> list[Epoch]:
        """The epochs of ``summary.csv``; none where it was not kept."""
        return read_history(self.folder)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Paragraphs of ``notes.md``, by whoever ran it."""
        file = self.folder / "notes.md"
        text = read_text(file, "notes of a run") if file.is_file() else ""
        return tuple(" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip())


def read_run(folder: Path) -> FinishedRun:
    """Read a finished run, or what was kept of it, without paths of the machine that it ran on.

    Raises:
        MbibError: a run that is not finished, or files that hold something else.
    """
    record = redact_record(read_record(folder))
    if not (folder / "recipe.yaml").is_file():
        raise MbibError(f"{folder} has no recipe.yaml: it is not a run's folder")
    return FinishedRun(folder, record, load_recipe(folder / "recipe.yaml"))


def read_seeds(folder: Path, others: Sequence[Path]) -> list[FinishedRun]:
    """Read a run and further ones that differ from it in the seed alone, and so started from the same.

    Returns:
        The run, then the others.

    Raises:
        MbibError: another recipe's run among the others, one of other data or code, or a seed that is there twice.
    """
    first, *rest = runs = [read_run(path) for path in (folder, *others)]
    for run in rest:
        if run.origin != first.origin:
            raise MbibError(
                f"{run.folder} started {_from(run)}, and {folder} {_from(first)}: more than the seed differs"
            )
        if _without_seed(run.recipe) != _without_seed(first.recipe):
            raise MbibError(f"{run.folder} is a run of a different recipe from {folder}: more than the seed differs")
        if _given(run, runs) != _given(first, runs):
            raise MbibError(
                f"{run.folder} had other data, other code of plugins or another extension than {folder}: more than the "
                "seed differs"
            )
    _require_other_seeds(runs)
    return runs


def _without_seed(recipe: Recipe) -> dict[str, Any]:
    return recipe.everywhere(seed=0).computation()


def _given(run: FinishedRun, runs: Iterable[FinishedRun]) -> str:
    """Return what a run was given beside its recipe and its start, as far as all of some runs have it recorded, and
    after which epochs it was extended."""
    record = run.record
    inputs = record.inputs if all(each.record.inputs for each in runs) else []
    given = [
        record.class_counts,
        record.class_names,
        record.extended_from,
        *([each.data, each.plugins] for each in inputs),
    ]
    return json.dumps(given, sort_keys=True)


def _from(run: FinishedRun) -> str:
    return origin_text(run.origin) if run.origin.is_scratch else f"from {origin_text(run.origin)}"


def _require_other_seeds(runs: Sequence[FinishedRun]) -> None:
    by_seed: dict[int, FinishedRun] = {}
    for run in runs:
        other = by_seed.setdefault(run.record.seed, run)
        if other is not run:
            raise MbibError(
                f"{other.folder} and {run.folder} are runs of {run.name} and have the same seed, {run.record.seed}: "
                "leave one of them out, or train it with another --seed"
            )


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in the seed alone.

    Attributes:
        title: the run's name, with what sets it apart from others of the name.
        runs: by seed.
    """

    title: str
    runs: tuple[FinishedRun, ...]

    @property
    def settings(self) -> Mapping[str, Any]:
        """Keys with other values than in that recipe that compute something else, beside the epochs, by address."""
        return self.first.settings

    @property
    def first(self) -> FinishedRun:
        """The run whose figures are shown."""
        return self.runs[0]

    @property
    def epochs(self) -> int:
        """Epochs of the longest stage."""
        return longest_epochs(self.first.recipe)

    @property
    def recipe_epochs(self) -> int | None:
        """Epochs that the packaged recipe asks for; None where there is no such recipe."""
        return None if self.first.packaged is None else longest_epochs(self.first.packaged)

    @property
    def is_short(self) -> bool:
        """True if the runs had other epochs than their recipe asks for, or not from the start."""
        return not self.first.is_whole

    @property
    def is_papers(self) -> bool:
        """True if the runs are the paper's: its recipe as it stands, in full. Then a difference from it counts."""
        return bool(self.paper) and not self.is_short and not self.settings

    def papers_number(self, column: str) -> float | None:
        """Return the paper's accuracy in percent from which a difference counts; None where it has none."""
        return self.paper[0].accuracies.get(column) if self.is_papers else None

    def values(self, column: str, head: str = "prediction") -> list[float | None]:
        """Return a head's number in percent of each run: a column of `MODEL_COLUMNS`."""
        return [run.heads[head].numbers()[column] for run in self.runs]

    @cached_property
    def heads(self) -> Mapping[str, HeadMetrics]:
        """The metrics by head: of several runs the means of all accuracies, and of the intervals' ends.

        All runs see the same images: their mean is as uncertain as one of them.
        """
        if len(self.runs) == 1:
            return self.first.heads
        return {head: _mean_metrics([run.heads[head] for run in self.runs]) for head in self.first.heads}

    def mean(self, column: str) -> float | None:
        """Return the prediction's mean accuracy in percent; None for a group without classes."""
        return mean_of(self.values(column))

    @property
    def paper(self) -> "tuple[PaperResult, ...]":
        """What the paper reports of such a run."""
        return self.first.paper

    @property
    def origin(self) -> Origin:
        """Where the runs started."""
        return self.first.origin


def _mean_metrics(metrics: Sequence[HeadMetrics]) -> HeadMetrics:
    shared = set.intersection(*(set(each.intervals) for each in metrics))
    intervals: dict[str, Any] = {
        name: tuple(map(mean_of, zip(*(each.intervals[name] for each in metrics), strict=True)))
        for name in metrics[0].intervals
        if name in shared
    }
    numbers: dict[str, Any] = {name: mean_of([getattr(each, name) for each in metrics]) for name in NUMBERS}
    per_class = [mean_of(values) for values in zip(*(each.per_class for each in metrics), strict=True)]
    return dataclasses.replace(metrics[0], **numbers, per_class=per_class, intervals=intervals)


def group_runs(runs: Sequence[FinishedRun]) -> list[RunGroup]:
    """Put runs together that differ in the seed alone, in the order in which they were given.

    Raises:
        MbibError: two runs of one recipe and seed.
    """
    grouped: dict[str, list[FinishedRun]] = {}
    recipes = [_without_seed(run.recipe) for run in runs]
    for run, recipe in zip(runs, recipes, strict=True):
        start = dataclasses.asdict(run.origin)
        pairs = zip(runs, recipes, strict=True)
        alike = [other for other, of_other in pairs if other.name == run.name and of_other == recipe]
        key = json.dumps([run.name, recipe, start, _given(run, alike)], sort_keys=True)
        grouped.setdefault(key, []).append(run)
    groups = []
    for members in grouped.values():
        _require_other_seeds(members)
        ordered = tuple(sorted(members, key=lambda run: run.record.seed))
        groups.append(RunGroup(_title(members[0], runs), ordered))
    return groups


def packaged_recipe(name: str) -> Recipe | None:
    """Return the packaged recipe that runs of a name are made by; None where there is none."""
    files = [file for file in packaged_recipes().values() if recipe_name(file) == name]
    return load_recipe(files[0]) if files else None


def _settings(recipe: Recipe, own: Recipe, same_classes: bool) -> dict[str, Any]:
    """Return what has other values than in the packaged recipe; the same images in files are the same data."""
    elsewhere = {"dataset"} if recipe.dataset == "folder" and same_classes else set()
    before, now = _by_address(own.with_choices_of(recipe)), _by_address(recipe)

    def is_of_other_method(address: str) -> bool:  # whose settings the run's method has not
        stage, setting, _ = address.partition("method.")
        return bool(setting) and address not in now and now.get(f"{stage}method") != before.get(f"{stage}method")

    return {
        address: now.get(address)
        for address in {**now, **before}
        if now.get(address) != before.get(address)
        and address.rpartition(".")[2] not in {"seed", "epochs", *SAME_RESULT, *elsewhere}
        and not is_of_other_method(address)
    }


def _last_parts(addresses: Iterable[str]) -> set[str]:
    """Return the keys of addresses: ``lr`` of ``stage2.lr``, ``method`` of itself, ``beta`` of ``method.beta``."""
    return {address.rpartition(".")[2] for address in addresses}


def _by_address(recipe: Recipe) -> dict[str, Any]:
    """Return what decides what a recipe computes, by address: settings of the method, and keys of several stages."""
    found: dict[str, Any] = {}
    for number, stage in enumerate(recipe.chain(), start=1):
        values = {key: redact_value(getattr(stage, key)) for key in COMPUTING}
        values["class_weights"] = last_part(values["class_weights"])  # of a file
        method = values.pop("method")
        values = {**values, "method": method.pop("name"), **{f"method.{key}": value for key, value in method.items()}}
        prefix = f"stage{number}." if recipe.stage else ""
        found |= {f"{prefix}{address}": value for address, value in values.items()}
    return found


def _title(run: FinishedRun, runs: Sequence[FinishedRun]) -> str:
    """Return the run's name, and the settings that differ among the runs of this name, or where it started."""
    own = _by_address(run.recipe)
    others = [_by_address(other.recipe) for other in runs if other.name == run.name]
    differing = [key for key in own if key.rpartition(".")[2] != "seed" and any(o.get(key) != own[key] for o in others)]
    # What leaves a result as it is tells runs apart only where nothing else does; and bfloat16 has a name.
    telling = [key for key in differing if key.rpartition(".")[2] not in SAME_RESULT] or differing
    precise = [key for key in telling if key.rpartition(".")[2] in ("amp", "amp_dtype")]
    said = [run.precision] if precise else []
    said += [f"{key} {own[key]}" for key in telling if key not in precise]
    recipe = _without_seed(run.recipe)
    alike = [other for other in runs if other.name == run.name and _without_seed(other.recipe) == recipe]
    if any(other.origin != run.origin for other in alike):
        said.append("from scratch" if run.origin.is_scratch else f"from {start_name(run.origin)}")
    if any(other.record.extended_from != run.record.extended_from for other in alike):
        said.append(extended_text(run.record) or "not extended")
        alike = [other for other in alike if other.record.extended_from == run.record.extended_from]
    if any(_given(other, alike) != _given(run, alike) for other in alike):
        said.append(_other_inputs(run, alike))
    settings = ", ".join(said)
    return f"{run.name} ({settings})" if settings else run.name


def _other_inputs(run: FinishedRun, alike: Sequence[FinishedRun]) -> str:
    """Return what tells a run from others of its recipe with other data or code: its data, its folder or a digest."""
    own = _given(run, alike)

    def others_are_elsewhere(place: Callable[[FinishedRun], str]) -> bool:
        return all(place(other) != place(run) for other in alike if _given(other, alike) != own)

    if others_are_elsewhere(_data_folder):
        return f"data {_data_folder(run)}"
    if others_are_elsewhere(lambda each: each.folder.name):
        return run.folder.name
    return f"data and code {hashlib.sha256(own.encode()).hexdigest()[:8]}"


def _data_folder(run: FinishedRun) -> str:
    return last_part(run.recipe.data_dir or "")
