"""How far answers move where one part of a model is rounded and all else is as published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorgnette.export.answers import OriginalAnswer, OriginalAnswers
from lorgnette.export.check import Parts
from lorgnette.export.matrices import matrix_names
from lorgnette.export.prepared import PreparedSample
from lorgnette.export.units import Unit, plan_of
from lorgnette.export.walk import ModelWalk, Passage, State, Step, first_states
from lorgnette.quantize.calibrate import TOGETHER, linears, looks_at, rescale_stage, round_matrix
from lorgnette.quantize.collect import Collector
from lorgnette.quantize.inputs import LayerInputs
from lorgnette.quantize.quality import kl_divergence, same_answer
from lorgnette.quantize.store import QuantizedModel, QuantizedSource
from lorgnette.runtime.prompt import image_slots

Tell = Callable[[int, int], None]
"""Told after each part how many are done, and of how many."""


class Loss(NamedTuple):
    """What rounding one part did."""

    kl: float
    """Mean KL divergence from the original over all positions of all answers, in nats."""
    same_answer: float
    """Share of the answers that stay the same."""


def quantize_candidates(
    parts: Parts,
    units: Sequence[Unit],
    folder: Path,
    samples: Sequence[PreparedSample],
    tell: Tell,
) -> list[QuantizedModel]:
    """The codes of every unit under each of its rules.

    Calibration runs the model as published, once for all rules: whatever a unit's neighbours are
    rounded to in the end is not known here. Every rescale stays within a stage.

    Args:
        parts: The checkpoint.
        units: What is rounded.
        folder: Codes are kept in new folders inside it.
        samples: What is calibrated with.
        tell: Told after each stage.

    Returns:
        A model for each place of the longest list of rules; a unit with fewer has its last there.
    """
    count = max(len(unit.rules) for unit in units)
    names = matrix_names(parts.components)
    models = [
        QuantizedModel(
            parts.sources,
            names,
            plan_of(units, [number] * len(units), f"rung-{number}", ""),
            folder / str(number),
        )
        for number in range(count)
    ]
    walk = ModelWalk(parts)
    passages = [_calibrating(sample) for sample in samples]
    states = first_states(passages, TOGETHER)
    for at, step in enumerate(walk.steps):
        sources = [model.sources[step.component] for model in models]
        states, inputs = _collect(walk, at, passages, states, sources)
        for source in sources:
            _round_stage(step, source, inputs)
        tell(at + 1, len(walk.steps))
    return models


def _collect(
    walk: ModelWalk,
    at: int,
    passages: Sequence[Passage],
    states: Sequence[State],
    sources: Sequence[QuantizedSource],
) -> tuple[list[State], dict[str, LayerInputs]]:
    """Runs a step and takes down what its matrices are multiplied with."""
    step = walk.steps[at]
    names = [
        name
        for name in linears(step.stage)
        if any(looks_at(source, step.stage.prefix + name) for source in sources)
    ]
    if not names:
        return walk.run(at, passages, states), {}
    positions = sum(x.shape[0] * x.shape[1] for state in states for x in state if x.ndim == 3)
    after: list[State] = []
    with Collector(step.stage.module, names, moments=True, positions=positions) as collector:
        for each in zip(passages, states, strict=True):
            after += walk.run(at, each[:1], each[1:])
            collector.end_of_sample()
    return after, collector.inputs()


def _round_stage(step: Step, source: QuantizedSource, inputs: dict[str, LayerInputs]) -> None:
    mine = {name: inputs[name] for name in inputs if looks_at(source, step.stage.prefix + name)}
    asking = list(mine)
    rescale_stage(step.stage, source, mine)
    for name in asking:
        round_matrix(source, step.stage.prefix + name, mine[name])


def measure_units(
    parts: Parts,
    units: Sequence[Unit],
    models: Sequence[QuantizedModel],
    answers: OriginalAnswers,
    tell: Tell,
) -> list[list[Loss]]:
    """What each unit loses under each of its rules, all else being as published.

    The states in front of a unit are those of the original, so nothing before it runs again.

    Args:
        parts: The checkpoint.
        units: What is rounded, one at a time.
        models: Codes of each, as `quantize_candidates` gives them.
        answers: What the original says.
        tell: Told after each measurement.

    Returns:
        For each unit, in order, one loss for each of its rules.
    """
    walk = ModelWalk(parts)
    found: dict[str, list[Loss]] = {}
    passages = [_measured(answer, answers) for answer in answers.answers]
    states = first_states(passages)
    done, of = 0, sum(len(unit.rules) for unit in units)
    for at in range(len(walk.steps)):
        for unit in units:
            changed = _steps_of(walk, unit)
            if changed[0] != at:
                continue
            found[unit.name] = []
            for model in models[: len(unit.rules)]:
                logits = walk.finish(at, passages, states, changed, only_rounded(model, unit))
                found[unit.name].append(_loss(answers, logits))
                done += 1
                tell(done, of)
        if at + 1 < len(walk.steps):
            states = walk.run(at, passages, states)
    return [found[unit.name] for unit in units]


def only_rounded(model: QuantizedModel, unit: Unit) -> Callable[[str, str], Tensor]:
    """Reads parameters of which only a unit's are rounded; all others as a rescale left them.

    Where a rescale has divided a channel, what multiplies it again is among those others or among
    the unit's: all of it stands in the same stage.
    """
    rounded = {(matrix.component, matrix.name) for matrix in unit.matrices}

    def read(component: str, name: str) -> Tensor:
        source = model.sources[component]
        if (component, name) in rounded:
            return source.tensor(name)
        return torch.from_numpy(source.unrounded(name))

    return read


def _steps_of(walk: ModelWalk, unit: Unit) -> list[int]:
    """Numbers of the steps that hold a unit's matrices."""
    wanted = {(matrix.component, matrix.name) for matrix in unit.matrices}
    return [
        number
        for number, step in enumerate(walk.steps)
        if any((step.component, name) in wanted for name in step.matrices)
    ]


def _loss(answers: OriginalAnswers, logits: Sequence[np.ndarray]) -> Loss:
    pairs = [(answer.logits, got) for answer, got in zip(answers.answers, logits, strict=True)]
    kl = np.concatenate([kl_divergence(*pair) for pair in pairs])
    return Loss(float(kl.mean()), sum(same_answer(*pair) for pair in pairs) / len(pairs))


def _calibrating(sample: PreparedSample) -> Passage:
    """Logits are asked for behind the prompt and each token of the answer."""
    ids = (*sample.prompt_ids, *sample.answer_ids)
    return Passage(sample.tiles, ids, sample.slots, len(sample.answer_ids) + 1)


def _measured(answer: OriginalAnswer, answers: OriginalAnswers) -> Passage:
    slots = np.array(image_slots(answer.prompt_ids, answers.image_token_id), np.int64)
    ids = (*answer.prompt_ids, *answer.greedy_ids[:-1])
    return Passage(answer.tiles().pixels, ids, slots, len(answer.greedy_ids))
