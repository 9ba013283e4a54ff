"""Tables of images: every way to write the same one, and what is refused, with file and line."""

import csv
import gzip
import io

import pytest
from archive_images import assert_same, contents, png, tar_bytes, unpacked, write

from mbib_timm.data import open_data, open_split, summary
from mbib_timm.errors import DataError, MbibError
from mbib_timm.recipe import Recipe, load_recipe

LABELS = ["Bär", 'the "grey" fox', "a,b; c", "lynx lynx"]
ROWS = [(f"{label.split()[0].strip(',')}/{i}.png", label, f"site {i % 3}") for label in LABELS for i in range(6)]
CLASSES = ("a,b; c", "Bär", "lynx lynx", 'the "grey" fox')


@pytest.fixture
def images(tmp_path):
    return unpacked(tmp_path / "images", {path: png(i) for i, (path, *_) in enumerate(ROWS)})


def text_of(rows, separator=",", header=("path", "label", "group"), **options):
    out = io.StringIO()
    csv.writer(out, delimiter=separator, **options).writerows([header, *rows])
    return out.getvalue()


def table_of(file, content, encoding="utf-8"):
    return write(file, content.encode(encoding))


def recipe(file, **keys):
    return Recipe(**{"dataset": "table", "table": str(file), "workers": 0, "img_size": 16, **keys})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_however_a_csv_is_written(images, encoding, separator, line_end):
    file = table_of(images / "t.csv", text_of(ROWS, separator, lineterminator=line_end), encoding)
    split = open_split(recipe(file), "all")
    assert split.class_names == CLASSES
    assert [split.class_names[label] for label in split.targets] == [label for _, label, _ in ROWS]
    assert [split.path(i) for i in range(len(split))] == [str(images / path) for path, *_ in ROWS]
    assert not split.left_out


def test_paths_may_be_absolute_or_of_windows_and_begin_at_data_dir(images, tmp_path):
    ways = (str, lambda path: str(images / path), lambda path: path.replace("/", "\\"))
    rows = [(ways[i % 3](path), label) for i, (path, label, _) in enumerate(ROWS)]
    file = table_of(tmp_path / "elsewhere" / "t.tsv", text_of(rows, "\t", ("path", "label")))
    split = open_split(recipe(file, data_dir=str(images)), "all")
    assert contents(split) == contents(open_split(recipe(table_of(images / "t.csv", text_of(ROWS))), "all"))
    (images / "t.tsv").write_bytes(file.read_bytes())
    assert_same(open_split(recipe("t.tsv", data_dir=str(images)), "all"), split)


