"""How far bundles are from the original, measured on the zoo's pictures, against other ways."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from lorgnette.bundle import open_bundle
from lorgnette.errors import ConfigError, DatasetError, ImageError, VerifyError
from lorgnette.export.check import Parts
from lorgnette.export.families import open_checkpoint
from lorgnette.export.pipeline import export, read_parts
from lorgnette.export.quality import (
    Measured,
    OriginalAnswers,
    SampleMeasure,
    measure_bundle,
    measure_reference,
    original_answers,
    summarise,
)
from lorgnette.export.quality_report import (
    make_report,
    plan_tensors,
)
from lorgnette.export.reference import Reference
from lorgnette.quantize.plan import PLANS, Promise, QuantPlan, Rule
from lorgnette.quantize.samples import Sample, read_samples
from lorgnette.quantize.scheme import FLOAT32, QuantScheme
from lorgnette.recipe import Recipe
from lorgnette.runtime.engines.engine import Float
from lorgnette.runtime.image import load_image
from lorgnette.runtime.model import Model, open_model
from lorgnette.runtime.prompt import image_slots
from tests.quantized import quantized_model
from tests.runtime.support import FakeEngine, copy_bundle, fake_model, redigest
from tests.runtime.test_verify import edit_weight
from tests.zoo.checkpoint import CHECKPOINTS
from tests.zoo.families import family_of
from tests.zoo.questions import HELD_OUT, draw_sample

COUNT = 12


def draw_set(folder: Path, checkpoint: Path, count: int) -> tuple[Sample, ...]:
    """Held-out pictures and questions of the kinds that a checkpoint learnt."""
    lines = []
    for n in range(count):
        drawn = draw_sample(HELD_OUT, n, family_of(checkpoint).exam)
        drawn.scene.image.save(folder / f"{n}.png")
        asked = drawn.question
        lines.append({"image": f"{n}.png", "question": asked.text, "answer": asked.answer})
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return read_samples(folder)


@pytest.fixture(scope="module")
def samples(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sample, ...]:
    return draw_set(tmp_path_factory.mktemp("samples"), checkpoint, COUNT)


@pytest.fixture(scope="module")
def parts(checkpoint: Path) -> Parts:
    return read_parts(open_checkpoint(checkpoint, None), Recipe())


@pytest.fixture(scope="module")
def answers(parts: Parts, samples: tuple[Sample, ...]) -> OriginalAnswers:
    return original_answers(parts, samples, sample_set="zoo")


def reference_of(parts: Parts, plan: QuantPlan | None = None) -> Reference:
    components = {entry.name: entry for entry in parts.components}
    model = quantized_model(
        Path(tempfile.mkdtemp()), components, parts.sources, plan or PLANS["fp32"]
    )
    return Reference(components, model.sources)


@pytest.fixture(scope="module")
def damaged(fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A bundle that says other things: its head is noisy."""
    path = copy_bundle(fp32, tmp_path_factory.mktemp("damaged") / "bad.lorg")

    def add_noise(values: np.ndarray) -> None:
        draw = np.random.default_rng(0)
        values += draw.standard_normal(values.size).astype(np.float32) * values.std() * 2

    edit_weight(path, "decoder", "head.weight", add_noise)
    return open_model(redigest(path), threads=1)


def own_answer(model: Model, sample: Sample) -> tuple[int, ...]:
    """What the runtime generates, which knows nothing of quality."""
    return model.generate(sample.image, sample.question, max_new_tokens=24).result().token_ids


def test_the_original_answers_as_the_runtime_does(
    model: Model, samples: Sequence[Sample], answers: OriginalAnswers
) -> None:
    assert answers.skipped == 0
    assert len(answers.answers) == COUNT
    for sample, answer in zip(samples, answers.answers, strict=True):
        assert answer.sample is sample
        assert answer.greedy_ids == own_answer(model, sample)
        assert answer.logits.dtype == np.float32
        assert answer.logits.argmax(-1).tolist() == list(answer.greedy_ids)
    texts = {answers.text(answer.greedy_ids).strip() for answer in answers.answers}
    assert len(texts) > 4, "the model says the same to everything: nothing is tested"


