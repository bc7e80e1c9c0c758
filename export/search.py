"""Finds a plan that is as small, or as near the original, as is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import msgspec

from lorgnette.errors import ConfigError, VerifyError
from lorgnette.export.answers import OriginalAnswers, original_answers
from lorgnette.export.check import Parts
from lorgnette.export.matrices import matrices_of, matrix_names
from lorgnette.export.prepared import PreparedSample, prepare_samples
from lorgnette.export.quality import measure_reference
from lorgnette.export.reference import Reference
from lorgnette.export.sample_set import SampleSet
from lorgnette.export.sensitivity import Loss, measure_units, quantize_candidates
from lorgnette.export.units import Unit, find_units, plan_of
from lorgnette.quantize.calibrate import calibrate
from lorgnette.quantize.plan import MIXED_BITS, MIXED_PROMISE, QuantPlan
from lorgnette.quantize.plan_file import check_rules
from lorgnette.quantize.plan_text import rule_text, to_toml
from lorgnette.quantize.samples import Sample, split_samples
from lorgnette.quantize.search import Candidate, Point, frontier, spend
from lorgnette.quantize.store import QuantizedModel
from lorgnette.recipe import PlanText
from lorgnette.targets.target import Target

COUNT = 12
"""Questions to measure on, unless said otherwise."""
ROUNDS = 4
"""Plans that are measured at most to keep a loss."""
MARGIN = 0.9
"""Of the loss that a further attempt is predicted to have."""

WORST = 1e9
"""The loss of what gives numbers that are none."""

WeightBytes = Callable[[QuantPlan], int]
"""The size of the weights that a plan makes."""


class Limit(NamedTuple):
    """What a plan has to keep."""

    kind: Literal["bytes", "bits", "loss"]
    """`bytes` of all weights; average `bits` of the codes of all matrices, scales not counted and
    what two matrices share counted once; or `loss`, the mean KL divergence in nats."""
    value: float


def _no_step(name: str) -> None:
    """Tells nobody of a step."""


def _no_part(done: int, of: int) -> None:
    """Tells nobody of a part of a step."""


@dataclass(frozen=True)
class Progress:
    """Who is told.

    Attributes:
        step: Called at the start of each step with its name.
        part: Called within long steps: how many parts are done, and of how many.
    """

    step: Callable[[str], None] = _no_step
    part: Callable[[int, int], None] = _no_part


SILENT = Progress()


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found.

    Attributes:
        units: What was decided about.
        losses: What each loses under each of its rules, alone.
        points: Choices from least loss to least cost.
        chosen: The choice that was made, one of them or between two.
        plan: The same as a plan.
        measured: What the plan loses, measured as an engine computes.
        answers: What it was measured with.
    """

    units: tuple[Unit, ...]
    losses: tuple[tuple[Loss, ...], ...]
    points: tuple[Point, ...]
    chosen: Point
    plan: PlanText
    measured: Loss
    answers: OriginalAnswers

    @property
    def weights(self) -> int:
        """Numbers in all matrices, what two share counted once."""
        return sum(unit.weights for unit in self.units)

    def bits(self, point: Point) -> float:
        """The average bits of codes of a point."""
        pairs = zip(self.units, point.chosen, strict=True)
        return sum(unit.code_bits(number) for unit, number in pairs) / self.weights

    def stored_bits(self, point: Point) -> float:
        """The same with scales and zero points."""
        pairs = zip(self.units, point.chosen, strict=True)
        return 8 * sum(unit.bytes(number) for unit, number in pairs) / self.weights

    def plan_of(self, chosen: Sequence[int]) -> QuantPlan:
        """The plan of some choices."""
        return plan_of(self.units, chosen, self.plan.name, "")

    def toml(self) -> str:
        """The plan as a file, with what was measured of each unit."""
        notes, at = {}, 0
        for unit, number, losses in zip(self.units, self.chosen.chosen, self.losses, strict=True):
            tried = ", ".join(
                f"{rule.scheme.form} {loss.kl:.2g}"
                for rule, loss in zip(unit.rules, losses, strict=True)
            )
            notes[at] = f"{unit.name}: loss {losses[number].kl:.2g}; alone as {tried}"
            at += len(unit.selects)
        head = [
            "Found by `lorgnette search`. Losses: mean KL divergence in nats of the answers to "
            f"{len(self.answers.answers)} questions",
            f"of the set '{self.answers.sample_set}', where one unit alone is rounded.",
            f"All together: predicted {self.chosen.loss:.2g}, measured {self.measured.kl:.2g}, "
            f"same answer {self.measured.same_answer:.1%}.",
        ]
        return to_toml(self.plan, notes, head)


