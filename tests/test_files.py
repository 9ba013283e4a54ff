"""The readers of files: what they read, and what they refuse."""

import json
import os

import pytest
import yaml

from mbib_timm.errors import CheckpointError, MbibError, nearest, unknown_name
from mbib_timm.files import LARGEST, parse_json, parse_yaml, read_content, read_text, write_bytes


def test_text_is_read_without_its_byte_order_mark(tmp_path):
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "list.txt").write_bytes(mark + "a/Füchse 1.png 0\n".encode())
        assert read_text(tmp_path / "list.txt", "list") == "a/Füchse 1.png 0\n"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda file: None, "No such file"),
        (lambda file: file.mkdir(), "Is a directory"),
        (lambda file: os.mkfifo(file), "it is not a regular file"),
        (lambda file: (file.touch(), os.truncate(file, LARGEST + 1)), "larger than 64 MB"),
        (lambda file: file.write_bytes(b"ab\xff"), "byte 2 is not UTF-8"),
        (lambda file: file.symlink_to(file), "symbolic links"),
        (lambda file: file.symlink_to("/dev/zero"), "it is not a regular file"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(make, said, tmp_path):
    make(tmp_path / "given.txt")
    with pytest.raises(CheckpointError, match=said) as caught:
        read_text(tmp_path / "given.txt", "checkpoint", CheckpointError)
    assert "\n" not in str(caught.value)
    assert "given.txt" in str(caught.value)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_names_that_no_file_has_are_refused(name, tmp_path):
    with pytest.raises(MbibError, match="cannot read the list"):
        read_content(tmp_path / name, "list")


@pytest.mark.parametrize(
    ("parse", "text", "said"),
    [
        (parse_json, '{"a": 1, "a": 2}', "key 'a' occurs twice"),
        (parse_json, '{"b": {"a": 1, "a": 1}}', "key 'a' occurs twice"),
        (parse_json, "[" * 100_000, "nested too deep"),
        (parse_json, b"\xff", "utf-8"),
        (parse_yaml, "a: 1\nb: 2\na: 3\n", "key 'a' occurs twice"),
        (parse_yaml, "a:\n  b: 2\n  b: 3\n", "line 3: key 'b' occurs twice"),
        (parse_yaml, "[" * 100_000, "nest"),
        (parse_yaml, "- " * 100_000, "nest"),
        (parse_yaml, "a: [", "line "),
        (parse_yaml, "a: !!python/object:os.system x", "tag"),
    ],
)
def test_damaged_text_is_a_value_error_of_one_line(parse, text, said):
    with pytest.raises(ValueError, match=said) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_sound_text_gives_what_the_libraries_give():
    content = {"a": [1, 2.5, None, True, "x"], "b": {"c": "no"}}
    assert parse_json(json.dumps(content)) == content
    assert parse_yaml(yaml.safe_dump(content)) == content


def test_yaml_as_text_leaves_names_and_numbers_alone():
    assert parse_yaml("no: 1\nnull: 0x10\n", as_text=True) == {"no": "1", "null": "0x10"}


@pytest.mark.skipif(os.name != "posix", reason="rights and links of POSIX")
def test_a_file_that_is_replaced_keeps_its_rights_and_a_link_stays_one(tmp_path):
    (tmp_path / "far").mkdir()
    real, link = tmp_path / "far" / "real.html", tmp_path / "link.html"
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real)
    write_bytes(link, b"new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o600
    (tmp_path / "gone").symlink_to(tmp_path / "far" / "made.html")
    write_bytes(tmp_path / "gone", b"made")
    assert (tmp_path / "far" / "made.html").read_text() == "made"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["far", "gone", "link.html", "made.html", "real.html"]


@pytest.mark.parametrize(
    ("name", "valid", "near"),
    [
        ("animal", ("snail", "horse"), []),
        ("--epoch", ("--epochs", "--warmup-epochs", "--sched"), ["--epochs"]),
        ("sdg", ("sgd", "adamw"), ["sgd"]),
        ("resnet33", ("resnet32", "resnet34", "vit"), ["resnet34", "resnet32"]),
        ("Bees", ("bee", "ant"), ["bee"]),
        ("", ("bee",), []),
    ],
)
def test_names_that_a_slip_may_stand_for(name, valid, near):
    assert nearest(name, valid) == near


def test_a_part_of_a_name_is_known():
    assert str(unknown_name("start", "means", ("class_means", "demeanour", "x"))).endswith("mean 'class_means'?")
    assert "choose from" in str(unknown_name("class", "ant", ("antelope", "elephant")))
