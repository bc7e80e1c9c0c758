"""What every measurement goes through: repeats, and what is watched meanwhile."""

from __future__ import annotations

from collections.abc import Callable

from lorgnette.runtime.profile.machine import EnergyMeter
from lorgnette.runtime.profile.noise import NoiseWatch
from lorgnette.runtime.profile.stats import repeat

Tell = Callable[[str], None]
"""Takes the name of what is measured next."""


def say_nothing(_: str) -> None:
    """A `Tell` for those who do not listen."""


class Bench:
    """Repeats runs, with the energy they take and a look at the machine between them."""

    def __init__(
        self,
        runs: int,
        seconds: float,
        tell: Tell = say_nothing,
        watch: NoiseWatch | None = None,
        meter: EnergyMeter | None = None,
    ) -> None:
        """Takes the limits of `stats.repeat`, and whom to tell what is measured."""
        self.runs = runs
        self.seconds = seconds
        self.tell = tell
        self._watch = watch
        self._meter = meter

    def samples(self, name: str, run: Callable[[], float], runs: int | None = None) -> list[float]:
        """Milliseconds of each run: see `stats.repeat`.

        Args:
            name: Of the phase.
            run: Gives what one run took, in milliseconds.
            runs: The most, where it is not the bench's.
        """
        self.tell(name)
        count = 0

        def counted() -> float:
            nonlocal count
            count += 1
            return run()

        between = self._watch.calibrate if self._watch is not None else _nothing
        if self._meter is None:
            return repeat(counted, runs or self.runs, self.seconds, between)
        with self._meter.of(name, lambda: count):
            return repeat(counted, runs or self.runs, self.seconds, between)


def _nothing() -> None:
    """What is done between runs where nobody watches."""
