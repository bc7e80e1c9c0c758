"""The quality report as one HTML file that needs nothing else: no network, no scripts.

Its text comes from checkpoints, questions and models: see `page` for what becomes of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorgnette.quantize.quality import QualityReport, QualitySummary, SampleQuality
from lorgnette.report import plots
from lorgnette.report.lines import PROMISE, summary_rows
from lorgnette.report.page import page, picture, table, text

WORST_SAMPLES = 5
WORST_TENSORS = 20


def render(report: QualityReport) -> bytes:
    """The report as a file; the same report gives the same bytes."""
    title = f"Quality of {report.checkpoint}, plan {report.plan}, target {report.target}"
    parts = [
        *_summary(report.summary),
        *_answers(report.samples),
        *_matrices(report),
        *_floats(report),
    ]
    return page(title, parts)


def _summary(summary: QualitySummary) -> list[str]:
    kept = summary.promise is None or summary.promise.kept
    rows = []
    for name, value in summary_rows(summary):
        mark = ""
        if name == PROMISE:
            mark = f' class="{"kept" if kept else "broken"}"'
        rows.append(f"<tr><th>{text(name)}</th><td{mark}>{text(value)}</td></tr>")
    return [
        "<p>The original answers in float32. The quantised model is fed that answer, and both "
        "distributions of the next token are compared at every token of it.</p>",
        "<table>",
        *rows,
        "</table>",
    ]


def _answers(samples: Sequence[SampleQuality]) -> list[str]:
    worst = sorted(samples, key=lambda sample: (sample.same, -max(sample.kl)))[:WORST_SAMPLES]
    rows = [
        (
            sample.name,
            sample.question,
            "" if sample.given is None else sample.given,
            sample.original,
            "the same" if sample.same else sample.answer,
            f"{max(sample.kl):.2e}",
        )
        for sample in worst
    ]
    head = ("picture", "question", "right answer", "original", "quantised", "largest KL")
    return [
        "<h2>KL divergence by token of the answer</h2>",
        picture(plots.kl_by_position(samples), "KL divergence by token"),
        "<h2>KL divergence by answer</h2>",
        picture(plots.kl_of_samples(samples), "histogram of KL divergence"),
        f"<h2>The worst {len(worst)} answers</h2>",
        *table(head, rows),
    ]


def _matrices(report: QualityReport) -> list[str]:
    parts = ["<h2>Rounding noise of each matrix</h2>"]
    if report.tensors:
        noisy = [t for t in report.tensors if t.sqnr_db is not None]
        noisy.sort(key=lambda t: t.sqnr_db or 0.0)
        rows = [
            (f"{t.component}/{t.name}", t.scheme, t.method, f"{t.sqnr_db:.2f}", f"{t.bytes:,}")
            for t in noisy[:WORST_TENSORS]
        ]
        parts += [
            picture(plots.sqnr_by_layer(report.tensors), "signal to noise by layer"),
            f"<p>The {len(rows)} noisiest of {len(report.tensors)} matrices:</p>",
            *table(("matrix", "scheme", "method", "dB", "bytes"), rows),
        ]
    else:
        parts.append(f"<p>Not measured: {text(report.tensors_left_out or 'no reason given')}.</p>")
    parts += [
        "<h2>Bytes of the weights by storage form</h2>",
        picture(plots.bytes_by_form(report.weight_bytes), "bytes by storage form"),
    ]
    return parts


def _floats(report: QualityReport) -> list[str]:
    rows = [(f"{t.component}/{t.name}", t.reason) for t in report.kept_in_float]
    shown = table(("matrix", "reason"), rows) if rows else ["<p>Nothing.</p>"]
    return ["<h2>What stayed float against the plan</h2>", *shown]
