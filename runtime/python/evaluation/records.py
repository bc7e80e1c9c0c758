"""Records of a tab-separated file, one at a time and never more than one in memory.

Rules, as pandas writes and reads them: cells are parted by tabs and records by line ends (LF or
CRLF); a cell that begins with a double quote goes on to the next single double quote, line ends
and tabs included, and two double quotes in it stand for one; elsewhere a double quote is itself;
empty lines are passed over. Python's csv module does the same, but its limit on a cell's size is
one for the whole process, and it hands over text before anyone could say which row is not UTF-8.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import BinaryIO

from lorgnette.errors import DatasetError

MAX_RECORD_BYTES = 128 << 20
"""Most bytes of one record: rows with several large pictures reach tens of megabytes."""
MAX_COLUMNS = 256
"""Cells that are kept of a record; one more tells that there were too many."""

_QUOTE, _TAB = b'"', b"\t"


@dataclass(frozen=True, slots=True)
class Record:
    """One record.

    Attributes:
        offset: Byte at which it begins.
        line: Line at which it begins, from 1.
        cells: Its cells as bytes, without quotes.
        digest: SHA-256 of its bytes in the file, hexadecimal.
    """

    offset: int
    line: int
    cells: list[bytes]
    digest: str


class RecordReader:
    """Reads the records of a file that is open for reading bytes."""

    def __init__(self, file: BinaryIO) -> None:
        """Starts at the file's present position, which is taken for line 1."""
        self._file = file
        self.offset = file.tell()
        """Byte behind the last record."""
        self.line = 0
        """Lines read so far."""

    def read(self) -> Record | None:
        """The next record, None at the end of the file.

        Raises:
            DatasetError: A record is too long, or ends inside quotes. What follows it cannot be
                told from it: reading ends here.
        """
        while True:
            offset, first = self.offset, self.line + 1
            splitter, digest, size, line = _Splitter(), hashlib.sha256(), 0, b""
            while not splitter.is_done:
                line = self._file.readline(MAX_RECORD_BYTES - size + 1)
                if not line:
                    if size == 0:
                        return None
                    raise _unreadable("a quoted cell is not closed", first, self.line)
                size += len(line)
                self.offset += len(line)
                self.line += 1
                if size > MAX_RECORD_BYTES:
                    raise _unreadable(f"longer than {MAX_RECORD_BYTES} bytes", first, self.line)
                digest.update(line)
                splitter.feed(line)
            if size > len(line) or line not in (b"\n", b"\r\n"):
                return Record(offset, first, splitter.cells, digest.hexdigest())


def _unreadable(what: str, first: int, last: int) -> DatasetError:
    hint = "a quote that opens and never closes swallows what follows" if last > first else None
    return DatasetError(f"{what}: what follows is not read", hint=hint)


class _Splitter:
    """Splits one record, line by line."""

    def __init__(self) -> None:
        self.cells: list[bytes] = []
        self.is_done = False
        self._open: bytearray | None = None  # a quoted cell that goes on in the next line

    def feed(self, line: bytes) -> None:
        """Takes a line, its end included; the record is done unless it ends inside quotes."""
        end = len(line.removesuffix(b"\n").removesuffix(b"\r"))
        if self._open is None and _QUOTE not in line:
            self.cells = line[:end].split(_TAB, MAX_COLUMNS)
            self.is_done = True
            return
        position, cell = 0, self._open
        while True:
            if cell is None and line.startswith(_QUOTE, position):
                cell = bytearray()
                position += 1
                self._open = cell
            if self._open is not None and cell is not None:
                position = _take_quoted(line, position, cell)
                if position < 0:
                    return
                self._open = None
            tab = line.find(_TAB, position, end)
            rest = line[position : end if tab < 0 else tab]
            if len(self.cells) <= MAX_COLUMNS:
                self.cells.append(rest if cell is None else bytes(cell) + rest)
            if tab < 0:
                self.is_done = True
                return
            position, cell = tab + 1, None


def _take_quoted(line: bytes, position: int, cell: bytearray) -> int:
    """Adds to a cell up to its closing quote; the place behind that, -1 where it goes on."""
    while True:
        quote = line.find(_QUOTE, position)
        if quote < 0:
            cell += line[position:]
            return -1
        cell += line[position:quote]
        if not line.startswith(_QUOTE, quote + 1):
            return quote + 1
        cell += _QUOTE
        position = quote + 2
