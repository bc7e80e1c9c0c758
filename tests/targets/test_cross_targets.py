"""Bundles of one export for every target that runs here: same answers, same codes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lorgnette.bundle import Bundle
from lorgnette.export.families import open_checkpoint
from lorgnette.export.matrices import matrices_of
from lorgnette.export.pipeline import Exported, export_all, read_parts
from lorgnette.export.sample_set import Pictures
from lorgnette.manifest import Manifest
from lorgnette.quantize.plan import find_plan
from lorgnette.quantize.scheme import QuantScheme
from lorgnette.recipe import Recipe
from lorgnette.runtime.model import open_model
from lorgnette.targets.coreai import read_codes as coreai
from lorgnette.targets.coreml import read_codes as coreml
from lorgnette.targets.executorch import read_codes as executorch
from lorgnette.targets.onnx import read_codes as onnx
from lorgnette.targets.target import StoredMatrix
from tests.family_cases import picture

Name = tuple[str, str]
Codes = Mapping[Name, StoredMatrix]
Reader = Callable[[Path, Manifest], Iterator[StoredMatrix]]

ZOO = Path(__file__).parents[1] / "zoo/checkpoints"
READERS: dict[str, Reader] = {
    "onnx-cpu": onnx.read_codes,
    "coreai": coreai.read_codes,
    "coreml": coreml.read_codes,
    "executorch-xnnpack": executorch.read_codes,
}
RUNGS = ("image_tokens", "logits", "greedy_ids")
QUESTIONS = ("What do you see?", "What colour is the circle, and where is it?")
SIZES = ((96, 20), (64, 64))
ROUNDED = (
    ("smolvlm", "int4-fast"),
    pytest.param("mobilevlm", "int4-fast", marks=pytest.mark.slow),
    pytest.param("omnivlm", "int4-fast", marks=pytest.mark.slow),
    pytest.param("mobilevlm", "int8-channel", marks=pytest.mark.slow),
)


@dataclass(frozen=True)
class Case:
    """A checkpoint under a plan, for all targets."""

    checkpoint: Path
    recipe: Recipe
    exported: Exported

    @cached_property
    def bundles(self) -> dict[str, Bundle]:
        return dict(zip(READERS, self.exported.bundles, strict=True))

    @cached_property
    def codes(self) -> dict[str, Codes]:
        """What lies in the files of each target."""
        return {name: read(name, bundle) for name, bundle in self.bundles.items()}

    @cached_property
    def schemes(self) -> dict[Name, QuantScheme]:
        """What the plan says of every matrix."""
        plan = find_plan(self.recipe.quant)
        parts = read_parts(open_checkpoint(self.checkpoint, None), self.recipe)
        return {
            (each.component, each.name): plan.scheme_for(each.component, each.name)
            for each in matrices_of(parts.components)
        }

    def kept_in_float(self, target: str) -> set[Name]:
        components = self.bundles[target].manifest.components
        return {(each.name, name) for each in components for name in each.kept_in_float}


Cases = Callable[[str, str], Case]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Exports a checkpoint once and for all targets, which is what takes the time here."""
    made: dict[tuple[str, str], Case] = {}

    def case(family: str, quant: str) -> Case:
        if (family, quant) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{quant}")
            checkpoint = ZOO / f"{family}-tiny"
            recipe = Recipe(quant=quant, context_length=256)
            exported = export_all(
                checkpoint,
                {name: folder / f"{name}.lorg" for name in READERS},
                recipe,
                pictures=Pictures(measure=0),
            )
            made[family, quant] = Case(checkpoint, recipe, exported)
        return made[family, quant]

    return case


def read(target: str, bundle: Bundle) -> Codes:
    """The matrices of a bundle by name, each of which is there once."""
    stored = list(READERS[target](bundle.path, bundle.manifest))
    found = {(each.component, each.name): each for each in stored}
    assert len(found) == len(stored)
    return found


def differing(one: Codes, other: Codes) -> set[Name]:
    """Matrices that both hold as integers, and not as the same ones."""
    return {
        name
        for name in one.keys() & other.keys()
        if one[name].bits != other[name].bits
        or not np.array_equal(one[name].codes, other[name].codes)
    }


def test_four_engines_answer_token_for_token_alike(cases: Cases) -> None:
    answers = {}
    for name, bundle in cases("smolvlm", "fp32").bundles.items():
        model = open_model(bundle.path, threads=1)
        answers[name] = [
            model.generate(picture(*size), question, max_new_tokens=12).result()
            for size in SIZES
            for question in QUESTIONS
        ]
    first = answers["onnx-cpu"]
    assert len({tuple(answer.token_ids) for answer in first}) > 1
    assert all(answer.token_ids for answer in first)
    for name, given in answers.items():
        assert [each.token_ids for each in given] == [each.token_ids for each in first], name
        assert [each.text for each in given] == [each.text for each in first], name


