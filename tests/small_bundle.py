"""A bundle without graphs that run: enough for everything about files and manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from lorgnette.bundle import list_files, write_manifest, writing
from lorgnette.manifest import Manifest

Json = dict[str, Any]

VALUES: Json = {
    "format": {"major": 2, "minor": 0},
    "requires": ["tiles"],
    "producer": {"lorgnette": "1"},
    "checkpoint": "tiny",
    "recipe": {"quant": "int4"},
    "spec": {
        "family": "smolvlm",
        "model_type": "smolvlm",
        "variant": "custom",
        "vision": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "layers": 2,
            "heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "norm_eps": 1e-6,
        },
        "text": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "layers": 3,
            "heads": 4,
            "kv_heads": 2,
            "head_size": 16,
            "vocab_size": 512,
            "max_positions": 256,
            "rope_theta": 1e4,
            "norm_eps": 1e-5,
            "tied_embeddings": False,
            "qkv_bias": False,
        },
        "projector": {
            "kind": "pixel_shuffle",
            "patches_per_token": 4,
            "hidden_size": None,
        },
        "image_token_id": 486,
    },
    "engine": "onnxruntime",
    "context_length": 256,
    "components": [
        {
            "name": "decoder",
            "entry_points": ["prefill", "decode"],
            "graph": "graphs/decoder.onnx",
            "inputs": [{"name": "embeddings", "dtype": "float32", "shape": [1, "T", 64]}],
            "outputs": [],
            "cache_inputs": [],
            "cache_outputs": [],
            "operators": {"ai.onnx::Add": 1},
            "weight_bytes": {"float32": 4},
            "kept_in_float": {},
        }
    ],
    "preprocess": {
        "kind": "tiles",
        "tile_size": 32,
        "longest_edge": 128,
        "split": True,
        "resample": "lanczos",
        "rescale": 1 / 255,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    },
    "prompt": {
        "prefix": "<|im_start|>",
        "turns": {"user": {"header": "User: ", "header_image_first": "User:", "footer": "\n"}},
        "generation": "Assistant:",
        "image": {
            "image_token": "<image>",
            "tokens_per_tile": 4,
            "tile": "{image}",
            "row_end": "\n",
            "thumbnail": "{image}",
            "single": "{image}",
        },
        "stop_token_ids": [511],
    },
    "golden": {
        "folder": "golden",
        "bounds": {"image_tokens": 0.1, "logits": 0.1, "greedy_ids_equal": False},
    },
    "files": [],
}
MANIFEST = msgspec.convert(VALUES, Manifest)


def fill(folder: Path, content: bytes = b"graph") -> None:
    """Writes two files and a manifest that lists them."""
    (folder / "graphs").mkdir()
    (folder / "graphs" / "decoder.onnx").write_bytes(content)
    (folder / "graphs" / "weights.bin").write_bytes(b"\0" * 100)
    write_manifest(folder, msgspec.structs.replace(MANIFEST, files=list_files(folder)))


def make_bundle(path: Path) -> Path:
    """Writes a good bundle."""
    with writing(path) as folder:
        fill(folder)
    return path
