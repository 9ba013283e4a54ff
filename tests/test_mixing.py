"""Mixing against loops over images and against timm's and torch's own; its draws by distribution; what is refused."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from emulated_graphs import EmulatedGraphs
from PIL import Image
from scipy import stats
from small_data import settled
from test_methods import NoWaiting, make
from test_step import FULL
from timm.data.mixup import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from mbib_timm.capturing import WARM_UP_CALLS
from mbib_timm.data import Batch, TrainLoader, create_loaders, open_data
from mbib_timm.data.images import ArrayReader, Split
from mbib_timm.data.mixing import Box, MixedTrainLoader, Mixing, cutmix_box, mixup, paste, soft_targets
from mbib_timm.data.samplers import class_probabilities
from mbib_timm.data.splits import Splits
from mbib_timm.environment import seed_generators
from mbib_timm.errors import DataError, MbibError
from mbib_timm.methods import METHODS, Method, register
from mbib_timm.methods.functional import adjusted_cross_entropy
from mbib_timm.recipe import KEYS, Recipe, find_recipe, in_proportion, load_recipe
from mbib_timm.results.record import read_history
from mbib_timm.training import train
from mbib_timm.training.optimization import create_optimizer, round_learning_rates
from mbib_timm.training.step import create_step, loss_parts

CPU = torch.device("cpu")
SIZE = (3, 16, 16)
COUNTS = [40, 20, 10, 5, 2]
CLASSES = len(COUNTS)
WAYS = {
    "mixup": {"mixup": 1.0},
    "cutmix": {"cutmix": 1.0},
    "both": {"mixup": 0.4, "cutmix": 1.0, "mixup_prob": 0.8, "mixup_switch_prob": 0.6},
    "cmo": {"cutmix": 1.0, "cutmix_sampler": "reverse", "mixup_prob": 0.5},
    "all": {"mixup": 1.0, "cutmix": 1.0, "cutmix_sampler": "balanced", "smoothing": 0.1},
}
NO_MIXING = {key: KEYS[key].default for key, item in KEYS.items() if item.metadata["group"] == "mixing"}


def recipe(**keys):
    base = {"workers": 0, "train_crop_mode": "pad", "img_size": 16, "batch_size": 8, "image_cache": "none"}
    return settled(**{**base, "method": "ce", "model": "cifar_resnet20", "loader": "resident", **keys})


def splits(counts=COUNTS):
    """Images, each of one value that no other has, and none of 128: every pixel says which image it comes from."""
    labels = np.repeat(np.arange(len(counts)), counts)
    values = np.random.RandomState(0).permutation(np.delete(np.arange(256), 128))[: len(labels)]
    images = np.broadcast_to(values[:, None, None, None], (len(labels), 16, 16, 3)).astype(np.uint8)
    split = Split(ArrayReader(images, "arrays"), labels)
    return Splits(split, split, None, np.array(counts), None)


def loader_of(settings, data=None, rank=0, world_size=1, epoch=0, **keys):
    loader = create_loaders(data or splits(), settings, SIZE, CPU, rank, world_size, **keys).train
    seed_generators(0, epoch, 0)
    loader.set_epoch(epoch)
    return loader


def tensors(batch):
    return (*batch.views, batch.targets, batch.index)


def mixing_of(**keys):
    """The mixing of a stage of ten epochs of five classes."""
    return Mixing(Recipe(epochs=10, **keys), CLASSES)


def random_batch(size=9, views=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = tuple(torch.randn(size, *SIZE, generator=generator) for _ in range(views))
    return Batch(images, torch.randint(CLASSES, (size,), generator=generator), torch.arange(size))


# Batches against a loop over their images, with the same draws


def smoothed(label, eps):
    return [(1 - eps) * (j == label) + eps / CLASSES for j in range(CLASSES)]


@pytest.mark.parametrize("loader", ["resident", "timm"])
@pytest.mark.parametrize("way", WAYS)
def test_an_epoch_is_mixed_image_by_image(way, loader):
    """The draws are those of the epoch's generator; the images and foregrounds those of the streams alone."""
    settings = recipe(**WAYS[way], loader=loader, train_crop_mode="none", hflip=0.0)
    mixed = loader_of(settings, epoch=2, views=[settings] * 2)
    assert isinstance(mixed, MixedTrainLoader)
    plain = loader_of(settings.replace(**NO_MIXING), epoch=2, views=[settings] * 2)
    assert type(plain) is TrainLoader
    foregrounds = None if mixed.foregrounds is None else iter(mixed.foregrounds)
    generator, eps, kinds = mixed.mixing.generator(2), settings.smoothing, set()
    for (batch,), (before,) in zip(mixed, plain, strict=True):
        mix = mixed.mixing.draw(generator, before.images.shape)
        kinds.add(None if mix is None else "mixup" if mix.box is None else "cutmix")
        other = next(foregrounds) if mix is not None and mix.order is None else before
        assert torch.equal(batch.index, before.index)
        assert batch.targets.dtype == torch.float32
        assert batch.targets.shape == (len(before.targets), CLASSES)
        for i, label in enumerate(before.targets.tolist()):
            expected, target = [view[i].clone() for view in before.views], np.array(smoothed(label, eps))
            if mix is not None:
                j = i if mix.order is None else int(mix.order[i])
                for view, own, others in zip(expected, before.views, other.views, strict=True):
                    if mix.box is None:
                        view[:] = mix.share * own[i] + (1 - mix.share) * others[j]
                        continue
                    for row in range(mix.box.top, mix.box.bottom):
                        for column in range(mix.box.left, mix.box.right):
                            view[:, row, column] = others[j, :, row, column]
                second = np.array(smoothed(int(other.targets[j]), eps))
                target = mix.share * target + (1 - mix.share) * second
            torch.testing.assert_close(batch.targets[i].double(), torch.tensor(target), rtol=0, atol=1e-6)
            for view, image in zip(batch.views, expected, strict=True):
                torch.testing.assert_close(view[i], image, rtol=0, atol=1e-6)
    assert kinds >= {"mixup": {"mixup"}, "cutmix": {"cutmix"}, "both": {None, "mixup", "cutmix"},
                     "cmo": {None, "cutmix"}, "all": {"mixup", "cutmix"}}[way]  # fmt: skip


