"""Asks a model every question of a file, one row after the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import lorgnette
from lorgnette.errors import DatasetError, ImageError, RequestError
from lorgnette.runtime.evaluation.answers import AnswerFile
from lorgnette.runtime.evaluation.questions import AUTO, read_question
from lorgnette.runtime.evaluation.tsv import BadRow, Dataset, Row

if TYPE_CHECKING:
    from lorgnette.bundle import Bundle
    from lorgnette.runtime.model import Model

MAX_NEW_TOKENS = 64
"""Tokens of an answer, unless said otherwise: the benchmarks want a word, a phrase or a letter."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How the questions are asked and scored; decoding is greedy.

    Attributes:
        metric: One of `questions.METRIC_NAMES`.
        prompt: One of `questions.PROMPTS`.
        max_new_tokens: The most tokens of an answer.
    """

    metric: str = AUTO
    prompt: str = "vlmevalkit"
    max_new_tokens: int = MAX_NEW_TOKENS


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a row.

    Attributes:
        line: Line of the file at which it begins, from 1.
        index: Its name in the file, where that could be read.
        error: Why it could not be used; the rest is empty then.
        was_read: Whether it comes from an earlier run's answers.
        groups: Its values in the columns that scores are told apart by.
        prompt: The text behind the pictures.
        answer: What the model said.
        accepted: The right answers.
        metric: How it was scored.
        score: From 0 to 1.
        tokens: Tokens of the answer, the stop token included.
        ttft_ms: Time to its first token.
        decode_ms: Time of the others.
        finish_reason: As in `generation.Result`.
    """

    line: int
    index: str | None
    error: str | None = None
    was_read: bool = False
    groups: tuple[tuple[str, str], ...] = ()
    prompt: str = ""
    answer: str = ""
    accepted: tuple[str, ...] = ()
    metric: str = ""
    score: float = 0.0
    tokens: int = 0
    ttft_ms: float = 0.0
    decode_ms: float = 0.0
    finish_reason: str = ""


def run_digest(bundle: Bundle, dataset: Dataset, settings: Settings) -> str:
    """What a run is known by: all that its answers depend on, but for the rows.

    The bundle's manifest holds the digests of all its files. The name of the questions counts
    because a metric may be chosen by it; the machine and its threads do not.
    """
    manifest = hashlib.sha256((bundle.path / "manifest.json").read_bytes()).hexdigest()
    parts = [lorgnette.__version__, manifest, dataset.path.name, dataset.header_digest]
    text = json.dumps([*parts, asdict(settings)], sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def evaluate(
    model: Model,
    dataset: Dataset,
    settings: Settings,
    answers: AnswerFile | None = None,
    limit: int | None = None,
) -> Iterator[Outcome]:
    """Asks and scores, row by row.

    Args:
        model: Who is asked.
        dataset: The questions.
        settings: How they are asked.
        answers: Where an earlier run's answers are taken from and new ones are written to.
        limit: The most rows.

    Raises:
        DatasetError: The answers belong to another run.
        LorgnetteError: The bundle fails; a row that fails comes as an outcome.
    """
    for row in islice(dataset.rows(), limit):
        if row.digest is None or answers is None:
            yield _ask(model, dataset, row, settings)
            continue
        stored = answers.take(row.digest)
        if stored is not None:
            yield _from_entry(row, stored)
            continue
        outcome = _ask(model, dataset, row, settings)
        answers.append(row.digest, _to_entry(outcome))
        yield outcome


def _ask(model: Model, dataset: Dataset, row: Row | BadRow, settings: Settings) -> Outcome:
    if isinstance(row, BadRow):
        return Outcome(row.line, row.index, error=row.reason)
    try:
        question = read_question(row, settings.metric, settings.prompt, dataset.path.name)
        pictures = dataset.pictures(row)
        asked = model.generate(pictures, question.prompt, max_new_tokens=settings.max_new_tokens)
        result = asked.result()
    except (DatasetError, ImageError, RequestError) as error:
        return Outcome(row.line, row.index, error=str(error))
    return Outcome(
        line=row.line,
        index=row.index,
        groups=tuple(row.groups.items()),
        prompt=question.prompt,
        answer=result.text,
        accepted=question.accepted,
        metric=question.metric,
        score=question.score(result.text),
        tokens=len(result.token_ids),
        ttft_ms=result.timings.ttft,
        decode_ms=result.timings.decode,
        finish_reason=result.finish_reason,
    )


def _to_entry(outcome: Outcome) -> dict[str, Any]:
    """An outcome as a line of the answers; what the row tells anyway is left out."""
    if outcome.error is not None:
        return {"index": outcome.index, "error": outcome.error}
    return {
        "index": outcome.index,
        "prompt": outcome.prompt,
        "answer": outcome.answer,
        "accepted": list(outcome.accepted),
        "metric": outcome.metric,
        "score": outcome.score,
        "tokens": outcome.tokens,
        "ttft_ms": round(outcome.ttft_ms, 3),
        "decode_ms": round(outcome.decode_ms, 3),
        "finish_reason": outcome.finish_reason,
    }


def _from_entry(row: Row | BadRow, entry: dict[str, Any]) -> Outcome:
    """What an earlier run found of a row."""
    if "error" in entry or isinstance(row, BadRow):
        return Outcome(row.line, row.index, error=entry.get("error", "unusable"), was_read=True)
    return Outcome(
        line=row.line,
        index=row.index,
        was_read=True,
        groups=tuple(row.groups.items()),
        prompt=entry["prompt"],
        answer=entry["answer"],
        accepted=tuple(entry["accepted"]),
        metric=entry["metric"],
        score=float(entry["score"]),
        tokens=int(entry["tokens"]),
        ttft_ms=float(entry["ttft_ms"]),
        decode_ms=float(entry["decode_ms"]),
        finish_reason=entry["finish_reason"],
    )
