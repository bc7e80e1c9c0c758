"""The LLaMA decoder with a functional KV cache, and Qwen2's, which differs by three biases."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lorgnette.export.layers.attention import CachedAttention
from lorgnette.export.layers.mlp import GatedMLP
from lorgnette.export.layers.norm import RMSNorm
from lorgnette.export.layers.rope import rope_tables
from lorgnette.export.layers.stages import Site, Stage, plain_site
from lorgnette.export.weights import Computed, Rule, Stack
from lorgnette.spec import TextSpec


class DecoderLayer(nn.Module):
    """A pre-norm decoder layer."""

    def __init__(self, spec: TextSpec) -> None:
        """Creates the layer from the numbers of the decoder."""
        super().__init__()
        self.norm1 = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.attention = CachedAttention(
            spec.hidden_size,
            spec.heads,
            spec.kv_heads,
            spec.head_size,
            qkv_bias=spec.qkv_bias,
        )
        self.norm2 = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.mlp = GatedMLP(spec.hidden_size, spec.intermediate_size)

    def forward(
        self,
        x: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        cos: Tensor,
        sin: Tensor,
        past_length: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Applies the layer to `x` `[B, T, D]`; returns it with both caches updated."""
        mixed, keys, values = self.attention(
            self.norm1(x), key_cache, value_cache, cos, sin, past_length
        )
        x = x + mixed
        return x + self.mlp(self.norm2(x)), keys, values

    def sites(self) -> tuple[Site, ...]:
        """From each norm to the matrix behind it, values to output, up to down.

        Query heads that share a value head read the same channels.
        """
        attention, inner = self.attention, self.mlp.down_proj.in_features
        width = attention.qkv_proj.in_features
        size = attention.o_proj.in_features // attention.heads
        shared = attention.heads // attention.kv_heads
        heads = np.arange(attention.heads) // shared
        reads = (heads[:, None] * size + np.arange(size)).reshape(-1)
        first_value = (attention.heads + attention.kv_heads) * size
        values = [("attention.qkv_proj.weight", first_value)]
        if attention.qkv_proj.bias is not None:
            values.append(("attention.qkv_proj.bias", first_value))
        return (
            plain_site("norm1", ("norm1.weight",), ("attention.qkv_proj.weight",), width),
            Site("values", tuple(values), ("attention.o_proj.weight",), reads),
            plain_site("norm2", ("norm2.weight",), ("mlp.gate_up_proj.weight",), width),
            Site(
                "up",
                (("mlp.gate_up_proj.weight", inner),),
                ("mlp.down_proj.weight",),
                np.arange(inner),
            ),
        )


class LlamaDecoder(nn.Module):
    """Input embeddings and a KV cache to the logits of the last position.

    One graph serves both entry points: prefill is a call with T > 1, decode one with T = 1.

    Shapes:
        embeddings float32 `[B, T, D]`; past_length int32 `[1]`; caches, two a layer,
        `[B, Hkv, S, Dh]` each; returns logits `[B, V]` and the caches with T more positions.
    Source: Touvron et al. 2023, arXiv:2302.13971 (LLaMA); Yang et al. 2024, arXiv:2407.10671
        (Qwen2, whose queries, keys and values have biases).
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, spec: TextSpec, context_length: int) -> None:
        """Creates the decoder with rotary tables for `context_length` positions."""
        super().__init__()
        self.kv_heads, self.head_size = spec.kv_heads, spec.head_size
        self.layers = nn.ModuleList(DecoderLayer(spec) for _ in range(spec.layers))
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.cos = nn.Buffer(torch.empty(context_length, spec.head_size // 2))
        self.sin = nn.Buffer(torch.empty(context_length, spec.head_size // 2))

    def forward(
        self, embeddings: Tensor, past_length: Tensor, caches: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs T positions; `caches` alternates key and value, layer by layer."""
        x = embeddings
        updated: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            x, keys, values = layer(
                x, caches[2 * index], caches[2 * index + 1], self.cos, self.sin, past_length
            )
            updated += [keys, values]
        return self.head(self.norm(x[:, -1])), updated

    def stages(self) -> list[Stage]:
        """What runs, in order; the layers take more than the stage before gives."""
        layers = [Stage(f"layers.{index}.", layer) for index, layer in enumerate(self.layers)]
        return [*layers, Stage("norm.", self.norm), Stage("head.", self.head)]

    def cache_shape(self, capacity: int) -> tuple[int, int, int, int]:
        """The shape of a layer's key cache and of its value cache."""
        return (1, self.kv_heads, capacity, self.head_size)


def llama_rules(prefix: str, head: str, spec: TextSpec, context_length: int) -> dict[str, Rule]:
    """Where a `LlamaDecoder` finds its weights under the names of LLaMA and Qwen2.

    Args:
        prefix: What precedes `layers.0...`, dot included.
        head: Published name of the head's matrix, without `.weight`: the embedding's where tied.
        spec: The numbers of the decoder.
        context_length: Positions of the rotary tables.
    """
    layer = f"{prefix}layers.{{i}}."
    tables = partial(rope_tables, context_length, spec.head_size, spec.rope_theta)
    return {
        "cos": Computed(lambda: tables()[0]),
        "sin": Computed(lambda: tables()[1]),
        "layers.{i}.norm1": f"{layer}input_layernorm",
        "layers.{i}.attention.qkv_proj": Stack(
            (
                (f"{layer}self_attn.q_proj", spec.heads * spec.head_size),
                (f"{layer}self_attn.k_proj", spec.kv_heads * spec.head_size),
                (f"{layer}self_attn.v_proj", spec.kv_heads * spec.head_size),
            )
        ),
        "layers.{i}.attention.o_proj": f"{layer}self_attn.o_proj",
        "layers.{i}.norm2": f"{layer}post_attention_layernorm",
        "layers.{i}.mlp.gate_up_proj": Stack(
            (
                (f"{layer}mlp.gate_proj", spec.intermediate_size),
                (f"{layer}mlp.up_proj", spec.intermediate_size),
            )
        ),
        "layers.{i}.mlp.down_proj": f"{layer}mlp.down_proj",
        "norm": f"{prefix}norm",
        "head": head,
    }
