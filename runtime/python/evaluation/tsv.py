"""Files of questions in VLMEvalKit's TSV format, row by row.

Columns: `index` (unique), `image` (a picture's file in base64, a list of several, or the index of
an earlier row that has the picture), `question`, `answer`, and where there are any `hint`, options
in columns `A` to `Z` (empty where unused), `category`, `l2-category`, `split`. Others are ignored.

Unlike pandas, an empty cell is the only one that counts as missing: an option "None" or "NA" is
an option. A reference must point back, because the file is read once from front to end.

Source: VLMEvalKit, docs/en/Development.md (columns), vlmeval/smp/file.py `dump_tsv` and `load_tsv`
    (how they are written), vlmeval/dataset/image_base.py (pictures by reference: a cell of at most
    64 characters, and never a reference to a reference).
"""

from __future__ import annotations

import base64
import binascii
import codecs
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from types import TracebackType

from lorgnette.errors import DatasetError
from lorgnette.runtime.evaluation.literals import is_list, split_pictures
from lorgnette.runtime.evaluation.records import MAX_COLUMNS, Record, RecordReader

REQUIRED = ("index", "image", "question", "answer")
GROUPS = ("category", "l2-category", "split")
"""Columns by whose values scores are told apart."""
MAX_REFERENCE_CHARS = 64
"""A picture's cell of this length or less is the index of another row."""
MAX_INDEX_CHARS = 200
MAX_TEXT_BYTES = 1 << 20
"""Most bytes of a cell of text."""
MAX_ROWS = 2_000_000
"""Most rows of a file: of each, the place is remembered."""

_WHITESPACE = b" \t\r\n"


