"""`lorgnette evaluate`: a public benchmark on a bundle."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorgnette.cli.output import Command, fail, print_json, printable, steps, table
from lorgnette.errors import EXIT_CHECK_FAILED, EXIT_INTERRUPTED, DatasetError
from lorgnette.runtime.evaluation.questions import AUTO, METRIC_NAMES, PROMPTS, metric_by_name

if TYPE_CHECKING:
    from lorgnette.runtime.evaluation.answers import AnswerFile
    from lorgnette.runtime.evaluation.run import Settings
    from lorgnette.runtime.evaluation.summary import Summary
    from lorgnette.runtime.evaluation.tsv import Dataset
    from lorgnette.runtime.model import Model

SHOWN_ROWS = 20
"""Rows that could not be used, of which the reason is printed."""
SHOWN_VALUES = 60
"""Values of a column of which the score is printed; JSON has more."""
PROGRESS_S = 0.2
"""Shortest time between two lines of progress."""


class UnusableRowsError(DatasetError):
    """Rows could not be used, which was not to be skipped in silence."""

    exit_code = EXIT_CHECK_FAILED


@click.command(cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("questions", type=click.Path(path_type=Path), metavar="FILE.tsv")
@click.option(
    "--metric",
    type=click.Choice(METRIC_NAMES),
    default=AUTO,
    show_default=True,
    help="How answers are scored; auto goes by options and by the file's name.",
)
@click.option(
    "--prompt",
    type=click.Choice(PROMPTS),
    default=PROMPTS[0],
    show_default=True,
    help="VLMEvalKit's default wording, or the question and its options alone.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first rows.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True)
@click.option(
    "--answers",
    type=click.Path(path_type=Path),
    metavar="OUT.jsonl",
    help="Write every answer there; goes on where an earlier run of the same stopped.",
)
@click.option("--skip-bad", is_flag=True, help="Rows that cannot be used are no failure.")
@click.option("--threads", type=int, help="Threads of the engine.  [every core]")
def evaluate(
    bundle: Path,
    questions: Path,
    metric: str,
    prompt: str,
    limit: int | None,
    max_new_tokens: int,
    answers: Path | None,
    skip_bad: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Asks BUNDLE the questions of a benchmark in VLMEvalKit's TSV format and scores the answers.

    Rows are read one at a time, pictures included; decoding is greedy. Exits with 1 where rows
    could not be used. Ctrl-C prints what is known so far.
    """
    from lorgnette.bundle import open_bundle
    from lorgnette.runtime.evaluation.answers import AnswerFile
    from lorgnette.runtime.evaluation.run import Settings, run_digest
    from lorgnette.runtime.evaluation.tsv import Dataset
    from lorgnette.runtime.generation import Request
    from lorgnette.runtime.model import Model

    settings = Settings(metric, prompt, max_new_tokens)
    Request(max_new_tokens)  # refuses a length that no answer can have
    with Dataset(questions) as dataset:
        opened = open_bundle(bundle)
        run = run_digest(opened, dataset, settings)
        with nullcontext() if answers is None else AnswerFile(answers, run) as file:
            with steps() as progress:
                progress("open bundle")
                model = Model(opened, threads)
            work = _Work(model, dataset, settings, limit)
            ended_by = work.do(file)
    document = {**work.document(), "ended_by": ended_by, "answers": answers and str(answers)}
    if not as_json:
        click.echo("\n".join(map(printable, work.lines())))
    _leave(work.summary, document, questions, skip_bad, as_json)


