"""Bad input to the commands: one message that names what is at fault, exit status 2, and nothing half-written."""

import os
import re
import shutil
import sys
from functools import partial

import pytest
from archive_images import CLASSES, png, tar_bytes, unpacked, write
from small_data import class_folders

from mbib_timm.cli import main

AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def train(*flags):
    settings = ["--epochs", "1", "--warmup-epochs", "0", "--batch-size", "8", "--device", "cpu", "--imbalance", "none"]
    places = ["--workers", "0", "--output", "runs", "--image-cache", "none", "--val-split", "validation"]
    return ["train", "cifar_resnet20.ce_digits", *settings, *places, *flags]


def look(*flags):
    return ["data", "--workers", "0", "--csv", "out.csv", "--write-split", "split.csv", *flags]


def table(text):
    """Arguments of training on a table."""

    def made(root, run):
        write(root / "t.csv", text if isinstance(text, bytes) else text.encode())
        return train("--dataset", "table", "--table", "t.csv", "--data-dir", "images")

    return made


def listed(text, *flags):
    """Arguments of training on a list."""

    def made(root, run):
        write(root / "train.txt", text if isinstance(text, bytes) else text.encode())
        write(root / "val.txt", b"ant/0.png 0\nbee/0.png 1\n")
        lists = ["--train-list", "train.txt", "--val-list", "val.txt"]
        return train("--dataset", "list", "--data-dir", "images", *lists, *flags)

    return made


def inaturalist(text):
    """Arguments of training on iNaturalist's json."""
    lists = ["--train-list", "train.json", "--val-list", "train.json"]
    return with_file(
        "train.json", text, lambda root, run: train("--dataset", "inat2018", "--data-dir", "images", *lists)
    )


def folder(*flags):
    """Arguments of training on the images, with flags."""
    return lambda root, run: train("--dataset", "folder", "--data-dir", "images", *flags)


def with_file(name, text, arguments):
    """Arguments that name a file, once it is written."""

    def made(root, run):
        write(root / name, text if isinstance(text, bytes) else text.encode())
        return arguments(root, run)

    return made


def of_model(command, *flags):
    """Arguments of a command on the run."""
    return lambda root, run: [command, str(run), *flags]


# Places of images, made below a folder; each gives its name.


def empty(root):
    (root / "data").mkdir()
    return "data"


def a_file(root):
    write(root / "notes.txt", b"none")
    return "notes.txt"


def one_class(root):
    unpacked(root / "data", {f"ant/{i}.png": png(i) for i in range(3)})
    return "data"


def folder_around(root):
    unpacked(root / "data", {f"photos/{name}/{i}.png": png(i) for name in ("ant", "bee") for i in range(3)})
    return "data"


def folder_around_with_a_space(root):
    unpacked(root / "my data", {f"photos/{name}/{i}.png": png(i) for name in ("ant", "bee") for i in range(3)})
    return "my data"


def train_alone_with_a_space(root):
    unpacked(root / "my data", {f"train/{name}/{i}.png": png(1) for name in ("ant", "bee") for i in range(3)})
    return "my data"


def only_unknown(root):
    unpacked(root / "data", {"ant/IMG_1": png(1), "bee/2.jpg_large": png(2)})
    return "data"


def only_hidden(root):
    unpacked(root / "data", {".cache/ant/1.png": png(1), "__MACOSX/bee/._1.png": png(1), "ant/.DS_Store": b"x"})
    return "data"


def without_classes(root):
    unpacked(root / "data", {f"{i}.png": png(i) for i in range(3)})
    return "data"


def kinds_not_read(root):
    unpacked(root / "data", {"ant/1.HEIC": b"x", "bee/2.nef": b"x"})
    return "data"


def train_beside_classes(root):
    unpacked(root / "data", {f"{name}/1.png": png(1) for name in ("train/ant", "train/bee", "ant", "bee")})
    return "data"


def train_alone(root):
    unpacked(root / "data", {f"train/{name}/{i}.png": png(1) for name in ("ant", "bee") for i in range(3)})
    return "data"


