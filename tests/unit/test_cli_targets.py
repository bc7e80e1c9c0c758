"""Several targets on the command line: listed, exported together, compared, refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lorgnette.manifest import FORMAT_MAJOR, FORMAT_MINOR, Bounds, Fallback
from lorgnette.quantize.plan import PLANS
from lorgnette.targets import all_targets
from lorgnette.targets.target import LoweredComponent
from tests.unit.cli_helpers import (
    BOTH,
    COMPARED,
    ROOT,
    RUNGS,
    SMALL,
    ZOO,
    Made,
    call,
    document,
    hide,
    refused,
)


def targets() -> dict[str, dict[str, Any]]:
    return {target["name"]: target for target in document("list", "targets")["targets"]}


# list


def test_every_target_is_listed_with_what_it_carries_and_runs_on() -> None:
    found = targets()
    assert set(found) == {
        "coreai",
        "coreml",
        "executorch-coreml",
        "executorch-qnn",
        "executorch-vulkan",
        "executorch-xnnpack",
        "onnx-cpu",
    }
    for name, told in found.items():
        assert told["cache_style"] == ("functional" if name == "onnx-cpu" else "state")
        assert told["os_floor"]
        assert set(told["schemes"]) <= set(PLANS)
        assert told["can_verify"] == told["can_run"]
        assert told["can_run"] == (told["no_run_reason"] is None)
        assert told["can_lower"] == (told["no_lower_reason"] is None)
        assert told["tile_counts"] == ("any" if name == "onnx-cpu" else [1])
    assert found["coreml"]["arithmetic"] == "float16"
    assert found["coreml"]["os_floor"] == "iOS 18, macOS 15"
    assert found["coreml"]["schemes"] == list(PLANS)
    assert "int8" not in found["executorch-xnnpack"]["schemes"]
    assert "int8-channel" in found["executorch-xnnpack"]["schemes"]


def test_targets_of_devices_tell_why_nothing_here_runs_them() -> None:
    found = targets()
    assert not found["executorch-qnn"]["can_lower"]
    assert "Qualcomm's SDK" in found["executorch-qnn"]["no_lower_reason"]
    assert "Android only" in found["executorch-vulkan"]["no_run_reason"]
    assert "Apple systems only" in found["executorch-coreml"]["no_run_reason"]


def test_targets_as_text_are_a_block_each() -> None:
    result = call("list", "targets")
    assert (result.exit_code, result.stderr) == (0, "")
    blocks: dict[str, dict[str, str]] = {}
    for line in result.stdout.splitlines():
        if not line.startswith(" "):
            block = blocks.setdefault(line, {})
        else:
            key, _, value = line.strip().partition("  ")
            block[key] = value.strip()
    found = targets()
    assert list(blocks) == list(found)
    for name, told in found.items():
        block = blocks[name]
        assert block["systems"] == told["os_floor"]
        assert block["schemes"].split(", ") == told["schemes"]
        assert block["KV cache"].startswith(f"{told['cache_style']}, ")
        assert block["engine"] == told["engine"]
        assert block["made here"] == (
            "yes" if told["can_lower"] else f"no: {told['no_lower_reason']}"
        )
        assert block["run here"] == ("yes" if told["can_run"] else f"no: {told['no_run_reason']}")
    assert blocks["coreml"]["graphs"] == "float16, 1 tile a call"
    assert blocks["onnx-cpu"]["graphs"] == "float32, any number of tiles a call"


@pytest.mark.parametrize(
    ("package", "extra", "names"),
    [
        ("coremltools", "coreml", {"coreml"}),
        ("coreai", "coreai", {"coreai"}),
        ("executorch", "executorch", {"executorch-xnnpack"}),
        ("torchao", "executorch", {"executorch-vulkan", "executorch-coreml"}),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, package: str, extra: str, names: set[str]
) -> None:
    hide(monkeypatch, package)
    found = targets()
    for name in names:
        # What never ran here keeps that reason.
        lacks_engine = not all_targets()[name].capabilities.not_run
        for reason in ("no_lower_reason", *(["no_run_reason"] if lacks_engine else [])):
            assert package in found[name][reason]
            assert f"pip install 'lorgnette[{extra}]'" in found[name][reason]
        assert not found[name]["can_verify"]
    assert found["onnx-cpu"]["can_lower"]
    assert found["onnx-cpu"]["can_run"]
    assert f"pip install 'lorgnette[{extra}]'" in call("list", "targets").stdout


# export


def test_two_targets_give_a_bundle_each_and_one_document(
    both: Made,
) -> None:
    bundles, told = both
    assert sorted(path.name for path in bundles[0].parent.iterdir()) == [
        "a-coreml.lorg",
        "a-onnx-cpu.lorg",
    ]
    assert [one["bundle"] for one in told["bundles"]] == [str(path) for path in bundles]
    assert [one["target"] for one in told["bundles"]] == list(BOTH)
    for one in told["bundles"]:
        assert [rung["name"] for rung in one["ladder"]] == RUNGS
        assert all(rung["passed"] for rung in one["ladder"])
        assert one["not_run"] is None
    assert told["agree"] is True
    assert [pair["rung"] for pair in told["pairs"]] == COMPARED
    for pair in told["pairs"]:
        assert (pair["first"], pair["second"], pair["passed"]) == (*BOTH, True)
    for path, name in zip(bundles, BOTH, strict=True):
        manifest = json.loads((path / "manifest.json").read_text())
        assert manifest["recipe"]["target"] == name
        assert manifest["format"] == {"major": FORMAT_MAJOR, "minor": FORMAT_MINOR}
    # Both are made from the same golden data.
    goldens = [(path / "golden" / "golden.safetensors").read_bytes() for path in bundles]
    assert goldens[0] == goldens[1]


def test_the_pair_is_as_far_apart_as_their_answers_are(both: Made) -> None:
    """Against the errors of each ladder: a triangle's side is no longer than the other two."""
    _, told = both
    pairs = {pair["rung"]: pair for pair in told["pairs"]}
    for rung in ("image_tokens", "logits"):
        errors = [
            step["error"]
            for one in told["bundles"]
            for step in one["ladder"]
            if step["name"] == rung
        ]
        assert 0 < pairs[rung]["error"] <= 1.01 * sum(errors)
        bounds = [
            step["bound"]
            for one in told["bundles"]
            for step in one["ladder"]
            if step["name"] == rung
        ]
        assert pairs[rung]["bound"] == pytest.approx(sum(bounds))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("coreml,,onnx-cpu", "targets are not names with commas between"),
        ("onnx-cpu,onnx-cpu", "targets are not names with commas between"),
        (",", "targets are not names with commas between"),
        ("onnx-cpu,tpu", "unknown target: got 'tpu'"),
    ],
)
def test_targets_that_are_none_are_refused(tmp_path: Path, asked: str, told: str) -> None:
    line = refused(call("export", ZOO, "--target", asked, "--out", tmp_path / "a.lorg", *SMALL))
    assert told in line
    assert not list(tmp_path.iterdir())