def test_targets_are_the_shares_of_the_pixels():
    """Each image has one value of its own, so that the pixels alone say what the targets should be."""
    data = splits()
    settings = recipe(cutmix=1.0, cutmix_sampler="reverse", train_crop_mode="none", hflip=0.0, mean=[0.0], std=[1.0])
    label_of = {int(data.train.reader.read(i).getpixel((0, 0))[0]): label for i, label in enumerate(data.train.targets)}
    mixtures = 0
    for (batch,) in loader_of(settings, data):
        values = (255 * batch.images[:, 0]).round().int()
        for image, target in zip(values, batch.targets, strict=True):
            shares = torch.zeros(CLASSES)
            for value, count in zip(*torch.unique(image, return_counts=True), strict=True):
                shares[label_of[int(value)]] += count / 256
            torch.testing.assert_close(target, shares, rtol=0, atol=1e-6)
            mixtures += (shares > 0).sum() > 1
    assert mixtures > 10


def test_views_of_an_image_are_mixed_alike():
    batch = random_batch(views=3)
    mixing = mixing_of(mixup=1.0, cutmix=1.0)
    generator = mixing.generator(0)
    for _ in range(6):
        mix = mixing.draw(generator, batch.images.shape)
        together = mixing.apply(batch, mix)
        for view, mixed in zip(batch.views, together.views, strict=True):
            assert torch.equal(mixing.apply(batch._replace(views=(view,)), mix).images, mixed)


