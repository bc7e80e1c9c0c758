"""Targets that are lowered here and run elsewhere: what they take, and what they say of it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("executorch", reason="executorch is not installed")

from lorgnette.quantize.plan import PLANS
from lorgnette.targets import find_target
from tests.executorch_case import Case, lower_case

LOWERED = ("executorch-coreml", "executorch-vulkan")


@pytest.mark.parametrize("name", LOWERED)
def test_targets_say_that_nothing_was_run(name: str) -> None:
    assert find_target(name).capabilities.not_run


def delegates(case: Case) -> dict[str, set[str]]:
    """Backends that each method of the file calls."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    program = deserialize_pte_binary(case.file.read_bytes()).program
    return {
        plan.name: {delegate.id for delegate in plan.delegates}
        for plan in program.execution_plan
        if plan.chains[0].instructions
    }


@pytest.mark.slow
def test_core_ml_takes_the_vision_encoder_whole(tmp_path: Path) -> None:
    pytest.importorskip("coremltools", reason="coremltools is not installed")
    case = lower_case(tmp_path, "smolvlm", PLANS["fp32"], "executorch-coreml")
    assert case.report("vision_encoder").operators["delegate"] == 1
    assert {each.operator for each in case.report("vision_encoder").fallbacks} <= {
        "aten._to_copy.default",
        "aten.alias_copy.default",
    }
    assert delegates(case) == {
        "vision_encoder": {"CoreMLBackend"},
        "token_embedding": set(),
        "text_decoder": {"XnnpackBackend"},
    }


@pytest.mark.slow
def test_vulkan_takes_every_method_whole(tmp_path: Path) -> None:
    case = lower_case(tmp_path, "smolvlm", PLANS["fp32"], "executorch-vulkan")
    for report in case.lowered:
        assert report.operators["delegate"] == 1
    assert all(backends == {"VulkanBackend"} for backends in delegates(case).values())


def test_the_npu_is_refused_with_the_reason() -> None:
    assert "Qualcomm's SDK" in find_target("executorch-qnn").missing()
