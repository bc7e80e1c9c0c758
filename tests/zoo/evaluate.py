"""Exact match of a checkpoint on held-out pictures: `python -m tests.zoo.evaluate DIRECTORY`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from transformers import SmolVLMForConditionalGeneration

from tests.zoo import checkpoint
from tests.zoo.questions import HELD_OUT, draw_sample
from tests.zoo.tiles import split
from tests.zoo.tokenizer import END, prompt_text

Answer = Callable[[Image.Image, str], str]
"""Whatever is to be scored: a picture and a question in, the answer's text out."""

Tally = dict[str, tuple[int, int]]
"""Right and asked, by name."""


def score(answer: Answer, count: int, first: int = 0, *, verbose: bool = False) -> Tally:
    """Ask `count` held-out questions and count the answers that match exactly.

    Args:
        answer: Called once a question; surrounding white space of its answer does not count.
        count: How many; kinds take turns, so a multiple of six asks each equally often.
        first: Number of the first held-out picture.
        verbose: Print every wrong answer.

    Returns:
        Tallies under `all`, `kind colour`, ..., `aspect square`, ...
    """
    tally: Tally = {}
    for index in range(first, first + count):
        sample = draw_sample(HELD_OUT, index)
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


def transformers_answer(path: Path, max_new_tokens: int = 12) -> Answer:
    """Greedy answers of a checkpoint directory through transformers, in fp32."""
    config, _, tokenizer = checkpoint.read(path)
    model = SmolVLMForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    model.eval()  # type: ignore[no-untyped-call]
    tile = config["vision_config"]["image_size"]
    longest = config["vision_config"]["size"]["longest_edge"]
    end = tokenizer.token_to_id(END)

    def answer(picture: Image.Image, question: str) -> str:
        tiles, rows, cols = split(picture, tile, longest)
        prompt = prompt_text(question, rows, cols, checkpoint.tokens_per_tile(config))
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            out = model.generate(  # type: ignore[misc]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                pixel_attention_mask=torch.ones(pixels[:, :, 0].shape, dtype=torch.bool),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=2,
            )
        return str(tokenizer.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=True))

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
    print(table(score(answer, arguments.count, arguments.first, verbose=arguments.verbose)))
    print(f"{time.monotonic() - began:.0f} s, pictures from {arguments.first}")


if __name__ == "__main__":
    main()
