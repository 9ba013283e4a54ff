#!/usr/bin/env python
"""Make the most of a GPU for a given time: checks, the benchmark, then training runs in the order of their value.

    python tools/pack.py mbib_resnet32.cifar100_lt_if10 -o cifar.tar --format webp    # before: the data as one file
    python tools/gpu.py cifar.tar -o out --minutes 28                                 # on the machine with the GPU
    python tools/gpu.py cifar.tar -o out2 --minutes 28 --from out                     # goes on where that stopped
    python tools/gpu.py --dry-run -o out --minutes 5                                  # on a CPU, with the digits
    python tools/gpu.py --list                                                        # what would be done

The packed images of imbalance factor 10 hold those of 50 and 100, and recipes choose the same of them in the same order
as of the whole data: classes are shuffled by their size alone. Each phase is a command of this repository, with its log
in `logs/<phase>.txt`. Runs are sweeps with `--jobs`, which resume, and whose results are written as each run ends.
When the time is nearly up the phase that is running is interrupted, and its runs keep their checkpoints. Three archives
are renewed every minute and at the end, so that what is done survives: `results.tar` (records, tables, figures, logs),
`weights.tar` (of finished runs of seed 0) and `checkpoints.tar` (of runs that are not finished, for `--from`).
"""

import argparse
import contextlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from mbib_timm.data import open_data
from mbib_timm.errors import MbibError
from mbib_timm.files import write_bytes
from mbib_timm.models.zoo import data_set_of
from mbib_timm.recipe import change_recipe, find_recipe, load_recipe, longest_epochs
from mbib_timm.results.record import RECORD

ROOT = Path(__file__).parents[1]
# What the runs of a phase that is interrupted may take to end, and what the archives may take, in seconds.
GRACE, ARCHIVING, RENEWED_EVERY = 20.0, 20.0, 60.0
WHOLE = "mbib_resnet32.cifar100_lt_if10"  # whose packed images hold those of all factors
ARCHIVES = ("results.tar", "weights.tar", "checkpoints.tar")


@dataclass(frozen=True)
class Phase:
    """A step of the plan.

    Attributes:
        name: of its log, and of its sweep.
        what: in words.
        recipes: that it trains, or the name of a packaged sweep; none for checks and the benchmark.
        seeds: of the runs.
    """

    name: str
    what: str
    recipes: tuple[str, ...] | str = ()
    seeds: tuple[int, ...] = (0, 1, 2)


def methods(names: Sequence[str], factor: int) -> tuple[str, ...]:
    """Return the recipes of methods, ``mbib_resnet32.`` or ``cifar_resnet32.ce_``, at an imbalance factor."""
    return tuple(f"{name}cifar100_lt_if{factor}" for name in names)


MAIN = ("mbib_resnet32.", "bib_resnet32.", "cifar_resnet32.bsce_", "cifar_resnet32.ce_")
STRONG = ("mbib_resnet32.strong_", "cifar_resnet32.bsce_strong_")
OTHERS = (
    "cifar_resnet32.ldam_drw_",
    "cifar_resnet32.focal_",
    "cifar_resnet32.crt_",
    "cifar_resnet32.tau_norm_",
    "experts_resnet32.sade_",
    "mbib_experts_resnet32.sade_mbib_",
    "cifar_resnet32.dive_",
    "cifar_resnet32.dive_from_mbib_",
    "cifar_resnet32.paco_",
)
PLAN = (
    Phase("checks", "captured, compiled and eager losses of all methods, resume across devices, two processes"),
    Phase("benchmark", "every row that this device can measure"),
    Phase("table1_if100", "Table 1 at imbalance factor 100", methods(MAIN, 100)),
    Phase("strong_if100", "the strong recipes", methods(STRONG, 100)),
    Phase("open_choices", "what the paper leaves open", "open_choices"),
    Phase("strong_recipe", "the strong recipe, one departure at a time", "strong_recipe"),
    Phase("table1_if50", "Table 1 at imbalance factor 50", methods(MAIN, 50)),
    Phase("table1_if10", "Table 1 at imbalance factor 10", methods(MAIN, 10)),
    Phase("others_if100", "every other method", methods(OTHERS, 100)),
    Phase("strong_if50", "the strong recipes at imbalance factor 50", methods(STRONG, 50)),
    Phase("strong_if10", "the strong recipes at imbalance factor 10", methods(STRONG, 10)),
)
# The same steps on a CPU, small.
DRY = (
    PLAN[0],
    PLAN[1],
    Phase("digits", "two methods on the digits", ("cifar_resnet20.ce_digits", "mbib_resnet20.digits"), (0, 1)),
    Phase("methods", "every method on the digits", "methods", (0,)),
)


