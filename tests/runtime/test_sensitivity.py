"""What each part of a model loses alone, against measuring the whole model anew."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorgnette.bundle import open_bundle
from lorgnette.errors import EXIT_CHECK_FAILED, EXIT_WRONG_INPUT, ConfigError, VerifyError
from lorgnette.export.answers import OriginalAnswers, original_answers
from lorgnette.export.check import Parts
from lorgnette.export.families import open_checkpoint
from lorgnette.export.matrices import matrices_of, matrix_names
from lorgnette.export.pipeline import read_parts
from lorgnette.export.prepared import prepare_samples
from lorgnette.export.quality import measure_reference
from lorgnette.export.reference import Reference
from lorgnette.export.sample_set import SampleSet
from lorgnette.export.search import Limit, Search, plan_name
from lorgnette.export.sensitivity import Loss, measure_units, quantize_candidates
from lorgnette.export.units import Unit, find_units, plan_of
from lorgnette.export.walk import ModelWalk, Passage, first_states
from lorgnette.export.weights import WeightSource
from lorgnette.quantize.plan import QuantPlan
from lorgnette.quantize.plan_file import build_plan, check_rules, read_plan_file
from lorgnette.quantize.samples import Sample
from lorgnette.quantize.store import QuantizedModel, QuantizedSource
from lorgnette.recipe import PlanRule, PlanText, Recipe
from lorgnette.targets import find_target
from lorgnette.targets.onnx.weight_file import PAGE_BYTES
from lorgnette.targets.target import Target
from tests.unit.cli_helpers import ZOO, call, document
from tests.zoo.calibration_set import calibration_samples
from tests.zoo.checkpoint import CHECKPOINTS

TIED = CHECKPOINTS / "omnivlm-tiny"


def drawn(count: int, first: int = 0) -> tuple[Sample, ...]:
    samples = []
    for asked in calibration_samples(first + count)[first:]:
        data = io.BytesIO()
        asked.picture.save(data, "PNG")
        samples.append(Sample(data.getvalue(), asked.question, asked.answer))
    return tuple(samples)


@dataclass(frozen=True)
class Case:
    """A checkpoint with the codes of some of its units."""

    parts: Parts
    units: tuple[Unit, ...]
    models: list[QuantizedModel]
    answers: OriginalAnswers

    def unit(self, name: str) -> Unit:
        return next(unit for unit in self.units if unit.name == name)


@pytest.fixture(scope="module", params=[ZOO, TIED], ids=["plain", "tied"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    parts = read_parts(open_checkpoint(request.param, None), Recipe())
    units = tuple(
        replace(unit, rules=unit.rules[:1] + unit.rules[-1:] if len(unit.rules) > 1 else unit.rules)
        for unit in find_units(parts, find_target("onnx-cpu"))
    )
    prepared = prepare_samples(parts, drawn(3))
    folder = tmp_path_factory.mktemp("codes")
    models = quantize_candidates(parts, units, folder, prepared, lambda done, of: None)
    return Case(parts, units, models, original_answers(parts, drawn(2, 3)))


class OneUnit:
    """The parameters of one component, of which those of one unit are rounded."""

    def __init__(self, source: QuantizedSource, published: WeightSource, unit: Unit) -> None:
        self.shapes = source.shapes
        self._source, self._published = source, published
        self._names = {m.name for m in unit.matrices if m.component == source.component}
        # A rescale leaves no layer.
        self._stage = "".join(
            f"{head}layers.{rest.split('.')[0]}."
            for head, found, rest in (min(self._names, default="").partition("layers."),)
            if found
        )

    def tensor(self, name: str) -> Tensor:
        if name in self._names:
            return self._source.tensor(name)
        if self._stage and name.startswith(self._stage):
            return torch.from_numpy(self._source.unrounded(name))
        return self._published.tensor(name)


def measured_whole(case: Case, unit: Unit, number: int) -> Loss:
    """The oracle: all of the model runs, through `measure_reference`."""
    sources = {
        name: OneUnit(case.models[number].sources[name], source, unit)
        for name, source in case.parts.sources.items()
    }
    components = {component.name: component for component in case.parts.components}
    measured = measure_reference(Reference(components, sources), case.answers)
    return Loss(measured.kl_mean, measured.same_answer)


def test_a_part_alone_loses_what_the_whole_model_with_it_rounded_loses(case: Case) -> None:
    tied = case.parts.checkpoint.path.name == TIED.name
    names = ["vision_encoder/tower.layers.1.mlp", "decoder/layers.2.attention"]
    names += ["vision_encoder/projector", "token_embedding/table"]
    units = [case.unit(name) for name in names]
    if not tied:
        units.append(case.unit("decoder/head"))
    told: list[tuple[int, int]] = []
    found = measure_units(
        case.parts, units, case.models, case.answers, lambda *count: told.append(count)
    )
    assert told[-1] == (len(told), sum(len(unit.rules) for unit in units))
    for unit, losses in zip(units, found, strict=True):
        assert len(losses) == len(unit.rules)
        for number in (0, len(losses) - 1):
            assert losses[number] == measured_whole(case, unit, number), unit.name
        assert losses[0].kl < losses[-1].kl / 10, "most bits lose least"


def test_a_walk_through_all_steps_is_the_model(case: Case) -> None:
    walk = ModelWalk(case.parts)
    answer = case.answers.answers[0]
    slots = np.flatnonzero(np.array(answer.prompt_ids) == case.answers.image_token_id)
    ids = (*answer.prompt_ids, *answer.greedy_ids[:-1])
    passage = Passage(answer.tiles().pixels, ids, slots, len(answer.greedy_ids))
    reference = Reference({c.name: c for c in case.parts.components}, case.parts.sources)
    embeddings = reference.embed(answer.prompt_ids).copy()
    embeddings[slots] = answer.image_tokens.reshape(len(slots), -1)
    wanted = reference.follow(embeddings, answer.greedy_ids)
    states = first_states([passage])
    for at in range(len(walk.steps)):
        (logits,) = walk.finish(at, [passage], states, [], walk.published)
        assert np.array_equal(logits, wanted)
        states = walk.run(at, [passage], states)
    together = first_states([passage], 1 << 30)
    assert len(together[0]) == 1
    (logits,) = walk.finish(0, [passage], together, [], walk.published)
    np.testing.assert_allclose(logits, wanted, atol=1e-3)


def test_a_large_model_is_walked_a_step_at_a_time(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = case.unit("decoder/layers.3.mlp")
    wanted = measure_units(case.parts, [unit], case.models, case.answers, lambda done, of: None)
    monkeypatch.setattr("lorgnette.export.walk.RESIDENT_BYTES", 0)
    walk = ModelWalk(case.parts)
    held = [p for step in walk.steps for p in step.stage.module.parameters() if not p.is_meta]
    assert not held
    found = measure_units(case.parts, [unit], case.models, case.answers, lambda done, of: None)
    assert found == wanted


def test_units_hold_every_matrix_once_and_select_it(case: Case) -> None:
    matrices = matrices_of(case.parts.components)
    units = find_units(case.parts, find_target("onnx-cpu"))
    held = [str(matrix) for unit in units for matrix in unit.matrices]
    assert sorted(held) == sorted(map(str, matrices))
    for number in range(5):
        plan = plan_of(units, [number] * len(units), "mine", "")
        check_rules(plan, matrices)
        assert not find_target("onnx-cpu").check(matrices, plan)
        for unit in units:
            wanted = unit.rules[min(number, len(unit.rules) - 1)]
            for matrix in unit.matrices:
                rule = plan.rule_for(matrix.component, matrix.name)
                assert rule._replace(select="*") == wanted
    published = {part for source in case.parts.sources.values() for part in source.used_tensors()}
    shapes = {name: case.parts.checkpoint.tensors[name].shape for name in published}
    names = matrix_names(case.parts.components)
    parts_of_matrices = {
        part.name
        for component, source in case.parts.sources.items()
        for name in names[component]
        for part in source._parts[name]
    }
    count = sum(math.prod(shapes[name]) for name in parts_of_matrices)
    assert sum(unit.weights for unit in units) == count, "what is tied counts once"


# The limits of a search, with losses that are made up


@pytest.fixture(scope="module")
def parts() -> Parts:
    return read_parts(open_checkpoint(TIED, None), Recipe())


class MadeUp(Search):
    """A search whose measurements are given; plans lose so many times what is predicted."""

    worse = 1.0

    def measure(self) -> list[list[Loss]]:
        return [
            [Loss(0.001 * 2.0 ** (4 * number + at % 3), 1.0) for number in range(len(unit.rules))]
            for at, unit in enumerate(self.units)
        ]

    def measure_plan(self, plan: QuantPlan) -> Loss:
        losses = self.measure()
        total = 0.0
        for at, unit in enumerate(self.units):
            matrix = unit.matrices[0]
            rule = plan.rule_for(matrix.component, matrix.name)._replace(select="*")
            total += losses[at][unit.rules.index(rule)].kl
        self.measured = [*getattr(self, "measured", []), total * self.worse]
        return Loss(total * self.worse, 0.5)

    @property
    def answers(self) -> OriginalAnswers:
        return OriginalAnswers((), 0, "made up", "", 1, *[None] * 4)  # type: ignore[arg-type]


@pytest.fixture
def made_up(parts: Parts, tmp_path: Path) -> MadeUp:
    return MadeUp(parts, find_target("onnx-cpu"), SampleSet("none", (), ()), tmp_path)


def code_bits(search: Search, plan: QuantPlan) -> float:
    """The average bits of codes, counted from the plan and the published tensors."""
    seen: dict[str, tuple[int, int]] = {}
    for matrix in matrices_of(search._parts.components):
        origin = search._parts.sources[matrix.component].origin(matrix.name) or str(matrix)
        scheme = plan.scheme_for(matrix.component, matrix.name)
        seen[origin] = (matrix.rows * matrix.columns, scheme.bits)
    weights = sum(count for count, _ in seen.values())
    return sum(count * bits for count, bits in seen.values()) / weights


@pytest.mark.parametrize("bits", [2.5, 3.5, 5.0, 7.9])
def test_a_plan_keeps_its_bits(made_up: MadeUp, bits: float) -> None:
    found = made_up.run(Limit("bits", bits), plan_name(Limit("bits", bits)))
    plan = build_plan(found.plan, "here")
    assert plan.name == f"mixed-{bits:g}"
    used = code_bits(made_up, plan)
    assert bits - 0.5 < used <= bits
    assert found.bits(found.chosen) == pytest.approx(used)
    assert found.stored_bits(found.chosen) > used
    assert found.measured.kl == pytest.approx(found.chosen.loss)


def test_a_plan_keeps_its_bytes(made_up: MadeUp, parts: Parts) -> None:
    from lorgnette.cli.predict import bundle_weight_bytes

    names = matrix_names(parts.components)

    def predicted(plan: QuantPlan) -> int:
        return bundle_weight_bytes(parts.sources, names, plan)

    for most in (1_500_000, 2_000_000, 2_500_000):
        found = made_up.run(Limit("bytes", most), "mine", predicted)
        assert most - 100_000 < predicted(build_plan(found.plan, "here")) <= most


def test_a_plan_keeps_its_loss_by_measurement(made_up: MadeUp) -> None:
    easy = made_up.run(Limit("loss", 0.5), "mine")
    assert easy.measured.kl <= 0.5
    assert len(made_up.measured) == 1
    made_up.worse, made_up.measured = 3.0, []
    found = made_up.run(Limit("loss", 0.5), "mine")
    assert found.measured.kl <= 0.5
    assert found.chosen.cost > easy.chosen.cost
    assert len(made_up.measured) > 1, "the first was predicted to fit and did not"


def test_a_loss_that_no_measured_plan_keeps_is_told(made_up: MadeUp) -> None:
    made_up.worse = 1000.0
    with pytest.raises(VerifyError, match="no plan that was measured loses so little") as caught:
        made_up.run(Limit("loss", 0.5), "mine")
    assert caught.value.exit_code == EXIT_CHECK_FAILED
    assert f"{min(made_up.measured):.2g} or more" in str(caught.value)
    assert "8.00 bits a weight" in str(caught.value)


def test_a_loss_below_the_least_is_refused(made_up: MadeUp) -> None:
    least = sum(losses[0].kl for losses in made_up.measure())
    with pytest.raises(ConfigError, match="no plan loses so little") as caught:
        made_up.run(Limit("loss", least / 2), "mine")
    assert f"{least:.2g} or more" in str(caught.value)


def test_too_few_bits_are_refused_before_anything_is_measured(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: Search) -> Sequence[Sequence[Loss]]:
        raise RuntimeError("measured")

    monkeypatch.setattr(MadeUp, "measure", never)
    with pytest.raises(ConfigError, match="no plan has so few bits") as caught:
        made_up.run(Limit("bits", 1.5), "mine")
    least = code_bits(made_up, plan_of(made_up.units, [9] * len(made_up.units), "", ""))
    assert caught.value.wanted == f"{math.ceil(100 * least) / 100:g} or more"
    with pytest.raises(ConfigError, match="no plan makes the weights so small") as caught:
        made_up.run(Limit("bytes", 1000), "mine", lambda plan: 5000)
    assert caught.value.wanted == "5000 or more"


# The command


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A search on the zoo with four samples."""
    folder = tmp_path_factory.mktemp("search")
    lines = []
    for number, asked in enumerate(calibration_samples(4)):
        asked.picture.save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "question": asked.question})
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    told = document(
        "search", ZOO, "--bits", "4", "--calibrate", folder, "--out", folder / "plan.toml",
        "--plot", folder / "plot.svg",
    )  # fmt: skip
    return folder, told


