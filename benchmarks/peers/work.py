"""Multiplications and bytes that a shape needs, from its numbers alone.

Source: a matrix of m x n with k columns costs 2 m n k; attention of q queries over s keys costs
4 q s times the width of its heads; a causal prompt sees half of the square.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.peers.peer import Case
from benchmarks.peers.rounds import DECODE_CONTEXTS, PREFILL_TOKENS

BYTES_PER_WEIGHT = 0.5625
"""4 bits and a scale of 16 for every 32."""
CACHE_BYTES = 2
"""Of a number in a KV cache of 16 bits."""


def work_of(case: Case) -> dict[str, Any]:
    """Floating point operations of a tile, a prompt and an answer; bytes of a decoded token."""
    text = json.loads((Path(case.text) / "config.json").read_text())
    vision = json.loads((Path(case.vision) / "config.json").read_text())
    tile = vision_flop(vision, text["hidden_size"])
    answers = {
        tiles: int(tiles) * tile + prefill_flop(text, len(ids))
        for tiles, ids in case.prompts.items()
    }
    return {
        "vision_flop": tile,
        "prefill_flop": {str(n): prefill_flop(text, n) for n in PREFILL_TOKENS},
        "answer_flop": answers,
        "decode_bytes": {str(n): decode_bytes(text, n) for n in DECODE_CONTEXTS},
    }


def vision_flop(vision: dict[str, Any], width: int) -> int:
    """One tile through patches, layers and projector."""
    eye, inner = vision["hidden_size"], vision["intermediate_size"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    layer = 2 * patches * (4 * eye * eye + 2 * eye * inner) + 4 * patches * patches * eye
    embed = 2 * patches * 3 * vision["patch_size"] ** 2 * eye
    if "group" in vision:
        group, hidden = vision["group"], 4096
        projector = 2 * (patches // group) * (group * eye * hidden + hidden * width)
    else:
        projector = 2 * patches * eye * width
    return int(embed + vision["num_hidden_layers"] * layer + projector)


def decoder_weights(text: dict[str, Any]) -> tuple[int, int]:
    """Weights of the layers' matrices, and of the head."""
    width, inner = text["hidden_size"], text["intermediate_size"]
    size = text.get("head_dim") or width // text["num_attention_heads"]
    queries, keys = text["num_attention_heads"] * size, text["num_key_value_heads"] * size
    layer = 2 * width * queries + 2 * width * keys + 3 * width * inner
    return text["num_hidden_layers"] * layer, width * text["vocab_size"]


def prefill_flop(text: dict[str, Any], tokens: int) -> int:
    """A prompt into an empty cache; the head for the last position only."""
    layers, head = decoder_weights(text)
    size = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    queries = text["num_attention_heads"] * size
    attention = 2 * tokens * tokens * queries * text["num_hidden_layers"]
    return int(2 * tokens * layers + attention + 2 * head)


def decode_bytes(text: dict[str, Any], context: int) -> int:
    """What a decoded token reads: every weight once, and the keys and values before it."""
    layers, head = decoder_weights(text)
    size = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    cache = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * size * context
    return int((layers + head) * BYTES_PER_WEIGHT + cache * CACHE_BYTES)
