"""What is read of methods' and samplers' source, against the classes and the registry that importing them gives."""

import dataclasses

import pytest

from mbib_timm.data import SAMPLERS, parse_sampler
from mbib_timm.errors import MbibError
from mbib_timm.methods import METHODS
from mbib_timm.options import default_of, option_types
from mbib_timm.recipe import Recipe
from mbib_timm.recipe.checks import _PLAIN_POLICY, _POLICIES
from mbib_timm.recipe.declared import (
    count_streams,
    find_method,
    known_methods,
    packaged_methods,
    packaged_samplers,
)

OURS = [name for name in METHODS if METHODS[name].__module__.startswith("mbib_timm.methods.")]


def test_every_method_of_the_package_is_read_in_the_order_of_its_registration():
    assert list(packaged_methods()) == OURS


@pytest.mark.parametrize("name", OURS)
def test_what_is_read_is_what_the_class_says(name):
    read, method = packaged_methods()[name], METHODS[name]
    for item in dataclasses.fields(read):
        if item.name != "Settings":
            assert getattr(read, item.name) == getattr(method, item.name), item.name
    assert option_types(read.Settings) == option_types(method.Settings)
    items, theirs = dataclasses.fields(read.Settings), dataclasses.fields(method.Settings)
    for mine, other in zip(items, theirs, strict=True):
        assert (mine.name, mine.metadata, default_of(mine)) == (other.name, other.metadata, default_of(other))
    assert dataclasses.asdict(read.Settings()) == dataclasses.asdict(method.Settings())


def test_a_method_that_somebody_registers_is_known_and_one_that_is_removed_is_not():
    @METHODS.register("of_a_test")
    class OfATest(METHODS["ce"]):
        name, title = "of_a_test", "Of a test"

    try:
        assert find_method("of_a_test").title == "Of a test"
        assert list(known_methods())[-1] == "of_a_test"
        assert Recipe(method="of_a_test").method == {"name": "of_a_test"}
    finally:
        METHODS.remove("of_a_test")
    with pytest.raises(MbibError, match="unknown method 'of_a_test'"):
        Recipe(method="of_a_test")


def test_every_sampler_of_the_package_is_read():
    ours = [name for name in SAMPLERS if SAMPLERS[name].weights.__module__ == "mbib_timm.data.samplers"]
    assert list(packaged_samplers()) == ours


@pytest.mark.parametrize("name", ["instance", "effective:0.9", "instance + reverse", "class_aware:2+sqrt"])
def test_streams_are_counted_as_the_samplers_do(name):
    assert count_streams(name) == len(parse_sampler(name))


@pytest.mark.parametrize("name", ["balance", "effective:2", "sqrt:3", "sqrt+sqrt+sqrt", "", "class_aware:x"])
def test_what_is_no_sampler_is_refused_as_the_samplers_do(name):
    with pytest.raises(MbibError) as theirs:
        parse_sampler(name)
    with pytest.raises(MbibError) as ours:
        count_streams(name)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("aa", ["cifar10", "rand", "rand-m9-n2-mstd0.5-inc1", "rand-m9-mstd101", "rand-p0.6"])
def test_plain_policies_are_policies(aa):
    from mbib_timm.data.policies import create_policy

    assert _PLAIN_POLICY.fullmatch(aa)
    create_policy(aa)  # raises for what is none


@pytest.mark.parametrize(
    "aa", ["original-mstd0.5", "originalr", "v0", "v0r", "3a", "augmix-m3-w3", "rand-mmax12-tweights"]
)
def test_policies_that_timm_has_to_say_are_policies(aa):
    assert not _PLAIN_POLICY.fullmatch(aa)
    assert aa.partition("-")[0] in _POLICIES
    assert Recipe(aa=aa).aa == aa
