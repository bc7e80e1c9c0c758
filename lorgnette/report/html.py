"""The quality report as one HTML file that needs nothing else: no network, no scripts.

Its text comes from checkpoints, questions and models: all of it is escaped, and the file forbids
a browser to load anything.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence

from lorgnette.quantize.quality import QualityReport, QualitySummary, SampleQuality
from lorgnette.report import plots
from lorgnette.report.lines import PROMISE, summary_rows

WORST_SAMPLES = 5
WORST_TENSORS = 20

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid #ddd; unicode-bidi: isolate; }
td { white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; } .kept { color: #00694a; } .broken { color: #a33b00; font-weight: bold; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# Controls, halves of surrogate pairs and what is no character: none may stand in a document.
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

Row = Sequence[str]


def render(report: QualityReport) -> bytes:
    """The report as a file; the same report gives the same bytes."""
    title = f"Quality of {report.checkpoint}, plan {report.plan}, target {report.target}"
    parts = [
        f"<h1>{text(title)}</h1>",
        *_summary(report.summary),
        *_answers(report.samples),
        *_matrices(report),
        *_floats(report),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en" xmlns="http://www.w3.org/1999/xhtml">',
            '<head><meta charset="utf-8"/>',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>',
            f"<title>{text(title)}</title>",
            f"<style>{_STYLE}</style></head>",
            "<body>",
            *parts,
            "</body>",
            "</html>",
            "",
        ]
    ).encode("utf-8")


def text(value: str) -> str:
    """Text of unknown origin as a piece of the document."""
    return html.escape(_UNSHOWN.sub("\N{REPLACEMENT CHARACTER}", value))


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
        _picture(plots.kl_by_position(samples), "KL divergence by token"),
        "<h2>KL divergence by answer</h2>",
        _picture(plots.kl_of_samples(samples), "histogram of KL divergence"),
        f"<h2>The worst {len(worst)} answers</h2>",
        *_table(head, rows),
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
            _picture(plots.sqnr_by_layer(report.tensors), "signal to noise by layer"),
            f"<p>The {len(rows)} noisiest of {len(report.tensors)} matrices:</p>",
            *_table(("matrix", "scheme", "method", "dB", "bytes"), rows),
        ]
    else:
        parts.append(f"<p>Not measured: {text(report.tensors_left_out or 'no reason given')}.</p>")
    parts += [
        "<h2>Bytes of the weights by storage form</h2>",
        _picture(plots.bytes_by_form(report.weight_bytes), "bytes by storage form"),
    ]
    return parts


def _floats(report: QualityReport) -> list[str]:
    rows = [(f"{t.component}/{t.name}", t.reason) for t in report.kept_in_float]
    shown = _table(("matrix", "reason"), rows) if rows else ["<p>Nothing.</p>"]
    return ["<h2>What stayed float against the plan</h2>", *shown]


def _table(head: Row, rows: Sequence[Row]) -> list[str]:
    def line(cells: Row, tag: str) -> str:
        inside = "".join(f"<{tag}>{text(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    return ["<table>", line(head, "th"), *(line(row, "td") for row in rows), "</table>"]


def _picture(svg: bytes, name: str) -> str:
    """A plot as an image of its own: names inside several SVGs would clash in one document."""
    data = base64.b64encode(svg).decode("ascii")
    return f'<p><img alt="{text(name)}" src="data:image/svg+xml;base64,{data}"/></p>'
