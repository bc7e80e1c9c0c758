"""The plans under examples/ fit every family and the target that they are for."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorgnette.export.families import open_checkpoint
from lorgnette.export.matrices import matrices_of
from lorgnette.export.pipeline import read_parts
from lorgnette.quantize.calibrate import check_methods
from lorgnette.quantize.plan_file import build_plan, check_rules, read_plan_file
from lorgnette.recipe import Recipe
from lorgnette.targets import find_target
from tests.zoo.checkpoint import CHECKPOINTS

PLANS = sorted((Path(__file__).parents[2] / "examples" / "plans").glob("*.toml"))


def test_there_are_plans() -> None:
    assert PLANS


@pytest.mark.parametrize("family", ["smolvlm", "mobilevlm", "omnivlm"])
@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_plan_fits(path: Path, family: str) -> None:
    plan = build_plan(read_plan_file(path), str(path))
    parts = read_parts(open_checkpoint(CHECKPOINTS / f"{family}-tiny"), Recipe())
    matrices = matrices_of(parts.components)
    check_rules(plan, matrices)
    check_methods(plan, matrices)
    assert not find_target("onnx-cpu").check(matrices, plan)
