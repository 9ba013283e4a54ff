"""What the benchmark measures, and the targets."""

from dataclasses import dataclass, field

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
# Runs at once, as `mbib sweep --jobs` has them: on two cores, and on one CUDA device.
CPU_JOBS, SWEEP_JOBS = 2, 3


@dataclass(frozen=True)
class Machine:
    """What a target depends on.

    Attributes:
        device: its type.
        hardware: name of the accelerator, or of the processor; empty where it is not known.
    """

    device: str
    hardware: str = ""


@dataclass(frozen=True)
class Targets:
    """A row's targets; None where it is there for information.

    Attributes:
        cpu: on two cores.
        cuda: on one H100.
        h200: on one H200, where that is another.
    """

    cpu: float | None = None
    cuda: float | None = None
    h200: float | None = None

    def on(self, machine: Machine) -> float | None:
        """Return the target of a machine."""
        if machine.device == "cuda":
            return self.h200 if self.h200 is not None and "H200" in machine.hardware else self.cuda
        return self.cpu if machine.device == "cpu" else None


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        measurement: what to ask `--only` for.
        what: is measured, with its unit where it is no ratio.
        targets: of the row.
        at_least: the target is a lower bound, else an upper one.
        cpu_flags: that the measurement needs besides on a CPU.
        only: the one type of device that measures it; None for any.
    """

    measurement: str
    what: str
    targets: Targets = field(default_factory=Targets)
    at_least: bool = False
    cpu_flags: str = ""
    only: str | None = None

    def is_measured_on(self, device: str) -> bool:
        """Return whether a type of device measures the row."""
        return self.only in (None, device)

    def target(self, machine: Machine) -> float | None:
        """Return the target on a machine; that of the device which measures the row, where this one does not."""
        return self.targets.on(machine if self.is_measured_on(machine.device) else Machine(str(self.only)))

    def command(self, device: str) -> str:
        """Return the command that measures the row."""
        chosen = device if self.is_measured_on(device) else str(self.only)
        command = f"python tools/benchmark.py --device {chosen} --only {self.measurement}"
        return f"{command} {self.cpu_flags}" if self.cpu_flags and chosen == "cpu" else command


ROWS = {
    "pipeline": Row(
        "pipeline",
        "ResNet32, CIFAR-100-LT IF100: training images/s over timm's loader and loop, on the CPU in float32",
        Targets(1.2, 4),
        at_least=True,
    ),
    "pipeline-mbib": Row("pipeline", "MBIB-ResNet32's training images/s over the same"),
    "pipeline-convolutions": Row("pipeline", "ResNet32's convolutions alone over the same: the ceiling"),
    "side-by-side": Row(
        "side-by-side",
        "ResNet32, bf16, two runs at once on a thread each: training images/s of both over timm's loop in float32",
        Targets(cpu=2.0),
        at_least=True,
        only="cpu",
    ),
    "side-by-side-float32": Row(
        "side-by-side", "the same, both in float32", Targets(cpu=1.2), at_least=True, only="cpu"
    ),
    "side-by-side-bf16": Row("side-by-side", "two runs in bf16 over timm's loop in bf16", only="cpu"),
    "side-by-side-timm": Row(
        "side-by-side", "the same over two of timm's loops at once in bf16, on a thread each", only="cpu"
    ),
    "step-resnet32": Row("step-resnet32", "MBIB step / plain step, ResNet32, compiled", Targets(1.03, 1.10)),
    "step-resnet32-eager": Row("step-resnet32", "the same, eager"),
    **{
        f"step-methods-{title}": Row("step-methods", f"{title} step / CE step, ResNet32; on the CPU eager")
        for title in METHOD_RECIPES
    },
    "augmentation": Row(
        "augmentation",
        "ResNet32, cross-entropy: an epoch with AutoAugment and Cutout / one with crop and flip alone",
        Targets(1.1, 1.1),
    ),
    "augmentation-views": Row("augmentation", "batches of PaCo's two views / of crop and flip alone, no training"),
    "step-resnext50": Row(
        "step-resnext50",
        "MBIB step / plain step, ResNeXt50 at 224 px, compiled",
        Targets(1.03, 1.03),
        cpu_flags="--torchcompile-large",
    ),
    "step-resnext50-eager": Row("step-resnext50", "the same, eager", Targets(1.03)),
    "memory-resnet32": Row("memory-resnet32", "peak memory MBIB / plain, ResNet32", Targets(1.05, 1.05)),
    "memory-resnext50": Row("memory-resnext50", "peak memory MBIB / plain, ResNeXt50", Targets(1.05, 1.05)),
    "evaluate-resnet32": Row("evaluate-resnet32", "MBIB evaluation / plain evaluation, ResNet32", Targets(1.02, 1.10)),
    "evaluate-resnet32-forward": Row("evaluate-resnet32", "MBIB evaluation / plain forward pass alone, ResNet32"),
    "evaluate-resnext50": Row(
        "evaluate-resnext50", "MBIB evaluation / plain evaluation, ResNeXt50", Targets(cuda=1.02), only="cuda"
    ),
    "evaluate-resnext50-forward": Row(
        "evaluate-resnext50", "MBIB evaluation / plain forward pass alone, ResNeXt50", only="cuda"
    ),
    "predict-resnet32": Row(
        "predict-resnet32",
        "`mbib predict` on 2,000 PNG files of 32 px to CSV / the forward pass alone, MBIB-ResNet32",
        Targets(1.25, 10),
    ),
    "predict-resnet32-reading": Row("predict-resnet32", "reading and decoding those files alone / the same"),
    "predict-resnext50": Row(
        "predict-resnext50",
        "`mbib predict` on 2,000 JPEG files of 375x500 to CSV / the forward pass alone, MBIB-ResNeXt50",
        Targets(cuda=1.5),
        only="cuda",
    ),
    "predict-resnext50-reading": Row(
        "predict-resnext50", "reading and decoding those files alone / the same", only="cuda"
    ),
    "epochs-200": Row(
        "epochs-200",
        "200 epochs CIFAR-100-LT IF100 MBIB-ResNet32, evaluation every 5, compiling excluded: seconds",
        Targets(cuda=30),
        only="cuda",
    ),
    "epochs-200-whole": Row("epochs-200", "the same with start, checkpoints and figures: seconds", only="cuda"),
    "epochs-200-sweep": Row(
        "epochs-200-sweep",
        f"such runs, {SWEEP_JOBS} at once on one device: seconds a run",
        Targets(cuda=20),
        only="cuda",
    ),
    "throughput-resnext50": Row(
        "throughput-resnext50",
        "MBIB-ResNeXt50 at 224 px, bf16, resident images: training images/s",
        Targets(cuda=3300, h200=4400),
        at_least=True,
        only="cuda",
    ),
    "start": Row(
        "start", "`mbib train` until the first step begins, after importing torch and timm: seconds", Targets(1, 2)
    ),
    "start-step": Row("start", "the same until the first step is done: seconds"),
    "start-list": Row(
        "start-list",
        "the same until the first step begins, 10,000,000 images in 10,000 classes by list: seconds",
        Targets(15),
    ),
    "start-list-memory": Row(
        "start-list", "peak memory that it adds to torch and timm until then, images left on the disk: GB", Targets(1)
    ),
    "memory-classes": Row(
        "memory-classes",
        "memory of loss and evaluation over the logits, 100,000 classes: the most of CE, focal, BSCE, LDAM, (M)BIB",
        Targets(3, 3),
    ),
}
MEASUREMENTS = tuple(dict.fromkeys(row.measurement for row in ROWS.values()))


def verdict(row: Row, median: float | None, machine: Machine) -> str:
    """Return whether a row meets its target, by how much it does not, or what would measure it."""
    if median is None:
        return f"not measured: `{row.command(machine.device)}`"
    target = row.target(machine)
    if target is None:
        return "for information"
    missed = 1 - median / target if row.at_least else median / target - 1
    return "met" if missed <= 0 else f"missed by {100 * missed:.1f} %"
