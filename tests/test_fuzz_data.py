"""Lists, archives and tables that nobody has written: what is read is right, or one sentence says what is wrong."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from archive_images import png, tar_bytes, write
from hypothesis import given
from hypothesis import strategies as st

from mbib_timm.data.folders import open_archive
from mbib_timm.data.image_tables import Row, read_rows
from mbib_timm.data.lists import open_inaturalist, open_list
from mbib_timm.errors import MbibError

NAMES = ["ant/0.png", "ant/1.png", "bee/0.png", "bee/ä b.png"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with the images of `NAMES`."""
    folder = tmp_path_factory.mktemp("root")
    for seed, name in enumerate(NAMES):
        write(folder / name, png(seed))
    return folder


def read_or_refused(read):
    """Return what a function reads; None where it refuses, in one line."""
    try:
        return read()
    except MbibError as error:
        message = str(error)
    assert message.strip()
    assert "\n" not in message
    return None


# Pieces of which inputs are put together: what belongs there, and what does not.
names = st.one_of(
    st.sampled_from([*NAMES, *NAMES, "../x.png", "/etc/passwd", "ant/../../x", "C:\\x", "x" * 300, "n\0ul", "\x1b[2J"]),
    st.text(min_size=1, max_size=8),
)
labels = st.one_of(
    st.integers(0, 3).map(str),
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from(["", "1.5", "nan", "0x1", "1e3", "١", "0" * 30, "9" * 5000, "-0", "+1", "true"]),
)
# An image has one label, however often it is listed.
listed = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).flatmap(
    lambda images: st.fixed_dictionaries(dict.fromkeys(images, st.integers(0, 3).map(str))).map(
        lambda label_of: [(name, label_of[name]) for name in images]
    )
)


@given(
    sound=listed,
    odd=st.lists(st.tuples(names, labels), max_size=2),
    end=st.sampled_from(["\n", "\r\n", "\r", " \n"]),
    encoding=st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]),
)
def test_lists(root, sound, odd, end, encoding):
    text = "".join(f"{name} {label}{end}" for name, label in [*sound, *odd])
    file = write(root / "list.txt", text.encode(encoding, "replace"))
    split = read_or_refused(lambda: open_list(file.name, str(root), "train_list", None))
    if split is None:
        assert odd or end == "\r" or encoding not in ("utf-8", "utf-8-sig")
        return
    found = [(split.reader.name(i), label) for i, label in enumerate(split.targets.tolist())]
    assert found[: len(sound)] == [(name, int(label)) for name, label in sound] or encoding == "latin-1"
    for place in range(len(split)):
        assert Path(split.path(place)).resolve().is_relative_to(root.resolve())


@given(content=st.binary(max_size=200))
def test_bytes_are_no_list(root, content):
    file = write(root / "bytes.txt", content)
    split = read_or_refused(lambda: open_list(file.name, str(root), "train_list", None))
    assert split is None or len(split) > 0


plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.sampled_from(NAMES)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
FIELDS = [
    (key, place, field)
    for key, fields in (
        ("images", ("id", "file_name")),
        ("annotations", ("image_id", "category_id")),
        ("categories", ("id", "name")),
    )
    for place, field in [(None, None), *((place, field) for place in range(2) for field in fields)]
]


@given(where=st.sampled_from(FIELDS), value=plain)
def test_inaturalists_json(root, where, value):
    content = {
        "images": [{"id": 7, "file_name": NAMES[0]}, {"id": 3, "file_name": NAMES[2]}],
        "annotations": [{"image_id": 3, "category_id": 0}, {"image_id": 7, "category_id": 1}],
        "categories": [{"id": 0, "name": "Aves"}, {"id": 1, "name": "Fungi"}],
    }
    key, place, field = where
    if place is None:
        content[key] = value
    else:
        content[key][place][field] = value
    file = write(root / "inat.json", json.dumps(content).encode())
    split = read_or_refused(lambda: open_inaturalist(file.name, str(root), "train_list"))
    if split is not None:
        assert split.targets.tolist() == [1, 0]
        assert field in ("name", "file_name") or content[key][place][field] == value


