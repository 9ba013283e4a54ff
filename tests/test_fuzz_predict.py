"""Random input to predictions: what comes out is right, or one sentence says what is wrong."""

import csv
import io
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from mbib_timm.data.class_values import ClassValues, read_class_values
from mbib_timm.errors import MbibError
from mbib_timm.files import from_cell, printable, to_cell, to_csv
from mbib_timm.inference.inputs import find_images
from mbib_timm.inference.prediction_files import (
    Broken,
    CsvWriter,
    JsonlWriter,
    Prediction,
    RowColumns,
    read_continued,
    written,
)

NAMES = ("fox", "=red", "Bär", "no", "1")
SHARES = ClassValues("prior", "share", zero=True, missing="give it 0")
# Any characters, with more of those that mean something somewhere, and surrogates.
text = st.text(st.one_of(st.sampled_from("=+-@\t\r\n\x1b\"',;: {}[]\\\udcff\ud800"), st.characters()), max_size=12)


def one_sentence(error):
    assert str(error)
    assert len(str(error).splitlines()) == 1
    assert len(str(error)) < 1000


# Numbers of classes


numbers = st.one_of(st.floats(min_value=0, allow_nan=False, allow_infinity=False), st.integers(0, 10**6))


@given(st.lists(numbers, min_size=5, max_size=5), st.permutations(range(5)), st.sampled_from(["csv", "json", "yaml"]))
def test_class_values_come_back_in_any_order_and_format(tmp_path, values, order, kind):
    of = {NAMES[place]: values[place] for place in order}
    file = tmp_path / f"values.{kind}"
    if kind == "csv":
        file.write_bytes(to_csv(of.items(), exact=True))
    else:  # JSON is YAML
        file.write_text(json.dumps(of))
    assert read_class_values(file, NAMES, SHARES).tolist() == [float(value) for value in values]


@given(
    st.one_of(
        st.binary(max_size=60),
        st.lists(st.lists(st.one_of(st.sampled_from(NAMES), text, numbers.map(str)), max_size=3), max_size=7).map(
            lambda rows: to_csv(rows, exact=True)
        ),
        st.recursive(st.one_of(st.sampled_from(NAMES), st.booleans(), st.none(), numbers), st.lists, max_leaves=6).map(
            lambda value: json.dumps(value).encode()
        ),
        st.dictionaries(st.sampled_from(NAMES), st.one_of(numbers, st.booleans(), text), max_size=5).map(
            lambda value: json.dumps(value).encode()
        ),
    ),
    st.sampled_from(["v.csv", "v.json", "v.yaml", "v.txt", "v"]),
)
@example(b"[" * 10_000, "v.yaml")
@example(b"!!float x: 1", "v.yaml")
@example(b"1_0 1 1 1 1", "v")
def test_any_file_gives_finite_numbers_or_a_sentence(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    try:
        values = read_class_values(tmp_path / name, NAMES, SHARES)
    except MbibError as error:
        one_sentence(error)
    else:
        assert values.shape == (5,)
        assert (np.isfinite(values) & (values >= 0)).all()


# Names on standard input


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    Image.new("RGB", (4, 4)).save(folder / "1.png")
    os.mkfifo(folder / "pipe")
    return folder


@given(
    st.lists(
        st.one_of(
            st.sampled_from([b"1.png", b"pipe", b".", b"..", b"/dev/zero", b"1.png/x", b"x" * 300 + b".png"]),
            st.binary(max_size=20),
        ),
        max_size=8,
    )
)
def test_any_names_on_standard_input_are_images_or_cannot_be_read(place, lines):
    before, stdin = os.getcwd(), sys.stdin
    content = b"\n".join(lines)
    try:
        os.chdir(place)
        sys.stdin = io.TextIOWrapper(io.BytesIO(content))
        (found,) = find_images(["-"])
        for image in found.images:
            image.path.encode()
            try:
                image.reader.read(image.index).load()
            except (OSError, ValueError):
                continue
            assert image.path == "1.png" or os.path.samefile(os.fsencode(image.path), "1.png")
    except MbibError as error:
        one_sentence(printable(str(error)))
        assert b"1.png" not in [line.rstrip(b"\r") for line in content.split(b"\n")]
    else:
        given_names = [line.rstrip(b"\r") for line in content.split(b"\n")]
        assert len(found.images) == sum(bool(name) for name in given_names)
    finally:
        os.chdir(before)
        sys.stdin = stdin


def test_a_line_without_an_end_is_refused(monkeypatch):
    with open("/dev/zero", "rb") as endless:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False, buffer=endless))
        with pytest.raises(MbibError, match="standard input: line 1 is too long for the name of a file"):
            find_images(["-"])


