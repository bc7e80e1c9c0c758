"""Forward passes for training, shared by the families: plain functions over published names.

They exist for speed: transformers' own forward takes about twice as long at this size and cannot
ask several questions about one encoded picture. Tests hold them against transformers.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]
Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
Activation = Literal["gelu", "quick_gelu"]


def vision_layer_shapes(vision: Config, at: str) -> Shapes:
    """Shapes of the layers of a vision transformer and of the norm behind them."""
    d, f = vision["hidden_size"], vision["intermediate_size"]
    shapes: Shapes = {}
    for i in range(vision["num_hidden_layers"]):
        layer = f"{at}encoder.layers.{i}."
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{norm}.weight": (d,), f"{layer}{norm}.bias": (d,)}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}self_attn.{name}.weight": (d, d)}
            shapes |= {f"{layer}self_attn.{name}.bias": (d,)}
        shapes |= {f"{layer}mlp.fc1.weight": (f, d), f"{layer}mlp.fc1.bias": (f,)}
        shapes |= {f"{layer}mlp.fc2.weight": (d, f), f"{layer}mlp.fc2.bias": (d,)}
    return shapes | {f"{at}post_layernorm.weight": (d,), f"{at}post_layernorm.bias": (d,)}


def decoder_shapes(text: Config, at: str, *, bias: bool = False) -> Shapes:
    """Shapes of a LLaMA or Qwen2 decoder, without the head.

    Args:
        text: Its sizes.
        at: What its names begin with.
        bias: Whether queries, keys and values have biases.
    """
    width, ffn, size = text["hidden_size"], text["intermediate_size"], head_size(text)
    heads, kv = text["num_attention_heads"] * size, text["num_key_value_heads"] * size
    shapes: Shapes = {f"{at}embed_tokens.weight": (text["vocab_size"], width)}
    for i in range(text["num_hidden_layers"]):
        layer = f"{at}layers.{i}."
        shapes |= {f"{layer}input_layernorm.weight": (width,)}
        shapes |= {f"{layer}post_attention_layernorm.weight": (width,)}
        for name, rows in (("q", heads), ("k", kv), ("v", kv)):
            shapes |= {f"{layer}self_attn.{name}_proj.weight": (rows, width)}
            shapes |= {f"{layer}self_attn.{name}_proj.bias": (rows,)} if bias else {}
        shapes |= {f"{layer}self_attn.o_proj.weight": (width, heads)}
        shapes |= {f"{layer}mlp.{n}_proj.weight": (ffn, width) for n in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (width, ffn)}
    return shapes | {f"{at}norm.weight": (width,)}


def head_size(text: Config) -> int:
    """Width of one head of a decoder."""
    return int(text.get("head_dim", text["hidden_size"] // text["num_attention_heads"]))


def init_params(shapes: Shapes, seed: int) -> Params:
    """Random weights: matrices scaled by their inputs, small outputs of each residual branch."""
    generator = torch.Generator().manual_seed(seed)
    params: Params = {}
    for name, shape in shapes.items():
        if name.endswith(".bias"):
            value = torch.zeros(shape)
        elif len(shape) == 1:
            value = torch.ones(shape)
        else:
            fan_in = math.prod(shape[1:])
            embedding = "embed_tokens" in name or "position_embedding" in name
            std = 0.3 if embedding else 1 / math.sqrt(fan_in)
            if name.split(".")[-2] in ("out_proj", "fc2", "o_proj", "down_proj"):
                std *= 0.3
            value = torch.randn(shape, generator=generator) * std
        params[name] = value
    return params


def patch_vectors(pixels: Tensor, patch: int, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised patches as rows in the order of a patch embedding's flattened kernel.

    Shapes:
        pixels: uint8 [B, S, S, 3]. mean, std: [3], for pixels of 0 to 1.
        returns: [B, P, 3 * patch * patch], patches row by row.
    """
    grid = pixels.shape[1] // patch
    x = (pixels.to(torch.float32) / 255 - mean) / std
    x = x.view(-1, grid, patch, grid, patch, 3).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(len(pixels), grid * grid, 3 * patch * patch)


def vision_layers(
    params: Params, at: str, vision: Config, x: Tensor, count: int, activation: Activation
) -> Tensor:
    """The first `count` layers of a vision transformer.

    Shapes:
        x: [B, N, D]. returns: the same.
    """
    size, eps = vision["hidden_size"] // vision["num_attention_heads"], vision["layer_norm_eps"]
    for i in range(count):
        layer = f"{at}encoder.layers.{i}."
        h = layer_norm(params, layer + "layer_norm1", x, eps)
        q, k, v = (_heads(_affine(params, f"{layer}self_attn.{n}_proj", h), size) for n in "qkv")
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + _affine(params, layer + "self_attn.out_proj", h)
        h = _affine(params, layer + "mlp.fc1", layer_norm(params, layer + "layer_norm2", x, eps))
        h = (
            h * torch.sigmoid(1.702 * h)
            if activation == "quick_gelu"
            else F.gelu(h, approximate="tanh")
        )
        x = x + _affine(params, layer + "mlp.fc2", h)
    return x


def decode(
    params: Params, at: str, text: Config, x: Tensor, positions: Tensor, mask: Tensor
) -> Tensor:
    """A LLaMA or Qwen2 decoder from embeddings to the last norm.

    Shapes:
        x: [B, T, width]. positions: [B, T]. mask: float [B, 1, T, T], added to the scores.
        returns: [B, T, width].
    """
    heads, kv, size = text["num_attention_heads"], text["num_key_value_heads"], head_size(text)
    eps = text["rms_norm_eps"]
    inverse = text["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = positions[:, None, :, None] * inverse
    cos, sin = angles.cos().repeat(1, 1, 1, 2), angles.sin().repeat(1, 1, 1, 2)
    for i in range(text["num_hidden_layers"]):
        layer = f"{at}layers.{i}."
        h = F.rms_norm(x, x.shape[-1:], params[layer + "input_layernorm.weight"], eps)
        q, k, v = (_heads(_affine(params, f"{layer}self_attn.{n}_proj", h), size) for n in "qkv")
        q, k = q * cos + _rotate(q) * sin, k * cos + _rotate(k) * sin
        k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
        h = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = x + F.linear(h, params[layer + "self_attn.o_proj.weight"])
        h = F.rms_norm(x, x.shape[-1:], params[layer + "post_attention_layernorm.weight"], eps)
        gate = F.silu(F.linear(h, params[layer + "mlp.gate_proj.weight"]))
        h = gate * F.linear(h, params[layer + "mlp.up_proj.weight"])
        x = x + F.linear(h, params[layer + "mlp.down_proj.weight"])
    return F.rms_norm(x, x.shape[-1:], params[at + "norm.weight"], eps)


def layer_norm(params: Params, at: str, x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis by the weights under `at`."""
    return F.layer_norm(x, x.shape[-1:], params[at + ".weight"], params[at + ".bias"], eps)


def _heads(x: Tensor, size: int) -> Tensor:
    """[B, T, H * size] to [B, H, T, size]."""
    return x.view(*x.shape[:2], -1, size).transpose(1, 2)


def _rotate(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _affine(params: Params, at: str, x: Tensor) -> Tensor:
    return F.linear(x, params[at + ".weight"], params.get(at + ".bias"))
