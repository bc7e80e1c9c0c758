"""Several targets on the command line: listed, exported together, compared, refused."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import Result
from numpy.typing import NDArray

from lorgnette.bundle import open_bundle
from lorgnette.errors import BundleError, VerifyError
from lorgnette.manifest import Bounds, Fallback
from lorgnette.quantize.plan import PLANS
from lorgnette.runtime.golden import Golden, read_golden
from lorgnette.runtime.parity import compare_ladders
from lorgnette.runtime.verify import Ladder, Rung, Seen
from lorgnette.targets import all_targets
from lorgnette.targets.target import LoweredComponent
from tests.unit.cli_helpers import ROOT, ZOO, call, document, process

RUNGS = ["pixels", "prompt_ids", "image_tokens", "logits", "greedy_ids"]
COMPARED = ["image_tokens", "logits", "greedy_ids"]
SMALL = ("--context", 256, "--measure", 0, "--quant", "fp32")
BOTH = ("coreml", "onnx-cpu")
Made = tuple[list[Path], Any]
"""Bundles of both, and the document of their export."""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two targets from one export."""
    folder = tmp_path_factory.mktemp("targets")
    told = document("export", ZOO, "--target", ",".join(BOTH), "--out", folder / "a.lorg", *SMALL)
    return [folder / f"a-{name}.lorg" for name in BOTH], told


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of another family."""
    out = tmp_path_factory.mktemp("mobile") / "mobile.lorg"
    document("export", ZOO.parent / "mobilevlm-tiny", "--out", out, *SMALL)
    return out


def targets() -> dict[str, dict[str, Any]]:
    return {target["name"]: target for target in document("list", "targets")["targets"]}


def hide(monkeypatch: pytest.MonkeyPatch, *hidden: str) -> None:
    """Makes packages look as if they were not installed."""
    find = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> object:
        return None if name in hidden else find(name, package)

    monkeypatch.setattr("importlib.util.find_spec", found)


def change(source: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a bundle with another manifest."""
    shutil.copytree(source, target)
    manifest = json.loads((target / "manifest.json").read_text())
    edit(manifest)
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def vouch(bundle: Path, name: str) -> None:
    """Makes a bundle's manifest vouch for a file as it is now."""
    data = (bundle / name).read_bytes()
    manifest = json.loads((bundle / "manifest.json").read_text())
    (entry,) = [entry for entry in manifest["files"] if entry["path"] == name]
    entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def refused(result: Result, code: int = 2) -> str:
    """The one line on stderr of a command that failed."""
    assert result.exit_code == code, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


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
        assert manifest["format"] == {"major": 2, "minor": 2}
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


# verify


def test_several_bundles_are_compared_as_a_table(both: Made) -> None:
    bundles, _ = both
    code, out, err = process("verify", *bundles)
    assert (code, err) == (0, b"")
    head, *lines = out.decode().splitlines()
    assert head.split() == ["rung", *map(str, bundles)]
    assert [line.split()[:2] for line in lines[:5]] == [[rung, "ok"] for rung in RUNGS]
    for line, rung in zip(lines[5:], COMPARED, strict=True):
        assert line.startswith(f"{bundles[0]} to {bundles[1]}  {rung}")
        assert " ok " in line


def test_several_bundles_are_compared_as_a_document(both: Made) -> None:
    bundles, exported = both
    told = document("verify", *bundles)
    assert [one["bundle"] for one in told["bundles"]] == [str(path) for path in bundles]
    assert all(one["passed"] for one in told["bundles"])
    assert told["agree"] is True
    assert [pair["rung"] for pair in told["pairs"]] == COMPARED
    for pair, before in zip(told["pairs"], exported["pairs"], strict=True):
        assert (pair["first"], pair["second"]) == tuple(map(str, bundles))
        assert pair["bound"] == before["bound"]


