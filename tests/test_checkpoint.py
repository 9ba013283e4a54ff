"""Checkpoints: whole or not at all, sound or refused."""

import contextlib
import errno
import os
from pathlib import Path

import pytest
import torch

from mbib_timm.errors import CheckpointError, MbibError
from mbib_timm.files import write_atomically
from mbib_timm.training import checkpoint
from mbib_timm.training.checkpoint import load_checkpoint, load_newest, save_checkpoint


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
    found = load_newest(tmp_path, warn=pytest.fail)
    assert found["epoch"] in (1, 2)
    assert (found["weights"] == found["epoch"]).all()


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_truncated_file_is_refused_and_the_one_before_is_used(tmp_path, size):
    for epoch in range(2):
        save_checkpoint(tmp_path, state(epoch))
    last = tmp_path / "last.ckpt"
    last.write_bytes(last.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"last\.ckpt is truncated or not a checkpoint"):
        load_checkpoint(last)
    warnings = []
    assert load_newest(tmp_path, warnings.append)["epoch"] == 0
    assert "using the one before" in warnings[0]


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="not a training state of mbib_timm"):
        load_checkpoint(path)
    torch.save({"config": Path("pickled object")}, path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "nothing.ckpt")
    with pytest.raises(CheckpointError):
        load_newest(tmp_path, print)


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
