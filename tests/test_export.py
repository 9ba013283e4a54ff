"""Exports against the model itself, read back by other means than the exporter's own check."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from tiny import previous_run

import mbib_timm
from mbib_timm.cli import main
from mbib_timm.errors import MbibError
from mbib_timm.inference import export as export_module
from mbib_timm.inference.export import FORMATS, export

DOCS = (Path(__file__).parents[1] / "docs" / "export.md").read_text(encoding="utf-8")
(LINES,) = [block for block in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL) if "onnxruntime" in block]
ENTRIES = (
    "model", "output", "class_names", "class_counts", "logit_prior", "mode", "input_size", "interpolation", "crop_pct",
    "crop_mode", "mean", "std", "license", "written_by",
)  # fmt: skip


def read_back(format, file):
    """What computes the file's output, and what the file says of itself."""
    files = dict.fromkeys(ENTRIES, "")
    if format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        files = session.get_modelmeta().custom_metadata_map
        (output,) = session.get_outputs()
        assert output.name == json.loads(files["output"])
        computed = lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])  # noqa: E731
    elif format == "torch-export":
        computed = torch.export.load(file, extra_files=files).module()
    else:
        computed = torch.jit.load(str(file), _extra_files=files)
    return computed, {name: json.loads(text) for name, text in files.items()}


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_exported_outputs_are_the_models_for_any_batch(finished_run, tmp_path, format, capsys):
    if format == "onnx":
        pytest.importorskip("onnxscript")
    arguments = ["--format", format, "--output", str(tmp_path / f"new/model{FORMATS[format].suffix}")]
    model = timm.create_model(f"local-dir:{finished_run}", pretrained=True).eval()
    for softmax in (False, True):  # its own file is replaced
        assert main(["export", str(finished_run), *arguments, *["--softmax"] * softmax]) == 0
        assert "10 class names, the preprocessing and no licence" in capsys.readouterr().out
        (file,) = (tmp_path / "new").iterdir()
        exported, described = read_back(format, file)
        for batch_size in (1, 7):
            images = torch.rand(batch_size, 3, 16, 16)
            with torch.no_grad():
                expected = model(images).softmax(1) if softmax else model(images)
                torch.testing.assert_close(exported(images), expected, rtol=1e-4, atol=1e-4)
        data = timm.data.resolve_model_data_config(model)
        config = json.loads((finished_run / "config.json").read_text())
        assert described == {
            "model": "mbib_resnet20.digits",
            "output": "probabilities" if softmax else "logits",
            "class_names": config["label_names"],
            "class_counts": config["class_counts"],
            "logit_prior": "uniform",
            "mode": "RGB",
            "input_size": [3, 16, 16],
            "interpolation": data["interpolation"],
            "crop_pct": data["crop_pct"],
            "crop_mode": "squash",
            "mean": [*data["mean"]],
            "std": [*data["std"]],
            "license": None,
            "written_by": f"mbib_timm {mbib_timm.__version__}",
        }


def test_the_licence_is_the_models_unless_another_is_given(finished_run, tmp_path, capsys):
    name = "mbib_resnet32.cifar100_lt_if100"
    _, described = read_back("torchscript", export(name, "torchscript", tmp_path / "published.pt"))
    assert (described["model"], described["license"]) == (name, "apache-2.0")
    assert main(["export", name, "--format", "torchscript", "--license", "mit"]) == 2
    assert f"--license mit: {name} states its own, apache-2.0; omit the flag" in capsys.readouterr().err
    file = str(tmp_path / "own.pt")
    assert (
        main(["export", str(finished_run), "--format", "torchscript", "--output", file, "--license", "CC-BY-4.0"]) == 0
    )
    assert read_back("torchscript", file)[1]["license"] == "cc-by-4.0"
    assert main(["export", str(finished_run), "--format", "torchscript", "--license", "apache2"]) == 2
    assert "unknown licence of the Hub 'apache2': did you mean 'apache-2.0'" in capsys.readouterr().err


