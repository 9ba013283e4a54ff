"""Use from Python: every function against its command, and losses in loops that are not ours."""

import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from small_data import class_folders, save_image
from timm.utils import ModelEmaV3
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import mbib_timm
from mbib_timm import create_loss, evaluate, load, predict, shot_groups, train
from mbib_timm.cli import main, parse
from mbib_timm.data.batch import Batch
from mbib_timm.errors import DataError, MbibError
from mbib_timm.evaluation.target import find_target
from mbib_timm.files import to_json
from mbib_timm.flags import recipe_overrides
from mbib_timm.methods import Facts, resolve_method
from mbib_timm.recipe import find_recipe, load_recipe

COUNTS = (40, 12, 5)


def test_names_are_imported_when_they_are_asked_for():
    program = (
        "import sys, mbib_timm; assert set(mbib_timm.__all__) <= set(dir(mbib_timm)); "
        "assert 'torch' not in sys.modules; "
        "from mbib_timm import train; assert 'torch' in sys.modules; assert callable(train)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'tain'"):
        mbib_timm.tain  # noqa: B018


@pytest.mark.slow
def test_train_does_what_its_command_does(finished_run, tmp_path, capsys):
    """Which gives what the fixture's run by the recipe is: test_training.py; this one is by name and by keys."""
    keys = dict(epochs=3, warmup_epochs=1, device="cpu", workers=0, output=tmp_path)
    run = train("mbib_resnet20.digits", **keys)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run.folder, finished_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert run.folder == tmp_path / "mbib_resnet20.digits"
    assert run.record.result.heads == evaluate(run.folder, device="cpu")
    assert "467 training images" in capsys.readouterr().out
    with pytest.raises(MbibError, match="already holds a run"):
        train("mbib_resnet20.digits", **keys)


