"""WebDataset shards against tarfile, against the same images from elsewhere, and what is refused of them."""

import gc
import gzip
import io
import json
import os
import re
import tarfile
import tracemalloc

import numpy as np
import pytest
from archive_images import assert_copies_read, assert_forks_read, contents, pixels, png, tar_bytes, write
from crashes import epochs_of
from PIL import Image

from mbib_timm.cli import main
from mbib_timm.data import archives, open_data, open_split, summary
from mbib_timm.data import shards as shards_module
from mbib_timm.data.archives import members
from mbib_timm.data.decoding import FileStates
from mbib_timm.data.images import ImageDataset
from mbib_timm.data.sources import open_digits
from mbib_timm.environment import World
from mbib_timm.errors import DataError
from mbib_timm.recipe import Recipe

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def sample(key, label, seed=0, **more):
    """Members of a sample, in the order of their names."""
    parts = {"png": png(seed), "cls": str(label).encode(), **more}
    return [(f"{key}.{kind}", parts[kind]) for kind in sorted(parts) if parts[kind] is not None]


def shard(*labels, first=0):
    """A shard of samples with these labels."""
    return [entry for i, label in enumerate(labels, first) for entry in sample(f"{i:06d}", label, i)]


def shards(root, files):
    """Shards by name, of entries or bytes."""
    for name, entries in files.items():
        write(root / name, entries if isinstance(entries, bytes) else tar_bytes(entries))
    return root


def recipe(root, **keys):
    return Recipe(**{"dataset": "wds", "data_dir": str(root), "workers": 0, "imbalance": "none", **keys})


def of_type(kind, target=""):
    header = tarfile.TarInfo()
    header.type, header.linkname = kind, target
    return header


ODD = [
    ("./a/", of_type(tarfile.DIRTYPE)),
    *sample("./a/1", 0, 1, json=b'{"label": 7}'),
    *sample("b/dotted.key", 1, 2, png=None, **{"x.png": png(9), "cls": None}),
    ("b/dotted2.PNG", png(3)),
    ("b/dotted2.cls", b" 1\n"),
    *sample("k" * 60 + "/" + "k" * 70, 1, 4, **{"seg.png": png(5), "txt": "Füchse".encode()}),
    *sample("ünï/" + "d" * 160 + "/ö", 0, 6),
    ("__meta__", b"{}"),
    ("__meta__/x.json", b"{}"),
    ("README", b"no dot"),
    (".hidden.png", png(8)),
    ("c.JPG", png(7)),
    ("c.json", b'{"width": 9, "label": 1}'),
]


def read_naively(files):
    """Pixels and label of each sample: members by tarfile, keys as webdataset's base_plus_ext cuts them."""
    found = []
    for file in files:
        samples = {}
        with tarfile.open(file) as tar:
            for member in tar:
                match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", member.name)
                if member.isfile() and match and not member.name.startswith("__"):
                    samples.setdefault(match[1], {})[match[2].lower()] = tar.extractfile(member).read()
        for parts in samples.values():
            image = next((parts[kind] for kind in ("jpg", "png") if kind in parts), None)
            if image is not None:
                label = int(parts["cls"]) if "cls" in parts else json.loads(parts["json"])["label"]
                found.append((*pixels([Image.open(io.BytesIO(image))]), label))
    return found


@pytest.mark.parametrize("mtime", [10**9, 1e9 + 0.25], ids=["whole", "fraction"])
@pytest.mark.parametrize("form", FORMATS)
def test_samples_are_those_that_tarfile_gives(tmp_path, form, mtime):
    odd = [entry for entry in ODD if form != "ustar" or len(entry[0]) < 150]
    for number, entries in enumerate((shard(1, 0, 1), odd, shard(0, 1, first=3))):
        write(tmp_path / f"x-{number}.tar", tar_bytes(entries, mtime, format=FORMATS[form]))
    split = open_split(recipe(tmp_path), "all")
    expected = read_naively(sorted(tmp_path.glob("*.tar")))
    assert list(zip(contents(split), split.targets.tolist(), strict=True)) == expected
    assert len(expected) == 5 + 4 + (form != "ustar")
    assert split.path(0) == f"{tmp_path}/x-0.tar/000000.png"
    assert split.path(3) == f"{tmp_path}/x-1.tar/a/1.png"
    assert list(split.files()) == [os.fsencode(split.path(place)) for place in range(len(split))]
    assert split.left_out == {"samples without image and label": ("x-1.tar/b/dotted",)}


