"""The resident loader against timm's, and its epochs as a function of seed, epoch and rank."""

import numpy as np
import pytest
import torch
from small_data import epoch, loaders, recipe, splits

from mbib_timm.data import Split, Splits
from mbib_timm.data import loaders as loaders_module

# The same batches as timm's loader


@pytest.mark.parametrize("mode", ["pad", "none", "rrc"])
@pytest.mark.parametrize("image", [(16, 16), (23, 40)])
def test_evaluation_batches_are_bit_equal_to_timms(mode, image):
    data = splits(20, *image)
    ours = loaders(recipe(train_crop_mode=mode), data).val
    timms = loaders(recipe(train_crop_mode=mode, loader="timm"), data).val
    assert type(ours) is not type(timms)
    for batch, expected in zip(ours, timms, strict=True):
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.targets, expected.targets)
        assert torch.equal(batch.index, expected.index)


@pytest.mark.parametrize("count", [48, 49, 50])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_training_has_timms_order_and_its_last_batch(count, rank, world_size):
    data = splits(count)
    data = Splits(Split(data.train.reader, np.arange(count)), data.val, None, data.class_counts, None)
    both = [loaders(recipe(loader=kind), data, rank, world_size).train for kind in ("resident", "timm")]
    for number in (0, 7):
        ours, timms = (
            [batch.index.tolist() for loader in [built] for (batch,) in (loader.set_epoch(number), loader)[1]]
            for built in both
        )
        assert ours == timms
    assert len(both[0]) == len(both[1])


def test_without_augmentation_training_batches_are_bit_equal_to_timms():
    ours, timms = (loaders(recipe(train_crop_mode="none", loader=kind)).train for kind in ("resident", "timm"))
    for got, expected in zip(epoch(ours, 3), epoch(timms, 3), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("channels_last", [True, False])
def test_batches_have_the_memory_format_that_the_recipe_asks_for(channels_last):
    (batch,) = next(iter(loaders(recipe(channels_last=channels_last)).train))
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    assert batch.images.is_contiguous(memory_format=wanted)


# An epoch as a function of seed, epoch and rank


@pytest.mark.parametrize("mode", ["pad", "rrc"])
def test_an_epoch_does_not_depend_on_the_pieces_it_is_augmented_in(monkeypatch, mode):
    strong = {"color_jitter": 0.4} if mode == "rrc" else {"aa": "cifar10", "rotation": 10, "cutout": 6}
    settings = recipe(train_crop_mode=mode, **strong)
    data = splits(50, 20, 30)
    whole = epoch(loaders(settings, data).train, 2)
    monkeypatch.setattr(loaders_module, "PIECE_BYTES", 1)
    for got, expected in zip(epoch(loaders(settings, data).train, 2), whole, strict=True):
        assert torch.equal(got, expected)


def test_augmentation_is_a_function_of_seed_epoch_and_rank():
    images = epoch(loaders(recipe()).train, 1)[0]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(epoch(loaders(recipe()).train, 1)[0], images)
    assert torch.equal(torch.get_rng_state(), before)  # the model's dropout has the global generator for itself
    same = Split(splits().train.reader, np.zeros(50, dtype=int), np.zeros(50, dtype=int))
    data = Splits(same, same, None, np.array([50, 0]), None)
    first = loaders(recipe(), data).train
    assert not torch.equal(epoch(first, 0)[0], epoch(first, 1)[0])
    ranks = [epoch(loaders(recipe(), data, rank, 2).train, 0)[0] for rank in (0, 1)]
    assert not torch.equal(*ranks)
    assert not torch.equal(epoch(loaders(recipe(seed=1), data).train, 0)[0], epoch(first, 0)[0])