def test_the_command_writes_plan_and_plot(searched: tuple[Path, dict[str, Any]]) -> None:
    folder, told = searched
    text = read_plan_file(folder / "plan.toml")
    assert text.name == "mixed-4"
    assert told["plan"]["name"] == "mixed-4"
    parts = read_parts(open_checkpoint(ZOO, None), Recipe())
    plan = build_plan(text, "here")
    matrices = matrices_of(parts.components)
    check_rules(plan, matrices)
    assert not find_target("onnx-cpu").check(matrices, plan)
    for unit in told["units"]:
        assert f"# {unit['name']}: loss" in (folder / "plan.toml").read_text()
        assert min(tried["loss"] for tried in unit["tried"]) >= 0
    chosen = told["chosen"]
    assert chosen["bits"] <= 4
    assert chosen["same_answer"] == 1
    points = told["points"]
    assert [p["bytes"] for p in points] == sorted((p["bytes"] for p in points), reverse=True)
    assert set(told["compared"]) == {"int8", "int4"}
    floats = {entry["name"] for entry in told["kept_in_float"]}
    assert "decoder/norm.weight" in floats
    assert not floats & {str(matrix) for matrix in matrices}
    svg = (folder / "plot.svg").read_text()
    assert svg.startswith("<?xml")
    for word in ("predicted", "found, measured", "int8", "int4"):
        assert f"<!-- {word} -->" in svg
    assert not list(folder.glob("search-*")), "codes are kept only while they are needed"


