"""Writes one held-out picture: `python -m tests.zoo.picture INDEX FILE.png`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.zoo.questions import HELD_OUT, WORDS, draw_sample


def main() -> None:
    """Write a picture that one word answers; print its question and the right answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("index", type=int, help="number of the held-out picture")
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    sample = draw_sample(HELD_OUT, arguments.index, WORDS)
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    sample.scene.image.save(arguments.file)
    print(f"{sample.question.text} {sample.question.answer}")


if __name__ == "__main__":
    main()
