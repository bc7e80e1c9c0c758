"""Runs to figures: how often something is repeated, and what is told of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from lorgnette.runtime.profile.document import Figure

LEAST_RUNS = 3
"""However long they take, but see `FAR_TOO_LONG`."""
FAR_TOO_LONG = 10.0
"""A run that takes so many times what all may take is not repeated."""


def figure(samples: Sequence[float]) -> Figure:
    """Percentiles of runs, by linear interpolation."""
    p10, median, p90 = (float(value) for value in np.percentile(samples, (10, 50, 90)))
    low = float(min(samples))
    return Figure(median=median, p10=p10, p90=p90, min=low, runs=len(samples))


def rates(samples_ms: Sequence[float], count: int) -> Figure:
    """Things a second, of runs that took so many milliseconds for `count` of them."""
    return figure([count / max(ms, 1e-6) * 1e3 for ms in samples_ms])


def unknown(reason: str) -> Figure:
    """A figure that could not be measured."""
    return Figure(median=None, p10=None, p90=None, min=None, runs=0, reason=reason)


def spread(of: Figure) -> float | None:
    """p90 over p10; None where that says nothing."""
    if of.p10 is None or of.p90 is None or of.p10 <= 0:
        return None
    return of.p90 / of.p10


def timed(run: Callable[[], object]) -> float:
    """Milliseconds of one run."""
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def repeat(
    run: Callable[[], float],
    runs: int,
    seconds: float,
    between: Callable[[], object] = lambda: None,
) -> list[float]:
    """Repeats a run after one that does not count, unless that one is long.

    Args:
        run: Gives what one run took, in milliseconds.
        runs: The most that count.
        seconds: After these no run is begun, if there were three. A first run that takes longer
            counts, and where it takes ten times as long, it is the only one.
        between: Called before each run but the first.

    Returns:
        Milliseconds of each run that counts.
    """
    started = time.perf_counter()
    first = run()
    samples = [first] if first > seconds * 1e3 else []
    if first > seconds * 1e3 * FAR_TOO_LONG:
        return samples
    if not samples:
        started = time.perf_counter()
    while len(samples) < runs:
        if len(samples) >= LEAST_RUNS and time.perf_counter() - started > seconds:
            break
        between()
        samples.append(run())
    return samples