class _Work:
    """The rows of one file and what became of them."""

    def __init__(
        self, model: Model, dataset: Dataset, settings: Settings, limit: int | None
    ) -> None:
        from lorgnette.runtime.evaluation.summary import Summary

        self.summary = Summary()
        self._model = model
        self._dataset = dataset
        self._settings = settings
        self._limit = limit

    def do(self, answers: AnswerFile | None) -> str:
        """Goes through the rows; tells what ended that: end, limit, damage or interrupt."""
        from lorgnette.runtime.evaluation.run import evaluate as outcomes

        rows = outcomes(self._model, self._dataset, self._settings, answers, self._limit)
        with _progress_line() as tell:
            try:
                for outcome in rows:
                    self.summary.add(outcome)
                    tell(self.summary, self._dataset.read_bytes / self._dataset.size_bytes)
            except KeyboardInterrupt:
                return "interrupt"
        if self._dataset.is_cut:
            return "damage"
        return "limit" if self.summary.rows == self._limit else "end"

    def document(self) -> dict[str, Any]:
        """What was done and found, as JSON."""
        recipe = self._model.manifest.recipe
        return {
            "file": str(self._dataset.path),
            "bundle": {
                "path": str(self._model.bundle.path),
                "checkpoint": self._model.manifest.checkpoint,
                "target": recipe.target,
                "quant": recipe.quant,
            },
            "metric": self._settings.metric,
            "prompt": self._settings.prompt,
            "max_new_tokens": self._settings.max_new_tokens,
            "limit": self._limit,
            **self.summary.document(),
        }

    def lines(self) -> Iterator[str]:
        """The same for people."""
        summary, settings = self.summary, self._settings
        by_name = metric_by_name(self._dataset.path.name)
        auto = f" (choice where a row has options, else {by_name}, by the file's name)"
        yield f"metric {settings.metric}{auto if settings.metric == AUTO else ''}"
        rows: list[tuple[str, ...]] = [("", "rows", "score %")]
        rows.append(("all", str(summary.overall.rows), _percent(summary.overall.percent)))
        for name, score in summary.metrics.items():
            rows.append((f"metric {name}", str(score.rows), _percent(score.percent)))
        for column, values in summary.groups.items():
            for value in sorted(values)[:SHOWN_VALUES]:
                cells = (f"{column} {value[:60]}", str(values[value].rows))
                rows.append((*cells, _percent(values[value].percent)))
            if len(values) > SHOWN_VALUES:
                rows.append((f"{column}: {len(values) - SHOWN_VALUES} more, see --json",))
        yield from table(rows, indent="")
        yield _speed(summary)
        if summary.resumed:
            yield f"{summary.resumed} rows taken from an earlier run's answers"
        if summary.cut:
            yield f"{summary.cut} answers were cut off at their longest"
        yield f"{summary.bad_rows} rows could not be used"


def _leave(
    summary: Summary, document: dict[str, Any], path: Path, skip_bad: bool, as_json: bool
) -> None:
    """Prints what is left to print and exits, with 0 only where all is well."""
    for row in summary.listed[:SHOWN_ROWS]:
        name = "" if row.index is None else f", index {row.index}"
        click.echo(printable(f"row not used: line {row.line}{name}: {row.error}"), err=True)
    if summary.bad_rows > SHOWN_ROWS:
        click.echo(f"... and {summary.bad_rows - SHOWN_ROWS} more", err=True)
    context = click.get_current_context()
    if document["ended_by"] == "interrupt":
        if as_json:
            print_json(document)
        context.exit(EXIT_INTERRUPTED)
    error = None
    if summary.rows == 0:
        error = DatasetError("there are no rows", where=path)
    elif document["ended_by"] == "damage":
        error = UnusableRowsError("the file could not be read to its end", where=path)
    elif summary.overall.rows == 0 or (summary.bad_rows and not skip_bad):
        error = UnusableRowsError(
            "rows could not be used",
            where=path,
            got=f"{summary.bad_rows} of {summary.rows}",
            hint=None if summary.overall.rows == 0 else "--skip-bad leaves them out",
        )
    if error is not None:
        fail(error, as_json, document)
    if as_json:
        print_json(document)


@contextmanager
def _progress_line() -> Iterator[Any]:
    """Keeps one line on a terminal's stderr up to date; says nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    started = told = time.perf_counter()
    width = 0

    def tell(summary: Summary, done: float) -> None:
        nonlocal told, width
        now = time.perf_counter()
        if now - told < PROGRESS_S:
            return
        told = now
        score = _percent(summary.overall.percent)
        each = (now - started) / max(summary.rows, 1)
        line = f"row {summary.rows}, {done:.0%} of the file, score {score}, {each:.2f} s a row"
        click.echo(f"\r{line.ljust(width)}", err=True, nl=False)
        width = len(line)

    try:
        yield tell
    finally:
        if width:
            click.echo(err=True)


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _speed(summary: Summary) -> str:
    ttft, rate = summary.mean_ttft_ms, summary.decode_tokens_per_s
    first = "none" if ttft is None else f"{ttft:.0f} ms"
    return f"first token {first} on average, {'no' if rate is None else f'{rate:.1f}'} tokens/s"
