"""Bundles for Core AI as a user makes them: exported, opened, asked, verified."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorgnette.errors import BundleError
from lorgnette.export.pipeline import export
from lorgnette.export.sample_set import Pictures
from lorgnette.recipe import Recipe
from lorgnette.runtime.model import Model, open_model
from lorgnette.runtime.verify import verify
from tests.family_cases import picture

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests/zoo/checkpoints/smolvlm-tiny"
QUESTIONS = ("What do you see?", "What colour is the circle, and where is it?")
SIZES = ((96, 20), (64, 64))


def make(folder: Path, target: str, quant: str) -> Path:
    recipe = Recipe(target=target, quant=quant, context_length=256)
    path = folder / f"{target}-{quant}.lorg"
    _, ladder = export(CHECKPOINT, path, recipe, pictures=Pictures(measure=0))
    assert ladder.passed
    return path


def answers(model: Model) -> list[tuple[int, ...]]:
    return [
        tuple(model.generate(picture(*size), question, max_new_tokens=12).result().token_ids)
        for size in SIZES
        for question in QUESTIONS
    ]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("coreai"), "coreai", "fp32")


def test_a_float_bundle_answers_token_for_token_as_another_engine_does(
    bundle: Path, tmp_path: Path
) -> None:
    model = open_model(bundle, threads=1)
    rungs = verify(model).rungs
    assert [rung.name for rung in rungs][-1] == "greedy_ids"
    assert all(rung.passed for rung in rungs)
    assert model.manifest.golden.bounds.greedy_ids_equal
    other = open_model(make(tmp_path, "onnx-cpu", "fp32"), threads=1)
    assert answers(model) == answers(other)


def test_a_damaged_asset_is_refused_when_a_bundle_is_opened(bundle: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied.lorg"
    copied.mkdir()
    for file in bundle.rglob("*"):
        if file.is_file():
            place = copied / file.relative_to(bundle)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
    program = copied / "graphs/text.aimodel/main.mlirb"
    data = bytearray(program.read_bytes())
    data[len(data) // 2] ^= 1
    program.write_bytes(data)
    with pytest.raises(BundleError, match=r"main\.mlirb.*damaged"):
        open_model(copied, threads=1)


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["fp16", "int8", "int4-fast"])
def test_a_bundle_of_few_bits_is_as_exact_as_one_of_floats(tmp_path: Path, quant: str) -> None:
    """Nothing is rounded but weights, whose numbers the reference has, too."""
    model = open_model(make(tmp_path, "coreai", quant), threads=1)
    errors = [rung.error for rung in verify(model).rungs if rung.error is not None]
    assert len(errors) == 2
    assert max(errors) < 5e-6
