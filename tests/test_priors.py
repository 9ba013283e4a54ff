"""Class frequencies: expectation-maximisation against a naive loop and known shares; files; excluded classes."""

import json

import numpy as np
import pytest
import timm
import torch

from mbib_timm.cli import main
from mbib_timm.data.class_values import label_names
from mbib_timm.data.sources import open_digits
from mbib_timm.errors import DataError, MbibError
from mbib_timm.evaluation import priors
from mbib_timm.evaluation.priors import (
    estimate_prior,
    log_shift,
    read_prior,
    trained_shares,
    wanted_shares,
)
from mbib_timm.models.head_outputs import head_logits

NAMES = ("fox", "red deer", "Bär", "no")


def gaussians(shares, images, seed=0):
    """Posteriors, for equal frequencies, of images drawn from known ones: unit Gaussians around 0, 2, 4 and 6."""
    generator = np.random.default_rng(seed)
    centers = np.arange(len(shares)) * 2.0
    labels = generator.choice(len(shares), images, p=shares)
    x = generator.normal(centers[labels])
    likelihood = np.exp(-((x[:, None] - centers) ** 2) / 2)
    return likelihood / likelihood.sum(axis=1, keepdims=True), labels


def naive_steps(p, trained, steps):
    shares = list(trained)
    for _ in range(steps):
        sums = [0.0] * len(shares)
        for row in p.tolist():
            weighted = [value * new / old for value, new, old in zip(row, shares, trained, strict=True)]
            for k, value in enumerate(weighted):
                sums[k] += value / sum(weighted)
        shares = [value / len(p) for value in sums]
    return shares


@pytest.mark.parametrize("trained", [[0.25] * 4, [0.7, 0.1, 0.1, 0.1]])
def test_expectation_maximisation_takes_the_steps_of_a_naive_loop(trained, monkeypatch):
    monkeypatch.setattr(priors, "TOLERANCE", 0)
    p, _ = gaussians([0.4, 0.3, 0.2, 0.1], 50)
    p = p * np.array(trained) / (p * np.array(trained)).sum(axis=1, keepdims=True)
    for steps in (1, 2, 7):
        monkeypatch.setattr(priors, "ITERATIONS", steps)
        found = estimate_prior(p, np.array(trained))
        assert found.iterations == steps
        assert not found.converged
        np.testing.assert_allclose(found.shares, naive_steps(p, trained, steps), rtol=1e-10)


@pytest.mark.parametrize("shares", [[0.7, 0.2, 0.09, 0.01], [0.05, 0.15, 0.0, 0.8]])
def test_known_shares_are_found(shares):
    p, labels = gaussians(shares, 20_000)
    found = estimate_prior(p, np.full(4, 0.25))
    assert found.converged
    drawn = np.bincount(labels, minlength=4) / len(labels)
    np.testing.assert_allclose(found.shares, drawn, atol=0.015)
    # The mean of the probabilities, which one might take, is further off.
    assert np.abs(found.shares - drawn).sum() < np.abs(p.mean(axis=0) - drawn).sum() / 3


def test_an_estimate_makes_more_answers_right():
    p, labels = gaussians([0.7, 0.2, 0.09, 0.01], 5_000)
    trained = np.full(4, 0.25)
    shifted = np.log(p) + log_shift(estimate_prior(p, trained).shares, trained)
    assert (shifted.argmax(axis=1) == labels).mean() > (p.argmax(axis=1) == labels).mean() + 0.02


def test_an_estimate_is_described_by_its_largest_shares():
    p, _ = gaussians([0.7, 0.2, 0.1, 0.0], 1_000)
    found = estimate_prior(p, np.full(4, 0.25))
    text = found.describe(NAMES)
    assert text.startswith(f"class frequencies estimated from 1,000 images in {found.iterations} iterations: fox ")
    assert text.index("fox") < text.index("red deer") < text.index("Bär") < text.index("no 0.0 %")
    assert "uncertain" not in text
    many = estimate_prior(np.eye(30), np.full(30, 1 / 30)).describe(label_names(None, 30))
    assert many.endswith(", and 20 more with 66.7 %; that is uncertain, from fewer than 10 images for each class")


def test_no_images_give_no_estimate():
    with pytest.raises(DataError, match="no image to estimate"):
        estimate_prior(np.zeros((0, 4)), np.full(4, 0.25))