def test_train_takes_recipes_parts_of_keys_and_fewer_epochs(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("mbib_timm.api.train_recipe", lambda recipe, name, **_: seen.append((recipe, name)))
    train("mbib_resnet20.digits", epochs=1, **{"method.beta": 3})
    train("cifar_resnet20.ce_digits", method="focal", data_dir=Path("x"), plugin=[])
    recipe = load_recipe(find_recipe("mbib_resnet20.digits"))
    train(recipe, lr=0.5)
    train(recipe.replace(experiment="mine"))
    ((first, name), (second, other), (third, given), (_, mine)) = seen
    assert (first.epochs, first.warmup_epochs, first.method["beta"], name) == (1, 0, 3.0, "mbib_resnet20.digits")
    assert (second.method["name"], second.data_dir, other) == ("focal", "x", "cifar_resnet20.focal_digits")
    assert (third, given) == (recipe.replace(lr=0.5), "mbib_resnet20.mbib_digits")
    assert mine == "mine"
    with pytest.raises(MbibError, match="'clip_mode' has no effect without clip_grad"):
        train("mbib_resnet20.digits", clip_mode="agc")
    with pytest.raises(MbibError, match="'epoch': did you mean 'epochs'"):
        train("mbib_resnet20.digits", epoch=3)
    with pytest.raises(MbibError, match=r"did you mean 'mbib_resnet20\.digits'"):
        train("mbib_resnet20.digts")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    class_folders(folder)
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("options", [{}, {"head": "z", "prior": "train"}], ids=["prediction", "z"])
def test_predict_and_load_do_what_their_command_does(finished_run, photos, options, capsys):
    flags = [text for name, value in options.items() for text in (f"--{name}", value)]
    arguments = ["--format", "jsonl", "--workers", "0", "--device", "cpu", "--top-k", "3", *flags]
    assert main(["predict", str(finished_run), str(photos / "images"), *arguments]) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    given = predict(finished_run, photos / "images", top_k=3, device="cpu", **options)
    loaded = predict(load(finished_run, device="cpu", **options), [str(photos / "images")], top_k=3)
    assert given == loaded
    assert [each.image for each in given] == [each["image"] for each in expected]
    for one, other in zip(given, expected, strict=True):
        assert [(c.label, c.name, pytest.approx(c.probability, abs=1e-6)) for c in one.classes] == [
            (c["class"], c["name"], c["probability"]) for c in other["classes"]
        ]
        assert (one.name, one.probability, one.error) == (one.classes[0].name, one.classes[0].probability, None)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Images in folders that have the names of classes of the model, one of them broken."""
    folder = tmp_path_factory.mktemp("labelled")
    class_folders(folder)
    for name, label in {"ant": "3", "bee": "7"}.items():
        (folder / "images" / name).rename(folder / "images" / label)
    (folder / "images" / "7" / "broken.png").write_bytes(b"no image")
    return folder / "images"


@pytest.mark.parametrize("prior", [None, "estimate"])
def test_labels_thresholds_and_estimates_are_those_of_the_command(finished_run, labelled, prior, capsys):
    first = predict(finished_run, labelled, prior=prior, device="cpu")
    said = capsys.readouterr().out
    assert ("that is uncertain, from fewer than 10 images for each class" in said) is (prior == "estimate")
    threshold = round(float(np.median([each.probability for each in first if each.name])), 6)
    arguments = ["--format", "jsonl", "--workers", "0", "--device", "cpu", "--threshold", str(threshold)]
    assert main(["predict", str(finished_run), str(labelled), *arguments, *(["--prior", prior] if prior else [])]) == 1
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    given = predict(finished_run, labelled, threshold=threshold, prior=prior, device="cpu")
    assert {each.label for each in given} == {"3", "7", "cat", "dog"}
    assert prior is not None or 0 < sum(each.unsure for each in given) < len(given)
    for one, other in zip(given, expected, strict=True):
        assert (one.image, one.label, one.error) == (other["image"], other["label"], other.get("error"))
        if one.error is None:
            assert ("unsure" if one.unsure else one.name) == other["predicted"]
            assert one.probability == pytest.approx(other["probability"], abs=1e-6)


def test_a_loaded_model_estimates_frequencies_and_stays_as_it_is(finished_run, labelled):
    expected = predict(finished_run, labelled, prior="estimate", device="cpu")
    for prior in (None, "train"):
        model = load(finished_run, prior=prior, device="cpu")
        before = predict(model, labelled)
        assert predict(model, labelled, prior="estimate") == expected != before
        assert predict(model, labelled) == before
    with pytest.raises(MbibError, match=r"estimated from images: give 'estimate' to predict\(\)"):
        load(finished_run, prior="estimate")
    with pytest.raises(MbibError, match=r"give them to load\(\)"):
        predict(model, labelled, prior="uniform")


def test_predict_takes_images_and_keeps_the_order(finished_run, photos):
    model = load(finished_run, device="cpu")
    path = photos / "images" / "ant" / "0.png"
    with Image.open(path) as opened:
        picture = opened.copy()
    first, broken, second, third = predict(model, [picture, photos / "broken.png", path, picture.convert("L")])
    assert (first.image, second.image, third.image) == ("image 0", str(path), "image 1")
    assert first.classes == second.classes
    assert (broken.image, broken.name, broken.classes) == (str(photos / "broken.png"), None, ())
    assert "not an image, or damaged, or of a kind" in broken.error
    (alone,) = predict(model, picture)
    assert (alone.image, alone.name, alone.probability) == ("image 0", first.name, pytest.approx(first.probability))
    with pytest.raises(MbibError, match="expected paths or PIL images, got int"):
        predict(model, [1])
    with pytest.raises(MbibError, match="there is no image"):
        predict(model, "nothing.png")
    with pytest.raises(MbibError, match=r"give them to load\(\)"):
        predict(model, picture, head="z")


def test_predict_goes_on_where_an_image_is_not_there(finished_run, photos):
    there, gone = next((photos / "images").rglob("*.png")), photos / "gone.png"
    missing, found = predict(finished_run, [gone, there], device="cpu")
    assert (missing.image, missing.name, found.image, found.error) == (str(gone), None, str(there), None)
    assert "No such file" in missing.error
    with pytest.raises(DataError, match="there is no image, folder, archive or table at"):
        predict(finished_run, [gone, gone], device="cpu")


def test_predictions_make_a_table(finished_run, photos):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(predict(finished_run, photos / "images", device="cpu"))
    assert list(table.columns) == ["image", "name", "probability", "classes", "label", "unsure", "error"]
    assert len(table) == 21
    assert table.probability.between(0.1, 1).all()


@pytest.mark.parametrize("prior", [None, "train", "estimate"])
def test_evaluate_does_what_its_command_does(finished_run, tmp_path, prior):
    file, flags = tmp_path / "results.json", [] if prior is None else ["--prior", prior]
    assert main(["validate", str(finished_run), "--device", "cpu", "--results", str(file), *flags]) == 0
    heads = json.loads(file.read_text())["heads"]
    found = evaluate(finished_run, prior=prior, device="cpu")
    assert {name: json.loads(to_json(head)) for name, head in found.items()} == heads


def test_evaluate_takes_another_split(finished_run):
    other = evaluate(finished_run, split="train", device="cpu")
    assert other["prediction"].images == 1457, "the whole split, of which a part was trained on"
    with pytest.raises(MbibError, match="data and class_counts go with a network"):
        evaluate(finished_run, [], [1])


@pytest.mark.parametrize("inside", [False, True], ids=["classes", "split"])
def test_evaluate_takes_a_folder_of_images_for_such(inside, tmp_path):
    """Of a packaged model too, whose own recipe would download CIFAR-100 into it."""
    folder = tmp_path / "photos"
    for number, name in enumerate(["fox", "bear", "apple"]):
        for i in range(3):
            save_image(folder / ("test" if inside else "") / name / f"{i}.png", 80 * number + i)
    before = sorted(tmp_path.rglob("*"))
    for name in ("mbib_resnet32.cifar100_lt_if100", "cifar_resnet32.ce_cifar100_lt_if100"):
        found = evaluate(name, data_dir=folder, device="cpu", workers=0)["prediction"]
        expected = predict(name, folder / "test" if inside else folder, device="cpu")
        assert found.images == len(expected) == 9
        assert found.top1 == pytest.approx(100 * np.mean([each.name == each.label for each in expected]))
    assert sorted(tmp_path.rglob("*")) == before
    save_image(tmp_path / "flat" / "0.png")
    with pytest.raises(DataError, match="no images in class folders under"):
        evaluate(name, data_dir=tmp_path / "flat", device="cpu")


def test_a_folder_of_torchvisions_data_is_no_folder_of_images(tmp_path):
    name, photos = "mbib_resnet32.cifar100_lt_if100", tmp_path / "photos" / "fox"
    save_image(photos / "0.png")
    (tmp_path / "cifar-100-python").mkdir()
    for folder, dataset in (
        (tmp_path, "torch/cifar100"),
        (photos.parent, "folder"),
        (tmp_path / "-", "torch/cifar100"),
    ):
        assert find_target(name, overrides={"data_dir": str(folder)}).recipe.dataset == dataset
    for asked in ({"dataset": "torch/cifar100"}, {"dataset_download": True}):
        overrides = {"data_dir": str(photos.parent), **asked}
        assert find_target(name, overrides=overrides).recipe.dataset == "torch/cifar100"


def test_digits_are_in_no_folder(tmp_path, capsys):
    """Whoever adds a folder to the first command of the README wants its images."""
    save_image(tmp_path / "photos" / "fox" / "0.png")
    photos = str(tmp_path / "photos")
    how = f"mbib train finetune/mbib_resnet32 --data-dir {photos}"
    for arguments in (["train", "--data-dir", photos], ["train", photos]):
        assert main([*arguments, "--output", str(tmp_path / "runs")]) == 2
        assert how in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    parsed = parse(how.split()[1:])
    assert load_recipe(find_recipe(parsed.recipe), recipe_overrides(parsed)).data_dir == photos


def test_a_folder_that_is_not_there_is_said_with_the_runs_beside_it(finished_run, tmp_path):
    with pytest.raises(MbibError, match=rf"there is no folder .*/runs1; .* has .*{finished_run.name}"):
        load(str(finished_run.parent / "runs1"))
    with pytest.raises(MbibError, match=r"there is no folder no/where$"):
        load("no/where")


def test_class_counts_are_those_of_the_models_classes():
    model = timm.create_model("cifar_resnet20", num_classes=3)
    with pytest.raises(MbibError, match="the model has 3 classes, and there are class counts of 2"):
        create_loss("ce", [500, 50], model)
    create_loss("ce", [500, 50], timm.create_model("cifar_resnet20", num_classes=0))  # whose head is elsewhere


def test_evaluate_a_network_on_batches():
    torch.manual_seed(0)
    images, targets = torch.randn(57, 3, 8, 8), torch.arange(57) % 3
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(192, 3)).train()
    metrics = evaluate(network, DataLoader(TensorDataset(images, targets), batch_size=10), COUNTS)["prediction"]
    assert network.training
    with torch.no_grad():
        right = network.eval()(images).argmax(1) == targets
    assert metrics.top1 == pytest.approx(100 * right.double().mean().item())
    by_class = [100 * right[targets == label].double().mean().item() for label in range(3)]
    assert metrics.per_class == pytest.approx(by_class)
    assert (metrics.medium, metrics.few, metrics.many) == (
        pytest.approx(by_class[0]), pytest.approx(np.mean(by_class[1:])), None
    )  # fmt: skip
    with pytest.raises(MbibError, match=r"evaluate\(model, data, class_counts\)"):
        evaluate(network)
    with pytest.raises(MbibError, match="split, prior, lr: only for a trained model"):
        evaluate(network, [], COUNTS, split="train", prior="train", lr=1)


def test_evaluate_leaves_frozen_layers_frozen():
    model, data = mbib().train(), [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))]
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    evaluate(model, data, COUNTS)
    assert [module.training for module in model.modules()] == modes


def test_a_wrapped_network_is_the_one_in_it(tmp_path):
    model, data = mbib(), [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        assert evaluate(wrapped, data, COUNTS) == evaluate(model, data, COUNTS)
        with pytest.raises(MbibError, match="the model has 3 classes, and there are class counts of 2"):
            create_loss("mbib", COUNTS[:2], wrapped)
    finally:
        torch.distributed.destroy_process_group()
    assert evaluate(ModelEmaV3(model), data, COUNTS) == evaluate(model, data, COUNTS)

    class Normalized(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, images):
            return self.module(10 * images)

    alone = evaluate(Normalized(model), data, COUNTS)["prediction"]  # of a wrapper of the caller's nothing is known
    assert alone.nll != evaluate(model, data, COUNTS)["prediction"].nll


@pytest.mark.parametrize("world_size", [None, "1", "2"], ids=["no launcher", "one process", "torchrun"])
def test_a_process_group_of_the_callers_stays(finished_run, tmp_path, monkeypatch, world_size):
    """What torchrun says is not asked again: the group is there, though here it is of one process."""
    expected = evaluate(finished_run, device="cpu")
    for name, value in {"WORLD_SIZE": world_size, "RANK": "0", "LOCAL_RANK": "0"}.items():
        if world_size is not None:
            monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        assert evaluate(finished_run, device="cpu") == expected
        assert torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("number", [5, 7])
def test_class_counts_of_other_classes_are_an_error(number):
    model = timm.create_model("cifar_resnet20", num_classes=6)
    data = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 4, 5]))]
    with pytest.raises(MbibError, match=f"the model has 6 classes, and there are class counts of {number}"):
        evaluate(model, data, [10] * number)


def test_threads_share_a_loaded_model(finished_run, photos):
    model = load(finished_run, device="cpu")
    expected = {prior: predict(model, photos, workers=0, prior=prior) for prior in (None, "estimate")}
    with ThreadPoolExecutor(4) as pool:
        priors = [None, "estimate", "estimate", None] * 2
        found = list(pool.map(lambda prior: predict(model, photos, workers=0, prior=prior), priors))
    assert found == [expected[prior] for prior in priors]


def test_predictions_of_nothing(finished_run):
    assert predict(finished_run, []) == []
    assert predict(finished_run, [], prior="estimate") == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"top_k": 0}, "top_k: expected a whole number of at least 1, got 0"),
        ({"top_k": 1.5}, "top_k: expected a whole number of at least 1, got 1.5"),
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1, got 0"),
        ({"batch_size": 2**31}, "batch_size: expected a whole number from 1 to 2147483647, got 2147483648"),
        ({"workers": -1}, "workers: expected a whole number from 0 to 128, got -1"),
        ({"threshold": 1.1}, "threshold: expected a number from 0 to 1, got 1.1"),
        ({"threshold": float("nan")}, "threshold: expected a number from 0 to 1, got nan"),
        ({"threshold": "0.5"}, "threshold: expected a number from 0 to 1, got '0.5'"),
    ],
)
def test_predict_refuses_what_its_flags_refuse(keys, message):
    with pytest.raises(MbibError, match=re.escape(message)):
        predict("no model", [], **keys)
    ((name, value),) = keys.items()
    if not isinstance(value, str):
        with pytest.raises(MbibError, match=re.escape(message.partition(": ")[2].partition(",")[0])):
            parse(["predict", "no model", "x.png", f"--{name.replace('_', '-')}={value}"])


@pytest.mark.parametrize("images", [None, 1, b"bytes", io.BytesIO(b"bytes"), [b"bytes"], np.zeros((2, 2, 3)), [["a"]]])
def test_predict_says_which_images_it_takes(finished_run, images):
    with pytest.raises(MbibError, match=r"expected paths or PIL images, got \w+; PIL's"):
        predict(finished_run, images, device="cpu")


def test_predict_asks_for_a_column_of_a_table(finished_run):
    pandas = pytest.importorskip("pandas")
    for images in ({"path": ["x.png"]}, pandas.DataFrame({"path": ["x.png"]})):
        with pytest.raises(MbibError, match=r"got \w+; give the column of the paths, as in frame\['path'\]"):
            predict(finished_run, images, device="cpu")


def test_a_folder_beside_that_of_a_runs_table_is_asked_for(finished_run, tmp_path):
    """Images of the table would be evaluated, and not those of the folder."""
    for name in ("photos", "new"):
        save_image(tmp_path / name / "fox" / "0.png")
    table, run = tmp_path / "photos" / "split.csv", tmp_path / "run"
    table.write_text("path,label\nfox/0.png,fox\n")
    shutil.copytree(finished_run, run)
    new, places = str(tmp_path / "new"), {"dataset": "table", "table": str(table)}
    (run / "recipe.yaml").write_text("\n".join(f"{key}: {value}" for key, value in places.items()))
    with pytest.raises(MbibError, match=r"on the table .*split\.csv, whose images .*: add --dataset folder .*--table"):
        evaluate(run, data_dir=new)
    assert find_target(str(run), overrides={"data_dir": str(tmp_path / "photos")}).recipe.table == str(table)
    assert find_target(str(run), overrides={"data_dir": new, "table": str(table)}).recipe.data_dir == new
    assert find_target(str(run), overrides={"data_dir": new, "dataset": "folder"}).recipe.table is None


def test_batches_that_evaluate_does_not_take():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    images, labels = torch.randn(2, 3, 2, 2), torch.tensor([0, 2])
    expected = "data: expected batches of images (B, C, H, W) and labels (B,)"
    for batch, message in (
        ((images, labels + 1), "data: labels of 3 classes lie in 0..2, got 3"),
        ((images, labels - 1), "data: labels of 3 classes lie in 0..2, got -1"),
        ((images, labels.float()), f"{expected}, which are whole numbers, got labels of torch.float32"),
        ((images, labels[:1]), f"{expected}, got (2, 3, 2, 2) and (1,)"),
        ((images, torch.eye(3)[labels]), f"{expected}, got (2, 3, 2, 2) and (2, 3)"),
        ((images, [0, 2]), f"{expected}, got a tuple of Tensor, list"),
        ({"image": images, "label": labels}, f"{expected}, got a dict"),
    ):
        with pytest.raises(MbibError, match=re.escape(message)):
            evaluate(network, [batch], COUNTS)
    with pytest.raises(MbibError, match="class_counts: expected a whole number"):
        evaluate(network, [(images, labels)], 3)
    metrics = [evaluate(network, [(images, kind)], COUNTS)["prediction"] for kind in (labels, labels.to(torch.uint8))]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize(
    ("answer", "got"), [(lambda x: {"logits": x}, "a dict"), (lambda x: x[..., None, None], r"shape \(4, 3, 1, 1\)")]
)
def test_a_network_that_gives_no_logits(answer, got):
    class Network(torch.nn.Module):
        def forward(self, images):
            return answer(images.flatten(1)[:, :3])

    with pytest.raises(MbibError, match=rf"Network: expected logits \(B, K\) in evaluation mode, got {got}$"):
        evaluate(Network(), [(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))], COUNTS)


def test_models_that_are_given_to_the_wrong_function(finished_run):
    loaded = load(finished_run, device="cpu")
    with pytest.raises(
        MbibError, match=r"evaluate takes the name or folder of a loaded model, or its network, model\."
    ):
        evaluate(loaded)
    for call in (lambda: load(mbib()), lambda: predict(mbib(), "photos")):
        with pytest.raises(
            MbibError, match="expected the name or folder of a trained model, got MBIB: call a network of your own"
        ):
            call()


def test_keys_and_settings_may_be_numpys(tmp_path):
    with pytest.raises(MbibError, match="recipe key 'lr': expected more than 0, got -1"):
        train("mbib_resnet20.digits", output=tmp_path, epochs=np.int64(1), seed=np.int64(2), lr=np.float32(-1))
    weights = np.array([0.5, 0.25, 1.0])
    loss = create_loss("mbib", COUNTS, mbib(), beta=np.float32(0.5), observation_weights=weights)
    assert (loss.method.settings.beta, loss.method.settings.observation_weights) == (0.5, weights.tolist())


def test_class_counts_may_be_read_only():
    """As those that pandas hands out."""
    counts = np.array(COUNTS)
    counts.flags.writeable = False
    torch.set_warn_always(True)  # and not once in a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            create_loss("bsce", counts)
    finally:
        torch.set_warn_always(False)


def test_shot_groups():
    groups = {name: labels.tolist() for name, labels in shot_groups([500, 101, 100, 20, 19, 1]).items()}
    assert groups == {"many": [0, 1], "medium": [2, 3], "few": [4, 5]}


def mbib(**keys):
    torch.manual_seed(0)
    return timm.create_model("mbib_resnet20", num_classes=3, **keys)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("mbib", {"beta": 3.0}), ("all_mbib", {"sequential_weights": "observation"}), ("bsce", {}), ("ce", {}),
     ("focal", {"gamma": 1.0})],
)  # fmt: skip
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
def test_a_loss_is_that_of_a_training_step(name, settings, soft):
    model = mbib()
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 0])
    targets = torch.nn.functional.one_hot(labels, 3).float() * 0.9 + 0.1 / 3 if soft else labels
    kind, given = resolve_method({"name": name, **settings})
    method = kind(model, given, Facts(np.array(COUNTS), 1), torch.device("cpu"))
    expected = method(Batch((images,), targets, torch.arange(6)))
    parts = create_loss(name, COUNTS, model, **settings).parts(model(images), targets)
    assert parts.keys() == expected.keys()
    for part, value in parts.items():
        torch.testing.assert_close(value, expected[part])
    loss = create_loss(name, COUNTS, model, **settings)
    assert list(loss.parameters()) == []
    torch.testing.assert_close(loss(model(images), targets), expected["loss"])


def test_a_loss_of_a_plain_network_needs_no_model():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 0])
    torch.testing.assert_close(create_loss("ce", COUNTS)(logits, labels), cross_entropy(logits, labels))
    balanced = cross_entropy(logits + torch.tensor(COUNTS).log(), labels)
    torch.testing.assert_close(create_loss("bsce", COUNTS)(logits, labels), balanced)


def test_losses_that_cannot_be():
    model, labels = mbib(), torch.tensor([0, 1])
    for arguments, message in (
        (("mbibb", COUNTS), "unknown method 'mbibb': did you mean 'mbib'"),
        (
            ("mbib", COUNTS),
            r"such as mbib_resnet50; give the model: create_loss\('mbib', class_counts, model\)",
        ),
        (("paco", COUNTS, model), r"'paco' trains by more than a loss of logits: use train\(\); losses: bsce, ce"),
        (("tau_norm", COUNTS, model), "trains by more than a loss"),
        (("bsce", (3, 0, 1)), r"classes without: \[1\]"),
        (("bsce", (0.5, 0.5)), "a whole number for each of two classes or more"),
    ):
        with pytest.raises(MbibError, match=message):
            create_loss(*arguments)
    with pytest.raises(MbibError, match="unknown setting of method 'mbib': 'betta': did you mean 'beta'"):
        create_loss("mbib", COUNTS, model, betta=3)
    outputs = model(torch.randn(2, 3, 32, 32))
    with pytest.raises(MbibError, match=r"takes logits of logits \(1\), and got 4; give create_loss the model"):
        create_loss("ce", COUNTS)(outputs, labels)
    with pytest.raises(MbibError, match=r"takes logits of v1, v2, v3, z \(4\), and got 1; .*model\.train\(\)"):
        create_loss("mbib", COUNTS, model)(model.eval()(torch.randn(2, 3, 32, 32)), labels)


def test_targets_that_are_none():
    """Many have a shape that torch stretches to that of the logits: the loss would be a number without a meaning."""
    loss, outputs = create_loss("mbib", COUNTS, mbib()), tuple(torch.randn(4, 3, 3))  # 4 heads, 3 images, 3 classes
    labels = torch.tensor([0, 1, 2])
    torch.testing.assert_close(loss(outputs, labels.to(torch.uint8)), loss(outputs, labels))
    expected = r"expected labels \(3,\) of whole numbers or soft targets \(3, 3\), got "
    for given, got in (
        (labels.float(), r"a tensor of torch\.float32 and shape \(3,\)"),
        (labels[:, None], r"a tensor of torch\.int64 and shape \(3, 1\)"),
        (torch.nn.functional.one_hot(labels), r"a tensor of torch\.int64 and shape \(3, 3\)"),
        (labels.bool(), r"a tensor of torch\.bool and shape \(3,\)"),
        (labels[:1], r"a tensor of torch\.int64 and shape \(1,\)"),
        (labels.numpy(), "a ndarray"),
    ):
        with pytest.raises(MbibError, match=expected + got):
            loss(outputs, given)
    with pytest.raises(MbibError, match=r"labels of 3 classes lie in 0\.\.2, got -100"):
        loss(outputs, torch.tensor([0, -100, 2]))
    for shape in ((3, 1), (3, 2), (3,)):
        with pytest.raises(
            MbibError, match=rf"expected logits \(B, 3\), got a tensor of torch\.float32 and shape \({shape[0]}"
        ):
            create_loss("bsce", COUNTS)(torch.randn(shape), labels)
    with pytest.raises(MbibError, match=r"expected logits \(B, 3\), got a dict"):
        create_loss("bsce", COUNTS)({"logits": outputs[0]}, labels)


@pytest.mark.parametrize("when", ["created", "afterwards"])
def test_a_plain_loop_of_cross_entropy_trains_an_mbib_model(when):
    model = mbib(training_logits="mean") if when == "created" else mbib()
    if when == "afterwards":
        model.set_training_logits("mean")
    images, labels = examples()
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert create_loss("ce", COUNTS, model)(model(images), labels) > 0, "of one head"


# Loops that are not ours


def examples():
    """Images of three classes that a mean of colours tells apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    images = 0.3 * torch.randn(24, 3, 32, 32, generator=generator) + torch.eye(3)[labels][:, :, None, None]
    return images, labels


def weights_of_a_hand_written_loop(steps):
    model, (images, labels) = mbib(), examples()
    loss = create_loss("mbib", COUNTS, model)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        part = slice(8 * (step % 3), 8 * (step % 3) + 8)
        loss(model(images[part]), labels[part]).backward()
        optimizer.step()
    return model.state_dict()


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self, model, class_counts):
            super().__init__()
            self.model, self.loss = model, create_loss("mbib", class_counts, model)

        def training_step(self, batch, index):
            images, labels = batch
            return self.loss(self.model(images), labels)

        def validation_step(self, batch, index):
            images, labels = batch
            self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=0.05)

    task, loader = Classifier(mbib(), COUNTS), DataLoader(TensorDataset(*examples()), batch_size=8)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(max_epochs=4, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(task, loader, loader)
    for name, value in weights_of_a_hand_written_loop(steps=12).items():
        torch.testing.assert_close(task.model.state_dict()[name], value, msg=name)
    metrics = evaluate(task.model, loader, COUNTS)["prediction"]
    assert metrics.top1 == pytest.approx(100 * trainer.callback_metrics["accuracy"].item())


def test_the_trainer_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Classifier(torch.nn.Module):
        """What the Trainer takes: named inputs, a mapping with the loss and, in evaluation, the logits."""

        def __init__(self, model, class_counts):
            super().__init__()
            self.model, self.loss = model, create_loss("mbib", class_counts, model)

        def forward(self, pixel_values, labels):
            outputs = self.model(pixel_values)
            if self.training:
                return {"loss": self.loss(outputs, labels)}
            return {"loss": cross_entropy(outputs, labels), "logits": outputs}

    task, (images, labels) = Classifier(mbib(), COUNTS), examples()
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    optimizer = torch.optim.SGD(task.parameters(), lr=0.05)
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=8, per_device_eval_batch_size=24,
        max_grad_norm=0.0, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        train_sampling_strategy="sequential", logging_strategy="no",
    )  # fmt: skip
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = transformers.Trainer(
        task, settings, train_dataset=rows, eval_dataset=rows, optimizers=(optimizer, constant)
    )
    trainer.train()
    for name, value in weights_of_a_hand_written_loop(steps=12).items():
        torch.testing.assert_close(task.model.state_dict()[name], value, msg=name)
    loader = DataLoader(TensorDataset(images, labels), batch_size=24)
    predicted = trainer.predict(rows)
    accuracy = 100 * (predicted.predictions.argmax(1) == predicted.label_ids).mean()
    assert evaluate(task.model, loader, COUNTS)["prediction"].top1 == pytest.approx(accuracy)
