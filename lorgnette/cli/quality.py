"""What `lorgnette verify --quality` does: how far a bundle's answers are from the original's."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from lorgnette.cli.output import fail, print_json, printable, require_extra, table
from lorgnette.errors import BundleError, LorgnetteError, VerifyError
from lorgnette.report.lines import promise_text, summary_rows

if TYPE_CHECKING:
    from lorgnette.bundle import Bundle
    from lorgnette.export.check import Parts
    from lorgnette.manifest import QualitySummary
    from lorgnette.quantize.quality import QualityReport, TensorQuality
    from lorgnette.quantize.samples import Sample

COUNT = 64
"""Samples that are measured, unless said otherwise: of each, rows of logits are held in memory."""
PROGRESS_S = 0.2
"""Shortest time between two changes of the line of progress."""


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
        samples: A set of samples; None takes the one that comes with the package.
        count: The first so many of them.
        html: Where the report for people goes; None writes none.
    """

    samples: Path | None
    count: int | None
    html: Path | None


def show_recorded(bundle: Bundle, as_json: bool) -> None:
    """Prints what the export measured.

    Raises:
        BundleError: It measured nothing.
    """
    summary = bundle.manifest.quality
    if summary is None:
        raise BundleError(
            "the bundle records no quality",
            where=bundle.path,
            hint="measure it with --against CHECKPOINT",
        )
    document = {
        "bundle": str(bundle.path),
        "against": None,
        "quality": msgspec.to_builtins(summary),
        "kept_in_float": {entry.name: entry.kept_in_float for entry in bundle.manifest.components},
    }
    _leave(bundle, summary, document, as_json)


def measure(
    bundle: Bundle,
    checkpoint: Path,
    read: Callable[[], Parts],
    request: Request,
    as_json: bool,
) -> None:
    """Measures a bundle against its checkpoint and prints what came out.

    Args:
        bundle: The bundle.
        checkpoint: The checkpoint's path, for the document.
        read: Reads it.
        request: What is to be measured.
        as_json: Whether a document is printed in place of lines.

    Raises:
        LorgnetteError: The samples cannot be read, or an optional part is not installed.
    """
    require_extra("export")
    samples, sample_set = _read_samples(request)
    from lorgnette.export.quality import measure_bundle, original_answers, summarise
    from lorgnette.export.quality_report import make_report
    from lorgnette.quantize.plan_file import plan_for
    from lorgnette.runtime.model import Model

    parts = read()
    with counting("original answers") as tell:
        answers = original_answers(parts, samples, sample_set=sample_set, tell=tell)
    plan = plan_for(bundle.manifest.recipe)
    tensors, left_out = _tensors(bundle, parts)
    # The checkpoint is mapped into memory: it goes before the engine's copy of it comes.
    del parts
    model = Model(bundle)
    with counting("bundle answers") as tell:
        measured = measure_bundle(model, answers, tell)
    summary = summarise(measured, answers, plan.promise)
    report = make_report(bundle.manifest, answers, measured, summary, tensors, left_out)
    if request.html is not None:
        from lorgnette.report.html import render

        request.html.write_bytes(render(report))
    document = {
        "bundle": str(bundle.path),
        "against": str(checkpoint),
        "html": request.html and str(request.html),
        **_document(report),
    }
    _leave(bundle, summary, document, as_json)


def _read_samples(request: Request) -> tuple[tuple[Sample, ...], str]:
    """The samples of a request and the name of their set; checks what else it needs."""
    from lorgnette.quantize.samples import default_samples, read_samples, split_samples

    if request.html is not None:
        require_extra("report")
        if not request.html.absolute().parent.is_dir():
            raise LorgnetteError("no such folder", where=request.html.parent)
    count = request.count or COUNT
    if request.samples is not None:
        return read_samples(request.samples, count), request.samples.resolve().name
    _, kept = split_samples(read_samples(default_samples()))  # exports calibrate with the others
    return kept[:count], "default"


def _tensors(bundle: Bundle, parts: Parts) -> tuple[tuple[TensorQuality, ...], str | None]:
    """Errors of the bundle's matrices: as recorded, or computed where that is possible."""
    from lorgnette.export.quality_report import plan_tensors, read_tensors
    from lorgnette.quantize.plan_file import plan_for

    recorded = read_tensors(bundle)
    if recorded is not None:
        return recorded, None if recorded else "no matrix is rounded to integers"
    return plan_tensors(parts, plan_for(bundle.manifest.recipe), bundle.manifest)


def _document(report: QualityReport) -> dict[str, Any]:
    """The report as JSON, its summary as the manifest has it."""
    built: dict[str, Any] = msgspec.to_builtins(report)
    return {"quality": built.pop("summary"), **built}


def _leave(
    bundle: Bundle, summary: QualitySummary, document: dict[str, Any], as_json: bool
) -> None:
    """Prints what came out, and fails where the promise of the bundle's plan is broken."""
    if not as_json:
        click.echo(printable("\n".join(table(summary_rows(summary), indent=""))))
        for entry in bundle.manifest.components:
            for name, reason in entry.kept_in_float.items():
                click.echo(printable(f"{entry.name}/{name} stayed float: {reason}"))
    promise = summary.promise
    if promise is not None and not promise.kept:
        error = VerifyError(
            "the promise of the plan is broken",
            where=bundle.path,
            got=f"mean KL divergence {summary.kl_mean:.3g}, same answer {summary.same_answer:.2%}",
            wanted=promise_text(promise).removesuffix(": broken"),
        )
        fail(error, as_json, document)
    if as_json:
        print_json(document)


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Keeps one line on a terminal's stderr up to date; says nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, of: None
        return
    told = 0.0

    def tell(done: int, of: int) -> None:
        nonlocal told
        now = time.perf_counter()
        if now - told >= PROGRESS_S or done == of:
            told = now
            click.echo(f"\r{what} {done} of {of}", err=True, nl=False)

    try:
        yield tell
    finally:
        click.echo(err=True)
