"""Prediction: against the model called by hand, over files, folders and tars, with broken images and other priors."""

import csv
import errno
import io
import json
import os
import re
import shutil
import tarfile
import types
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mbib_timm.cli import main
from mbib_timm.data.sources import open_digits
from mbib_timm.environment import World
from mbib_timm.errors import DataError, MbibError
from mbib_timm.inference import predict as predict_module
from mbib_timm.inference.inputs import find_images
from mbib_timm.inference.predict import AGAIN, predict
from mbib_timm.inference.prediction_files import OutputChoice, Prediction
from mbib_timm.inference.predictor import Predictor, ScoredBatch
from mbib_timm.inference.tally import Tally
from mbib_timm.models.weights import LoadedModel, find_source, load_model


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


def found_in(path):
    (found,) = find_images([str(path)])
    return found.images


def predicted(predictor, images, top_k=5, batch_size=64):
    return [item for batch in predictor.score(images, batch_size) for item in predictor.items(batch, top_k)]


def by_hand(run, path):
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        v1, v2, v3, z = (logits[0] for logits in model.forward_heads(transform(Image.open(path).convert("RGB"))[None]))
    return {"v1": v1, "v2": v2, "v3": v3, "z": z, "prediction": (v3 + z) / 2}


@pytest.mark.parametrize("head", ["prediction", "v1", "v3", "z"])
def test_probabilities_are_those_of_the_model(finished_run, photos, head):
    predictor = Predictor(load_model(str(finished_run)), head)
    found = predicted(predictor, found_in(photos), top_k=10, batch_size=5)
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
    packed = predicted(predictor, found_in(tmp_path / "photos.tar.gz"))
    loose = predicted(predictor, found_in(photos))
    assert [item.classes for item in packed] == [item.classes for item in loose]
    assert all("photos.tar.gz/" in item.image for item in packed)


def test_classes_are_ranked_by_their_logits(finished_run):
    """Of an overconfident model, most probabilities are 0 in float32, and the order of zeros is any."""
    predictor = Predictor(load_model(str(finished_run)))
    logits = torch.tensor([[200.0, 3, 1, 4, 2, 9, 5, 8, 7, 6], [0, 3, 1, 4, 2, 9, 5, 8, 7, 200]])
    images = [types.SimpleNamespace(path=name, label=None) for name in "ab"]
    first, second = predictor.items(ScoredBatch(images, [None, None], logits, None), top_k=4)
    assert first.classes == [(0, 1.0), (5, 0.0), (7, 0.0), (8, 0.0)]
    assert second.classes == [(9, 1.0), (5, 0.0), (7, 0.0), (8, 0.0)]


