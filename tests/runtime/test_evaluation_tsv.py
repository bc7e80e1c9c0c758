"""Files of questions: read as the csv module reads them, refused line by line where hostile."""

from __future__ import annotations

import csv
import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lorgnette.errors import DatasetError
from lorgnette.runtime.evaluation import records, tsv
from lorgnette.runtime.evaluation.literals import parse_texts, split_pictures
from lorgnette.runtime.evaluation.records import RecordReader
from lorgnette.runtime.evaluation.tsv import BadRow, Dataset, Row
from tests.runtime.evaluation_support import base64_of, encoded_picture, png, row, write_tsv
from tests.runtime.support import picture

HEADER = b"index\timage\tquestion\tanswer\n"
CELLS = st.text('ab\t"\n\r é', max_size=6)


def read_all(data: bytes) -> list[list[bytes]]:
    reader = RecordReader(io.BytesIO(data))
    found = []
    while record := reader.read():
        found.append(record.cells)
    assert reader.offset == len(data)
    return found


@given(
    st.lists(st.lists(CELLS, min_size=1, max_size=4), max_size=5),
    st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_what_the_csv_module_writes_is_read_back(
    table: list[list[str]], quoting: int, end: str
) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter="\t", quoting=quoting, lineterminator=end).writerows(table)  # type: ignore[arg-type]
    # Before 3.13 the module leaves a lone carriage return unquoted, and cannot read it back itself.
    text.seek(0)
    assume(list(csv.reader(text, delimiter="\t")) == table)
    assert [[cell.decode() for cell in cells] for cells in read_all(text.getvalue().encode())] == (
        table
    )


@given(st.text('ab\t"\n', max_size=24))
@example('a"b"\t"c"d"e\n')
@example('""\n\n"')
@example('a\n""')
def test_anything_is_split_as_the_csv_module_splits_it(text: str) -> None:
    data = text.encode()
    # A last line tells whether it is one of its own, or within quotes that never close.
    *wanted, last = csv.reader(io.StringIO(f"{text}\n\x01"), delimiter="\t")
    if last != ["\x01"]:
        with pytest.raises(DatasetError, match="a quoted cell is not closed"):
            read_all(data)
        return
    got = [[cell.decode() for cell in cells] for cells in read_all(data)]
    assert got == [cells for cells in wanted if cells]


def test_records_know_where_they_stand() -> None:
    data = b'a\tb\n\n"c\nd"\te\r\nf\tg'
    reader = RecordReader(io.BytesIO(data))
    found = []
    while record := reader.read():
        found.append((record.line, data[record.offset : record.offset + 2], record.cells))
    assert found == [
        (1, b"a\t", [b"a", b"b"]),
        (3, b'"c', [b"c\nd", b"e"]),
        (5, b"f\t", [b"f", b"g"]),
    ]


def test_the_digest_of_a_record_is_that_of_its_bytes() -> None:
    one, other = (RecordReader(io.BytesIO(data)) for data in (b'"a"\tb\n', b"a\tb\n"))
    first, second = one.read(), other.read()
    assert first is not None
    assert second is not None
    assert first.cells == second.cells
    assert first.digest != second.digest


def rows_of(path: Path) -> list[Row | BadRow]:
    with Dataset(path) as dataset:
        return list(dataset.rows())


def only_reason(path: Path) -> str:
    (bad,) = rows_of(path)
    assert isinstance(bad, BadRow)
    assert "\n" not in bad.reason
    return bad.reason


@pytest.mark.parametrize("quote_all", [True, False])
def test_a_row_holds_what_was_written(tmp_path: Path, quote_all: bool) -> None:
    cells = row(
        7,
        question='Say "what",\n\tplease?',
        hint="Look.",
        answer="B",
        A="None",
        B="NA",
        C="",
        D="déjà vu",
        category="x",
        split="val",
        extra="ignored",
    )
    (got,) = rows_of(write_tsv(tmp_path / "a.tsv", [cells], quote_all=quote_all))
    assert isinstance(got, Row)
    assert got.index == "7"
    assert got.question == cells["question"]
    assert got.hint == "Look."
    assert got.options == {"A": "None", "B": "NA", "D": "déjà vu"}
    assert got.groups == {"category": "x", "split": "val"}
    assert got.line == 2


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    plain = write_tsv(tmp_path / "plain.tsv", [row(1), row(2)])
    windows = tmp_path / "windows.tsv"
    windows.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n"))
    wanted, got = rows_of(plain), rows_of(windows)
    assert [(one.index, one.line) for one in got] == [(one.index, one.line) for one in wanted]
    assert all(isinstance(one, Row) for one in got)