# Files of predictions


items = st.one_of(
    st.builds(Broken, text, st.sampled_from(["none", "=1"]), st.none() | st.sampled_from(NAMES)),
    st.builds(
        lambda image, label, p: Prediction(image, [(label, p), ((label + 1) % 5, 1 - p)], NAMES[label], unsure=p < 0.7),
        text.filter(lambda name: not any("\ud800" <= char <= "\udfff" for char in name)),
        st.integers(0, 4),
        st.floats(0.5, 1),
    ),
)
COLUMNS = RowColumns(NAMES, 2, False)


def file_of(items, kind):
    out = io.StringIO()
    writer = CsvWriter(COLUMNS, out, continued=False) if kind == "csv" else JsonlWriter(NAMES, out)
    writer.write(items)
    return out.getvalue().encode()


@given(st.lists(items, max_size=5), st.sampled_from(["csv", "jsonl"]), st.floats(0, 1))
def test_a_file_that_is_cut_anywhere_gives_its_whole_lines(tmp_path, items, kind, share):
    content = file_of(items, kind)
    file = tmp_path / f"out.{kind}"
    cut = content[: int(share * len(content))]
    file.write_bytes(cut)
    found = read_continued(file, kind, COLUMNS)
    whole = items[: max(0, cut.count(b"\n") - (kind == "csv"))]
    assert found.length == cut.rfind(b"\n") + 1
    assert len(found.images) == len(whole)
    for image, item in zip(found.images, whole, strict=True):
        assert image.image == written(item.image, kind) or kind == "jsonl"
        assert (image.label or None) == item.label
        assert type(image) is type(item)
        if isinstance(item, Prediction):
            assert [label for label, _ in image.classes] == [label for label, _ in item.classes]
            assert [p for _, p in image.classes] == pytest.approx([p for _, p in item.classes], abs=1e-6)
            assert image.unsure == item.unsure


@given(
    st.lists(items, min_size=1, max_size=3),
    st.sampled_from(["csv", "jsonl"]),
    st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3)), min_size=1, max_size=3),
)
def test_a_damaged_file_of_predictions_is_read_or_refused(tmp_path, items, kind, damage):
    content = file_of(items, kind)
    for share, other in damage:
        place = int(share * len(content))
        content = content[:place] + other + content[place + len(other) :]
    file = tmp_path / f"out.{kind}"
    file.write_bytes(content)
    try:
        found = read_continued(file, kind, COLUMNS)
    except MbibError as error:
        one_sentence(printable(str(error)))
    else:
        assert found.length <= len(content)
        for image in found.images:
            if isinstance(image, Prediction):
                assert all(label in range(len(NAMES)) and 0 <= p <= 1 for label, p in image.classes)


@given(text)
def test_no_cell_is_a_formula_or_an_escape(value):
    (row,) = csv.reader(io.StringIO(to_csv([[value, 1.5]]).decode(), newline=""))
    cell = row[0]
    assert cell == to_cell(value)
    assert cell.isprintable() or set(cell) & set("\u200c\u200d")
    if cell[:1] in ("=", "+", "-", "@"):
        float(cell)
    assert to_cell(cell) in (cell, f"'{cell}")
    if not value.startswith("'"):
        assert from_cell(cell) == printable(value)
