"""Training batches: drawn pictures with several questions each, and labels for the warm-up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.zoo.draw import Content, Rng, Scene, draw_scene
from tests.zoo.families.base import Family
from tests.zoo.model import Config
from tests.zoo.questions import Exam, Question, ask
from tests.zoo.tokenizer import Tokens

_LONG_ANSWERS = ("read", "describe")


@dataclass(frozen=True)
class Batch:
    """Pictures of one grid, each followed by its packed questions.

    Shapes:
        pixels: uint8 [B * G, S, S, 3]. labels: [B * G, N, K, L], see `Family.patch_labels`.
        ids, positions: [B, T]. mask: float [B, 1, T, T]. targets: [B, T], -100 where no answer.
    """

    pixels: Tensor
    labels: Tensor
    ids: Tensor
    positions: Tensor
    mask: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Drawn:
    """One picture, preprocessed."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    questions: list[Question]


def batches(
    family: Family, config: Config, tokens: Tokens, seed: list[int], images: int, questions: int
) -> Iterator[Batch]:
    """Endless batches of about `images` pictures or tiles; equal grids are gathered together.

    Without `questions` they are for the warm-up, and where reading is learnt every other picture
    is a page of text.
    """
    rng = np.random.default_rng(seed)
    look = family.exam.widest, family.exam.lettering
    waiting: dict[tuple[int, int], list[Drawn]] = {}
    while True:
        scene = draw_scene(rng, _content(rng, family.exam, questions), *look)
        pixels = family.pixels(scene.image)
        asked = _ask_all(scene, rng, family.exam, questions)
        if questions and not asked:
            continue
        group = waiting.setdefault(pixels.grid, [])
        group.append(Drawn(pixels.values, family.patch_labels(scene, pixels), asked))
        if len(group) * len(pixels.values) >= images:
            prefix = family.prefix(tokens, config, pixels.grid)
            yield _collate(family, group, prefix, tokens)
            waiting[pixels.grid] = []


def _content(rng: Rng, exam: Exam, questions: int) -> Content:
    chance = rng.random()
    if "read" not in exam.kinds:
        return "shapes" if chance < 0.45 else "crowd" if chance < 0.8 else "both"
    if not questions and rng.random() < 0.5:
        return "page"
    if chance < 0.45:
        return "shapes" if chance < 0.2 else "crowd"
    return "text" if chance < 0.6 else "both"


def _ask_all(scene: Scene, rng: Rng, exam: Exam, most: int) -> list[Question]:
    """Up to `most` questions: long answers, the other kinds in any order, hard ones again."""
    found: list[Question] = []
    kinds = [k for k in exam.kinds if k in _LONG_ANSWERS]
    kinds += [str(k) for k in rng.permutation([k for k in exam.kinds if k not in _LONG_ANSWERS])]
    for kind in (*kinds, "position", "shape", "count", "position") if most else ():
        question = ask(scene, kind, rng) if exam.allows(kind, scene) else None
        if question is not None and question not in found:
            found.append(question)
        if len(found) == most:
            break
    return found


def _collate(family: Family, group: list[Drawn], prefix: list[int], tokens: Tokens) -> Batch:
    rows = [_pack(family, drawn.questions, prefix, tokens) for drawn in group]
    longest = max(len(row[0]) for row in rows)
    ids, positions, targets, parts = (
        torch.tensor([row[i] + [fill] * (longest - len(row[i])) for row in rows])
        for i, fill in enumerate((2, 0, -100, -1))
    )
    # A token sees the picture and the earlier tokens of its own question, never another question.
    same = (parts[:, :, None] == parts[:, None, :]) | (parts[:, None, :] == 0)
    seen = same & torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None]
    return Batch(
        torch.from_numpy(np.concatenate([drawn.pixels for drawn in group])),
        torch.from_numpy(np.concatenate([drawn.labels for drawn in group])),
        ids,
        positions,
        mask,
        targets,
    )


def _pack(
    family: Family, questions: list[Question], prefix: list[int], tokens: Tokens
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Ids, positions, targets and part numbers (0 is the picture) of one packed row."""
    ids, positions = list(prefix), list(range(len(prefix)))
    targets, parts = [-100] * len(prefix), [0] * len(prefix)
    for number, question in enumerate(questions, 1):
        asked = family.asked(tokens, question.text)
        answer = family.answered(tokens, question.text, question.answer)
        ids += asked + answer
        positions += range(len(prefix), len(prefix) + len(asked) + len(answer))
        # The target of a position is the token after it.
        targets += [-100] * (len(asked) - 1) + answer + [-100]
        parts += [number] * (len(asked) + len(answer))
    return ids, positions, targets, parts