@dataclass(frozen=True, slots=True)
class Row:
    """One question.

    Attributes:
        line: Line of the file at which it begins, from 1.
        digest: SHA-256 of its bytes in the file, hexadecimal.
        index: Its name in the file.
        image: The picture's cell, not decoded: see `Dataset.pictures`.
        question: The question.
        hint: What is said before the question, or "".
        options: Option letters and their texts, in order.
        answer: The answer's cell.
        groups: Its values in the columns of `GROUPS` that are not empty.
    """

    line: int
    digest: str
    index: str
    image: bytes
    question: str
    hint: str
    options: dict[str, str]
    answer: str
    groups: dict[str, str]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        line: Line of the file at which it begins, from 1.
        index: Its name in the file, where that could be read.
        digest: As for `Row`; None where the row has no end that could be found.
        reason: What is wrong, in one line.
    """

    line: int
    index: str | None
    digest: str | None
    reason: str


class Dataset:
    """A file of questions, open for reading; use it in a `with` statement.

    Attributes:
        path: The file.
        size_bytes: Its size.
        header_digest: SHA-256 of its header.
        options: The letters of its option columns.
        is_cut: Whether `rows` had to end before the file did.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file and checks its header.

        Raises:
            DatasetError: There is no such file, it is empty or not UTF-8, or a column is missing.
        """
        self.path = path
        try:
            if path.exists() and not path.is_file():
                raise DatasetError("not a file of questions", where=path, got="not a regular file")
            self._file = path.open("rb")
        except OSError as error:
            reason = error.strerror or error
            raise DatasetError("cannot read the questions", where=path, got=reason) from error
        try:
            self.size_bytes = os.fstat(self._file.fileno()).st_size
            header, self.header_digest = self._read_header()
        except BaseException:
            self._file.close()
            raise
        self._width = len(header)
        self._columns = {name: place for place, name in enumerate(header) if name}
        self.options = tuple(name for name in ascii_uppercase if name in self._columns)
        self.is_cut = False
        self._offsets: dict[str, int] = {}
        self._lent: tuple[int, bytes] | None = None  # the picture's cell that was lent last

    def __enter__(self) -> Dataset:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Closes the file."""
        self._file.close()

    @property
    def read_bytes(self) -> int:
        """How much of the file has been read."""
        return self._reader.offset

    def rows(self) -> Iterator[Row | BadRow]:
        """The rows in order; one that cannot be used comes as a `BadRow`, once."""
        while True:
            first = self._reader.line + 1
            try:
                record = self._reader.read()
            except DatasetError as error:
                self.is_cut = True
                yield BadRow(first, None, None, str(error))
                return
            if record is None:
                return
            if len(self._offsets) >= MAX_ROWS:
                self.is_cut = True
                reason = f"more than {MAX_ROWS} rows: what follows is not read"
                yield BadRow(record.line, None, None, reason)
                return
            index = None
            try:
                index = self._read_index(record)
                self._remember(index, record.offset)
                yield self._read_row(record, index)
            except DatasetError as error:
                yield BadRow(record.line, index, record.digest, str(error))

    def pictures(self, row: Row) -> list[bytes]:
        """The files of a row's pictures, in order; to be asked for before the next row is read.

        Raises:
            DatasetError: There is none, it is no base64, or it refers to a row that has none or
                does not stand before this one.
        """
        cell = row.image
        if 0 < len(cell) <= MAX_REFERENCE_CHARS and not is_list(cell):
            cell = self._lend(cell, row)
        if not cell:
            raise DatasetError("the row has no picture")
        parts = split_pictures(cell) if is_list(cell) else [cell]
        return [_decoded(part) for part in parts]

    def _read_header(self) -> tuple[list[str], str]:
        """The columns' names in order, and the header's digest."""
        start = self._file.read(len(codecs.BOM_UTF8))
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DatasetError("not UTF-8", where=self.path, got="UTF-16", hint="save it as UTF-8")
        if start != codecs.BOM_UTF8:
            self._file.seek(0)
        self._reader = RecordReader(self._file)
        try:
            record = self._reader.read()
        except DatasetError as error:
            raise DatasetError(
                "the header cannot be read", where=self.path, got=error.what
            ) from error
        if record is None:
            raise DatasetError("the file is empty", where=self.path, wanted="a header and rows")
        try:
            names = [cell.decode("utf-8").strip() for cell in record.cells]
        except UnicodeDecodeError as error:
            raise DatasetError("the header is not UTF-8", where=self.path) from error
        _check_names(names, self.path)
        return names, record.digest

    def _read_index(self, record: Record) -> str:
        """The row's name."""
        if len(record.cells) != self._width:
            got = f"{MAX_COLUMNS} or more" if len(record.cells) > MAX_COLUMNS else len(record.cells)
            wanted = self._width
            raise DatasetError("another number of cells than the header", got=got, wanted=wanted)
        index = self._text(record, "index").strip()
        if not index or len(index) > MAX_INDEX_CHARS:
            got = f"{len(index)} characters"
            raise DatasetError("no usable index", got=got, wanted=f"1 to {MAX_INDEX_CHARS}")
        return index

    def _remember(self, index: str, offset: int) -> None:
        if index in self._offsets:
            raise DatasetError("the index stands at an earlier row too", got=repr(index))
        self._offsets[index] = offset

    def _read_row(self, record: Record, index: str) -> Row:
        options = {name: self._text(record, name).strip() for name in self.options}
        question = self._text(record, "question")
        if not question.strip():
            raise DatasetError("the row has no question")
        groups = {name: self._text(record, name).strip() for name in GROUPS}
        return Row(
            line=record.line,
            digest=record.digest,
            index=index,
            image=record.cells[self._columns["image"]].strip(_WHITESPACE),
            question=question,
            hint=self._text(record, "hint"),
            options={name: text for name, text in options.items() if text},
            answer=self._text(record, "answer").strip(),
            groups={name: text for name, text in groups.items() if text},
        )

    def _text(self, record: Record, column: str) -> str:
        """A cell of text, "" where there is no such column."""
        place = self._columns.get(column)
        if place is None:
            return ""
        cell = record.cells[place]
        if len(cell) > MAX_TEXT_BYTES:
            raise DatasetError(
                f"'{column}' is too long", got=f"{len(cell)} bytes", wanted=f"<= {MAX_TEXT_BYTES}"
            )
        if b"\0" in cell:
            raise DatasetError(f"'{column}' holds a NUL byte")
        try:
            return cell.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DatasetError(f"'{column}' is not UTF-8", got=error.reason) from error

    def _lend(self, cell: bytes, row: Row) -> bytes:
        """The picture's cell of the row that a row refers to."""
        name = cell.decode("utf-8", "replace")
        offset = self._offsets.get(name)
        if name == row.index or offset is None:
            raise DatasetError(
                "the picture is a reference to " + ("itself" if offset is not None else "no row"),
                got=repr(name),
                wanted="the index of a row before this one",
            )
        if self._lent is None or self._lent[0] != offset:
            self._lent = (offset, self._image_at(offset))
        if len(self._lent[1]) <= MAX_REFERENCE_CHARS:
            raise DatasetError("the picture is a reference to a row without one", got=repr(name))
        return self._lent[1]

    def _image_at(self, offset: int) -> bytes:
        """The picture's cell of the row that begins at a byte; one that was read before."""
        before = self._file.tell()
        try:
            self._file.seek(offset)
            record = RecordReader(self._file).read()
        finally:
            self._file.seek(before)
        place = self._columns["image"]
        if record is None or len(record.cells) <= place:
            raise DatasetError("the file has changed while it was read", where=self.path)
        return record.cells[place].strip(_WHITESPACE)


def _check_names(names: list[str], path: Path) -> None:
    """Refuses a header that lacks a column or names one twice."""
    if len(names) > MAX_COLUMNS:
        raise DatasetError("too many columns", where=path, wanted=f"at most {MAX_COLUMNS}")
    known = [name for name in names if name]
    twice = sorted({name for name in known if known.count(name) > 1})
    if twice:
        raise DatasetError("a column stands there twice", where=path, got=", ".join(twice))
    missing = [name for name in REQUIRED if name not in names]
    if not missing:
        return
    hint = None
    if missing == ["image"] and "image_path" in names:
        hint = "'image_path' alone names files elsewhere; write the pictures into the file"
    elif len(names) == 1 and "," in names[0]:
        hint = "cells are parted by tabs, not by commas"
    elif missing == ["answer"]:
        hint = "a test set without answers cannot be scored"
    shown = ", ".join(names)
    raise DatasetError(
        "a column is missing",
        where=path,
        got=shown if len(shown) <= 200 else f"{shown[:197]}...",
        wanted=", ".join(missing),
        hint=hint,
    )


def _decoded(text: bytes) -> bytes:
    """A picture's file."""
    try:
        data = base64.b64decode(text.translate(None, _WHITESPACE), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DatasetError("the picture is no base64", got=error) from error
    if not data:
        raise DatasetError("the row has an empty picture")
    return data