def test_absolute_and_relative_paths_of_an_image_are_one(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = dict(header=("path", "label", "split"))
    both = [(str(images / path), label, "train") for path, label, _ in ROWS]
    digests = set()
    for root in ("images", "./images/../images", str(images)):
        file = table_of(
            tmp_path / "t.csv", text_of([*both, *((path, label, "train") for path, label, _ in ROWS)], **keys)
        )
        split = open_split(recipe(file, data_dir=root), "train")
        assert len(split) == len(split.left_out["rows that repeat an image"]) == len(ROWS)
        table_of(file, text_of([*both, (ROWS[0][0], ROWS[0][1], "val")], **keys))
        with pytest.raises(DataError, match=r"t\.csv, line 26: .* is in split 'val' here, and in 'train' in "):
            open_data(recipe(file, data_dir=root))
        plain = open_data(recipe(table_of(file, text_of(ROWS)), data_dir=root))
        mixed = [(path if i % 2 else str(images / path), label, "") for i, (path, label, _) in enumerate(ROWS)]
        digests |= {plain.digest, open_data(recipe(table_of(file, text_of(mixed)), data_dir=root)).digest}
    assert len(digests) == 1


def test_a_table_and_folders_of_the_same_images_are_the_same_data(tmp_path):
    names = {f"{label}/{i}.png": png(10 * i) for label in ("c10", "c2", "Ant") for i in range(5)}
    root = unpacked(tmp_path / "data", names)
    folder = Recipe(dataset="folder", data_dir=str(root))
    rows = [(f"{label}/{i}.png", label) for label in ("Ant", "c2", "c10") for i in range(5)]
    file = table_of(tmp_path / "t.csv", text_of(rows, header=("path", "label")))
    for name in ("all", "train", "validation"):
        assert_same(open_split(recipe(file, data_dir=str(root)), name), open_split(folder, name))
    archive = write(tmp_path / "x.tar", tar_bytes(names))
    assert_same(open_split(recipe(file, data_dir=str(archive)), "all"), open_split(folder, "all"))
    packed = (archive, write(tmp_path / "x.tgz", gzip.compress(archive.read_bytes())))
    for place in (*packed, root):
        table_of(file, text_of([*rows, ("c2/99.png", "c2")], header=("path", "label")))
        split = open_split(recipe(file, data_dir=str(place)), "all")
        assert split.missing.startswith(
            f"{file}: of its 16 images, 1 cannot be found: c2/99.png; training replaces them"
        )
        skipped = open_split(recipe(file, data_dir=str(place), broken="skip"), "all")
        assert_same(skipped, open_split(folder, "all"))
        assert [*skipped.left_out] == ["images that cannot be read"]
        table_of(file, text_of([(f"x/{path}", label) for path, label in rows], header=("path", "label")))
        with pytest.raises(DataError, match=rf"of its 15 images, 15 cannot be found under {place}: x/Ant/0\.png, "):
            open_split(recipe(file, data_dir=str(place)), "all")


def test_columns_of_any_name_with_splits_and_groups(images):
    splits = ["train", "Training", "VAL", "train", "test", "train"]
    rows = [(i, label, path, splits[i % 6], site) for i, (path, label, site) in enumerate(ROWS)]
    file = table_of(images / "t.csv", text_of(rows, header=("id", "Art", "Datei", "Teil", "O\u0308rt")))
    keys = dict(path_column="Datei", label_column="Art", split_column="Teil")
    data = open_data(recipe(file, **keys, group_by="column", group_column="\u00d6rt", test_split="test"))
    assert data.class_counts.tolist() == [3] * 4, "a split of its own name comes before its synonyms"
    assert len(data.val) == len(data.test) == 4
    assert data.train.groups.tolist() == [site for i, (*_, site) in enumerate(ROWS) if splits[i % 6] == "train"]
    with pytest.raises(DataError, match="has no split 'extra'; it has test, train, training, val"):
        open_split(recipe(file, **keys), "extra")


def test_without_splits_groups_are_held_out(images):
    file = table_of(images / "t.csv", text_of(ROWS))
    data = open_data(recipe(file, group_by="column", val_fraction=0.3))
    assert len(set(data.val.groups)) == 1
    assert not set(data.val.groups) & set(data.train.groups)
    assert sorted({*data.val.groups, *data.train.groups}) == ["site 0", "site 1", "site 2"]
    assert data.class_counts.tolist() == [4] * 4


@pytest.mark.parametrize("splits", [False, True])
def test_groups_that_are_not_used_are_said(images, splits):
    rows = [(*row, "val" if i % 3 else "train") for i, row in enumerate(ROWS)]
    rows.append((ROWS[0][0], ROWS[0][1], "another site", "train"))  # the same image in another group
    file = table_of(images / "t.csv", text_of(rows, header=("path", "label", "group", "split" if splits else "part")))
    said = f"warning: {file}: its column 'group' is not used, and images count as independent; --group-by column"
    lines = summary(open_data(recipe(file)))
    assert sum(line.startswith(said) for line in lines) == 1
    assert sum("--group-by" in line for line in lines) == 1, "and nothing else advises it"
    table_of(file, text_of([(*row, "") for row in ROWS], header=("path", "label", "site", "group")))
    assert not open_data(recipe(file)).train.unused


def test_rows_that_are_left_out_are_named(images):
    (one, label, site), other, *rest = ROWS
    rows = [(one, label, site), (one, label, site), other, (other[0], "lynx lynx", other[2]), ("x.png", "", ""), *rest]
    file = table_of(images / "t.csv", text_of(rows) + "\n\n,,\n")
    split = open_split(recipe(file), "all")
    assert len(split) == len(ROWS) - 1
    assert split.left_out == {
        "rows without a class": (f"{file}, line 6",),
        "rows that repeat an image": (f"{file}, line 3",),
        "images of several classes": (f"{other[0]}: {other[1]}, lynx lynx",),
    }


def test_rows_of_a_split_that_nothing_asks_for_are_named(images):
    splits = ["train", "trian", "validation", "train", "test", "Zebra"]
    rows = [(path, label, splits[i % 6]) for i, (path, label, _) in enumerate(ROWS)]
    file = table_of(images / "t.csv", text_of(rows, header=("path", "label", "split")))
    places = tuple(f"{file}, line {i + 2}" for name in ("trian", "Zebra") for i, row in enumerate(rows) if name in row)
    said = "rows of splits that are not used, trian (did you mean train?), zebra"
    asked = recipe(file, val_split="val")
    assert open_split(asked, "train").left_out == {said: places}, "a split for testing is no slip"
    assert not open_split(asked, "val").left_out, "said once, of training"
    used = recipe(file, val_split="zebra")
    assert [why for why in open_split(used, "train").left_out if "zebra" in why] == []


def test_each_split_has_the_classes_of_its_own_rows(images):
    rows = [(path, label, "train" if i % 3 else "val") for i, (path, label, _) in enumerate(ROWS)]
    rows = [
        (path, "a junk", "exclude") if i == 1 else (path, label, split) for i, (path, label, split) in enumerate(rows)
    ]
    file = table_of(images / "t.csv", text_of(rows, header=("path", "label", "split")))
    data = open_data(recipe(file))
    assert data.class_names == CLASSES
    assert [*data.train.left_out] == ["rows of splits that are not used, exclude"]
    table_of(file, text_of([*rows[2:], (ROWS[1][0], "a junk", "val")], header=("path", "label", "split")))
    with pytest.raises(DataError, match="split 'validation' has 1 class not in training: 'a junk'"):
        open_data(recipe(file))


def test_groups_of_validation_alone_are_groups(images):
    rows = [
        (path, label, "val", site) if i % 3 else (path, label, "train", "")
        for i, (path, label, site) in enumerate(ROWS)
    ]
    file = table_of(images / "t.csv", text_of(rows, header=("path", "label", "split", "group")))
    assert "groups: 0 in training, 2 in evaluation; ungrouped: 8 in training, 0 in evaluation" in summary(
        open_data(recipe(file, group_by="column"))
    )


def test_parquet(images):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = dict(zip(("path", "label", "group"), map(list, zip(*ROWS, strict=True)), strict=True))
    columns["label"] = pyarrow.array(columns["label"]).dictionary_encode()
    columns["confidence"] = [0.5] * len(ROWS)
    parquet.write_table(pyarrow.table(columns), images / "t.parquet")
    expected = open_split(recipe(table_of(images / "t.csv", text_of(ROWS)), group_by="column"), "train")
    split = open_split(recipe(images / "t.parquet", group_by="column"), "train")
    assert_same(split, expected)
    assert split.groups.tolist() == expected.groups.tolist()
    # pandas makes numbers with gaps floating-point ones.
    numbers = {"path": [row[0] for row in ROWS], "label": [float(i % 3) for i in range(23)] + [None]}
    parquet.write_table(pyarrow.table(numbers), images / "n.parquet")
    split = open_split(recipe(images / "n.parquet"), "all")
    assert split.class_names == ("0", "1", "2")
    assert split.left_out == {"rows without a class": (f"{images / 'n.parquet'}, row 24",)}
    with pytest.raises(DataError, match=r"n\.parquet has no groups: there is no column 'group'"):
        open_split(recipe(images / "n.parquet", group_by="column"), "train")
    (images / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"^cannot read .*bad\.parquet: [^\n]*$"):
        open_split(recipe(images / "bad.parquet"), "all")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,label\nBär/0.png,\n", "lists no image with a class"),
        (
            "file,label\nBär/0.png,Bär\n",
            r"t\.csv has no column 'path'; its columns are: file, label\. --path-column names another",
        ),
        ("path,path,label\na,b,c\n", "has 2 columns 'path'"),
        (
            "path,label\nBär/0.png,Bär\n\nBär/1.png,Bär,more\n",
            r"t\.csv, line 4: expected 2 columns, got 3; a name with ','",
        ),
        ("path,label\nBär/0.png,Bär\n,Bär\n", r"t\.csv, line 3: column 'path' holds no path$"),
        # csv refuses it itself before Python 3.11.
        (
            "path,label\nBär/0.png,B\0\n",
            r"t\.csv, line 2: (column 'label' holds the control character '\\x00'|line contains NUL)",
        ),
        (f"path,label\nBär/0.png,{'B' * 5000}\n", r"t\.csv, line 2: column 'label' holds 5,000 characters; expected"),
        ('path,"label\nor",label\nBär/0.png,x,Bär\n', r"holds 1 class \(Bär\)"),
        ("path,label\n" + "x/{},B\n" * 3, r"images of several|of its 1 image, 1 cannot be found"),
        (
            "path,label\nBär/0.png,Bär\nBär/1.png,\n",
            r"1 class .*; left out of training: rows without a class: 1 ",
        ),
        ("path,label\nBär/0.png,Bär\nBär/1.png,Bär\n", r"holds 1 class \(Bär\); a classifier needs two or more"),
    ],
)
def test_bad_tables_are_refused_with_file_and_line(images, content, message):
    file = table_of(images / "t.csv", content)
    with pytest.raises(MbibError, match=message) as caught:
        open_data(recipe(file))
    assert "\n" not in str(caught.value)