def test_a_shift_is_bayes_theorem_and_zeros_exclude_a_class():
    trained, wanted = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.9, 0.0])
    logits = torch.tensor([[1.0, 0.5, 40.0], [0.2, -0.3, 0.1]])
    p = torch.softmax(logits, dim=1).double().numpy()[1:]
    found = torch.softmax(logits + torch.from_numpy(log_shift(wanted, trained)), dim=1).double().numpy()
    expected = p * wanted / trained
    np.testing.assert_allclose(found[1:], expected / expected.sum(axis=1, keepdims=True), rtol=2e-5)
    assert (found[:, 2] == 0).all()


def test_what_a_model_was_trained_for():
    counts = np.array([6, 3, 1])
    assert trained_shares("m", "train", counts).tolist() == [0.6, 0.3, 0.1]
    assert trained_shares("m", "uniform", counts).tolist() == pytest.approx([1 / 3] * 3)
    for prior, known in ((None, counts), ("train", None)):
        with pytest.raises(MbibError, match="m does not say which class frequencies"):
            trained_shares("m", prior, known)
    assert wanted_shares("train", counts, None).tolist() == [0.6, 0.3, 0.1]
    assert wanted_shares("uniform", counts, None).tolist() == pytest.approx([1 / 3] * 3)


def test_shares_and_counts_come_from_a_file_and_not_all_are_zero(tmp_path):
    file = tmp_path / "prior.yaml"
    for text in ("no: 2\nBär: 0\nred deer: 3.0\nfox: 5e0\n", "[1.5e308, 0.9e308, 0, 0.6e308]"):
        file.write_text(text, encoding="utf-8")
        assert read_prior(file, NAMES).tolist() == pytest.approx([0.5, 0.3, 0.0, 0.2])
    file.write_text("[0, 0, 0, 0]")
    with pytest.raises(DataError, match=r"the prior .*prior\.yaml: every class has share 0; give at least one"):
        read_prior(file, NAMES)


def test_validate_has_the_priors_of_predict(finished_run, tmp_path, capsys):
    """Against the logits of the test images, shifted by hand."""
    split = open_digits("test")
    indices = range(len(split)) if split.indices is None else split.indices.tolist()
    model = timm.create_model(f"local-dir:{finished_run}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        images = torch.stack([transform(split.reader.read(index).convert("RGB")) for index in indices])
        heads = head_logits(model, images)
    file = tmp_path / "shares.csv"
    counts = np.array(json.loads((finished_run / "config.json").read_text())["class_counts"])
    shares = np.array([0.3, 0.3, 0.1, 0.1, 0.1, 0.05, 0.05, 0, 0, 0])
    file.write_text("\n".join(f"{label},{share}" for label, share in enumerate(shares)))
    estimated = estimate_prior(heads["prediction"].double().softmax(dim=1).numpy(), np.full(10, 0.1))
    for prior, wanted in ((file, shares), ("train", counts / counts.sum()), ("estimate", estimated.shares)):
        results = tmp_path / "results.json"
        command = ["validate", str(finished_run), "--prior", str(prior), "--results", str(results), "--device", "cpu"]
        assert main([*command, "--workers", "0"]) == 0
        out, content = capsys.readouterr().out, json.loads(results.read_text())
        np.testing.assert_allclose(content["prior"], wanted, atol=1e-4)
        assert ("class frequencies estimated from" in out) == (prior == "estimate")
        for head, logits in heads.items():
            with np.errstate(divide="ignore"):
                shifted = logits.double().numpy() + np.log(wanted)
            top1 = 100 * (shifted.argmax(axis=1) == split.targets).mean()
            assert content["heads"][head]["top1"] == pytest.approx(top1, abs=0.31)  # a near-tie


@pytest.mark.slow
def test_validate_moves_no_expert(tmp_path, capsys):
    """Each is trained for class frequencies of its own, and the prediction alone for those that are declared."""
    keys = ["--epochs", "1", "--warmup-epochs", "0", "--device", "cpu", "--output", str(tmp_path)]
    assert main(["train", "experts_resnet32.sade_digits", *keys, "--experiment", "sade"]) == 0
    results = tmp_path / "results.json"
    for more, heads in (([], 4), (["--prior", "train"], 1)):
        command = ["validate", str(tmp_path / "sade"), "--results", str(results), "--device", "cpu", *more]
        assert main(command) == 0
        found = json.loads(results.read_text())["heads"]
        assert len(found) == heads
        assert "prediction" in found