@pytest.mark.slow
def test_the_plan_exports_to_about_as_many_bytes_as_predicted(
    searched: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, told = searched
    out = tmp_path / "mixed.lorg"
    document(
        "export", ZOO, "--plan", folder / "plan.toml", "--calibrate", folder, "--out", out
    )  # fmt: skip
    size = (out / "graphs" / "weights.bin").stat().st_size
    # Gaps that align weights depend on the order in which a graph asks for them.
    assert abs(size - told["chosen"]["bytes"]) <= 4 * PAGE_BYTES


@pytest.mark.slow
def test_the_plan_mixed_is_searched_for(
    searched: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "mixed.lorg"
    document("export", ZOO, "--quant", "mixed", "--calibrate", searched[0], "--out", out)
    recipe = open_bundle(out).manifest.recipe
    assert recipe.quant == "mixed-3.5"
    assert recipe.plan is not None
    parts = read_parts(open_checkpoint(ZOO, None), Recipe())
    plan = build_plan(recipe.plan, "here")
    search = MadeUp(parts, find_target("onnx-cpu"), SampleSet("none", (), ()), tmp_path)
    assert 3 < code_bits(search, plan) <= 3.5
    assert [path.name for path in tmp_path.iterdir()] == ["mixed.lorg"]
    assert document("verify", out, "--against", ZOO)["passed"]


def test_the_rules_that_are_found_for_mixed_are_carried_in_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, Path]] = []
    rule = PlanRule(select="*", bits=8, group=32, activations="int8_group")

    def found(
        parts: Parts,
        target: Target,
        samples: Sequence[Sample],
        folder: Path,
        step: Callable[[str], None],
    ) -> PlanText:
        asked.append((len(samples), folder))
        return PlanText(name="mixed-3.5", rule=(rule,))

    monkeypatch.setattr("lorgnette.export.search.search_mixed", found)
    out = tmp_path / "new" / "mixed.lorg"
    document("export", ZOO, "--quant", "mixed", "--measure", "0", "--out", out)
    assert asked == [(48, tmp_path)]
    recipe = open_bundle(out).manifest.recipe
    assert (recipe.quant, recipe.plan) == ("mixed-3.5", PlanText(name="mixed-3.5", rule=(rule,)))
    again = call("export", ZOO, "--quant", "mixed", "--out", out)
    assert again.exit_code == EXIT_WRONG_INPUT
    assert "bundle exists already" in again.stderr
    assert len(asked) == 1, "what cannot be written is refused before a search"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "give one of --max-bytes, --max-loss and --bits"),
        (["--bits", "4", "--max-loss", "0.1"], "give one of"),
        (["--max-loss", "0"], "--max-loss"),
        (["--bits", "1.5"], "no plan has so few bits a weight: got 1.5, wanted 2."),
        (["--max-bytes", "1000"], "no plan makes the weights so small: got 1000 bytes, wanted 1"),
        (["--bits", "4", "--target", "none"], "unknown target"),
        (["--bits", "4", "--calibrate", "nowhere"], "no samples in nowhere"),
        (["--bits", "4", "--plot", "plot.png"], "wanted .svg"),
        (["--bits", "4", "--plot", "nowhere/plot.svg"], "no such folder"),
    ],
)
def test_what_cannot_be_searched_is_refused_first(
    tmp_path: Path, options: list[str], told: str
) -> None:
    out = tmp_path / "plan.toml"
    result = call("search", ZOO, "--out", out, *options)
    assert result.exit_code == EXIT_WRONG_INPUT
    assert told in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_plan_that_stands_there_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "plan.toml"
    out.write_text("mine")
    result = call("search", ZOO, "--bits", "4", "--out", out)
    assert result.exit_code == EXIT_WRONG_INPUT
    assert "something stands there already" in result.stderr
    assert out.read_text() == "mine"
    result = call("search", ZOO, "--bits", "4", "--out", tmp_path / "plan.json")
    assert "wanted .toml" in result.stderr
