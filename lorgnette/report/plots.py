"""Plots of the quality report, as SVG whose bytes depend on nothing but the numbers."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorgnette.quantize.quality import SampleQuality, TensorQuality

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart by nearly everyone. Source: Okabe and Ito, Color Universal Design, 2008."""
LEAST_KL = 1e-12
"""What is less, down to equality, is drawn here: the axis is logarithmic."""
BINS = 24
SIZE = (6.4, 3.0)
"""Inches."""
Spot = tuple[float, float]
"""Bytes and mean KL divergence in nats."""


def kl_by_position(samples: Sequence[SampleQuality]) -> bytes:
    """KL divergence at each token of the answers: mean and largest of all answers that long."""
    positions = list(zip_longest(*(sample.kl for sample in samples)))
    held = [[value for value in column if value is not None] for column in positions]
    at = range(1, len(held) + 1)

    def draw(axes: Axes) -> None:
        largest = [_at_least(max(column)) for column in held]
        mean = [_at_least(sum(column) / len(column)) for column in held]
        axes.plot(at, largest, "o-", color=COLOURS[1], markersize=4, label="largest")
        axes.plot(at, mean, "o-", color=COLOURS[0], markersize=4, label="mean")
        axes.set_yscale("log")
        axes.set_xlabel("token of the answer")
        axes.set_ylabel("KL divergence, nats")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)

    return svg(draw)


def kl_of_samples(samples: Sequence[SampleQuality]) -> bytes:
    """How many answers diverge how far on average, those that changed told apart."""
    sizes = [[np.log10(_at_least(sum(s.kl) / len(s.kl))) for s in samples if s.same == same]
             for same in (True, False)]  # fmt: skip
    every = [*sizes[0], *sizes[1]]
    low, high = min(every), max(every)

    def draw(axes: Axes) -> None:
        edges = np.linspace(low - 0.05, high + 0.05, BINS + 1)
        counts = [np.histogram(values, edges)[0] for values in sizes]
        width = edges[1] - edges[0]
        labels = ("same answer", "another answer")
        bottom = np.zeros(BINS)
        for count, colour, label in zip(counts, COLOURS, labels, strict=False):
            if count.any():
                axes.bar(edges[:-1], count, width, bottom, align="edge", color=colour, label=label)
            bottom = bottom + count
        axes.set_xlabel("mean KL divergence of an answer, nats, as a power of ten")
        axes.set_ylabel("answers")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)

    return svg(draw)


def sqnr_by_layer(tensors: Sequence[TensorQuality]) -> bytes:
    """Signal to rounding noise of each matrix; those outside of layers stand left of 0."""
    components = list(dict.fromkeys(tensor.component for tensor in tensors))

    def draw(axes: Axes) -> None:
        for number, component in enumerate(components):
            points = [
                (layer_of(tensor.name), tensor.sqnr_db)
                for tensor in tensors
                if tensor.component == component and tensor.sqnr_db is not None
            ]
            if points:
                # Components side by side, so that none hides another.
                aside = 0.14 * (number - (len(components) - 1) / 2)
                axes.scatter(
                    [layer + aside for layer, _ in points],
                    [value for _, value in points],
                    s=14,
                    color=COLOURS[number % len(COLOURS)],
                    label=label(component),
                )
        axes.set_xlabel("layer (-1: in none)")
        axes.set_ylabel("signal to noise, dB")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.collections:
            axes.legend(frameon=False, fontsize="small")

    return svg(draw)


def bytes_by_form(weight_bytes: Mapping[str, int]) -> bytes:
    """Megabytes of the weights by storage form, the largest first."""
    forms = sorted(weight_bytes, key=lambda form: (-weight_bytes[form], form))
    sizes = [weight_bytes[form] / 1e6 for form in forms]

    def draw(axes: Axes) -> None:
        bars = axes.barh([label(form) for form in forms], sizes, color=COLOURS[0], height=0.6)
        axes.bar_label(bars, [f"{size:.3g}" for size in sizes], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("MB")

    return svg(draw)


def frontier(line: Sequence[Spot], marked: Mapping[str, Spot]) -> bytes:
    """Bytes against loss: the best plans as predicted, and some that were measured."""

    def draw(axes: Axes) -> None:
        sizes = [size / 1e6 for size, _ in line]
        losses = [_at_least(loss) for _, loss in line]
        axes.plot(sizes, losses, ".-", color=COLOURS[0], linewidth=1, label="predicted")
        for number, (name, (size, loss)) in enumerate(marked.items(), start=1):
            colour = COLOURS[number % len(COLOURS)]
            axes.plot([size / 1e6], [_at_least(loss)], "D", color=colour, label=label(name))
        axes.set_yscale("log")
        axes.set_xlabel("weights, MB")
        axes.set_ylabel("KL divergence, nats")
        axes.legend(frameon=False, fontsize="small")

    return svg(draw)


def layer_of(name: str) -> int:
    """The number of the layer that a parameter belongs to, -1 where it belongs to none."""
    found = re.search(r"(?:^|\.)layers\.(\d{1,6})\.", name)
    return int(found[1]) if found else -1


def label(name: str) -> str:
    """A name from a file as a label: no formula, nothing that SVG could not hold."""
    return re.sub(r"[^ -~]", "?", name)[:40].replace("$", r"\$")


def _at_least(value: float) -> float:
    return max(value, LEAST_KL)


def svg(draw: Callable[[Axes], None], height: float = SIZE[1]) -> bytes:
    """Draws one pair of axes; a user's settings of matplotlib play no part.

    Args:
        draw: Draws on them.
        height: In inches.
    """
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams["svg.hashsalt"] = "lorgnette"  # names in the file would be random without
        figure = Figure(figsize=(SIZE[0], height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
