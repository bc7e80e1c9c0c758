r"""Lists written into cells: several accepted answers, several pictures.

Such cells hold what Python's `str(list)` or JSON wrote. They come from strangers, so nothing is
evaluated: a flat list is taken apart by a pattern, and only single strings, found to be that by
the pattern, go to `ast.literal_eval`. Nesting, which could exhaust a parser, is refused.

Source: VLMEvalKit, vlmeval/smp/misc.py `toliststr` and vlmeval/dataset/utils/vqa_eval.py
    `process_line`: a cell from `[` to `]` is a list. (There, Python evaluates it.)
"""

from __future__ import annotations

import ast
import json
import re
import warnings

from lorgnette.errors import DatasetError

MAX_LIST_CHARS = 1 << 18
"""Most characters of a list of answers."""
MAX_ITEMS = 1000
"""Most answers of a list."""
MAX_PICTURES = 64
"""Most pictures of a row."""

_ITEM = re.compile(
    r"""\s*(?:
        (?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
        |(?P<plain>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|None|True|False)
    )\s*(?:,|$)""",
    re.VERBOSE | re.DOTALL,
)


def is_list(cell: str | bytes) -> bool:
    """Whether a cell without spaces around it is meant as a list."""
    if isinstance(cell, bytes):
        return cell.startswith(b"[") and cell.endswith(b"]")
    return cell.startswith("[") and cell.endswith("]")


def parse_texts(cell: str) -> tuple[str, ...]:
    """The strings of a list; numbers in it are taken as they are written.

    Raises:
        DatasetError: It is too long, empty, nested, or no list of strings and numbers.
    """
    if len(cell) > MAX_LIST_CHARS:
        raise DatasetError("a list of answers is too long", got=f"{len(cell)} characters")
    inside = cell[1:-1].strip()
    texts: list[str] = []
    position = 0
    while position < len(inside):
        item = _ITEM.match(inside, position)
        if item is None:
            raise DatasetError(
                "a list of answers cannot be read",
                got=_shortened(inside[position:]),
                wanted="a flat list of strings",
            )
        if len(texts) == MAX_ITEMS:
            raise DatasetError("a list of answers has too many", wanted=f"at most {MAX_ITEMS}")
        texts.append(_unquoted(item["text"]) if item["text"] else item["plain"])
        position = item.end()
    if not texts:
        raise DatasetError("the list of answers is empty")
    return tuple(texts)


def _unquoted(token: str) -> str:
    if token.startswith('"'):
        try:  # as JSON first, which writes characters beyond 16 bits as two escapes
            return str(json.loads(token))
        except ValueError:
            pass
    try:
        with warnings.catch_warnings():  # of escapes that Python does not know
            warnings.simplefilter("ignore")
            return str(ast.literal_eval(token))
    except (ValueError, SyntaxError) as error:
        raise DatasetError("an answer's string cannot be read", got=_shortened(token)) from error


def split_pictures(cell: bytes) -> list[bytes]:
    """The strings of a list of base64, in which quotes, commas and escapes cannot occur.

    Raises:
        DatasetError: It is empty, has too many, or is no flat list of strings.
    """
    inside = cell[1:-1].strip().removesuffix(b",")
    parts = [part.strip() for part in inside.split(b",", MAX_PICTURES)]
    if len(parts) > MAX_PICTURES:
        raise DatasetError("a row has too many pictures", wanted=f"at most {MAX_PICTURES}")
    texts = []
    for part in parts:
        if len(part) < 2 or part[:1] not in (b"'", b'"') or part[-1:] != part[:1]:
            got = _shortened(part.decode("ascii", "replace"))
            raise DatasetError(
                "a list of pictures cannot be read", got=got, wanted="strings of base64"
            )
        texts.append(part[1:-1])
    return texts


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
