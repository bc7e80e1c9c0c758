"""What the tests of wrong checkpoints share."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lorgnette.cli.output import printable
from tests.unit.cli_helpers import call

DECODER, TOWER = "llm-F16.gguf", "mmproj-f16.gguf"
"""The files of the pair."""
LONGEST_LINE = 1500


def refused(folder: Path, checkpoint: Path, *args: object, words: tuple[str, ...] = ()) -> str:
    """Exporting fails with one line that holds the words, and leaves nothing; the line."""
    out = folder / "out"
    out.mkdir(exist_ok=True)
    result = call("export", checkpoint, "--out", out / "a.lorg", *args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.strip() == printable(result.stderr.strip())
    assert len(result.stderr) < LONGEST_LINE
    assert list(out.iterdir()) == []
    for word in words:
        assert word in result.stderr, result.stderr
    return result.stderr


def edit_json(file: Path, **changes: object) -> None:
    """Sets keys of a JSON file; None takes one away."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def cut(file: Path, keep: float) -> None:
    """Cuts a file: at a share of it, or so many bytes before its end."""
    size = file.stat().st_size
    os.truncate(file, int(size * keep) if keep >= 0 else size + int(keep))