def test_a_bundle_of_float32_is_the_original(model: Model, answers: OriginalAnswers) -> None:
    summary = summarise(measure_bundle(model, answers), answers)
    assert 0 <= summary.kl_mean <= summary.kl_p95 <= summary.kl_max < 1e-9
    assert (summary.top1, summary.same_answer) == (1, 1)
    assert summary.image_token_cosine_min > 1 - 1e-9
    assert summary.exact_match == summary.original_exact_match
    assert summary.exact_match is not None
    assert summary.exact_match > 0.8
    assert summary.positions == sum(len(answer.greedy_ids) for answer in answers.answers)
    assert (summary.samples, summary.skipped, summary.sample_set) == (COUNT, 0, "zoo")
    assert summary.promise is None


def test_a_reference_of_float32_is_the_original(parts: Parts, answers: OriginalAnswers) -> None:
    summary = summarise(measure_reference(reference_of(parts), answers), answers)
    assert summary.kl_max < 1e-9
    assert (summary.top1, summary.same_answer) == (1, 1)
    assert summary.image_token_cosine_min > 1 - 1e-12


def test_fewer_bits_diverge_more(
    bundle_of: Callable[[str], Path], answers: OriginalAnswers
) -> None:
    found = []
    for scheme in ("fp32", "int8", "int4"):
        model = open_model(bundle_of(scheme), threads=1)
        found.append(summarise(measure_bundle(model, answers), answers))
    assert found[0].kl_mean * 1e3 < found[1].kl_mean < found[2].kl_mean / 3
    assert 1e-5 < found[2].kl_mean < 0.1
    cosines = [summary.image_token_cosine_mean for summary in found]
    assert cosines[0] > cosines[1]
    assert all(1e-6 < 1 - cosine < 5e-4 for cosine in cosines[1:])  # both have vision in 8 bits


def whole_prompt_logits(model: Model, answers: OriginalAnswers, at: int) -> Float:
    """What sample `at` is answered from, without a cache: each step reads everything anew."""
    answer = answers.answers[at]
    tokens = model.engine.encode(answer.tiles().pixels)
    rows = []
    for step in range(len(answer.greedy_ids)):
        ids = [*answer.prompt_ids, *answer.greedy_ids[:step]]
        embeddings = model.engine.embed(np.array(ids, np.int64))
        slots = image_slots(ids, model.manifest.spec.image_token_id)
        embeddings[slots] = tokens.reshape(len(slots), -1)
        rows.append(model.engine.new_state().run(embeddings, 0).copy())
    return np.stack(rows)


def torch_kl(original: Float, logits: Float) -> list[float]:
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (original, logits))
    return [float(x) for x in (p.exp() * (p - q)).sum(-1)]


def test_what_is_measured_is_what_the_graphs_give_without_a_cache(
    damaged: Model, answers: OriginalAnswers
) -> None:
    measured = measure_bundle(damaged, answers)
    for at in range(4):
        logits = whole_prompt_logits(damaged, answers, at)
        original = answers.answers[at].logits
        assert measured.samples[at].kl.tolist() == pytest.approx(
            torch_kl(original, logits), rel=1e-3, abs=1e-9
        )
        same = logits.argmax(-1) == original.argmax(-1)
        assert measured.samples[at].top1.tolist() == same.tolist()
    every = np.concatenate([sample.kl for sample in measured.samples])
    summary = summarise(measured, answers)
    assert summary.kl_mean == pytest.approx(every.mean())
    assert summary.kl_max == every.max()
    assert summary.kl_p95 == pytest.approx(sorted(every)[int(0.95 * (len(every) - 1))], rel=0.5)


