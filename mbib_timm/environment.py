"""Where a run happens: device, processes, random generators, and the versions and hardware beside every result."""

import contextlib
import ctypes
import functools
import os
import platform
import random
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy
import timm
import torch
import torchvision
from timm.utils.distributed import init_distributed_device_so

import mbib_timm
from mbib_timm.errors import LostDeviceError, LostProcessError, MbibError, first_line

T = TypeVar("T")
# Keeps draws by a key apart from what has seeds of the same numbers.
DRAWS_KEY = (13,)
DIRTY = "-dirty"  # behind a commit: files differed from it
GIT_SECONDS = 10  # that git may take to answer


@dataclass(frozen=True)
class World:
    """The processes of a run and this one's place among them."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the process that writes."""
        return self.rank == 0

    def require_alone(self, command: str) -> None:
        """Raise MbibError where several processes run a command that is for one."""
        if self.world_size > 1:
            raise MbibError(f"{command} runs in one process, not in {self.world_size}: start it without torchrun")

    def of_main(self, compute: Callable[[], T]) -> T:
        """Return what the main process computes, in every process; all have to ask at the same point."""
        if not is_distributed():
            return compute()
        found: list[Any] = [compute() if self.is_main else None]
        torch.distributed.broadcast_object_list(found, device=self.device)
        return cast(T, found[0])

    def gather(self, values: list[str]) -> list[str]:
        """Return the values of all processes, each once, in every process."""
        return list(dict.fromkeys(value for part in of_all(values) for value in part))


