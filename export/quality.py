"""Measures how far a quantised model's answers are from the original's.

The original answers a set of questions greedily in float32. The model under test is then fed that
answer token by token, so that both distributions of the next token can be compared at every
position, whatever the model itself would have said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorgnette.errors import ConfigError, VerifyError
from lorgnette.export.answers import (
    MAX_NEW_TOKENS,
    Float,
    OriginalAnswer,
    OriginalAnswers,
    PromptEncoder,
    Tell,
    original_answers,
    silent,
)
from lorgnette.export.reference import Reference
from lorgnette.manifest import PromiseEntry, QualitySummary
from lorgnette.quantize.plan import Promise
from lorgnette.quantize.plan_file import plan_for
from lorgnette.quantize.quality import cosines, kl_divergence, same_top1
from lorgnette.quantize.rotation import rotated_back
from lorgnette.runtime.engines.engine import DecoderState, Engine
from lorgnette.runtime.evaluation.metrics import exact
from lorgnette.runtime.model import Model

__all__ = [
    "MAX_NEW_TOKENS",
    "Measured",
    "OriginalAnswer",
    "OriginalAnswers",
    "SampleMeasure",
    "measure_bundle",
    "measure_reference",
    "original_answers",
    "summarise",
]


@dataclass(frozen=True, eq=False)
class SampleMeasure:
    """One sample of a measurement.

    Attributes:
        kl: float64 `[K]`, at each token of the original's answer.
        top1: `[K]`, whether the likeliest token there is the original's.
        cosines: float64 `[G * N]`, of each image token with the original's.
        answer_ids: The model's own greedy answer; None where it differs and was not asked for.
    """

    kl: NDArray[np.float64]
    top1: NDArray[np.bool_]
    cosines: NDArray[np.float64]
    answer_ids: tuple[int, ...] | None

    @property
    def same(self) -> bool:
        """Whether the greedy answer is the original's."""
        return bool(self.top1.all())


@dataclass(frozen=True, eq=False)
class Measured:
    """A measurement: one entry for each of the original's answers, in order."""

    samples: tuple[SampleMeasure, ...]

    @property
    def kl_mean(self) -> float:
        """Mean over all positions; infinite where the model gives numbers that are none."""
        return float(np.concatenate([sample.kl for sample in self.samples]).mean())

    @property
    def same_answer(self) -> float:
        """Share of answers that are the original's."""
        return sum(sample.same for sample in self.samples) / len(self.samples)


def measure_bundle(model: Model, answers: OriginalAnswers, tell: Tell = silent) -> Measured:
    """Feeds a bundle the original's answers, one decode step a token, through its engine.

    Where it would have said something else, it then says it: from the first difference on, its
    own answer is generated.

    Args:
        model: The bundle.
        answers: What the original says.
        tell: Told after each sample.

    Raises:
        ConfigError: The bundle's context is shorter than the one that the answers were made for.
    """
    rotate = plan_for(model.manifest.recipe).rotate
    wanted, got = answers.context_length, model.manifest.context_length
    if got < wanted:
        raise ConfigError("context length is too small", where="bundle", got=got, wanted=wanted)
    engine = model.engine
    encoder = PromptEncoder(engine.encode, lambda ids: engine.embed(np.array(ids, np.int64)))
    state = engine.new_state()
    stop_ids = answers.prompt.stop_token_ids
    measured = []
    for done, answer in enumerate(answers.answers, start=1):
        image_tokens = encoder.encode(answer.sample, answer.tiles)
        embeddings = encoder.splice(answer.prompt_ids, answers.image_token_id, image_tokens)
        decoding = _Decoding(engine, state, len(embeddings))
        logits = decoding.follow(embeddings, answer.greedy_ids)
        said = tuple(map(int, logits.argmax(-1)))
        if said != answer.greedy_ids:
            said = decoding.go_on(said, answer.greedy_ids, answers.max_new_tokens, stop_ids)
        measured.append(_compare(answer, _seen(image_tokens, rotate), logits, said))
        tell(done, len(answers.answers))
    return Measured(tuple(measured))


def measure_reference(
    reference: Reference, answers: OriginalAnswers, tell: Tell = silent, *, rotate: bool = False
) -> Measured:
    """The same for eager components, one pass a sample; its own other answers are not generated.

    Args:
        reference: The components, with weights as a plan rounds them.
        answers: What the original says.
        tell: Told after each sample.
        rotate: Whether its residual stream, and so its image tokens, are rotated.
    """
    encoder = PromptEncoder(reference.encode, reference.embed)
    measured = []
    for done, answer in enumerate(answers.answers, start=1):
        image_tokens = encoder.encode(answer.sample, answer.tiles)
        embeddings = encoder.splice(answer.prompt_ids, answers.image_token_id, image_tokens)
        logits = reference.follow(embeddings, answer.greedy_ids)
        measured.append(_compare(answer, _seen(image_tokens, rotate), logits, None))
        tell(done, len(answers.answers))
    return Measured(tuple(measured))


def require_promise(summary: QualitySummary, where: object) -> None:
    """Refuses a model that is worse than its plan promises, unless that was accepted.

    Raises:
        VerifyError: With both.
    """
    promise = summary.promise
    if promise is None or promise.kept or promise.accepted_loss:
        return
    raise VerifyError(
        "the answers are further from the original's than the plan promises",
        where=where,
        got=f"mean KL divergence {summary.kl_mean:.3g}, same answer {summary.same_answer:.1%}",
        wanted=f"<= {promise.max_kl or 0:g} and >= {promise.min_same_answer:.1%}",
        hint="take a plan of more bits, calibrate with pictures like those that the model is for "
        "(--calibrate), or accept it (--accept-loss)",
    )


