"""Bundles of several targets on the command line: compared, and refused where nothing runs them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from lorgnette.bundle import open_bundle
from lorgnette.errors import BundleError, VerifyError
from lorgnette.manifest import Bounds
from lorgnette.runtime.golden import Golden, read_golden
from lorgnette.runtime.parity import compare_ladders
from lorgnette.runtime.verify import Ladder, Rung, Seen
from tests.unit.cli_helpers import (
    COMPARED,
    RUNGS,
    SMALL,
    ZOO,
    Made,
    call,
    change,
    document,
    hide,
    process,
    refused,
    vouch,
)


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of another family."""
    out = tmp_path_factory.mktemp("mobile") / "mobile.lorg"
    document("export", ZOO.parent / "mobilevlm-tiny", "--out", out, *SMALL)
    return out


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