def usable_cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_device(name: str | None) -> str:
    """Return the device asked for, or the best there is: CUDA, MPS, CPU.

    Raises:
        MbibError: an unknown device, or one that this machine has not.
    """
    if name is None:
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise MbibError(f"unknown device {name!r}: expected cpu, cuda, cuda:<index> or mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MbibError(f"device {name!r} asked for, but there is no CUDA device; omit --device to detect one")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MbibError(f"device {name!r} asked for, but there are {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise MbibError("device 'mps' asked for, but this machine has none; omit --device to detect one")
    return name


def join_world(device: str | None) -> World:
    """Set up this process: its device, its memory, and its group, which torchrun started or the caller has."""
    found = find_device(device)
    if is_distributed():
        here = f"cuda:{torch.cuda.current_device()}" if found == "cuda" else found
        world = World(torch.device(here), torch.distributed.get_rank(), torch.distributed.get_world_size())
    else:
        place = init_distributed_device_so(device=found)
        world = World(torch.device(place["device"]), place["global_rank"], place["world_size"])
    prepare(world.device)
    return world


def prepare(device: torch.device) -> None:
    """Set what this process computes with on a device: on CUDA TF32 and cuDNN's benchmarks, as timm's train.py does."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True  # that of convolutions is torch's default
        torch.backends.cudnn.benchmark = True
    elif device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep memory that is freed, for the rest of the process; with other C libraries nothing happens.

    Activations come and go with every step on the CPU, and it takes long to hand their pages back to the system and to
    get them again, zeroed. In exchange the process takes somewhat more at its peak. Limits set in the environment,
    ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_MMAP_THRESHOLD_``, stay.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    # Parameters' numbers are those of malloc.h.
    for parameter, name in ((-1, "MALLOC_TRIM_THRESHOLD_"), (-3, "MALLOC_MMAP_THRESHOLD_")):
        if name not in os.environ:
            libc.mallopt(parameter, 2**31 - 1)


def is_distributed() -> bool:
    """Return whether this process works in a group with others."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextlib.contextmanager
def joined_world(device: str | None, advice: str = "") -> Iterator[World]:
    """Join the group of processes, see `join_world`, and leave it at the end; a group of the caller's stays.

    Args:
        device: of this process, see `join_world`.
        advice: what to do where another process has ended; the end of the message.

    Raises:
        LostProcessError: another process has ended, so that what this one waits for never comes.
        LostDeviceError: the device has failed.
    """
    of_caller = is_distributed()
    world = join_world(device)
    try:
        yield world
    except RuntimeError as error:  # of torch's backends; gloo has no kind of its own
        if _is_lost_device(error):
            raise LostDeviceError(f"device {world.device} has failed: {first_line(error)}{advice}") from None
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if world.world_size == 1 or not lost:
            raise
        raise LostProcessError(
            f"another of the {world.world_size} processes has ended, so process {world.rank} does too; the reason is "
            f"above, or in that process's output{advice}"
        ) from None
    finally:
        if is_distributed() and not of_caller:
            torch.distributed.destroy_process_group()


def _is_lost_device(error: RuntimeError) -> bool:
    if hasattr(torch, "AcceleratorError"):
        return isinstance(error, torch.AcceleratorError)
    return str(error).startswith("CUDA error")  # torch 2.7 has no kind of its own


def of_all(value: T) -> list[T]:
    """Return the values of all processes, in their order, in every process; all have to ask at the same point."""
    if not is_distributed():
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


@torch.no_grad()
def share_buffers(module: torch.nn.Module) -> None:
    """Take the first process's buffers in all of them: BatchNorm's statistics are of the images that each has seen.

    They are what the first process saves, and a resumed run has.
    """
    if is_distributed():
        for buffer in module.buffers():
            value = buffer.contiguous()
            # As bytes: backends do not take every type.
            torch.distributed.broadcast(value.reshape(-1).view(torch.uint8), 0)
            buffer.copy_(value)


def seed_generators(seed: int, epoch: int, rank: int, stage: int = 0) -> None:
    """Seed Python's, numpy's and torch's generators (all devices), so that a run resumes bit-identically.

    The global generators belong to the running program here; data sets and subsets use generators of their own.

    Args:
        seed: the recipe's seed.
        epoch: the epoch that starts, 0 for the first; -1 for the initialisation of the model.
        rank: this process among the distributed ones.
        stage: the number of stages before this one.
    """
    state = numpy.random.SeedSequence([seed, epoch + 1, rank, *([stage] if stage else [])]).generate_state(3)
    random.seed(int(state[0]))
    numpy.random.seed(int(state[1]))
    torch.manual_seed(int(state[2]))


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return how far the global generators have come that `seed_generators` seeds, in plain values and tensors."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = cast(tuple[str, numpy.ndarray, int, int, float], numpy.random.get_state())
    states = {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(numpy.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: dict[str, Any], device: torch.device) -> None:
    """Let the global generators go on from what `generator_states` has returned; that of a device which has none
    there as it is."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = states["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype(numpy.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "device" in states:
        torch.cuda.set_rng_state(states["device"], device)


@contextlib.contextmanager
def seeded_draws(key: tuple[int, ...]) -> Iterator[None]:
    """Draw by a key from Python's, numpy's and torch's generators of the CPU, which are then as they were before."""
    before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    state = numpy.random.SeedSequence(list(key), spawn_key=DRAWS_KEY).generate_state(3)
    random.seed(int(state[0]))
    numpy.random.seed(int(state[1]))
    torch.default_generator.manual_seed(int(state[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])
        torch.set_rng_state(before[2])


@dataclass(frozen=True)
class Environment:
    """Where and with what something was computed.

    Attributes:
        mbib_timm: version.
        commit: of the checkout, with ``-dirty`` where files differed from it; None outside a checkout.
        torch: version.
        timm: version.
        device: ``cpu``, ``cuda`` or ``mps``.
        hardware: name of the accelerator, or of the processor.
        processes: that worked together.
        command: the command line.
        python: version.
        torchvision: version.
        numpy: version.
        cpu_count: processors of the machine.
        threads: that torch used in each process.
        platform: operating system.
    """

    mbib_timm: str
    commit: str | None
    torch: str
    timm: str
    device: str
    hardware: str
    processes: int
    command: str
    # What was not always recorded.
    python: str | None = None
    torchvision: str | None = None
    numpy: str | None = None
    cpu_count: int | None = None
    threads: int | None = None
    platform: str | None = None

    @property
    def is_dirty(self) -> bool:
        """Whether the checkout had uncommitted changes."""
        return (self.commit or "").endswith(DIRTY)

    @property
    def versions(self) -> str:
        """Versions of what decides numbers, side by side."""
        return f"mbib_timm {self.mbib_timm}, torch {self.torch}, timm {self.timm}"

    @property
    def machine(self) -> str:
        """Hardware and kind of device, as tables name them."""
        return f"{self.hardware} ({self.device})"


def describe_environment(world: World) -> Environment:
    """Return versions, hardware, command and commit."""
    device = world.device
    return Environment(
        mbib_timm=mbib_timm.__version__,
        commit=current_commit(),
        torch=str(torch.__version__),
        timm=timm.__version__,
        device=device.type,
        hardware=torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        processes=world.world_size,
        command=shlex.join(["mbib", *sys.argv[1:]]),
        python=platform.python_version(),
        torchvision=torchvision.__version__,
        numpy=numpy.__version__,
        cpu_count=os.cpu_count(),
        threads=torch.get_num_threads(),
        platform=platform.system(),
    )


def processor_name() -> str:
    """Return what the processor calls itself, or its architecture where it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip() or platform.machine()
    return platform.machine()


def has_bfloat16_instructions() -> bool | None:
    """Return whether the processor multiplies in bfloat16 by instructions of its own: AVX-512's, AMX's or ARM's; None
    before torch 2.11, which does not say."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return None
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


@functools.cache
def current_commit() -> str | None:
    """Return the commit of the checkout that the package runs from, with ``-dirty``; None outside a checkout.

    As it is when a process first asks: what it has imported stays as it was.
    """
    folder = Path(__file__).parents[1]
    return commit_of(folder) if (folder / ".git").exists() else None


def commit_of(checkout: Path) -> str | None:
    """Return the commit of a checkout, with ``-dirty`` where files differ from it; None where git does not say in time.

    The repository's lock is not taken, as ``git describe --dirty`` takes it: somebody may be committing.
    """

    def ask(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(checkout), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=True, timeout=GIT_SECONDS
        )
        return done.stdout.strip()

    try:
        commit = ask("describe", "--always", "--abbrev=12")
        return f"{commit}{DIRTY}" if ask("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None
