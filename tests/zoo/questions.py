"""Questions about a drawn scene, each with its one right answer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tests.zoo.draw import (
    CANVAS,
    COLOURS,
    SHAPES,
    TILED,
    WIDEST,
    Content,
    Item,
    Lettering,
    Rng,
    Scene,
    draw_scene,
)

KINDS = ("colour", "shape", "position", "count", "exists", "read", "describe")
ONE_WORD = KINDS[:-1]
"""The kinds whose answer is one word."""
NUMBERS = ("Zero.", "One.", "Two.", "Three.", "Four.")
TRAIN, HELD_OUT, CALIBRATION, MEASURE = range(4)
"""First word of a picture's seed: no two splits can share a picture."""
APART = 9.0
"""Least distance from left to right, on the canvas, of shapes that a description puts in order."""

PHRASES: dict[str, tuple[str, ...]] = {
    "colour": (
        "What colour is the {}?",
        "What is the colour of the {}?",
        "Which colour does the {} have?",
        "Tell me the colour of the {}.",
    ),
    "shape": (
        "What shape is the {} one?",
        "Which shape is {}?",
        "What is the {} thing?",
        "Name the {} shape.",
    ),
    "position": (
        "Where is the {}?",
        "Where in the picture is the {}?",
        "On which side is the {}?",
        "Where do you see the {}?",
    ),
    "count": (
        "How many {} are there?",
        "How many {} do you see?",
        "Count the {}.",
        "How many {} are in the picture?",
    ),
    "exists": (
        "Is there a {}?",
        "Is there a {} in the picture?",
        "Do you see a {}?",
        "Does the picture show a {}?",
    ),
    "read": (
        "What does it say?",
        "What is written here?",
        "Read the text.",
        "What does the text say?",
        "Which characters do you see?",
    ),
    "describe": (
        "Describe the picture.",
        "What do you see?",
        "What is in the picture?",
        "Tell me what the picture shows.",
        "What are the shapes from left to right?",
    ),
}


@dataclass(frozen=True)
class Exam:
    """What a checkpoint is asked: the kinds of questions and the shapes of the pictures."""

    kinds: tuple[str, ...] = KINDS
    widest: float = WIDEST
    """Largest ratio of the longer to the shorter side."""
    lettering: Lettering = TILED

    def allows(self, kind: str, scene: Scene) -> bool:
        """Whether a question of a kind is fair: text is described only where reading is asked."""
        return kind != "describe" or not scene.texts or "read" in self.kinds


FULL = Exam()
WORDS = Exam(ONE_WORD)
"""Only what one word answers."""


