"""A run from recipe to results: set up, train epoch by epoch, evaluate, save; resumable after any of these."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from mbib_timm.data import DataPool, Loaders, Splits, choose_loader, create_loaders
from mbib_timm.environment import World, describe_environment, join_world, leave_world
from mbib_timm.errors import CheckpointError, MbibError
from mbib_timm.evaluation import evaluate
from mbib_timm.losses import create_loss
from mbib_timm.progress import Progress
from mbib_timm.recipe import Recipe
from mbib_timm.training.checkpoint import load_checkpoint, load_newest, save_checkpoint
from mbib_timm.training.epoch import train_one_epoch
from mbib_timm.training.optimization import Precision, create_optimizer, create_schedule, round_learning_rates
from mbib_timm.training.report import SHOT_METRICS, draw_figures, epoch_line, print_report
from mbib_timm.training.run_folder import RunFolder
from mbib_timm.training.seeding import seed_generators
from mbib_timm.training.setup import build_model, input_size
from mbib_timm.training.step import create_step
from mbib_timm.training.task import TASKS, head_names
from mbib_timm.training.trackers import Tracker, create_trackers


@dataclass
class Progressed:
    """How far a run has come: what a checkpoint holds beside the weights."""

    epoch: int = 0  # epochs done
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    seconds: float = 0.0


def train(recipe: Recipe, name: str, pool: DataPool | None = None) -> dict[str, Any]:
    """Train a recipe to the end and write its results.

    Args:
        recipe: what to train.
        name: name of the run, and of its folder unless the recipe names another.
        pool: holds opened data and resident images for the next run of this process.

    Returns:
        The content of ``metrics.json``, with the run's folder under ``folder``.

    Raises:
        MbibError: the recipe, the data or the output folder do not allow the run; nothing is written.
        NonFiniteLossError: training diverged; the last good checkpoint is kept.
    """
    world = join_world(recipe.device)
    try:
        recipe, folder, state = _find_folder(recipe, name, world)
        try:
            return Run(recipe, name, world, folder, state, pool or DataPool()).execute()
        finally:
            folder.end()
    finally:
        leave_world()


def _find_folder(recipe: Recipe, name: str, world: World) -> tuple[Recipe, RunFolder, dict[str, Any] | None]:
    """Return the recipe, the run's folder and the state to resume from, or None to start from the beginning.

    A run that is resumed keeps the loader that it chose when it started.
    """
    folder = RunFolder(Path(recipe.output) / (recipe.experiment or name))
    checkpoint = None
    if recipe.resume not in (None, "auto"):
        path = Path(str(recipe.resume))
        if not path.exists():
            raise CheckpointError(f"nothing to resume at {path}; --resume auto looks in {folder.path}")
        checkpoint = path if path.is_file() else None
        folder = RunFolder(path.parent if path.is_file() else path)
    if recipe.resume is None:
        if world.is_main:
            folder.require_free()
        return recipe, folder, None
    if not folder.has_checkpoint():
        if recipe.resume != "auto":
            raise CheckpointError(f"nothing to resume in {folder.path}: it holds no checkpoint")
        return recipe, folder, None
    recipe = folder.agree(recipe)
    warn: Callable[[str], None] = print if world.is_main else lambda text: None
    return recipe, folder, load_checkpoint(checkpoint) if checkpoint else load_newest(folder.path, warn)


class Run:
    """One training run.

    Args:
        recipe: what to train.
        name: the run's name.
        world: this process among the run's processes.
        folder: where the run writes.
        state: the checkpoint to resume from, or None.
        pool: shares data with other runs.
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        world: World,
        folder: RunFolder,
        state: dict[str, Any] | None,
        pool: DataPool,
    ) -> None:
        self.name, self.world, self.folder = name, world, folder
        self.splits: Splits = pool.open(recipe)
        seed_generators(recipe.seed, -1, 0)  # every process starts from the same weights
        model = build_model(recipe, self.splits.num_classes)
        memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        model.to(world.device, memory_format=memory_format)  # type: ignore[call-overload]
        self.model, self.input_size = model, input_size(recipe, model)
        # From here on, and in recipe.yaml, the recipe says which loader it is: the same in all processes.
        chosen = world.gather([choose_loader(self.splits, recipe, self.input_size, world.device)])
        self.recipe = recipe = recipe.replace(loader="timm" if "timm" in chosen else "resident")
        loss = create_loss(recipe, self.splits.class_counts, head_names(model))
        self.task = TASKS[recipe.task](model, loss, world.device)
        self.optimizer = create_optimizer(recipe, model)
        self.schedule = create_schedule(recipe, self.optimizer)
        self.precision = Precision.of(recipe, world.device)
        if recipe.model_ema:
            self.task.setup_ema(decay=recipe.model_ema_decay)
        self.done = Progressed()
        if state is not None:
            self._restore(state)
        self._prepare_processes()
        self.step = create_step(recipe, self.task, self.optimizer, self.precision, world)
        self.loaders: Loaders = create_loaders(
            self.splits,
            recipe,
            self.input_size,
            world.device,
            world.rank,
            world.world_size,
            pool,
            sampler=recipe.sampler or "instance",
        )
        self.trackers: list[Tracker] = []
        self.saved_at = time.monotonic()
        self.best_weights: dict[str, Tensor] | None = None  # of the best epoch, where not yet written

    def _prepare_processes(self) -> None:
        distributed = self.world.world_size > 1
        if distributed and self.recipe.sync_bn:
            if self.world.device.type != "cuda":
                raise MbibError(f"sync_bn needs CUDA devices; torch has no such layer for {self.world.device.type}")
            self.task.trainable_module = nn.SyncBatchNorm.convert_sync_batchnorm(self.task.trainable_module)
        if distributed:
            on_cuda = self.world.device.type == "cuda"
            self.task.prepare_distributed(device_ids=[self.world.device.index] if on_cuda else None)

    # The run

    def execute(self) -> dict[str, Any]:
        """Train what is left to train, and write the results."""
        recipe, done = self.recipe, self.done
        steps = len(self.loaders.train)
        if self.world.is_main:
            self.trackers = create_trackers(recipe, self.folder.path, self.name)  # fails before anything is written
            self.folder.begin(recipe, describe_environment(self.world))
            if done.epoch == 0:
                self._save()
        self.progress = Progress(recipe.epochs * steps, done.epoch * steps, visible=self.world.is_main)
        try:
            for epoch in range(done.epoch, recipe.epochs):
                self._train_epoch(epoch)
        finally:
            self.progress.close()
            for tracker in self.trackers:
                tracker.close()
        return self._finish()

    def _train_epoch(self, epoch: int) -> None:
        recipe, done = self.recipe, self.done
        start = time.perf_counter()
        seed_generators(recipe.seed, epoch, self.world.rank)
        self.loaders.train.set_epoch(epoch)
        # With layer_decay the heads' rate, which is the recipe's.
        learning_rate = max(group["lr"] for group in self.optimizer.param_groups)
        round_learning_rates(self.optimizer)
        losses = train_one_epoch(
            self.task,
            self.loaders.train,
            self.step,
            recipe,
            epoch,
            self.progress,
            after_update=self.task.update_ema,
        )
        row = {"epoch": epoch, "lr": learning_rate} | {f"train_{name}": value for name, value in losses.items()}
        if (epoch + 1) % recipe.val_interval == 0 or epoch + 1 == recipe.epochs:
            heads = self._evaluate(self.loaders.val)
            row |= {f"val_{name}": heads["prediction"][name] for name in SHOT_METRICS}
            self._note_best(epoch, heads)
        self.schedule.step(epoch + 1)
        row["seconds"] = time.perf_counter() - start
        done.epoch, done.seconds = epoch + 1, done.seconds + row["seconds"]
        done.history.append(row)
        if self.world.is_main:
            if done.epoch == recipe.epochs or time.monotonic() - self.saved_at >= recipe.checkpoint_seconds:
                self._save()
            for tracker in self.trackers:
                tracker.log(row)
            self.progress.say(epoch_line(row, recipe.epochs))

    def _evaluate(self, loader: Any) -> dict[str, dict[str, Any]]:
        return evaluate(
            self._result_model(),
            loader,
            self.splits.class_counts,
            device=self.world.device,
            amp_dtype=self.precision.autocast_dtype,
            channels_last=self.recipe.channels_last,
            compile=self.recipe.torchcompile,
        )

    def _result_model(self) -> nn.Module:
        """The model whose weights are the result: the moving average where there is one."""
        return unwrap_model(self.task.get_trainable_module(ema=self.recipe.model_ema))

    def _note_best(self, epoch: int, heads: dict[str, dict[str, Any]]) -> None:
        done = self.done
        done.last = {"epoch": epoch, "heads": heads}
        if done.best is None or heads["prediction"]["top1"] > done.best["heads"]["prediction"]["top1"]:
            done.best = done.last
            weights = self._result_model().state_dict()
            self.best_weights = {name: value.clone() for name, value in weights.items()}

    # Saving and restoring

    def _save(self) -> None:
        """Write what the run has come to; the checkpoint last, since it stands for all of it."""
        if self.best_weights is not None:
            self.folder.write_weights("best.safetensors", self.best_weights)
            self.best_weights = None
        if self.done.history:
            self.folder.write_summary(self.done.history)
        state = {
            "model": unwrap_model(self.task.trainable_module).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": vars(self.done),
            "class_counts": self.splits.class_counts.tolist(),
        }
        if self.recipe.model_ema:
            state["model_ema"] = unwrap_model(self.task.trainable_module_ema).state_dict()
        if self.precision.scaler is not None:
            state["scaler"] = self.precision.scaler.state_dict()
        save_checkpoint(self.folder.path, state)
        self.saved_at = time.monotonic()

    def _restore(self, state: dict[str, Any]) -> None:
        if state["class_counts"] != self.splits.class_counts.tolist():
            raise CheckpointError(
                f"{self.folder.path} was trained on other data: its classes had other numbers of images"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            if self.recipe.model_ema:
                unwrap_model(self.task.trainable_module_ema).load_state_dict(state["model_ema"])
            if self.precision.scaler is not None:
                self.precision.scaler.load_state_dict(state["scaler"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint in {self.folder.path} does not fit: {error}") from None
        self.done = Progressed(**state["progress"])

    # The results

    def _finish(self) -> dict[str, Any]:
        recipe, done, splits = self.recipe, self.done, self.splits
        if done.last is None or done.best is None:
            raise MbibError(f"{self.folder.path} has no evaluated epoch")
        test = self._evaluate(self.loaders.test) if self.loaders.test is not None else None
        on_split = recipe.test_split or "test" if test is not None else recipe.val_split
        metrics: dict[str, Any] = {
            "name": self.name,
            "model": recipe.model,
            "loss": recipe.loss,
            "dataset": recipe.dataset,
            "loader": recipe.loader,
            "epochs": recipe.epochs,
            "seed": recipe.seed,
            "num_classes": splits.num_classes,
            "class_counts": splits.class_counts.tolist(),
            "class_names": None if splits.class_names is None else list(splits.class_names),
            "result": {
                "epoch": done.last["epoch"],
                "weights": "model.safetensors",
                "split": on_split,
                "heads": test if test is not None else done.last["heads"],
            },
            "best": {**done.best, "weights": "best.safetensors", "selected_on": recipe.val_split},
            "training_seconds": done.seconds,
            "replaced_images": self.world.gather(self.loaders.broken_images()),
            "environment": describe_environment(self.world),
        }
        if self.world.is_main:
            self.folder.write_model(
                self._result_model(),
                input_size=self.input_size,
                recipe=recipe,
                class_counts=splits.class_counts,
                class_names=splits.class_names,
                logit_prior=getattr(self.task.criterion, "logit_prior", None),
                tag=self.name.partition(".")[2],
            )
            self.folder.write_json("metrics.json", metrics)
            draw_figures(self.folder.path, done.history, metrics)
            print_report(self.folder.path, metrics)
        return {**metrics, "folder": str(self.folder.path)}