def pictures_of(path: Path) -> list[list[bytes] | str]:
    """The pictures of every row, or why there are none."""
    found: list[list[bytes] | str] = []
    with Dataset(path) as dataset:
        for one in dataset.rows():
            assert isinstance(one, Row)
            try:
                found.append(dataset.pictures(one))
            except DatasetError as error:
                found.append(str(error))
    return found


def test_pictures_come_as_cells_as_lists_and_by_reference(tmp_path: Path) -> None:
    one, two = png(picture(20, 30, 1)), png(picture(30, 20, 2))
    a, b = base64_of(one), base64_of(two)
    rows = [
        row("x", image=a),
        row("y", image=str([a, b])),
        row("z", image=f'["{b}"]'),
        row(4, image="x"),
        row(5, image="y"),
        row(6, image="x"),
        row(7, image="\n".join(a[i : i + 76] for i in range(0, len(a), 76))),
    ]
    got = pictures_of(write_tsv(tmp_path / "a.tsv", rows))
    assert got == [[one], [one, two], [two], [one], [one, two], [one], [one]]


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("1", "reference to itself"),
        ("3", "reference to no row"),
        ("99", "reference to no row"),
        ("", "no picture"),
        ("2", None),
        ("!" * 100, "no base64"),
        (encoded_picture()[:-3], "no base64"),
        ("[" * 5000 + "]" * 5000, "a list of pictures cannot be read"),
        ("[]", "a list of pictures cannot be read"),
        ("['a', b]", "a list of pictures cannot be read"),
        (str(["QUJD"] * 65), "too many pictures"),
        (str(["QUJD"] * 64), None),
        ("['']", "empty picture"),
    ],
)
def test_bad_pictures_are_told_in_a_line(tmp_path: Path, image: str, said: str | None) -> None:
    rows = [row(2), row(1, image=image), row(3)]
    got = pictures_of(write_tsv(tmp_path / "a.tsv", rows))[1]
    if said is None:
        assert isinstance(got, list)
    else:
        assert said in got
        assert "\n" not in got


def test_a_reference_to_a_reference_is_refused(tmp_path: Path) -> None:
    rows = [row(1), row(2, image="1"), row(3, image="2")]
    got = pictures_of(write_tsv(tmp_path / "a.tsv", rows))
    assert "a row without one" in got[2]


def test_a_reference_may_name_a_row_that_is_bad_otherwise(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", [row(1, question=""), row(2, image="1")])
    with Dataset(path) as dataset:
        bad, good = dataset.rows()
        assert isinstance(bad, BadRow)
        assert isinstance(good, Row)
        assert dataset.pictures(good) == [png(picture(24, 32))]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"1\tQUJD\twhat\n", "another number of cells than the header: got 3, wanted 4"),
        (b"1\tQUJD\twhat\tis\tit\n", "got 5, wanted 4"),
        (b"\t" * 100_000 + b"\n", "got 256 or more"),
        (b"\tQUJD\twhat\tit\n", "no usable index"),
        (b"1" * 201 + b"\tQUJD\twhat\tit\n", "no usable index"),
        (b"1\tQUJD\t \tit\n", "no question"),
        (b"1\tQUJD\twh\0t\tit\n", "'question' holds a NUL byte"),
        (b"1\tQUJD\twh\xfft\tit\n", "'question' is not UTF-8"),
        (b"\xff\tQUJD\twhat\tit\n", "'index' is not UTF-8"),
        (b"1\tQUJD\twhat\t" + b"x" * ((1 << 20) + 1) + b"\n", "'answer' is too long"),
        (b'1\tQUJD\t"what\tit\n2\tQUJD\twhat\tit\n', "a quoted cell is not closed"),
    ],
)
def test_a_broken_row_is_named_and_told_in_a_line(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(HEADER + line)
    assert said in only_reason(path)


def test_rows_behind_a_broken_one_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(HEADER + b"1\tQUJD\n2\tQUJD\twhat\tit\n2\tQUJD\twhat\tit\n3\tQUJD\twhat\tit\n")
    first, second, third, fourth = rows_of(path)
    assert (first.line, second.index, third.index, fourth.index) == (2, "2", "2", "3")
    assert isinstance(third, BadRow)
    assert "stands at an earlier row too" in third.reason
    assert isinstance(fourth, Row)


def test_a_record_without_end_ends_the_file_without_filling_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1 << 20)
    path = tmp_path / "a.tsv"
    path.write_bytes(HEADER + b"1\tQUJD\twhat\tit\n" + b"x" * (40 << 20) + b"\n3\tQUJD\twhat\tit\n")
    tracemalloc.start()
    with Dataset(path) as dataset:
        good, bad = dataset.rows()
        assert dataset.is_cut
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(good, Row)
    assert isinstance(bad, BadRow)
    assert "longer than 1048576 bytes" in bad.reason
    assert peak < 8 << 20


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    large = "QUJD" * (1 << 18)
    path = write_tsv(tmp_path / "a.tsv", [row(n, image=large) for n in range(40)])
    assert path.stat().st_size > 40 << 20
    tracemalloc.start()
    with Dataset(path) as dataset:
        total = sum(len(dataset.pictures(one)[0]) for one in dataset.rows() if isinstance(one, Row))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 40 * (3 << 18)
    assert peak < 10 << 20


