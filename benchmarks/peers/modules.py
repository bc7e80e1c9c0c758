"""The shapes as plain torch modules, for peers that convert what torch traces or exports.

The decoder is a Llama or Qwen2 with its KV cache in and out, by the operators that exporters of
transformers write: RMSNorm spelled out, rotation by halves, scaled_dot_product_attention.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.peers.peer import Case
from benchmarks.peers.weights import read_weights


class RmsNorm(nn.Module):
    """x over its root mean square. Source: transformers, LlamaRMSNorm."""

    def __init__(self, width: int, eps: float) -> None:
        """An unscaled norm."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: `[B, T, D]`."""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    """Grouped-query attention behind a cache. Source: transformers, LlamaAttention."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Reads the sizes of a Llama or Qwen2."""
        super().__init__()
        width, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.keys, self.size = config["num_key_value_heads"], width // self.heads
        bias = config["model_type"] == "qwen2"
        self.q_proj = nn.Linear(width, self.heads * self.size, bias=bias)
        self.k_proj = nn.Linear(width, self.keys * self.size, bias=bias)
        self.v_proj = nn.Linear(width, self.keys * self.size, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.size, width, bias=False)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Shapes: `x` `[B, T, D]`, `past` `[B, Hkv, S, Dh]`; returns the cache T longer."""
        batch, steps = x.shape[0], x.shape[1]
        q = self.q_proj(x).view(batch, steps, self.heads, self.size).transpose(1, 2)
        k = self.k_proj(x).view(batch, steps, self.keys, self.size).transpose(1, 2)
        v = self.v_proj(x).view(batch, steps, self.keys, self.size).transpose(1, 2)
        q, k = rotated(q, *rotation), rotated(k, *rotation)
        k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        out = functional.scaled_dot_product_attention(
            q, repeated(k, self.heads // self.keys), repeated(v, self.heads // self.keys), mask
        )
        out = out.transpose(1, 2).reshape(batch, steps, self.heads * self.size)
        return self.o_proj(out), (k, v)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding by halves."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos + turned * sin


def repeated(x: Tensor, count: int) -> Tensor:
    """Heads of keys for every head of queries. Source: transformers, repeat_kv."""
    if count == 1:
        return x
    batch, heads, length, size = x.shape
    wide = x[:, :, None].expand(batch, heads, count, length, size)
    return wide.reshape(batch, heads * count, length, size)


class Mlp(nn.Module):
    """Gated by SiLU. Source: transformers, LlamaMLP."""

    def __init__(self, width: int, inner: int) -> None:
        """Three matrices."""
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: `[B, T, D]`."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Norms, attention, MLP."""
        super().__init__()
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn = Attention(config)
        self.mlp = Mlp(width, config["intermediate_size"])
        self.input_layernorm = RmsNorm(width, eps)
        self.post_attention_layernorm = RmsNorm(width, eps)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As `Attention`, with the residuals."""
        out, cache = self.self_attn(self.input_layernorm(x), rotation, mask, past)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Decoder(nn.Module):
    """Ids and cache in; logits behind the last id and cache out."""

    speeds: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        """A Llama or Qwen2 of these sizes."""
        super().__init__()
        width = config["hidden_size"]
        self.embed_tokens = nn.Embedding(config["vocab_size"], width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = RmsNorm(width, config["rms_norm_eps"])
        self.lm_head = nn.Linear(width, config["vocab_size"], bias=False)
        if config["tie_word_embeddings"]:
            self.lm_head.weight = self.embed_tokens.weight
        size = width // config["num_attention_heads"]
        steps = torch.arange(0, size, 2, dtype=torch.float32) / size
        self.register_buffer("speeds", config["rope_theta"] ** -steps, persistent=False)
        self.cache_shape = (1, config["num_key_value_heads"], 0, size)

    def forward(self, ids: Tensor, beam: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """Which sequences go on is an input because OpenVINO's fusion of caches looks for it.

        Shapes: `ids` `[1, T]`, `beam` `[1]`, `caches` keys and values of each layer in turns
            `[1, Hkv, S, Dh]`.
        """
        past, steps = caches[0].shape[2], ids.shape[1]
        positions = torch.arange(past, past + steps)
        angles = positions[:, None].float() * self.speeds[None]
        angles = torch.cat((angles, angles), -1)
        rotation = angles.cos()[None, None], angles.sin()[None, None]
        mask = torch.arange(past + steps)[None] <= positions[:, None]
        x = self.embed_tokens(ids)
        kept: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            pair = [cache.index_select(0, beam) for cache in caches[2 * index : 2 * index + 2]]
            x, cache = layer(x, rotation, mask[None, None], (pair[0], pair[1]))
            kept += cache
        return (self.lm_head(self.norm(x[:, -1:])), *kept)


def decoder_of(case: Case) -> Decoder:
    """The decoder with the case's weights."""
    config = json.loads((Path(case.text) / "config.json").read_text())
    decoder = Decoder(config)
    weights = {
        name.removeprefix("model."): torch.from_numpy(values)
        for name, values in read_weights(Path(case.text) / "model.safetensors")
    }
    if config["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    decoder.load_state_dict(weights)
    return decoder.eval()


class VisionLayer(nn.Module):
    """One layer of SigLIP. Source: transformers, SiglipEncoderLayer."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Norms, attention, MLP."""
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.heads = config["num_attention_heads"]
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-6)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-6)
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: `[B, P, D]`."""
        batch, patches, width = x.shape
        normed = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[name](normed)
            .view(batch, patches, self.heads, width // self.heads)
            .transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        out = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.self_attn["out_proj"](out.reshape(batch, patches, width))
        inner = functional.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh")
        y: Tensor = x + self.mlp["fc2"](inner)
        return y


class Tower(nn.Module):
    """Pixels of a tile to image tokens: SigLIP and the projector behind it."""

    def __init__(self, config: dict[str, Any], width: int) -> None:
        """A tower of these sizes; `width` is the decoder's."""
        super().__init__()
        self.config, eye, patch = config, config["hidden_size"], config["patch_size"]
        self.grid = config["image_size"] // patch
        self.patch_embedding = nn.Conv2d(3, eye, patch, patch)
        self.position_embedding = nn.Embedding(self.grid**2, eye)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config["num_hidden_layers"]))
        self.post_layernorm = nn.LayerNorm(eye, eps=1e-6)
        if "group" in config:
            inner = 4096
            self.projector: nn.Module = nn.Sequential(
                nn.Linear(config["group"] * eye, inner), nn.GELU("tanh"), nn.Linear(inner, width)
            )
        else:
            self.projector = nn.Linear(eye * config["shuffle"] ** 2, width, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Shapes: float `[B, 3, edge, edge]` to `[B, N, D]`."""
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = x + self.position_embedding.weight[None]
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.projector(self._joined(self.post_layernorm(x)))
        return out

    def _joined(self, x: Tensor) -> Tensor:
        """Neighbouring patches side by side: blocks (SmolVLM) or runs of a row (OmniVLM)."""
        batch, patches, width = x.shape
        if "group" in self.config:
            group = self.config["group"]
            return x.reshape(batch, patches // group, group * width)
        side = self.config["shuffle"]
        cells = self.grid // side
        x = x.view(batch, cells, side, cells, side * width).transpose(2, 3)
        return x.reshape(batch, cells * cells, side * side * width)


def tower_of(case: Case) -> Tower:
    """The tower with the case's weights."""
    config = json.loads((Path(case.vision) / "config.json").read_text())
    text = json.loads((Path(case.text) / "config.json").read_text())
    tower = Tower(config, text["hidden_size"])
    names = (("tower.encoder.", ""), ("tower.embeddings.", ""), ("tower.", ""))
    weights = {}
    for name, values in read_weights(Path(case.vision) / "model.safetensors"):
        if ".head." in name:
            continue
        for old, new in names:
            if name.startswith(old):
                name = new + name.removeprefix(old)
        weights[name] = torch.from_numpy(values)
    tower.load_state_dict(weights)
    return tower.eval()