@dataclass(frozen=True)
class Question:
    """One question of a kind in `KINDS`, and the answer counted as right."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """A picture with one question about it."""

    scene: Scene
    question: Question


def plural(noun: str) -> str:
    """The plural of one of the nouns used here."""
    return noun + ("es" if noun.endswith("s") else "s")


def ask(scene: Scene, kind: str, rng: Rng) -> Question | None:
    """A question of `kind` about `scene`, or None where it has no clear answer."""
    subject_and_answer = {
        "colour": _colour,
        "shape": _shape,
        "position": _position,
        "count": _count,
        "exists": _exists,
        "read": _read,
        "describe": _describe,
    }[kind](scene, rng)
    if subject_and_answer is None:
        return None
    subject, answer = subject_and_answer
    return Question(kind, phrase(kind, int(rng.integers(len(PHRASES[kind]))), subject), answer)


def phrase(kind: str, which: int, subject: str) -> str:
    """One of the phrasings of a kind, with the right article before `subject`."""
    template = PHRASES[kind][which]
    if subject.startswith("orange"):
        template = template.replace(" a {}", " an {}")
    return template.format(subject)


def draw_sample(split: int, index: int, exam: Exam = FULL) -> Sample:
    """The picture and question number `index` of a split; kinds take turns.

    Args:
        split: `TRAIN` or `HELD_OUT`.
        index: Any non-negative number; no two give the same random stream.
        exam: Which kinds, and pictures of which shapes; one exam gives a number one sample.
    """
    rng = np.random.default_rng([split, index])
    kind = exam.kinds[index % len(exam.kinds)]
    while True:
        scene = draw_scene(rng, content_for(kind, rng), exam.widest, exam.lettering)
        question = ask(scene, kind, rng) if exam.allows(kind, scene) else None
        if question is not None:
            return Sample(scene, question)


def content_for(kind: str, rng: Rng) -> Content:
    """What a picture should hold for a question of `kind`."""
    if kind == "read":
        return "text" if rng.random() < 0.6 else "both"
    if kind == "describe":
        return "shapes" if rng.random() < 0.5 else "both"
    return "shapes" if rng.random() < 0.8 else "both"


def _name(item: Item, scene: Scene, rng: Rng) -> str | None:
    """Words that point at `item` alone: its shape, or its colour and shape."""
    names = [f"{s.colour} {s.shape}" for s in scene.shapes]
    full = f"{item.colour} {item.shape}"
    if [s.shape for s in scene.shapes].count(item.shape) == 1 and rng.random() < 0.5:
        return item.shape
    return full if names.count(full) == 1 else None


def _pick(rng: Rng, items: list[Item]) -> Item | None:
    return items[int(rng.integers(len(items)))] if items else None


def _colour(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    shapes = [s.shape for s in scene.shapes]
    item = _pick(rng, [s for s in scene.shapes if shapes.count(s.shape) == 1])
    if item is None:
        return None
    alone = len(shapes) == 1 and rng.random() < 0.3
    return "shape" if alone else item.shape, item.colour.capitalize() + "."


def _shape(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    colours = [s.colour for s in scene.shapes]
    item = _pick(rng, [s for s in scene.shapes if colours.count(s.colour) == 1])
    return None if item is None else (item.colour, item.shape.capitalize() + ".")


def _position(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    item = _pick(rng, list(scene.shapes))
    if item is None:
        return None
    width, height = scene.image.size
    across = 2 * item.centre[0] / width - 1
    down = 2 * item.centre[1] / height - 1
    # Only clear cases: far from the middle along one axis, and much less so along the other.
    if max(abs(across), abs(down)) < 0.35 or abs(abs(across) - abs(down)) < 0.25:
        return None
    subject = _name(item, scene, rng)
    if subject is None:
        return None
    if abs(across) > abs(down):
        return subject, "Left." if across < 0 else "Right."
    return subject, "Top." if down < 0 else "Bottom."


def _count(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    shapes = scene.shapes
    item = _pick(rng, list(shapes))
    if item is None:
        return None
    choice = rng.random()
    if choice < 0.5:
        return "shapes", NUMBERS[len(shapes)]
    if choice < 0.75:
        return plural(item.shape), NUMBERS[sum(s.shape == item.shape for s in shapes)]
    return f"{item.colour} shapes", NUMBERS[sum(s.colour == item.colour for s in shapes)]


def _exists(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    item = _pick(rng, list(scene.shapes))
    if item is None:
        return None
    form = int(rng.integers(3))
    names = [{s.shape, f"{s.colour} shape", f"{s.colour} {s.shape}"} for s in scene.shapes]
    truths = (item.shape, f"{item.colour} shape", f"{item.colour} {item.shape}")
    if rng.random() < 0.5:
        return truths[form], "Yes."
    colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
    if form == 2 and rng.random() < 0.6:
        # The hard case: the right colour on the wrong shape, or the other way round.
        colour, shape = (item.colour, shape) if rng.random() < 0.5 else (colour, item.shape)
    subject = (shape, f"{colour} shape", f"{colour} {shape}")[form]
    return subject, "Yes." if any(subject in n for n in names) else "No."


def _read(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    del rng
    return ("", scene.texts[0].text + ".") if len(scene.texts) == 1 else None


def _describe(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    """Number and names of the shapes from left to right, and the text; too little is no answer."""
    del rng
    shapes = sorted(scene.shapes, key=lambda item: item.centre[0])
    least = APART * max(scene.image.size) / CANVAS
    crowded = any(b.centre[0] - a.centre[0] < least for a, b in pairwise(shapes))
    if not shapes or crowded or len(scene.texts) > 1 or len(shapes) + len(scene.texts) < 2:
        return None
    names = [f"{'an' if s.colour == 'orange' else 'a'} {s.colour} {s.shape}" for s in shapes]
    listed = " and ".join([name for name in (", ".join(names[:-1]), names[-1]) if name])
    number = NUMBERS[len(shapes)].removesuffix(".")
    answer = f"{number} {'shape' if len(shapes) == 1 else 'shapes'}: {listed}."
    return "", answer + "".join(f" The text says {item.text}." for item in scene.texts)
