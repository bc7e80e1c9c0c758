"""Which pictures an export looks at, and what for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorgnette.export.answers import OriginalAnswers, original_answers
from lorgnette.export.check import Parts
from lorgnette.quantize.plan import QuantPlan
from lorgnette.quantize.samples import Sample, default_samples, read_samples, split_samples

DEFAULT_SET = "default"
"""What the set of samples that comes with the package is called."""

Progress = Callable[[str], None]
"""Called at the start of each step with its name."""


@dataclass(frozen=True)
class Pictures:
    """Pictures with questions: what is calibrated with, and what the result is measured on.

    Attributes:
        path: A set as `read_samples` takes it; None takes the one that comes with the package.
        measure: The most samples that the answers are compared on; 0 measures nothing.
        accept_loss: Whether a bundle may break its plan's promise.
    """

    path: Path | None = None
    measure: int = 16
    accept_loss: bool = False


DEFAULT_PICTURES = Pictures()


@dataclass(frozen=True)
class SampleSet:
    """The two parts of a set of samples.

    Attributes:
        name: What the set is called; nothing of its place.
        calibrating: What is calibrated with; nothing where the plan does not ask for it.
        measuring: What answers are compared on.
    """

    name: str = ""
    calibrating: tuple[Sample, ...] = ()
    measuring: tuple[Sample, ...] = ()

    @staticmethod
    def choose(plan: QuantPlan, pictures: Pictures) -> SampleSet:
        """Reads what a plan needs.

        Floats are not measured, since the ladder holds them to more than that, unless the plan
        promises something.

        Raises:
            DatasetError: The set cannot be read.
        """
        rounds = plan.cache_bits == 8 or any(rule.scheme.is_integer for rule in plan.rules)
        measures = pictures.measure > 0 and (rounds or plan.promise is not None)
        if pictures.path is None and not (plan.needs_samples or measures):
            return SampleSet()
        name = DEFAULT_SET if pictures.path is None else pictures.path.resolve().name
        samples = read_samples(pictures.path or default_samples())
        calibrating, measuring = split_samples(samples)
        return SampleSet(
            name,
            calibrating if plan.needs_samples else (),
            measuring[: pictures.measure] if measures else (),
        )

    def answers(self, parts: Parts, progress: Progress) -> OriginalAnswers | None:
        """What the original says to what is measured on; None where nothing is."""
        if not self.measuring:
            return None
        progress("original answers")
        return original_answers(parts, self.measuring, sample_set=self.name)