PACKED = {name: png(seed) for seed, name in enumerate(("ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"))}
SOUND = tar_bytes(PACKED)
HEADERS = [place for place in range(0, len(SOUND), 512) if SOUND[place + 257 : place + 262] == b"ustar"]
# First byte and length of a header's fields: name, mode, size, time, type, link, magic, owner, device, prefix.
PARTS = [(0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (265, 32), (329, 16), (345, 155)]


def assert_within(tree, length):
    """Every image lies within the archive."""
    for start, size in tree.members.values():
        assert 0 <= start <= start + size <= length


def with_checksum(tar, header):
    total = sum(tar[header : header + 148]) + 8 * ord(" ") + sum(tar[header + 156 : header + 512])
    tar[header + 148 : header + 156] = b"%06o\0 " % total


@given(
    header=st.sampled_from(HEADERS),
    part=st.sampled_from(PARTS),
    data=st.binary(min_size=1, max_size=12),
    right=st.booleans(),
    zipped=st.booleans(),
)
def test_headers_of_archives(root, header, part, data, right, zipped):
    tar = bytearray(SOUND)
    data = data[: part[1]]
    tar[header + part[0] : header + part[0] + len(data)] = data
    if right:
        with_checksum(tar, header)
    archive = write(root / "x.tar", gzip.compress(tar, 1) if zipped else bytes(tar))
    tree = read_or_refused(lambda: open_archive(archive))
    if tree is None:
        return
    assert_within(tree, len(tar))
    for place, (name, content) in zip(HEADERS, PACKED.items(), strict=True):
        if place < header:
            start, size = tree.members[name]
            assert tar[start : start + size] == content


keys = st.sampled_from(["path", "size", "linkpath", "GNU.sparse.map", "GNU.sparse.major", "mtime", "hdrcharset"])
values = st.one_of(st.text(max_size=5), st.integers(-(2**70), 2**70).map(str))


@given(
    kind=st.sampled_from([b"x", b"g", b"L", b"K", b"S"]),
    body=st.one_of(st.binary(max_size=60), st.lists(st.tuples(keys, values), max_size=3)),
)
def test_extended_headers_of_archives(root, kind, body):
    if isinstance(body, list):
        records = [f" {key}={value}\n".encode() for key, value in body]
        body = b"".join(str(len(record) + 2).encode() + record for record in records)
    header = tarfile.TarInfo("extended")
    header.type, header.size = kind, len(body)
    archive = write(root / "x.tar", header.tobuf() + body + bytes(-len(body) % 512) + SOUND)
    tree = read_or_refused(lambda: open_archive(archive))
    if tree is not None:
        assert_within(tree, archive.stat().st_size)


@given(
    sound=listed,
    odd=st.lists(st.tuples(st.text(max_size=6), st.text(max_size=6)), max_size=2),
    separator=st.sampled_from(",;\t"),
    tail=st.sampled_from(["", '"', "\0", "\r", ",,,\n", '"\n"', "x"]),
)
def test_tables(root, sound, odd, separator, tail):
    rows = [(name, f"class {label}") for name, label in sound] + odd
    quoted = "".join(separator.join('"' + cell.replace('"', '""') + '"' for cell in row) + "\n" for row in rows)
    text = f"path{separator}label\n{quoted}{tail}"
    file = write(root / "t.csv", text.encode("utf-8", "replace"))
    found = read_or_refused(lambda: list(read_rows(file, {"path": "path", "label": "label"}, {})))
    if found is None:
        assert odd or tail
        return
    assert [(row.path, row.label) for row in found[: len(sound)]] == rows[: len(sound)]
    assert all(isinstance(row, Row) and row.path and "\0" not in row.path for row in found)


@pytest.fixture(scope="module")
def parquet_table():
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    content = io.BytesIO()
    parquet.write_table(pyarrow.table({"path": NAMES, "label": [1.0, None, 2.0, 3.0]}), content)
    return content.getvalue()


@given(cut=st.tuples(st.floats(0, 1), st.floats(0, 1)), filled=st.binary(max_size=20))
def test_damaged_parquet(root, parquet_table, cut, filled):
    first, last = sorted(int(part * len(parquet_table)) for part in cut)
    file = write(root / "t.parquet", parquet_table[:first] + filled + parquet_table[last:])
    found = read_or_refused(lambda: list(read_rows(file, {"path": "path", "label": "label"}, {})))
    assert found is None or all(isinstance(row, Row) for row in found)
