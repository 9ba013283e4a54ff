"""Recipes, flags, sweep files and results that nobody would write: each is right, or refused in one sentence.

What is right has a second reading: a recipe that is written and read again is the same, as is a run's record.
"""

import copy
import json
from datetime import timedelta

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_results import made_up_record

from mbib_timm.cli import parse
from mbib_timm.errors import MbibError
from mbib_timm.files import to_json
from mbib_timm.flags import recipe_overrides
from mbib_timm.recipe import KEYS, Recipe, dump_recipe, load_recipe, packaged_recipes, recipes_folder
from mbib_timm.results.record import RECORD, HeadMetrics, read_record
from mbib_timm.sweeps.sweep import load_sweep

# The same examples in every run: a failure is somebody's change.
FUZZ = settings(deadline=timedelta(seconds=10))
LONGEST = 1000  # characters of a message

numbers = st.one_of(
    st.integers(), st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**30, -1, 0]), st.floats(), st.floats(0, 1)
)
texts = st.one_of(
    st.text(max_size=20), st.sampled_from(["", "\0", "\x1b[31m", "x" * 5000, "3e-4", "nan", "no", "../.."])
)
odd = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(texts, st.integers()), inner, max_size=3)
    ),
    max_leaves=8,
)
keys = st.one_of(st.sampled_from(sorted(KEYS)), st.sampled_from(["base", "stages", "previous", "lrr"]), texts)


def refused(call, *arguments):
    """Return what a call gives, or None where it refuses its arguments as it should."""
    try:
        return call(*arguments)
    except MbibError as error:
        text = str(error)
        assert text
        assert len(text) < LONGEST
        assert len(text.splitlines()) == 1
        return None


def read(file, content):
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return load_recipe(file)


def reread(file, recipe: Recipe) -> None:
    """What is written of a recipe is the recipe."""
    file.write_bytes(dump_recipe(recipe))
    again = load_recipe(file)
    assert again.to_dict() == recipe.to_dict()


@FUZZ
@given(name=st.sampled_from(sorted(packaged_recipes())), changes=st.dictionaries(keys, odd, min_size=1, max_size=2))
def test_a_packaged_recipe_with_changes(tmp_path, name, changes):
    content = yaml.safe_load(packaged_recipes()[name].read_text())
    recipe = refused(read, tmp_path / "own.yaml", {**content, **changes})
    if recipe is not None:
        reread(tmp_path / "again.yaml", recipe)


@FUZZ
@given(key=st.sampled_from(sorted(KEYS)), value=odd)
def test_every_key_with_any_value(tmp_path, key, value):
    recipe = refused(read, tmp_path / "own.yaml", {key: value})
    if recipe is not None:
        reread(tmp_path / "again.yaml", recipe)


@FUZZ
@given(text=st.one_of(st.text("{}[]:,-&*!|>\"'#%@\n\t 0aelr.", max_size=40), st.binary(max_size=40)))
def test_any_text_for_a_recipe(tmp_path, text):
    file = tmp_path / "own.yaml"
    file.write_bytes(text if isinstance(text, bytes) else f"lr: 0.1\n{text}".encode())
    refused(load_recipe, file)


@FUZZ
@given(
    words=st.lists(
        st.one_of(
            st.sampled_from([f"--{key.replace('_', '-')}" for key in KEYS]),
            st.sampled_from(["--method.beta", "--stage2.lr", "--model-kwargs", "--views.0.aa", "--mean.0", "--"]),
            st.sampled_from(["1", "-1", "0.5", "{a: 1}", "[", "a=1", "a=[", "{a: 1, a: 2}", "x"]),
            texts.filter(lambda text: text not in ("-h", "--help", "--version")),
        ),
        max_size=4,
    )
)
def test_any_flags(words):
    def read_flags(words):
        found = parse(["train", "cifar_resnet20.ce_digits", *words])
        return load_recipe(packaged_recipes()["cifar_resnet20.ce_digits"], recipe_overrides(found))

    refused(read_flags, words)


SWEEP_KEYS = ["recipe", "axes", "seeds", "set", "title", "labels", "heads", "figure", "paper", "sedes"]


@FUZZ
@given(
    name=st.sampled_from(sorted(file.stem for file in (recipes_folder() / "sweeps").glob("*.yaml"))),
    changes=st.dictionaries(
        st.one_of(st.sampled_from(SWEEP_KEYS), texts),
        st.one_of(odd, st.dictionaries(st.sampled_from(["lr", "x", "kind", "source", "numbers"]), odd, max_size=2)),
        min_size=1,
        max_size=2,
    ),
)
def test_a_packaged_sweep_with_changes(tmp_path, name, changes):
    content = yaml.safe_load((recipes_folder() / "sweeps" / f"{name}.yaml").read_text())
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({**content, **changes}, allow_unicode=True), encoding="utf-8")
    refused(load_sweep, file)


def places(value, place=()):
    """Every place in plain values, by keys and indices."""
    yield place
    for key in value if isinstance(value, dict) else range(min(2, len(value))) if isinstance(value, list) else ():
        yield from places(value[key], (*place, key))


METRICS = HeadMetrics(
    50.0, 90.0, 40.0, 60.0, None, 20.0, 5.0, 1.5, 10, {"many": 1, "medium": 0, "few": 1}, [60.0, 20.0]
)
RUN = made_up_record({"prediction": METRICS}, [200, 5], class_names=["ant", "bee"])
PLAIN = json.loads(to_json(RUN))
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=5,
)


@FUZZ
@given(place=st.sampled_from([place for place in places(PLAIN) if place]), value=json_values)
def test_a_record_with_another_value(tmp_path, place, value):
    content = copy.deepcopy(PLAIN)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / RECORD).write_text(json.dumps(content))
    found = refused(read_record, tmp_path)
    if found is not None:
        (tmp_path / RECORD).write_bytes(to_json(found))
        assert read_record(tmp_path) == found


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_record_that_is_cut(tmp_path, fraction):
    whole = to_json(RUN).rstrip()
    (tmp_path / RECORD).write_bytes(whole[: int(fraction * len(whole))])
    assert refused(read_record, tmp_path) is None