class Search:
    """A search over one checkpoint for one target."""

    def __init__(
        self,
        parts: Parts,
        target: Target,
        samples: SampleSet,
        folder: Path,
        progress: Progress = SILENT,
    ) -> None:
        """Prepares a search; measures nothing yet.

        Args:
            parts: The checkpoint.
            target: What has to carry the plan.
            samples: What is calibrated with and measured on.
            folder: Takes a temporary folder with codes, about the size of the weights as float32
                for each rung of the ladder.
            progress: Told about each step.

        Raises:
            ConfigError: The target carries no scheme of the ladder for some matrix.
        """
        self._parts = parts
        self._samples = samples
        self._folder = folder
        self._progress = progress
        self.units = tuple(find_units(parts, target))
        self._prepared: list[PreparedSample] = []
        self._answers: OriginalAnswers | None = None

    def run(self, limit: Limit, name: str, weight_bytes: WeightBytes | None = None) -> Found:
        """Finds a plan.

        Args:
            limit: What it has to keep.
            name: What it is called.
            weight_bytes: Predicts sizes; wanted for a limit of bytes.

        Raises:
            ConfigError: No plan keeps the limit; told before anything is measured, where it can be.
            VerifyError: None that was tried keeps a loss.
        """
        least = [len(unit.rules) - 1 for unit in self.units]
        self._require_possible(limit, least, weight_bytes)
        losses = self.measure()
        by_bits = limit.kind == "bits"
        table = [
            [
                Candidate(min(loss.kl, WORST), unit.code_bits(n) if by_bits else unit.bytes(n))
                for n, loss in enumerate(each)
            ]
            for unit, each in zip(self.units, losses, strict=True)
        ]
        points = frontier(table)
        if limit.kind == "loss":
            chosen, measured = self._keep_loss(points, limit.value)
        else:
            chosen = self._keep_size(table, points, limit, weight_bytes)
            measured = self.measure_plan(self._plan(chosen))
        plan = plan_of(self.units, chosen.chosen, name, "")
        text = PlanText(
            name=name,
            rule=tuple(rule_text(rule) for rule in plan.rules),
            summary=f"found by search, at most {limit.value:g} {limit.kind}",
        )
        return Found(
            units=self.units,
            losses=tuple(map(tuple, losses)),
            points=tuple(points),
            chosen=chosen,
            plan=text,
            measured=measured,
            answers=self.answers,
        )

    @property
    def answers(self) -> OriginalAnswers:
        """What the original says to the samples that are measured on."""
        if self._answers is None:
            self._progress.step("original answers")
            samples = self._samples
            self._answers = original_answers(
                self._parts, samples.measuring, sample_set=samples.name
            )
        return self._answers

    def measure(self) -> list[list[Loss]]:
        """What each unit loses under each of its rules, alone."""
        answers = self.answers
        with TemporaryDirectory(prefix="search-", dir=self._folder) as folder:
            self._progress.step("calibrate every scheme")
            models = quantize_candidates(
                self._parts, self.units, Path(folder), self.prepared(), self._progress.part
            )
            self._progress.step("measure every unit")
            return measure_units(self._parts, self.units, models, answers, self._progress.part)

    def measure_plan(self, plan: QuantPlan) -> Loss:
        """What a plan loses, measured as an engine computes: activations are rounded too."""
        parts = self._parts
        check_rules(plan, matrices_of(parts.components))
        self._progress.step(f"quantise as {plan.name}")
        with TemporaryDirectory(prefix="search-", dir=self._folder) as folder:
            names = matrix_names(parts.components)
            model = QuantizedModel(parts.sources, names, plan, Path(folder) / "model")
            if plan.needs_samples:
                calibrate(parts.components, model, self.prepared(), lambda step: None)
            components = {component.name: component for component in parts.components}
            reference = Reference(components, model.sources)
            reference.round_activations()
            self._progress.step(f"measure {plan.name}")
            measured = measure_reference(reference, self.answers)
        return Loss(measured.kl_mean, measured.same_answer)

    def prepared(self) -> list[PreparedSample]:
        """What is calibrated with, in the form that components take."""
        if not self._prepared:
            self._prepared = prepare_samples(self._parts, self._samples.calibrating)
            if not self._prepared:
                raise ConfigError("no sample to calibrate with fits the context length")
        return self._prepared

    def _plan(self, point: Point) -> QuantPlan:
        return plan_of(self.units, point.chosen, "candidate", "")

    def _require_possible(
        self, limit: Limit, least: Sequence[int], weight_bytes: WeightBytes | None
    ) -> None:
        """Refuses a size that even the fewest bits exceed."""
        if limit.kind == "bits":
            pairs = zip(self.units, least, strict=True)
            bits = sum(unit.code_bits(number) for unit, number in pairs)
            possible = bits / sum(unit.weights for unit in self.units)
            if possible > limit.value:
                raise ConfigError(
                    "no plan has so few bits a weight",
                    got=f"{limit.value:g}",
                    wanted=f"{math.ceil(100 * possible) / 100:g} or more",
                )
        elif limit.kind == "bytes":
            if weight_bytes is None:
                raise ValueError("a limit of bytes needs what predicts them")
            smallest = weight_bytes(plan_of(self.units, least, "smallest", ""))
            if smallest > limit.value:
                raise ConfigError(
                    "no plan makes the weights so small",
                    got=f"{limit.value:g} bytes",
                    wanted=f"{smallest} or more",
                )

    def _keep_size(
        self,
        table: Sequence[Sequence[Candidate]],
        points: Sequence[Point],
        limit: Limit,
        weight_bytes: WeightBytes | None,
    ) -> Point:
        """The point of least loss within a size, and what the size leaves over spent."""
        if weight_bytes is None or limit.kind == "bits":
            budget = math.floor(limit.value * sum(unit.weights for unit in self.units))
            within = next((point for point in points if point.cost <= budget), points[-1])
            return spend(table, within, budget)
        within = next(
            (point for point in points if weight_bytes(self._plan(point)) <= limit.value),
            points[-1],
        )
        # Beside the units there are floats, and gaps that align what is stored.
        budget = within.cost + int(limit.value) - weight_bytes(self._plan(within))
        spent = spend(table, within, budget)
        return spent if weight_bytes(self._plan(spent)) <= limit.value else within

    def _keep_loss(self, points: Sequence[Point], most: float) -> tuple[Point, Loss]:
        """The last point whose loss, predicted and then measured, is within bounds."""
        if points[0].loss > most:
            raise ConfigError(
                "no plan loses so little",
                got=f"{most:g}",
                wanted=f"{points[0].loss:.2g} or more, as predicted for the most bits",
            )
        at = max(n for n, point in enumerate(points) if point.loss <= most)
        tried: list[tuple[float, Point, Loss]] = []
        for attempt in range(ROUNDS):
            measured = self.measure_plan(self._plan(points[at]))
            if measured.kl <= most:
                return points[at], measured
            tried.append((measured.kl, points[at], measured))
            if at == 0:
                break
            wanted = points[at].loss * most / measured.kl * MARGIN
            fitting = [n for n in range(at) if points[n].loss <= wanted]
            at = fitting[-1] if fitting and attempt + 2 < ROUNDS else 0
        kl, point, _ = min(tried)
        raise VerifyError(
            "no plan that was measured loses so little",
            got=f"{most:g}",
            wanted=f"{kl:.2g} or more, which {self._bits(point):.2f} bits a weight reach",
        )

    def _bits(self, point: Point) -> float:
        pairs = list(zip(self.units, point.chosen, strict=True))
        return sum(u.code_bits(n) for u, n in pairs) / sum(u.weights for u in self.units)


