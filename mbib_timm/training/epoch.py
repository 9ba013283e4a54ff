"""One epoch of training: steps without waits, losses checked where a line is due."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import count

import torch
from torch import Tensor

from mbib_timm.data import TrainLoader
from mbib_timm.environment import is_distributed, of_all
from mbib_timm.errors import MbibError, NoFirstLossError, NonFiniteLossError, few
from mbib_timm.methods import Method
from mbib_timm.progress import Progress
from mbib_timm.recipe import Recipe
from mbib_timm.training.step import TrainingStep

DIVERGED = (
    "the last good checkpoint is untouched. Try a lower --lr, a longer warm-up or --clip-grad 5, as a run of its own "
    "(--experiment NAME)"
)


class LossLog:
    """Loss parts of the steps of an epoch, kept on the device until someone asks.

    Args:
        epoch: counted from 0; the error message counts from 1, as all messages do.
        method: that gives the loss parts, for messages.
        sums: of the loss parts by name, of the steps before; alike in all processes.
        steps: those.
        amp: whether precision is mixed, for messages.
    """

    def __init__(
        self, epoch: int, method: str, sums: Mapping[str, float] | None = None, steps: int = 0, amp: bool = False
    ) -> None:
        self.epoch, self.method, self.amp = epoch, method, amp
        self.sums, self.steps = dict(sums or {}), steps
        self.names = tuple(self.sums)
        self.pending: list[Tensor] = []

    def add(self, parts: dict[str, Tensor]) -> None:
        """Add a step's scalars; nothing waits for the device.

        Args:
            parts: by name, in any order.

        Raises:
            MbibError: they have other names than those of the steps before.
        """
        self.names = self.names or tuple(parts)
        if parts.keys() != set(self.names):
            raise MbibError(
                f"method {self.method!r}: expected the same loss parts in every step of an epoch, as in those before "
                f"{', '.join(self.names)}; got {', '.join(parts)}"
            )
        self.pending.append(torch.stack([parts[name].float() for name in self.names]))

    def read(self) -> dict[str, float]:
        """Fetch what was added and return the means so far, of all processes. This waits for them, and for the device.

        Raises:
            NonFiniteLossError: a loss part was infinite or not a number, in any process; names epoch, step and part.
            NoFirstLossError: it was so in the first step, which is no matter of the learning rate.
        """
        rows = torch.stack(self.pending).tolist() if self.pending else []
        self.pending.clear()
        problem = next(filter(None, map(self._problem, count(self.steps), rows)), None)
        problems, rows_of_all = zip(*of_all((problem, rows)), strict=True)
        # All stop here together: one that went on alone would wait for the others. A first step is before all others.
        first = next((error for error in problems if isinstance(error, NoFirstLossError)), None)
        if (error := first or next(filter(None, problems), None)) is not None:
            raise error
        for step in zip(*rows_of_all, strict=True):
            values = [sum(part) / len(step) for part in zip(*step, strict=True)]
            self.sums = {name: self.sums.get(name, 0.0) + v for name, v in zip(self.names, values, strict=True)}
        self.steps += len(rows)
        return {name: total / self.steps for name, total in self.sums.items()}

    def _problem(self, step: int, values: list[float]) -> NonFiniteLossError | None:
        """Return an error of what is wrong with the loss parts of a step, counted from 0; None for nothing."""
        bad = next(((name, v) for name, v in zip(self.names, values, strict=True) if not math.isfinite(v)), None)
        if bad is None:
            return None
        where = f" in process {torch.distributed.get_rank()}" if is_distributed() else ""
        if self.epoch == step == 0:
            part = "the loss" if bad[0] == "loss" else f"loss part {bad[0]!r}"
            return NoFirstLossError(
                f"method {self.method!r}: {part} is {bad[1]} before any update{where}: look at its formula and "
                f"settings, and at the weights that it starts from{'; or try --no-amp' if self.amp else ''}"
            )
        return NonFiniteLossError(
            f"loss part {bad[0]!r} became {bad[1]} at epoch {self.epoch + 1}, step {step + 1}{where}; {DIVERGED}"
        )


def require_finite(method: Method, epoch: int) -> None:
    """Raise NonFiniteLossError where a weight is not finite: each loss is that of before an update. This waits for the
    device.

    Args:
        method: whose weights train.
        epoch: that they are of, from 0.
    """
    named = list(method.trainable_parameters())
    finite = torch.stack([weights.isfinite().all() for _, weights in named]).tolist() if named else []
    if bad := [name for (name, _), good in zip(named, finite, strict=True) if not good]:
        raise NonFiniteLossError(f"weights became infinite or nan in epoch {epoch + 1}: {few(bad)}; {DIVERGED}")


def train_one_epoch(
    method: Method,
    loader: TrainLoader,
    take_step: TrainingStep,
    recipe: Recipe,
    log: LossLog,
    progress: Progress,
    after_update: Callable[[int], None],
    before: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Train for one epoch.

    Args:
        method: what is trained.
        loader: gives the batches; its epoch, and the first batch, are set already.
        take_step: trains on a batch per stream.
        recipe: accumulation and logging.
        log: of the epoch; has the losses of the batches before the first.
        progress: told about each step.
        after_update: called after each update of the weights, outside the step, with the number of batches done.
        before: called before the first step, when the first batch is there.

    Returns:
        The means of the loss parts over the epoch's steps.

    Raises:
        NonFiniteLossError: a loss part was infinite or not a number.
        MbibError: the loss parts have other names than in the steps before.
    """
    method.train()
    first, steps = log.steps, len(loader)
    group = recipe.grad_accum_steps
    for step, batches in enumerate(loader, start=first):
        if step == first:
            before()
        batches = tuple(batch.laid_out(recipe.channels_last) for batch in batches)
        update = (step + 1) % group == 0 or step + 1 == steps
        # The last group of an epoch may be shorter.
        accumulate = min(group, steps - step // group * group)
        with nullcontext() if update else method.no_sync():
            parts = take_step(batches, accumulate, update)
        log.add(parts)
        if update:
            after_update(step + 1)
        progress.step()
        if (step + 1) % recipe.log_interval == 0:
            progress.status(f"epoch {log.epoch + 1} loss {log.read()['loss']:.3f}")
    return log.read()
