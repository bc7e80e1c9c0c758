"""Pictures with questions: what calibration sees and what quality is measured on.

A set is one of:

- a `.jsonl` file, or a folder that holds it as `samples.jsonl`; each line is an object with
  `image` (a picture's path, relative to the file), `question` and, where it is known, `answer`;
- a folder of pictures without such a file: each is asked what is seen, in the order of names;
- a `.tsv` file of VLMEvalKit's format, questions in its wording for benchmarks.

A set comes from anywhere. No picture is read from outside of its folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import msgspec

from lorgnette.errors import DatasetError
from lorgnette.spec import Frozen

FILE_NAME = "samples.jsonl"
QUESTION = "What do you see?"
"""What is asked about pictures that come without questions."""
PICTURES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Endings of the files that count as pictures in a folder without questions."""
HELD_OUT = 4
"""Of so many samples, one is for measuring."""
MAX_SAMPLES = 10_000
MAX_LINE_BYTES = 64 << 10
MAX_PICTURE_BYTES = 64 << 20
MAX_TSV_BYTES = 1 << 30
"""Most bytes of all pictures of a TSV file together, which are held in memory."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture with a question.

    Attributes:
        image: The picture's file, or the bytes of one; `runtime.image.load_image` reads both.
        question: What is asked about it.
        answer: The right answer, where there is one.
        name: What it is called in messages and reports.
    """

    image: Path | bytes
    question: str
    answer: str | None = None
    name: str = ""


class _Line(Frozen, frozen=True):
    """A line of a `.jsonl` file."""

    image: str
    question: str
    answer: str | None = None


def default_samples() -> Path:
    """The folder of the set that comes with the package."""
    return Path(__file__).parent / "default_samples"


def read_samples(path: Path, count: int | None = None) -> tuple[Sample, ...]:
    """Reads a set of samples; pictures are looked up but not decoded.

    Args:
        path: A folder, a `.jsonl` file or a `.tsv` file.
        count: The first so many, and nothing behind them is looked at; None takes all.

    Raises:
        DatasetError: It is none of them, is too large, or a line of it cannot be used.
    """
    if path.is_dir():
        listed = path / FILE_NAME
        is_listed = listed.exists() or listed.is_symlink()
        found = _read_lines(listed) if is_listed else _read_pictures(path)
    elif not path.is_file():
        got = "something else" if path.exists() else "nothing"
        raise DatasetError("no samples", where=path, got=got, wanted="a folder or a file")
    elif path.suffix == ".jsonl":
        found = _read_lines(path)
    elif path.suffix == ".tsv":
        found = _read_tsv(path)
    else:
        raise DatasetError(
            "not a file of samples", where=path, got=repr(path.suffix), wanted=".jsonl or .tsv"
        )
    samples: list[Sample] = []
    for sample in islice(found, count):
        if len(samples) == MAX_SAMPLES:
            raise DatasetError("too many samples", where=path, wanted=f"at most {MAX_SAMPLES}")
        samples.append(sample)
    if not samples:
        wanted = "pictures or samples.jsonl" if path.is_dir() else "one sample or more"
        raise DatasetError("there are no samples", where=path, wanted=wanted)
    return tuple(samples)


def split_samples(samples: Sequence[Sample]) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """A set in two: what is calibrated with, and every fourth sample, on which that is measured.

    A set of one sample serves both.
    """
    if len(samples) == 1:
        return tuple(samples), tuple(samples)
    held = tuple(samples[HELD_OUT - 1 :: HELD_OUT]) or tuple(samples[-1:])
    return tuple(sample for sample in samples if sample not in held), held


def samples_digest(samples: Sequence[Sample]) -> str:
    """What a set is known by: SHA-256 over its questions, answers and the bytes of its pictures.

    Names and places of files do not count.

    Raises:
        DatasetError: A picture cannot be read.
    """
    digest = hashlib.sha256()
    for sample in samples:
        parts = [_picture_digest(sample), sample.question, sample.answer]
        digest.update(json.dumps(parts).encode("ascii") + b"\n")
    return digest.hexdigest()


