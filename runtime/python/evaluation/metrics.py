"""Scores of an answer, from 0 to 1, by the rules of the public benchmarks.

Nothing is forgiven that the rules do not forgive: in `exact` and `relaxed` a full stop behind the
answer makes it wrong, as it does in VLMEvalKit (issue 842 there).

Source: VLMEvalKit, vlmeval/dataset/utils/vqa_eval.py (which metric scores which benchmark, and
    how) and vlmeval/dataset/image_vqa.py (OCRBench).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from lorgnette.runtime.evaluation.edit_distance import edit_distance
from lorgnette.runtime.evaluation.vqa_text import normalise

RELAXED_TOLERANCE = 0.05
"""How far, relative to it, a number may be from the accepted one."""
ANLS_THRESHOLD = 0.5
"""Similarities below this count as 0."""
VQA_MATCHES = 3
"""Accepted answers that an answer must equal for the full score."""

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


def exact(answer: str, accepted: Sequence[str]) -> float:
    """1 where the answer is an accepted one, whatever the case and the space around it."""
    told = _folded(answer)
    return float(any(told == _folded(one) for one in accepted))


def contains(answer: str, accepted: Sequence[str]) -> float:
    """1 where an accepted answer stands somewhere in the answer, whatever the case.

    Line ends count as spaces. (OCRBench. Its category of handwritten formulas is compared without
    any spaces there, which is not done here.)
    """
    told = _folded(answer.replace("\n", " "))
    return float(any(_folded(one.replace("\n", " ")) in told for one in accepted))


def relaxed(answer: str, accepted: Sequence[str]) -> float:
    """1 where the answer is a number within 5 % of an accepted one, or else equals one.

    A number is written with digits, perhaps a sign, a point, an exponent or a percent sign, which
    divides by 100. An accepted number that is 0, and all that is not a number, must be equal as
    text, whatever the case.

    Source: Masry et al., ChartQA, 2022, section 5.1; google-research/pix2struct, metrics.py.
    """
    return float(any(_is_close(answer.strip(), one.strip()) for one in accepted))


def anls(answer: str, accepted: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity: the similarity to the nearest accepted answer.

    With both in lower case and every run of spaces one space, 1 - distance / length of the longer;
    0 where that is below the threshold. (At exactly 0.5 the paper gives 0; the evaluation server
    of DocVQA and VLMEvalKit give 0.5, and so does this.)

    Source: Biten et al., Scene Text Visual Question Answering, 2019, section 4.1.
    """
    told = _spaced(answer)
    best = max((_similarity(told, _spaced(one)) for one in accepted), default=0.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def vqa(answer: str, accepted: Sequence[str]) -> float:
    """VQA accuracy: how many people gave the answer, three of them being enough.

    The mean over all accepted answers, leaving each one out in turn, of min(1, matches / 3) with
    the others. Before, all are normalised (see `vqa_text`). A single accepted answer leaves
    nothing behind when it is left out: there the score is 1 where the answer equals it.

    Source: Antol et al., VQA, 2015, section 3; https://visualqa.org/evaluation.html.
    """
    told = normalise(answer)
    same = [normalise(one) == told for one in accepted]
    if len(same) <= 1:
        return float(sum(same))
    matches = sum(same)
    scores = [min(1.0, (matches - own) / VQA_MATCHES) for own in same]
    return sum(scores) / len(scores)


Metric = Callable[[str, Sequence[str]], float]

METRICS: Mapping[str, Metric] = MappingProxyType(
    {"exact": exact, "contains": contains, "relaxed": relaxed, "anls": anls, "vqa": vqa}
)
"""The metrics that compare an answer with accepted ones, by name."""


def _folded(text: str) -> str:
    return text.strip().lower()


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def _number(text: str) -> float | None:
    """What a text is as a number, None where it is none."""
    digits = text[:-1].rstrip() if text.endswith("%") else text
    if not _NUMBER.fullmatch(digits):
        return None
    value = float(digits) / 100 if text.endswith("%") else float(digits)
    return value if math.isfinite(value) else None


def _is_close(told: str, wanted: str) -> bool:
    number, target = _number(told), _number(wanted)
    if number is not None and target:
        return abs(number - target) / abs(target) <= RELAXED_TOLERANCE
    return told.lower() == wanted.lower()


def _similarity(a: str, b: str) -> float:
    longer = max(len(a), len(b))
    if longer == 0:
        return 1.0
    if abs(len(a) - len(b)) / longer > 1 - ANLS_THRESHOLD:
        return 0.0  # no need to measure what is below the threshold anyway
    return 1 - edit_distance(a, b) / longer
