"""The SmolVLM forward pass for training: plain functions over a dict of published tensor names.

It exists for speed: transformers' own forward takes about twice as long at this size and cannot
ask several questions about one encoded picture. A test holds it against transformers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.zoo.checkpoint import Config

Params = dict[str, Tensor]


def param_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the published layout with its shape."""
    vision, text, scale = config["vision_config"], config["text_config"], config["scale_factor"]
    d, f, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    grid = vision["image_size"] // patch
    shapes: dict[str, tuple[int, ...]] = {
        "model.vision_model.embeddings.patch_embedding.weight": (d, 3, patch, patch),
        "model.vision_model.embeddings.patch_embedding.bias": (d,),
        "model.vision_model.embeddings.position_embedding.weight": (grid * grid, d),
    }
    for i in range(vision["num_hidden_layers"]):
        at = f"model.vision_model.encoder.layers.{i}."
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{at}{norm}.weight": (d,), f"{at}{norm}.bias": (d,)}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{at}self_attn.{name}.weight": (d, d), f"{at}self_attn.{name}.bias": (d,)}
        shapes |= {f"{at}mlp.fc1.weight": (f, d), f"{at}mlp.fc1.bias": (f,)}
        shapes |= {f"{at}mlp.fc2.weight": (d, f), f"{at}mlp.fc2.bias": (d,)}
    shapes["model.vision_model.post_layernorm.weight"] = (d,)
    shapes["model.vision_model.post_layernorm.bias"] = (d,)
    width, ffn, head = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    shapes["model.connector.modality_projection.proj.weight"] = (width, d * scale * scale)
    shapes["model.text_model.embed_tokens.weight"] = (text["vocab_size"], width)
    heads, kv = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    for i in range(text["num_hidden_layers"]):
        at = f"model.text_model.layers.{i}."
        shapes |= {f"{at}input_layernorm.weight": (width,)}
        shapes |= {f"{at}post_attention_layernorm.weight": (width,)}
        shapes |= {f"{at}self_attn.q_proj.weight": (heads, width)}
        shapes |= {f"{at}self_attn.{n}_proj.weight": (kv, width) for n in ("k", "v")}
        shapes |= {f"{at}self_attn.o_proj.weight": (width, heads)}
        shapes |= {f"{at}mlp.{n}_proj.weight": (ffn, width) for n in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (width, ffn)}
    shapes["model.text_model.norm.weight"] = (width,)
    shapes["lm_head.weight"] = (text["vocab_size"], width)
    return shapes


def init_params(config: Config, seed: int) -> Params:
    """Random weights: matrices scaled by their inputs, small outputs of each residual branch."""
    generator = torch.Generator().manual_seed(seed)
    params: Params = {}
    for name, shape in param_shapes(config).items():
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


def encode_patches(params: Params, config: Config, tiles: Tensor) -> Tensor:
    """The vision transformer.

    Shapes:
        tiles: uint8 [B, size, size, 3].
        returns: [B, P, D], patches row by row.
    """
    vision = config["vision_config"]
    patch, heads = vision["patch_size"], vision["num_attention_heads"]
    grid = tiles.shape[1] // patch
    x = tiles.to(torch.float32) / 127.5 - 1
    x = x.view(-1, grid, patch, grid, patch, 3).permute(0, 1, 3, 5, 2, 4)
    x = x.reshape(len(tiles), grid * grid, 3 * patch * patch)
    at = "model.vision_model.embeddings."
    weight = params[at + "patch_embedding.weight"]
    x = F.linear(x, weight.flatten(1), params[at + "patch_embedding.bias"])
    x = x + params[at + "position_embedding.weight"]
    for i in range(vision["num_hidden_layers"]):
        at = f"model.vision_model.encoder.layers.{i}."
        h = _layer_norm(params, at + "layer_norm1", x)
        q, k, v = (
            _heads(_affine(params, f"{at}self_attn.{n}_proj", h), vision["hidden_size"] // heads)
            for n in "qkv"
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + _affine(params, at + "self_attn.out_proj", h)
        h = _affine(params, at + "mlp.fc1", _layer_norm(params, at + "layer_norm2", x))
        x = x + _affine(params, at + "mlp.fc2", F.gelu(h, approximate="tanh"))
    return _layer_norm(params, "model.vision_model.post_layernorm", x)


def project(params: Params, config: Config, patches: Tensor) -> Tensor:
    """Pixel shuffle and the linear projector.

    Shapes:
        patches: [B, P, D].
        returns: [B, N, width], tokens row by row; a token's input is its block of patches.
    """
    scale, grid = config["scale_factor"], math.isqrt(patches.shape[1])
    side = grid // scale
    x = patches.view(-1, side, scale, side, scale, patches.shape[-1])
    x = x.transpose(2, 3).reshape(len(patches), side * side, -1)
    return F.linear(x, params["model.connector.modality_projection.proj.weight"])


def decode(params: Params, config: Config, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """The language model from embeddings to the last norm.

    Shapes:
        x: [B, T, width]. positions: [B, T]. mask: float [B, 1, T, T], added to the scores.
        returns: [B, T, width]; `lm_head.weight` turns it into logits.
    """
    text = config["text_config"]
    heads, kv, size = text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"]
    eps = text["rms_norm_eps"]
    inverse = text["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = positions[:, None, :, None] * inverse
    cos, sin = angles.cos().repeat(1, 1, 1, 2), angles.sin().repeat(1, 1, 1, 2)
    for i in range(text["num_hidden_layers"]):
        at = f"model.text_model.layers.{i}."
        h = F.rms_norm(x, x.shape[-1:], params[at + "input_layernorm.weight"], eps)
        q, k, v = (
            _heads(F.linear(h, params[f"{at}self_attn.{n}_proj.weight"]), size) for n in "qkv"
        )
        q, k = q * cos + _rotate(q) * sin, k * cos + _rotate(k) * sin
        k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
        h = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = x + F.linear(h, params[at + "self_attn.o_proj.weight"])
        h = F.rms_norm(x, x.shape[-1:], params[at + "post_attention_layernorm.weight"], eps)
        gate = F.silu(F.linear(h, params[at + "mlp.gate_proj.weight"]))
        h = gate * F.linear(h, params[at + "mlp.up_proj.weight"])
        x = x + F.linear(h, params[at + "mlp.down_proj.weight"])
    return F.rms_norm(x, x.shape[-1:], params["model.text_model.norm.weight"], eps)


def _heads(x: Tensor, size: int) -> Tensor:
    """[B, T, H * size] to [B, H, T, size]."""
    return x.view(*x.shape[:2], -1, size).transpose(1, 2)


def _rotate(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _affine(params: Params, at: str, x: Tensor) -> Tensor:
    return F.linear(x, params[at + ".weight"], params[at + ".bias"])


def _layer_norm(params: Params, at: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], params[at + ".weight"], params[at + ".bias"], 1e-6)
