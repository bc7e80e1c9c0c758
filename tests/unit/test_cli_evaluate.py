"""`lorgnette evaluate`: what it prints, how it ends, and that it needs the runtime alone."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.evaluation_support import base64_of, encoded_picture, row, write_tsv
from tests.unit.cli_helpers import bundle, call, document, process, start
from tests.zoo.questions import HELD_OUT, WORDS, draw_sample

SLOW = """
import sys, time
from lorgnette.runtime.engines.onnx import OnnxEngine
encode = OnnxEngine.encode
def slow(self, tiles, **how):
    sys.stderr.write("tile\\n"); sys.stderr.flush(); time.sleep(0.1)
    return encode(self, tiles, **how)
OnnxEngine.encode = slow
"""
"""Makes every picture take its time and tell of itself on stderr."""
TERMINAL = "import sys; sys.stderr.isatty = lambda: True"


def zoo_file(folder: Path, count: int = 12) -> Path:
    """Questions that the bundle was trained for."""
    rows = []
    for n in range(count):
        sample = draw_sample(HELD_OUT, n, WORDS)
        path = folder / "picture.png"
        sample.scene.image.save(path)
        image = base64_of(path.read_bytes())
        question = sample.question
        cells = {"image": image, "question": question.text, "answer": question.answer}
        rows.append(row(n, **cells, category=question.kind))
    return write_tsv(folder / "zoo.tsv", rows)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo_file(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def told(zoo: Path) -> Any:
    return document("evaluate", bundle(), zoo, "--prompt", "plain", "--max-new-tokens", 12)


def test_json_tells_scores_counts_and_times(zoo: Path, told: Any) -> None:
    assert told["rows"] == told["answered"] == 12
    assert told["score"] > 80
    assert told["metrics"] == {"exact": {"rows": 12, "score": told["score"]}}
    kinds = told["groups"]["category"]
    assert set(kinds) == {"colour", "shape", "position", "count", "exists", "read"}
    total = sum(kind["rows"] * kind["score"] for kind in kinds.values())
    assert total / 12 == pytest.approx(told["score"], abs=1e-2)
    assert told["bad_rows"] == {"count": 0, "listed": []}
    assert told["mean_ttft_ms"] > 0
    assert told["decode_tokens_per_s"] > 0
    assert (told["ended_by"], told["limit"], told["resumed"]) == ("end", None, 0)
    assert told["file"] == str(zoo)
    assert told["bundle"]["quant"] == "int4"


def test_people_get_a_table_and_what_auto_chose(zoo: Path) -> None:
    code, out, err = process(
        "evaluate", bundle(), zoo, "--prompt", "plain", "--max-new-tokens", 12, "--limit", 6
    )
    assert (code, err) == (0, b"")
    lines = out.decode().splitlines()
    assert lines[0] == (
        "metric auto (choice where a row has options, else exact, by the file's name)"
    )
    assert lines[2].split()[:2] == ["all", "6"]
    assert sum(line.startswith("category ") for line in lines) == 6
    assert any(line.startswith("first token ") for line in lines)
    assert lines[-1] == "0 rows could not be used"


def test_the_answers_of_a_run_save_the_next_one_its_work(zoo: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    common = ("evaluate", bundle(), zoo, "--prompt", "plain", "--answers", answers)
    first = document(*common, "--limit", 4)
    assert (first["resumed"], first["ended_by"]) == (0, "limit")
    second = document(*common, "--limit", 6)
    assert (second["resumed"], second["rows"]) == (4, 6)
    assert len(answers.read_text().splitlines()) == 6
    refused = call(*common, "--metric", "anls")
    assert refused.exit_code == 2
    assert "another run" in refused.stderr


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    rows = [row("first"), row("second", question=""), row("third", image="nowhere")]
    return write_tsv(tmp_path / "mixed.tsv", rows)


def test_bad_rows_are_named_and_fail_the_command(mixed: Path) -> None:
    result = call("evaluate", bundle(), mixed, "--json")
    assert result.exit_code == 1
    assert "line 3, index second: the row has no question" in result.stderr
    assert "line 4, index third: the picture is a reference to no row" in result.stderr
    assert "2 of 3" in result.stderr.splitlines()[-1]
    told = json.loads(result.stdout)
    assert told["error"]["exit_code"] == 1
    assert (told["rows"], told["answered"]) == (3, 1)
    assert [bad["index"] for bad in told["bad_rows"]["listed"]] == ["second", "third"]


def test_bad_rows_may_be_skipped(mixed: Path) -> None:
    assert call("evaluate", bundle(), mixed, "--skip-bad").exit_code == 0


def test_a_file_of_bad_rows_alone_fails_whatever_is_skipped(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "bad.tsv", [row(n, question="") for n in range(30)])
    result = call("evaluate", bundle(), path, "--skip-bad")
    assert result.exit_code == 1
    assert "... and 10 more" in result.stderr


def test_a_file_that_is_cut_off_fails_whatever_is_skipped(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "cut.tsv", [row(1), row(2)])
    path.write_bytes(path.read_bytes().rstrip(b'"\n'))
    result = call("evaluate", bundle(), path, "--skip-bad", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ended_by"] == "damage"
    assert "could not be read to its end" in result.stderr


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"index\timage\tquestion\tanswer\n", "there are no rows"),
        (b"index\tquestion\tanswer\n1\twhat\tit\n", "a column is missing"),
        (b"", "the file is empty"),
    ],
)
def test_a_broken_file_is_wrong_input(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(data)
    result = call("evaluate", bundle(), path)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        ("--metric", "bleu"),
        ("--prompt", "clever"),
        ("--limit", "0"),
        ("--max-new-tokens", "0"),
        ("--threads", "0"),
    ],
)
def test_wrong_options_are_wrong_input(zoo: Path, wrong: tuple[str, str]) -> None:
    assert call("evaluate", bundle(), zoo, *wrong).exit_code == 2


def test_text_of_a_file_cannot_steer_the_terminal(tmp_path: Path) -> None:
    rows = [row(1, category="\x1b[2Jx"), row("\x1b[31m", question="")]
    result = call("evaluate", bundle(), write_tsv(tmp_path / "a.tsv", rows))
    assert "\x1b" not in result.stdout + result.stderr


def test_a_terminal_sees_progress(tmp_path: Path, zoo: Path) -> None:
    child = start(["evaluate", bundle(), zoo, "--limit", 3], before=SLOW + TERMINAL)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 0
    assert b"\rrow " in err
    assert b"% of the file, score " in err


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_ctrl_c_tells_what_is_known_and_keeps_the_answers(
    zoo: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    answers = tmp_path / "answers.jsonl"
    child = start(["evaluate", bundle(), zoo, "--answers", answers, *options], before=SLOW)
    deadline = time.monotonic() + 60
    while not answers.is_file() or answers.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"Traceback" not in err
    lines = answers.read_bytes()
    assert lines.endswith(b"\n")
    if options:
        told = json.loads(out)
        assert told["ended_by"] == "interrupt"
        assert told["rows"] in (lines.count(b"\n") - 1, lines.count(b"\n"))
    else:
        assert out.startswith(b"metric auto")


def test_neither_torch_nor_pandas_is_needed(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", [row(1, image=encoded_picture(3))])
    check = """
import atexit, sys
heavy = {"torch", "pandas", "transformers", "onnx", "jinja2", "gguf"}
atexit.register(lambda: print("loaded:", sorted(heavy & set(sys.modules))))
"""
    child = start(["evaluate", bundle(), path, "--max-new-tokens", 2], before=check)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert out.decode().splitlines()[-1] == "loaded: []"
