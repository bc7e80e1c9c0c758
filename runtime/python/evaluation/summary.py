"""Adds up what became of the rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lorgnette.runtime.evaluation.run import Outcome

MAX_LISTED = 100
"""Rows that could not be used, of which the reason is kept; the others are only counted."""
MAX_VALUES = 1000
"""Values of a column that are told apart; later ones count as `OTHER`."""
OTHER = "(others)"


@dataclass(slots=True)
class Score:
    """A mean score in the making."""

    rows: int = 0
    total: float = 0.0

    def add(self, score: float) -> None:
        """Counts a row."""
        self.rows += 1
        self.total += score

    @property
    def percent(self) -> float | None:
        """The mean in percent, None before the first row."""
        return 100 * self.total / self.rows if self.rows else None


@dataclass
class Summary:
    """Scores, counts and times of the rows so far.

    Attributes:
        overall: The score of all rows that could be used.
        metrics: The same by metric.
        groups: The same by column and value.
        bad_rows: Rows that could not be used; they count in no score.
        listed: The first of those.
        resumed: Rows taken from an earlier run's answers.
        cut: Answers that ended at the most tokens or with the context full.
    """

    overall: Score = field(default_factory=Score)
    metrics: dict[str, Score] = field(default_factory=dict)
    groups: dict[str, dict[str, Score]] = field(default_factory=dict)
    bad_rows: int = 0
    listed: list[Outcome] = field(default_factory=list)
    resumed: int = 0
    cut: int = 0
    _ttft_ms: float = 0.0
    _decode_ms: float = 0.0
    _steps: int = 0

    @property
    def rows(self) -> int:
        """Rows that were looked at."""
        return self.overall.rows + self.bad_rows

    @property
    def mean_ttft_ms(self) -> float | None:
        """Mean time to the first token."""
        return self._ttft_ms / self.overall.rows if self.overall.rows else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens behind the first ones by the time that they took."""
        return self._steps / self._decode_ms * 1e3 if self._decode_ms else None

    def add(self, outcome: Outcome) -> None:
        """Counts a row."""
        self.resumed += outcome.was_read
        if outcome.error is not None:
            self.bad_rows += 1
            if len(self.listed) < MAX_LISTED:
                self.listed.append(outcome)
            return
        self.overall.add(outcome.score)
        self.metrics.setdefault(outcome.metric, Score()).add(outcome.score)
        for column, value in outcome.groups:
            values = self.groups.setdefault(column, {})
            known = value in values or len(values) < MAX_VALUES
            values.setdefault(value if known else OTHER, Score()).add(outcome.score)
        self.cut += outcome.finish_reason in ("length", "context_full")
        self._ttft_ms += outcome.ttft_ms
        self._decode_ms += outcome.decode_ms
        self._steps += max(outcome.tokens - 1, 0)

    def document(self) -> dict[str, Any]:
        """Everything as JSON."""
        return {
            "rows": self.rows,
            "answered": self.overall.rows,
            "resumed": self.resumed,
            "score": _rounded(self.overall.percent),
            "metrics": {name: _described(score) for name, score in self.metrics.items()},
            "groups": {
                column: {value: _described(values[value]) for value in sorted(values)}
                for column, values in self.groups.items()
            },
            "bad_rows": {
                "count": self.bad_rows,
                "listed": [
                    {"line": row.line, "index": row.index, "reason": row.error}
                    for row in self.listed
                ],
            },
            "cut_answers": self.cut,
            "mean_ttft_ms": _rounded(self.mean_ttft_ms),
            "decode_tokens_per_s": _rounded(self.decode_tokens_per_s),
        }


def _described(score: Score) -> dict[str, Any]:
    return {"rows": score.rows, "score": _rounded(score.percent)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