def test_a_batch_stays_as_it_was_and_its_memory_format_too():
    batch = random_batch()
    format_of = torch.channels_last
    kept = copy.deepcopy(batch)
    for way in ({"mixup": 1.0}, {"cutmix": 1.0}, {"cutmix": 1.0, "cutmix_sampler": "reverse"}):
        mixing = mixing_of(**way)
        generator = mixing.generator(0)
        for images in (batch.images, batch.images.contiguous(memory_format=format_of)):
            mix = mixing.draw(generator, images.shape)
            mixed = mixing.apply(batch._replace(views=(images,)), mix, random_batch(12, seed=1))
            assert mixed.images.stride() == images.stride()
    assert all(torch.equal(one, other) for one, other in zip(tensors(batch), tensors(kept), strict=True))


def test_a_share_of_one_is_no_mixing_and_a_share_of_zero_is_the_other_image():
    batch, order = random_batch(), torch.randperm(9)
    images, targets = batch.images, soft_targets(batch.targets, CLASSES, 0.1)
    for values in (images, targets):
        assert torch.equal(mixup(values, values[order], 1.0), values)
        assert torch.equal(mixup(values, values[order], 0.0), values[order])
    box, share = cutmix_box(1.0, (3, 5), 16, 16)
    assert share == 1
    assert torch.equal(paste(images, box.crop(images)[order], box), images)
    box, share = cutmix_box(0.0, (8, 8), 16, 16)
    assert (box, share) == (Box(0, 16, 0, 16), 0)
    assert torch.equal(paste(images, box.crop(images)[order], box), images[order])
    # Of a large alpha both images have half; of a small one nearly always one of them has all.
    halves, whole = (mixing_of(mixup=alpha) for alpha in (1e6, 1e-4))
    shares = [[m.draw(g, images.shape).share for _ in range(50)] for m in (halves, whole) for g in [m.generator(0)]]
    assert np.abs(np.array(shares[0]) - 0.5).max() < 0.01
    assert np.minimum(shares[1], 1 - np.array(shares[1])).max() < 0.01


# Against timm and torch


@pytest.mark.parametrize("cuts", [False, True])
@pytest.mark.parametrize(
    ("shape", "share", "smoothing"), [((16, 16), 0.9, 0.0), ((15, 22), 0.5, 0.1), ((15, 22), 0.13, 0.1)]
)
def test_a_batch_is_mixed_as_timm_does_it(monkeypatch, cuts, smoothing, share, shape):
    """timm's partner of an image is that at the same distance from the batch's end."""
    images, labels = torch.randn(8, 3, *shape), torch.randint(CLASSES, (8,))
    order = torch.arange(7, -1, -1)
    theirs = Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, num_classes=CLASSES, label_smoothing=smoothing)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (share, cuts))
    for seed in range(5):
        np.random.seed(seed)
        expected, expected_targets = theirs(images.clone(), labels)
        np.random.seed(seed)
        targets = soft_targets(labels, CLASSES, smoothing)
        if cuts:
            centre = np.random.randint(0, shape[0]), np.random.randint(0, shape[1])
            box, left = cutmix_box(share, centre, *shape)
            mixed = paste(images, box.crop(images)[order], box)
        else:
            mixed, left = mixup(images, images[order], share), share
        torch.testing.assert_close(mixed, expected)
        torch.testing.assert_close(mixup(targets, targets[order], left), expected_targets)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_smoothed_targets_give_the_losses_of_torch_and_timm(smoothing):
    logits, labels = torch.randn(9, CLASSES, dtype=torch.float64), torch.randint(CLASSES, (9,))
    targets = soft_targets(labels, CLASSES, smoothing)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(9))
    loss = adjusted_cross_entropy(logits, targets)
    close = dict(rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, label_smoothing=smoothing), **close)
    torch.testing.assert_close(loss, LabelSmoothingCrossEntropy(smoothing)(logits, labels), **close)
    torch.testing.assert_close(loss, SoftTargetCrossEntropy()(logits, targets.double()), **close)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets.double()), **close)
    by_class = torch.full((CLASSES,), smoothing)
    torch.testing.assert_close(loss, adjusted_cross_entropy(logits, labels, smoothing=by_class), **close)


# Distributions of the draws