@pytest.mark.parametrize("mtime", [10**9, 1e9 + 0.25], ids=["whole", "fraction"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("before", [[], [("global", None)]], ids=["", "global headers"])
def test_headers_say_what_tarfile_reads(tmp_path, form, mtime, before):
    entries = [entry for entry in ODD if form != "ustar" or len(entry[0]) < 150]
    entries += [("l.png", of_type(tarfile.SYMTYPE, "c.JPG")), ("h.png", of_type(tarfile.LNKTYPE, "c.JPG"))]
    entries += [("p.png", of_type(tarfile.FIFOTYPE)), ("empty.txt", b""), ("block.txt", bytes(512))]
    content = tar_bytes(entries, mtime, format=FORMATS[form])
    if before:
        header = tarfile.TarInfo.create_pax_global_header({"comment": "x"})
        content = header + content
    file = write(tmp_path / "x.tar", content)
    with tarfile.open(file) as tar, file.open("rb") as opened:
        expected = [(each.name, each.offset_data, each.size, each.isfile(), each.isdir()) for each in tar]
        found = [
            (each.name, each.start, each.size, each.kind == archives.FILE, each.kind == archives.FOLDER)
            for each in members(opened, len(content))
        ]
    assert found == expected
    assert len(found) == len(entries)


def test_plain_headers_are_read_without_tarfile(tmp_path, monkeypatch):
    """Those of both kinds that writers of shards write; what is not plain falls back."""
    content = [tar_bytes(shard(0, 1), mtime) for mtime in (10**9, 1e9 + 0.25)]
    monkeypatch.setattr(archives, "_any_member", lambda tar, file, at: None)
    for tar in content:
        assert len(list(members(io.BytesIO(tar), len(tar)))) == 4
    with pytest.raises(tarfile.ReadError, match="damaged after 1 members"):
        list(members(io.BytesIO(tar_bytes([("a.png", b""), ("ü.png", b"")])), 1 << 20))


# Shards, which splits are asked for, and the labels of each.
INFO = {
    "splits": {
        "train": {"filenames": ["a-1.tar", "a-0.tar"], "shard_lengths": [1, 2], "num_samples": 3, "name": "train"},
        "validation": {"filenames": ["val/b.tar"], "shard_lengths": [1], "num_samples": 1, "name": "validation"},
    }
}
DESCRIBED = {"a-0.tar": shard(0, 1), "a-1.tar": shard(1), "val/b.tar": shard(0), "val/unused.tar": b"no tar"}
BY_FOLDER = {"train/0.tar": shard(0, 1), "train/1.tar": shard(1, 1), "test/0.tar": shard(0), "train/nshards.txt": b"2"}
BY_NAME = {
    "imagenet-train-000002.tar": shard(0, 0), "imagenet-train-000010.tar.md5": b"", "imagenet-train-000003.tar": [],
    "imagenet-train-000004.tar": shard(1), "imagenet-val-000000.tar": shard(1),
}  # fmt: skip
LAYOUTS = {
    "folders": (BY_FOLDER, {}, {"train": [0, 1, 1, 1], "validation": [0], "test": [0]}),
    "names": (BY_NAME, {}, {"train": [0, 0, 1], "validation": [1], "val": [1]}),
    "names from the beginning": (
        {"Training_1.tar": shard(0), "Training_2.tar": shard(1), "val2017-00000-of-00001.tar": shard(0)},
        {},
        {"train": [0, 1], "validation": [0]},
    ),
    "own names": (
        {"x.fold1.00.tar": shard(0), "x.fold2.00.tar": shard(1)},
        {"train_split": "fold2", "val_split": "Fold1"},
        {"fold2": [1], "fold1": [0]},
    ),
    "described": (DESCRIBED | {"_info.json": json.dumps(INFO).encode()}, {}, {"train": [1, 0, 1], "val": [0]}),
    "described by another name": (
        DESCRIBED | {"info.json": json.dumps(INFO).encode()}, {}, {"train": [1, 0, 1], "validation": [0]},
    ),
    "patterns": (
        {f"{i:02d}.tar": shard(i % 2, i % 3) for i in range(8, 13)},
        {"train_split": "{08..10}.tar", "val_split": "11.tar", "test_split": "{9..10}.tar"},
        {"{08..10}.tar": [0, 2, 1, 0, 0, 1], "11.tar": [1, 2], "12.tar": [0, 0], "{10..11}.tar": [0, 1, 1, 2]},
    ),
    "a pattern of patterns": (
        {f"{a}/{b}.tar": shard(a) for a in range(2) for b in range(2)} , {},
        {"{0..1}/{0..1}.tar": [0, 0, 1, 1], "1/{0..0}.tar": [1]},
    ),
    "a pattern beside names": (BY_NAME, {"val_split": "imagenet-train-000004.tar"}, {"train": [0, 0, 1]}),
    "no splits": (
        {"00000.tar": shard(*[0, 1] * 5), "00001.tar": shard(*[0] * 5), "info.json": b'{"name": "birds"}'},
        {},
        {"all": [0, 1] * 5 + [0] * 5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_splits_are_found(tmp_path, name):
    files, keys, expected = LAYOUTS[name]
    root = shards(tmp_path, files)
    for split, labels in expected.items():
        assert open_split(recipe(root, **keys), split).targets.tolist() == labels


def test_without_splits_some_are_held_out(tmp_path):
    data = open_data(recipe(shards(tmp_path, LAYOUTS["no splits"][0]), val_fraction=0.2))
    assert np.bincount(data.train.targets).tolist() == [8, 4]
    assert np.bincount(data.val.targets).tolist() == [2, 1]
    assert not set(data.train.files()) & set(data.val.files())


@pytest.mark.parametrize(("val_split", "shared"), [("test", None), ("train/{0..0}.tar", 2)])
def test_images_of_both_splits_are_said(tmp_path, val_split, shared):
    root = shards(tmp_path, BY_FOLDER)
    said = [line for line in summary(open_data(recipe(root, val_split=val_split))) if "trained on" in line]
    assert len(said) == (shared is not None)
    assert all(f"{shared} of its 2 images are trained on" in line for line in said)


def test_labels_of_metadata_and_names_of_classes(tmp_path):
    entries = sample("a", 1, json=b'{"label": 5, "group": 0}') + sample("b", 0, cls=None, json=b'{"label": 0}')
    shards(tmp_path, {"x-train.tar": entries, "x-val.tar": sample("c", 0), "classnames.txt": b"ant\nbee\n"})
    data = open_data(recipe(tmp_path))
    assert (data.train.targets.tolist(), data.val.class_names) == ([1, 0], ("ant", "bee"))
    write(tmp_path / "names.txt", b"owl\nfox\n")
    split = open_split(recipe(tmp_path, class_map=str(tmp_path / "names.txt")), "train")
    assert (split.targets.tolist(), split.class_names) == ([1, 0], ("owl", "fox"))
    info = {"splits": {"train": {"filenames": ["x-train.tar"], "alt_label": "group"}}}
    write(tmp_path / "_info.json", json.dumps(info).encode())
    with pytest.raises(DataError, match=r"sample 'b' has no label: expected a \.json with an integer 'group', right"):
        open_split(recipe(tmp_path), "train")
    write(tmp_path / "x-train.tar", tar_bytes(entries[:3]))
    assert open_split(recipe(tmp_path), "train").targets.tolist() == [0]


# Reading


def test_several_processes_read_headers(tmp_path, monkeypatch):
    root = shards(tmp_path, LAYOUTS["patterns"][0])
    alone = open_split(recipe(root), "all")
    monkeypatch.setattr(shards_module, "SHARDS_A_WORKER", 1)
    together = open_split(recipe(root, workers=2), "all")
    assert list(together.files()) == list(alone.files())
    assert together.targets.tolist() == alone.targets.tolist()
    assert contents(together) == contents(alone)
    write(root / "12.tar", tar_bytes(sample("b", "bee")))
    with pytest.raises(DataError, match=r"^\S+/12\.tar, sample 'b': label 'bee' is not an integer$"):
        open_split(recipe(root, workers=2), "all")


@pytest.fixture
def many(tmp_path):
    """A split of nine shards, of which two are empty."""
    files = {f"{i}.tar": shard(*range(i % 4 and 5), first=i) for i in range(1, 10)}
    return open_split(recipe(shards(tmp_path, files)), "all")


def test_few_files_are_open_at_a_time(many, monkeypatch):
    expected = read_naively(many.reader.archives)
    monkeypatch.setattr(archives, "MOST_OPEN", 2)
    order = np.random.RandomState(0).permutation(len(many)).tolist()
    handles = set()
    for index in order:
        assert pixels([many.reader.read(index)]) == [expected[index][0]]
        handles |= set(many.reader._opened.values())
        assert len(many.reader._opened) <= 2
    assert sum(not handle.closed for handle in handles) <= 2


def test_forked_and_pickled_readers_open_files_of_their_own(many):
    assert_forks_read(many, 17)
    assert_copies_read(many)


def test_an_index_of_ten_million_images_takes_less_than_a_gigabyte(tmp_path):
    """By what a smaller one takes of each image: no object of Python's."""
    count = 500
    entries = [entry for i in range(count) for entry in sample(f"{i:020d}", i % 10, png=b"x", txt=b"")]
    root = shards(tmp_path, {"0.tar": entries, "1.tar": entries})
    open_split(recipe(root), "all")
    tracemalloc.start()
    split = open_split(recipe(root), "all")
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(split) == 2 * count
    assert kept / len(split) < 80


def test_the_cache_of_decoded_images_knows_whether_a_shard_has_changed(many):
    def digest(split):
        return FileStates().of(split, World("cpu"))

    root = many.reader.archives[0].parent
    assert digest(many) == digest(open_split(recipe(root), "all"))
    assert digest(many) != digest(many.subset(np.arange(3)))
    assert digest(many.subset(np.arange(3))) != digest(many.subset(np.arange(1, 4)))
    before = digest(many)
    os.utime(root / "9.tar", (1, 1))
    assert digest(many) != before


# Training


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digits as shards, in their order."""
    root = tmp_path_factory.mktemp("digits")
    for name in ("train", "test"):
        split = open_digits(name)
        for number, places in enumerate(np.array_split(np.arange(len(split)), 4)):
            entries = []
            for place in places.tolist():
                image = io.BytesIO()
                split.reader.read(place).save(image, "png")
                entries += sample(f"{place:06d}", split.targets[place], png=image.getvalue())
            shards(root, {f"digits-{name}-{number:04d}.tar": tar_bytes(entries, mtime=0.5)})
    write(root / "classnames.txt", "\n".join("0123456789").encode())
    return root


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["resident", "timm"])
def test_training_on_shards_is_training_on_the_same_images(digits, tmp_path, loader):
    """From the command line: the same batches, so the same losses and weights to the last bit."""
    flags = ["cifar_resnet20.ce_digits", "--epochs", "2", "--warmup-epochs", "0"]
    flags += ["--imbalance-max", "30", "--imbalance-factor", "10", "--color-jitter", "0.2", "--loader", loader]
    places = ["--image-cache", str(tmp_path / "cache"), "--output", str(tmp_path)]
    flags += ["--device", "cpu", "--workers", "1", *places]
    found = []
    for name, data in (("embedded", []), ("shards", ["--dataset", "wds", "--data-dir", str(digits)])):
        assert main(["train", *flags, *data, "--experiment", name]) == 0
        rows = epochs_of(tmp_path / name)
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        weights = (tmp_path / name / "model.safetensors").read_bytes()
        found.append((rows, metrics["result"], metrics["class_counts"], metrics["loader"], weights))
    assert found[0] == found[1]
    assert found[1][3] == loader
    results = tmp_path / "results.json"
    flags = ["--device", "cpu", "--workers", "0", "--results", str(results)]
    assert main(["validate", str(tmp_path / "shards"), *flags]) == 0
    assert json.loads(results.read_text())["heads"] == found[1][1]["heads"]


@pytest.mark.slow
def test_a_look_at_shards(digits, capsys):
    assert main(["data", str(digits), "--dataset", "wds", "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "10 classes, 1,457 training images" in out
    assert "evaluation: 340 images of 10 classes" in out
    assert "kinds: PNG L: 1,797" in out
    assert main(["data", str(digits)]) == 2
    assert "--dataset wds reads WebDataset shards" in capsys.readouterr().err


# Bad input


def one(entries, name="train/0.tar"):
    """A training shard, and one to evaluate on."""
    return lambda root: shards(root, {name: entries, "val/0.tar": shard(0, 1)})


def layout(*names, **files):
    return lambda root: shards(root, dict.fromkeys(names, GOOD) | files)


def described(**train):
    entry = {"filenames": ["a-0.tar", "a-1.tar"], "shard_lengths": [2, 1], **train}
    info = {"splits": {"train": entry, "validation": {"filenames": ["a-0.tar"]}}}
    return with_info(info)


def with_info(info):
    return lambda root: shards(root, DESCRIBED | {"_info.json": json.dumps(info).encode()})


def gone(root):
    return root / "gone"


def pipe(root):
    shards(root, {"train/0.tar": shard(0, 1)})
    os.mkfifo(root / "train" / "1.tar")


WHOLE = tar_bytes(shard(0, 1))
GOOD = shard(0, 1)
# What makes the data, and what the message says; FILE is the training shard.
BAD = {
    "no folder": (gone, "data_dir ROOT/gone does not exist"),
    "empty folder": (lambda root: None, r"there are no shards \(\.tar\) in ROOT, nor in folders in it"),
    "no image": (one([*GOOD, ("b.cls", b"1"), ("b.txt", b"")]), r"FILE, sample 'b' has a label and, .* has \.cls, \."),
    "a kind that is not read": (one([("b.avif", b""), ("b.cls", b"1")]), r"FILE, sample 'b' has a label .* \.avif, "),
    "no label": (
        one(sample("b", 0, cls=None, txt=b"a bee")),
        r"FILE, sample 'b' has no label: expected a \.cls, or a \.json with an integer 'label', .* has \.png, \.txt",
    ),
    "metadata without label": (one(sample("b", 0, cls=None, json=b'{"x": 1}')), r"FILE, sample 'b' has no label"),
    "metadata that is a list": (one(sample("b", 0, cls=None, json=b"[]")), r"FILE, sample 'b' has no label"),
    "label of text": (one([*GOOD, *sample("b", "bee")]), "FILE, sample 'b': label 'bee' is not an integer"),
    "label not UTF-8": (one(sample("b", 0, cls=b"\xff")), "FILE, sample 'b': label .* is not an integer"),
    "empty label": (one(sample("b", "")), "FILE, sample 'b': label '' is not an integer"),
    "negative label": (one(sample("b", -1)), "FILE, sample 'b': label -1 is negative"),
    "large label": (one(sample("b", 10**12)), "FILE, sample 'b': label 1000000000000 is too large"),
    "long label": (one(sample("b", "1" * 100)), r"FILE, sample 'b': its \.cls has 100 bytes; expected at most 64"),
    "label with a fraction": (one(sample("b", 0, cls=None, json=b'{"label": 1.5}')), "'b': label 1.5 is not an int"),
    "label of truth": (one(sample("b", 0, cls=None, json=b'{"label": true}')), "'b': label True is not an integer"),
    "no JSON": (one(sample("b", 0, cls=None, json=b"{")), r"FILE, sample 'b': its \.json cannot be read: Expecting"),
    "label without a name": (
        lambda root: shards(one([*GOOD, *sample("b", 2)])(root), {"classnames.txt": b"ant\nbee\n"}),
        r"FILE/b\.png: its label 2 has no name; ROOT/classnames\.txt names classes 0\.\.1",
    ),
    "class left out": (one(shard(0, 2)), "no training images of class 1"),
    "two images": (one(sample("b", 0, jpg=png(1))), r"FILE, sample 'b' has two images: 'b\.jpg', 'b\.png'"),
    "an image twice": (one([*sample("b", 0), ("b.png", b"")]), r"FILE, sample 'b' has two members \.png"),
    "a label twice": (one([("b.cls", b"1"), *sample("b", 0)]), r"FILE, sample 'b' has two members \.cls"),
    "a key twice": (
        one([*sample("b", 0), *sample("c", 1), *sample("b", 0)]),
        "FILE, sample 'b': members with this key stand apart",
    ),
    "by kind": (one(sorted(GOOD, key=lambda entry: entry[0][-3:])), "FILE, sample '000000' has a label and, right"),
    "a link": (
        one([("b.cls", b"1"), ("b.png", of_type(tarfile.LNKTYPE, "a.png"))]), r"FILE, sample 'b': 'b\.png' is a link",
    ),
    "a device": (one([("b.png", of_type(tarfile.CHRTYPE))]), r"FILE, sample 'b': 'b\.png' is a sparse member or a dev"),
    "no tar": (one(b"no tar" * 200), "cannot read FILE as a tar archive"),
    "no bytes": (one(b""), "cannot read FILE as a tar archive: empty file"),
    "ends between members": (one(WHOLE[:2048]), "cannot read FILE as a tar .*truncated or damaged after 2 members"),
    "ends within a member": (one(WHOLE[:1800]), "cannot read FILE as a tar .*: unexpected end of data after 2 members"),
    "a damaged header": (
        one(WHOLE[:1024] + b"?" + WHOLE[1025:]), "cannot read FILE as a tar archive: truncated or damaged after 1 memb",
    ),
    "without samples": (one([]), "there are no samples in FILE"),
    "compressed": (one(gzip.compress(WHOLE)), "FILE is compressed, and its images are read by offset; unpack it"),
    "compressed by name": (one(b"", "train/0.tar.gz"), r"train/0\.tar\.gz is compressed, and shards are read by"),
    "zstd": (one(b"\x28\xb5\x2f\xfd" + bytes(100)), r"FILE is an archive of another kind \(zstd\)"),
    "a gap": (layout("train/a-08.tar", "train/a-09.tar", "train/a-11.tar"), r"ROOT/train: the shard a-10\.tar is miss"),
    "a gap in names": (
        layout("x-train-0.tar", "x-train-2.tar", "x-val-0.tar"), r"ROOT: the shard x-train-1\.tar is missing",
    ),
    "fewer than they say": (
        layout("train-00001-of-00003.tar", "train-00000-of-00003.tar"),
        r"the shard train-00002-of-00003\.tar is missing",
    ),
    "a pipe": (pipe, r"ROOT/train/1\.tar is not a regular file; expected a shard"),
    "a split that is not there": (layout("train/0.tar", "dev/0.tar"), "ROOT has no split 'validation'; it has dev, "),
    "training alone": (layout("x-train-0.tar"), "has no split 'validation'; it has train; patterns name some"),
    "shards beside folders": (layout("0.tar", "val/0.tar"), r"ROOT holds the shard 0\.tar beside folders .*\(val\)"),
    "of no split": (layout("train-0.tar", "x-0.tar"), r"the shard x-0\.tar belongs to no split, and train-0\."),
    "described: no shard": (described(filenames=["gone.tar"], shard_lengths=[1]), r"there is no shard ROOT/gone\.tar"),
    "described: out": (described(filenames=["../x.tar"]), r"ROOT/_info\.json: '\.\./x\.tar' must be a path below"),
    "described: lengths": (described(shard_lengths=[2, 2]), r"ROOT/a-1\.tar holds 1 sample, and its description says"),
    "described: as many": (described(shard_lengths=[2]), "split 'train' has 2 shards and lengths of 1"),
    "described: no names": (described(filenames=3), r"_info\.json does not describe .*: splits\.train\.filenames: exp"),
    "described: no JSON": (layout(**{"a.tar": GOOD, "_info.json": b"{"}), r"_info\.json does not describe splits of"),
    "described: a list": (with_info({"splits": []}), "does not describe .*: splits: expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path, capsys, name):
    make, message = BAD[name]
    root = make(tmp_path)
    place = root if name == "no folder" else tmp_path
    message = message.replace("FILE", "ROOT/train/0.tar").replace("ROOT", re.escape(str(tmp_path)))
    with pytest.raises(DataError, match=message) as raised:
        open_data(recipe(place))
    assert "\n" not in str(raised.value)
    flags = ["--dataset", "wds", "--data-dir", str(place), "--val-split", "validation", "--imbalance", "none"]
    flags += ["--output", str(tmp_path / "runs"), "--device", "cpu", "--workers", "0"]
    assert main(["train", "cifar_resnet20.ce_digits", *flags]) == 2
    assert capsys.readouterr().err == f"mbib: error: {raised.value}\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0..3}.tar", r"there is no shard ROOT/2\.tar"),
        ("{1..0}.tar", r"pattern of shards '\{1\.\.0\}\.tar': expected \{1\.\.0\} to rise"),
        ("{0..999999}{0..9}.tar", "to rise, up to 1,000,000 shards"),
        ("../{0..1}.tar", r"'\.\./\{0\.\.1\}\.tar' must be a path below the data folder"),
        ("/{0..1}.tar", "must be a path below the data folder"),
        ("{a,b}.tar", r"there is no shard ROOT/\{a,b\}\.tar"),
    ],
)
def test_patterns_that_cannot_be(tmp_path, pattern, message):
    root = shards(tmp_path, {"0.tar": shard(0, 1), "1.tar": shard(0, 1)})
    with pytest.raises(DataError, match=message.replace("ROOT", re.escape(str(tmp_path)))):
        open_data(recipe(root, train_split=pattern, val_split="1.tar"))


def test_a_shard_that_is_gone_later_breaks_its_images_alone(many):
    many.reader.archives[0].unlink()
    dataset = ImageDataset(many, "RGB", lambda image: image.size, replace_broken=False)
    assert dataset[0] is None
    assert dataset[9] is not None
    assert dataset.broken() == [many.path(0)]
