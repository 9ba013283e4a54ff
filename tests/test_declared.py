"""What is read of methods' and samplers' source, against the classes and the registry that importing them gives."""

import dataclasses

import pytest

from mbib_timm.data import SAMPLERS, parse_sampler
from mbib_timm.data.policies import create_policy
from mbib_timm.data.sources import SOURCES
from mbib_timm.errors import MbibError
from mbib_timm.inference.export import FORMATS
from mbib_timm.methods import METHODS
from mbib_timm.options import default_of, option_types
from mbib_timm.recipe import Recipe
from mbib_timm.recipe.declared import (
    export_formats,
    find_method,
    known_methods,
    packaged_methods,
    packaged_samplers,
    packaged_sources,
    stream_names,
)
from mbib_timm.recipe.policy_names import POLICIES

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


def test_every_source_and_every_export_format_of_the_package_is_read():
    assert list(packaged_sources()) == list(SOURCES)
    assert list(export_formats()) == list(FORMATS)


def test_the_names_of_streams_are_told_apart_and_their_numbers_left_to_the_samplers():
    assert stream_names("instance") == ("instance",)
    assert stream_names("class_aware:2 + sqrt") == parse_sampler("class_aware:2+sqrt") == ("class_aware:2", "sqrt")
    assert stream_names("effective:2") == ("effective:2",)
    with pytest.raises(MbibError, match="beta is a number of at least 0 and less than 1, not '2'"):
        parse_sampler("effective:2")


@pytest.mark.parametrize("name", ["balance", "", "sqrt+sqrt+sqrt", "instance+balance"])
def test_what_is_no_sampler_is_refused(name):
    with pytest.raises(MbibError, match=r"unknown sampler|expected one sampler, or two"):
        stream_names(name)


@pytest.mark.parametrize("aa", [*POLICIES, "rand-m9-n2-mstd0.5-inc1", "augmix-m3-w3", "original-mstd0.5"])
def test_a_recipe_takes_the_policies_that_there_are(aa):
    assert Recipe(aa=aa).aa == aa
    create_policy(aa)  # raises for what is none


@pytest.mark.parametrize("aa", ["cifar", "rnd-m9"])
def test_a_recipe_takes_no_others(aa):
    for check in (create_policy, lambda aa: Recipe(aa=aa)):
        with pytest.raises(MbibError, match=f"recipe key 'aa': unknown policy '{aa}'; expected cifar10, rand-"):
            check(aa)