def test_a_target_that_cannot_be_lowered_to_here_refuses_with_its_reason(tmp_path: Path) -> None:
    asked = ("--target", "onnx-cpu,executorch-qnn", "--out", tmp_path / "a.lorg")
    line = refused(call("export", ZOO, *asked, *SMALL))
    assert line.startswith("error: cannot lower to executorch-qnn: ")
    assert "Qualcomm's SDK" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "package", "extra"),
    [
        ("coreml", "coremltools", "coreml"),
        ("coreai", "coreai", "coreai"),
        ("executorch-xnnpack", "torchao", "executorch"),
    ],
)
def test_export_without_the_targets_extra_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, package: str, extra: str
) -> None:
    hide(monkeypatch, package)
    asked = ("--target", f"onnx-cpu,{target}", "--out", tmp_path / "a.lorg")
    line = refused(call("export", ZOO, *asked, *SMALL))
    assert line.startswith(f"error: cannot lower to {target}: ")
    assert package in line
    assert f"pip install 'lorgnette[{extra}]'" in line
    assert not list(tmp_path.iterdir())


def test_a_plan_that_one_target_cannot_carry_refuses_all(tmp_path: Path) -> None:
    asked = ("--target", "onnx-cpu,executorch-xnnpack", "--quant", "int8", "--context", 256)
    line = refused(call("export", ZOO, *asked, "--out", tmp_path / "a.lorg"))
    assert line.startswith("error: cannot lower to executorch-xnnpack: ")
    assert not list(tmp_path.iterdir())