def draws(mixing, count, height=32, width=32):
    generator = mixing.generator(0)
    return [mixing.draw(generator, torch.Size((4, 3, height, width))) for _ in range(count)]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_of_the_beta_distribution(alpha):
    shares = [mix.share for mix in draws(mixing_of(mixup=alpha), 3000)]
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_boxes_have_the_share_drawn_and_their_centres_are_uniform():
    mixes = draws(mixing_of(cutmix=1.0), 4000, 24, 32)
    for mix in mixes:
        top, bottom, left, right = mix.box
        assert 0 <= top <= bottom <= 24
        assert 0 <= left <= right <= 32
        assert mix.share == pytest.approx(1 - (bottom - top) * (right - left) / (24 * 32))
    # Of how often a pixel lies in a box: what a simulation of its own gives.
    covered = np.zeros((24, 32))
    for mix in mixes:
        covered[mix.box.top : mix.box.bottom, mix.box.left : mix.box.right] += 1
    rng, simulated = np.random.default_rng(0), np.zeros((24, 32))
    rows, columns = np.arange(24)[:, None], np.arange(32)[None]
    for _ in range(4000):
        side = np.sqrt(1 - rng.beta(1, 1))
        h, w, y, x = int(24 * side), int(32 * side), rng.integers(24), rng.integers(32)
        in_rows = (rows >= y - h // 2) & (rows < y - h // 2 + h)
        simulated += in_rows & (columns >= x - w // 2) & (columns < x - w // 2 + w)
    # Five standard deviations of a difference of two binomial shares.
    assert np.abs(covered - simulated).max() < 5 * np.sqrt(2 * 4000 * 0.25)
    assert covered.mean() == pytest.approx(simulated.mean(), rel=0.05)
    assert covered[12, 16] > 1.4 * covered[0, 0]
    middle = {mix.box for mix in mixes if mix.box.top > 0 and mix.box.bottom < 24}
    assert len(middle) > 500


@pytest.mark.parametrize(("height", "width"), [(16, 16), (15, 22)])
@pytest.mark.parametrize("share", [0.99, 0.75, 0.3])
def test_a_box_in_the_middle_has_the_area_asked_for(share, height, width):
    box, left = cutmix_box(share, (height // 2, width // 2), height, width)
    side = (1 - share) ** 0.5
    assert (box.bottom - box.top, box.right - box.left) == (int(height * side), int(width * side))
    assert left == pytest.approx(share, abs=2 / min(height, width))


@pytest.mark.parametrize(("prob", "switch"), [(0.5, 0.5), (0.8, 0.25), (1.0, 0.5)])
def test_as_many_batches_are_mixed_and_cut_as_the_keys_say(prob, switch):
    mixes = draws(mixing_of(mixup=1.0, cutmix=1.0, mixup_prob=prob, mixup_switch_prob=switch), 2000)
    mixed = [mix for mix in mixes if mix is not None]
    cut = sum(mix.box is not None for mix in mixed)
    assert abs(len(mixed) - 2000 * prob) <= 5 * (2000 * prob * (1 - prob)) ** 0.5
    assert abs(cut - len(mixed) * switch) <= 5 * (len(mixed) * switch * (1 - switch)) ** 0.5


def test_partners_are_permutations_of_the_batch():
    mixes = draws(mixing_of(mixup=1.0), 400)
    assert all(sorted(mix.order) == [0, 1, 2, 3] for mix in mixes)
    found = np.unique([mix.order for mix in mixes], axis=0, return_counts=True)
    assert len(found[1]) == 24
    assert stats.chisquare(found[1]).pvalue > 1e-3


@pytest.mark.parametrize("sampler", ["reverse", "balanced", "effective:0.99"])
def test_foregrounds_come_by_their_sampler_and_backgrounds_as_ever(sampler):
    """CMO (Park et al. 2022): pixels by class, over many epochs of mixing every batch."""
    data = splits()
    loader = loader_of(recipe(cutmix=1.0, cutmix_sampler=sampler), data)
    drawn, backgrounds, epochs = np.zeros(CLASSES), np.zeros(CLASSES), 60
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        drawn += np.bincount(np.concatenate([b.targets for b in loader.foregrounds]), minlength=CLASSES)
        for (batch,) in loader:
            backgrounds += np.bincount(data.train.targets[batch.index], minlength=CLASSES)
    assert backgrounds.tolist() == [epochs * n for n in COUNTS]
    n, share = drawn.sum(), class_probabilities(sampler, np.array(COUNTS), 0, 1)
    assert n == epochs * sum(COUNTS)
    assert (np.abs(drawn - n * share) < 5 * np.sqrt(n * share * (1 - share))).all()
    if sampler == "reverse":
        assert drawn.argmax() == CLASSES - 1


@pytest.mark.parametrize("loader", ["resident", "timm"])
def test_foregrounds_have_an_order_and_an_augmentation_of_their_own(loader):
    mixed = loader_of(recipe(cutmix=1.0, cutmix_sampler="instance", loader=loader))
    plain = {
        int(i): image for (b,) in loader_of(recipe(loader=loader)) for i, image in zip(b.index, b.images, strict=True)
    }
    foregrounds = {int(i): image for b in mixed.foregrounds for i, image in zip(b.index, b.images, strict=True)}
    assert sorted(foregrounds) == sorted(plain)
    assert list(foregrounds) != list(plain)
    assert sum(torch.equal(plain[i], foregrounds[i]) for i in plain) < len(plain) // 4


# When nothing is mixed


@pytest.mark.parametrize("keys", [{"mixup": 1.0}, {"cutmix": 1.0, "cutmix_sampler": "reverse"}])
def test_the_first_and_the_last_epochs_are_not_mixed(keys):
    settings = recipe(**keys, mixup_off_epochs=3, epochs=8)
    soft = []
    for epoch in range(8):
        targets = torch.cat([batch.targets for (batch,) in loader_of(settings, epoch=epoch)])
        assert targets.shape == (sum(COUNTS), CLASSES)
        soft.append(bool((targets.max(dim=1).values < 1).any()))
    assert soft == [False, False, False, True, True, False, False, False]


def test_epochs_and_batches_that_are_not_mixed_are_those_of_a_recipe_that_mixes_nothing():
    settings = recipe(mixup=1.0, mixup_prob=0.5, mixup_off_epochs=1, epochs=4)
    unmixed = {0: 0, 1: 0, 2: 0, 3: 0}
    for epoch in unmixed:
        plain = loader_of(recipe(), epoch=epoch)
        for (batch,), (before,) in zip(loader_of(settings, epoch=epoch), plain, strict=True):
            if torch.equal(batch.images, before.images):
                assert torch.equal(batch.targets, F.one_hot(before.targets, CLASSES).float())
                unmixed[epoch] += 1
    steps = len(loader_of(settings))
    assert unmixed[0] == unmixed[3] == steps
    assert 0 < unmixed[1] < steps
    assert 0 < unmixed[2] < steps


def test_smoothing_alone_changes_no_pixel():
    plain = loader_of(recipe())
    for (batch,), (before,) in zip(loader_of(recipe(smoothing=0.2)), plain, strict=True):
        assert torch.equal(batch.images, before.images)
        assert torch.equal(batch.targets, soft_targets(before.targets, CLASSES, 0.2))


# Draws are a function of (seed, epoch, rank, stage) alone


def mixes_of(settings, **keys):
    """What an epoch's first batches are mixed by, once it is seen that they are."""
    loader, plain = (loader_of(each, **keys) for each in (settings, settings.replace(**NO_MIXING)))
    generator, found = loader.mixing.generator(keys.get("epoch", 0)), []
    for (batch,), (before,) in list(zip(loader, plain, strict=True))[:4]:
        mix = loader.mixing.draw(generator, before.images.shape)
        if mix is None or mix.box is not None:
            outside = slice(None) if mix is None else (..., slice(0, mix.box.top), slice(None))
            assert torch.equal(batch.images[outside], before.images[outside])
        else:
            expected = loader.mixing.apply(before, mix)
            assert torch.equal(batch.images, expected.images)
            assert torch.equal(batch.targets, expected.targets)
        found.append(None if mix is None else (mix.share, mix.box, str(mix.order)))
    return found


@pytest.mark.parametrize("way", ["both", "cmo"])
def test_every_loader_mixes_alike_and_other_seeds_epochs_ranks_and_stages_otherwise(way):
    settings = recipe(**WAYS[way], train_crop_mode="none", hflip=0.0)
    first = mixes_of(settings)
    assert mixes_of(settings.replace(loader="timm")) == first
    assert mixes_of(settings, rank=0, world_size=2) == first
    others = [
        mixes_of(settings.replace(seed=1)),
        mixes_of(settings, epoch=1),
        mixes_of(settings.replace_previous(settings)),
        mixes_of(settings, rank=1, world_size=2),
    ]
    assert len({str(each) for each in (first, *others)}) == 5


@pytest.mark.parametrize("loader", ["resident", "timm"])
@pytest.mark.parametrize("way", WAYS)
def test_a_pass_repeats_itself_and_neither_reads_nor_moves_the_global_generators(way, loader):
    settings = recipe(**WAYS[way], loader=loader, train_crop_mode="none", hflip=0.0)
    first = [batch for (batch,) in loader_of(settings)]
    again = loader_of(settings)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(1234)
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    mixing, batch = again.mixing, random_batch()
    generator = mixing.generator(0)
    for _ in range(9):
        mix = mixing.draw(generator, batch.images.shape)
        if mix is not None:
            mixing.apply(batch, mix, random_batch())
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])
    assert before[2] == after[2]
    for one, (other,) in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def test_two_streams_are_mixed_each_within_itself_by_draws_of_its_own():
    settings = recipe(mixup=1.0, train_crop_mode="none", hflip=0.0)
    mixed = loader_of(settings, sampler="instance+reverse")
    plain = loader_of(settings.replace(mixup=0.0), sampler="instance+reverse")
    generators = [mixed.mixing.generator(0, stream) for stream in range(2)]
    for pair, before in zip(mixed, plain, strict=True):
        mixes = [mixed.mixing.draw(g, b.images.shape) for g, b in zip(generators, before, strict=True)]
        assert mixes[0].share != mixes[1].share
        for batch, own, mix in zip(pair, before, mixes, strict=True):
            assert torch.equal(batch.targets, mixed.mixing.apply(own, mix).targets)
            assert torch.equal(batch.images, mixed.mixing.apply(own, mix).images)


def test_broken_foregrounds_are_reported(tmp_path):
    for label in range(2):
        (tmp_path / "train" / str(label)).mkdir(parents=True)
        (tmp_path / "validation" / str(label)).mkdir(parents=True)
        for number in range(8):
            for split in ("train", "validation"):
                Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / split / str(label) / f"{number}.png")
    (tmp_path / "train" / "0" / "3.png").write_bytes(b"broken")
    keys = dict(dataset="folder", data_dir=str(tmp_path), loader="timm", cutmix=1.0, cutmix_sampler="balanced")
    settings = recipe(**keys)
    loader = loader_of(settings, open_data(settings))
    for epoch in range(5):
        loader.set_epoch(epoch)
        list(loader)
    assert [path.rpartition("/")[2] for path in loader.broken_images()] == ["3.png"]


# Inside a run


def test_foregrounds_of_a_class_without_images_are_refused():
    with pytest.raises(DataError, match="sampler 'reverse': no training images of class 4"):
        loader_of(recipe(cutmix=1.0, cutmix_sampler="reverse"), splits([5, 4, 3, 2, 0]))


DIGITS = dict(
    epochs=3, val_interval=3, warmup_epochs=1, imbalance_max=48, device="cpu", workers=0, checkpoint_seconds=0
)


def test_mbib_trains_on_mixed_digits_and_evaluates_on_labels(tmp_path):
    keys = {**DIGITS, "mixup": 1.0, "smoothing": 0.1, "output": str(tmp_path)}
    run = train(load_recipe(find_recipe("mbib_resnet20.digits"), keys), "mixed")
    losses = [row.losses["loss"] for row in read_history(tmp_path / "mixed")]
    assert losses == sorted(losses, reverse=True)
    assert set(run.record.result.heads) == {"prediction", "v1", "v2", "v3", "z"}
    written = yaml.safe_load((tmp_path / "mixed" / "recipe.yaml").read_text())
    assert (written["mixup"], written["smoothing"], written["cutmix_sampler"]) == (1.0, 0.1, None)


def mixed_steps(step, settings, epochs):
    """The losses of epochs of a small data set, and the shapes that the step has seen."""
    losses, shapes = [], set()
    for epoch in range(epochs):
        for batches in loader_of(settings, epoch=epoch):
            shapes.add(tuple((tensor.shape, tensor.dtype) for batch in batches for tensor in tensors(batch)))
            losses.append(step(batches)["loss"].item())
    return losses, shapes


@pytest.mark.parametrize("way", ["cmo", "both"])
def test_a_captured_step_sees_two_shapes_whatever_is_mixed(way):
    """The whole batch and the short last one; and it computes what the eager step computes, to the bit."""
    settings = recipe(
        **WAYS[way], mixup_off_epochs=1, epochs=WARM_UP_CALLS + 5, opt="momentum", opt_kwargs={"fused": True}
    )
    results = []
    for graphs in (None, EmulatedGraphs()):
        method = make("ce", counts=COUNTS)
        method.train()
        optimizer = create_optimizer(settings, method)
        round_learning_rates(optimizer)
        step = create_step(settings, method, optimizer, FULL, graphs)
        results.append(mixed_steps(step, settings, settings.epochs))
        assert graphs is None or graphs.captures == 1
    assert results[0] == results[1]
    assert len(results[0][1]) == 2


@pytest.mark.parametrize("name", ["mbib", "ldam_drw", "focal"])
def test_a_step_on_soft_targets_compiles_as_one_graph(name):
    torch._dynamo.reset()
    compiled = torch.compile(loss_parts, fullgraph=True, dynamic=False, backend="aot_eager")
    losses = []
    for compute in (loss_parts, compiled):
        method, batch = make(name), random_batch()
        method.train()
        soft = mixing_of(mixup=1.0, smoothing=0.1).soften(batch)
        parts = compute(method, (soft,), None)
        parts["loss"].backward()
        gradients = [parameter.grad.norm().item() for _, parameter in method.trainable_parameters()]
        losses.append([*(value.item() for value in parts.values()), *gradients])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-7)


