"""Bundles of the smallest forms: they climb the ladder in this engine and in the oldest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorgnette.export.pipeline import export
from lorgnette.export.sample_set import Pictures
from lorgnette.recipe import PlanRule, PlanText, Recipe
from lorgnette.targets.onnx.lowering import OnnxCpu

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests/zoo/checkpoints/smolvlm-tiny"
REST = PlanRule(select="*", bits=4, activations="int8_group", scale_bits=8)
VISION = {
    "int4g32": PlanRule(select="vision_encoder/*", bits=4, activations="int8_group", scale_bits=16),
    "int4g32b15": PlanRule(
        select="vision_encoder/*", bits=4, activations="int8_static", scale_bits=8
    ),
    "int8t": PlanRule(select="vision_encoder/*", bits=8, group="tensor", activations="int8_token"),
}
ON_THE_FLOOR = """
import sys
import onnxruntime
from lorgnette.runtime.model import open_model
from lorgnette.runtime.verify import verify

for rung in verify(open_model(sys.argv[1], threads=1)).rungs:
    print(rung.name, rung.passed)
print(onnxruntime.__version__)
"""


@pytest.mark.parametrize("form", VISION)
def test_a_bundle_of_a_small_form_agrees_with_the_reference(
    tmp_path: Path, ort_floor_path: Path, form: str
) -> None:
    """Exporting holds its exact twin to the bound of float32, and what ships to its own."""
    plan = PlanText(name="small", rule=(VISION[form], REST))
    recipe = Recipe(quant=plan.name, plan=plan, context_length=256)
    bundle, ladder = export(CHECKPOINT, tmp_path / "s.lorg", recipe, pictures=Pictures(measure=0))
    assert all(rung.passed for rung in ladder.rungs)
    stored = {
        entry.name: set(entry.weight_bytes) - {"float32"} for entry in bundle.manifest.components
    }
    assert stored["decoder"] == stored["token_embedding"] == {"int4g32b"}
    assert {form, f"{form}h"} & stored["vision_encoder"]
    done = subprocess.run(
        [sys.executable, "-c", ON_THE_FLOOR, str(bundle.path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ort_floor_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *rungs, version = done.stdout.splitlines()
    assert version == OnnxCpu.capabilities.engine_min_version
    assert len(rungs) == 5
    assert all(rung.endswith(" True") for rung in rungs), rungs
