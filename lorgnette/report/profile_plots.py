"""Plots of a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from lorgnette.report.plots import COLOURS, label, svg
from lorgnette.runtime.profile.compare import Row
from lorgnette.runtime.profile.document import Answer, Figure, Memory, OperatorPhase, Threads

PARTS = ("preprocess", "vision", "prefill", "rest")
LARGEST = 12
"""Groups of operators that are drawn."""
MOST_RATIO = 1e4
"""Larger ratios are drawn as this."""


def first_token(answers: Mapping[str, Answer]) -> bytes:
    """What the first token's time consists of."""
    known = {name: answer for name, answer in answers.items() if answer.ttft_ms.median is not None}
    names = [f"{answer.tiles} tile{'s' if answer.tiles != 1 else ''}" for answer in known.values()]

    def draw(axes: Axes) -> None:
        left = [0.0] * len(names)
        for part, colour in zip(PARTS, COLOURS, strict=False):
            widths = [getattr(each, f"{part}_ms").median or 0.0 for each in known.values()]
            axes.barh(names, widths, left=left, height=0.5, color=colour, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel("ms until the first token")
        if names:
            axes.legend(frameon=False, ncols=len(PARTS))

    return svg(draw)


def bars(figures: Mapping[str, Figure], unit: str) -> bytes:
    """Medians with p10 to p90."""
    known = {name: figure for name, figure in figures.items() if figure.median is not None}
    names = [label(name) for name in known]
    medians = [figure.median or 0.0 for figure in known.values()]
    below = [max((f.median or 0.0) - (f.p10 or 0.0), 0.0) for f in known.values()]
    above = [max((f.p90 or 0.0) - (f.median or 0.0), 0.0) for f in known.values()]

    def draw(axes: Axes) -> None:
        axes.barh(names, medians, xerr=[below, above], color=COLOURS[0], height=0.5, capsize=3)
        axes.invert_yaxis()
        axes.set_xlabel(f"{unit}; lines from p10 to p90")

    return svg(draw)


def memory_by_phase(memory: Mapping[str, Memory]) -> bytes:
    """Peaks, and what is left at the end of a phase."""
    names = [label(name.replace("_", " ")) for name in memory]

    def draw(axes: Axes) -> None:
        for offset, field, colour, text in (
            (-0.2, "peak_bytes", COLOURS[0], "peak"),
            (0.2, "steady_bytes", COLOURS[4], "at the end"),
        ):
            sizes = [(getattr(each, field) or 0) / 1e6 for each in memory.values()]
            places = [index + offset for index in range(len(names))]
            axes.barh(places, sizes, height=0.38, color=colour, label=text)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("MB resident")
        axes.legend(frameon=False, fontsize="small")

    return svg(draw)


def operators(phase: OperatorPhase) -> bytes:
    """The largest groups of an entry point."""
    groups = phase.groups[:LARGEST]
    names = [label(f"{g.operator} {g.module or ''}".strip()) for g in groups]

    def draw(axes: Axes) -> None:
        places = range(len(groups))
        axes.barh(places, [100 * group.share for group in groups], color=COLOURS[2], height=0.7)
        axes.set_yticks(places, names, fontsize="x-small")
        axes.invert_yaxis()
        axes.set_xlabel("% of the time in operators")

    return svg(draw)


def threads(sweep: Mapping[str, Threads]) -> bytes:
    """How much faster more threads are than the fewest, figure by figure."""
    counts = sorted(sweep, key=int)
    lines = {
        "first token, 1 tile": [_rate(sweep[count].ttft_tile_ms) for count in counts],
        "vision, 1 tile": [_rate(sweep[count].vision_tile_ms) for count in counts],
        "prefill 256": [sweep[count].prefill_256_tokens_per_s.median for count in counts],
        "decode 256": [sweep[count].decode_256_tokens_per_s.median for count in counts],
    }

    def draw(axes: Axes) -> None:
        for colour, (name, rates) in zip(COLOURS, lines.items(), strict=False):
            points = [(int(n), rate) for n, rate in zip(counts, rates, strict=True) if rate]
            if points:
                xs, ys = [x for x, _ in points], [y / points[0][1] for _, y in points]
                axes.plot(xs, ys, "o-", color=colour, label=name)
        axes.set_xticks([int(count) for count in counts])
        axes.set_xlabel("threads")
        axes.set_ylabel(f"speed, {counts[0] if counts else 1} = 1")
        if axes.lines:
            axes.legend(frameon=False, fontsize="small")

    return svg(draw)


def ratios(rows: Sequence[Row]) -> bytes:
    """A over B with what the spreads allow; figures outside the noise stand out."""
    known = [row for row in rows if row.ratio is not None]

    def draw(axes: Axes) -> None:
        for place, row in enumerate(known):
            ratio, low, high = (_drawable(each) for each in (row.ratio, row.low, row.high))
            colour = "#999999" if row.verdict == "inside the noise" else COLOURS[1]
            axes.plot([low, high], [place, place], color=colour, linewidth=1)
            axes.plot([ratio], [place], "o", color=colour, markersize=3)
        axes.axvline(1.0, color="#444444", linewidth=0.8)
        axes.set_yticks(range(len(known)), [label(row.name) for row in known], fontsize="x-small")
        axes.set_xscale("log")
        axes.margins(y=0.01)
        axes.invert_yaxis()
        axes.set_xlabel("A / B; lines: as the spreads allow")

    return svg(draw, height=max(3.0, 0.16 * len(known)))


def _drawable(ratio: float | None) -> float:
    """A ratio within what an axis can hold: documents come from anywhere."""
    return min(max(ratio or 1.0, 1 / MOST_RATIO), MOST_RATIO)


def _rate(figure: Figure) -> float | None:
    return 1 / figure.median if figure.median else None