def test_a_damaged_bundle_says_what_the_runtime_makes_it_say(
    damaged: Model, samples: Sequence[Sample], answers: OriginalAnswers
) -> None:
    measured = measure_bundle(damaged, answers)
    said = [own_answer(damaged, sample) for sample in samples]
    assert [sample.answer_ids for sample in measured.samples] == said
    same = [a == answer.greedy_ids for a, answer in zip(said, answers.answers, strict=True)]
    assert [sample.same for sample in measured.samples] == same
    assert 0 < sum(same) < COUNT, "all or none differ: nothing is tested"
    summary = summarise(measured, answers)
    assert summary.same_answer == sum(same) / COUNT
    assert summary.kl_mean > 0.01
    assert summary.top1 < 1
    right = [
        damaged.generate(s.image, s.question, max_new_tokens=24).result().text.strip() == s.answer
        for s in samples
    ]
    assert summary.exact_match == sum(right) / COUNT


def test_own_answers_go_on_behind_the_first_difference_only(
    fp32: Path, answers: OriginalAnswers
) -> None:
    """The engine counts positions: none may be left out, and the rest is overwritten."""
    wanted = answers.answers[0]
    stop = answers.prompt.stop_token_ids[0]
    engine = FakeEngine(lambda held: 7 if held[-1] != 7 else stop)
    measured = measure_bundle(fake_model(fp32, engine), answers)
    assert measured.samples[0].answer_ids == (7, stop)
    prompt = len(wanted.prompt_ids)
    decode = [(prompt + at, 1) for at in range(len(wanted.greedy_ids) - 1)]
    assert engine.runs[: len(decode) + 2] == [(0, prompt), *decode, (prompt, 1)]


def test_an_own_answer_has_an_end(fp32: Path, answers: OriginalAnswers) -> None:
    measured = measure_bundle(fake_model(fp32, FakeEngine(lambda held: 7)), answers)
    assert measured.samples[0].answer_ids == (7,) * answers.max_new_tokens


def test_a_reference_on_rounded_weights_is_near_its_bundle(
    parts: Parts, bundle_of: Callable[[str], Path], answers: OriginalAnswers
) -> None:
    rules = tuple(
        rule._replace(scheme=msgspec.structs.replace(rule.scheme, activations="float"))
        for rule in PLANS["int4-fast"].rules
    )
    plan = QuantPlan("weights", "", rules)
    measured = measure_reference(reference_of(parts, plan), answers)
    bundle = measure_bundle(open_model(bundle_of("int4-fast"), threads=1), answers)
    assert measured.kl_mean == pytest.approx(bundle.kl_mean, rel=0.5)
    # The bundle rounds activations too.
    assert measured.samples[0].cosines.mean() > bundle.samples[0].cosines.mean()


def test_a_reference_that_differs_does_not_tell_its_own_answer(
    parts: Parts, answers: OriginalAnswers
) -> None:
    rough = (Rule("decoder/*", QuantScheme(bits=2, group_size=32)), Rule("*", FLOAT32))
    measured = measure_reference(reference_of(parts, QuantPlan("rough", "", rough)), answers)
    assert measured.same_answer < 1
    known = [sample.answer_ids is not None for sample in measured.samples]
    assert known == [sample.same for sample in measured.samples]
    summary = summarise(measured, answers)
    assert summary.exact_match is None
    assert summary.original_exact_match is not None


def test_samples_that_do_not_fit_are_counted(checkpoint: Path, samples: tuple[Sample, ...]) -> None:
    parts = read_parts(open_checkpoint(checkpoint, None), Recipe(context_length=200))
    long = Sample(samples[0].image, "Is there a red disc? " * 30)
    found = original_answers(parts, (samples[0], long, samples[1]))
    assert (len(found.answers), found.skipped) == (2, 1)
    assert [answer.sample for answer in found.answers] == [samples[0], samples[1]]
    with pytest.raises(DatasetError, match="no sample fits the context length"):
        original_answers(parts, (long,))


