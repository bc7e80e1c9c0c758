"""`lorgnette inspect`: numbers against what is really there."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorgnette
from lorgnette.quantize.plan import PLANS
from lorgnette.runtime.engines.onnx import _made_weights
from lorgnette.runtime.preprocess import prepare
from tests.unit.cli_helpers import ZOO, bundle, call, changed_checkpoint, document, process, start


@pytest.mark.parametrize("quant", PLANS)
def test_the_predicted_weights_are_within_two_percent_of_the_real_ones(quant: str) -> None:
    predicted = document("inspect", ZOO)["predicted_weight_bytes"][quant]
    real = (bundle(quant) / "graphs" / "weights.bin").stat().st_size
    assert abs(predicted - real) <= 0.02 * real


def test_the_weights_of_tied_embeddings_count_once(tmp_path: Path) -> None:
    tied = changed_checkpoint(
        tmp_path, "config.json", lambda config: config.update(tie_word_embeddings=True)
    )
    tensors = load_file(tied / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tied / "model.safetensors")
    told, untied = document("inspect", tied), document("inspect", ZOO)
    text = untied["spec"]["text"]
    table = text["vocab_size"] * text["hidden_size"]
    assert untied["parameters"]["total"] - told["parameters"]["total"] == table
    saved = untied["predicted_weight_bytes"]["fp32"] - told["predicted_weight_bytes"]["fp32"]
    assert abs(saved - 4 * table) <= 8192  # two pages of alignment


def test_a_checkpoint_in_numbers() -> None:
    told = document("inspect", ZOO)
    with (ZOO / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    assert told["kind"] == "checkpoint"
    assert told["family"] == "smolvlm"
    assert told["parameters"]["total"] == sum(math.prod(t["shape"]) for t in header.values())
    vision = [name for name in header if "vision_model" in name or "connector" in name]
    assert told["parameters"]["vision_encoder"] == sum(
        math.prod(header[name]["shape"]) for name in vision
    )
    assert sum(told["dtypes"].values()) == len(header)
    assert set(told["dtypes"]) == {tensor["dtype"] for tensor in header.values()}


def test_a_bundle_in_numbers() -> None:
    told = document("inspect", bundle())
    model = lorgnette.open(bundle(), threads=1)
    state = model.engine.new_state()
    width = model.manifest.spec.text.hidden_size
    state.run(np.zeros((1, width), np.float32), state.capacity - 1)  # the cache grows to its end
    cache_bytes = sum(cache.nbytes for cache in state._caches)  # type: ignore[attr-defined]
    assert told["kind"] == "bundle"
    assert (told["target"], told["quant"], told["family"]) == ("onnx-cpu", "int4", "smolvlm")
    assert told["context_length"] == state.capacity
    assert told["kv_cache_bytes"]["at_full_context"] == cache_bytes
    assert told["kv_cache_bytes"]["per_1000_tokens"] == cache_bytes / state.capacity * 1000
    for entry, (height, width) in zip(told["pictures"], [(480, 640), (300, 300)], strict=True):
        tiles = prepare(np.zeros((height, width, 3), np.uint8), model.manifest.preprocess)
        tokens = model.engine.encode(tiles.pixels)
        assert entry["tiles"] == len(tiles.pixels)
        assert entry["image_tokens"] == tokens.shape[0] * tokens.shape[1]
    predicted = told["predicted_memory_bytes"]
    parts = [value for name, value in predicted.items() if name != "total"]
    assert predicted["total"] == sum(parts)
    assert predicted["kv_cache_at_full_context"] == cache_bytes
    made = _made_weights(model.bundle, 1)
    assert predicted["prefill_weights"] == sum(array.nbytes for array in made.values()) > 0
    assert predicted["image_tokens"] == tokens.nbytes
    weights = (bundle() / "graphs" / "weights.bin").stat().st_size
    assert 0.9 * weights < predicted["weights"] <= weights
    assert told["bytes"] == sum(entry["bytes"] for entry in told["files"])
    assert all((bundle() / e["path"]).stat().st_size == e["bytes"] for e in told["files"])


def test_both_kinds_are_readable_lines_without_json() -> None:
    code, out, err = process("inspect", bundle())
    assert (code, err) == (0, b"")
    text = out.decode()
    for word in ("format 2.4", "onnx-cpu", "int4", "vision_encoder", "KV cache", "weights.bin"):
        assert word in text
    result = call("inspect", ZOO)
    assert result.exit_code == 0
    for word in ("parameters", "F16", *PLANS):
        assert word in result.stdout


def test_a_bundle_needs_no_torch() -> None:
    """The base install must be able to inspect, run and verify a bundle."""
    refuse = "import sys\nfor name in ('torch', 'onnx', 'onnx_ir'): sys.modules[name] = None"
    for command in (["inspect"], ["verify"], ["run", "--prompt", "hello"]):
        child = start([*command, bundle()], before=refuse)
        _, err = child.communicate(timeout=60)
        assert (child.returncode, err) == (0, b"")


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        result = call("inspect", path)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: neither a checkpoint nor a bundle")
        assert result.stderr.count("\n") == 1