def command(phase: Phase, out: Path, data: Path | None, jobs: int, epochs: int | None, dry: bool) -> list[str]:
    """Return the command of a phase, whose sweep's file it writes. Without `epochs` each run has its own."""
    python = [sys.executable, "-u"]
    if phase.name == "checks":
        # Without a device the same checks on emulated graphs.
        chosen = ["-k", "to_the_bit and cpu"] if dry else ["-m", "gpu"]
        return [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "tests/test_cuda.py", *chosen]
    if phase.name == "benchmark":
        small = ["--only", "evaluate-resnet32", "--repeats", "1", "--pass-images", "256", "--no-torchcompile"]
        device = ["--device", "cpu", *small] if dry else ["--device", "cuda"]
        return [*python, "tools/benchmark.py", "--results", str(out / "results"), *device]
    if isinstance(phase.recipes, str):
        swept = phase.recipes
    else:
        axes = {"recipe": list(phase.recipes)}
        file = out / "sweeps" / f"{phase.name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump({"title": phase.what, "recipe": "{recipe}", "axes": axes}), encoding="utf-8")
        swept = str(file)
    flags = ["--seeds", *map(str, phase.seeds), "--jobs", str(jobs), "--results", str(out / "results")]
    flags += ["--output", str(out / "runs"), "--val-interval", "5", "--checkpoint-seconds", "30"]
    flags += ["--name", phase.name, "--validation-batch-size", "2000"]
    flags += ["--device", "cpu" if dry else "cuda"]
    if data is not None:
        flags += ["--dataset", "folder", "--data-dir", str(data)]
    if epochs is not None:
        flags += ["--epochs", str(epochs)]
    return [*python, "-m", "mbib_timm", "sweep", swept, *flags]


# The data


def require_whole(packed: Path) -> None:
    """Raise MbibError for a file that holds something else than the images of `WHOLE`."""
    recipe = change_recipe(
        load_recipe(find_recipe(WHOLE)), {"dataset": "folder", "data_dir": str(packed), "num_classes": None}
    )
    data = open_data(recipe)
    if data_set_of(WHOLE, data.class_counts.tolist(), data.class_names) is None:
        raise MbibError(f"{packed} does not hold the images of {WHOLE}; make it with: python tools/pack.py {WHOLE}")


# The clock


def run_phase(call: Sequence[str], log: Path, ends: float, renew: "Archives") -> int | None:
    """Run a command until it ends, or interrupt it when the time that `ends`, by `time.monotonic`, is nearly up.

    Returns:
        Its exit status; None if it was interrupted.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("ab") as output:
        process = subprocess.Popen(
            call, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while (left := ends - GRACE - time.monotonic()) > 0:
                try:
                    return process.wait(min(left, 1.0))
                except subprocess.TimeoutExpired:
                    renew.now_and_then()
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class Archives:
    """What comes back from the machine, out of the folder of everything."""

    def __init__(self, out: Path) -> None:
        self.out, self.last = out, time.monotonic()

    def now_and_then(self) -> None:
        """Renew the archives if the last time was a while ago."""
        if time.monotonic() - self.last > RENEWED_EVERY:
            self.renew()

    def renew(self) -> None:
        """Write the archives anew."""
        for name, files in zip(ARCHIVES, self._contents(), strict=True):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as archive:
                for file in files:
                    try:
                        archive.add(file, str(file.relative_to(self.out)), recursive=False)
                    except FileNotFoundError:  # a run has replaced it meanwhile
                        continue
            write_bytes(self.out / name, content.getvalue())
        self.last = time.monotonic()

    def _contents(self) -> Iterator[list[Path]]:
        """Yield the files of each of `ARCHIVES`."""
        results = [file for name in ("results", "logs", "sweeps") for file in sorted((self.out / name).rglob("*"))]
        runs = sorted(path.parent for path in (self.out / "runs").rglob("recipe.yaml"))
        finished = [run for run in runs if (run / RECORD).is_file()]
        records = [file for run in finished for file in run.iterdir() if file.suffix in (".json", ".csv", ".yaml")]
        yield [file for file in [*results, *records] if file.is_file()]
        yield [run / "model.safetensors" for run in finished if run.name.endswith("seed0")]
        # Stages are in folders inside a run's, and of an unfinished run all is kept.
        open_runs = [run for run in runs if run not in finished]
        yield [file for run in open_runs for file in sorted(run.rglob("*")) if file.is_file() and file.name != ".lock"]


def take_up(earlier: Path, out: Path) -> None:
    """Unpack the archives of an earlier call. Raises MbibError if there are none."""
    found = [earlier / name for name in ARCHIVES if (earlier / name).is_file()]
    if not found:
        raise MbibError(f"--from {earlier}: there is no {' or '.join(ARCHIVES)}")
    for file in found:
        with tarfile.open(file) as archive:
            archive.extractall(out, filter="data")


def chosen_plan(names: Sequence[str] | None, dry: bool) -> list[Phase]:
    """Return the phases of some names, in the plan's order; all without names. Raises MbibError for an unknown one."""
    whole = DRY if dry else PLAN
    known = [phase.name for phase in whole]
    for name in names or ():
        if name not in known:
            raise MbibError(f"there is no phase {name!r}; there are {', '.join(known)}")
    return [phase for phase in whole if names is None or phase.name in names]