def test_the_most_that_fits_is_not_left_out(checkpoint: Path, samples: tuple[Sample, ...]) -> None:
    def answered(context: int) -> int:
        parts = read_parts(open_checkpoint(checkpoint, None), Recipe(context_length=context))
        return len(original_answers(parts, samples[:1], 5).answers)

    whole = read_parts(open_checkpoint(checkpoint, None), Recipe())
    needed = len(original_answers(whole, samples[:1]).answers[0].prompt_ids) + 5
    assert answered(needed) == 1
    with pytest.raises(DatasetError):
        answered(needed - 1)


def test_answers_are_cut_where_it_was_said(parts: Parts, samples: tuple[Sample, ...]) -> None:
    found = original_answers(parts, samples[:2], 2)
    assert [len(answer.greedy_ids) for answer in found.answers] == [2, 2]
    assert found.max_new_tokens == 2


def test_a_question_with_a_special_token_is_refused_by_name(
    parts: Parts, samples: tuple[Sample, ...]
) -> None:
    bad = Sample(samples[0].image, "What is <image>?", None, "bad.png")
    with pytest.raises(DatasetError, match=r"cannot be asked in bad\.png.*<image>"):
        original_answers(parts, (samples[0], bad))


def test_a_picture_that_cannot_be_read_is_refused(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"a\.png"):
        original_answers(parts, read_samples(tmp_path))


def test_a_picture_is_encoded_once_for_the_questions_that_follow(
    fp32: Path, parts: Parts, samples: tuple[Sample, ...]
) -> None:
    first, second = samples[0], samples[1]
    several = (first, Sample(first.image, "Where?"), second, first)
    found = original_answers(parts, several)
    engine = FakeEngine(lambda held: 7)
    measure_bundle(fake_model(fp32, engine), found)
    tiles = [len(answer.tiles().pixels) for answer in found.answers]
    assert len(engine.tiles) == tiles[0] + tiles[2] + tiles[3]
    assert set(engine.tiles) == {1}
    again = original_answers(parts, (first,)).answers[0]
    np.testing.assert_array_equal(found.answers[3].logits, again.logits)


def test_progress_is_told(model: Model, parts: Parts, samples: tuple[Sample, ...]) -> None:
    told: list[tuple[int, int]] = []
    found = original_answers(parts, samples[:2], tell=lambda *n: told.append(n))
    measure_bundle(model, found, lambda *n: told.append(n))
    measure_reference(reference_of(parts), found, lambda *n: told.append(n))
    assert told == [(1, 2), (2, 2)] * 3


def test_numbers_that_are_none_are_no_measurement(model: Model, answers: OriginalAnswers) -> None:
    measured = measure_bundle(model, answers)
    broken = list(measured.samples)
    kl = broken[3].kl.copy()
    kl[0] = np.inf
    broken[3] = SampleMeasure(kl, broken[3].top1, broken[3].cosines, broken[3].answer_ids)
    assert Measured(tuple(broken)).kl_mean == math.inf
    with pytest.raises(VerifyError, match=r"numbers that are none in 3\.png"):
        summarise(Measured(tuple(broken)), answers)


@pytest.mark.parametrize(
    ("promise", "kept"),
    [
        (Promise(1e-2, 0.9), True),
        (Promise(math.inf, 1.0), True),
        (Promise(1e-20, 0.0), False),
        (Promise(1.0, 1.1), False),
    ],
)
def test_promises_are_checked(
    model: Model, answers: OriginalAnswers, promise: Promise, kept: bool
) -> None:
    measured = measure_bundle(model, answers)
    told = summarise(measured, answers, promise, accepted_loss=True).promise
    assert told is not None
    assert told.kept == kept
    assert told.accepted_loss
    assert told.max_kl == (None if promise.max_kl == math.inf else promise.max_kl)
    assert told.min_same_answer == promise.min_same_answer
    assert msgspec.json.decode(msgspec.json.encode(told), type=type(told)) == told


def test_a_bundle_of_a_shorter_context_is_refused(model: Model, answers: OriginalAnswers) -> None:
    longer = dataclasses.replace(answers, context_length=2000)
    with pytest.raises(ConfigError, match="context length is too small in bundle: got 1024"):
        measure_bundle(model, longer)


