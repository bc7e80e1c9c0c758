"""Two profiles side by side: which differences are larger than the noise."""

from __future__ import annotations

from typing import Literal

import msgspec

from lorgnette.runtime.profile.document import Figure, Profile
from lorgnette.runtime.profile.flat import bytes_of, figures_of
from lorgnette.runtime.profile.stats import LEAST_RUNS

ALIKE = 0.02
"""Medians that differ by no more are alike, however narrow their spreads are."""
ALIKE_FEW = 0.1
"""The same of times with fewer than three runs, whose spread says nothing."""
CALIBRATION = 1.1
"""Ratio of the fixed piece of work from which machines do not run equally fast."""

Verdict = Literal["inside the noise", "A is better", "B is better", "not in both"]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of both."""

    name: str
    a: Figure
    b: Figure
    ratio: float | None
    """Median of A over median of B."""
    low: float | None
    """The least that the ratio is by the spreads: p10 of A over p90 of B."""
    high: float | None
    """The most: p90 of A over p10 of B."""
    verdict: Verdict
    reason: str = ""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What `lorgnette profile --compare` tells."""

    a: str
    b: str
    warnings: tuple[str, ...]
    rows: tuple[Row, ...]


def compare(a: Profile, b: Profile) -> Comparison:
    """Every figure that both have, and those that only one has."""
    left, right = figures_of(a) | bytes_of(a), figures_of(b) | bytes_of(b)
    names = [*left, *(name for name in right if name not in left)]
    none = _missing("the other document does not have it")
    rows = (_row(name, left.get(name, none), right.get(name, none)) for name in names)
    return Comparison(
        a=title(a),
        b=title(b),
        warnings=tuple(_warnings(a, b)),
        rows=tuple(row for row in rows if row.a.runs or row.b.runs),
    )


def title(profile: Profile) -> str:
    """What a profile is of, in a few words."""
    bundle = profile.bundle
    return f"{bundle.name} ({bundle.checkpoint}, {bundle.quant}, {bundle.target})"


def more_is_better(name: str) -> bool:
    """Whether a figure is a speed: all others are times and sizes."""
    return name.endswith("_per_s")


def _row(name: str, a: Figure, b: Figure) -> Row:
    """Compares one figure."""
    if a.median is None or b.median is None or a.median <= 0 or b.median <= 0:
        reason = (a.reason if a.median is None else b.reason) or "one of the two is 0"
        return Row(
            name=name, a=a, b=b, ratio=None, low=None, high=None, verdict="not in both",
            reason=reason,
        )  # fmt: skip
    ratio = a.median / b.median
    low, high = _over(a.p10, b.p90, ratio), _over(a.p90, b.p10, ratio)
    few = min(a.runs, b.runs) < LEAST_RUNS and not name.endswith("_bytes")
    alike = ALIKE_FEW if few and not name.endswith(".bytes") else ALIKE
    verdict: Verdict
    if low <= 1 <= high or 1 / (1 + alike) <= ratio <= 1 + alike:
        verdict = "inside the noise"
    else:
        verdict = "A is better" if (ratio > 1) == more_is_better(name) else "B is better"
    return Row(name=name, a=a, b=b, ratio=ratio, low=low, high=high, verdict=verdict)


def _over(numerator: float | None, denominator: float | None, otherwise: float) -> float:
    if numerator is None or not denominator:
        return otherwise
    return numerator / denominator


def _warnings(a: Profile, b: Profile) -> list[str]:
    """What makes the two hard to compare."""
    pairs = {
        "machines": (a.machine.cpu, b.machine.cpu),
        "architectures": (a.machine.architecture, b.machine.architecture),
        "usable cores": (a.machine.usable_cores, b.machine.usable_cores),
        "CPU features": (a.machine.features, b.machine.features),
        "systems": (a.machine.os, b.machine.os),
        "packages": (_versions(a), _versions(b)),
        "threads": (a.settings.threads, b.settings.threads),
        "engines": (a.bundle.engine, b.bundle.engine),
        "checkpoints": (a.bundle.checkpoint, b.bundle.checkpoint),
        "pictures": (_picture(a), _picture(b)),
        "tiles": (_tiles(a), _tiles(b)),
    }
    told = [
        f"{name} differ: {_plain(left)} and {_plain(right)}"
        for name, (left, right) in pairs.items()
        if left != right
    ]
    for letter, profile in (("A", a), ("B", b)):
        told += [
            f"{letter} was measured on a noisy machine: {note}" for note in profile.noise.notes
        ]
    one, other = a.noise.calibration_ms.median, b.noise.calibration_ms.median
    if one and other and max(one / other, other / one) > CALIBRATION:
        told.append(f"a fixed piece of work took {one:.3g} ms for A and {other:.3g} ms for B")
    return told


def _versions(profile: Profile) -> str:
    return ", ".join(f"{name} {version}" for name, version in profile.machine.packages.items())


def _picture(profile: Profile) -> str:
    width, height = profile.settings.picture_size
    return f"{profile.settings.picture} of {width} x {height}"


def _tiles(profile: Profile) -> str:
    """Of all answers."""
    counts = [answer.tiles for answer in profile.answers.values() if answer.tiles is not None]
    return ", ".join(map(str, counts)) or "none"


def _plain(value: object) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _missing(reason: str) -> Figure:
    return Figure(median=None, p10=None, p90=None, min=None, runs=0, reason=reason)
