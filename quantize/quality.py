"""How far a quantised model is from the original: metrics in numpy, and what a report holds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lorgnette.manifest import PromiseEntry, QualitySummary
from lorgnette.spec import Frozen

__all__ = [
    "FloatTensor",
    "PromiseEntry",
    "QualityReport",
    "QualitySummary",
    "SampleQuality",
    "TensorQuality",
    "cosines",
    "kl_divergence",
    "same_answer",
    "same_top1",
    "sqnr_db",
]

_BLOCK = 1 << 20
"""Elements of a tensor that are taken to float64 at once."""

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


class TensorQuality(Frozen, frozen=True):
    """What rounding did to one matrix."""

    component: str
    name: str
    scheme: str
    """Full name of the scheme."""
    method: str
    sqnr_db: float | None
    """Ratio of signal to rounding noise in decibels, None where nothing was lost."""
    bytes: int


class FloatTensor(Frozen, frozen=True):
    """A matrix that the plan wanted as integers and that stayed float."""

    component: str
    name: str
    reason: str


class SampleQuality(Frozen, frozen=True):
    """One question and what became of its answer."""

    name: str
    question: str
    given: str | None
    """The right answer, where there is one."""
    original: str
    """The original's answer."""
    answer: str
    """The quantised model's own."""
    same: bool
    """Whether the two are the same, token for token."""
    top1: float
    kl: tuple[float, ...]
    """KL divergence at each token of the original's answer."""
    image_token_cosine: float
    """The least of its image tokens."""


class QualityReport(Frozen, frozen=True):
    """Everything that was measured."""

    checkpoint: str
    target: str
    plan: str
    summary: QualitySummary
    samples: tuple[SampleQuality, ...]
    tensors: tuple[TensorQuality, ...]
    tensors_left_out: str | None
    """Why there are no `tensors`, where there are none."""
    weight_bytes: dict[str, int]
    """Bytes of the bundle's weights by storage form."""
    kept_in_float: tuple[FloatTensor, ...]


def kl_divergence(original: Float32, logits: Float32) -> Float64:
    """KL divergence of each row's softmax from the original's: sum of p (log p - log q), in nats.

    In float64, with the largest logit of each row taken off first. A row that holds a NaN or an
    infinity diverges by infinity.

    Args:
        original: Logits of p, `[K, V]`.
        logits: Logits of q, `[K, V]`.

    Returns:
        float64 `[K]`, 0 or more.

    Source: Kullback and Leibler, On Information and Sufficiency, 1951.
    """
    _check_same_shape(original, logits)
    result = np.full(len(original), np.inf)
    # Row by row: a row of a large vocabulary takes a few megabytes in float64, an answer dozens.
    for at, (wanted, got) in enumerate(zip(original, logits, strict=True)):
        if np.isfinite(wanted).all() and np.isfinite(got).all():
            p, q = _log_softmax(wanted), _log_softmax(got)
            # Rounding may leave a sum that is a little below 0.
            result[at] = max(float(np.sum(np.exp(p) * (p - q))), 0.0)
    return result


def _log_softmax(row: Float32) -> Float64:
    shifted = row.astype(np.float64) - np.float64(row.max())
    return shifted - np.log(np.exp(shifted).sum())  # type: ignore[no-any-return]


def same_top1(original: Float32, logits: Float32) -> NDArray[np.bool_]:
    """Whether the likeliest token of each row is the original's. Shapes: `[K, V]` to `[K]`."""
    _check_same_shape(original, logits)
    return np.asarray(original.argmax(-1) == logits.argmax(-1))


def same_answer(original: Float32, logits: Float32) -> bool:
    """Whether the greedy answer is the original's, both given logits along the original's.

    Greedy decoding leaves the original's answer where an argmax first differs, and only there:
    so it gives the same tokens exactly if all agree.
    """
    return bool(same_top1(original, logits).all())


def cosines(original: Float32, got: Float32) -> Float64:
    """Cosine of each vector with the original's; 1 where both are zero. Shapes: `[N, D]` to `[N]`.

    A vector that holds a NaN or an infinity counts as the opposite of anything: -1.
    """
    _check_same_shape(original, got)
    a, b = original.astype(np.float64), got.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    both_zero = ~a.any(-1) & ~b.any(-1)
    found = np.where(both_zero, 1.0, (a * b).sum(-1) / np.where(norms > 0, norms, 1.0))
    finite = np.isfinite(a).all(-1) & np.isfinite(b).all(-1)
    return np.where(finite, np.clip(found, -1, 1), -1.0)


def sqnr_db(weight: Float32, rounded: Float32) -> float | None:
    """Ratio of a tensor's power to that of its rounding error, in decibels; None without error.

    Source: Jayant and Noll, Digital Coding of Waveforms, 1984, section 4.1.
    """
    _check_same_shape(weight, rounded)
    signal = noise = 0.0
    rows = max(1, _BLOCK // max(1, weight[:1].size))
    for start in range(0, len(weight), rows):
        exact = weight[start : start + rows].astype(np.float64)
        signal += float(np.square(exact).sum())
        noise += float(np.square(rounded[start : start + rows] - exact).sum())
    if noise == 0:
        return None
    # A tensor of zeros that is not rounded to zeros has no signal at all.
    return 10 * float(np.log10(max(signal, 1e-300) / noise))


def _check_same_shape(original: Float32, got: Float32) -> None:
    if original.shape != got.shape:
        raise ValueError(f"shapes differ: {original.shape} and {got.shape}")
