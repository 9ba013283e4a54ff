"""The two loaders, each under the same tests; broken images."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import arrays, class_folders, picture
from small_data import normalized_recipe as recipe

from mbib_timm.data import Split, create_loaders, open_data, open_split
from mbib_timm.data.decoding import decode_split
from mbib_timm.data.images import ArrayReader, ImageDataset
from mbib_timm.data.loaders import ResidentLoader, timm_eval_loader, timm_train_loader
from mbib_timm.data.samplers import ShardSampler, TrainingSampler
from mbib_timm.environment import World
from mbib_timm.errors import DataError

CPU = World(torch.device("cpu"))
SIZE = (3, 16, 16)


@pytest.fixture
def folder(tmp_path):
    """Class folders of 12, 5, 3 and 1 images."""
    return class_folders(tmp_path)


@pytest.fixture(params=["timm", "resident"])
def build(request):
    """Build a loader for training or for evaluation."""

    def sampler(split, settings, place, training):
        classes = int(split.targets.max()) + 1
        return TrainingSampler(split.targets, classes, settings, place) if training else None

    def resident(split, settings, size, place, training):
        images = decode_split(split, settings, size, place.device, training, replace_broken=training)
        return ResidentLoader(images, settings, size, place, sampler(split, settings, place, training))

    def timm(split, settings, size, place, training):
        if not training:
            return timm_eval_loader(split, settings, size, place)
        return timm_train_loader(split, settings, size, place, sampler(split, settings, place, training))

    return {"timm": timm, "resident": resident}[request.param]


def order(loader, epoch):
    loader.set_epoch(epoch)
    return torch.cat([batch.index for batch in loader]).tolist()


def numbered(count):
    images = np.zeros((count, 16, 16, 3), dtype=np.uint8)
    return Split(ArrayReader(images, "numbered"), np.arange(count))


def test_the_order_is_a_function_of_seed_and_epoch(build):
    first = build(numbered(50), recipe(batch_size=8), SIZE, CPU, training=True)
    second = build(numbered(50), recipe(batch_size=8), SIZE, CPU, training=True)
    assert order(first, 3) == order(second, 3)
    assert order(first, 3) != order(first, 4)
    assert order(first, 3) == order(second, 3)
    assert order(first, 3) != order(build(numbered(50), recipe(batch_size=8, seed=1), SIZE, CPU, training=True), 3)
    assert sorted(order(first, 0)) == list(range(50))


@pytest.mark.parametrize(("images", "batches"), [(16, [8, 8]), (20, [8, 8, 4]), (17, [8, 8]), (18, [8, 8, 2])])
def test_the_last_short_batch_is_kept_unless_it_is_a_single_image(build, images, batches):
    loader = build(numbered(images), recipe(batch_size=8), SIZE, CPU, training=True)
    assert [len(batch.targets) for batch in loader] == batches
    assert len(loader) == len(batches)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("images", [1, 10, 20, 41])
def test_evaluation_sees_every_image_exactly_once(build, images, world_size):
    seen = []
    for rank in range(world_size):
        seen += list(ShardSampler(images, rank, world_size))
    assert sorted(seen) == list(range(images))
    loaders = [
        build(numbered(images), recipe(), SIZE, World(CPU.device, r, world_size), training=False)
        for r in range(world_size)
    ]
    assert sorted(i for loader in loaders for batch in loader for i in batch.index.tolist()) == list(range(images))


def test_training_shards_cover_the_data(build):
    loaders = [
        build(numbered(40), recipe(batch_size=8), SIZE, World(CPU.device, rank, 2), training=True) for rank in (0, 1)
    ]
    assert sorted(order(loaders[0], 1) + order(loaders[1], 1)) == list(range(40))


def test_normalisation(build):
    split, images = arrays(4)
    settings = recipe(mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 0.2])
    batch = next(iter(build(split, settings, SIZE, CPU, training=False))).images
    expected = (images / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.25, 0.2])
    np.testing.assert_allclose(batch.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA"])
def test_other_colour_modes_become_rgb_or_grey(tmp_path, mode):
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(2):
            picture(i).convert(mode if mode != "LA" else "L").convert(mode).save(tmp_path / label / f"{i}.png")
    settings = recipe(dataset="folder", data_dir=str(tmp_path), val_fraction=0.5)
    for channels, loader in itertools.product((3, 1), ("timm", "resident")):
        settings = settings.replace(loader=loader, image_cache="none")
        loaders = create_loaders(open_data(settings), settings, (channels, 16, 16), CPU.device)
        for loader in (*loaders.train.streams, loaders.val):
            assert next(iter(loader)).images.shape == (2, channels, 16, 16)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image(build, folder, workers):
    (folder / "bee" / "1.png").write_bytes(b"not an image")
    (folder / "ant" / "3.png").write_bytes((folder / "ant" / "3.png").read_bytes()[:200])
    settings = recipe(dataset="folder", data_dir=str(folder), workers=workers, batch_size=4, image_cache="none")
    whole = open_split(settings.replace(val_fraction=0.01), "train")
    loader = build(whole, settings, SIZE, CPU, training=True)
    assert sum(len(batch.targets) for batch in loader) >= len(whole) - 1
    broken = {Path(path).relative_to(folder).as_posix() for path in loader.broken_images()}
    in_training = {Path(whole.reader.path(i)).relative_to(folder).as_posix() for i in whole.indices}
    assert broken == {"ant/3.png", "bee/1.png"} & in_training
    assert broken
    evaluation = build(whole, settings.replace(validation_batch_size=3), SIZE, CPU, training=False)
    seen = torch.cat([batch.index for batch in evaluation]).tolist()
    left_out = [i for i in range(len(whole)) if Path(whole.path(i)).relative_to(folder).as_posix() in broken]
    assert seen == sorted(set(range(len(whole))) - set(left_out)), "an evaluation leaves a broken image out"
    assert evaluation.broken_images() == [whole.path(i) for i in left_out]
    assert torch.cat([batch.targets for batch in evaluation]).tolist() == whole.targets[seen].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_of_broken_images_alone_is_no_batch(build, folder, workers):
    for i in range(5):
        (folder / "bee" / f"{i}.png").write_bytes(b"not an image")
    settings = recipe(dataset="folder", data_dir=str(folder), workers=workers, image_cache="none")
    split = open_split(settings, "all")
    bees = split.subset(np.flatnonzero(split.targets != 0))
    batches = list(build(bees, settings.replace(validation_batch_size=2), SIZE, CPU, training=False))
    assert torch.cat([batch.index for batch in batches]).tolist() == [5, 6, 7, 8]
    assert min(len(batch.targets) for batch in batches) > 0
    with pytest.raises(
        DataError, match=r"^none of the 5 images of split 'all' can be read; the last error: .*bee/4\.png: [^\n]*$"
    ):
        list(build(split.subset(np.flatnonzero(split.targets == 1)), settings, SIZE, CPU, training=False))


@pytest.mark.parametrize("seed", range(3))
def test_unreadable_images_are_found_before_the_split(folder, seed):
    """Whatever falls into the training part, counts and errors are the same."""
    (folder / "bee" / "1.png").write_bytes(b"not an image")
    (folder / "dog" / "0.png").write_bytes((folder / "ant" / "3.png").read_bytes()[:200])
    settings = recipe(dataset="folder", data_dir=str(folder), workers=0, subset_seed=seed)
    skipped = open_data(settings.replace(broken="skip"))
    assert skipped.class_names == ("ant", "bee", "cat"), "no class without an image that can be read"
    assert skipped.class_counts.tolist() == [10, 3, 2]
    assert len(skipped.train) + len(skipped.val) == 19
    unreadable = skipped.train.left_out["images that cannot be read"]
    assert [line.partition(": ")[0] for line in unreadable] == [
        str(folder / name) for name in ("bee/1.png", "dog/0.png")
    ]
    with pytest.raises(
        DataError,
        match=r"^images that cannot be read: 2; --broken skip leaves them out\n  .*bee/1\.png: .*\n  .*dog/0\.png: .*$",
    ):
        open_data(settings.replace(broken="stop"))
    assert len(open_data(settings).train) + len(open_data(settings).val) == 21


def test_timms_augmentation_differs_between_workers_and_epochs():
    split, _ = arrays(8)
    same = Split(split.reader, split.targets, np.zeros(8, dtype=int))
    settings = recipe(batch_size=4, workers=2)
    loader = timm_train_loader(same, settings, SIZE, CPU, TrainingSampler(same.targets, 4, settings, CPU))
    torch.manual_seed(0)
    batches = [batch.images for epoch in range(2) for batch in loader]
    assert len({image.numpy().tobytes() for images in batches for image in images}) > 8


# Images


def test_images_that_are_all_broken_are_an_error_in_training_too():
    class NoReader:
        def read(self, index):
            raise OSError(f"truncated\nat {index}")

        def path(self, index):
            return f"{index}.png"

    dataset = ImageDataset(Split(NoReader(), np.zeros(3, dtype=int)), "RGB", np.asarray, replace_broken=True)
    with pytest.raises(DataError, match=r"^none of the 3 images .*cannot read image 0\.png: truncated$"):
        dataset[1]
    assert dataset.broken() == ["0.png", "1.png", "2.png"]


def test_an_error_of_a_transform_is_no_broken_image():
    def fail(image):
        raise ZeroDivisionError

    split = Split(ArrayReader(np.zeros((2, 4, 4, 3), np.uint8), "x"), np.arange(2))
    with pytest.raises(ZeroDivisionError):
        ImageDataset(split, "RGB", fail, replace_broken=True)[0]