def test_mixing_waits_for_no_device():
    batch, foregrounds = random_batch(), random_batch(12)
    for way in ({"mixup": 1.0, "cutmix": 1.0}, {"cutmix": 1.0, "cutmix_sampler": "reverse"}):
        mixing = mixing_of(**way)
        generator = mixing.generator(0)
        with NoWaiting():
            for _ in range(8):
                mix = mixing.draw(generator, batch.images.shape)
                mixing.apply(batch, mix, foregrounds if mix.order is None else None)
            mixing.soften(batch)


# What is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mixup": -0.1}, "recipe key 'mixup': expected at least 0, got -0.1"),
        ({"smoothing": 1.0}, "recipe key 'smoothing': expected less than 1, got 1"),
        ({"mixup": 1.0, "mixup_prob": 0.0}, "recipe key 'mixup_prob': expected more than 0, got 0"),
        ({"mixup": 1.0, "cutmix": 1.0, "mixup_switch_prob": 1.0}, "'mixup_switch_prob': expected less than 1, got 1"),
        ({"mixup_prob": 0.5}, "recipe key 'mixup_prob' has no effect without mixup or cutmix, and both are 0"),
        ({"smoothing": 0.1, "mixup_off_epochs": 3}, "'mixup_off_epochs' has no effect without mixup or cutmix"),
        ({"mixup": 1.0, "mixup_switch_prob": 0.7}, "'mixup_switch_prob' has no effect without both mixup and"),
        ({"cutmix_sampler": "reverse"}, "'cutmix_sampler' has no effect without CutMix, and cutmix is 0"),
        ({"mixup": 1.0, "cutmix_sampler": "reverse"}, "'cutmix_sampler' has no effect without CutMix"),
        ({"cutmix": 1.0, "cutmix_sampler": "revers"}, "unknown sampler 'revers': did you mean 'reverse'"),
        ({"cutmix": 1.0, "cutmix_sampler": "instance+reverse"}, "'cutmix_sampler': expected one sampler, got"),
        ({"mixup": 1.0, "mixup_off_epochs": 3, "epochs": 6}, "3 at either end leaves none of the 6 epochs to mix in"),
    ],
)  # fmt: skip
def test_keys_that_cannot_be_are_refused_by_name(keys, message):
    with pytest.raises(MbibError, match=message):
        recipe(**keys)