def test_more_rows_than_can_be_remembered_end_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tsv, "MAX_ROWS", 2)
    got = rows_of(write_tsv(tmp_path / "a.tsv", [row(n) for n in range(5)]))
    assert [type(one) for one in got] == [Row, Row, BadRow]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the file is empty"),
        (b"\n\n", "the file is empty"),
        (b"index\tquestion\tanswer\n", "wanted image"),
        (b"index\timage_path\tquestion\tanswer\n", "write the pictures into the file"),
        (b"index,image,question,answer\n", "parted by tabs"),
        (b"index\timage\tquestion\n", "cannot be scored"),
        (b"index\timage\tquestion\tanswer\tindex\n", "stands there twice"),
        (b"index\timage\tquestion\tanswer\t\xff\n", "the header is not UTF-8"),
        ("index\timage".encode("utf-16"), "UTF-16"),
        (b'"index\timage', "the header cannot be read"),
        (b"\t".join(b"%d" % n for n in range(1000)), "too many columns"),
    ],
)
def test_a_broken_header_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(data)
    with pytest.raises(DatasetError) as caught:
        Dataset(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_a_file_that_is_none_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a.tsv")
    with pytest.raises(DatasetError):
        Dataset(tmp_path / "a.tsv")


@given(st.lists(st.text(max_size=8), min_size=1, max_size=6))
def test_lists_written_by_python_are_read_back(texts: list[str]) -> None:
    assert parse_texts(str(texts)) == tuple(texts)


@given(st.lists(st.text(max_size=8), min_size=1, max_size=6), st.booleans())
def test_lists_written_as_json_are_read_back(texts: list[str], ascii_only: bool) -> None:
    import json

    assert parse_texts(json.dumps(texts, ensure_ascii=ascii_only)) == tuple(texts)


def test_numbers_in_a_list_stay_as_written() -> None:
    assert parse_texts("[1, 2.50, -3e4, None, 'x',]") == ("1", "2.50", "-3e4", "None", "x")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[" * 100_000 + "]" * 100_000,
        "[['a']]",
        "[" + "-" * 200_000 + "1]",
        "[__import__('os').system('true')]",
        "['a' 'b']",
        "['a' + 'b']",
        "[b'a']",
        "[f'{1}']",
        "['a'",
        "['\\x']",
        "['a', (1, 2)]",
        "[" + "1," * 2000 + "]",
        "[" + "'a'," * 80_000 + "]",
    ],
)
def test_lists_that_are_something_else_are_refused(text: str) -> None:
    with pytest.raises(DatasetError) as caught:
        parse_texts(text)
    assert len(str(caught.value)) < 200


@given(st.binary(max_size=30))
def test_any_list_of_pictures_is_split_or_refused(inside: bytes) -> None:
    try:
        parts = split_pictures(b"[" + inside + b"]")
    except DatasetError:
        return
    assert 1 <= len(parts) <= 64
