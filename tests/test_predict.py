"""Prediction: against the model called by hand, over files, folders and tars, with broken images and other priors."""

import csv
import io
import json
import tarfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from mbib_timm.cli import main
from mbib_timm.data.sources import open_digits
from mbib_timm.errors import DataError, MbibError
from mbib_timm.inference.predict import Broken, Prediction, Predictor, find_images, predict, read_class_counts
from mbib_timm.models.weights import load_model


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of digits as images, with natural names, one of them in a folder of its own."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    generator = np.random.default_rng(0)
    for number in range(12):
        array = generator.integers(0, 256, (20 + number, 24, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / ("more" if number == 11 else ".") / f"image{number}.png")
    return folder


def by_hand(run, path):
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        v1, v2, v3, z = (logits[0] for logits in model.forward_heads(transform(Image.open(path).convert("RGB"))[None]))
    return {"v1": v1, "v2": v2, "v3": v3, "z": z, "prediction": (v3 + z) / 2}


@pytest.mark.parametrize("head", ["prediction", "v1", "v3", "z"])
def test_probabilities_are_those_of_the_model(finished_run, photos, head):
    predictor = Predictor(load_model(str(finished_run)), head)
    found = list(predictor.predict(find_images([str(photos)]), top_k=10, batch_size=5))
    assert [item.image for item in found] == [
        *(str(photos / f"image{number}.png") for number in range(11)), str(photos / "more" / "image11.png")
    ]  # fmt: skip
    for item in found:
        assert isinstance(item, Prediction)
        expected = torch.softmax(by_hand(finished_run, item.image)[head], dim=0)
        labels, values = zip(*item.classes, strict=True)
        assert list(values) == sorted(values, reverse=True)
        torch.testing.assert_close(torch.tensor(values), expected[list(labels)], rtol=1e-4, atol=1e-6)
        assert sorted(labels) == list(range(10))


def test_a_tar_gives_what_its_files_give(finished_run, photos, tmp_path):
    with tarfile.open(tmp_path / "photos.tar.gz", "w:gz") as tar:
        tar.add(photos, arcname=".")
    predictor = Predictor(load_model(str(finished_run)))
    packed = list(predictor.predict(find_images([str(tmp_path / "photos.tar.gz")])))
    loose = list(predictor.predict(find_images([str(photos)])))
    assert [item.classes for item in packed] == [item.classes for item in loose]
    assert all("photos.tar.gz/" in item.image for item in packed)


def test_another_prior_weighs_the_probabilities_by_its_frequencies(finished_run, photos, tmp_path):
    """Bayes: p'(y|x) is in proportion to p(y|x) n_y, since training with log n leaves logits for equal frequencies."""
    model = load_model(str(finished_run))
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = Predictor(model).probabilities(images).double()
    counts = torch.as_tensor(model.class_counts, dtype=torch.float64)
    expected = plain * counts / (plain * counts).sum(dim=1, keepdim=True)
    torch.testing.assert_close(
        Predictor(model, prior="train").probabilities(images).double(), expected, rtol=1e-4, atol=1e-7
    )
    torch.testing.assert_close(
        Predictor(model, prior="uniform").probabilities(images).double(), plain, rtol=1e-5, atol=0
    )
    given = tmp_path / "counts.txt"
    given.write_text("\n".join(str(10 + 5 * label) for label in range(10)))
    weights = torch.arange(10, 60, 5, dtype=torch.float64)
    expected = plain * weights / (plain * weights).sum(dim=1, keepdim=True)
    torch.testing.assert_close(
        Predictor(model, prior=str(given)).probabilities(images).double(), expected, rtol=1e-4, atol=1e-7
    )
    given.write_text("1\n2\n")
    with pytest.raises(MbibError, match="has 2 classes, the model 10"):
        Predictor(model, prior=str(given))


@pytest.mark.parametrize("text", ["500\n20\n3\n", "[500, 20, 3]"])
def test_reading_class_counts(tmp_path, text):
    (tmp_path / "counts").write_text(text)
    assert read_class_counts(tmp_path / "counts").tolist() == [500, 20, 3]


@pytest.mark.parametrize("text", ["500\nmany\n", "[500, 0]", "[1.5, 2]", "", "[[1]]"])
def test_class_counts_that_are_none(tmp_path, text):
    (tmp_path / "counts").write_text(text)
    with pytest.raises(DataError, match="expected a positive integer for each class"):
        read_class_counts(tmp_path / "counts")


def test_a_model_that_does_not_say_its_prior_cannot_be_given_another(finished_run, tmp_path):
    config = json.loads((finished_run / "config.json").read_text())
    assert config["logit_prior"] == "uniform"
    del config["logit_prior"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((finished_run / "model.safetensors").read_bytes())
    with pytest.raises(MbibError, match="does not say which class frequencies"):
        Predictor(load_model(str(tmp_path)), prior="train")


def test_heads_that_a_model_has_not(finished_run):
    model = load_model(str(finished_run))
    plain = type(model)(model.source, timm.create_model("cifar_resnet20").eval(), model.preprocessing, None, None, None)
    with pytest.raises(MbibError, match=r"unknown head of .* 'z': choose from prediction"):
        Predictor(plain, "z")
    with pytest.raises(MbibError, match=r"unknown head of .* 'v4': did you mean 'v3'"):
        Predictor(model, "v4")


def test_broken_images_are_listed_at_the_end(finished_run, photos, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes((photos / "image0.png").read_bytes()[:60])
    command = ["predict", str(finished_run), str(tmp_path / "broken.png"), str(photos), "--device", "cpu"]
    assert main([*command, "--workers", "1", "--format", "jsonl"]) == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 12
    assert all(len(line["classes"]) == 5 for line in lines)
    assert err.startswith("could not read 1 of the images:")
    assert "broken.png: " in err


def test_formats_hold_the_same(finished_run, photos, tmp_path, capsys):
    image = str(photos / "image3.png")
    command = ["predict", str(finished_run), image, "--device", "cpu", "--workers", "0", "--top-k", "2"]
    texts = {}
    for format in ("table", "csv", "jsonl"):
        assert main([*command, "--format", format]) == 0
        texts[format] = capsys.readouterr().out
    (line,) = [json.loads(text) for text in texts["jsonl"].splitlines()]
    rows = list(csv.DictReader(io.StringIO(texts["csv"])))
    assert [row["name"] for row in rows] == [item["name"] for item in line["classes"]]
    assert [int(row["rank"]) for row in rows] == [1, 2]
    for row, item in zip(rows, line["classes"], strict=True):
        assert float(row["probability"]) == pytest.approx(item["probability"], abs=1e-6)
        assert f"{100 * item['probability']:6.2f} %  {item['name']}" in texts["table"]
    assert main([*command, "--format", "csv", "--output", str(tmp_path / "out.csv")]) == 0
    assert (tmp_path / "out.csv").read_text() == texts["csv"]


def test_the_test_images_are_predicted_as_evaluation_counts_them(finished_run, tmp_path):
    """Through files and PIL, without the loaders: the accuracy of metrics.json comes out."""
    split = open_digits("test")
    targets = split.targets
    for number in range(len(targets)):
        split.reader.read(number if split.indices is None else int(split.indices[number])).save(
            tmp_path / f"{number}.png"
        )
    predictor = Predictor(load_model(str(finished_run)))
    found = list(predictor.predict(find_images([str(tmp_path)]), top_k=1, batch_size=128))
    right = sum(item.classes[0][0] == target for item, target in zip(found, targets.tolist(), strict=True))
    expected = json.loads((finished_run / "metrics.json").read_text())["result"]["heads"]["prediction"]["top1"]
    assert 100 * right / len(targets) == pytest.approx(expected, abs=0.3)  # a near-tie may fall the other way


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing.png", "there is no image, folder or tar at"),
        (lambda folder: folder, "no images in"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path, make, message):
    with pytest.raises(DataError, match=message):
        find_images([str(make(tmp_path))])


def test_bad_models_end_with_one_line(photos, capsys):
    image = str(photos / "image0.png")
    for target, message in (
        ("mbib_resnet33", "unknown model or folder 'mbib_resnet33'"),
        ("mbib_resnet50.inat", "unknown tag of a model 'mbib_resnet50.inat'"),
        ("ftp:model", "unknown source of models 'ftp'"),
        ("bib_resnet20", "has no weights of its own"),
        (str(photos), "holds no config.json"),
    ):
        assert main(["predict", target, image, "--device", "cpu"]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert len(err.splitlines()) == 1


def test_predict_returns_the_broken(finished_run, tmp_path, capsys):
    (tmp_path / "no.jpg").write_bytes(b"no image")
    broken = predict(str(finished_run), [str(tmp_path)], device="cpu")
    assert [type(item) for item in broken] == [Broken]
    assert broken[0].image == str(tmp_path / "no.jpg")
