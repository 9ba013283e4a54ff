"""Classifiers from class means, against means taken in numpy and scikit-learn's nearest centroid."""

import copy
import json
import random

import numpy as np
import pytest
import timm
import torch
import torch.multiprocessing as mp
from crashes import crash, differing, weights
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import normalize
from torch import nn

from mbib_timm.cli import main
from mbib_timm.data.batch import Batch
from mbib_timm.errors import MbibError
from mbib_timm.methods import METHODS, Facts
from mbib_timm.methods.class_means import require_class_means, start_from_class_means
from mbib_timm.models.backbones import StoredFeatures, classifier_names
from mbib_timm.models.head_outputs import head_logits
from mbib_timm.recipe import find_recipe, load_recipe
from mbib_timm.training import run as run_module
from mbib_timm.training import train

COUNTS = (9, 5, 2, 1)
CPU = torch.device("cpu")


def build(name="mbib_resnet20", classifier="cosine", **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=len(COUNTS), classifier=classifier, **kwargs)
    for module in model.modules():  # a backbone that has seen images, so that its maps differ
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.train()


def photographs(size=32, order="by class"):
    """Batches of unequal sizes, whose images differ by class; as of a folder, one class after the other."""
    generator = torch.Generator().manual_seed(3)
    targets = torch.tensor([label for label, count in enumerate(COUNTS) for _ in range(count)])
    tints = torch.randn(len(COUNTS), 3, 1, 1, generator=generator)
    images = torch.randn(len(targets), 3, size, size, generator=generator) + 2 * tints[targets]
    index = torch.arange(len(targets))
    if order == "mixed":
        index = torch.randperm(len(targets), generator=generator)
    return [Batch((images[part],), targets[part], part) for part in index.split(4)]


def naive_means(features, targets):
    """The direction of each class's mean of features (N, D) at length 1, in float64."""
    rows = [feature / np.sqrt((feature**2).sum()) for feature in features.astype(np.float64)]
    means = [np.mean([row for row, y in zip(rows, targets, strict=True) if y == label], axis=0) for label in range(4)]
    return np.stack([mean / np.sqrt((mean**2).sum()) for mean in means])


def standardised(features, norm):
    variance = features.var(axis=0, ddof=1)
    return (features - features.mean(axis=0)) / np.sqrt(features.var(axis=0, ddof=1) + norm.eps), variance


