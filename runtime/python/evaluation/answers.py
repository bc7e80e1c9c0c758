"""The file of answers: a line of JSON a row, so that a run that was cut off can go on.

The rule: line k belongs to the k-th row of the questions, whether it could be used or not. Each
line names its run, a digest of the bundle, the settings and the header of the questions, and the
digest of its row. A run goes on behind the lines that are there if every one of them names this
very run and its row; what does not is refused, and nothing is overwritten. A last line that is not
complete, as a crash leaves it, is cut off and its row asked again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from lorgnette.errors import DatasetError

MAX_LINE_BYTES = 64 << 20
"""Most bytes of a line."""


class AnswerFile:
    """Reads what an earlier run left, then appends; use it in a `with` statement.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path, run: str) -> None:
        """Opens the file, or makes it where there is none.

        Args:
            path: The file.
            run: What the run is known by, hexadecimal.

        Raises:
            DatasetError: The file cannot be written, or holds something else.
        """
        self.path = path
        self._start = b'{"run": "%s", ' % run.encode("ascii")
        if path.exists() and not path.is_file():
            raise DatasetError("not a file of answers", where=path, got="not a regular file")
        try:
            # Unbuffered: a line is in the file as soon as it is written, whatever happens next.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            reason = error.strerror or error
            raise DatasetError("cannot write the answers", where=path, got=reason) from error
        self._file: BinaryIO = os.fdopen(descriptor, "r+b", buffering=0)
        self._reader: BinaryIO | None = None
        self._line = 0
        self._end = 0  # behind the last complete line that was read
        try:
            self._reader = path.open("rb")
            self._check_start(self._reader.read(len(self._start)))
            self._reader.seek(0)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> AnswerFile:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Closes the file."""
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        if self._reader is not None:
            self._reader.close()

    def take(self, digest: str) -> dict[str, Any] | None:
        """What is known of the next row, None where the earlier run did not come to it.

        Args:
            digest: The row's digest.

        Raises:
            DatasetError: The line is damaged, or belongs to another run or row.
        """
        if self._reader is None:
            return None
        line = self._reader.readline(MAX_LINE_BYTES)
        if not line.endswith(b"\n"):
            self._check_start(line)
            self._stop_reading()
            return None
        self._line += 1
        self._check_start(line)
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._damaged("a line that is no JSON") from error
        if not _is_entry(entry):
            raise self._damaged("a line without what an answer has")
        if entry["row"] != digest:
            raise self._damaged("the answer of another row")
        self._end += len(line)
        return dict(entry)

    def append(self, digest: str, entry: dict[str, Any]) -> None:
        """Writes the line of the next row.

        Args:
            digest: The row's digest.
            entry: What is told of it, as JSON knows it.

        Raises:
            OSError: The system refused; the line may be there in part, which `take` sees.
        """
        self._stop_reading()
        text = json.dumps({"row": digest, **entry}).removeprefix("{")
        line = memoryview(self._start + text.encode("ascii") + b"\n")
        while line:
            line = line[self._file.write(line) or 0 :]

    def _stop_reading(self) -> None:
        """Goes from reading to writing: cuts off what is behind the last complete line."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
            self._file.truncate(self._end)
            self._file.seek(self._end)

    def _check_start(self, line: bytes) -> None:
        start = line[: len(self._start)]
        if self._start.startswith(start) if not line.endswith(b"\n") else start == self._start:
            return
        raise self._damaged(
            "another run: another bundle, file or setting"
            if line.startswith(self._start[:9])
            else "something else"
        )

    def _damaged(self, got: str) -> DatasetError:
        where = f"{self.path}, line {max(self._line, 1)}"
        hint = "give the same bundle, file and settings, or another name for the answers"
        return DatasetError("the answers cannot be continued", where=where, got=got, hint=hint)


def _is_entry(entry: object) -> bool:
    """Whether an object has what the summary needs."""
    if not isinstance(entry, dict) or not isinstance(entry.get("row"), str):
        return False
    if isinstance(entry.get("error"), str):
        return True
    numbers = ("score", "tokens", "ttft_ms", "decode_ms")
    texts = ("prompt", "answer", "metric", "finish_reason")
    return (
        all(isinstance(entry.get(name), int | float) for name in numbers)
        and all(isinstance(entry.get(name), str) for name in texts)
        and isinstance(entry.get("accepted"), list)
        and 0 <= entry["score"] <= 1
    )
