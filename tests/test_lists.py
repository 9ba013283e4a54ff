"""Long lists: read in blocks as line by line, their paths packed and hashed, in little memory."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import PEAK_MEMORY, save_image

from mbib_timm.data import Split, lists, open_data
from mbib_timm.data.decoding import FileStates
from mbib_timm.data.lists import _any_lines, _plain_lines, open_list
from mbib_timm.data.paths import Names, PathReader
from mbib_timm.environment import World
from mbib_timm.errors import DataError
from mbib_timm.recipe import Recipe

PATHS = [
    "a.png",
    "n01/a b.JPEG",
    "x/y/1.png",
    "ä/ö.png",
    "a:b",
    "../a",
    "/a",
    "\\a",
    "",
    "a\tb",
    "a  b",
    "./a.png",
    "日",
]
LABELS = ["0", "7", "123456789", "1234567890", "-1", "x", "", "0 1", "00"]
SEPARATORS = [" ", "\t", "  ", "", "\xa0"]
LINE = st.builds("{}{}{}{}{}".format, st.sampled_from(["", " "]), st.sampled_from(PATHS), st.sampled_from(SEPARATORS),
                 st.sampled_from(LABELS), st.sampled_from(["\n", "\r\n", " \n"]))  # fmt: skip


def unpacked(names, lengths, labels):
    ends = np.cumsum(lengths)
    return [names[end - length : end].decode() for end, length in zip(ends, lengths, strict=True)], labels.tolist()


@given(st.lists(LINE, min_size=1, max_size=5))
def test_lines_read_at_once_are_those_read_one_by_one(lines):
    content = "".join(lines).encode()
    found = _plain_lines(content)
    if found is not None:
        assert unpacked(*found) == unpacked(*_any_lines(content, Path("list.txt"), 1))


def test_most_lines_are_read_at_once():
    content = b"n01/n01_1.JPEG 0\r\nn02/a b.JPEG\t12345678\nx 9\n"
    assert unpacked(*_plain_lines(content)) == (["n01/n01_1.JPEG", "n02/a b.JPEG", "x"], [0, 12345678, 9])


@pytest.mark.parametrize("block_bytes", [1, 7, 64])
def test_blocks_end_where_lines_do(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(lists, "BLOCK_BYTES", block_bytes)
    names = [f"{'ä' if i % 7 == 3 else 'n'}{i % 3}/{i}.png" for i in range(40)]
    lines = "\n".join(f"{name} {i % 3}{'' if i % 5 else chr(10)}" for i, name in enumerate(names))
    for name in names:
        save_image(tmp_path / name)
    (tmp_path / "list.txt").write_text(lines)
    split = open_list("list.txt", str(tmp_path), "train_list", None)
    assert [split.reader.name(i) for i in range(40)] == names
    assert split.targets.tolist() == [i % 3 for i in range(40)]
    (tmp_path / "list.txt").write_text(f"{lines}\n./{names[5]} 0\n")
    with pytest.raises(DataError, match=rf"line 49: \./{names[5]} has label 0 here, and 2 on an earlier line"):
        open_list("list.txt", str(tmp_path), "train_list", None)


TEXTS = st.text(st.sampled_from("ab/é"), max_size=20)


@given(st.lists(TEXTS, max_size=20), st.lists(st.integers(0, 19)))
def test_names_are_packed_and_hashed(texts, places):
    names = Names.of(texts)
    places = np.array([place for place in places if place < len(texts)], dtype=np.int64)
    assert [names[place] for place in range(len(names))] == texts
    assert [name.decode() for name in names.some()] == texts
    assert [name.decode() for name in names.some(places)] == [texts[place] for place in places]
    hashes = names.hashes()
    assert (hashes[places] == names.hashes(places)).all()
    alike = [[first == second for second in texts] for first in texts]
    assert (hashes[:, None] == hashes).tolist() == alike
    if texts:  # wherever it stands
        assert (Names.of(["x" * 3, *reversed(texts)]).hashes()[:0:-1] == hashes).all()


def test_images_of_one_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(Names, "hashes", lambda names, places=None: np.zeros(len(names), dtype=np.uint64))
    for name in ("a.png", "b.png", "c.png"):
        save_image(tmp_path / name)
    (tmp_path / "train.txt").write_text("a.png 0\nb.png 1\n")
    (tmp_path / "val.txt").write_text("c.png 0\nb.png 1\n")
    data = open_data(Recipe(dataset="list", data_dir=str(tmp_path), train_list="train.txt", val_list="val.txt"))
    assert data.shared[0].startswith("split 'validation': 1 of its 2 images are trained on")


def test_files_are_looked_up_once_and_by_the_main_process(tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        save_image(tmp_path / name)
    split = Split(PathReader(tmp_path, Names.of(["a.png", "b.png"])), np.array([0, 1]))
    looked = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, *rest, **more: (looked.append(path), stat(path, *rest, **more))[1])
    states = FileStates()
    digest = states.of(split, World("cpu"))
    assert states.of(split, World("cpu")) == digest
    assert [Path(os.fsdecode(path)).name for path in looked if b"png" in os.fsencode(path)] == ["a.png", "b.png"]
    # Another process is told.
    monkeypatch.setattr("mbib_timm.environment.is_distributed", lambda: True)
    monkeypatch.setattr(
        "torch.distributed.broadcast_object_list",
        lambda found, device: found.__setitem__(0, found[0] or "told"),
    )
    assert FileStates().of(split, World("cpu", 1, 2)) == "told"
    assert FileStates().of(split, World("cpu", 0, 2)) == digest
    (tmp_path / "b.png").write_bytes(b"")
    assert FileStates().of(split, World("cpu", 0, 2)) != digest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_million_lines_take_what_their_bytes_do(tmp_path):
    """In a fresh process, whose peak memory is its own: 27 bytes of path, 4 of its end, 8 of label, 8 of a hash, 8 of a
    plan, and blocks."""
    lines = "".join(f"n{i % 1000:08d}/{i:08d}_{i % 1000}.JPEG {i % 1000}\n" for i in range(1_000_000))
    (tmp_path / "train.txt").write_text(lines)
    script = PEAK_MEMORY + (
        "import sys\n"
        "import numpy as np\n"
        "from mbib_timm.data import lists\n"
        "from mbib_timm.data.samplers import TrainingSampler\n"
        "from mbib_timm.environment import World\n"
        "from mbib_timm.recipe import Recipe\n"
        "lists.look_for_images = lambda *arguments, **options: ''\n"
        "base = peak()\n"
        "split = lists.open_list('train.txt', sys.argv[1], 'train_list', None)\n"
        "for name in ('instance', 'balanced'):\n"
        "    sampler = TrainingSampler(split.targets, 1000, Recipe(), World('cpu'), name)\n"
        "    assert sum(1 for _ in sampler) == 1_000_000\n"
        "print((peak() - base) / 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 110
