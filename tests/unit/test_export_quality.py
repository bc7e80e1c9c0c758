"""What an export calibrates with, measures and promises, on the command line and in the bundle."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import load_file, save_file

from lorgnette.bundle import open_bundle
from lorgnette.cli.verify import _bounds_against
from lorgnette.errors import DatasetError
from lorgnette.export.sample_set import DEFAULT_SET, Pictures, SampleSet
from lorgnette.manifest import QualitySummary, decode_manifest
from lorgnette.quantize.plan import PLANS, Promise, QuantPlan, Rule
from lorgnette.quantize.samples import default_samples, read_samples, split_samples
from lorgnette.quantize.scheme import FLOAT16, FLOAT32, QuantScheme
from lorgnette.runtime.golden import read_golden
from tests.unit.cli_helpers import ZOO, call, document

MOBILEVLM = ZOO.parent / "mobilevlm-tiny"
PLAN = """
name = "static-eyes"
rotate = true
max_kl = {max_kl}

[[rule]]
select = "vision_encoder/tower.embed.*"
bits = 8

[[rule]]
select = "vision_encoder/*"
bits = 8
group = "channel"
activations = "int8_static"

[[rule]]
select = "*"
bits = 16
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two plans, one that promises what nothing keeps, and a set of one sample."""
    path = tmp_path_factory.mktemp("promises")
    (path / "strict.toml").write_text(PLAN.format(max_kl=1e-9))
    (path / "plain.toml").write_text(PLAN.format(max_kl=0.01))
    (path / "one").mkdir()
    first = read_samples(default_samples())[2]
    assert isinstance(first.image, Path)
    shutil.copy(first.image, path / "one" / "a.png")
    line = {"image": "a.png", "question": first.question, "answer": first.answer}
    (path / "one" / "samples.jsonl").write_text(json.dumps(line))
    return path


def strictly(folder: Path, out: Path, *options: object) -> Result:
    """Exports by the strict plan, calibrated with the one sample."""
    plan, one = folder / "strict.toml", folder / "one"
    return call(
        *("export", ZOO, "--plan", plan, "--calibrate", one, "--no-split", "--out", out), *options
    )


@pytest.fixture(scope="module")
def accepted(folder: Path) -> Path:
    """A bundle that breaks its promise."""
    path = folder / "accepted.lorg"
    result = strictly(folder, path, "--accept-loss")
    assert result.exit_code == 0, result.stderr
    assert "broken" in result.stdout
    return path


@pytest.fixture(scope="module")
def kept(folder: Path) -> Path:
    """A bundle that keeps it, calibrated with the set that comes with the package."""
    path = folder / "kept.lorg"
    told = document(
        *("export", ZOO, "--plan", folder / "plain.toml", "--no-split", "--measure", 6),
        *("--out", path),
    )
    assert told["quality"]["samples"] == 6
    return path


def quality(bundle: Path) -> QualitySummary:
    found = open_bundle(bundle).manifest.quality
    assert found is not None
    return found


# Promises


def test_a_broken_promise_is_refused_and_nothing_is_left(folder: Path, tmp_path: Path) -> None:
    result = strictly(folder, tmp_path / "b.lorg")
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert "promises" in result.stderr
    assert "--accept-loss" in result.stderr
    assert "<= 1e-09" in result.stderr
    assert len([line for line in lines if line.startswith("error")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_accepted_loss_is_written_down(accepted: Path) -> None:
    promise = quality(accepted).promise
    assert promise is not None
    assert (promise.kept, promise.accepted_loss) == (False, True)
    assert promise.max_kl == 1e-9
    assert quality(accepted).kl_mean > 1e-9


def test_a_kept_promise_is_written_down_too(kept: Path) -> None:
    promise = quality(kept).promise
    assert promise is not None
    assert (promise.kept, promise.accepted_loss) == (True, False)


def test_a_promise_is_not_looked_at_where_nothing_is_measured(folder: Path, tmp_path: Path) -> None:
    result = strictly(folder, tmp_path / "b.lorg", "--measure", 0)
    assert result.exit_code == 0, result.stderr
    manifest = open_bundle(tmp_path / "b.lorg").manifest
    assert manifest.quality is None
    assert "KL" not in result.stdout
    refused = call("verify", tmp_path / "b.lorg", "--quality")
    assert refused.exit_code == 2
    assert "records no quality" in refused.stderr


# What is recorded


def test_what_is_recorded_is_what_verify_prints(kept: Path) -> None:
    told = document("verify", kept, "--quality")["quality"]
    assert told == msgspec.to_builtins(quality(kept))
    assert told["sample_set"] == DEFAULT_SET


def test_what_is_recorded_is_what_is_measured_again(folder: Path, accepted: Path) -> None:
    result = call(
        *("verify", accepted, "--quality", "--against", ZOO, "--samples", folder / "one"),
        "--json",
    )
    assert result.exit_code == 1  # the promise is still broken
    told = json.loads(result.stdout)["quality"]
    recorded = msgspec.to_builtins(quality(accepted))
    assert told.pop("promise")["kept"] is recorded.pop("promise")["kept"] is False
    assert told == recorded
    assert told["sample_set"] == "one"


def test_a_manifest_from_before_quality_was_measured_is_read(kept: Path) -> None:
    values = json.loads((kept / "manifest.json").read_text())
    assert values["quality"]
    del values["quality"]
    assert decode_manifest(json.dumps(values).encode(), "manifest").quality is None


# Static activations, and a rotated stream


def test_static_activations_of_the_vision_encoder_cost_little(kept: Path) -> None:
    found = quality(kept)
    assert found.kl_mean < 1e-3
    assert found.same_answer >= 5 / 6
    operators = open_bundle(kept).manifest.components[0].operators
    assert any("MatMulInteger" in name or "QLinear" in name for name in operators), operators


def test_image_tokens_of_a_rotated_stream_are_compared_in_its_old_basis(kept: Path) -> None:
    assert quality(kept).image_token_cosine_mean > 0.999
    assert quality(kept).image_token_cosine_min > 0.99


def test_a_rotation_that_does_not_fuse_away_is_refused(folder: Path, tmp_path: Path) -> None:
    plan, out = folder / "plain.toml", tmp_path / "b.lorg"
    result = call("export", MOBILEVLM, "--plan", plan, "--out", out, "--measure", 0)
    assert (result.exit_code, result.stdout) == (2, "")
    assert len([line for line in result.stderr.splitlines() if "rotation" in line]) == 1
    assert list(tmp_path.iterdir()) == []


# The ladder against a checkpoint


def test_a_calibrated_bundle_gets_room_against_its_checkpoint(kept: Path) -> None:
    bundle = open_bundle(kept)
    text, own, found = (
        read_golden(bundle).text,
        bundle.manifest.golden.bounds,
        _bounds_against(bundle),
    )
    assert text.rounding_image_tokens > 0
    assert found.image_tokens == own.image_tokens + 5 * text.rounding_image_tokens
    assert found.logits == own.logits + 5 * text.rounding_logits
    assert not found.greedy_ids_equal


def test_a_bundle_that_is_not_calibrated_gets_none(kept: Path) -> None:
    bundle = open_bundle(kept)
    recipe = msgspec.structs.replace(bundle.manifest.recipe, quant="int4-fast", plan=None)
    plain = msgspec.structs.replace(bundle.manifest, recipe=recipe)
    other = type(bundle)(bundle.path, plain)
    assert _bounds_against(other) == bundle.manifest.golden.bounds


def test_a_calibrated_bundle_agrees_with_its_checkpoint_and_with_no_other(
    kept: Path, tmp_path: Path
) -> None:
    told = document("verify", kept, "--against", ZOO)
    assert told["passed"]
    other = tmp_path / ZOO.name
    shutil.copytree(ZOO, other)
    weights = load_file(other / "model.safetensors")
    name = next(n for n in weights if n.endswith("layers.1.mlp.down_proj.weight"))
    weights[name] = np.roll(weights[name], 1, axis=0)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert call("verify", kept, "--against", other).exit_code == 1


# Sets


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_floats_need_no_pictures(name: str) -> None:
    assert SampleSet.choose(PLANS[name], Pictures()) == SampleSet()


@pytest.mark.parametrize("name", ["int8", "int4", "int4-fast"])
def test_a_set_is_calibrated_with_and_measured_on_in_two_parts(name: str) -> None:
    calibrating, measuring = split_samples(read_samples(default_samples()))
    found = SampleSet.choose(PLANS[name], Pictures(measure=5))
    assert found.name == DEFAULT_SET
    assert found.measuring == measuring[:5]
    assert found.calibrating == (calibrating if name != "int4-fast" else ())


def test_nothing_is_read_where_nothing_is_calibrated_or_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unread = functools.partial(pytest.fail, "a set was read")
    monkeypatch.setattr("lorgnette.export.pipeline.read_samples", unread)
    found = SampleSet.choose(PLANS["int4-fast"], Pictures(measure=0))
    assert found == SampleSet()
    assert found.answers(None, lambda step: None) is None  # type: ignore[arg-type]


def test_a_cache_of_8_bits_alone_is_calibrated_and_measured() -> None:
    plan = QuantPlan("cache", "", (Rule("*", FLOAT32),), cache_bits=8)
    found = SampleSet.choose(plan, Pictures())
    assert found.calibrating
    assert found.measuring


def test_floats_that_promise_something_are_measured() -> None:
    plan = QuantPlan("sure", "", (Rule("*", FLOAT16),), promise=Promise(1e-3, 1.0))
    found = SampleSet.choose(plan, Pictures(measure=2))
    assert (found.calibrating, len(found.measuring)) == ((), 2)


def test_the_named_set_is_known_by_its_folder(folder: Path) -> None:
    plan = QuantPlan("four", "", (Rule("*", QuantScheme(bits=4, group_size=32)),))
    found = SampleSet.choose(plan, Pictures(folder / "one"))
    assert (found.name, len(found.measuring), found.calibrating) == ("one", 1, ())


def test_a_set_that_is_none_is_refused_whatever_the_plan(tmp_path: Path) -> None:
    with pytest.raises(DatasetError):
        SampleSet.choose(PLANS["fp32"], Pictures(tmp_path))
    result = call("export", ZOO, "--calibrate", tmp_path, "--out", tmp_path / "b.lorg")
    assert (result.exit_code, result.stdout) == (2, "")


def test_samples_of_which_none_fits_are_refused(folder: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = json.loads((folder / "one" / "samples.jsonl").read_text())
    long = {**values, "question": "Where is the blue star? " * 40}
    shutil.copy(folder / "one" / "a.png", tmp_path)
    (tmp_path / "samples.jsonl").write_text(json.dumps(long))
    out = tmp_path / "b.lorg"
    result = call(
        *("export", ZOO, "--plan", folder / "plain.toml", "--calibrate", tmp_path),
        *("--context", 256, "--out", out),
    )
    assert (result.exit_code, result.stdout) == (2, "")
    assert "nothing to calibrate with" in result.stderr
    assert not out.exists()
