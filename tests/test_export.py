"""Exports against the model itself, read back by other means than the exporter's own check."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file

from mbib_timm.cli import main
from mbib_timm.errors import MbibError
from mbib_timm.inference import export as export_module
from mbib_timm.inference.export import FORMATS, export


def read_back(format, file):
    if format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    return torch.export.load(file).module() if format == "torch-export" else torch.jit.load(str(file))


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_exported_logits_are_the_models_for_any_batch(finished_run, tmp_path, format):
    if format == "onnx":
        pytest.importorskip("onnxscript")
    file = export(str(finished_run), format, tmp_path / f"model{FORMATS[format][0]}")
    model = timm.create_model(f"local-dir:{finished_run}", pretrained=True).eval()
    exported = read_back(format, file)
    for batch_size in (1, 7):
        images = torch.rand(batch_size, 3, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-4)
    described = json.loads(file.with_suffix(".json").read_text())
    assert described["input"]["input_size"] == [3, 16, 16]
    assert described["class_names"] == [str(label) for label in range(10)]
    assert described["logit_prior"] == "uniform"


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


def test_onnx_without_its_packages_says_what_to_install(finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", str(finished_run), "--format", "onnx", "--output", str(tmp_path / "model.onnx")]) == 2
    assert "pip install 'mbib-timm[onnx]'" in capsys.readouterr().err


def test_the_file_is_named_after_the_model(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export(str(finished_run), "torchscript").name == "mbib_resnet20.digits.torchscript.pt"