def photos(folder):
    """Photographs of several shapes, kinds and orientations."""
    rng = np.random.RandomState(0)
    coarse = [rng.randint(0, 256, (5, 6, 3), dtype=np.uint8) for _ in range(4)]
    sizes = [(40, 30), (17, 64), (16, 16), (301, 200)]
    images = [Image.fromarray(a).resize(size, Image.Resampling.BICUBIC) for a, size in zip(coarse, sizes, strict=True)]
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    images[0].convert("L").save(folder / "grey.png")
    return sorted(folder.glob("*.png"))


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize(("side", "crop_pct"), [(36, 0.9), (32, 0.875), (16, 1.0)])  # 36 // 0.9 is 39
def test_the_lines_in_the_docs_cut_images_as_timm_does(tmp_path, side, crop_pct, crop_mode):
    about = {
        "input_size": [3, side, side], "interpolation": "bicubic", "crop_pct": crop_pct, "crop_mode": crop_mode,
        "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.3],
    }  # fmt: skip
    transform = timm.data.create_transform(**about)
    lines = LINES[LINES.index("channels,") : LINES.index("(probabilities")]
    for photo in photos(tmp_path):
        names = {"np": np, "Image": Image, "ImageOps": ImageOps, "about": {**about, "mode": "RGB"}}
        exec(lines.replace("photo.jpg", str(photo)), names)
        expected = transform(Image.open(photo).convert("RGB"))
        torch.testing.assert_close(torch.from_numpy(names["batch"][0]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_lines_in_the_docs_give_the_probabilities_of_predict(finished_run, tmp_path, capsys):
    """In a process that has only what the lines import, and no way to import torch, timm or this package."""
    pytest.importorskip("onnxscript")
    export(str(finished_run), "onnx", tmp_path / "model.onnx", softmax=True)
    capsys.readouterr()
    given = photos(tmp_path)
    arguments = ["--format", "jsonl", "--workers", "0", "--batch-size", "1"]
    assert main(["predict", str(finished_run), *map(str, given), *arguments]) == 0
    expected = [json.loads(line)["classes"] for line in capsys.readouterr().out.splitlines()]
    refuse = "import sys\nfor name in ('torch', 'torchvision', 'timm', 'mbib_timm'): sys.modules[name] = None\n"
    loop = f"for photo in sys.argv[1:]: exec({LINES!r}.replace('photo.jpg', photo))"
    call = [sys.executable, "-c", refuse + loop, *(photo.name for photo in given)]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = [ast.literal_eval(line) for line in done.stdout.splitlines()]
    assert len(printed) == len(expected) == 5
    for found, classes in zip(printed, expected, strict=True):
        assert [*found] == [one["name"] for one in classes]
        assert [*found.values()] == pytest.approx([one["probability"] for one in classes], abs=2e-5)


def test_training_only_heads_stay_behind(finished_run, tmp_path):
    file = export(str(finished_run), "torch-export", tmp_path / "model.pt2")
    kept = torch.export.load(file).state_dict
    assert kept
    assert not [name for name in kept if name.startswith("training_heads")]
    whole = load_file(finished_run / "model.safetensors")
    assert [name for name in whole if name.startswith("training_heads")]


def test_an_export_that_differs_is_not_left_behind(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "largest_difference", lambda *arguments: 0.01)
    with pytest.raises(MbibError, match="logits differ"):
        export(str(finished_run), "torchscript", tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model.pt").write_text('of before "mbib_timm 0.1.0"')
    with pytest.raises(MbibError, match="logits differ"):
        export(str(finished_run), "torchscript", tmp_path / "model.pt")
    assert [file.read_text() for file in tmp_path.iterdir()] == ['of before "mbib_timm 0.1.0"']


def test_a_model_that_gives_no_numbers_is_not_exported(tmp_path, monkeypatch):
    shutil.copytree(previous_run(4), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["bn1.running_var"].fill_(-1)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MbibError, match="model: its logits are not finite"):
        export(str(tmp_path / "model"), "torch-export", tmp_path / "model.pt2")
    assert not (tmp_path / "model.pt2").exists()


def test_onnx_without_its_packages_says_what_to_install(finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_module, "find_spec", lambda name: None)
    assert main(["export", str(finished_run), "--format", "onnx", "--output", str(tmp_path / "model.onnx")]) == 2
    assert "pip install 'mbib-timm[onnx]'" in capsys.readouterr().err


def test_the_file_is_named_after_the_model(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export(str(finished_run), "torchscript").name == "mbib_resnet20.digits.torchscript.pt"


@pytest.mark.parametrize(("place", "target"), [(".", "mine"), (".", "local-dir:mine"), ("mine", "."), ("mine/a", "..")])
def test_a_model_in_a_folder_has_the_folders_name_however_that_is_written(
    finished_run, tmp_path, monkeypatch, place, target
):
    (tmp_path / "mine" / "a").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(finished_run / name, tmp_path / "mine")
    monkeypatch.chdir(tmp_path / place)
    file = export(target, "torchscript")
    assert file.name == "mine.torchscript.pt"
    assert read_back("torchscript", file)[1]["model"] == "mine"


def named_folder(root):
    (root / "out").mkdir()
    return root / "out"


def below_a_file(root):
    (root / "file").write_text("")
    return root / "file" / "model.pt"


def pipe(root):
    os.mkfifo(root / "pipe")
    return root / "pipe"


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (named_folder, "is a folder; expected the name of a file"),
        (below_a_file, "is a file"),
        (pipe, "is a pipe or a device"),
        (lambda root: "/dev/null", "/dev/null is a pipe or a device"),
        (lambda root: root / ("x" * 300), "File name too long"),
        (lambda root: f"{root}/a\0b", "a\\x00b: embedded null byte"),
    ],
)
def test_a_name_that_cannot_be_written_is_refused_before_any_work(place, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_module, "load_model", None)
    output = str(place(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", "resnet50", "--format", "torchscript", "--output", output]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
