"""Starts a family from the trained SmolVLM: `python -m tests.zoo.transplant FAMILY DIRECTORY`.

Layers of equal shape are taken over; key and value heads are repeated where every query head has
its own; positions and patch kernels are resized; a piece of the new vocabulary begins as the mean
of the old pieces that write the same text. The rest, the projector above all, is random.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.zoo import checkpoint
from tests.zoo.draw import COLOURS, SHAPES
from tests.zoo.families import FAMILIES
from tests.zoo.families.base import Family
from tests.zoo.families.smolvlm import END, EYE, TEXT
from tests.zoo.model import Params, init_params
from tests.zoo.questions import NUMBERS
from tests.zoo.tokenizer import Tokens

_MARKS = {"</s>": END, "<s>": "<|im_start|>", "<|im_end|>": END}


def transplant(family: Family, seed: int = 1) -> Params:
    """First weights of a family."""
    _, _, source, old = checkpoint.read(checkpoint.CHECKPOINTS / "smolvlm-tiny")
    tokens = family.train_tokenizer()
    config = family.config(tokens)
    params = init_params(family.param_shapes(config), seed)
    eye = next(n for n in params if "patch_embedding" in n).split("embeddings.")[0]
    text = family.embedding().removesuffix("embed_tokens.weight")
    for name, value in params.items():
        for ours, theirs in ((eye, EYE), (text, TEXT)):
            other = source.get(theirs + name.removeprefix(ours)) if name.startswith(ours) else None
            if other is not None and "embed_tokens" not in name:
                params[name] = _fitted(name, other, tuple(value.shape))
    params[family.embedding()] = _rows(tokens, old, source[TEXT + "embed_tokens.weight"])
    if family.head() != family.embedding():
        params[family.head()] = _rows(tokens, old, source["lm_head.weight"])
    else:
        _write_answers(params[family.head()], tokens, old, source["lm_head.weight"])
    return params


def _fitted(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor brought to another shape; an equal shape leaves it as it is."""
    if tuple(value.shape) == shape:
        return value.clone()
    if "position_embedding" in name:
        old, extra = math.isqrt(len(value)), shape[0] - math.isqrt(shape[0]) ** 2
        new = math.isqrt(shape[0])
        grid = value.T.reshape(1, -1, old, old)
        grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
        rows = grid.flatten(2)[0].T
        return torch.cat([rows.mean(0, keepdim=True)] * extra + [rows])
    if "patch_embedding" in name:
        new = shape[-1]
        scale = (value.shape[-1] / new) ** 2
        return F.interpolate(value, (new, new), mode="bilinear", antialias=True) * scale
    if "k_proj" in name or "v_proj" in name:
        heads = value.view(-1, 32, value.shape[-1])
        return heads.repeat_interleave(shape[0] // len(value), 0).reshape(shape)
    raise ValueError(f"zoo: {name}: got {tuple(value.shape)}, wanted {shape}")


def _rows(tokens: Tokens, old: Tokens, matrix: Tensor) -> Tensor:
    """A row of each new piece."""
    rows = []
    for text in tokens.texts():
        ids = old.encode(_MARKS.get(text, text))
        rows.append(matrix[ids].mean(0) if ids else matrix.mean(0))
    return torch.stack(rows)


def _write_answers(rows: Tensor, tokens: Tokens, old: Tokens, head: Tensor) -> None:
    """Give a tied matrix the old head's rows for the pieces that begin an answer."""
    words = [w.capitalize() for w in (*COLOURS, *SHAPES)] + [n[:-1] for n in NUMBERS]
    for word in [*words, "Yes", "No", "Left", "Right", "Top", "Bottom"]:
        first = tokens.encode(word)[0]
        rows[first] = head[old.encode(" " + word)[0]]


def main() -> None:
    """Read the command line and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    family = FAMILIES[arguments.family]
    config = family.config(family.train_tokenizer())
    checkpoint.write(arguments.out, family, config, transplant(family))


if __name__ == "__main__":
    main()
