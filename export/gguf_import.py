"""GGUF files in the words of the other formats: names of tensors and keys of configs.

Source: llama.cpp's converters and `gguf.constants`; for vision towers NexaAI's fork of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lorgnette.errors import CheckpointError
from lorgnette.export.checkpoint import Checkpoint
from lorgnette.export.formats.gguf import Value

QWEN2_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SIGLIP_NAMES = {
    "patch_embd": "embeddings.patch_embedding",
    "position_embd": "embeddings.position_embedding",
    "post_ln": "post_layernorm",
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ffn_down": "mlp.fc1",  # the published names are this way round
    "ffn_up": "mlp.fc2",
}


def is_gguf(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a GGUF file as opened."""
    return "general.architecture" in checkpoint.config


class GgufKeys:
    """The metadata of a GGUF file of one architecture.

    Args:
        checkpoint: The file as opened.
        architecture: What its keys must start with.

    Raises:
        CheckpointError: It is of another architecture.
    """

    def __init__(self, checkpoint: Checkpoint, architecture: str) -> None:
        """Compares the architecture."""
        self._checkpoint = checkpoint
        self._prefix = f"{architecture}."
        found = checkpoint.config.get("general.architecture")
        if found != architecture:
            raise CheckpointError(
                "the GGUF file is of another architecture",
                where=checkpoint.path,
                got=repr(found),
                wanted=repr(architecture),
            )

    def flag(self, key: str) -> bool:
        """A truth value; false where it is missing."""
        return self._value(key) is True

    def integer(self, key: str, *, most: int = 2**24) -> int:
        """A positive number that must be there and be no larger than `most`."""
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise self._error(key, value, f"an integer from 1 to {most}")
        return value

    def fixed(self, key: str, allowed: Value) -> None:
        """A key that may be missing but must otherwise have this value."""
        value = self._value(key)
        if value is not None and value != allowed:
            raise self._error(key, value, repr(allowed))

    def number(self, key: str, default: float) -> float:
        """A number, as the shortest decimals that give the stored float32."""
        value = self._value(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(key, value, "a number")
        return float(f"{value:.7g}")

    def triple(self, key: str, default: float) -> list[float]:
        """Three numbers, one for each colour."""
        value = self._value(key)
        if value is None:
            return [default] * 3
        numbers = isinstance(value, list) and all(type(part) in (int, float) for part in value)
        if not numbers or len(value) != 3:
            raise self._error(key, value, "three numbers")
        return [float(f"{part:.7g}") for part in value]

    def _value(self, key: str) -> Any:  # noqa: ANN401  (whatever the file holds)
        return self._checkpoint.config.get(self._prefix + key)

    def _error(self, key: str, value: object, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"GGUF key '{self._prefix}{key}' is wrong or missing",
            where=self._checkpoint.path,
            got=str(value)[:80],
            wanted=wanted,
        )


def qwen2_config(decoder: Checkpoint) -> dict[str, Any]:
    """The keys of Qwen2's config.json that a language model's file gives.

    Raises:
        CheckpointError: A key is missing or wrong, or asks for positions of another kind.
    """
    keys = GgufKeys(decoder, "qwen2")
    width, heads = keys.integer("embedding_length"), keys.integer("attention.head_count", most=1024)
    keys.fixed("rope.scaling.type", "none")
    keys.fixed("rope.dimension_count", width // heads)
    return {
        "model_type": "qwen2",
        "hidden_size": width,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count", most=1024),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", most=1024),
        "max_position_embeddings": keys.integer("context_length"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", 1e-6),
        "vocab_size": matrix_shape(decoder, "token_embd.weight")[0],
    }


def siglip_config(tower: Checkpoint) -> dict[str, Any]:
    """The keys of SigLIP's config.json that a vision tower's file gives."""
    keys = GgufKeys(tower, "siglip")
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": keys.integer("vision.embedding_length"),
        "intermediate_size": keys.integer("vision.feed_forward_length"),
        "num_hidden_layers": keys.integer("vision.block_count", most=1024),
        "num_attention_heads": keys.integer("vision.attention.head_count", most=1024),
        "image_size": keys.integer("vision.image_size", most=8192),
        "patch_size": keys.integer("vision.patch_size", most=1024),
        # The original program has it in its code and reads no key.
        "layer_norm_eps": 1e-6,
    }


def siglip_preprocessor(tower: Checkpoint) -> dict[str, Any]:
    """The keys of a preprocessor_config.json that a vision tower's file gives."""
    keys = GgufKeys(tower, "siglip")
    size = keys.integer("vision.image_size")
    return {
        "size": {"height": size, "width": size},
        "image_mean": keys.triple("vision.image_mean", 0.5),
        "image_std": keys.triple("vision.image_std", 0.5),
    }


def matrix_shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    """Rows and columns of a tensor that must be a matrix.

    Raises:
        CheckpointError: It is missing or none.
    """
    info = checkpoint.tensors.get(name)
    if info is None or len(info.shape) != 2:
        raise CheckpointError(
            f"tensor '{name}' is missing or no matrix",
            where=checkpoint.path,
            got=None if info is None else list(info.shape),
        )
    return info.shape[0], info.shape[1]


def token_id(checkpoint: Checkpoint, token: str) -> int:
    """The id of a token of the file's tokenizer.

    Raises:
        CheckpointError: There is none.
    """
    tokens = checkpoint.array("tokenizer.ggml.tokens") or ()
    if token not in tokens:
        raise CheckpointError("the tokenizer lacks a token", where=checkpoint.path, wanted=token)
    return tokens.index(token)


def qwen2_names(checkpoint: Checkpoint, prefix: str) -> Iterator[tuple[str, str]]:
    """Every tensor of a language model's file: its name in the published layout, its name there.

    A tensor that has no such name keeps its own, so that it is refused under it.
    """
    for old in checkpoint.tensors:
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", old)
        layer, part, leaf = found.groups() if found else (None, "", "")
        if old == "output.weight":
            yield f"{prefix}lm_head.weight", old
        elif part in QWEN2_NAMES:
            place = f"layers.{layer}." if layer else ""
            yield f"{prefix}model.{place}{QWEN2_NAMES[part]}.{leaf}", old
        else:
            yield old, old


def siglip_names(checkpoint: Checkpoint, prefix: str) -> Iterator[tuple[str, str]]:
    """The same of a vision tower's file, projector aside."""
    for old in checkpoint.tensors:
        found = re.fullmatch(r"v\.(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", old)
        layer, part, leaf = found.groups() if found else (None, "", "")
        if part in SIGLIP_NAMES:
            place = f"encoder.layers.{layer}." if layer else ""
            yield f"{prefix}{place}{SIGLIP_NAMES[part]}.{leaf}", old
        elif old.startswith("v.head."):
            yield f"{prefix}{old.removeprefix('v.')}", old
        elif not old.startswith("mm."):
            yield old, old