@pytest.mark.parametrize("with_features", [False, True])
def test_photographs_of_a_large_batch_get_what_each_gets_alone(finished_run, with_features):
    predictor = Predictor(load_model(str(finished_run)))
    images = torch.randn(20, 3, 16, 80, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole, each = predictor._forward(images, with_features), predictor._forward(images[17:18], with_features)
    for of_all, of_one in zip(whole, each, strict=True):
        assert (of_one is None) is (of_all is None)
        if of_one is not None:
            assert len(of_all) == 20
            torch.testing.assert_close(of_all[17:18], of_one, rtol=1e-4, atol=1e-6)


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
    with pytest.raises(MbibError, match="expected a share for each of the 10 classes, got 2"):
        Predictor(model, prior=str(given))


def test_a_model_that_does_not_say_its_prior_cannot_be_given_another(finished_run, tmp_path):
    config = json.loads((finished_run / "config.json").read_text())
    assert config["logit_prior"] == "uniform"
    del config["logit_prior"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((finished_run / "model.safetensors").read_bytes())
    with pytest.raises(MbibError, match="does not say which class frequencies"):
        Predictor(load_model(str(tmp_path)), prior="train")


def test_a_prior_is_not_for_single_experts(finished_run):
    """Each is trained for class frequencies of its own."""
    model = load_model(str(finished_run))
    network = timm.create_model("experts_resnet32", num_classes=10).eval()
    sade = type(model)(model.source, network, model.preprocessing, None, np.arange(60, 10, -5), "uniform")
    Predictor(sade, prior="train")
    Predictor(sade, "expert1")
    for head in ("expert1", "expert3"):
        with pytest.raises(MbibError, match=f"frequencies of its own, which the model does not say; omit .* {head}"):
            Predictor(sade, head, prior="train")


def test_heads_that_a_model_has_not(finished_run):
    model = load_model(str(finished_run))
    plain = type(model)(model.source, timm.create_model("cifar_resnet20").eval(), model.preprocessing, None, None, None)
    with pytest.raises(MbibError, match=r"unknown head of .* 'z': choose from prediction"):
        Predictor(plain, "z")
    with pytest.raises(MbibError, match=r"unknown head of .* 'v4': choose from prediction, v1"):
        Predictor(model, "v4")


def test_broken_images_are_listed_at_the_end(finished_run, photos, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes((photos / "image0.png").read_bytes()[:60])
    command = ["predict", str(finished_run), str(tmp_path / "broken.png"), str(photos), "--device", "cpu"]
    assert main([*command, "--workers", "1", "--format", "jsonl"]) == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[0] == {
        "image": str(tmp_path / "broken.png"),
        "error": "image file is truncated",
    }
    assert len(lines) == 13
    assert all(len(line["classes"]) == 5 for line in lines[1:])
    assert err.startswith("could not read 1 of 13 images:")
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
    assert [*rows[0]] == [
        *("image", "label", "predicted", "probability"),
        *("class_1", "probability_1", "class_2", "probability_2", "error"),
    ]
    (row,) = rows
    assert row["predicted"] == line["predicted"] == row["class_1"]
    assert float(row["probability"]) == pytest.approx(line["probability"], abs=1e-6)
    for rank, item in enumerate(line["classes"], start=1):
        assert row[f"class_{rank}"] == item["name"]
        assert float(row[f"probability_{rank}"]) == pytest.approx(item["probability"], abs=1e-6)
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
    found = predicted(predictor, found_in(tmp_path), top_k=1, batch_size=128)
    right = sum(item.classes[0][0] == target for item, target in zip(found, targets.tolist(), strict=True))
    expected = json.loads((finished_run / "metrics.json").read_text())["result"]["heads"]["prediction"]["top1"]
    assert 100 * right / len(targets) == pytest.approx(expected, abs=0.3)  # a near-tie may fall the other way


def test_a_path_that_leads_nowhere_is_an_image_that_cannot_be_read_but_not_all_are(finished_run, photos, capsys):
    run, there, gone = str(finished_run), photos / "image0.png", [photos / "gone.png", photos / "no folder"]
    arguments = ["predict", run, *map(str, (gone[0], there, gone[1])), "--format", "jsonl", "--device", "cpu"]
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["image"] for row in rows] == [str(gone[0]), str(there), str(gone[1])]
    assert [bool(row.get("error")) for row in rows] == [True, False, True]
    assert "could not read 2 of 3 images:" in err
    assert f"  {gone[0]}: " in err
    assert main(["predict", run, *map(str, gone), "--device", "cpu"]) == 2
    assert capsys.readouterr() == ("", f"mbib: error: there is no image, folder, archive or table at {gone[0]}\n")
    with pytest.raises(DataError, match="archive or table at ''"):
        find_images([str(there), ""])


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


def test_a_folder_of_runs_and_an_unfinished_run_are_no_models(tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "recipe.yaml").touch()
    with pytest.raises(MbibError, match=r"mine holds no config\.json: its run is not finished; .*--resume auto"):
        find_source(str(tmp_path / "runs" / "mine"))
    (tmp_path / "runs" / "mine" / "config.json").touch()
    with pytest.raises(MbibError, match=r"runs is no run's folder; it holds mine: give one of these"):
        find_source(str(tmp_path / "runs"))


# Labels and what is right of them


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Digits in class folders, of two sites each; a class that the model does not know, hidden files, a broken one."""
    folder = tmp_path_factory.mktemp("labelled")
    split = open_digits("test")
    for number, target in enumerate(split.targets[:60].tolist()):
        place = folder / {7: "lynx"}.get(target, str(target)) / f"site {number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        split.reader.read(number if split.indices is None else int(split.indices[number])).save(place / f"{number}.png")
    (folder / "1" / "no.png").write_bytes(b"no image")
    (folder / "1" / "._no.png").write_bytes(b"of macOS")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "1.png").write_bytes(b"none")
    return folder


def naive(rows):
    """Accuracies in percent from the rows of a CSV: over images, and the mean of the classes'; and the images."""
    known = [row for row in rows if row["label"] in set("0123456789") and not row["error"]]
    right = {row["label"]: [] for row in known}
    for row in known:
        right[row["label"]].append(row["class_1"] == row["label"])
    means = [100 * sum(values) / len(values) for values in right.values()]
    return 100 * sum(sum(values) for values in right.values()) / len(known), sum(means) / len(means), len(known)


def told(text):
    """The numbers of the table of accuracies in what is printed, by row and column."""
    header = re.search(r"^%  +.*$", text, re.MULTILINE)[0].split("  ")
    columns = [name.strip() for name in header if name.strip()][1:]
    found = {}
    for line in text.splitlines():
        name, *numbers = [cell.strip() for cell in line.strip().split("  ") if cell.strip()]
        if len(numbers) == len(columns):
            found[name] = dict(zip(columns, numbers, strict=True))
    return found


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(run, arguments, output, *flags):
    return main(["predict", str(run), *map(str, arguments), "--output", str(output), "--device", "cpu", *flags])


def test_folders_that_are_classes_give_the_accuracy(finished_run, labelled, tmp_path, capsys):
    output = tmp_path / "new" / "folder" / "out.csv"
    assert write(finished_run, [labelled], output, "--batch-size", "7") == 1
    out, err = capsys.readouterr()
    rows = read_csv(output)
    assert len(rows) == 61
    assert {row["label"] for row in rows} == {*"012345689", "lynx"}
    (broken,) = [row for row in rows if row["error"]]
    assert broken["image"] == str(labelled / "1" / "no.png")
    assert (broken["label"], broken["predicted"]) == ("1", "")
    assert "not an image, or damaged, or of a kind" in broken["error"]
    top1, macro, images = naive(rows)
    of = told(out)
    assert (of["prediction"]["overall"], of["prediction"]["macro"]) == (f"{top1:.2f}", f"{macro:.2f}")
    assert of["prediction"].keys() == {"overall", "macro", "macro F1", "many", "medium", "few"}, (
        "those of mbib validate"
    )
    assert (of["evaluated classes"]["overall"], of["evaluated images"]["overall"]) == ("9", str(images))
    low, high = map(float, of["95 % interval"]["macro"].split("-"))
    assert low <= round(macro, 1) <= high
    lynx = sum(row["label"] == "lynx" for row in rows)
    assert f"not counted: {lynx} images of classes that the model was not trained on: lynx ({lynx})" in out
    assert err.startswith("could not read 1 of 61 images:")
    # Standard output holds the predictions alone.
    assert main(["predict", str(finished_run), str(labelled), "--format", "csv", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert out == output.read_text()
    assert told(err)["prediction"]["overall"] == f"{top1:.2f}"
    assert write(finished_run, [labelled], output, "--no-labels") == 1
    assert capsys.readouterr().out == f"{output}: 61 images\n"
    assert {row["label"] for row in read_csv(output)} == {""}


def test_folders_that_are_no_classes_are_no_labels(finished_run, photos, tmp_path):
    result = predict(str(finished_run), [str(photos)], OutputChoice(file=tmp_path / "out.csv"), device="cpu")
    assert result.metrics is None
    assert result.unknown == {}


def test_an_archive_with_one_common_folder_has_the_labels_of_its_folders(finished_run, labelled, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(labelled, arcname="all of them")
    choice = OutputChoice(file=tmp_path / "out.csv")
    packed = predict(str(finished_run), [str(tmp_path / "photos.tar")], choice, device="cpu")
    loose = predict(str(finished_run), [str(labelled)], choice, device="cpu")
    assert packed.metrics == loose.metrics
    assert packed.unknown == loose.unknown


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_a_table_gives_paths_and_labels(finished_run, labelled, tmp_path, kind):
    files = sorted(labelled.glob("[0-9]/*/*.png"))[:20]
    rows = [(os.path.relpath(file, labelled), file.parts[-3]) for file in files] + [("gone.png", "1")]
    table = labelled / f"list.{kind}"
    names = ("file name", "species")
    if kind != "parquet":
        with table.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file, delimiter=";" if kind == "csv" else "\t")
            writer.writerows([(*names, "site"), *((*row, 'a "b", ü') for row in rows)])
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(dict(zip(names, zip(*rows, strict=True), strict=True))), table)
    flags = ["--path-column", names[0], "--label-column", names[1]]
    assert write(finished_run, [table], tmp_path / "out.csv", *flags) == 1
    table.unlink()
    found = read_csv(tmp_path / "out.csv")
    assert [(row["image"], row["label"]) for row in found] == rows  # as the table has them, to be joined
    assert found[-1]["error"] == "No such file or directory"
    assert write(finished_run, [labelled], tmp_path / "folders.csv") == 1
    by_path = {row["image"]: row["probability"] for row in read_csv(tmp_path / "folders.csv")}
    assert [row["probability"] for row in found[:-1]] == [by_path[str(file)] for file in files]


def test_names_come_from_standard_input(finished_run, photos, tmp_path, monkeypatch, capsys):
    names = [str(photos / "image2.png"), str(photos / "image1.png"), str(tmp_path / "gone.png")]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(("\n".join(names) + "\r\n\n").encode())))
    assert write(finished_run, ["-"], tmp_path / "out.csv") == 1
    assert [row["image"] for row in read_csv(tmp_path / "out.csv")] == names
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert write(finished_run, ["-"], tmp_path / "out.csv") == 2
    assert "standard input names no images" in capsys.readouterr().err


def test_names_of_any_bytes_and_with_escapes_are_written(finished_run, photos, tmp_path, capsys):
    odd = [tmp_path / "a\nb\x1b[31m.png", tmp_path / os.fsdecode(b"\xff.png")]
    for path in odd:
        path.write_bytes((photos / "image0.png").read_bytes())
    assert main(["predict", str(finished_run), str(tmp_path), "--device", "cpu", "--top-k", "1"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "a\\nb\\x1b[31m.png" in out
    assert write(finished_run, odd, tmp_path / "out.csv") == 0
    found = [row["image"] for row in read_csv(tmp_path / "out.csv")]
    assert found == [rf"{tmp_path}/a\nb\x1b[31m.png", rf"{tmp_path}/\xff.png"]
    assert write(finished_run, odd, tmp_path / "out.jsonl") == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == [str(odd[0]), rf"{tmp_path}/\xff.png"], "exact"


def test_names_of_classes_are_compared_composed():
    tally = Tally(["Bär", "fox"])
    tally.count([Prediction("1", [(0, 1.0)], unicodedata.normalize("NFD", "Bär"))], torch.tensor([[1.0, 0.0]]))
    assert tally.unknown == {}
    assert tally.right == 1


# What is written


def test_below_the_threshold_the_answer_is_unsure(finished_run, labelled, tmp_path, capsys):
    write(finished_run, [labelled], tmp_path / "plain.csv")
    capsys.readouterr()
    write(finished_run, [labelled], tmp_path / "out.csv", "--threshold", "0.6")
    out = capsys.readouterr().out
    plain, rows = read_csv(tmp_path / "plain.csv"), read_csv(tmp_path / "out.csv")
    for before, row in zip(plain, rows, strict=True):
        sure = row["error"] or float(row["probability"]) >= 0.6
        assert row == before | ({} if sure else {"predicted": "unsure"})
    unsure = [row for row in rows if row["predicted"] == "unsure"]
    assert unsure
    assert f"unsure (below 0.6): {len(unsure)} of 60 images" in out
    assert told(out)["prediction"]["overall"] == f"{naive(plain)[0]:.2f}", "over all images"
    top1, _, images = naive([row for row in rows if row["predicted"] != "unsure"])
    assert f"without the unsure: {top1:.2f} on {images} images" in out


def test_a_class_named_unsure_leaves_no_room_for_a_threshold(finished_run, photos, tmp_path, capsys, monkeypatch):
    names = ("unsure", *map(str, range(1, 10)))
    model = replace(load_model(str(finished_run)), class_names=names)
    monkeypatch.setattr(predict_module, "load_model", lambda target: model)
    assert write(finished_run, [photos], tmp_path / "out.csv", "--threshold", "0.5") == 2
    assert "--threshold: the model has a class named 'unsure'" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()
    assert write(finished_run, [photos], tmp_path / "out.csv") == 0


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl", "out.parquet", "out.txt"])
def test_predictions_replace_predictions(finished_run, photos, tmp_path, name):
    """Of other flags too."""
    if name == "out.parquet":
        pytest.importorskip("pyarrow")
    given = [photos / "image0.png"], tmp_path / name, "--format", {"out.txt": "table"}.get(name, name.split(".")[1])
    for flags in (["--threshold", "1", "--top-k", "3"], ["--top-k", "1"]):
        assert write(finished_run, *given, *flags) == 0


def test_all_probabilities_on_request(finished_run, photos, tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    expected = torch.softmax(by_hand(finished_run, photos / "image0.png")["prediction"], 0).tolist()
    for kind in ("csv", "jsonl", "parquet"):
        output = tmp_path / f"out.{kind}"
        assert write(finished_run, [photos], output, "--probabilities", "--top-k", "2") == 0
        if kind == "jsonl":
            found = json.loads(output.read_text().splitlines()[0])["probabilities"]
        else:
            row = read_csv(output)[0] if kind == "csv" else parquet.read_table(output).slice(0, 1).to_pylist()[0]
            assert row["predicted"] == row["class_1"]
            found = {str(label): float(row[f"p({label})"]) for label in range(10)}
        assert list(found) == [str(label) for label in range(10)]
        assert list(found.values()) == pytest.approx(expected, abs=2e-6)


def apart(text):
    """A text without its fractions, and these."""
    number = re.compile(r"\d\.\d+(?:e-\d+)?|\d+e-\d+")
    return number.sub("#", text), [float(value) for value in number.findall(text)]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_an_interrupted_run_is_continued(finished_run, labelled, tmp_path, capsys, monkeypatch, kind):
    whole, half = tmp_path / f"whole.{kind}", tmp_path / f"half.{kind}"
    write(finished_run, [labelled], whole, "--threshold", "0.5", "--batch-size", "8")
    expected = capsys.readouterr()
    content = whole.read_bytes()
    score, scored = Predictor.score, []

    def counting(self, images, *arguments, **flags):
        scored.extend(images)
        return score(self, images, *arguments, **flags)

    monkeypatch.setattr(Predictor, "score", counting)
    for cut in (None, 0, 1, 120, content.index(b"1/no.png") + 3, len(content) - 1, len(content)):
        if cut is not None:
            half.write_bytes(content[:cut])
        scored.clear()
        done = max(0, content[: cut or 0].count(b"\n") - (kind == "csv"))
        again = min(AGAIN, done - (done > 10))  # of the images that are done, one of which cannot be read
        assert write(finished_run, [labelled], half, "--threshold", "0.5", "--resume") == 1
        (words, numbers), (other_words, other_numbers) = map(apart, (content.decode(), half.read_text("utf-8")))
        assert other_words == words
        assert other_numbers == pytest.approx(numbers, abs=2e-6)  # a batch of another size rounds otherwise
        assert [text.replace(half.name, whole.name) for text in capsys.readouterr()] == [*expected]
        assert len(scored) == again + 61 - done


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_names_that_are_formulas_or_escapes_are_continued(finished_run, photos, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    names = [
        "=cmd.png",
        "@a.png",
        "-1.png",
        "+1.png",
        "'=cmd.png",
        "a\nb\r\x1b[31m.png",
        "\ta.png",
        "a\\nb.png",
        "1.png",
    ]
    for name in names:
        shutil.copy(photos / "image0.png", tmp_path / name)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"1.png\n=cmd.png\n=cmd.png\n\ta.png\n")))
    whole, half = Path(f"whole.{kind}"), Path(f"half.{kind}")
    assert write(finished_run, [f"./{name}" for name in names], whole) == 0
    assert write(finished_run, ["-"], Path(f"listed.{kind}")) == 0
    if kind == "csv":
        cells = [row["image"] for row in read_csv(Path("listed.csv"))]
        assert cells == ["1.png", "'=cmd.png", "'=cmd.png", r"\ta.png"]
    content = Path(f"listed.{kind}").read_bytes()
    half.write_bytes(content[: content.rindex(b"=cmd") + 2])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"1.png\n=cmd.png\n=cmd.png\n\ta.png\n")))
    assert write(finished_run, ["-"], half, "--resume") == 0
    assert apart(half.read_text())[0] == apart(content.decode())[0], "an image that is given twice is there twice"


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_file_that_another_model_has_written_is_not_continued(finished_run, labelled, tmp_path, capsys, kind):
    output = tmp_path / f"out.{kind}"
    assert write(finished_run, [labelled], output, "--threshold", "0.6", "--batch-size", "8") == 1
    content = output.read_bytes()
    half = content[: len(content) // 2]
    other = tmp_path / "other"
    shutil.copytree(finished_run, other)
    weights = load_file(other / "model.safetensors")
    changed = {name: 1.2 * weight if weight.ndim == 4 else weight for name, weight in weights.items()}
    save_file(changed, other / "model.safetensors")
    capsys.readouterr()
    for run, flags, message in (
        (other, [], "was written by another model"),
        (finished_run, ["--head", "v3"], "or with another --head or --prior"),
        (finished_run, ["--prior", "train"], "or with another --head or --prior"),
        (finished_run, ["--threshold", "0.3"], "was written with another --threshold: "),
        (finished_run, ["--no-labels"], "has the class '0' for "),
    ):
        output.write_bytes(half)
        assert write(run, [labelled], output, "--threshold", "0.6", "--resume", *flags) == 2
        err = capsys.readouterr().err
        assert message in err
        assert len(err.splitlines()) == 1
        assert output.read_bytes() == half
    elsewhere = tmp_path / "elsewhere.png"
    shutil.copy(next(labelled.glob("0/*/*.png")), elsewhere)
    assert write(finished_run, [elsewhere], output, "--threshold", "0.6", "--resume") == 2
    assert "holds none of the images given, but " in capsys.readouterr().err


def test_a_file_of_other_columns_is_not_continued(finished_run, photos, tmp_path, capsys):
    output = tmp_path / "out.csv"
    write(finished_run, [photos], output)
    before = output.read_bytes()
    for flags, message in (
        (["--top-k", "4"], "of the columns it has class_5, probability_5"),
        (["--top-k", "4", "--probabilities"], "it lacks p(0), p(1), p(2), p(3), p(4) and 5 more and has class_5, prob"),
    ):
        capsys.readouterr()
        assert write(finished_run, [photos], output, "--resume", *flags) == 2
        assert message in capsys.readouterr().err
        assert output.read_bytes() == before


def test_several_processes_do_not_write_one_file(finished_run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("mbib_timm.environment.join_world", lambda device: World(torch.device("cpu"), 1, 2))
    with pytest.raises(MbibError, match="mbib predict runs in one process, not in 2: start it without torchrun"):
        predict(str(finished_run), [str(photos)], OutputChoice(file=tmp_path / "out.csv"))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl", "out.parquet"])
def test_a_full_disk_is_said_of_the_file(finished_run, photos, tmp_path, capsys, monkeypatch, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    resource = pytest.importorskip("resource")
    enter = predict_module._Outputs.__enter__
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(outputs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
        return enter(outputs)

    monkeypatch.setattr(predict_module._Outputs, "__enter__", full)
    try:
        # Worker processes send images through files that the limit holds for too.
        status = write(finished_run, [photos], tmp_path / name, "--batch-size", "2", "--workers", "0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    assert f"mbib: error: cannot write {tmp_path / name}: " in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ([] if name.endswith("parquet") else [name])


def test_a_disk_too_full_for_embeddings_is_said_and_nothing_is_left(
    finished_run, photos, tmp_path, monkeypatch, capsys
):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    place = tmp_path / "out"
    assert write(finished_run, [photos], place / "x.parquet", "--embeddings", str(place / "e.npy")) == 2
    assert f"cannot write {place / 'e.npy'}: No space left on device" in capsys.readouterr().err
    assert [*place.iterdir()] == []


@pytest.mark.parametrize(
    ("flags", "extra"),
    [
        (["--output", "out.parquet"], "table"),
        (["--output", "out.csv", "--embeddings", "out.parquet"], "table"),
        (["--cam", "cam"], "cam"),
    ],
)
def test_without_its_extra_it_says_what_to_install(tmp_path, monkeypatch, capsys, flags, extra):
    monkeypatch.setattr("mbib_timm.inference.prediction_files.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "no_model", "no_image.png", *flags]) == 2
    assert f"pip install 'mbib-timm[{extra}]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_parquet_files_are_whole_or_not_there(finished_run, photos, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    items, called = Predictor.items, []

    def interrupted(self, *arguments):
        called.append(1)
        if len(called) == 3:
            raise KeyboardInterrupt
        return items(self, *arguments)

    monkeypatch.setattr(Predictor, "items", interrupted)
    for name in ("out.npy", "vectors.parquet"):
        called.clear()
        flags = ["--embeddings", str(tmp_path / name), "--batch-size", "4"]
        assert write(finished_run, [photos], tmp_path / "out.parquet", *flags) == 130
        assert list(tmp_path.iterdir()) == []


def test_embeddings_are_the_features_that_the_prediction_rests_on(finished_run, labelled, tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name in ("out.npy", "out.parquet") * 2:  # its own files are replaced
        flags = ["--embeddings", str(tmp_path / name), "--batch-size", "16"]
        assert write(finished_run, [labelled], tmp_path / "out.csv", *flags) == 1
    rows, vectors = read_csv(tmp_path / "out.csv"), np.load(tmp_path / "out.npy")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table["image"].to_pylist() == [row["image"] for row in rows]
    assert table["label"].to_pylist() == [row["label"] for row in rows]
    model = timm.create_model(f"local-dir:{finished_run}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    for row, vector, embedding in zip(rows, vectors, table["embedding"].to_pylist(), strict=True):
        if row["error"]:
            assert np.isnan(vector).all()
            assert embedding is None
            continue
        with torch.no_grad():
            maps = model.forward_features(transform(Image.open(row["image"]).convert("RGB"))[None])
            v = model.forward_head(maps, pre_logits=True)
            expected = torch.cat([v, model.bottleneck.embed(v)], dim=1)[0]
        torch.testing.assert_close(torch.from_numpy(vector), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(embedding), expected, rtol=1e-4, atol=1e-5)


def test_embeddings_of_timm_models(photos):
    module = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32).eval()
    source = types.SimpleNamespace(name="made_up")
    preprocessing = timm.data.resolve_model_data_config(module) | {"input_size": (3, 32, 32)}
    predictor = Predictor(LoadedModel(source, module, preprocessing, None, None, None))
    (batch,) = predictor.score(found_in(photos), with_features=True)
    transform = timm.data.create_transform(**preprocessing)
    images = torch.stack([transform(Image.open(image.path).convert("RGB")) for image in batch.images])
    with torch.no_grad():
        expected = module.forward_head(module.forward_features(images), pre_logits=True)
        logits = module(images)
    torch.testing.assert_close(batch.features, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.logits, logits, rtol=1e-4, atol=1e-5)


# The class frequencies of images without labels


def test_an_estimated_prior_is_that_of_expectation_maximisation(finished_run, labelled, tmp_path, capsys):
    choice = OutputChoice(file=tmp_path / "out.jsonl", probabilities=True)
    result = predict(str(finished_run), [str(labelled)], choice, prior="estimate", device="cpu", batch_size=9)
    plain = Predictor(load_model(str(finished_run)))
    (scored,) = plain.score(found_in(labelled))
    p = torch.softmax(scored.logits.double(), dim=1).numpy()
    shares = np.full(10, 0.1)
    for _ in range(result.prior.iterations):
        weighted = p * shares / 0.1
        shares = (weighted / weighted.sum(axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(result.prior.shares, shares, atol=1e-5)
    expected = p * shares / (p * shares).sum(axis=1, keepdims=True)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    found = np.array([[*line["probabilities"].values()] for line in lines if "error" not in line])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert f"estimated from 60 images in {result.prior.iterations} iterations: " in capsys.readouterr().out


def test_overlays_lie_under_the_paths_of_their_images(finished_run, labelled, tmp_path):
    pytest.importorskip("pytorch_grad_cam")
    some = sorted(labelled.glob("3/site 0/*.png"))
    arguments = [labelled, *some, labelled / "1" / "no.png"]
    assert write(finished_run, arguments, tmp_path / "out.csv", "--cam", str(tmp_path / "cam")) == 1
    found = {file.relative_to(tmp_path / "cam").as_posix() for file in (tmp_path / "cam").rglob("*.png")}
    inside = {file.relative_to(labelled).as_posix() for file in labelled.glob("[0-9l]*/site*/*.png")}
    assert found == inside | {file.name for file in some}
    with Image.open(tmp_path / "cam" / next(iter(inside))) as shown:
        assert shown.size == (224, 224)


def test_overlays_replace_overlays_alone(finished_run, photos, tmp_path, capsys):
    pytest.importorskip("pytorch_grad_cam")
    arguments = ["predict", str(finished_run), str(photos / "more"), "--device", "cpu", "--cam", str(tmp_path / "cam")]
    assert main(arguments) == main(arguments) == 0
    (file,) = (tmp_path / "cam").iterdir()
    shutil.copy(photos / "image0.png", file)
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"--cam {file}: the existing file is not a picture of this command, and is not replaced" in err
    assert file.read_bytes() == (photos / "image0.png").read_bytes()
