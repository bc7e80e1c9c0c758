"""Exact match of a checkpoint on held-out pictures: `python -m tests.zoo.evaluate DIRECTORY`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from tests.zoo import checkpoint
from tests.zoo.families import family_of
from tests.zoo.oracle import oracle
from tests.zoo.questions import FULL, HELD_OUT, Exam, draw_sample

Answer = Callable[[Image.Image, str], str]
"""Whatever is to be scored: a picture and a question in, the answer's text out."""

Tally = dict[str, tuple[int, int]]
"""Right and asked, by name."""


def score(
    answer: Answer, count: int, first: int = 0, *, exam: Exam = FULL, verbose: bool = False
) -> Tally:
    """Ask `count` held-out questions and count the answers that match exactly.

    Args:
        answer: Called once a question; surrounding white space of its answer does not count.
        count: How many; kinds take turns, so a multiple of their number asks each equally often.
        first: Number of the first held-out picture.
        exam: Which questions and pictures; that of a checkpoint is `family_of(path).exam`.
        verbose: Print every wrong answer.

    Returns:
        Tallies under `all`, `kind colour`, ..., `aspect square`, ...
    """
    tally: Tally = {}
    for index in range(first, first + count):
        sample = draw_sample(HELD_OUT, index, exam)
        question = sample.question
        got = answer(sample.scene.image, question.text).strip()
        right = got == question.answer
        if verbose and not right:
            print(f"picture {index}: {question.text} wanted {question.answer} got {got}")
        for name in ("all", f"kind {question.kind}", f"aspect {sample.scene.aspect}"):
            hits, asked = tally.get(name, (0, 0))
            tally[name] = (hits + right, asked + 1)
    return tally


def table(tally: Tally) -> str:
    """The tallies as lines of text, `all` first."""
    names = sorted(tally, key=lambda name: (name != "all", name))
    lines = [f"{'':18}{'right':>7}{'asked':>7}{'exact match':>13}"]
    for name in names:
        hits, asked = tally[name]
        lines.append(f"{name:18}{hits:>7}{asked:>7}{hits / asked:>12.1%}")
    return "\n".join(lines)


def transformers_answer(path: Path, max_new_tokens: int = 48) -> Answer:
    """Greedy answers of a checkpoint directory through transformers, in fp32."""
    family, config, weights, tokens = checkpoint.read(path)
    model, end = oracle(config, weights), family.end_id(tokens)

    def answer(picture: Image.Image, question: str) -> str:
        pixels = family.pixels(picture)
        ids = family.prefix(tokens, config, pixels.grid) + family.asked(tokens, question)
        written = [*model.greedy(ids, pixels, max_new_tokens), end]
        return family.answer_text(tokens, written[: written.index(end)])

    return answer


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--first", type=int, default=0, help="number of the first picture")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="print every wrong answer")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    began = time.monotonic()
    answer = transformers_answer(arguments.checkpoint)
    exam = family_of(arguments.checkpoint).exam
    count, first, verbose = arguments.count, arguments.first, arguments.verbose
    print(table(score(answer, count, first, exam=exam, verbose=verbose)))
    print(f"{time.monotonic() - began:.0f} s, pictures from {arguments.first}")


if __name__ == "__main__":
    main()
