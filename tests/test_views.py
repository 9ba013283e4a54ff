"""Several augmented copies of each image: what a batch holds when a method asks for them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_data import cut

from mbib_timm.data import create_loaders, open_data
from mbib_timm.environment import seed_generators
from mbib_timm.methods import METHODS, Method, register
from mbib_timm.recipe import find_recipe, load_recipe
from mbib_timm.training import train

SIZE = (3, 16, 16)
CPU = torch.device("cpu")


def batches(loader, views, epoch=0, rank=0, world_size=1, **keys):
    keys = dict(loader=loader, batch_size=64, workers=0, device="cpu", **keys)
    recipe = load_recipe(find_recipe("mbib_resnet20.digits"), {**cut(keys.get("train_crop_mode", "pad")), **keys})
    splits = open_data(recipe)
    loaders = create_loaders(splits, recipe, SIZE, CPU, rank, world_size, views=views * [recipe])
    loaders.train.set_epoch(epoch)
    seed_generators(0, epoch, 0)
    return splits, [batch for (batch,) in loaders.train]


@pytest.mark.slow
@pytest.mark.parametrize("crop", ["pad", "rrc"])
@pytest.mark.parametrize("loader", ["resident", "timm"])
def test_views_are_other_draws_of_the_same_images(loader, crop):
    splits, found = batches(loader, 3, train_crop_mode=crop)
    assert sum(len(batch.targets) for batch in found) == len(splits.train)
    for batch in found:
        assert len(batch.views) == 3
        assert batch.images is batch.views[0]
        assert {view.shape for view in batch.views} == {(len(batch.targets), *SIZE)}
        np.testing.assert_array_equal(splits.train.targets[batch.index], batch.targets)
        assert not torch.equal(batch.views[0], batch.views[1])
        assert not torch.equal(batch.views[1], batch.views[2])
    again = batches(loader, 3, train_crop_mode=crop)[1]
    for one, other in zip(found, again, strict=True):
        assert all(torch.equal(view, same) for view, same in zip(one.views, other.views, strict=True))
    later = batches(loader, 3, epoch=1, train_crop_mode=crop)[1]
    assert not torch.equal(found[0].views[1], later[0].views[1])


def test_the_first_view_is_that_of_a_loader_of_one():
    one, several = batches("resident", 1)[1], batches("resident", 2)[1]
    for single, double in zip(one, several, strict=True):
        assert torch.equal(single.images, double.views[0])
        assert torch.equal(single.index, double.index)


@pytest.mark.parametrize("loader", ["resident", "timm"])
def test_without_augmentation_views_are_equal_and_normalised_as_one(loader):
    (_, one), (_, several) = (batches(loader, views, train_crop_mode="none") for views in (1, 2))
    for single, double in zip(one, several, strict=True):
        assert all(torch.equal(view, single.images) for view in double.views)


class Agreement(Method):
    """Cross-entropy of one view, and the distance between the logits of both."""

    title, citation, views = "Agreement", "made up for this test", ({}, {})

    def forward(self, *batches):
        (batch,) = batches
        one, other = (self.logits(view)["logits"] for view in batch.views)
        apart = (one - other).square().mean()
        return {"loss": F.cross_entropy(one, batch.targets) + apart, "apart": apart.detach()}


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["resident", "timm"])
def test_a_method_of_two_views_trains_and_resumes(tmp_path, loader):
    register("agreement")(Agreement)
    try:
        keys = dict(method="agreement", loader=loader, device="cpu", workers=0, warmup_epochs=1, checkpoint_seconds=0)
        recipe = load_recipe(find_recipe("cifar_resnet20.ce_digits"), {**keys, "epochs": 2, "output": str(tmp_path)})
        run = train(recipe, "two_views")
        rows = (tmp_path / "two_views" / "summary.csv").read_text().splitlines()
        assert "train_apart" in rows[0]
        assert run.record.method == "agreement"
    finally:
        METHODS.remove("agreement")
