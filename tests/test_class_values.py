"""Numbers by class name: every format gives the same, and what is none is named."""

import re

import pytest

from mbib_timm.data.class_values import ClassValues, label_names, read_class_values
from mbib_timm.errors import DataError

NAMES = ("fox", "red deer", "Bär", "no")
SHARES = ClassValues("prior", "share", zero=True, missing="a class that does not occur has share 0")
WEIGHTS = ClassValues("class weights", "weight", zero=False, missing="every class needs one")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "5\n3\n0\n2\n"),
        ("p", "5 3. 0 2e0"),
        ("p.csv", "5\r\n3\r\n0\r\n2\r\n"),
        ("p.json", "[5, 3, 0, 2]"),
        ("p.yaml", "- 5\n- 3\n- 0\n- 2\n"),
        ("p", "- 5\n- 3\n- 0\n- 2\n"),
        ("p.csv", "class,share\nno,2\nfox,5\nBär,0\nred deer,3\n"),
        ("p.csv", "fox,5\n red deer ,3\nBär,0\nno,2\n"),
        ("p.tsv", "fox\t5\nred deer\t3\nBär\t0\nno\t2\n"),
        ("p.txt", "fox;5\nred deer;3\nBär;0\nno;2\n"),
        ("p.csv", '\ufeffname,count\n"fox",5\nred deer,3\n\nBär,0\nno,2\n'),
        ("p.csv", "share,site,class\n5,a,fox\n3,b,red deer\n0,c,Bär\n2,d,no\n"),
        ("p.csv", "fox,5\nred deer,3\nBa\u0308r,0\nno,2\n"),
        ("p.json", '{"fox": 5, "red deer": 3.0, "Bär": 0, "no": "2"}'),
        ("p.yaml", "no: 2\nBär: 0\nred deer: 3.0\nfox: 5e0\n"),
        ("p", "fox: 5\nred deer: 3\nBär: 0\nno: 2\n"),
    ],
)
def test_every_format_gives_the_same(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_class_values(tmp_path / name, NAMES, SHARES).tolist() == [5, 3, 0, 2]


def test_classes_that_are_numbers_are_no_header(tmp_path):
    (tmp_path / "p.csv").write_text("0,5\n1,3\n")
    assert read_class_values(tmp_path / "p.csv", ("0", "1"), SHARES).tolist() == [5, 3]
    (tmp_path / "p.tsv").write_text("1\t5\n0\t3\n")
    assert read_class_values(tmp_path / "p.tsv", ("0", "1"), SHARES).tolist() == [3, 5]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "p.csv",
            "fox,5\nreddeer,3\nBär,1\nno,1\n",
            "the prior FILE: unknown class 'reddeer': did you mean 'red deer'?",
        ),
        (
            "p.csv",
            "fox,5\nBär,1\n",
            "the prior FILE has no share for 'red deer', 'no'; a class that does not occur has",
        ),
        ("p.csv", "fox,5\nred deer,3\nBär,-1\nno,1\n", "FILE: class 'Bär': expected a number of at least 0, got '-1'"),
        ("p.csv", "fox,much\nred deer,3\nBär,1\nno,1\n", "class 'fox': expected a number of at least 0, got 'much'"),
        ("p.csv", "Fux,much\nred deer,3\nBär,1\nno,1\n", "(its first line, 'Fux,much', is taken for a header)"),
        ("p.csv", "fox,5\nred deer,3\nfox,1\nno,1\n", "FILE, line 3: class 'fox' is listed twice"),
        ("p.csv", "fox,5\nred deer,3\nBär,1\nBa\u0308r,1\n", "class 'Ba\u0308r' is listed twice"),
        ("p.csv", "class,share\nfox\n", "FILE, line 2: expected class and share, got 'fox'"),
        ("p.csv", "a,b,c\nfox,5,1\n", "expected two columns, or columns 'class' and 'share', got 'a, b, c'"),
        ("p.csv", 'fox,5\n"red deer,3\n', "FILE, line 2: unexpected end of data; see whether quotes are closed"),
        ("p.csv", "a" * 200_000 + ",1\n", "line 1: field larger than field limit"),
        ("p.csv", "", "FILE is empty; expected a share for each class: a CSV of class,share, or"),
        ("p.csv", b"B\xe4r,1\n", "cannot read the prior FILE: byte 1 is not UTF-8"),
        ("p.csv", None, "cannot read the prior FILE: No such file or directory"),
        ("p.txt", "1\n2\n", "the prior FILE: expected a share for each of the 4 classes, got 2"),
        ("p.txt", "1\n2\n3\n-4\n", "class 'no': expected a number of at least 0, got '-4'"),
        ("p.txt", "1\n2\n3\nnan\n", "class 'no': expected a number of at least 0, got 'nan'"),
        ("p.txt", "1\n2\n3\ninf\n", "class 'no': expected a number of at least 0, got 'inf'"),
        ("p.json", f"[1, 2, 3, 1{'0' * 400}]", "class 'no': expected a number of at least 0, got '1000"),
        ("p.json", f"[1, 2, 3, 1{'0' * 5000}]", "the prior FILE: "),
        ("p.txt", "", "FILE: expected a share for each class"),
        ("p.txt", "many foxes", "FILE: expected a share for each class"),
        ("p.json", "{", "FILE: Expecting property name"),
        ("p.json", "3", "FILE: expected a share for each of the 4 classes, got 1"),
        ("p.json", "[[1, 2], [3, 4], 5, 6]", "class 'fox': expected a number of at least 0, got a list"),
        ("p.json", '{"fox": true}', "class 'fox': expected a number of at least 0, got a bool"),
        ("p.json", '{"fox": {"share": 1}}', "class 'fox': expected a number of at least 0, got a dict"),
        ("p.json", '{"fox": 1, "fox": 2}', "FILE: key 'fox' occurs twice; expected a share for each class"),
        ("p.json", "[" * 100_000, "FILE: it is nested too deep"),
        ("p.yaml", "fox: 1\nred deer: 2\nBär: x\nno: 1\n", "class 'Bär': expected a number of at least 0, got 'x'"),
        ("p.yaml", "fox: [", "FILE: line 2: did not find expected node content; expected a share"),
        ("p.yaml", "!!null x: 1", "FILE: unknown class 'None'"),
        ("p.yaml", "a: &a [x, x]\nb: &b [*a, *a]\nfox: [*b, *b]", "unknown class 'a'"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    expected = message.replace("FILE", str(tmp_path / name))
    with pytest.raises(DataError, match=re.escape(expected)) as raised:
        read_class_values(tmp_path / name, NAMES, SHARES)
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) < 400


def test_the_same_is_said_of_other_numbers(tmp_path):
    file = tmp_path / "w.json"
    for text, message in (
        ('{"fox": 1, "red deer": 2}', "the class weights FILE has no weight for 'Bär', 'no'; every class needs one"),
        ('{"fox": 0}', "the class weights FILE: class 'fox': expected a number above 0, got '0'"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=re.escape(message.replace("FILE", str(file)))):
            read_class_values(file, NAMES, WEIGHTS)


def test_classes_of_one_name_are_told_apart(tmp_path):
    names = label_names(("crane", "fox", "crane"), 3)
    assert names == ("crane [0]", "fox", "crane [2]")
    assert label_names(None, 3) == ("0", "1", "2")
    (tmp_path / "p.csv").write_text("crane [2],1\ncrane [0],2\nfox,3\n")
    assert read_class_values(tmp_path / "p.csv", names, SHARES).tolist() == [2, 3, 1]
