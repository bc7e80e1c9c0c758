"""Writes and reads a checkpoint directory in the layout of its family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.zoo.families import family_of
from tests.zoo.families.base import Family
from tests.zoo.model import Config
from tests.zoo.tokenizer import Tokens

CHECKPOINTS = Path(__file__).parent / "checkpoints"


def write(out: Path, family: Family, config: Config, weights: Mapping[str, torch.Tensor]) -> None:
    """Write the whole directory; the weights are rounded to fp16.

    Shapes:
        weights: by published name, as `family.param_shapes` gives them.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokens = family.train_tokenizer()
    tokens.save(out)
    for name, content in {"config.json": config, **family.other_files(config, tokens)}.items():
        file = out / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    halves = {k: v.detach().to(torch.float16).contiguous() for k, v in weights.items()}
    save_file(halves, out / "model.safetensors", metadata={"format": "pt"})


def read(path: Path) -> tuple[Family, Config, dict[str, torch.Tensor], Tokens]:
    """Family, config, weights as fp32, and tokenizer of a directory that `write` made."""
    family = family_of(path)
    config: Config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    weights = {k: v.float() for k, v in load_file(path / "model.safetensors").items()}
    return family, config, weights, family.load_tokenizer(path)
