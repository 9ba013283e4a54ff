"""Checkpoints: whole or not at all, sound or refused."""

import contextlib
import errno
import hashlib
import io
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mbib_timm.errors import CheckpointError, MbibError
from mbib_timm.files import write_atomically
from mbib_timm.recipe import Recipe
from mbib_timm.training import checkpoint
from mbib_timm.training.checkpoint import load_checkpoint, load_newest, save_checkpoint
from mbib_timm.training.run_folder import RunFolder


def state(epoch):
    return {"epoch": epoch, "weights": torch.full((1000,), float(epoch))}


def test_the_one_before_is_kept(tmp_path):
    for epoch in range(3):
        save_checkpoint(tmp_path, state(epoch))
    assert load_checkpoint(tmp_path / "last.ckpt")["epoch"] == 2
    assert load_checkpoint(tmp_path / "previous.ckpt")["epoch"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]


class Killed(BaseException):
    """Stands for kill -9: nothing is cleaned up after it."""


@pytest.mark.parametrize("call", range(1, 7))
def test_a_crash_between_any_two_system_calls_leaves_a_sound_checkpoint(tmp_path, monkeypatch, call):
    for epoch in range(2):
        save_checkpoint(tmp_path, state(epoch))
    calls = 0

    def dying(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                raise Killed
            return function(*args, **kwargs)

        return wrapped

    for name in ("replace", "fsync"):
        monkeypatch.setattr(checkpoint.os, name, dying(getattr(os, name)))
    monkeypatch.setattr(Path, "unlink", lambda *args, **kwargs: None)
    with contextlib.suppress(Killed):
        save_checkpoint(tmp_path, state(2))
    monkeypatch.undo()
    found, _ = load_newest(tmp_path, warn=pytest.fail)
    assert found["epoch"] in (1, 2)
    assert (found["weights"] == found["epoch"]).all()


def replaced(make):
    """Damage that puts something else in a file's place."""

    def damage(file):
        file.unlink()
        make(file)

    return damage


def rewritten(change):
    """Damage that changes a file's content."""
    return lambda file: file.write_bytes(change(file.read_bytes()))


def signed(content):
    """Return other content with the right checksum: as somebody might write it on purpose."""
    return content + checkpoint.MARK + hashlib.sha256(content).digest()


def saved(value):
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


RAN: list[str] = []  # what pickles have run


class Runs:
    def __reduce__(self):
        return exec, ("import test_checkpoint; test_checkpoint.RAN.append('code')",)


def deep():
    """A pickle that nests 100,000 lists."""
    return b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."


DAMAGE = {
    "flipped bit": rewritten(lambda c: c[:2000] + bytes([c[2000] ^ 1]) + c[2001:]),
    "flipped bit of the sum": rewritten(lambda c: c[:-1] + bytes([c[-1] ^ 1])),
    "flipped bit of the mark": rewritten(lambda c: c[:-35] + bytes([c[-35] ^ 1]) + c[-34:]),
    "cut in the middle": rewritten(lambda c: c[:3000]),
    "cut by a byte": rewritten(lambda c: c[:-1]),
    "cut by the sum": rewritten(lambda c: c[:-39]),
    "emptied": rewritten(lambda c: b""),
    "zeros": rewritten(lambda c: bytes(len(c))),
    "appended": rewritten(lambda c: c + b"x"),
    "text": rewritten(lambda c: b"nonsense\n"),
    "folder": replaced(Path.mkdir),
    "full folder": replaced(lambda file: (file.mkdir(), (file / "x").touch())),
    "pipe": replaced(lambda file: os.mkfifo(file)),
    "device": replaced(lambda file: file.symlink_to("/dev/zero")),
    "link to itself": replaced(lambda file: file.symlink_to(file)),
    "deep pickle": rewritten(lambda c: signed(deep())),
    "other pickle": rewritten(lambda c: signed(saved({"state_dict": {}}))),
    "list": rewritten(lambda c: signed(saved([1]))),
    "object": rewritten(lambda c: signed(saved({"config": Path("pickled object")}))),
    "code": rewritten(lambda c: signed(pickle.dumps(Runs()))),
    "code in a zip": rewritten(lambda c: signed(saved(Runs()))),
    "an older format": rewritten(lambda c: signed(saved({"format": "mbib_timm training state, version 4"}))),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_passed_over_with_a_warning_and_gives_way_to_the_next(tmp_path, damage):
    for epoch in range(2):
        save_checkpoint(tmp_path, state(epoch))
    last = tmp_path / "last.ckpt"
    DAMAGE[damage](last)
    with pytest.raises(CheckpointError, match=r"last\.ckpt( is|: it is not a regular|: Is a dir|: Too many)"):
        load_checkpoint(last)
    assert not RAN
    run = RunFolder(tmp_path)
    assert run.has_checkpoint()
    warnings = []
    assert run.newest(warnings.append)["epoch"] == 0
    assert len(warnings) == 1
    assert "last.ckpt" in warnings[0]
    assert warnings[0].endswith("; using the one before, previous.ckpt")
    begin(run)
    save_checkpoint(tmp_path, state(1))
    run.end()
    assert load_newest(tmp_path, pytest.fail)[0]["epoch"] == 1
    assert load_checkpoint(tmp_path / "previous.ckpt")["epoch"] == 0


def begin(run):
    run.begin(Recipe(), {})


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("damage", DAMAGE)
def test_without_a_sound_one_there_is_one_sentence(tmp_path, damage):
    for epoch in range(2):
        save_checkpoint(tmp_path, state(epoch))
    for name in ("last.ckpt", "previous.ckpt"):
        DAMAGE[damage](tmp_path / name)
    with pytest.raises(CheckpointError, match="has no sound checkpoint to resume from") as caught:
        load_newest(tmp_path, pytest.fail)
    assert "\n" not in str(caught.value)


def test_a_damaged_next_checkpoint_gives_way_to_the_last(tmp_path):
    save_checkpoint(tmp_path, state(0))
    (tmp_path / "next.ckpt").write_bytes(b"half")
    warnings = []
    found, unsound = load_newest(tmp_path, warnings.append)
    assert found["epoch"] == 0
    assert unsound == [tmp_path / "next.ckpt"]
    assert "next.ckpt" in warnings[0]


def test_torch_reads_a_checkpoint_too(tmp_path):
    save_checkpoint(tmp_path, state(3))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 3


def at_random(content, rng):
    """Return content with random damage: flipped bits, a cut, a block of zeros, two blocks swapped, bytes appended."""
    changed = bytearray(content)
    length = int(min(len(content) // 2, 2 ** rng.integers(1, 17)))
    first, second = sorted(rng.integers(0, len(content) - length, 2).tolist())
    kind = rng.integers(5)
    if kind == 0:
        for place in rng.integers(0, len(content), rng.integers(1, 4)):
            changed[place] ^= 1 << rng.integers(8)
    elif kind == 1:
        del changed[rng.integers(len(content)) :]
    elif kind == 2:
        changed[first : first + length] = bytes(length)
    elif kind == 3:
        changed[first : first + length], changed[second : second + length] = (
            content[second : second + length],
            content[first : first + length],
        )
    else:
        changed += rng.bytes(length)
    return bytes(changed), ("flipped bits", "cut", "zeroed block", "swapped blocks", "appended bytes")[kind]


@pytest.mark.slow
def test_of_randomly_damaged_checkpoints_none_is_accepted_and_none_is_fatal(tmp_path, faults_asked):
    """Or it is bit for bit what was saved, where the damage has changed nothing: zeros in the place of zeros."""
    rng, counts = np.random.default_rng(17), Counter()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.randn(40, 50))], lr=0.1, momentum=0.9)
    for epoch in range(2):
        save_checkpoint(tmp_path, {**state(epoch), "optimizer": optimizer.state_dict(), "many": [*range(3000)]})
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    sound = last.read_bytes()
    for _ in range(faults_asked or 200):
        content, kind = at_random(sound, rng)
        last.write_bytes(content)
        warnings = []
        found, _ = load_newest(tmp_path, warnings.append)
        unchanged = content == sound
        counts[kind, "unchanged" if unchanged else "refused"] += 1
        assert found["epoch"] == unchanged
        assert len(warnings) == 1 - unchanged
        assert (found["weights"] == unchanged).all()
    assert load_checkpoint(previous)["epoch"] == 0
    print(f"\n{sum(counts.values())} damaged checkpoints, 0 accepted, 0 fatal:", dict(counts))


def test_no_checkpoint_is_an_error_of_its_own(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*nothing\.ckpt: No such file"):
        load_checkpoint(tmp_path / "nothing.ckpt")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def full(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(MbibError, match="no space left to write"):
        write_atomically(path, full)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_really_full_device_is_reported(monkeypatch, tmp_path):
    save_checkpoint(tmp_path, state(0))
    original = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, *args, **kwargs: original(Path("/dev/full") if self.suffix == ".tmp" else self, *args, **kwargs),
    )
    with pytest.raises(MbibError, match="no space left"):
        save_checkpoint(tmp_path, state(1))
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "last.ckpt")["epoch"] == 0