def test_bundles_that_disagree_are_named_as_a_pair(tmp_path: Path, both: Made) -> None:
    bundles, _ = both

    def tighten(manifest: dict[str, Any]) -> None:
        manifest["golden"]["bounds"]["logits"] = 1e-12

    bad = [change(path, tmp_path / path.name, tighten) for path in bundles]
    result = call("verify", *bad)
    line = refused(result, code=1)
    assert f"rung 'logits' failed in {bad[0]}" in line
    pairs = [row for row in result.stdout.splitlines() if row.startswith(f"{bad[0]} to {bad[1]}")]
    assert [row.split()[3:5] for row in pairs] == [
        ["image_tokens", "ok"],
        ["logits", "FAILED"],
        ["greedy_ids", "ok"],
    ]
    result = call("verify", *bad, "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["agree"] is False
    assert [pair["passed"] for pair in told["pairs"]] == [True, False, True]
    assert told["error"]["type"] == "VerifyError"


def test_a_bundle_that_falls_early_is_compared_with_nothing(tmp_path: Path, both: Made) -> None:
    bundles, _ = both

    def tighten(manifest: dict[str, Any]) -> None:
        manifest["golden"]["bounds"]["image_tokens"] = 1e-12

    bad = change(bundles[1], tmp_path / "bad.lorg", tighten)
    result = call("verify", bundles[0], bad, "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert (told["agree"], told["pairs"]) == (None, [])
    assert [one["passed"] for one in told["bundles"]] == [True, False]
    result = call("verify", bundles[0], bad)
    assert "not reached" in result.stdout
    assert f"rung 'image_tokens' failed in {bad}" in refused(result, code=1)


def climbed(name: str, golden: Golden, bounds: Bounds, logits: NDArray[np.float32]) -> Any:
    ids = golden.text.original_greedy_ids
    seen = Seen(golden.image_tokens, logits, ids)
    return name, Ladder((Rung("logits", True, ""),), seen), golden, bounds


def test_a_pair_may_be_as_far_apart_as_both_bounds_allow_and_no_farther(
    both: Made,
) -> None:
    golden = read_golden(open_bundle(both[0][1]))
    bounds = Bounds(image_tokens=1e-3, logits=1e-3, greedy_ids_equal=True)
    for factor, agree in ((1.0019, True), (1.0021, False)):
        moved = golden.logits * np.float32(factor)
        comparison = compare_ladders(
            [
                climbed("one", golden, bounds, moved),
                climbed("two", golden, bounds, golden.logits),
                climbed("three", golden, bounds, golden.logits),
            ]
        )
        assert comparison.passed == agree
        assert len(comparison.pairs) == 9
    wrong = [(pair.first, pair.second) for pair in comparison.pairs if not pair.passed]
    assert wrong == [("one", "two"), ("one", "three")]
    with pytest.raises(VerifyError, match="one and two disagree at rung 'logits'"):
        comparison.require("here")


def test_a_step_less_or_another_shape_is_no_agreement(both: Made) -> None:
    golden = read_golden(open_bundle(both[0][1]))
    bounds = Bounds(image_tokens=1.0, logits=1.0, greedy_ids_equal=False)
    for wrong in (golden.logits[:-1], golden.logits[:, :-1], golden.logits * np.float32("nan")):
        one = climbed("one", golden, bounds, wrong)
        assert not compare_ladders([one, climbed("two", golden, bounds, golden.logits)]).passed


def test_bundles_of_other_models_are_not_compared(both: Made, mobile: Path) -> None:
    line = refused(call("verify", both[0][1], mobile))
    assert "bundles were asked different questions" in line
    assert f"{both[0][1]} and {mobile}" in line


def test_the_same_prompt_of_another_model_is_told_apart(
    both: Made,
) -> None:
    golden = read_golden(open_bundle(both[0][1]))
    bounds = Bounds(image_tokens=1.0, logits=1.0, greedy_ids_equal=False)
    ids = (*golden.text.original_greedy_ids[:-1], 0, 0)
    text = msgspec.structs.replace(golden.text, original_greedy_ids=ids)
    other = Golden(text, golden.picture, golden.image_tokens, golden.logits)
    with pytest.raises(BundleError, match="different models"):
        compare_ladders(
            [climbed(n, g, bounds, g.logits) for n, g in (("one", golden), ("two", other))]
        )


@pytest.mark.parametrize("options", [("--quality",), ("--against", str(ZOO))])
def test_what_is_for_one_bundle_is_refused_of_two(both: Made, options: Sequence[str]) -> None:
    result = call("verify", *both[0], *options)
    assert result.exit_code == 2
    assert "one bundle at a time" in result.stderr


# what cannot be run


def test_a_bundle_that_nothing_here_runs_is_one_line(tmp_path: Path, both: Made) -> None:
    def mark(manifest: dict[str, Any]) -> None:
        manifest["not_run"] = "its chip is elsewhere"

    bundle = change(both[0][1], tmp_path / "elsewhere.lorg", mark)
    for asked in (
        ("run", bundle, "--prompt", "?"),
        ("verify", bundle),
        ("verify", both[0][0], bundle),
    ):
        line = refused(call(*asked))
        assert line == f"error: bundle cannot be run here in {bundle}: got its chip is elsewhere\n"


def test_run_and_verify_without_the_engine_are_one_line(
    monkeypatch: pytest.MonkeyPatch, both: Made
) -> None:
    hide(monkeypatch, "coremltools")
    bundle = both[0][0]
    for asked in (("run", bundle, "--prompt", "?"), ("verify", bundle), ("verify", *both[0])):
        line = refused(call(*asked))
        assert f"the engine 'coreml' is not installed in {bundle}: got no coremltools" in line
        assert "(pip install 'lorgnette[coreml]')" in line


@pytest.mark.parametrize("keep", [0, 40, 0.5])
def test_a_damaged_package_is_one_line(tmp_path: Path, both: Made, keep: float) -> None:
    bundle = tmp_path / "damaged.lorg"
    shutil.copytree(both[0][0], bundle)
    (model,) = (bundle / "graphs" / "decoder.mlpackage").rglob("*.mlmodel")
    data = model.read_bytes()
    model.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    name = str(model.relative_to(bundle))
    assert name in refused(call("verify", bundle))  # the size is another than the manifest says
    vouch(bundle, name)
    for asked in (("run", bundle, "--prompt", "?"), ("verify", bundle)):
        refused(call(*asked))


def test_a_package_without_its_weights_is_one_line(tmp_path: Path, both: Made) -> None:
    bundle = tmp_path / "damaged.lorg"
    shutil.copytree(both[0][0], bundle)
    (weights,) = (bundle / "graphs" / "decoder.mlpackage").rglob("weight.bin")
    weights.write_bytes(weights.read_bytes()[:100])
    vouch(bundle, str(weights.relative_to(bundle)))
    refused(call("verify", bundle))
    weights.unlink()
    assert "weight.bin" in refused(call("run", bundle, "--prompt", "?"))


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
