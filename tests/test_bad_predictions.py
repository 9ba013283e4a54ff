"""Bad input to `mbib predict` and `--prior`: one message, exit status 2, nothing half-written or waited for."""

import io
import os

import numpy as np
import pytest
from archive_images import write
from test_bad_input import ROWS, a_zip, empty, of_model, refused, truncated, with_file

# Class names of the digits, on which the run is trained.
DIGITS = [str(i) for i in range(10)]
SHARES = "".join(f"{name},1\n" for name in DIGITS)
# Of a file of predictions with one class each.
HEADER = "image,label,predicted,probability,class_1,probability_1,error\n"


def predict(*flags):
    return of_model("predict", "images", "--device", "cpu", "--workers", "0", *flags)


def prior(text, name="prior.csv"):
    return with_file(name, text, predict("--output", "out.csv", "--prior", name))


def resumed(text, *flags, name="out.csv"):
    return with_file(name, text, predict("--resume", "--output", name, "--top-k", "1", *flags))


def with_pipe(name, arguments):
    """Arguments that name a pipe into which nobody writes, once it is made."""

    def made(root, run):
        (root / name).parent.mkdir(exist_ok=True)
        os.mkfifo(root / name)
        return arguments(root, run)

    return made


def saved(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def input_for_output(root, run):
    write(root / "t.csv", b"path\nimages/ant/0.png\n")
    return ["predict", str(run), "t.csv", "--output", "./t.csv"]


CASES = {
    # Priors
    "prior: neither word nor file": (predict("--prior", "unifrom"), "'unifrom': did you mean 'uniform'"),
    "prior: unknown class": (prior(SHARES + "fox,1\n"), r"prior\.csv: unknown class 'fox'"),
    "prior: estimate and resume": (
        predict("--prior", "estimate", "--resume", "--output", "x.csv"),
        "--prior estimate needs all images at once; omit --resume",
    ),
    "prior: validate": (
        with_file("p.csv", SHARES + "fox,1\n", of_model("validate", "--prior", "p.csv", "--results", "out/m.json")),
        r"p\.csv: unknown class 'fox'",
    ),
    # Places
    "predict: no images": (of_model("predict", "gone.png"), r"gone\.png"),
    "predict: empty folder": (
        lambda root, run: ["predict", str(run), empty(root), "--output", "out.csv"],
        "no images in data",
    ),
    "predict: truncated archive": (
        lambda root, run: ["predict", str(run), truncated(root), "--output", "out.csv"],
        r"cannot read x\.tar",
    ),
    "predict: no model": (lambda root, run: ["predict", "local-dir:gone", "images"], "gone"),
    "predict: output is a folder": (predict("--output", "images"), "images is a folder"),
    "predict: file above the output": (
        with_file("notes.txt", "", predict("--output", "notes.txt/out.csv")),
        r"cannot make the folder notes\.txt: notes\.txt is a file",
    ),
    "predict: probabilities in a table": (predict("--probabilities"), "--probabilities needs --format"),
    "predict: resume a table": (
        predict("--resume", "--output", "x.parquet"),
        "--resume continues a CSV or JSON lines file",
    ),
    "predict: resume with embeddings": (
        predict("--resume", "--output", "x.csv", "--embeddings", "x.npy"),
        "--embeddings needs all images at once",
    ),
    "predict: parquet to the terminal": (predict("--format", "parquet"), "--format parquet needs --output"),
    "predict: suffix of embeddings": (predict("--embeddings", "x.csv"), r"--embeddings x\.csv.*\.npy or \.parquet"),
    "predict: resume without output": (predict("--resume"), "--resume continues .*--output"),
    "predict: resume another file": (
        with_file("out.csv", "a,b\n1,2\n", predict("--resume", "--output", "out.csv")),
        r"--resume: out\.csv does not hold predictions",
    ),
    "predict: resume other lines": (
        with_file("o.jsonl", "[1]\n", predict("--resume", "--output", "o.jsonl")),
        r"--resume: o\.jsonl does not hold predictions",
    ),
    "predict: resume another model's": (
        with_file(
            "o.csv",
            "image,label,predicted,probability,class_1,probability_1,error\nx.png,,fox,0.9,fox,0.9,\n",
            predict("--resume", "--output", "o.csv", "--top-k", "1"),
        ),
        r"--resume: o\.csv does not hold .*\(the model has no class 'fox'\); repeat the flags",
    ),
    "predict: over another table": (
        with_file("labels.csv", "image,label\nx.png,fox\n", predict("--output", "labels.csv")),
        r"--output labels\.csv: the existing file holds no predictions of format csv, and is not replaced",
    ),
    "predict: over other lines": (
        with_file("o.jsonl", '{"path": 1}\n', predict("--output", "o.jsonl")),
        r"--output o\.jsonl: the existing file holds no predictions of format jsonl",
    ),
    "predict: over another parquet": (
        with_file("o.parquet", "PAR1", predict("--output", "o.parquet")),
        r"--output o\.parquet: the existing file holds no predictions of format parquet",
    ),
    "predict: over notes": (
        with_file("notes.txt", "a\nb\n", predict("--output", "notes.txt", "--format", "table")),
        r"--output notes\.txt: the existing file holds no predictions of format table",
    ),
    "predict: embeddings over notes": (
        with_file("e.npy", "a\n", predict("--embeddings", "e.npy")),
        r"--embeddings e\.npy: the existing file holds no embeddings of this command, and is not replaced",
    ),
    "predict: embeddings over another array": (
        with_file("e.npy", saved(np.zeros((3, 2), np.int64)), predict("--embeddings", "e.npy")),
        r"--embeddings e\.npy: the existing file holds no embeddings",
    ),
    "predict: embeddings over another parquet": (
        with_file("e.parquet", "PAR1", predict("--embeddings", "e.parquet")),
        r"--embeddings e\.parquet: the existing file holds no embeddings",
    ),
    "predict: a run's file": (
        lambda root, run: ["predict", f"{run}/model.safetensors", "images"],
        r"model\.safetensors is a file, not a folder: give its run's, .*mbib_resnet20\.digits",
    ),
    "predict: a run's name": (
        with_file("runs/first/config.json", "{}", lambda root, run: ["predict", "first", "images"]),
        "unknown model or folder 'first': did you mean 'runs/first'",
    ),
    "export: suffix": (
        of_model("export", "--format", "torchscript", "--output", "x.onnx"),
        r"--output x\.onnx: expected a name that ends in \.pt, for --format torchscript",
    ),
    "predict: one file for two": (
        predict("--output", "x.parquet", "--embeddings", "x.parquet"),
        r"--output and --embeddings are both x\.parquet",
    ),
    "predict: threshold": (predict("--threshold", "1.5"), r"--threshold.*from 0 to 1, got '1\.5'"),
    "predict: head": (predict("--head", "y"), "'y'.*'v1'|'y'.*prediction"),
    "predict: a table that is no text": (
        with_file("t.csv", b"path,label\n\xff.png,a\n", of_model("predict", "t.csv")),
        "line 2: not UTF-8",
    ),
    "predict: no rows": (with_file("t.csv", "path,label\n", of_model("predict", "t.csv")), "names no images"),
    "predict: rows of nothing": (
        with_file("t.csv", "path\n1.png\n2.png\n", of_model("predict", "t.csv")),
        "names 2 images, and none is there",
    ),
    "predict: label column": (
        with_file("t.csv", ROWS, of_model("predict", "t.csv", "--label-column", "species")),
        r"t\.csv has no column 'species'",
    ),
    "predict: cam": (with_file("notes.txt", "", predict("--cam", "notes.txt")), r"--cam notes\.txt: expected a folder"),
    "predict: cam of a head": (predict("--cam", "x", "--head", "z"), "--cam shows what the prediction rests on; omit"),
    "predict: cam over the images": (predict("--cam", "images"), "--cam images lies in images, whose images are"),
    "predict: cam among the images": (predict("--cam", "images/cam"), "--cam images/cam lies in images"),
    "predict: a pipe": (with_pipe("x.png", of_model("predict", "x.png")), r"no image, .* at x\.png"),
    "predict: a device": (of_model("predict", "/dev/zero"), "no image, .* at /dev/zero"),
    "predict: a pipe for a prior": (
        with_pipe("p.csv", predict("--prior", "p.csv")),
        r"cannot read the prior p\.csv: it is not a regular file",
    ),
    "predict: a folder for a prior": (predict("--prior", "./images"), "cannot read the prior images: "),
    "predict: output to a pipe": (
        with_pipe("out.csv", predict("--output", "out.csv")),
        r"out\.csv is a pipe or a device; expected the name of a file",
    ),
    "predict: output to a device": (
        predict("--output", "/dev/full", "--format", "csv"),
        "/dev/full is a pipe or",
    ),
    "predict: parquet in the place of a device": (
        predict("--output", "/dev/null", "--format", "parquet"),
        "/dev/null is a pipe or a device",
    ),
    "predict: output of no kind": (
        predict("--output", "p.xyz"),
        r"p\.xyz: .* in \.csv, \.jsonl, \.parquet; or",
    ),
    "predict: output without a suffix": (predict("--output", "p"), r"--output p: expected a name that ends in \.csv"),
    "predict: output to an empty name": (
        predict("--output", ""),
        "--output: expected a path, got an empty text",
    ),
    "predict: cam to an empty name": (predict("--cam="), "--cam: expected a path, got an empty text"),
    "predict: output to the home folder": (
        predict("--output", "~/out.csv"),
        "cannot make the folder ~: ~ is not expanded here; write the full path",
    ),
    "predict: output to -": (
        predict("--output", "-"),
        "--output -: predictions go to standard output",
    ),
    "predict: output where no folder can be": (
        predict("--output", "/proc/x/y.csv"),
        "cannot make the folder /proc/x: No such file or directory",
    ),
    "predict: output over its input": (
        input_for_output,
        r"--output t\.csv is one of the images or tables",
    ),
    "predict: embeddings are a folder": (
        with_file("x.npy/y", "", predict("--embeddings", "x.npy")),
        r"x\.npy is a folder",
    ),
    "predict: embeddings to a pipe": (with_pipe("x.npy", predict("--embeddings", "x.npy")), r"x\.npy is a pipe"),
    "predict: cam in a pipe": (with_pipe("cam", predict("--cam", "cam")), "--cam cam: expected a folder"),
    "predict: cam below a file": (
        with_file("notes.txt", "", predict("--cam", "notes.txt/cam")),
        r"cannot make the folder notes\.txt/cam: notes\.txt is a file",
    ),
    "predict: batch size": (predict("--batch-size", "0"), "--batch-size: expected a whole number of at least 1"),
    "predict: a zip": (lambda root, run: ["predict", str(run), a_zip(root)], r"x\.zip is an archive .*; unpack it$"),
    "predict: top k": (predict("--top-k", "-3"), "--top-k"),
    "predict: workers": (predict("--workers", "1000"), "--workers: expected a whole number from 0 to 128"),
    "predict: resume other columns": (
        resumed(HEADER.replace("label", "class")),
        "it lacks label and has class",
    ),
    "predict: resume columns in another order": (
        resumed(HEADER.replace("label,predicted", "predicted,label")),
        "of the columns it has another order",
    ),
    "predict: resume half a line of something else": (resumed("dear diary"), "its first line is another"),
    "predict: resume a short row": (resumed(HEADER + "x.png,,3\n"), "line 2 has 3 cells, the header 7"),
    "predict: resume no probability": (resumed(HEADER + "x.png,,3,nan,3,nan,\n"), "nan is not a probability"),
    "predict: resume bytes": (resumed(HEADER.encode() + b"\xff\n"), "can't decode byte 0xff"),
    "predict: resume other images": (
        resumed(HEADER + "x.png,,3,0.9,3,0.9,\n"),
        r"none of the images given, but x",
    ),
    "predict: resume another model's rows": (
        resumed(HEADER + "images/ant/0.png,,3,1.0,3,1.0,\n"),
        r"written by another model, or with another --head or --prior: of images/ant/0\.png it has 1 for '3'",
    ),
    "predict: resume with another threshold": (
        resumed(HEADER + "images/ant/0.png,,3,0.3,3,0.3,\n", "--threshold", "0.9"),
        r"with another --threshold: images/ant/0\.png has probability 0\.3 and is not unsure",
    ),
    "predict: resume with other labels": (
        resumed(HEADER + "images/ant/0.png,ant,3,0.3,3,0.3,\n"),
        r"has the class 'ant' for images/ant/0\.png, which is '' now",
    ),
    "predict: resume deep JSON": (resumed("[" * 100_000 + "\n", name="o.jsonl"), "nested too deep"),
    "predict: resume a list of lines": (resumed("3\n", name="o.jsonl"), r"o\.jsonl does not hold predictions"),
    "predict: resume a line without text": (
        resumed('{"image": 3, "error": "x"}\n', name="o.jsonl"),
        "an image, a label or an error is not text",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_of_predictions_ends_with_one_message(name, finished_run, tmp_path, monkeypatch, capsys):
    if "parquet" in name:
        pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    refused(*CASES[name], tmp_path, finished_run, capsys)