@pytest.mark.parametrize("order", ["by class", "mixed"])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("mbib_resnet20", {}),
        ("bib_resnet20", {}),
        ("bib_resnet20", {"prediction": "v"}),
        ("mbib_resnet20", {"drop_rate": 0.7}),
    ],
)
def test_every_classifier_of_v_and_z_is_the_class_means_of_its_standardised_inputs(name, kwargs, order):
    model, batches = build(name, **kwargs), photographs(order=order)
    wide = copy.deepcopy(model).double().eval()
    start_from_class_means(model, batches)
    assert model.training
    targets = torch.cat([batch.targets for batch in batches]).numpy()
    images = torch.cat([batch.images for batch in batches]).double()
    with torch.no_grad():
        maps = wide.backbone.forward_intermediates(images, indices=list(wide.taps), intermediates_only=True)
    heads = [*model.training_heads.values(), model.observation]
    assert len(maps) == len(heads)
    for head, pooled in zip(heads, (each.mean(dim=(2, 3)).numpy() for each in maps), strict=True):
        v, variance = standardised(pooled, head.norm)
        np.testing.assert_allclose(head.norm.running_mean, pooled.mean(axis=0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(head.norm.running_var, variance, rtol=1e-4)
        np.testing.assert_allclose(head.classifier.weight.detach(), naive_means(v, targets), atol=1e-5)
    if kwargs.get("prediction") != "v":
        fc = wide.bottleneck.fc
        inner = v @ fc.weight.detach().numpy().T + fc.bias.detach().numpy()
        z = np.maximum(standardised(inner, model.bottleneck.norm)[0], 0)
        np.testing.assert_allclose(model.bottleneck.classifier.weight.detach(), naive_means(z, targets), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("mbib_resnet20", {}),
        ("mbib_experts_resnet20", {"bottleneck_features": 24}),
        ("experts_resnet20", {}),
        ("cifar_resnet20", {}),
        ("with_classifier", {"backbone": "resnet10t"}),
        ("mbib", {"backbone": "convnext_atto", "taps": [1, 2, 3]}),
    ],
)
def test_classifiers_and_the_heads_statistics_change_and_nothing_else(name, kwargs):
    model, batches = build(name, **kwargs), photographs(64 if "backbone" in kwargs else 32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start_from_class_means(model, batches)
    after = model.state_dict()
    classifiers = {f"{each}.weight" for each in classifier_names(model)}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    statistics = {
        key for key in before if not key.startswith("backbone.") and name != "cifar_resnet20" and ".running_" in key
    }
    assert changed == classifiers | statistics
    # What they are is what the classifiers now see, image by image.
    wide = copy.deepcopy(model).double().eval()
    seen = {each: [] for each in classifiers}
    for each in classifiers:
        wide.get_submodule(each.removesuffix(".weight")).register_forward_pre_hook(
            lambda layer, args, each=each: seen[each].append(args[0][0].numpy())
        )
    with torch.no_grad():
        for batch in batches:
            for image in batch.images.double():
                head_logits(wide, image[None])
    targets = torch.cat([batch.targets for batch in batches]).numpy()
    for each in classifiers:
        np.testing.assert_allclose(after[each], naive_means(np.stack(seen[each]), targets), atol=2e-5, err_msg=each)


# Stored features in the place of images


def features_of(model, batches):
    """Batches of the pooled maps of the backbone at all taps, and what stands in the backbone's place for them."""
    with torch.no_grad():
        found = [torch.cat(model.eval().pool_features(batch.images), dim=1)[:, :, None, None] for batch in batches]
    features = [batch._replace(views=(x,)) for batch, x in zip(batches, found, strict=True)]
    return StoredFeatures(model.pooled_widths), features


def test_stored_features_give_what_images_give():
    model, batches = build(), photographs()
    stored, features = features_of(model, batches)
    other = copy.deepcopy(model)
    other.backbone = stored
    start_from_class_means(model, batches)
    start_from_class_means(other, features)
    theirs = other.state_dict()
    for key, value in model.state_dict().items():
        if not key.startswith("backbone."):
            torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("kwargs", [{}, {"prediction": "v"}, {"prediction": "z"}])
def test_tau_is_chosen_alike_on_stored_features(kwargs):
    def chosen(model, batches):
        kind = METHODS["tau_norm"]
        method = kind(model, kind.Settings(), Facts(np.array(COUNTS), 0), CPU)
        method.finish(type("Passes", (), {"held_out": batches}))
        return method.report()["tau"], [each.weight.detach().clone() for each in model.get_classifier()]

    model, means, batches = build(classifier="linear", **kwargs), build(**kwargs), photographs()
    start_from_class_means(means, batches)
    model.load_state_dict(means.state_dict(), strict=False)  # without biases, and rows as long tails leave them
    with torch.no_grad():
        for classifier in model.get_classifier():
            classifier.weight *= torch.tensor([20.0, 3.0, 0.5, 0.1])[:, None]
    stored, features = features_of(model, batches)
    other = copy.deepcopy(model)
    other.backbone = stored
    tau, rows = chosen(model, batches)
    assert tau > 0
    assert chosen(other, features)[0] == tau
    torch.testing.assert_close(rows, [each.weight.detach() for each in other.get_classifier()])


# What cannot be


@pytest.mark.parametrize(
    ("classifier", "counts", "names", "message"),
    [
        ("linear", COUNTS, None, r"class_means needs cosine classifiers.*has Linear; expected model_kwargs: \{class"),
        ("scaled", COUNTS, None, "this model has ScaledClassifier"),
        ("cosine", (3, 0, 1, 0), ("cat", "dog", "emu", "fox"), "of every class, and class 'dog' has none"),
        ("cosine", (3, 1, 1, 0), None, "and class 3 has none"),
    ],
)
def test_what_cannot_start_from_class_means(classifier, counts, names, message):
    with pytest.raises(MbibError, match=message):
        require_class_means(build(classifier=classifier), np.array(counts), names)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_features_without_direction_are_an_error_that_names_class_and_head(value):
    model, batches = build("cifar_resnet20"), photographs()
    model.forward_features = lambda x: torch.ones(len(x), 64, 2, 2)
    start_from_class_means(model, batches)
    model.forward_features = lambda x: torch.full((len(x), 64, 2, 2), value)
    with pytest.raises(MbibError, match="features of class 'a' before fc have no mean direction; expected finite"):
        start_from_class_means(model, batches, ("a", "b", "c", "d"))


def test_a_class_whose_images_are_all_broken_is_an_error_that_names_it():
    batches = photographs()
    without = [Batch((b.images[b.targets != 3],), b.targets[b.targets != 3], b.index) for b in batches]
    message = "none of the training images of class 'd' can be read; --broken skip leaves such images"
    with pytest.raises(MbibError, match=message):
        start_from_class_means(build("cifar_resnet20"), without, ("a", "b", "c", "d"))


# The nearest class mean


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # each class has one centroid
@pytest.mark.parametrize("name", ["cifar_resnet20", "bib_resnet20"])
def test_ncm_is_scikit_learns_nearest_centroid_on_normalised_features(name):
    model, batches = build(name, **({"prediction": "v"} if name.startswith("bib") else {})), photographs()
    start_from_class_means(model, batches)
    images, targets = (torch.cat(each) for each in zip(*((b.images, b.targets) for b in batches), strict=True))
    fresh = torch.randn(300, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2
    with torch.no_grad():
        model.eval()
        first, second = (model.forward_head(model.forward_features(x), pre_logits=True) for x in (images, fresh))
        predicted = model(fresh).argmax(dim=1)
    centroids = NearestCentroid().fit(normalize(first.double().numpy()), targets.numpy())
    directions = NearestCentroid().fit(normalize(centroids.centroids_), centroids.classes_)
    expected = directions.predict(normalize(second.double().numpy()))
    assert len(set(expected)) > 1
    assert predicted.tolist() == expected.tolist()


# Runs

SHORT = dict(epochs=2, warmup_epochs=1, imbalance_max=24, image_cache="none", device="cpu", workers=0)


def recipe_of(path, recipe="mbib_resnet20.digits", **keys):
    return load_recipe(find_recipe(recipe), {**SHORT, "output": str(path), **keys})


COSINE = {"model_kwargs": {"classifier": "cosine", "drop_rate": 0.2}, "classifier_start": "class_means"}


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [0, 1])
def test_a_run_that_is_resumed_is_bit_identical_and_starts_its_classifiers_once(tmp_path, monkeypatch, stop_at):
    groups = {"classifier": {"lr_scale": 3.0, "weight_decay": 0.0}}
    recipe = recipe_of(tmp_path, **COSINE, param_groups=groups, model_ema=True, checkpoint_seconds=0)
    starts = []
    original = run_module.start_from_class_means
    monkeypatch.setattr(run_module, "start_from_class_means", lambda *args: (starts.append(args[0]), original(*args)))
    whole = train(recipe, "whole")
    crash(recipe, "broken", stop_at)
    random.seed(7)
    torch.manual_seed(7)
    resumed = train(recipe.replace(resume="auto"), "broken")
    assert len(starts) == (2 if stop_at else 3), "what fails before its first update leaves nothing to go on from"
    assert not differing(whole.folder, resumed.folder)
    assert whole.record.result == resumed.record.result
    saved = load_recipe(whole.folder / "recipe.yaml")
    assert (saved.classifier_start, saved.param_groups) == ("class_means", groups)


@pytest.mark.slow
def test_the_first_epochs_classifiers_are_class_means_of_the_training_images(tmp_path, monkeypatch):
    """At next to no learning rate the result is what it started from, the moving average included."""
    keys = dict(epochs=1, warmup_epochs=0, lr=1e-12, model_ema=True)
    run = train(recipe_of(tmp_path, **COSINE, **keys), "run")
    rows = weights(run.folder)["observation.classifier.weight"]
    random_start = train(recipe_of(tmp_path, model_kwargs=COSINE["model_kwargs"], **keys), "random")
    assert run.heads["v3"].top1 > random_start.heads["v3"].top1 + 20
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(10))


@pytest.mark.slow
def test_ncm_as_a_stage_after_linear_classifiers(tmp_path, capsys):
    arguments = ["--epochs", "2", "--imbalance-max", "24", "--device", "cpu", "--output", str(tmp_path)]
    assert main(["train", "cifar_resnet32.ncm_digits", *arguments, "--image-cache", "none"]) == 0
    assert "After Nearest class mean, on test:" in capsys.readouterr().out
    folder = tmp_path / "cifar_resnet32.ncm_digits"
    config, metrics = (json.loads((folder / name).read_text()) for name in ("config.json", "metrics.json"))
    assert config["model_args"]["classifier"] == "cosine"
    assert (config["logit_prior"], metrics["stages"]) == ("uniform", ["ce", "ncm"])
    first, second = (weights(each) for each in (folder / "stage1-ce", folder))
    assert first.keys() - second.keys() == {"fc.bias"}
    assert {key for key in second if not torch.equal(first[key], second[key])} == {"fc.weight"}


REFUSED = {
    "linear": (["--classifier-start", "class_means"], "class_means needs cosine classifiers"),
    "misspelt": (["--classifier-start", "class_mean"], "'classifier_start' 'class_mean': did you mean 'class_means'"),
    "post hoc": (
        ["--method", "ncm", "--epochs", "0", "--initial-checkpoint", "x", "--classifier-start", "random"],
        "'classifier_start': method 'ncm' trains nothing, and its classifiers are class means",
    ),
    "of tau-norm": (
        ["--method", "tau_norm", "--epochs", "0", "--initial-checkpoint", "x", "--classifier-start", "class_means"],
        "'tau_norm' trains nothing, and its classifiers are those of the model that it starts from",
    ),
    "no start": (["--method", "ncm", "--epochs", "0"], "method 'ncm' starts from a trained model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_command_that_cannot_be_says_so_and_leaves_nothing(tmp_path, capsys, case):
    flags, message = REFUSED[case]
    assert main(["train", "--device", "cpu", "--output", str(tmp_path / "runs"), *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert not (tmp_path / "runs").exists()


# Two processes


def in_two_processes(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, batches = build(), photographs()
    start_from_class_means(model, batches[rank::2])
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    mp.start_processes(in_two_processes, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = build()
    start_from_class_means(alone, photographs())
    for key, value in alone.state_dict().items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-6, msg=key)
