"""`lorgnette verify`: the ladder on the bundle's own data and against a checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.unit.cli_helpers import (
    ZOO,
    bundle,
    call,
    changed_checkpoint,
    document,
    picture,
    process,
    start,
)

RUNGS = ["pixels", "prompt_ids", "image_tokens", "logits", "greedy_ids"]


def damage(source: Path, target: Path, tensor: str) -> Path:
    """A copy of a bundle with another golden tensor and a manifest that vouches for it."""
    shutil.copytree(source, target)
    file = target / "golden" / "golden.safetensors"
    tensors = load_file(file)
    tensors[tensor] = tensors[tensor] * np.float32(1.5)
    save_file(tensors, file)
    manifest = json.loads((target / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["path"] == "golden/golden.safetensors":
            entry["bytes"] = file.stat().st_size
            entry["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def test_a_good_bundle_climbs_to_the_top() -> None:
    told = document("verify", bundle())
    assert told["passed"]
    assert [rung["name"] for rung in told["ladders"][0]["rungs"]] == RUNGS


def test_as_a_process_it_prints_a_line_a_rung() -> None:
    code, out, err = process("verify", bundle("fp32"))
    assert (code, err) == (0, b"")
    assert [line.split()[:2] for line in out.decode().splitlines()[1:]] == [
        [rung, "ok"] for rung in RUNGS
    ]


@pytest.mark.parametrize("tensor", ["image_tokens", "logits"])
def test_a_failed_rung_is_named_and_exit_1(tmp_path: Path, tensor: str) -> None:
    bad = damage(bundle(), tmp_path / "bad.lorg", tensor)
    result = call("verify", bad, "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert not told["passed"]
    assert told["error"]["type"] == "VerifyError"
    rungs = told["ladders"][0]["rungs"]
    assert [rung["name"] for rung in rungs] == RUNGS[: RUNGS.index(tensor) + 1]
    assert [rung["passed"] for rung in rungs] == [True] * (len(rungs) - 1) + [False]
    result = call("verify", bad)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: rung '{tensor}' failed in {bad}")
    assert result.stderr.count("\n") == 1
    assert result.stdout.splitlines()[-1].split()[:2] == [tensor, "FAILED"]


def test_against_the_checkpoint_on_other_pictures(tmp_path: Path) -> None:
    square = picture(tmp_path, 80, 80)
    told = document("verify", bundle(), "--against", ZOO, "--image", square)
    assert told["passed"]
    assert told["against"] == str(ZOO)
    assert [ladder["picture"] for ladder in told["ladders"]] == [str(square)]
    detail = told["ladders"][0]["rungs"][0]["detail"]
    built_in = document("verify", bundle())["ladders"][0]["rungs"][0]["detail"]
    assert detail != built_in  # it has another number of tiles


def test_against_other_weights_it_fails_at_the_component_that_differs(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(ZOO, other)
    file = other / "model.safetensors"
    tensors = load_file(file)
    name = "model.text_model.layers.0.mlp.down_proj.weight"
    tensors[name] = -tensors[name]
    save_file(tensors, file)
    result = call("verify", bundle("fp32"), "--against", other)
    assert result.exit_code == 1
    assert "rung 'logits' failed" in result.stderr


def test_against_another_model_is_wrong_input(tmp_path: Path) -> None:
    other = changed_checkpoint(
        tmp_path, "config.json", lambda config: config["text_config"].update(rms_norm_eps=0.5)
    )
    result = call("verify", bundle(), "--against", other)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "text.norm_eps 0.5 instead of" in result.stderr


def test_a_picture_without_a_checkpoint_is_wrong_usage(tmp_path: Path) -> None:
    result = call("verify", bundle(), "--image", picture(tmp_path))
    assert result.exit_code == 2
    assert "--against" in result.stderr


def test_a_terminal_sees_the_steps() -> None:
    leader, follower = os.openpty()
    child = start(["verify", bundle()], stderr=follower)
    os.close(follower)
    out, _ = child.communicate(timeout=60)
    shown = os.read(leader, 4096).decode()
    os.close(leader)
    assert child.returncode == 0
    assert b"..." not in out
    assert [line.split(" ...")[0] for line in shown.splitlines()] == [
        "open bundle",
        "climb the ladder",
    ]