def _picture_digest(sample: Sample) -> str:
    if isinstance(sample.image, bytes):
        return hashlib.sha256(sample.image).hexdigest()
    try:
        with sample.image.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DatasetError(
            "cannot read the picture", where=sample.image, got=error.strerror or error
        ) from error


def _read_lines(path: Path) -> Iterator[Sample]:
    """The samples of a `.jsonl` file; empty lines are passed over."""
    if not path.is_file():
        raise DatasetError("not a file of samples", where=path, got="not a regular file")
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                where = f"{path}, line {number}"
                if number > MAX_SAMPLES:
                    raise DatasetError(
                        "too many lines", where=path, wanted=f"at most {MAX_SAMPLES}"
                    )
                if len(line) > MAX_LINE_BYTES:
                    raise DatasetError(
                        "a line is too long", where=where, wanted=f"<= {MAX_LINE_BYTES} bytes"
                    )
                if line.strip():
                    yield _sample(line, path.parent, where)
    except OSError as error:
        raise DatasetError(
            "cannot read the samples", where=path, got=error.strerror or error
        ) from error


def _sample(line: bytes, folder: Path, where: str) -> Sample:
    try:
        read = msgspec.json.decode(line, type=_Line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DatasetError("not a sample", where=where, got=error) from error
    for key in ("question", "answer"):
        text = getattr(read, key)
        if text is not None and not text.strip():
            raise DatasetError(f"'{key}' is empty", where=where)
    return Sample(_picture(read.image, folder, where), read.question, read.answer, read.image)


def _picture(name: str, folder: Path, where: str) -> Path:
    """The file that a line names; it lies in the folder, links followed."""
    relative = PurePosixPath(name)
    leaves = relative.is_absolute() or ".." in relative.parts or not relative.parts
    if leaves or re.search(r"[\\:\x00-\x1f]", name):
        raise DatasetError("the picture's path leaves the folder", where=where, got=repr(name))
    path = folder / relative
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
        is_file = inside and path.is_file()
        size = path.stat().st_size if is_file else 0
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, links in a circle
        raise DatasetError("no such picture", where=where, got=repr(name)) from error
    if not inside:
        raise DatasetError("the picture is a link out of the folder", where=where, got=repr(name))
    if not is_file:
        got = "not a plain file" if path.exists() else "no such file"
        raise DatasetError(f"no picture {name!r}", where=where, got=got)
    if not 0 < size <= MAX_PICTURE_BYTES:
        wanted = f"1 to {MAX_PICTURE_BYTES}"
        raise DatasetError(
            f"size of the picture {name!r}", where=where, got=f"{size} bytes", wanted=wanted
        )
    return path


def _read_pictures(folder: Path) -> Iterator[Sample]:
    """Every picture of a folder, without those of the folders in it."""
    for name in sorted(path.name for path in folder.iterdir()):
        if PurePosixPath(name).suffix.lower() in PICTURES:
            yield Sample(_picture(name, folder, str(folder)), QUESTION, None, name)


def _read_tsv(path: Path) -> Iterator[Sample]:
    """The rows of a VLMEvalKit file; each has one picture here."""
    from lorgnette.runtime.evaluation.questions import AUTO, PROMPTS, read_question
    from lorgnette.runtime.evaluation.tsv import BadRow, Dataset

    held = 0
    with Dataset(path) as dataset:
        for row in dataset.rows():
            where = f"{path}, line {row.line}"
            if isinstance(row, BadRow):
                raise DatasetError("a row cannot be used", where=where, got=row.reason)
            try:
                question = read_question(row, AUTO, PROMPTS[0], path.name)
                pictures = dataset.pictures(row)
            except DatasetError as error:
                raise DatasetError("a row cannot be used", where=where, got=error) from error
            held += sum(map(len, pictures))
            if len(pictures) != 1 or held > MAX_TSV_BYTES:
                got = f"{len(pictures)} pictures" if len(pictures) != 1 else f"{held} bytes so far"
                wanted = f"one picture a row, {MAX_TSV_BYTES} bytes together"
                raise DatasetError("a row cannot be used", where=where, got=got, wanted=wanted)
            name = f"row {row.index}"
            yield Sample(pictures[0], question.prompt, question.accepted[0], name)