def listing(phases: Sequence[Phase]) -> str:
    """Return the plan, a line for each phase."""
    lines = []
    for number, phase in enumerate(phases, start=1):
        amount = ""
        if phase.recipes and not isinstance(phase.recipes, str):
            epochs = max(longest_epochs(load_recipe(find_recipe(recipe))) for recipe in phase.recipes)
            amount = f": {len(phase.recipes)} recipes x {len(phase.seeds)} seeds, {epochs} epochs at most"
        lines.append(f"{number:2}. {phase.name:14} {phase.what}{amount}")
    return "\n".join(lines)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="the packed images")
    parser.add_argument("-o", dest="out", type=Path, help="folder for everything")
    parser.add_argument("--minutes", type=float, default=28.0, help="time limit, archives included (28)")
    parser.add_argument("--jobs", type=int, default=3, help="runs at once on the device (3)")
    parser.add_argument("--epochs", type=int, help="of each run, for a trial")
    parser.add_argument("--only", nargs="+", metavar="PHASE", help="these phases alone")
    parser.add_argument(
        "--from", dest="earlier", type=Path, metavar="DIR", help="folder with an earlier call's archives"
    )
    parser.add_argument("--dry-run", action="store_true", help="the same steps on the CPU, small, with the digits")
    parser.add_argument("--list", action="store_true", help="show the plan, and stop")
    arguments = parser.parse_args()
    begun = time.monotonic()
    phases = chosen_plan(arguments.only, arguments.dry_run)
    if arguments.list:
        print(listing(phases))
        return
    if arguments.out is None or (arguments.data is None and not arguments.dry_run):
        raise MbibError("expected the packed images, or --dry-run, and -o FOLDER")
    ends = begun + 60 * arguments.minutes - ARCHIVING
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.earlier is not None:
        take_up(arguments.earlier, out)
    data = None
    if not arguments.dry_run:
        data = arguments.data.resolve()
        require_whole(data)
    epochs = arguments.epochs or (1 if arguments.dry_run else None)
    archives = Archives(out)
    failed = False
    done_file = out / "logs" / "done.txt"
    done = done_file.read_text(encoding="utf-8").split() if done_file.is_file() else []
    for phase in phases:
        if phase.name in done:
            print(f"{phase.name}: done before", flush=True)
            continue
        if time.monotonic() > ends - GRACE:
            print(f"{phase.name}: not begun, the time is up", flush=True)
            continue
        started = time.monotonic()
        call = command(phase, out, data, arguments.jobs, epochs, arguments.dry_run)
        status = run_phase(call, out / "logs" / f"{phase.name}.txt", ends, archives)
        said = "done" if status == 0 else f"failed, status {status}"
        failed |= bool(status)
        if status is None:
            said = "interrupted, the time is up"
        elif status == 0:
            done.append(phase.name)
            done_file.write_text("".join(f"{name}\n" for name in done), encoding="utf-8")
        print(f"{phase.name}: {said}, {time.monotonic() - started:.0f} s", flush=True)
        archives.renew()
    archives.renew()
    print("\n".join(f"{name}: {(out / name).stat().st_size / 1e6:.1f} MB" for name in ARCHIVES))
    if failed:
        raise MbibError(f"a phase failed; its log is in {arguments.out / 'logs'}")


if __name__ == "__main__":
    try:
        main()
    except MbibError as error:
        print(f"gpu: error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