@pytest.mark.parametrize(("family", "quant"), [("smolvlm", "fp32"), *ROUNDED])
def test_every_pair_of_bundles_agrees_at_every_rung(cases: Cases, family: str, quant: str) -> None:
    comparison = cases(family, quant).exported.comparison
    assert [(pair.first, pair.second, pair.rung) for pair in comparison.pairs] == [
        (*two, rung) for two in combinations(READERS, 2) for rung in RUNGS
    ]
    assert comparison.passed
    if quant == "fp32":
        errors = [pair.error for pair in comparison.pairs if pair.error is not None]
        assert len(errors) == 12
        assert max(errors) < 1e-5


def test_a_plan_of_floats_stores_no_codes(cases: Cases) -> None:
    assert {name: len(codes) for name, codes in cases("smolvlm", "fp32").codes.items()} == (
        dict.fromkeys(READERS, 0)
    )


@pytest.mark.parametrize(("family", "quant"), ROUNDED)
def test_files_hold_the_codes_of_every_matrix_but_of_those_named(
    cases: Cases, family: str, quant: str
) -> None:
    case = cases(family, quant)
    planned = {name for name, scheme in case.schemes.items() if scheme.is_integer}
    assert len(planned) > 40
    for target, codes in case.codes.items():
        kept = case.kept_in_float(target) & planned
        assert set(codes) == planned - kept, target
        assert len(kept) < 4
        for name, stored in codes.items():
            scheme = case.schemes[name]
            assert stored.bits == scheme.bits
            assert stored.codes.dtype == np.uint8
            assert stored.scales.dtype == np.float32
            rows, columns = stored.codes.shape
            assert stored.scales.shape == (rows, scheme.groups(columns))
            assert stored.codes.max() < 1 << stored.bits


@pytest.mark.parametrize(("family", "quant"), ROUNDED)
def test_codes_are_the_same_in_every_format(cases: Cases, family: str, quant: str) -> None:
    codes = cases(family, quant).codes
    for one, other in combinations(READERS, 2):
        assert len(codes[one].keys() & codes[other].keys()) > 40
        assert differing(codes[one], codes[other]) == set(), (one, other)


@pytest.mark.parametrize(("family", "quant"), ROUNDED)
def test_scales_are_the_same_in_every_format_that_holds_them(
    cases: Cases, family: str, quant: str
) -> None:
    """Core ML has no scales of 32 bits: it gets the nearest of 16, and says so."""
    case = cases(family, quant)
    wanted = case.codes["onnx-cpu"]
    rounded = set()
    for target, codes in case.codes.items():
        for name in codes.keys() & wanted.keys():
            scales, exact = codes[name].scales, wanted[name].scales
            if np.array_equal(scales, exact):
                continue
            rounded.add((target, name[0]))
            assert case.schemes[name].scale_bits == 32, (target, name)
            assert np.array_equal(scales, exact.astype(np.float16).astype(np.float32))
    assert {target for target, _ in rounded} == {"coreml"}
    for target, component in rounded:
        said = case.bundles[target].manifest.component(component).exceptions
        assert any("rounded to float16" in line for line in said)


@pytest.mark.parametrize("part", ["codes", "columns"])
def test_one_code_that_is_changed_in_a_file_is_found(
    cases: Cases, tmp_path: Path, part: str
) -> None:
    """In rows of packed codes, and in columns as integer kernels read them."""
    case = cases("smolvlm", "int4-fast")
    name = {
        "codes": ("decoder", "layers.1.mlp.down_proj.weight"),
        "columns": ("vision_encoder", "tower.layers.1.mlp.fc1.weight"),
    }[part]
    bundle = case.bundles["onnx-cpu"]
    copied = Bundle(tmp_path / "copied.lorg", bundle.manifest)
    shutil.copytree(bundle.path, copied.path)
    graph = copied.path / bundle.manifest.component(name[0]).graph
    stored = ir.load(graph).graph.initializers
    (value,) = (v for k, v in stored.items() if k.startswith(name[1]) and k.endswith(part))
    place = value.const_value
    assert isinstance(place, ir.ExternalTensor)
    with (graph.parent / place.location).open("r+b") as file:
        file.seek((place.offset or 0) + 7)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    changed = read("onnx-cpu", copied)
    assert differing(changed, case.codes["onnx-cpu"]) == {name}
    for target in ("coreai", "coreml", "executorch-xnnpack"):
        assert differing(changed, case.codes[target]) == {name}, target
    assert (changed[name].codes != case.codes["coreai"][name].codes).sum() == 1


@pytest.mark.parametrize("target", READERS)
def test_other_codes_are_told_from_equal_ones(cases: Cases, target: str) -> None:
    codes = dict(cases("smolvlm", "int4-fast").codes[target])
    name = ("decoder", "layers.0.attention.o_proj.weight")
    other = codes[name].codes.copy()
    other[-1, -1] ^= 1
    codes[name] = replace(codes[name], codes=other)
    assert differing(codes, cases("smolvlm", "int4-fast").codes["onnx-cpu"]) == {name}
