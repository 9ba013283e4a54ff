"""Splits by group: whole groups, classes as scikit-learn's StratifiedGroupKFold shares them out, or better."""

import numpy as np
import pytest
from archive_images import png, tar_bytes, unpacked, write
from sklearn.model_selection import StratifiedGroupKFold

from mbib_timm.data import open_data, open_split, summary
from mbib_timm.data.groups import group_names, group_numbers, hold_out_groups, require_groups
from mbib_timm.errors import DataError, MbibError
from mbib_timm.evaluation.metrics import wilson_interval
from mbib_timm.recipe import Recipe, find_recipe, load_recipe
from mbib_timm.training import train

SHARE = 0.2


def long_tailed(seed, sites=40, classes=8):
    """Labels and sites of images: classes of 500 down to 3, sites that see few of the classes."""
    rng = np.random.RandomState(seed)
    sizes = np.geomspace(500, 3, classes).astype(int)
    targets = np.repeat(np.arange(classes), sizes)
    seen = [rng.choice(sites, max(2, sites // (2 + label)), replace=False) for label in range(classes)]
    groups = np.array([f"site {rng.choice(seen[label])}" for label in targets])
    return targets, groups


def chosen(targets, groups, seed=0, share=SHARE):
    return hold_out_groups(targets, groups, share, np.random.RandomState(seed))


def unevenness(targets, held_out):
    """Mean over the classes of how far from the share their held-out part is, relative to it and squared."""
    sizes, held = np.bincount(targets), np.bincount(targets[held_out], minlength=int(targets.max()) + 1)
    return float(((held / sizes / SHARE - 1) ** 2).mean())


@pytest.mark.parametrize("seed", range(6))
def test_groups_stay_whole_and_classes_are_shared_out_as_well_as_by_scikit_learn(seed):
    targets, groups = long_tailed(seed)
    held_out = chosen(targets, groups)
    assert not set(groups[held_out]) & set(groups[~held_out])
    assert set(targets[~held_out]) == set(targets), "no class is held out as a whole"
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(targets, targets, groups)
    theirs = [unevenness(targets, np.isin(np.arange(len(targets)), test)) for _, test in folds]
    assert unevenness(targets, held_out) <= 1.05 * min(theirs), "the best of five, but for rounding"
    assert 0.12 < held_out.mean() < 0.28
    in_two = {label for label in set(targets) if len(set(groups[targets == label])) > 1}
    assert set(targets[held_out]) == in_two


def test_the_seed_chooses():
    targets, groups = long_tailed(0)
    assert (chosen(targets, groups) == chosen(targets, groups)).all()
    assert (chosen(targets, groups) != chosen(targets, groups, seed=1)).any()


def test_a_class_of_one_group_stays_in_training_with_it():
    targets = np.array([0] * 20 + [1] * 20 + [2] * 5)
    groups = np.array([f"{i // 4}" for i in range(40)] + ["9"] * 5)
    held_out = chosen(targets, groups)
    assert not held_out[targets == 2].any()
    assert not held_out[groups == "9"].any()
    assert held_out[targets == 0].sum() == held_out[targets == 1].sum() == 4
    assert not chosen(np.array([0, 0, 1, 1]), np.array(["a", "a", "b", "b"])).any()


def test_images_without_a_group_stand_alone():
    targets = np.repeat([0, 1, 2], [50, 10, 2])
    held_out = chosen(targets, np.array([""] * 62))
    assert np.bincount(targets[held_out], minlength=3).tolist() == [10, 2, 1]
    assert group_numbers(np.array(["b", "", "a", "", "b"])).tolist() == [1, 2, 0, 3, 1]


def test_many_groups_are_quick_and_even():
    targets = np.random.RandomState(0).randint(0, 300, 60_000)
    groups = (np.arange(60_000) // 3).astype(str)
    assert unevenness(targets, chosen(targets, groups)) < 0.001


@pytest.mark.parametrize(
    ("group_by", "expected"),
    [
        ("folder:1", ["site A", "site A", "", "site B"]),
        ("folder:2", ["", "day 1", "", ""]),
        (r"pattern:(\d{4})-", ["2024", "2024", "2025", ""]),
        (r"pattern:^[^/]+/(?:site )?([^/]+)/", ["A", "A", "", "B"]),
    ],
)
def test_groups_are_found_in_paths(group_by, expected):
    names = ["fox/site A/2024-1.jpg", "fox/site A/day 1/2024-2.jpg", "hare/2025-1.jpg", "site B/x.jpg"]
    labels = ["fox", "fox", "hare", "lynx"]
    if group_by.startswith("pattern:^"):
        names[3] = "lynx/B/x.jpg"
    assert group_names(group_by, names, labels).tolist() == expected


def test_a_group_that_no_image_has():
    groups = group_names("folder:3", ["fox/1.jpg"], ["fox"])
    assert groups.tolist() == [""]
    recipe = Recipe(dataset="folder", group_by="folder:3")
    with pytest.raises(DataError, match=r"folder:3 gives no image a group, such as fox/1\.jpg"):
        require_groups(recipe, groups, "fox/1.jpg")


BURSTS = {
    f"{label}/site {site}/{burst}-{i}.png": png(burst)
    for label, sites in {"fox": "ABCDE", "hare": "BCDEF"}.items()
    for site in sites
    for burst in range(2)
    for i in range(3)
} | {f"lynx/site A/{i}.png": png(i) for i in range(4)}


def test_folders_and_archives_are_split_by_group(tmp_path):
    for place in (unpacked(tmp_path / "data", BURSTS), write(tmp_path / "x.tar", tar_bytes(BURSTS))):
        recipe = Recipe(dataset="folder", data_dir=str(place), group_by="folder:1", holdout=0.25)
        data = open_data(recipe)
        parts = {"train": data.train, "val": data.val, "held out": data.held_out}
        sites = {name: set(part.groups) for name, part in parts.items()}
        assert not sites["train"] & sites["val"]
        assert not sites["held out"] & (sites["train"] | sites["val"])
        assert "site A" in sites["train"], "the only site of a class"
        assert set.union(*sites.values()) == {f"site {site}" for site in "ABCDEF"}
        assert (data.val.targets == 2).sum() == 0
        for part in parts.values():
            found = [part.path(i).split("/")[-2] for i in range(len(part))]
            assert found == part.groups.tolist()
        lines = summary(data)
        assert f"groups: {len(sites['train'])} in training, {len(sites['val'])} in evaluation" in lines
        assert "classes without an evaluation image: 1 (lynx)" in lines
        assert any("about 20 % of each class, drawn with seed 0, in whole groups by folder:1" in line for line in lines)


def test_a_class_whose_name_a_mac_has_decomposed_is_no_group(tmp_path):
    entries = {f"{label}/site {i % 5}/{i}.png": png(i) for label in ("Da\u0308chs", "Eule") for i in range(25)}
    for place in (unpacked(tmp_path / "data", entries), write(tmp_path / "x.tar", tar_bytes(entries))):
        data = open_data(Recipe(dataset="folder", data_dir=str(place), group_by="folder:1"))
        assert set(data.train.groups) | set(data.val.groups) == {f"site {i}" for i in range(5)}
        assert np.bincount(data.val.targets).tolist() == [5, 5]
    rows = [f"{name},{name.split('/')[0]}" for name in entries]
    table = write(tmp_path / "data" / "t.csv", "\n".join(["path,label", *rows]).encode())
    data = open_data(Recipe(dataset="table", table=str(table), group_by="folder:1"))
    assert np.bincount(data.val.targets).tolist() == [5, 5]


def test_all_intervals_of_a_run_count_a_group_as_one_image(tmp_path):
    keys = dict(data_dir=str(unpacked(tmp_path / "data", BURSTS)), group_by="folder:1", output=str(tmp_path / "runs"))
    overrides = dict(
        keys, dataset="folder", imbalance="none", model_ema=True, epochs=1, warmup_epochs=0, device="cpu", workers=0
    )
    recipe = load_recipe(find_recipe("mbib_resnet20.digits"), overrides)
    sites = len(set(open_data(recipe).val.groups))
    record = train(recipe, "own").record
    for evaluation in (record.result, record.raw, record.best):
        for head, metrics in evaluation.heads.items():
            assert metrics.intervals["top1"] == pytest.approx(wilson_interval(metrics.top1 / 100 * sites, sites)), head


def test_groups_are_needed_only_where_something_is_held_out(tmp_path):
    flat = {f"{label}/{i}.png": png(i) for label in ("fox", "hare") for i in range(3)}
    plain = Recipe(dataset="folder", data_dir=str(unpacked(tmp_path / "flat", flat)), group_by="folder:1")
    assert len(open_split(plain, "all")) == 6
    with pytest.raises(DataError, match=r"'group_by': folder:1 gives no image a group, such as .*flat/fox/0\.png"):
        open_split(plain, "validation")
    unpacked(
        tmp_path / "splits",
        {f"{split}/{name}": content for split in ("train", "val") for name, content in flat.items()},
    )
    own = plain.replace(data_dir=str(tmp_path / "splits"))
    assert len(open_split(own, "val")) == 6
    with pytest.raises(DataError, match="folder:1 gives no image a group"):
        open_data(own)
    rows = [f"{name},{name.split('/')[0]}" for name in flat]
    table = write(tmp_path / "flat" / "t.csv", "\n".join(["path,label", *rows]).encode())
    listed = Recipe(dataset="table", table=str(table), group_by="column", group_column="site")
    assert len(open_split(listed, "all")) == 6
    with pytest.raises(DataError, match=r"t\.csv has no groups: there is no column 'site', or nothing in it"):
        open_data(listed)


def test_images_without_a_group_are_counted(tmp_path):
    root = unpacked(tmp_path / "data", {**BURSTS, "fox/alone.png": png(3)})
    lines = summary(open_data(Recipe(dataset="folder", data_dir=str(root), group_by="folder:1")))
    (line,) = [line for line in lines if line.startswith("groups: ")]
    assert line.endswith(("; ungrouped: 1 in training, 0 in evaluation", "; ungrouped: 0 in training, 1 in evaluation"))


def test_groups_on_both_sides_are_said(tmp_path):
    """In splits of the data's own, and in what a long-tailed subset leaves out, nothing keeps groups whole."""
    names = {f"{label}/site {site}/{i}.png": png(i) for label in ("fox", "hare") for site in "AB" for i in range(3)}
    own = {f"train/{name}": image for name, image in names.items()} | {"train/fox/alone.png": png(1)}
    own |= {f"val/{name}": image for name, image in names.items() if "fox/site B" not in name}
    own |= {"val/fox/site C/0.png": png(0), "val/fox/alone.png": png(1)}
    recipe = Recipe(dataset="folder", data_dir=str(unpacked(tmp_path / "own", own)), group_by="folder:1")
    assert "warning: split 'validation': 9 of its 11 images belong to groups that are trained on" in summary(
        open_data(recipe)
    )
    with pytest.raises(MbibError, match="'val_fraction' has no effect: the data have splits of their own"):
        open_data(recipe.replace(val_fraction=0.5))
    tail = Recipe(
        dataset="folder", data_dir=str(tmp_path / "own" / "train"), val_split="left_out", imbalance="exp",
        imbalance_factor=3.0, imbalance_max=3,
    )  # fmt: skip
    assert "--group-by" not in "".join(summary(open_data(tail))), "which does not help there"
    assert open_data(tail.replace(group_by="folder:1")).shared[0].endswith(" belong to groups that are trained on")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"group_by": "folder:0"}, "expected column, folder:N with N from 1, or pattern:REGEX, got 'folder:0'"),
        ({"group_by": "site"}, "expected column, folder:N"),
        ({"group_by": "pattern:("}, "'\\(' is not a regular expression: "),
        ({"group_by": "pattern:site"}, "'site' has no group in parentheses"),
        ({"group_by": "column"}, "'group_by' has no effect without dataset: table, whose column"),
        ({"group_column": "site"}, "'group_column' has no effect without dataset: table"),
        ({"dataset": "table", "table": "x.csv", "group_column": "site"}, "no effect without group_by: column"),
        ({"dataset": "digits", "group_by": "folder:1"}, "'group_by' has no effect without dataset: folder or table"),
        ({"dataset": "table"}, "'table': dataset: table needs the CSV or Parquet file"),
        ({"table": "x.csv"}, "'table' has no effect without dataset: table"),
    ],
)
def test_keys_without_sense_are_refused_with_the_recipe(keys, message):
    with pytest.raises(MbibError, match=message):
        Recipe(**{"dataset": "folder", **keys})