def with_fallbacks(monkeypatch: pytest.MonkeyPatch, target: str, *fallbacks: Fallback) -> None:
    """Makes a target's decoder tell of operators outside the delegate."""
    kind = type(all_targets()[target])
    lower = kind.lower

    @functools.wraps(lower)
    def told(*args: Any) -> list[LoweredComponent]:
        *others, decoder = lower(*args)
        return [*others, msgspec.structs.replace(decoder, fallbacks=fallbacks)]

    monkeypatch.setattr(kind, "lower", told)


FALLBACKS = (
    Fallback(operator="a.small", source="export/layers/text.py:3", count=1, reason="none does it"),
    Fallback(operator="a.large", source="export/layers/text.py:9", count=4, reason="too large"),
)


def test_too_many_fallbacks_of_the_last_target_leave_nothing_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_fallbacks(monkeypatch, "onnx-cpu", *FALLBACKS)
    (tmp_path / "a-coreml.lorg").mkdir()
    (tmp_path / "a-coreml.lorg" / "manifest.json").write_text("older")
    asked = ("--target", ",".join(BOTH), "--out", tmp_path / "a.lorg", "--force")
    line = refused(call("export", ZOO, *asked, "--max-fallback", 4, *SMALL))
    assert "operators run outside the delegate of onnx-cpu" in line
    assert "5: 4 a.large (export/layers/text.py:9), 1 a.small (export/layers/text.py:3)" in line
    assert "wanted at most 4" in line
    # Not even a bundle that stood there is replaced.
    assert [path.name for path in tmp_path.iterdir()] == ["a-coreml.lorg"]
    assert (tmp_path / "a-coreml.lorg" / "manifest.json").read_text() == "older"


def test_as_many_fallbacks_as_allowed_are_told_with_their_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_fallbacks(monkeypatch, "onnx-cpu", *FALLBACKS)
    out = tmp_path / "a.lorg"
    result = call("export", ZOO, "--max-fallback", 5, "--out", out, *SMALL)
    assert result.exit_code == 0
    assert "Outside the delegate: 5 operators" in result.stdout
    assert "4 x  a.large  decoder  export/layers/text.py:9  too large" in result.stdout
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["components"][-1]["fallbacks"] == [msgspec.to_builtins(f) for f in FALLBACKS]
    assert manifest["recipe"]["max_fallback"] == 5


def test_one_target_that_disagrees_leaves_nothing_of_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight = Bounds(image_tokens=1e-12, logits=1e-12, greedy_ids_equal=True)
    monkeypatch.setattr("lorgnette.export.pipeline.bounds_for", lambda *_: tight)
    asked = ("--target", "onnx-cpu,coreml", "--out", tmp_path / "a.lorg")
    line = refused(call("export", ZOO, *asked, *SMALL), code=1)
    assert "rung 'image_tokens' failed" in line
    assert not list(tmp_path.iterdir())


# ExecuTorch itself: its lowering takes longer


@pytest.mark.slow
def test_operators_that_xnnpack_lacks_are_refused_by_name_and_line(tmp_path: Path) -> None:
    asked = ("--target", "onnx-cpu,executorch-xnnpack", "--max-fallback", 0)
    line = refused(call("export", ZOO, *asked, "--out", tmp_path / "a.lorg", *SMALL))
    assert "operators run outside the delegate of executorch-xnnpack" in line
    assert "wanted at most 0" in line
    assert "llama.update_cache.default (targets/executorch/modules.py:" in line
    for place in {
        word for word in line.replace("(", " ").replace(")", " ").split() if ".py:" in word
    }:
        file, _, number = place.rstrip(",").partition(":")
        assert int(number) <= len((ROOT / file).read_text().splitlines())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_bundle_for_vulkan_is_made_and_says_that_it_was_not_run(tmp_path: Path) -> None:
    out = tmp_path / "a.lorg"
    asked = ("--target", "onnx-cpu,executorch-vulkan", "--out", out)
    told = document("export", ZOO, *asked, *SMALL)
    made = tmp_path / "a-executorch-vulkan.lorg"
    reason = all_targets()["executorch-vulkan"].capabilities.not_run
    assert json.loads((made / "manifest.json").read_text())["not_run"] == reason
    assert [one["not_run"] for one in told["bundles"]] == [None, reason]
    assert told["bundles"][1]["ladder"] == []
    assert (told["agree"], told["pairs"]) == (None, [])
    for words in (("run", made, "--prompt", "?"), ("verify", made)):
        assert reason in refused(call(*words))
