"""What the benchmark measures, and the targets."""

from collections.abc import Mapping
from dataclasses import dataclass

# Methods whose step is measured against that of cross-entropy: the name of each one's row, and its recipe.
METHOD_RECIPES = {
    "BSCE": "cifar_resnet32.bsce_cifar100_lt_if100",
    "LDAM-DRW": "cifar_resnet32.ldam_drw_cifar100_lt_if100",
    "MBIB": "mbib_resnet32.cifar100_lt_if100",
    "DiVE": "cifar_resnet32.dive_cifar100_lt_if100",
    "PaCo": "cifar_resnet32.paco_cifar100_lt_if100",
    "SADE": "experts_resnet32.sade_cifar100_lt_if100",
    "SADE + MBIB": "mbib_experts_resnet32.sade_mbib_cifar100_lt_if100",
}

# Methods whose loss of 100,000 classes is measured, and a network that each takes.
LOSSES_OF_CLASSES = {
    "ce": "cifar_resnet20",
    "focal": "cifar_resnet20",
    "bsce": "cifar_resnet20",
    "ldam_drw": "cifar_resnet20",
    "bib": "bib_resnet20",
    "mbib": "mbib_resnet20",
    "se_mbib": "mbib_resnet20",
    "all_mbib": "mbib_resnet20",
}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        measurement: what to ask `--only` for.
        what: is measured, with its unit where it is no ratio.
        targets: by type of device; none for a row that is there for information.
        at_least: the target is a lower bound, else an upper one.
        flags: that the measurement needs besides, by type of device.
        cuda_only: other devices do not measure it.
    """

    measurement: str
    what: str
    targets: Mapping[str, float]
    at_least: bool = False
    flags: Mapping[str, str] | None = None
    cuda_only: bool = False

    def target(self, device: str) -> float | None:
        """Return the target on a type of device."""
        return self.targets.get("cuda" if self.cuda_only else device)

    def command(self, device: str) -> str:
        """Return the command that measures the row."""
        chosen = "cuda" if self.cuda_only else device
        command = f"python tools/benchmark.py --device {chosen} --only {self.measurement}"
        return " ".join([command, *filter(None, [(self.flags or {}).get(chosen)])])


def both(cpu: float, cuda: float) -> dict[str, float]:
    """Return targets by device."""
    return {"cpu": cpu, "cuda": cuda}


ROWS = {
    "pipeline": Row(
        "pipeline",
        "ResNet32, CIFAR-100-LT IF100: training images/s over timm's loader and loop",
        both(1.6, 10),
        at_least=True,
    ),
    "pipeline-mbib": Row("pipeline", "MBIB-ResNet32's training images/s over the same", {}),
    "pipeline-convolutions": Row("pipeline", "ResNet32's convolutions alone over the same: the ceiling", {}),
    "step-resnet32": Row("step-resnet32", "MBIB step / plain step, ResNet32, compiled", both(1.05, 1.15)),
    "step-resnet32-eager": Row("step-resnet32", "the same, eager", {}),
    **{
        f"step-methods-{title}": Row("step-methods", f"{title} step / CE step, ResNet32; on the CPU eager", {})
        for title in METHOD_RECIPES
    },
    "augmentation": Row(
        "augmentation",
        "ResNet32, cross-entropy: an epoch with AutoAugment and Cutout / one with crop and flip alone",
        both(1.1, 1.1),
    ),
    "augmentation-views": Row("augmentation", "batches of PaCo's two views / of crop and flip alone, no training", {}),
    "step-resnext50": Row(
        "step-resnext50",
        "MBIB step / plain step, ResNeXt50 at 224 px, compiled",
        both(1.03, 1.03),
        flags={"cpu": "--torchcompile-large"},
    ),
    "step-resnext50-eager": Row("step-resnext50", "the same, eager", {"cpu": 1.03}),
    "memory-resnet32": Row("memory-resnet32", "peak memory MBIB / plain, ResNet32", both(1.05, 1.05)),
    "memory-resnext50": Row("memory-resnext50", "peak memory MBIB / plain, ResNeXt50", both(1.05, 1.05)),
    "evaluate-resnet32": Row("evaluate-resnet32", "MBIB evaluation / plain evaluation, ResNet32", both(1.02, 1.02)),
    "evaluate-resnet32-forward": Row("evaluate-resnet32", "MBIB evaluation / plain forward pass alone, ResNet32", {}),
    "evaluate-resnext50": Row(
        "evaluate-resnext50", "MBIB evaluation / plain evaluation, ResNeXt50", {"cuda": 1.02}, cuda_only=True
    ),
    "evaluate-resnext50-forward": Row(
        "evaluate-resnext50", "MBIB evaluation / plain forward pass alone, ResNeXt50", {}, cuda_only=True
    ),
    "predict-resnet32": Row(
        "predict-resnet32",
        "`mbib predict` on 2,000 PNG files of 32 px to CSV / the forward pass alone, MBIB-ResNet32",
        both(1.25, 10),
    ),
    "predict-resnet32-reading": Row("predict-resnet32", "reading and decoding those files alone / the same", {}),
    "predict-resnext50": Row(
        "predict-resnext50",
        "`mbib predict` on 2,000 JPEG files of 375x500 to CSV / the forward pass alone, MBIB-ResNeXt50",
        {"cuda": 1.5},
        cuda_only=True,
    ),
    "predict-resnext50-reading": Row(
        "predict-resnext50", "reading and decoding those files alone / the same", {}, cuda_only=True
    ),
    "epochs-200": Row(
        "epochs-200",
        "200 epochs CIFAR-100-LT IF100 MBIB-ResNet32, evaluation included, compiling excluded: seconds",
        {"cuda": 18},
        cuda_only=True,
    ),
    "epochs-200-whole": Row("epochs-200", "the same with start, checkpoints and figures: seconds", {}, cuda_only=True),
    "throughput-resnext50": Row(
        "throughput-resnext50",
        "MBIB-ResNeXt50 at 224 px, bf16, resident images: training images/s",
        {"cuda": 4400},
        at_least=True,
        cuda_only=True,
    ),
    "start": Row(
        "start", "`mbib train` until the first step begins, after importing torch and timm: seconds", both(1, 2)
    ),
    "start-step": Row("start", "the same until the first step is done: seconds", {}),
    "start-list": Row(
        "start-list",
        "the same until the first step begins, 10,000,000 images in 10,000 classes by list: seconds",
        {"cpu": 15},
    ),
    "start-list-memory": Row(
        "start-list", "peak memory that it adds to torch and timm until then, images left on the disk: GB", {"cpu": 1}
    ),
    "memory-classes": Row(
        "memory-classes",
        "memory of loss and evaluation over the logits, 100,000 classes: the most of CE, focal, BSCE, LDAM, (M)BIB",
        both(3, 3),
    ),
}
MEASUREMENTS = tuple(dict.fromkeys(row.measurement for row in ROWS.values()))


def verdict(row: Row, median: float | None, device: str) -> str:
    """Return whether a row meets its target, by how much it does not, or what would measure it."""
    if median is None:
        return f"not measured: `{row.command(device)}`"
    target = row.target(device)
    if target is None:
        return "for information"
    missed = 1 - median / target if row.at_least else median / target - 1
    return "met" if missed <= 0 else f"missed by {100 * missed:.1f} %"