def test_a_method_that_needs_labels_or_two_streams_is_refused():
    class Any(Method):
        def head_loss(self, logits, targets):
            raise AssertionError("of a method that does not train")

    class NeedsLabels(Any):
        title = "Needs labels"

    class TwoStreams(Any):
        title, sampler, soft_targets = "Two streams", "instance+reverse", True

    register("needs_labels")(NeedsLabels)
    register("two_streams")(TwoStreams)
    try:
        recipe(method="needs_labels")
        for keys, named in (
            ({"mixup": 1.0}, "recipe key 'mixup'"),
            ({"smoothing": 0.1}, "recipe key 'smoothing'"),
            ({"mixup": 1.0, "cutmix": 0.5, "smoothing": 0.1}, "recipe keys 'mixup' and 'cutmix' and 'smoothing'"),
        ):
            said = "methods that take soft targets: .*; if it can, its class says so with soft_targets = True$"
            message = f"^{named}: targets become soft, .* method 'needs_labels' needs labels; {said}"
            with pytest.raises(MbibError, match=message):
                recipe(method="needs_labels", **keys)
        with pytest.raises(MbibError, match=r"methods that do: .*; if it can, .* with takes_class_weights = True$"):
            recipe(method="needs_labels", class_weights="balanced")
        assert recipe(method="two_streams", mixup=1.0, cutmix=1.0).soft_targets
        with pytest.raises(
            MbibError, match=r"'cutmix_sampler': method 'two_streams' takes two streams of images alread"
        ):
            recipe(method="two_streams", cutmix=1.0, cutmix_sampler="reverse")
    finally:
        METHODS.remove("needs_labels")
        METHODS.remove("two_streams")


