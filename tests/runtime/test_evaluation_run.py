"""Prompts, scoring and answers that go on, with an engine that says what a test wants."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorgnette.errors import DatasetError
from lorgnette.runtime.evaluation.answers import AnswerFile
from lorgnette.runtime.evaluation.questions import is_brief, metric_by_name, read_question
from lorgnette.runtime.evaluation.run import Outcome, Settings, evaluate, run_digest
from lorgnette.runtime.evaluation.summary import OTHER, Summary
from lorgnette.runtime.evaluation.tsv import Dataset, Row
from lorgnette.runtime.model import Model
from lorgnette.runtime.pictures import PictureCache
from tests.runtime.evaluation_support import (
    Cells,
    base64_of,
    encoded_picture,
    png,
    row,
    write_tsv,
)
from tests.runtime.support import FakeEngine, picture, prompt_ids, user
from tests.zoo.questions import HELD_OUT, WORDS, draw_sample

Fake = tuple[Model, FakeEngine]
DEFAULT = Settings()
BRIEF = "\nAnswer the question using a single word or phrase."


def says(fake: Fake, *texts: str) -> list[list[int]]:
    """Makes the engine answer the texts, one a question; returns what it is asked."""
    model, engine = fake
    stop = model.manifest.prompt.stop_token_ids[0]
    left = [[*model.tokenizer.encode(text), stop] for text in texts]
    asked: list[list[int]] = []
    engine.runs, engine.tiles = [], []
    engine.on_run = lambda count: None
    pending: list[int] = []

    def answer(held: list[int]) -> int:
        if not pending:
            asked.append(held)
            pending.extend(left.pop(0) if left else [stop])
        return pending.pop(0)

    engine.answer = answer
    return asked


def rows_in(tmp_path: Path, rows: Sequence[Cells], name: str = "a.tsv") -> Path:
    return write_tsv(tmp_path / name, rows)


def outcomes(
    model: Model, path: Path, settings: Settings = DEFAULT, limit: int | None = None
) -> list[Outcome]:
    with Dataset(path) as dataset:
        return list(evaluate(model, dataset, settings, limit=limit))


def a_row(**cells: Any) -> Row:
    values: dict[str, Any] = {
        "line": 2,
        "digest": "",
        "index": "1",
        "image": b"",
        "question": "What is it?",
        "hint": "",
        "options": {},
        "answer": "dog",
        "groups": {},
    }
    return Row(**(values | cells))


def test_the_prompt_of_a_multiple_choice_is_that_of_vlmevalkit() -> None:
    options = {"A": "cat", "C": "dog"}
    question = read_question(
        a_row(hint="Look.", options=options, answer="c"), "auto", "vlmevalkit", "MMStar.tsv"
    )
    assert question.prompt == (
        "Hint: Look.\nQuestion: What is it?\nOptions:\nA. cat\nC. dog\n"
        "Please select the correct answer from the options above. \n"
    )
    assert (question.metric, question.accepted) == ("choice", ("C",))


@pytest.mark.parametrize(
    ("cells", "style", "name", "prompt"),
    [
        ({}, "vlmevalkit", "TextVQA_VAL.tsv", f"What is it?{BRIEF}"),
        ({"hint": "Look."}, "vlmevalkit", "OCRBench.tsv", "What is it?"),
        ({"hint": "Look."}, "plain", "TextVQA_VAL.tsv", "What is it?"),
        (
            {"hint": "Look.", "options": {"A": "cat", "B": "dog"}, "answer": "A"},
            "plain",
            "x.tsv",
            "What is it?\nA. cat\nB. dog",
        ),
    ],
)
def test_other_prompts(cells: dict[str, Any], style: str, name: str, prompt: str) -> None:
    assert read_question(a_row(**cells), "auto", style, name).prompt == prompt


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("TextVQA_VAL.tsv", "vqa"),
        ("ChartQA_TEST.tsv", "relaxed"),
        ("docvqa_val.tsv", "anls"),
        ("InfoVQA_VAL.tsv", "anls"),
        ("OCRBench.tsv", "contains"),
        ("OCRVQA_TEST.tsv", "exact"),
        ("mine.tsv", "exact"),
    ],
)
def test_auto_goes_by_the_name(name: str, metric: str) -> None:
    assert metric_by_name(name) == metric
    assert read_question(a_row(), "auto", "plain", name).metric == metric
    assert is_brief(name) == (name != "OCRBench.tsv")


def test_a_list_of_accepted_answers_is_read() -> None:
    question = read_question(a_row(answer="['dog', \"hound's\"]"), "auto", "plain", "a.tsv")
    assert question.accepted == ("dog", "hound's")
    assert [question.score(answer) for answer in ("Dog", "hound's", "cat")] == [1, 1, 0]


@pytest.mark.parametrize(
    ("cells", "metric", "said"),
    [
        ({"answer": ""}, "auto", "the row has no answer"),
        ({"answer": "[]"}, "auto", "the list of answers is empty"),
        ({"answer": "['a', ['b']]"}, "exact", "cannot be read"),
        ({}, "choice", "the row has no options"),
        ({"options": {"A": "cat"}, "answer": "B"}, "auto", "none of the options"),
        ({"options": {"A": "cat"}, "answer": "x" * 9999}, "auto", "none of the options"),
    ],
)
def test_questions_without_a_usable_answer_are_refused(
    cells: dict[str, Any], metric: str, said: str
) -> None:
    with pytest.raises(DatasetError, match=said) as caught:
        read_question(a_row(**cells), metric, "plain", "a.tsv")
    assert len(str(caught.value)) < 200


def test_rows_are_asked_and_scored_in_order(faked: Fake, tmp_path: Path) -> None:
    path = rows_in(
        tmp_path,
        [
            row(1, answer="One", category="x"),
            row(2, A="red", B="blue", answer="B", category="y"),
            row(3, answer="['Two.', 'Three.']", category="x"),
        ],
    )
    asked = says(faked, "one", "The answer is (B).", "Four.")
    got = outcomes(faked[0], path, Settings(prompt="plain"))
    assert [(one.index, one.metric, one.score) for one in got] == [
        ("1", "exact", 1),
        ("2", "choice", 1),
        ("3", "exact", 0),
    ]
    assert [one.answer for one in got] == ["one", "The answer is (B).", "Four."]
    assert got[1].prompt == "What is it?\nA. red\nB. blue"
    assert all(one.ttft_ms > 0 and one.tokens > 1 for one in got)
    # What the engine saw is the picture and behind it the prompt.
    model = faked[0]
    for one, held in zip(got, asked, strict=True):
        text = prompt_ids(model, user(one.prompt))
        assert sum(number < 0 for number in held) > 0
        assert [int(number) for number in held[-5:]] == text[-5:]


def test_several_pictures_stand_before_the_text(faked: Fake, tmp_path: Path) -> None:
    images = [encoded_picture(seed) for seed in (1, 2)]
    path = rows_in(tmp_path, [row(1, image=str(images)), row(2, image=images[0])])
    asked = says(faked)
    both, one = outcomes(faked[0], path)
    assert (both.error, one.error) == (None, None)
    count = [sum(number < 0 for number in held) for held in asked]
    assert count[0] == 2 * count[1] > 0
    places = [place for place, number in enumerate(asked[0]) if number < 0]
    text = faked[0].tokenizer.encode("What is it?")
    assert places[-1] < len(asked[0]) - len(text)


def test_rows_with_the_same_picture_encode_it_once(faked: Fake, tmp_path: Path) -> None:
    image = encoded_picture(77)
    path = rows_in(tmp_path, [row("a", image=image), row("b", image="a"), row("c", image=image)])
    says(faked)
    outcomes(faked[0], path, limit=1)
    assert faked[1].tiles
    faked[0].pictures = PictureCache()
    once = len(faked[1].tiles)
    says(faked)
    outcomes(faked[0], path)
    assert len(faked[1].tiles) == once


def test_what_one_row_lacks_is_told_and_the_next_are_asked(faked: Fake, tmp_path: Path) -> None:
    bomb = bytearray(png(picture(8, 8)))
    bomb[16:24] = (100_000).to_bytes(4, "big") * 2  # width and height in the header
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    capacity = faked[1].capacity
    path = rows_in(
        tmp_path,
        [
            row("bomb", image=base64_of(bytes(bomb))),
            row("text", image=base64_of(b"this is no picture, but too long for a row's name" * 2)),
            row("forward", image="good"),
            row("long", question="dog " * capacity),
            row("special", question="<image> what?"),
            row("answer", answer=""),
            row("good", answer="Yes"),
        ],
    )
    says(faked, "Yes")
    got = {one.index: one for one in outcomes(faked[0], path)}
    errors = {index: one.error for index, one in got.items()}
    assert errors.pop("good") is None
    assert got["good"].score == 1
    assert all(error and "\n" not in error for error in errors.values())
    assert "too large" in str(errors["bomb"])
    assert "not a picture" in str(errors["text"])
    assert "reference to no row" in str(errors["forward"])
    assert "does not fit the context" in str(errors["long"])


def test_the_limit_counts_rows(faked: Fake, tmp_path: Path) -> None:
    path = rows_in(tmp_path, [row(1, question=""), row(2), row(3), row(4)])
    says(faked)
    assert [one.index for one in outcomes(faked[0], path, limit=3)] == ["1", "2", "3"]


def run_with_answers(
    model: Model,
    path: Path,
    answers: Path,
    settings: Settings = DEFAULT,
    limit: int | None = None,
) -> list[Outcome]:
    with Dataset(path) as dataset:
        run = run_digest(model.bundle, dataset, settings)
        with AnswerFile(answers, run) as file:
            return list(evaluate(model, dataset, settings, file, limit))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [
        row(n, answer=f"{n}", image=encoded_picture(n % 2), category="ab"[n % 2]) for n in range(5)
    ]
    rows[3]["question"] = ""
    return rows_in(tmp_path, rows)


def test_answers_are_a_line_of_json_a_row(faked: Fake, questions: Path, tmp_path: Path) -> None:
    says(faked, "0", "no", "2", "4")
    got = run_with_answers(faked[0], questions, tmp_path / "a.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == ["0", "1", "2", "3", "4"]
    assert [line.get("score") for line in lines] == [1, 0, 1, None, 1]
    assert lines[1]["answer"] == "no"
    assert lines[1]["accepted"] == ["1"]
    assert lines[1]["prompt"] == got[1].prompt
    assert "no question" in lines[3]["error"]


@pytest.mark.parametrize("cut", [0, 1, 30])
def test_a_later_run_goes_on_behind_the_last_complete_line(
    faked: Fake, questions: Path, tmp_path: Path, cut: int
) -> None:
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    texts = ["0", "no", "2", "4"]
    says(faked, *texts)
    wanted = run_with_answers(faked[0], questions, whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    for kept in range(6):
        rest = lines[kept][:cut] if kept < 5 else b""
        part.write_bytes(b"".join(lines[:kept]) + rest)
        answered = kept - (kept > 3)
        asked = says(faked, *texts[answered:])
        got = run_with_answers(faked[0], questions, part)
        assert len(asked) == 4 - answered
        assert [one.was_read for one in got] == [n < kept for n in range(5)]
        for key in ("index", "answer", "score", "groups", "error", "accepted", "metric"):
            assert [getattr(one, key) for one in got] == [getattr(one, key) for one in wanted]
        assert [json.loads(line)["index"] for line in part.read_bytes().splitlines()] == [
            json.loads(line)["index"] for line in lines
        ]


def test_a_smaller_limit_leaves_the_other_answers_alone(
    faked: Fake, questions: Path, tmp_path: Path
) -> None:
    answers = tmp_path / "a.jsonl"
    says(faked)
    run_with_answers(faked[0], questions, answers)
    before = answers.read_bytes()
    asked = says(faked)
    got = run_with_answers(faked[0], questions, answers, limit=2)
    assert (len(got), asked, answers.read_bytes()) == (2, [], before)


def change_setting(path: Path, answers: Path) -> Settings:
    return Settings(max_new_tokens=3)


def change_metric(path: Path, answers: Path) -> Settings:
    return Settings(metric="anls")


def change_row(path: Path, answers: Path) -> Settings:
    path.write_text(path.read_text().replace("What is it?", "Who is it?"))
    return Settings()


def change_header(path: Path, answers: Path) -> Settings:
    path.write_text(path.read_text().replace('"category"', '"l2-category"'))
    return Settings()


def swap_lines(path: Path, answers: Path) -> Settings:
    one, two, *rest = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join([two, one, *rest]))
    return Settings()


def break_json(path: Path, answers: Path) -> Settings:
    answers.write_text(answers.read_text().replace(', "answer": ', ', "answer" ', 1))
    return Settings()


def drop_score(path: Path, answers: Path) -> Settings:
    answers.write_text(answers.read_text().replace('"score"', '"skore"', 1))
    return Settings()


def huge_score(path: Path, answers: Path) -> Settings:
    answers.write_text(answers.read_text().replace('"score": 0.0', '"score": 1e9', 1))
    return Settings()


def other_file(path: Path, answers: Path) -> Settings:
    answers.write_text("my thesis, chapter one")
    return Settings()


def other_lines(path: Path, answers: Path) -> Settings:
    answers.write_text('{"a": 1}\n' * 3)
    return Settings()


@pytest.mark.parametrize(
    "change",
    [
        change_setting,
        change_metric,
        change_row,
        change_header,
        swap_lines,
        break_json,
        drop_score,
        huge_score,
        other_file,
        other_lines,
    ],
)
def test_answers_of_anything_else_are_refused_and_kept(
    faked: Fake, questions: Path, tmp_path: Path, change: Any
) -> None:
    answers = tmp_path / "a.jsonl"
    says(faked)
    run_with_answers(faked[0], questions, answers)
    settings = change(questions, answers)
    before = answers.read_bytes()
    with pytest.raises(DatasetError, match="cannot be continued") as caught:
        run_with_answers(faked[0], questions, answers, settings)
    assert str(answers) in str(caught.value)
    assert answers.read_bytes() == before


def test_answers_in_a_folder_that_is_not_there_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "a.jsonl"):
        with pytest.raises(DatasetError):
            AnswerFile(path, "00")


def test_an_interrupt_leaves_complete_lines(faked: Fake, questions: Path, tmp_path: Path) -> None:
    answers = tmp_path / "a.jsonl"
    says(faked)

    def interrupt(count: int) -> None:
        if count > 2:
            raise KeyboardInterrupt

    faked[1].on_run = interrupt
    with pytest.raises(KeyboardInterrupt):
        run_with_answers(faked[0], questions, answers)
    lines = answers.read_bytes()
    assert lines.endswith(b"\n")
    assert lines.count(b"\n") == 2
    asked = says(faked)
    got = run_with_answers(faked[0], questions, answers)
    assert len(got) == 5
    assert len(asked) == 2  # the fourth row has no question


def test_a_summary_adds_up() -> None:
    summary = Summary()
    for n in range(4):
        groups = (("category", "ab"[n % 2]),)
        summary.add(
            Outcome(
                n, str(n), groups=groups, metric="exact", score=n / 4, tokens=5, ttft_ms=10.0 * n,
                decode_ms=2.0, finish_reason="length" if n == 3 else "stop",
            )
        )  # fmt: skip
    summary.add(Outcome(9, None, error="broken", was_read=True))
    told = summary.document()
    assert (told["rows"], told["answered"], told["resumed"], told["cut_answers"]) == (5, 4, 1, 1)
    assert told["score"] == 37.5
    assert told["groups"] == {
        "category": {"a": {"rows": 2, "score": 25.0}, "b": {"rows": 2, "score": 50.0}}
    }
    assert told["bad_rows"] == {
        "count": 1,
        "listed": [{"line": 9, "index": None, "reason": "broken"}],
    }
    assert told["mean_ttft_ms"] == 15
    assert told["decode_tokens_per_s"] == 2000


def test_a_summary_stays_small_whatever_a_file_holds() -> None:
    summary = Summary()
    for n in range(3000):
        summary.add(Outcome(n, None, error="broken"))
        summary.add(Outcome(n, str(n), groups=(("split", str(n)),), metric="exact", score=1.0))
    assert len(summary.listed) == 100
    assert summary.bad_rows == 3000
    assert len(summary.groups["split"]) == 1001
    assert summary.groups["split"][OTHER].rows == 2000
    assert Summary().document()["score"] is None


def test_a_trained_model_scores_what_it_scores_otherwise(model: Model, tmp_path: Path) -> None:
    # The same questions asked through the Python interface, compared by hand.
    rows, wanted = [], []
    for n in range(18):
        sample = draw_sample(HELD_OUT, n, WORDS)
        path = tmp_path / "picture.png"
        sample.scene.image.save(path)
        question = sample.question
        answer = model.generate(Image.open(path), question.text, max_new_tokens=12).result()
        wanted.append(answer.text.strip().lower() == question.answer.lower())
        image = base64_of(path.read_bytes())
        rows.append(row(n, image=image, question=question.text, answer=question.answer))
    settings = Settings(prompt="plain", max_new_tokens=12)
    got = outcomes(model, rows_in(tmp_path, rows), settings)
    assert [one.error for one in got] == [None] * 18
    assert [one.score for one in got] == wanted
    assert sum(wanted) > 14