def summarise(
    measured: Measured,
    answers: OriginalAnswers,
    promise: Promise | None = None,
    *,
    accepted_loss: bool = False,
) -> QualitySummary:
    """The numbers of a measurement, as a manifest carries them.

    Args:
        measured: The measurement.
        answers: What it was made with.
        promise: What the plan promises.
        accepted_loss: Whether a broken promise is accepted.

    Raises:
        VerifyError: The model gives numbers that are none.
    """
    kl = np.concatenate([sample.kl for sample in measured.samples])
    top1 = np.concatenate([sample.top1 for sample in measured.samples])
    near = np.concatenate([sample.cosines for sample in measured.samples])
    if not np.isfinite(kl).all():
        first = next(i for i, s in enumerate(measured.samples) if not np.isfinite(s.kl).all())
        raise VerifyError(
            "the model gives numbers that are none",
            where=answers.answers[first].sample.name or f"sample {first + 1}",
            got="logits that are not finite",
        )
    right, original_right = _exact_matches(measured, answers)
    return QualitySummary(
        sample_set=answers.sample_set,
        sample_set_sha256=answers.digest,
        samples=len(measured.samples),
        skipped=answers.skipped,
        positions=len(kl),
        max_new_tokens=answers.max_new_tokens,
        kl_mean=float(kl.mean()),
        kl_p95=float(np.quantile(kl, 0.95)),
        kl_max=float(kl.max()),
        top1=float(top1.mean()),
        same_answer=measured.same_answer,
        image_token_cosine_mean=float(near.mean()),
        image_token_cosine_min=float(near.min()),
        exact_match=right,
        original_exact_match=original_right,
        promise=_kept(promise, measured, accepted_loss),
    )


def _exact_matches(
    measured: Measured, answers: OriginalAnswers
) -> tuple[float | None, float | None]:
    """Share of answers that are the given ones: of the model under test, and of the original.

    Each None where no answers are given, or the model's own are not known.
    """
    scores: list[float] = []
    original: list[float] = []
    for sample, answer in zip(measured.samples, answers.answers, strict=True):
        if answer.sample.answer is not None:
            given = (answer.sample.answer,)
            original.append(exact(answers.text(answer.greedy_ids), given))
            if sample.answer_ids is not None:
                scores.append(exact(answers.text(sample.answer_ids), given))
    if not original:
        return None, None
    own = sum(scores) / len(scores) if len(scores) == len(original) else None
    return own, sum(original) / len(original)


def _kept(promise: Promise | None, measured: Measured, accepted_loss: bool) -> PromiseEntry | None:
    """What the plan promised against what was measured."""
    if promise is None:
        return None
    kl, same = measured.kl_mean, measured.same_answer
    return PromiseEntry(
        max_kl=promise.max_kl if np.isfinite(promise.max_kl) else None,
        min_same_answer=promise.min_same_answer,
        kept=kl <= promise.max_kl and same >= promise.min_same_answer,
        accepted_loss=accepted_loss,
    )


def _seen(image_tokens: Float, rotate: bool) -> Float:
    """Image tokens `[G, N, D]` in the original's basis."""
    if not rotate:
        return image_tokens
    return rotated_back(image_tokens.reshape(-1, image_tokens.shape[-1])).reshape(
        image_tokens.shape
    )


def _compare(
    answer: OriginalAnswer, image_tokens: Float, logits: Float, said: tuple[int, ...] | None
) -> SampleMeasure:
    top1 = same_top1(answer.logits, logits)
    width = image_tokens.shape[-1]
    return SampleMeasure(
        kl=kl_divergence(answer.logits, logits),
        top1=top1,
        cosines=cosines(answer.image_tokens.reshape(-1, width), image_tokens.reshape(-1, width)),
        answer_ids=answer.greedy_ids if top1.all() else said,
    )


class _Decoding:
    """One answer of a bundle, behind a prompt of so many positions."""

    def __init__(self, engine: Engine, state: DecoderState, prompt_length: int) -> None:
        self._engine = engine
        self._state = state
        self._prompt_length = prompt_length

    def follow(self, embeddings: Float, token_ids: Sequence[int]) -> Float:
        """The logits `[K, V]` that each of some given tokens would have been chosen from."""
        rows = [self._state.run(embeddings, 0).copy()]
        rows += [self._step(token_id, at).copy() for at, token_id in enumerate(token_ids[:-1])]
        return np.stack(rows)

    def go_on(
        self, said: Sequence[int], wanted: Sequence[int], count: int, stop_ids: Sequence[int]
    ) -> tuple[int, ...]:
        """The greedy answer of a bundle that leaves `wanted` where `said` first differs.

        The cache still holds the positions up to there; those behind are overwritten.
        """
        at = next(i for i, (a, b) in enumerate(zip(said, wanted, strict=True)) if a != b)
        ids = list(said[: at + 1])
        while len(ids) < count and ids[-1] not in stop_ids:
            ids.append(int(self._step(ids[-1], len(ids) - 1).argmax()))
        return tuple(ids)

    def _step(self, token_id: int, at: int) -> Float:
        """Appends token number `at` of the answer; the logits behind it."""
        embedded = self._engine.embed(np.array([token_id], np.int64))
        return self._state.run(embedded, self._prompt_length + at)