def test_a_stage_that_trains_nothing_may_share_what_the_others_mix(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("mixup: 1.0\nmixup_off_epochs: 2\nstages: [{method: ce}, {method: tau_norm, epochs: 0}]\n")
    assert [stage.soft_targets for stage in load_recipe(path).chain()] == [True, True]


@pytest.mark.parametrize(("epochs", "off"), [(200, 3), (100, 2), (20, 1), (2, 0), (1, 0)])
def test_epochs_without_mixing_move_in_proportion(epochs, off):
    whole = recipe(mixup=1.0, mixup_off_epochs=3, epochs=200, sched="multistep")
    scaled = whole.replace(**in_proportion(whole, epochs))
    assert (scaled.epochs, scaled.mixup_off_epochs) == (epochs, off)
    assert "mixup_off_epochs" not in {key for key, value in in_proportion(recipe(), epochs).items() if value}


@pytest.mark.parametrize(("epochs", "decay"), [(200, 0.999), (400, 0.9995), (100, 0.998), (20, 0.99), (1, 0.8)])
def test_the_memory_of_the_moving_average_moves_in_proportion(epochs, decay):
    whole = recipe(model_ema=True, model_ema_decay=0.999, epochs=200)
    scaled = whole.replace(**in_proportion(whole, epochs))
    assert scaled.model_ema_decay == pytest.approx(decay)
    assert (1 - scaled.model_ema_decay) * epochs == pytest.approx((1 - 0.999) * 200)
    assert "model_ema_decay" not in in_proportion(whole.replace(model_ema=False), epochs)