@pytest.mark.parametrize("name", ["mobilevlm-tiny", "omnivlm-tiny"])
def test_other_families_are_measured_too(name: str, tmp_path: Path) -> None:
    checkpoint = CHECKPOINTS / name
    path = tmp_path / "a.lorg"
    export(checkpoint, path, Recipe())
    model = open_model(path, threads=1)
    parts = read_parts(open_checkpoint(checkpoint, None), Recipe())
    answers = original_answers(parts, draw_set(tmp_path, checkpoint, 3))
    summary = summarise(measure_bundle(model, answers), answers)
    assert summary.kl_max < 1e-9
    assert summary.same_answer == 1
    for answer in answers.answers:
        sample = answer.sample
        result = model.generate(sample.image, sample.question, max_new_tokens=24).result()
        assert answer.greedy_ids == result.token_ids
        assert answers.text(answer.greedy_ids) == result.text


# The report


def test_a_report_holds_every_sample_and_matrix(
    parts: Parts, bundle_of: Callable[[str], Path], answers: OriginalAnswers, damaged: Model
) -> None:
    manifest = open_bundle(bundle_of("int4-fast")).manifest
    tensors, left_out = plan_tensors(parts, PLANS["int4-fast"], manifest)
    assert left_out is None
    measured = measure_bundle(damaged, answers)
    summary = summarise(measured, answers)
    report = make_report(manifest, answers, measured, summary, tensors)
    assert (report.plan, report.target) == ("int4-fast", "onnx-cpu")
    assert report.checkpoint == "smolvlm-tiny"
    for told, answer in zip(report.samples, answers.answers, strict=True):
        assert told.question == answer.sample.question
        assert told.original == answers.text(answer.greedy_ids).strip()
        assert told.same == (told.answer == told.original)
        assert len(told.kl) == len(answer.greedy_ids)
    assert sum(report.weight_bytes.values()) == sum(
        sum(entry.weight_bytes.values()) for entry in manifest.components
    )
    assert msgspec.json.decode(msgspec.json.encode(report), type=type(report)) == report


def test_bytes_of_matrices_are_those_of_the_bundle(
    parts: Parts, bundle_of: Callable[[str], Path]
) -> None:
    manifest = open_bundle(bundle_of("int4-fast")).manifest
    tensors, _ = plan_tensors(parts, PLANS["int4-fast"], manifest)
    found: dict[str, int] = {}
    for tensor in tensors:
        form = tensor.scheme.partition("/")[0]
        found[form] = found.get(form, 0) + tensor.bytes
    for form, count in found.items():
        stored = sum(entry.weight_bytes.get(form, 0) for entry in manifest.components)
        assert count == pytest.approx(stored, rel=0.02), form
    noise = {tensor.scheme.partition("/")[0]: tensor.sqnr_db or 0 for tensor in tensors}
    assert 15 < noise["int4g32h"] < 25
    assert 32 < noise["int8cn"] < 44


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (
            QuantPlan("a", "", (Rule("*", QuantScheme(bits=4, group_size=32), scaling="awq"),)),
            "calibrates",
        ),
        (QuantPlan("a", "", (Rule("*", QuantScheme(bits=8)),), rotate=True), "calibrates"),
        (PLANS["fp32"], "no matrix is rounded"),
    ],
)
def test_matrices_that_cannot_be_made_again_are_left_out_with_the_reason(
    parts: Parts, fp32: Path, plan: QuantPlan, reason: str
) -> None:
    tensors, told = plan_tensors(parts, plan, open_bundle(fp32).manifest)
    assert tensors == ()
    assert told is not None
    assert reason in told


def test_tiles_are_those_of_the_picture(answers: OriginalAnswers, model: Model) -> None:
    answer = answers.answers[0]
    again = answer.tiles().pixels
    assert again.shape[0] == answer.image_tokens.shape[0]
    assert load_image(answer.sample.image).size > 0
    np.testing.assert_allclose(
        model.engine.encode(again), answer.image_tokens, rtol=1e-3, atol=1e-4
    )
