"""What a recipe leaves to the machine is chosen once, recorded, and kept where a run goes on."""

import pytest
import yaml

from mbib_timm.errors import CheckpointError
from mbib_timm.recipe import find_recipe, load_recipe
from mbib_timm.results.record import read_record
from mbib_timm.training import train
from mbib_timm.training.run_folder import RunFolder, same_computation

SHORT = {"imbalance_max": 24, "device": "cpu", "workers": 0}


def digits(tmp_path, **overrides):
    keys = {**SHORT, "epochs": 1, "warmup_epochs": 0, "output": str(tmp_path), **overrides}
    return load_recipe(find_recipe("mbib_resnet20.digits"), keys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "amp", "precision"),
    [
        ({}, False, "float32"),  # on the CPU
        ({"amp": True}, True, "bfloat16"),
        ({"amp": True, "amp_dtype": "float16"}, True, "float16"),
    ],
)
def test_precision_and_loader_are_recorded_as_they_were(tmp_path, overrides, amp, precision):
    train(digits(tmp_path, **overrides), "run")
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (recipe["amp"], recipe["loader"]) == (amp, "resident")
    assert read_record(tmp_path / "run").precision == precision


def test_a_resumed_run_keeps_its_precision_and_another_one_is_refused(tmp_path):
    asked = digits(tmp_path)
    assert {key: getattr(asked, key) for key in ("loader", "amp")} == {"loader": "auto", "amp": None}
    train(asked.replace(amp=True), "run")
    again = train(asked.replace(resume="auto"), "run")
    assert again.recipe.amp is True
    with pytest.raises(CheckpointError, match=r"another recipe: amp \(True there, False asked for\)"):
        train(asked.replace(resume="auto", amp=False), "run")


def test_what_is_left_open_is_the_same_computation_as_any_choice(tmp_path):
    asked = digits(tmp_path)
    assert asked.loader == "auto"
    chosen = asked.replace(amp=False, loader="timm")
    assert same_computation(asked, chosen)
    assert not same_computation(asked.replace(amp=True), chosen)
    assert not same_computation(chosen, asked.replace(loader="resident", amp=False))
    assert not same_computation(asked, chosen.replace(lr=0.3))


def test_a_run_of_other_crops_is_compared_and_refused_by_its_crops(tmp_path):
    asked = digits(tmp_path)
    assert asked.train_crop_mode == "pad", "whole images alone"
    other = asked.replace(train_crop_mode="rrc", views=None, crop_pct=0.875, crop_mode="center", amp=False)
    found = asked.with_choices_of(other)
    assert (found.crop_pct, found.crop_mode, found.amp) == (None, None, False)
    train(other, "run")
    with pytest.raises(CheckpointError, match=r"another recipe: .*train_crop_mode \('rrc' there, 'pad' asked for\)"):
        train(asked.replace(resume="auto"), "run")


@pytest.mark.slow
def test_every_stage_of_a_run_is_recorded_as_it_was(tmp_path):
    keys = {
        f"stage{stage}.{key}": value for stage in (1, 2) for key, value in {"epochs": 1, "warmup_epochs": 0}.items()
    }
    recipe = load_recipe(find_recipe("cifar_resnet32.crt_digits"), {**SHORT, "output": str(tmp_path), **keys})
    train(recipe, "run")
    written = RunFolder(tmp_path / "run").recipe()
    assert [(stage.amp, stage.loader) for stage in written.chain()] == [(False, "resident")] * 2
    assert same_computation(recipe, written)
