"""An exact outlier twin of a checkpoint: `python -m tests.zoo.outliers CHECKPOINT OUT`.

Published models have channels that are far larger than the rest, and models trained for minutes
have none. A twin gets some without changing what it computes: whatever makes a channel is
multiplied by a power of two, and the columns that read the channel are divided by it. In float32
that rounds nothing. What quantises weights by groups of columns, by whole matrices, or activations
by tokens then meets the real difficulty.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.zoo import checkpoint
from tests.zoo.families.base import Family
from tests.zoo.model import Config, Params, head_size

FACTORS = (32.0, 64.0)
"""Powers of two: they change exponents and nothing else."""
CHANNELS = 8
"""Outliers in each place."""
LOUDEST = 16
"""Outliers are drawn among this many channels with the largest weights on both sides."""


@dataclass(frozen=True)
class Site:
    """A place where channels may be rescaled.

    Every consumer has `repeat` columns for a channel, `size` next to each other for a group of
    `size` channels: query heads that share a key and value head.
    """

    producers: tuple[str, ...]
    """Vectors, or matrices with a row for each channel."""
    consumers: tuple[str, ...]
    repeat: int = 1
    size: int = 1

    def columns(self, channel: int) -> list[int]:
        """The columns that read a channel."""
        group, place = divmod(channel, self.size)
        return [(group * self.repeat + i) * self.size + place for i in range(self.repeat)]


def sites(family: Family, config: Config, weights: Params) -> Iterator[Site]:
    """Every place of a checkpoint, decoder first."""
    text = config.get("text_config", config)
    heads, kv = text["num_attention_heads"], text["num_key_value_heads"]
    at = family.embedding().removesuffix("embed_tokens.weight") + "layers."
    for i in range(text["num_hidden_layers"]):
        attention, mlp = f"{at}{i}.self_attn.", f"{at}{i}.mlp."
        qkv, up = _tensors(weights, attention, "qkv", "_proj."), mlp + "up_proj.weight"
        values = _tensors(weights, attention, "v", "_proj.")
        yield Site((f"{at}{i}.input_layernorm.weight",), _matrices(qkv))
        yield Site(values, (attention + "o_proj.weight",), heads // kv, head_size(text))
        yield Site((f"{at}{i}.post_attention_layernorm.weight",), (mlp + "gate_proj.weight", up))
        yield Site((up,), (mlp + "down_proj.weight",))
    eye = next(n for n in weights if "patch_embedding" in n).split("embeddings.")[0]
    for norm in sorted(n for n in weights if n.startswith(eye) and n.endswith("norm1.weight")):
        layer = norm.removesuffix("layer_norm1.weight")
        attention = layer + "self_attn."
        qkv = _tensors(weights, attention, "qkv", "_proj.")
        yield Site(_tensors(weights, layer, ("layer_norm1",), "."), _matrices(qkv))
        values = _tensors(weights, attention, "v", "_proj.")
        yield Site(values, (attention + "out_proj.weight",))
        yield Site(_tensors(weights, layer, ("layer_norm2",), "."), (layer + "mlp.fc1.weight",))


def rescale(
    family: Family, config: Config, weights: Params, seed: int = 0, channels: int = CHANNELS
) -> Params:
    """Weights with outliers, and the same answers.

    Args:
        family: Whose layout the weights have.
        config: config.json.
        weights: float32, by published name; they stay as they are.
        seed: Chooses channels and factors.
        channels: How many of each place.
    """
    generator = torch.Generator().manual_seed(seed)
    scaled = {name: value.clone() for name, value in weights.items()}
    for site in sites(family, config, weights):
        loud = _loudness(site, weights).topk(LOUDEST).indices
        for channel in loud[torch.randperm(LOUDEST, generator=generator)[:channels]].tolist():
            factor = FACTORS[int(torch.randint(len(FACTORS), (), generator=generator))]
            for name in site.producers:
                scaled[name][channel] *= factor
            for name in site.consumers:
                scaled[name][:, site.columns(channel)] /= factor
    return scaled


def write_twin(source: Path, out: Path, seed: int = 0, channels: int = CHANNELS) -> Path:
    """Write the twin of a checkpoint of the zoo, in float32; returns `out`."""
    family, config, weights, _ = checkpoint.read(source)
    shutil.copytree(
        source, out, ignore=shutil.ignore_patterns("model.safetensors"), dirs_exist_ok=True
    )
    text = json.dumps({**config, "torch_dtype": "float32"}, indent=2) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")
    scaled = rescale(family, config, weights, seed, channels)
    save_file(scaled, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _tensors(weights: Params, at: str, names: str | tuple[str, ...], end: str) -> tuple[str, ...]:
    """Weights, and biases where there are some, of several layers."""
    found = (f"{at}{name}{end}{kind}" for name in names for kind in ("weight", "bias"))
    return tuple(name for name in found if name in weights)


def _matrices(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name.endswith(".weight"))


def _loudness(site: Site, weights: Params) -> Tensor:
    """How much each channel says: the size of what makes it times the size of what reads it."""
    made = weights[site.producers[0]]
    made = made.abs() if made.ndim == 1 else torch.linalg.vector_norm(made, dim=1)
    read = sum(weights[name].square().sum(0) for name in site.consumers)
    assert isinstance(read, Tensor)
    columns = torch.tensor([site.columns(channel) for channel in range(len(made))])
    return made * read[columns].sum(1).sqrt()


def main() -> None:
    """Read the command line and write the twin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--channels", type=int, default=CHANNELS, help="outliers in each place")
    arguments = parser.parse_args()
    write_twin(arguments.checkpoint, arguments.out, arguments.seed, arguments.channels)


if __name__ == "__main__":
    main()
