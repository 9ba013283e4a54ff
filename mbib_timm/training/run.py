"""One stage of a run, from its recipe to its results: resumable after any epoch, or within one."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbib_timm.data import DataPool, Loaders, Passes, Splits, create_loaders, left_out, unread_classes
from mbib_timm.data.batch import Loader
from mbib_timm.data.features import FeatureStore
from mbib_timm.data.overview import SMALL_INPUT, median_size, shrunk_note
from mbib_timm.environment import (
    World,
    describe_environment,
    generator_states,
    of_all,
    restore_generators,
    seed_generators,
    share_buffers,
)
from mbib_timm.errors import CheckpointError, NoFirstLossError, few, first_line
from mbib_timm.evaluation import AnswerLog, evaluate
from mbib_timm.evaluation.answer_files import write_answers, write_errors
from mbib_timm.evaluation.trained_images import evaluated_line
from mbib_timm.files import counted, from_plain
from mbib_timm.methods import Method
from mbib_timm.methods.base import (
    attribute_marks,
    reported_numbers,
    require_average,
    require_kept,
    unkept_buffers,
)
from mbib_timm.methods.class_means import CLASS_MEANS, start_from_class_means
from mbib_timm.models.adapters import merged_weights
from mbib_timm.models.head_outputs import prediction_heads
from mbib_timm.progress import Progress
from mbib_timm.recipe import Recipe
from mbib_timm.recipe.plugins import outdated_plugins
from mbib_timm.results.record import (
    LISTED,
    Epoch,
    Evaluation,
    HeadMetrics,
    RunRecord,
    epoch_metrics,
    read_record,
    write_history,
)
from mbib_timm.results.run_text import epoch_line
from mbib_timm.training.checkpoint import save_checkpoint
from mbib_timm.training.epoch import LossLog, require_finite, train_one_epoch
from mbib_timm.training.optimization import (
    require_optimized,
    restore_optimizer,
    round_learning_rates,
    unscaled_rate,
)
from mbib_timm.training.provenance import continued, inputs_in, inputs_of, start_of
from mbib_timm.training.run_folder import BEST_WEIGHTS, WEIGHTS, RunFolder
from mbib_timm.training.setup import require_named, set_up, updates_of_epoch
from mbib_timm.training.step import create_step
from mbib_timm.training.trackers import Tracker, create_trackers, require_trackers


@dataclass
class PartOfEpoch:
    """How far an epoch has come that is not done.

    Attributes:
        steps: batches done, to the end of an update.
        learning_rate: at the beginning of the epoch.
        losses: sums of the loss parts over these steps.
        seconds: that they took.
    """

    steps: int
    learning_rate: float
    losses: dict[str, float]
    seconds: float


@dataclass
class TrainState:
    """How far a stage has come: what a checkpoint holds beside the weights."""

    epoch: int = 0  # epochs done
    history: list[Epoch] = field(default_factory=list)
    best: Evaluation | None = None
    seconds: float = 0.0
    part: PartOfEpoch | None = None  # of the epoch after these
    other_seconds: float | None = None  # before the first epoch, of each process that went on, where that was recorded
    ends: list[int] = field(default_factory=list)  # epochs after which it was extended, and its own

    @property
    def has_trained(self) -> bool:
        """Whether a step has been taken that a checkpoint holds."""
        return self.epoch > 0 or self.part is not None

    def ends_with(self, epochs: int) -> list[int]:
        """Return `ends` of the run where it goes on by the schedule of so many epochs."""
        *earlier, planned = self.ends or [epochs]
        return [*earlier, epochs] if planned == epochs or not self.has_trained else [*earlier, self.epoch, epochs]

    @classmethod
    def of(cls, state: dict[str, Any]) -> "TrainState":
        """Return what a checkpoint holds of it. Raises CheckpointError where it holds something else."""
        try:
            found: TrainState = from_plain(cls, state.get("progress"))
        except ValueError as error:
            raise CheckpointError(f"the checkpoint does not say how far its run has come: {error}") from None
        return found


class Run:
    """One stage: a run of its own.

    Args:
        recipe: what to train; of several stages the last.
        name: the run's name.
        world: this process among the run's processes.
        folder: where the run writes.
        state: the checkpoint to resume from, or None.
        pool: shares data with other runs.
        previous: folder of the stage before.
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        world: World,
        folder: RunFolder,
        state: dict[str, Any] | None,
        pool: DataPool,
        previous: Path | None = None,
    ) -> None:
        self.name, self.recipe, self.world, self.folder = name, recipe, world, folder
        require_named(recipe)
        self.splits: Splits = pool.open(recipe)
        if world.is_main:
            for line in pool.introduce(recipe):
                print(line, flush=True)
        self.setup = setup = set_up(recipe, self.splits, world, previous, pool)
        if world.is_main:
            side = min(setup.input_size[1:])
            shrunk = None if side > SMALL_INPUT else shrunk_note(median_size(self.splits.train), side)
            for line in (*setup.notes, *pool.first_time(shrunk), *pool.first_time(setup.advice)):
                print(line, flush=True)
        self.method, self.input_size, self.precision = setup.method, setup.input_size, setup.precision
        self.frozen, self.optimizer, self.schedule = setup.frozen, setup.optimizer, setup.schedule
        # From here on, and in recipe.yaml, the recipe says which loader, precision and preprocessing it is: alike in
        # all processes.
        loader = "timm" if "timm" in world.gather([setup.loader]) else "resident"
        self.graphs = setup.graphs
        self.recipe = recipe = setup.recipe.replace(
            loader=loader, amp=self.precision.autocast_dtype is not None, cuda_graph=self.graphs is not None
        )
        before = None if previous is None else read_record(previous)
        given = inputs_of(recipe, pool)
        # The stage before says itself what it was given.
        self.inputs = given if before is None or not before.inputs else [*before.inputs, given[-1]]
        self.seconds_before = 0.0 if before is None else before.training_seconds
        self.other_before = 0.0 if before is None else before.other_seconds
        self.trained_before = _trained_before(recipe, self.splits, pool) if before is None else before.trained_before
        if previous is None and self.trained_before and world.is_main:
            print(f"warning: {self.trained_before}", flush=True)
        if world.is_main and (outdated := outdated_plugins(recipe.plugin)):
            print(
                f"warning: {few(outdated)} has changed since it was imported; this trains with the earlier code: load "
                "the recipe again, or restart Python",
                flush=True,
            )
        self.pool = pool
        start = time.perf_counter()
        self.store: FeatureStore | None = None
        if self.frozen is not None:
            self.store = FeatureStore(self.frozen, recipe, self.input_size, world, pool.features, pool.states)
        self.done = TrainState(other_seconds=0.0, ends=[recipe.epochs]) if state is None else self._reached(state)
        begins = type(self.method).begin is not Method.begin
        if (state is None or begins) and recipe.choice("classifier_start") == CLASS_MEANS:
            start_from_class_means(self.method.result_model(), self._passes().train, self.splits.class_names)
        if begins:  # of the network as it starts: what a checkpoint has is restored on top of that
            if world.is_main:
                folder.occupy()  # it may take long
            with self._looking_on():
                self.method.begin(self._passes())
        self.written: list[str] = []  # buffers that the start of the epoch wrote, and no state of the method holds
        if self.done.part is not None:
            self._start_epoch(self.done.epoch)
        if recipe.model_ema:
            self.method.setup_ema(decay=recipe.model_ema_decay)
            require_average(self.method)
        self.generators: dict[str, Any] | None = None  # of this process, where it goes on within an epoch
        self.updates_of_epoch = updates_of_epoch(recipe, len(self.splits.train), world)
        if state is not None:
            self._restore(state)
        if world.world_size > 1:
            self.method.prepare_distributed([world.device.index] if world.device.type == "cuda" else None)
        self.step = create_step(recipe, self.method, self.optimizer, self.precision, self.graphs)
        # Last, since it may take long to decode the images: what does not fit is known by now.
        self.loaders: Loaders = create_loaders(
            self.splits,
            recipe,
            self.input_size,
            world.device,
            world.rank,
            world.world_size,
            pool,
            sampler=recipe.choice("sampler"),
            views=recipe.augmentations(),
            store=self.store,
        )
        if self.done.other_seconds is not None:
            self.done.other_seconds += time.perf_counter() - start
        self.is_new = state is None
        self.checked = False  # whether all that has a gradient is updated, as the first update shows
        self.trackers: list[Tracker] = []
        self.saved_at = time.monotonic()
        self.result: tuple[dict[str, HeadMetrics], AnswerLog] | None = None  # where the last epoch has given it
        self.best_weights: dict[str, Tensor] | None = None  # of the best epoch, where not yet written

    # The run

    def execute(self) -> RunRecord:
        """Train what is left to train, and write the results but for the record, with which the run is finished."""
        recipe, done = self.recipe, self.done
        steps = len(self.loaders.train)
        if self.world.is_main:
            require_trackers(recipe)  # fails before anything is written
            self.folder.occupy()  # or another process would have this run's trackers beside it
            self.trackers = create_trackers(recipe, self.folder.path, resumed=done.epoch > 0)
            self.folder.begin(recipe, describe_environment(self.world), trains=done.epoch < recipe.epochs)
            if done.epoch == 0 and done.part is None:
                self._save()
        begun = 0 if done.part is None else done.part.steps
        self.progress = Progress(recipe.epochs * steps, done.epoch * steps + begun, visible=self.world.is_main)
        try:
            for epoch in range(done.epoch, recipe.epochs):
                self._train_epoch(epoch)
        except Exception as error:
            # Nothing is lost, and the command can be given again once it is mended.
            updated = self.checked and not isinstance(error, NoFirstLossError)
            if self.is_new and not updated and self.world.is_main:
                self.folder.clear()
            raise
        finally:
            self.progress.close()
            for tracker in self.trackers:
                tracker.close()
        return self._finish()

    def _train_epoch(self, epoch: int) -> None:
        recipe, done = self.recipe, self.done
        start = time.perf_counter()
        if done.part is None:  # else the epoch has begun
            self._start_epoch(epoch)
        else:
            self._seed(epoch)
        self.method.synchronize()
        part = done.part or PartOfEpoch(0, unscaled_rate(self.optimizer), {}, 0.0)
        start -= part.seconds
        self.loaders.train.set_epoch(epoch, part.steps)
        round_learning_rates(self.optimizer)
        log = LossLog(epoch, self.method.name, part.losses, part.steps, amp=bool(recipe.amp))
        within = partial(self._after_update, log, part.learning_rate, start)
        losses = train_one_epoch(
            self.method,
            self.loaders.train,
            self.step,
            recipe,
            log,
            self.progress,
            before=self._restore_generators,
            after_update=within,
        )
        done.part = None
        row = Epoch(epoch + 1, part.learning_rate, 0.0, losses)
        if row.epoch % recipe.val_interval == 0 or row.epoch == recipe.epochs:
            # Answers for single images in the last epoch alone, where they are those of the result; intervals by group
            # need them in every epoch, since it may be the best.
            is_last = row.epoch == recipe.epochs and self._last_epoch_is_result()
            groups = self.splits.val.groups
            answers = AnswerLog(groups) if is_last or groups is not None else None
            heads = self._evaluate(self.loaders.val, answers=answers)
            self.result = (heads, answers) if is_last and answers is not None else None
            row.val = epoch_metrics(heads["prediction"])
            if recipe.model_ema:
                row.raw = epoch_metrics(self._evaluate(self.loaders.val, raw=True)["prediction"])
            self._note_best(row.epoch, heads)
        self.schedule.step(row.epoch)
        row.seconds = time.perf_counter() - start
        done.epoch, done.seconds = row.epoch, done.seconds + row.seconds
        done.history.append(row)
        if self.world.is_main:
            due = time.monotonic() - self.saved_at >= recipe.checkpoint_seconds
            if done.epoch == recipe.epochs or due or self._is_due(done.epoch * self.updates_of_epoch):
                self._save()
            for tracker in self.trackers:
                tracker.log(row)
            self.progress.say(epoch_line(row, recipe.epochs))

    def _seed(self, epoch: int) -> None:
        seed_generators(self.recipe.seed, epoch, self.world.rank, self.recipe.stage)

    def _start_epoch(self, epoch: int) -> None:
        """Let the method prepare an epoch, and note which of its buffers it writes that are not persistent.

        What else it sets is refused where a checkpoint may lie within an epoch, which would not have it.
        """
        self._seed(epoch)
        marks = None if self.recipe.checkpoint_steps is None else attribute_marks(self.method)
        before = {name: (id(value), value._version) for name, value in unkept_buffers(self.method).items()}
        self.method.start_epoch(epoch)
        if marks is not None:
            require_kept(self.method, marks, epoch)
        after = unkept_buffers(self.method).items()
        self.written = [name for name, value in after if before.get(name) != (id(value), value._version)]

    def _after_update(self, log: LossLog, learning_rate: float, start: float, steps: int) -> None:
        """Follow an update of the weights: moving average, learning rates, and a checkpoint where one is due.

        Args:
            log: of the epoch.
            learning_rate: at its beginning.
            start: when that was.
            steps: batches of it that are done.
        """
        recipe = self.recipe
        if not self.checked:
            require_optimized(self.method, self.optimizer)
            self.checked = True
        self.method.update_ema()
        updates = log.epoch * self.updates_of_epoch + -(-steps // recipe.grad_accum_steps)
        if recipe.sched_on_updates:
            self.schedule.step_update(updates)
            if steps < len(self.loaders.train):  # else the next epoch does, once it has noted the rate
                round_learning_rates(self.optimizer)
        if steps < len(self.loaders.train) and self._is_due(updates):
            self.method.synchronize()
            log.read()
            self.done.part = PartOfEpoch(steps, learning_rate, log.sums, time.perf_counter() - start)
            generators = of_all(generator_states(self.world.device))
            if self.world.is_main:
                self._save(generators)

    def _is_due(self, updates: int) -> bool:
        """Whether `checkpoint_steps` asks for a checkpoint after so many updates of the run."""
        return self.recipe.checkpoint_steps is not None and updates % self.recipe.checkpoint_steps == 0

    def _restore_generators(self) -> None:
        if self.generators is not None:
            restore_generators(self.generators, self.world.device)
            self.generators = None

    def _passes(self) -> Passes:
        """The images for a method that looks at them beside training."""
        return Passes(self.splits, self.recipe, self.input_size, self.world, self.pool, self.store)

    def _last_epoch_is_result(self) -> bool:
        """Whether the result is what the last epoch's evaluation finds: on its split, of weights that stay."""
        return self.loaders.test is None and type(self.method).finish is Method.finish

    def _evaluate(self, loader: Loader, raw: bool = False, answers: AnswerLog | None = None) -> dict[str, HeadMetrics]:
        """Evaluate the result's weights, or the raw ones where those are a moving average."""
        model = self.method.get_eval_model() if raw else self.method.result_model()
        assert model is not None
        return evaluate(
            model,
            loader,
            self.splits.class_counts,
            device=self.world.device,
            amp_dtype=self.precision.autocast_dtype,
            channels_last=self.recipe.channels_last,
            compile=self.recipe.torchcompile,
            answers=answers,
            graphs=self.graphs,
        )

    def _note_best(self, epoch: int, heads: dict[str, HeadMetrics]) -> None:
        done, last = self.done, Evaluation(self.recipe.val_split, heads, epoch, BEST_WEIGHTS)
        if done.best is None or last.prediction.top1 > done.best.prediction.top1:
            done.best = last
            weights = merged_weights(self.method.result_model())
            self.best_weights = {name: value.clone() for name, value in weights.items()}

    # Saving and restoring

    def _save(self, generators: list[dict[str, Any]] | None = None) -> None:
        """Write what the run has come to; the checkpoint last, since it stands for all of it.

        Args:
            generators: states of each process's, within an epoch; none at its end, for the next one seeds them.
        """
        if self.done.has_trained:
            require_finite(self.method, self.done.epoch - (self.done.part is None))
        if self.best_weights is not None:
            whole = {} if self.frozen is None else self.frozen.state_dict()
            self.folder.write_weights(BEST_WEIGHTS, whole | self.best_weights)
            self.best_weights = None
        if self.done.history:
            write_history(self.folder.path, self.done.history)
        state = {
            **self.method.get_checkpoint_state(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.done),
            "class_counts": self.splits.class_counts.tolist(),
            "inputs": [asdict(each) for each in self.inputs],
            "written": {k: v for k, v in unkept_buffers(self.method).items() if k in self.written},
        }
        if generators is not None:
            state["generators"] = generators
        if self.frozen is not None:
            state["backbone"] = self.frozen.digest
        if self.recipe.model_ema:
            state |= self.method.get_checkpoint_state(ema=True)
        if self.precision.scaler is not None:
            state["scaler"] = self.precision.scaler.state_dict()
        save_checkpoint(self.folder.path, state)
        self.saved_at = time.monotonic()

    def _reached(self, state: dict[str, Any]) -> TrainState:
        """Return how far the run has come by a checkpoint, which must be of the same data and backbone."""
        if state.get("class_counts") != self.splits.class_counts.tolist():
            raise CheckpointError(
                f"{self.folder.path} was trained on different data: its class counts differ; train "
                "these in another folder (--experiment)"
            )
        reached = TrainState.of(state)
        reached.ends = reached.ends or [self.folder.recipe(self.recipe.plugin).epochs]  # of an older checkpoint
        reached.ends = reached.ends_with(self.recipe.epochs)
        self._take_inputs(state, reached)
        if state.get("backbone") != (None if self.frozen is None else self.frozen.digest):
            raise CheckpointError(f"the heads in {self.folder.path} were trained on features of another backbone")
        return reached

    def _restore(self, state: dict[str, Any]) -> None:
        with self._fitting():
            self.method.load_checkpoint_state(state["state_dict"], state.get("task_state"))
            buffers = unkept_buffers(self.method)
            for name, value in state.get("written", {}).items():  # an older checkpoint has none
                if name in buffers:  # else the start of the next epoch makes it
                    buffers[name].copy_(value)
            restore_optimizer(self.optimizer, state["optimizer"])
            if self.recipe.model_ema:
                self.method.load_checkpoint_state(state["state_dict_ema"], state.get("task_state_ema"), ema=True)
            if self.precision.scaler is not None:
                self.precision.scaler.load_state_dict(state["scaler"])
            steps = 0 if self.done.part is None else self.done.part.steps
            # Functions of the epoch, or the update, alone: this recipe's, which may have more epochs than the
            # checkpoint's had.
            if self.done.epoch > 0:
                self.schedule.step(self.done.epoch)
            if self.done.epoch > 0 or steps:
                updates = self.done.epoch * self.updates_of_epoch + steps // self.recipe.grad_accum_steps
                self.schedule.step_update(updates)
            if self.done.part is not None:
                found = state["generators"]
                if len(found) != self.world.world_size:
                    raise CheckpointError(
                        f"the checkpoint in {self.folder.path} was written within an epoch, by "
                        f"{counted(len(found), 'process')}: expected as many, got {self.world.world_size}"
                    )
                self.generators = found[self.world.rank]

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        """Say of what a checkpoint lacks, or has in another shape, that it does not fit."""
        try:
            yield
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            text = f"the checkpoint in {self.folder.path} does not fit: {first_line(error)}"
            raise CheckpointError(text) from None

    @contextmanager
    def _looking_on(self) -> Iterator[None]:
        """Let a method look at images beside training: in evaluation mode, without gradients."""
        self.method.eval()
        with torch.no_grad():
            yield

    def _take_inputs(self, state: dict[str, Any], reached: TrainState) -> None:
        """Compare what the run was given when it began with what it is given now, and keep both."""
        with self._fitting():
            before = inputs_in(state)
        if not before:
            return
        if [each.data for each in before] != [each.data for each in self.inputs]:
            raise CheckpointError(
                f"{self.folder.path} was trained on different data: it had other images, or other labels for them; "
                "train these in another folder (--experiment)"
            )
        if before[-1].class_weights != self.inputs[-1].class_weights:
            raise CheckpointError(f"{self.folder.path} was trained with other class weights: the file has changed")
        if not reached.has_trained:  # by any code
            return
        self.inputs, changed = continued(before, self.inputs)
        if changed and self.world.is_main:
            print(f"warning: {few(changed)} has changed since {self.folder.path} began", flush=True)

    # The results

    def _finish(self) -> RunRecord:
        recipe, done, splits, looked = self.recipe, self.done, self.splits, False
        start = time.perf_counter()
        if type(self.method).finish is not Method.finish:
            share_buffers(self.method.result_model())
            self.graphs = None  # of the model as it was
            self._seed(recipe.epochs)  # alike wherever a run goes on
            with self._looking_on():
                self.method.finish(passes := self._passes())
            looked = passes.opened_held_out
        loader = self.loaders.val if self.loaders.test is None else self.loaders.test
        images, split = splits.opened()[-1], recipe.split_names[-1]
        if self.result is None:  # or of a run that was resumed after its last epoch
            log = AnswerLog(images.groups)
            self.result = self._evaluate(loader, answers=log), log
        heads, log = self.result
        answers = log.read()
        result = Evaluation(split, heads, recipe.epochs or None, WEIGHTS)
        raw = None
        if recipe.model_ema:
            raw = Evaluation(split, self._evaluate(loader, raw=True, answers=AnswerLog(images.groups)), result.epoch)
        chosen = reported_numbers(self.method)
        replaced = self.world.gather(self.loaders.train.broken_images())
        lost = self.world.gather(self.loaders.left_out_images())
        other_seconds = None
        if done.other_seconds is not None and self.other_before is not None:
            other_seconds = self.other_before + done.other_seconds + time.perf_counter() - start
        record = RunRecord(
            name=self.name,
            model=recipe.model,
            method=recipe.method["name"],
            stages=[stage.method["name"] for stage in recipe.chain()],
            prediction_heads=list(prediction_heads(self.method.result_model())),
            dataset=recipe.dataset,
            loader=recipe.loader,
            precision=self.precision.name,
            epochs=recipe.epochs,
            seed=recipe.seed,
            class_counts=splits.class_counts.tolist(),
            class_names=None if splits.class_names is None else list(splits.class_names),
            result=result,
            raw=raw,
            best=done.best,
            chosen=chosen,
            chosen_on=splits.held_out_from if chosen and looked else None,
            training_seconds=done.seconds + self.seconds_before,
            replaced_images=replaced,
            left_out_images=lost,
            environment=describe_environment(self.world),
            held_out=images.chosen or None,
            origin=self.setup.origin,
            inputs=self.inputs,
            trained_before=self.trained_before or None,
            left_out={why: names[:LISTED] for why, names in left_out(splits.opened()).items()},
            unread_classes=unread_classes(splits.train, replaced),
            unmeasured_classes=unread_classes(images, lost),
            other_seconds=other_seconds,
            extended_from=done.ends[:-1],
        )
        if self.world.is_main:
            self.setup.write_result(self.folder, splits, self.name.partition(".")[2])
            write_answers(self.folder.path, answers, images, splits.class_counts, splits.class_names, recipe.data_dir)
            write_errors(self.folder.path, answers, images, splits.class_names, recipe.data_dir)
        return record


def _trained_before(recipe: Recipe, splits: Splits, pool: DataPool) -> str:
    """Return a line on the evaluated images that the run was trained on whose weights a recipe starts from."""
    start, images, split = start_of(recipe), splits.opened()[-1], recipe.split_names[-1]
    if start is None:
        return ""
    folder = start if start.is_dir() else start.parent
    return evaluated_line(folder, split, images, recipe, pool, " by the run that this one starts from")
