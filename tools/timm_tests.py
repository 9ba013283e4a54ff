#!/usr/bin/env python
"""Run timm's own tests of models, unmodified, over the models that this package registers with timm.

    python tools/timm_tests.py PATH/pytorch-image-models/tests                          # every registered name
    python tools/timm_tests.py PATH/tests --models 'mbib_resnet20' 'cifar_*' -- -x -k fx

PATH is a checkout of timm, or its unpacked source distribution, of the installed version. What follows ``--`` is
pytest's. In timm's file each test below is written for a list of timm's models; here the list is ours.
"""

import argparse
import fnmatch
import sys
from pathlib import Path
from typing import Any

import pytest
import timm

import mbib_timm  # noqa: F401 (registers the models)
from mbib_timm.models.zoo import ZOO

MODULES = ("mbib_variants", "plain_resnets", "with_classifier")
# timm's tests that hold for any convolutional network, by the further parameters that they take beside a model's name.
TESTS: dict[str, tuple[Any, ...]] = {
    "test_model_forward": (),
    "test_model_backward": (),
    "test_model_default_cfgs": (),
    "test_model_load_pretrained": (),
    "test_model_features_pretrained": (),
    "test_reset_classifier_keeps_pool": (),
    "test_features_only_grad_checkpointing_backward": (),
    "test_features_only_feature_cls_class": (),
    "test_model_forward_torchscript": (),
    "test_model_forward_features": (),
    "test_model_forward_intermediates_features": (),
    "test_model_forward_intermediates": (),
    "test_prune_intermediate_layers_params_used": (),
    "test_prune_intermediate_layers_last_feature": (True,),
    "test_prune_intermediate_layers_contract": (),
    "test_prune_to_stem_feature": (),
    "test_forward_after_prune_intermediate_layers": (),
    "test_head_hidden_size": ({},),
    "test_model_forward_fx": (),
    "test_model_backward_fx": (),
    "test_model_forward_fx_torchscript": (),
}
WITH_TAGS = ("test_model_default_cfgs",)
WITH_WEIGHTS = ("test_model_load_pretrained", "test_model_features_pretrained")


class OurModels:
    """A pytest plugin that runs the tests above, over our models."""

    def __init__(self, patterns: list[str]) -> None:
        names = [name for module in MODULES for name in timm.list_models(module=module, include_tags=False)]
        self.names = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]

    def names_for(self, test: str) -> list[str]:
        """Return the names that a test runs over; those with weights are those whose weights need no network."""
        if test in WITH_WEIGHTS:
            return [m.name for m in ZOO if m.weights is not None and m.architecture in self.names]
        if test in WITH_TAGS:
            return [
                tagged for name in self.names for tagged in timm.list_models(f"{name}.*", include_tags=True) or [name]
            ]
        return self.names

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Replace a test's list of models."""
        test = metafunc.definition.originalname
        if test not in TESTS:
            return
        for i, mark in enumerate(metafunc.definition.own_markers):
            if mark.name == "parametrize" and "model_name" in mark.args[0]:
                rows = [(name, *TESTS[test]) for name in self.names_for(test)]
                values = [row[0] if len(row) == 1 else row for row in rows]
                metafunc.definition.own_markers[i] = pytest.mark.parametrize(mark.args[0], values).mark

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out the tests of particular models of timm's."""
        items[:] = [item for item in items if getattr(item, "originalname", None) in TESTS]


def main() -> int:
    """Run the tests; returns pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, help="the folder `tests` of timm's sources")
    parser.add_argument("--models", nargs="+", default=["*"], metavar="NAME", help="names or patterns; all by default")
    ours = sys.argv[1:]
    theirs: list[str] = []
    if "--" in ours:
        split = ours.index("--")
        ours, theirs = ours[:split], ours[split + 1 :]
    args = parser.parse_args(ours)
    return int(
        pytest.main(
            [str(args.tests / "test_models.py"), "-q", "-W", "ignore", "-p", "no:cacheprovider", *theirs],
            plugins=[OurModels(args.models)],
        )
    )


if __name__ == "__main__":
    sys.exit(main())