def single_images(root):
    unpacked(root / "data", {f"{name}/1.png": png(1) for name in ("ant", "bee")})
    return "data"


def unknown_class_in_validation(root):
    names = ("train/ant", "train/bee", "val/ant", "val/Bees")
    unpacked(root / "data", {f"{name}/{i}.png": png(i) for name in names for i in range(2)})
    return "data"


def not_permitted(root):
    (root / "data").mkdir(mode=0)
    return "data"


def truncated(root):
    content = tar_bytes(CLASSES)
    write(root / "x.tar", content[: len(content) // 2])
    return "x.tar"


def a_zip(root):
    shutil.make_archive(str(root / "x"), "zip", root / "images")
    return "x.zip"


def broken_images(root):
    names = ("ant/1.png", "ant/2.png", "bee/1.png", "bee/2.png")
    unpacked(root / "data", dict.fromkeys(names, b"no image"))
    return "data"


def pipe(root):
    os.mkfifo(root / "x.tar")
    return "x.tar"


def only_pipes(root):
    (root / "data" / "ant").mkdir(parents=True)
    os.mkfifo(root / "data" / "ant" / "1.png")
    return "data"


def not_text(root):
    place = os.fsdecode(b"\xe4")
    unpacked(root / place, {f"{name}/{i}.png": png(i) for name in ("ant", "bee") for i in range(3)})
    return place


# What is given for the images of `train` and `data`, and what the message must say.
PLACES = {
    "missing": (lambda root: "gone", "gone"),
    "empty": (empty, "^data is empty; expected a folder"),
    "a file": (a_file, r"notes\.txt"),
    "one class": (one_class, r"data holds 1 class \(ant\); a classifier needs two or more$"),
    "a folder around the classes": (folder_around, r"data holds 1 class \(photos\); .* give --data-dir data/photos"),
    "a space in a folder around": (folder_around_with_a_space, "give --data-dir 'my data/photos'$"),
    "a space before train": (train_alone_with_a_space, "give --data-dir 'my data/train'$"),
    "only unknown": (only_unknown, r"files of unknown kind: 2 \(ant/IMG_1, bee/2\.jpg_large\)"),
    "only hidden": (only_hidden, "no images in class folders under data"),
    "without classes": (without_classes, "no images in class folders under data.*images outside class folders: 3"),
    "kinds that are not read": (kinds_not_read, r"images of unsupported kinds: 2 \(ant/1\.HEIC, bee/2\.nef\)"),
    "train beside classes": (train_beside_classes, "data holds 'train'.*beside 'ant', 'bee': put"),
    "train alone": (train_alone, "data has no split 'validation'; it has train; .*--data-dir data/train"),
    "single images": (single_images, "^data: every class has one image"),
    "unknown class in validation": (unknown_class_in_validation, "'Bees'.*did you mean 'bee'"),
    "not permitted": (not_permitted, "data"),
    "truncated": (truncated, r"cannot read x\.tar as a tar archive: truncated"),
    "a zip": (a_zip, r"x\.zip is an archive of an unsupported kind \(supported: \.tar, .*\); unpack it$"),
    "a pipe": (pipe, r"x\.tar is (a file of another kind|neither a folder nor a supported archive)"),
    "only pipes": (only_pipes, r"no images in .*devices, pipes and sockets: 1 \(ant/1\.png\)"),
    "not UTF-8": (not_text, r"'data_dir': expected text in UTF-8"),
}

IMAGES = "ant/0.png 0\nbee/0.png 1\n"
ROWS = "path,label\nant/0.png,ant\nbee/0.png,bee\nant/1.png,ant\nbee/1.png,bee\n"

CASES = {
    # Lists
    "list: label": (listed(IMAGES + "ant/1.png ant\n"), r"train\.txt, line 3: label 'ant'"),
    "list: empty": (listed("\n"), r"train\.txt lists no images"),
    "list: missing": (listed(IMAGES, "--val-list", "gone.txt"), "'val_list'.*gone.txt"),
    "list: class left out": (listed("ant/0.png 0\nbee/0.png 2\n"), "class 1"),
    "list: class map": (listed(IMAGES, "--class-map", "gone.txt"), r"cannot read the class map gone\.txt"),
    "list: short class map": (
        with_file("map.txt", "ant\n", listed(IMAGES, "--class-map", "map.txt")),
        "label 1 has no name",
    ),
    "list: class map not UTF-8": (
        with_file("map.txt", b"\xe4\n\xe4\n", listed(IMAGES, "--class-map", "map.txt")),
        r"class map map\.txt: byte 0 is not UTF-8",
    ),
    "list: UTF-16": (listed(IMAGES.encode("utf-16")), r"train\.txt, line 1 is not UTF-8; save"),
    "list: digits": (listed(IMAGES + f"ant/1.png {'9' * 5000}\n"), r"train\.txt, line 3: label 9{80} is too large"),
    "list: one line without end": (listed("x" * 100_000), r"train\.txt, line 1 is longer than 8,192 bytes"),
    "list: empty line in the class map": (
        with_file("map.txt", "ant\n\nbee\n", listed(IMAGES, "--class-map", "map.txt")),
        r"class map map\.txt, line 2 is empty",
    ),
    "inat2018: nested": (inaturalist("[" * 100_000), r"train\.json is not iNaturalist's json .*nested too deep"),
    "inat2018: not JSON": (inaturalist("images"), r"train\.json is not iNaturalist's json .*Expecting value"),
    "list: two labels": (
        listed(IMAGES + "./ant//0.png 1\n"),
        r"train\.txt, line 3: \./ant//0\.png has label 1 here, and 0 on an earlier line",
    ),
    # Tables
    "table: empty": (table(""), r"t\.csv is empty"),
    "table: no rows": (table("path,label\n"), r"t\.csv lists no images"),
    "table: wrong separator": (table(ROWS.replace(",", "|")), r"t\.csv.*--path-column names another; commas, semi"),
    "table: open quote": (table(ROWS + '"ant/2.png,ant\n'), r"t\.csv, line 6: .*quotes"),
    "table: not UTF-8": (table(ROWS.encode() + b"\xe4.png,ant\n"), r"t\.csv, line 6: not UTF-8; save"),
    "table: two splits": (
        table("path,label,split\nant/0.png,ant,train\nbee/0.png,bee,train\nant/0.png,ant,val\n"),
        r"t\.csv, line 4: ant/0\.png is in split 'val' here, and in 'train' in t\.csv, line 2",
    ),
    "table: two splits, spelled otherwise": (
        table("path,label,split\nant/0.png,ant,train\nbee/0.png,bee,train\nbee/../ant/0.png,ant,val\n"),
        r"t\.csv, line 4: bee/\.\./ant/0\.png is in split 'val' here, and in 'train' in t\.csv, line 2",
    ),
    "table: unknown split": (
        table("path,label,split\nant/0.png,ant,train\nbee/0.png,bee,train\nant/1.png,ant,dev\n"),
        r"t\.csv has no split 'validation'; it has dev, train: .*--val-split",
    ),
    "table: a spreadsheet": (
        with_file("t.xlsx", "PK", folder("--dataset", "table", "--table", "t.xlsx")),
        r"t\.xlsx: expected a table whose name ends in \.csv",
    ),
    "table: missing": (folder("--dataset", "table", "--table", "gone.csv"), r"'table': no file gone\.csv"),
    "table: in the place of images": (
        with_file("my t.csv", ROWS, lambda root, run: train("--dataset", "folder", "--data-dir", "my t.csv")),
        "a table is read with --dataset table --table 'my t.csv'$",
    ),
    "table: none": (folder("--dataset", "table"), "'table': dataset: table needs"),
    "table: damaged parquet": (
        with_file("t.parquet", "PAR1", folder("--dataset", "table", "--table", "t.parquet")),
        r"cannot read t\.parquet",
    ),
    "data: table": (
        with_file("t.csv", "a;b\n", lambda root, run: look("t.csv")),
        r"t\.csv has no .* 'path'; its columns are: a, b\. --path-column",
    ),
    "table: parquet without pyarrow": (
        with_file("t.parquet", "PAR1", folder("--dataset", "table", "--table", "t.parquet")),
        r"t\.parquet: Parquet needs pyarrow: pip install 'mbib-timm\[table\]'",
    ),
    "data: file above the output": (
        with_file("notes.txt", "", lambda root, run: look("images", "--csv", "notes.txt/out.csv")),
        r"cannot make the folder notes\.txt: notes\.txt is a file",
    ),
    "table: long header": (table("y" * 200_000 + ",ant\n"), r"t\.csv: the first line names no columns"),
    "table: long field": (table("path,label\n" + "y" * 200_000 + ",ant\n"), r"t\.csv, line 2: field larger"),
    "data: output is a folder": (lambda root, run: look("images", "--csv", "images"), "images is a folder"),
    "data: an image": (lambda root, run: look("images/ant/0.png"), r"ant/0\.png is a file of another kind"),
    "data: figure": (lambda root, run: look("images", "--figure", "x.gif"), r"--figure x\.gif.*\.png"),
    "data: over another figure": (
        with_file("x.png", png(1), lambda root, run: look("images", "--figure", "x.png")),
        r"--figure x\.png: the existing file is not a figure of this command, and is not replaced; choose another",
    ),
    "data: over another table": (
        with_file("t.csv", ROWS, lambda root, run: ["data", "images", "--workers", "0", "--csv", "t.csv"]),
        r"--csv t\.csv: the existing file is not a table of this command, and is not replaced",
    ),
    # Groups
    "groups: too deep": (
        folder("--group-by", "folder:3"),
        "'group_by': folder:3 gives no image a group, such as images/",
    ),
    "groups: nothing found": (folder("--group-by", "pattern:(site)"), r"'group_by': pattern:\(site\) gives no image"),
    "groups: no such column": (
        with_file("t.csv", ROWS, folder("--dataset", "table", "--table", "t.csv", "--group-by", "column")),
        r"t\.csv has no groups: there is no column 'group', .*--group-column",
    ),
    "groups: one of each class": (folder("--group-by", "pattern:([a-z]+)/"), "'group_by'.*nothing can be held out"),
    # Images
    "images: all broken": (
        lambda root, run: train("--dataset", "folder", "--data-dir", broken_images(root), "--broken", "stop"),
        r"images that cannot be read: 4; --broken skip leaves them out(\n  data/(ant|bee)/[12]\.png: [^\n]+){4}$",
    ),
    "images: all broken, skipped": (
        lambda root, run: train("--dataset", "folder", "--data-dir", broken_images(root), "--broken", "skip"),
        r"none of the 4 images of split 'all' can be read; the first is data/ant/1\.png",
    ),
    "images: all broken, replaced": (
        lambda root, run: train("--dataset", "folder", "--data-dir", broken_images(root)),
        r"data/(ant|bee)/[12]\.png",
    ),
    # Evaluation
    "validate: unknown class": (
        of_model("validate", "--dataset", "folder", "--data-dir", "images", "--results", "out/m.json"),
        "4 classes not in training: 'ant'.*; training has '0', '1'.*; to learn these: mbib train .* --model",
    ),
    "validate: results": (of_model("validate", "--results", "m.csv"), r"--results m\.csv: expected .*JSON"),
    "validate: file above the results": (
        with_file("notes.txt", "", of_model("validate", "--results", "notes.txt/m.json")),
        r"cannot make the folder notes\.txt: notes\.txt is a file",
    ),
    "validate: over other results": (
        lambda root, run: ["validate", str(run), "--results", f"{run}/metrics.json"],
        r"--results \S+/metrics\.json: the existing file holds no results of this command, and is not replaced",
    ),
    "validate: over no JSON": (
        with_file("m.json", "notes", of_model("validate", "--results", "m.json")),
        r"--results m\.json: the existing file holds no results",
    ),
    "validate: over predictions": (
        with_file("m_predictions.csv", ROWS, of_model("validate", "--results", "m.json")),
        r"--results m_predictions\.csv: the existing file holds something else, and is not replaced",
    ),
    "aggregate: over other results": (
        with_file("m.json", '{"target": "x"}', of_model("aggregate", "--results", "m.json")),
        r"--results m\.json: the existing file holds no results of this command",
    ),
    "aggregate: results are a folder": (of_model("aggregate", "--results", "images"), "images is a folder"),
    "aggregate: file above the results": (
        with_file("notes.txt", "", of_model("aggregate", "--results", "notes.txt/m.json")),
        r"cannot make the folder notes\.txt: notes\.txt is a file",
    ),
    "analyze: output is a file": (
        with_file("notes.txt", "", of_model("analyze", "--output", "notes.txt")),
        r"cannot make the folder notes\.txt: notes\.txt is a file",
    ),
    "validate: data": (of_model("validate", "--dataset", "folder", "--data-dir", "gone"), "data_dir gone"),
    "validate: split": (of_model("validate", "--split", "dev"), "'dev'"),
    "validate: no model": (lambda root, run: ["validate", "gone"], "gone"),
    # Export, publish, report
    "export: licence": (of_model("export", "--format", "onnx", "--license", "cc-by-4"), "'cc-by-4'.*'cc-by-4.0'"),
    "export: over another model": (
        with_file("x.onnx", "somebody's", of_model("export", "--format", "onnx", "--output", "x.onnx")),
        r"--output x\.onnx: the existing file is not an export of this package, and is not replaced",
    ),
    "export: no model": (
        lambda root, run: ["export", "local-dir:gone", "--format", "onnx", "--output", "out/x.onnx"],
        "gone",
    ),
    "export: format": (of_model("export", "--format", "tflite"), "'tflite'.*onnx"),
    "export: output is a folder": (
        of_model("export", "--format", "torch-export", "--output", "images"),
        "images is a folder; expected the name of a file",
    ),
    "export: file above the output": (
        with_file("notes.txt", "", of_model("export", "--format", "torch-export", "--output", "notes.txt/x.pt2")),
        r"cannot make the folder notes\.txt: notes\.txt is a file",
    ),
    "publish: missing": (lambda root, run: ["publish", "gone", "--repo-id", "a/b"], "there is no folder gone"),
    "publish: unfinished": (
        lambda root, run: ["publish", unfinished(root, run), "--repo-id", "a/b"],
        r"runs/copy has no metrics\.json: the run is not finished",
    ),
    "publish: damaged config": (
        lambda root, run: ["publish", damaged(root, run, "config.json"), "--repo-id", "a/b", "--dry-run"],
        r"runs/copy/config\.json: Expecting property name",
    ),
    "publish: of another run": (
        lambda root, run: ["publish", rewritten(root, run, "    144,", "    145,"), "--repo-id", "a/b", "--dry-run"],
        r"runs/copy: class_counts of config\.json are not those of metrics\.json",
    ),
    "publish: licence": (of_model("publish", "--repo-id", "a/b", "--license", "apache"), "'apache'.*'apache-2.0'"),
    "publish: repository": (of_model("publish", "--repo-id", "a b/c"), "a b/c: there is no such name"),
    "report: missing": (lambda root, run: ["report", "gone", "-o", "out/r.html"], "there is no gone"),
    "report: unfinished": (lambda root, run: ["report", "images", "-o", "out/r.html"], "images.*not a finished run"),
    "report: suffix": (of_model("report", "-o", "r.pdf"), r"--output r\.pdf.*HTML"),
    "report: output is a folder": (
        with_file("r.html/x", "", of_model("report", "-o", "r.html")),
        r"r\.html is a folder",
    ),
    "report: over another page": (
        with_file("r.html", "<html>Written by hand</html>", of_model("report", "-o", "r.html")),
        r"--output r\.html: the existing file is not a report, and is not replaced",
    ),
    "report: damaged": (
        with_file("run/metrics.json", "{", lambda root, run: ["report", "run", "-o", "r.html"]),
        r"run/metrics\.json",
    ),
    # Other files that a recipe names
    "train: a plugin of another kind": (
        with_file("own.yaml", "lr: 1\n", folder("--plugin", "own.yaml")),
        r"plugin own\.yaml: expected a file whose name ends in \.py, or the name of a module",
    ),
    "train: no name of a data set": (lambda root, run: train("--dataset", "hfds/"), "hfds/"),
    # Runs that are there
    "train: a run is there": (
        lambda root, run: ["train", *places_of(root, run)],
        "already holds a run: resume it with --resume auto",
    ),
    "train: damaged checkpoints": (
        lambda root, run: ["train", *with_damaged_checkpoints(root, run), "--resume", "auto", "--epochs", "4"],
        r"runs/copy has no sound checkpoint to resume from \(runs/copy/\w+\.ckpt is cut short, damaged",
    ),
    "train: a folder for a recipe": (
        lambda root, run: ["train", "images"],
        "images is a folder, not a recipe; .* --data-dir images",
    ),
    "train: nothing to resume": (folder("--resume", "gone"), "nothing to resume at gone"),
    "train: output is a file": (
        with_file("notes.txt", "", folder("--output", "notes.txt")),
        r"notes\.txt is a file; choose another folder",
    ),
}
for name, (make, message) in PLACES.items():
    CASES[f"train: {name}"] = (
        partial(lambda make, root, run: train("--dataset", "folder", "--data-dir", make(root)), make),
        message,
    )
    CASES[f"data: {name}"] = (partial(lambda make, root, run: look(make(root)), make), message)


def places_of(root, run):
    """Arguments that train where a copy of the run is."""
    shutil.copytree(run, root / "runs" / "copy")
    return ["--output", "runs", "--experiment", "copy", "--device", "cpu", "--workers", "0", "--warmup-epochs", "1"]


def unfinished(root, run):
    """Make a copy of the run that has no result yet."""
    places_of(root, run)
    (root / "runs" / "copy" / "metrics.json").unlink()
    return "runs/copy"


def damaged(root, run, name):
    """Make a copy of the run of which one file is damaged."""
    places_of(root, run)
    write(root / "runs" / "copy" / name, b"{")
    return "runs/copy"


def rewritten(root, run, old, new):
    """Make a copy of the run with another text in config.json."""
    places_of(root, run)
    file = root / "runs" / "copy" / "config.json"
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
    return "runs/copy"


def with_damaged_checkpoints(root, run):
    """Make a copy of the run whose checkpoints are damaged, and return how to train there."""
    arguments = places_of(root, run)
    for file in (root / "runs" / "copy").glob("*.ckpt"):
        file.write_bytes(b"abc")
    return arguments


def contents(folder):
    """Every file and folder below one, with size and time."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name != ".lock":
            found[str(path)] = (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None
    return found


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_with_one_message_and_leaves_nothing(name, finished_run, tmp_path, monkeypatch, capsys):
    if name.endswith("not permitted") and AS_ROOT:
        pytest.skip("root may read any folder")
    if name.endswith("without pyarrow"):
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    elif "parquet" in name:
        pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    refused(*CASES[name], tmp_path, finished_run, capsys)


def refused(make, message, root, run, capsys):
    """Run a command that is to end with one message, exit status 2, and nothing written.

    Args:
        make: gives its arguments, of a folder, which is the current one, and a finished run.
        message: expression that the message holds.
        root: the folder, in which images are made.
        run: folder of the run.
        capsys: pytest's.
    """
    class_folders(root)
    argv = make(root, run)
    before = contents(root), contents(run)
    capsys.readouterr()
    status = main(argv)
    out, err = capsys.readouterr()
    assert status == 2
    assert "Traceback" not in out + err
    start, error, text = err.rpartition("mbib: error: ")
    assert error
    assert all(line.startswith("warning: ") for line in start.splitlines())
    assert all(line.startswith("  ") for line in text.splitlines()[1:])
    assert re.search(message, text)
    assert (contents(root), contents(run)) == before