def search_mixed(
    parts: Parts,
    target: Target,
    samples: Sequence[Sample],
    folder: Path,
    step: Callable[[str], None],
) -> PlanText:
    """The rules that the named plan `mixed` has for a checkpoint.

    Args:
        parts: The checkpoint.
        target: What has to carry the plan.
        samples: What is calibrated with and measured on.
        folder: Takes temporary files.
        step: Called at the start of each step with its name.
    """
    limit = Limit("bits", MIXED_BITS)
    split = split_for_search("", samples, COUNT)
    found = Search(parts, target, split, folder, Progress(step)).run(limit, plan_name(limit)).plan
    kl, same = MIXED_PROMISE
    return msgspec.structs.replace(found, max_kl=kl, min_same_answer=same)


def plan_name(limit: Limit) -> str:
    """What the plan of a limit is called: `mixed-3.5` of bits."""
    value = f"{limit.value:g}".replace("+", "")
    return f"mixed-{value}" if limit.kind == "bits" else f"mixed-{value}-{limit.kind}"


def split_for_search(name: str, samples: Sequence[Sample], count: int) -> SampleSet:
    """A set as a search takes it: `count` samples to measure on, three times as many to calibrate.

    Args:
        name: What the set is called.
        samples: All of it.
        count: How many to measure on at most.
    """
    calibrating, measuring = split_samples(samples)
    return SampleSet(name, calibrating[: 3 * count], measuring[:count])


def floats_of(parts: Parts) -> list[dict[str, str | int]]:
    """Parameters that no plan rounds, with their bytes as float32."""
    names = matrix_names(parts.components)
    return [
        {"name": f"{component}/{name}", "bytes": 4 * math.prod(shape)}
        for component, source in parts.sources.items()
        for name, shape in source.shapes.items()
        if name not in names[component]
    ]
