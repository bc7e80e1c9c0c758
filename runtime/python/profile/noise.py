"""Whether a machine was quiet while it was measured."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from lorgnette.runtime.profile.document import Figure, Noise
from lorgnette.runtime.profile.machine import ROOT, load_average
from lorgnette.runtime.profile.stats import figure, spread, timed, unknown

WORK = b"\x5a" * (2 << 20)
"""What the calibration takes the digest of: a few milliseconds of one core."""
MOST_LOAD = 0.25
"""Load before the first run, by core, above which a machine is called noisy."""
MOST_STEAL = 0.01
"""Share of the time that a hypervisor may give to others."""
MOST_CALIBRATION = 1.25
"""p90 over p10 of the fixed piece of work."""
MOST_SPREAD = 1.5
"""p90 over p10 of a figure."""
FEWEST_RUNS = 5
"""Runs below which the spread of a figure says little."""
SHORTEST_MS = 1.0
"""Shorter times scatter on the quietest machine."""
NONE_TELLS = f"no figure of {SHORTEST_MS:g} ms or more has {FEWEST_RUNS} runs"
STEAL = 7
"""Its place among the times of /proc/stat; those behind are part of the first ones."""


class NoiseWatch:
    """Looks at the machine from the beginning of a profile to its end."""

    def __init__(self, root: Path = ROOT) -> None:
        """Notes the load and the times so far."""
        self._root = root
        self._load = load_average()
        self._times = self._read()
        self.calibration_ms: list[float] = []
        """What the fixed piece of work took each time."""

    def calibrate(self) -> None:
        """Times a fixed piece of work."""
        self.calibration_ms.append(timed(lambda: hashlib.sha256(WORK).digest()))

    def finish(self, figures: Mapping[str, Figure], cores: int) -> Noise:
        """What was seen, and what of it means noise.

        Args:
            figures: Every figure by its name.
            cores: Cores that the process may use.
        """
        calibration = figure(self.calibration_ms) if self.calibration_ms else unknown("not timed")
        width, steal = spread(calibration), self._steal()
        name, widest = _widest(figures)
        notes = []
        if self._load is not None and self._load > MOST_LOAD * cores:
            notes.append(f"load average {self._load:.2f} on {cores} cores before the first run")
        if steal is not None and steal > MOST_STEAL:
            notes.append(f"{steal:.1%} of the time went to other guests of the host (steal)")
        if width is not None and width > MOST_CALIBRATION:
            notes.append(f"p90 of a fixed piece of work is {width:.2f} times its p10")
        if widest is not None and widest > MOST_SPREAD:
            notes.append(f"p90 of {name} is {widest:.2f} times its p10")
        reasons = {
            "load_average": "the system does not tell" if self._load is None else "",
            "steal_share": "there is no /proc/stat that tells" if steal is None else "",
            "calibration_spread": "not timed" if width is None else "",
            "widest": "" if name else NONE_TELLS,
            "widest_spread": "" if name else NONE_TELLS,
        }
        return Noise(
            noisy=bool(notes),
            notes=tuple(notes),
            load_average=self._load,
            steal_share=steal,
            calibration_ms=calibration,
            calibration_spread=width,
            widest=name,
            widest_spread=widest,
            reasons={key: reason for key, reason in reasons.items() if reason},
        )

    def _steal(self) -> float | None:
        """Share of all cores' time since the beginning."""
        before, after = self._times, self._read()
        if before is None or after is None:
            return None
        passed = [late - early for early, late in zip(before, after, strict=True)]
        return min(max(passed[STEAL] / sum(passed), 0.0), 1.0) if sum(passed) > 0 else 0.0

    def _read(self) -> list[int] | None:
        try:
            first = (self._root / "proc/stat").read_text("ascii").splitlines()[0].split()
            times = [int(value) for value in first[1 : STEAL + 2]]
        except (OSError, ValueError, IndexError):
            return None
        return times if len(times) == STEAL + 1 else None


def _widest(figures: Mapping[str, Figure]) -> tuple[str | None, float | None]:
    found = {name: spread(of) for name, of in figures.items() if _is_telling(name, of)}
    known = {name: width for name, width in found.items() if width is not None}
    if not known:
        return None, None
    name = max(known, key=lambda each: known[each])
    return name, known[name]


def _is_telling(name: str, of: Figure) -> bool:
    """Whether the spread of a figure tells of noise."""
    long = not name.endswith("_ms") or (of.median or 0.0) >= SHORTEST_MS
    return of.runs >= FEWEST_RUNS and long
