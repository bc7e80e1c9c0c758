"""Training batches: drawn pictures with several questions each, and labels for the warm-up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from tests.zoo.checkpoint import LONGEST_EDGE, TILE, Config, tokens_per_tile
from tests.zoo.draw import CHARACTERS, COLOURS, SHAPES, Content, Rng, Scene, draw_scene
from tests.zoo.questions import KINDS, Question, ask
from tests.zoo.tiles import split
from tests.zoo.tokenizer import answer_text, prefix_text, question_text

PATCH = 8
SIDE = TILE // PATCH
HEADS = (len(SHAPES) + 1, len(COLOURS) + 1, len(CHARACTERS) + 1, 2, SIDE, SIDE)
"""Classes of the labels of a patch: shape, colour, character, middle of a shape, row, column.

Row and column within the tile are asked because features that say only what is there make the
decoder mix up sides and the order of characters.
"""


@dataclass(frozen=True)
class Batch:
    """Pictures of one grid, each followed by its packed questions.

    Shapes:
        tiles: uint8 [B * G, TILE, TILE, 3]. labels: [B * G, P, 6], see `HEADS`.
        ids, positions: [B, T]. mask: float [B, 1, T, T]. targets: [B, T], -100 where no answer.
    """

    tiles: Tensor
    labels: Tensor
    ids: Tensor
    positions: Tensor
    mask: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Drawn:
    """One picture, preprocessed."""

    tiles: NDArray[np.uint8]
    labels: NDArray[np.int64]
    questions: list[Question]


def batches(
    config: Config, tokenizer: Tokenizer, seed: list[int], tiles: int, questions: int
) -> Iterator[Batch]:
    """Endless batches of about `tiles` tiles; pictures of equal grids are gathered together.

    Without `questions` they are for the warm-up, and every other picture is a page of text.
    """
    rng = np.random.default_rng(seed)
    waiting: dict[tuple[int, int], list[Drawn]] = {}
    while True:
        scene = draw_scene(rng, _content(rng, questions))
        pixels, rows, cols = split(scene.image, TILE, LONGEST_EDGE)
        drawn = Drawn(pixels, patch_labels(scene, rows, cols), _ask_all(scene, rng, questions))
        if questions and not drawn.questions:
            continue
        group = waiting.setdefault((rows, cols), [])
        group.append(drawn)
        if len(group) * len(pixels) >= tiles:
            prefix = tokenizer.encode(prefix_text(rows, cols, tokens_per_tile(config))).ids
            yield _collate(group, prefix, tokenizer)
            waiting[rows, cols] = []


def _content(rng: Rng, questions: int) -> Content:
    chance = rng.random()
    if not questions and rng.random() < 0.5:
        return "page"
    if chance < 0.4:
        return "shapes" if chance < 0.2 else "crowd"
    return "text" if chance < 0.65 else "both"


def _ask_all(scene: Scene, rng: Rng, most: int) -> list[Question]:
    """Up to `most` questions: reading, the other kinds in any order, then the hard ones again."""
    found: list[Question] = []
    kinds = ["read", *rng.permutation([k for k in KINDS if k != "read"])]
    for kind in (*kinds, "position", "shape", "count", "position") if most else ():
        question = ask(scene, str(kind), rng)
        if question is not None and question not in found:
            found.append(question)
        if len(found) == most:
            break
    return found


def patch_labels(scene: Scene, rows: int, cols: int) -> NDArray[np.int64]:
    """What each patch of each tile shows; 0 is nothing, -100 is not asked.

    Shapes:
        returns: [G, P, 6], as `HEADS`; characters are not asked in the thumbnail, where they are
        too small to read.
    """
    rows, cols = max(rows, 1), max(cols, 1)
    fine = _labels(scene, rows * SIDE, cols * SIDE)
    labels = fine.reshape(rows, SIDE, cols, SIDE, 4).swapaxes(1, 2).reshape(-1, SIDE * SIDE, 4)
    if rows * cols > 1:
        small = _labels(scene, SIDE, SIDE).reshape(1, SIDE * SIDE, 4)
        small[..., 2] = -100
        labels = np.concatenate([labels, small])
    place = np.indices((SIDE, SIDE)).reshape(2, -1).T
    return np.concatenate([labels, np.broadcast_to(place, (len(labels), *place.shape))], -1)


def _labels(scene: Scene, height: int, width: int) -> NDArray[np.int64]:
    """Labels on a grid of height x width patches laid over the whole picture."""
    labels = np.zeros((height, width, 4), np.int64)
    sx, sy = width / scene.image.width, height / scene.image.height
    xs, ys = (np.arange(width) + 0.5) / sx, (np.arange(height) + 0.5) / sy
    for item in scene.shapes:
        left, top, right, bottom = item.box
        inside = np.ix_((ys > top) & (ys < bottom), (xs > left) & (xs < right))
        labels[..., 0][inside] = SHAPES.index(item.shape) + 1
        labels[..., 1][inside] = list(COLOURS).index(item.colour) + 1
        x, y = item.centre
        labels[int(y * sy), int(x * sx), 3] = 1
    for text in scene.texts:
        for (x, y), character in zip(text.characters, text.text, strict=True):
            labels[int(y * sy), int(x * sx), 2] = CHARACTERS.index(character) + 1
    return labels


def _collate(group: list[Drawn], prefix: list[int], tokenizer: Tokenizer) -> Batch:
    rows = [_pack(drawn.questions, prefix, tokenizer) for drawn in group]
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
        torch.from_numpy(np.concatenate([drawn.tiles for drawn in group])),
        torch.from_numpy(np.concatenate([drawn.labels for drawn in group])),
        ids,
        positions,
        mask,
        targets,
    )


def _pack(
    questions: list[Question], prefix: list[int], tokenizer: Tokenizer
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Ids, positions, targets and part numbers (0 is the picture) of one packed row."""
    ids, positions = list(prefix), list(range(len(prefix)))
    targets, parts = [-100] * len(prefix), [0] * len(prefix)
    for number, question in enumerate(questions, 1):
        asked = tokenizer.encode(question_text(question.text)).ids
        answer = tokenizer.encode(answer_text(question.answer)).ids
        ids += asked + answer
        positions += range(len(prefix), len(prefix) + len(asked) + len(answer))
        # The target of a position is the token after it.
        targets += [-100] * (len(asked) - 1) + answer + [-100]
        parts += [number] * (len(asked) + len(answer))
    return ids, positions, targets, parts
