"""Writes the default calibration set: `python -m tests.zoo.calibration_set DIRECTORY`.

Pictures with questions of every kind, of a split that neither training nor any measuring sees, and
`samples.jsonl`, with an object on each line. `quality_samples` gives those of another split, on
which the damage of a quantisation is measured.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tests.zoo.draw import CANVAS, Lettering
from tests.zoo.questions import CALIBRATION, KINDS, MEASURE, Exam, Sample, draw_sample

COUNT = 48
LONGEST = 200
"""Most pixels of a side: grain makes large pictures large files."""
EVERYONE = Exam(KINDS, widest=2.0, lettering=Lettering(18.0, 22.0))
"""Pictures that every family of the zoo can see: text is large, and clear of tiles' edges."""
_STRIDE = 1000 * len(KINDS)
"""From the number of a picture to the next that may stand in for it, of the same kind."""


@dataclass(frozen=True)
class Asked:
    """A picture, a question about it and the right answer."""

    picture: Image.Image
    question: str
    answer: str
    kind: str


def quality_samples(exam: Exam, count: int, first: int = 0) -> list[Asked]:
    """Pictures and questions to measure on; kinds take turns.

    Args:
        exam: What is asked; that of a checkpoint is `family_of(path).exam`.
        count: How many.
        first: Number of the first.
    """
    return [_asked(draw_sample(MEASURE, i, exam)) for i in range(first, first + count)]


def calibration_samples(count: int = COUNT) -> list[Asked]:
    """The default calibration set; kinds take turns."""
    return [_asked(_small_sample(i)) for i in range(count)]


def write(out: Path, count: int = COUNT) -> None:
    """Write `samples.jsonl` and the pictures into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, asked in enumerate(calibration_samples(count)):
        name = f"{number:03}.png"
        asked.picture.save(out / name, optimize=True)
        lines.append({"image": name, "question": asked.question, "answer": asked.answer})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out / "samples.jsonl").write_text(text, encoding="utf-8")


def _small_sample(number: int) -> Sample:
    """A picture of the calibration split, the first of its numbers that is small enough."""
    while True:
        sample = draw_sample(CALIBRATION, number, EVERYONE)
        if CANVAS <= max(sample.scene.image.size) <= LONGEST:
            return sample
        number += _STRIDE


def _asked(sample: Sample) -> Asked:
    question = sample.question
    return Asked(sample.scene.image, question.text, question.answer, question.kind)


def main() -> None:
    """Read the command line and write the set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=COUNT)
    arguments = parser.parse_args()
    write(arguments.out, arguments.count)


if __name__ == "__main__":
    main()