def test_columns_of_parquet_that_hold_no_text(images):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    labels = {
        "list": [["a"]] * 4,
        "struct": [{"a": 1}] * 4,
        "binary": [b"a"] * 4,
        "dictionary": pyarrow.array([b"a"] * 4).dictionary_encode(),
    }
    for kind, label in labels.items():
        paths = [row[0] for row in ROWS[:4]]
        parquet.write_table(pyarrow.table({"path": paths, "label": label}), images / "t.parquet")
        with pytest.raises(DataError, match=r"t\.parquet: column 'label' holds \S+.*; expected text or numbers"):
            open_split(recipe(images / "t.parquet"), "all")
        assert kind
    data = pyarrow.array([b"\xff\xfe", b"a", b"b", b"c"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"path": paths, "label": data}), images / "t.parquet")
    with pytest.raises(DataError, match=r"^cannot read .*t\.parquet: 'utf-8' codec can't decode"):
        open_split(recipe(images / "t.parquet"), "all")
    whole = (images / "t.parquet").read_bytes()
    for damaged in (whole[:-20], whole[:100] + whole[-100:], b"PAR1" + b"\xff" * 500 + whole[-8:]):
        (images / "t.parquet").write_bytes(damaged)
        with pytest.raises(DataError, match=r"^cannot read .*t\.parquet: [^\n]*$"):
            open_split(recipe(images / "t.parquet"), "all")


def test_a_table_has_a_size(images, monkeypatch):
    monkeypatch.setattr("mbib_timm.data.image_tables.LARGEST_TABLE", 20)
    file = table_of(images / "t.csv", text_of(ROWS))
    for name in ("t.csv", "t.parquet"):
        with pytest.raises(DataError, match=r"the table .* is larger than 0 MB"):
            open_data(recipe(file.rename(images / name)))


def test_a_table_of_images_that_are_nowhere(images, tmp_path):
    file = table_of(images / "t.csv", text_of(ROWS))
    with pytest.raises(DataError, match=r"data_dir .*gone is neither a folder nor a supported archive"):
        open_data(recipe(file, data_dir=str(tmp_path / "gone")))


def test_other_data_take_the_table_along(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("dataset: table\ntable: t.csv\ngroup_by: column\ngroup_column: site\n")
    other = load_recipe(file, {"dataset": "folder", "data_dir": "photos"})
    assert (other.table, other.group_by, other.group_column) == (None, None, None)
    assert load_recipe(file, {"data_dir": "photos"}).table == "t.csv"
    file.write_text("dataset: folder\ndata_dir: photos\n")
    assert load_recipe(file, {"dataset": "table", "table": "t.csv"}).data_dir is None
