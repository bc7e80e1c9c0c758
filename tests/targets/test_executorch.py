"""Whole models as `.pte` files: against the eager modules, and in the stock runner."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lorgnette.errors import BundleError
from lorgnette.quantize.plan import PLANS, SMALL_VISION, QuantPlan, Rule
from lorgnette.quantize.scheme import QuantScheme
from lorgnette.runtime.engines.executorch import ExecutorchEngine
from lorgnette.targets import find_target
from lorgnette.targets.executorch.read_codes import read_codes
from tests.eager import prompt_ids, random_tiles
from tests.executorch_case import Array, Case, lower_case, off, round_inputs

pytest.importorskip("executorch", reason="executorch is not installed")

BY_CHANNEL = QuantScheme(bits=8, activations="int8_token")
TABLE = QuantScheme(bits=8, group_size=32, scale_bits=16)
INT8_CHANNEL = QuantPlan(
    "int8-channel",
    "every matrix int8 by channel",
    (*SMALL_VISION, Rule("token_embedding/*", TABLE, "mse"), Rule("*", BY_CHANNEL, "mse")),
)
Cases = Callable[[str, str], Case]
EXACT = [("smolvlm", "fp32"), ("mobilevlm", "fp32")]
ROUNDED = [("omnivlm", "int4-fast"), ("smolvlm", "int8-channel")]


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Models lowered when they are first asked for, each once."""
    made: dict[tuple[str, str], Case] = {}

    def case(family: str, plan: str) -> Case:
        if (family, plan) not in made:
            chosen = INT8_CHANNEL if plan == INT8_CHANNEL.name else PLANS[plan]
            made[family, plan] = lower_case(tmp_path_factory.mktemp("et"), family, chosen)
        return made[family, plan]

    return case


def spliced(case: Case) -> tuple[list[int], Array]:
    """A prompt around two tiles, and its embeddings by the eager modules."""
    tiles = random_tiles(2, case.eager.spec.vision.image_size)
    ids = prompt_ids(case.eager, 2)
    return ids, case.eager.splice(ids, tiles)[0].numpy()


@pytest.mark.parametrize(("family", "plan"), EXACT)
def test_fp32_is_the_eager_model(cases: Cases, family: str, plan: str) -> None:
    case = cases(family, plan)
    tiles = random_tiles(3, case.eager.spec.vision.image_size)
    assert off(case.engine.encode(tiles), case.eager.encode(tiles).numpy()) < 5e-6
    ids, embeddings = spliced(case)
    got = case.engine.embed(np.array(ids, np.int64))
    assert np.array_equal(got, case.eager.embed(ids)[0].numpy())
    every = case.eager.logits(torch.from_numpy(embeddings)[None], [1] * len(ids)).numpy()
    for chunks in ([len(ids)], [7, len(ids) - 9, 2], [1] * len(ids)):
        state, past = case.engine.new_state(), 0
        for size in chunks:
            logits = state.run(embeddings[past : past + size], past)
            past += size
            assert off(logits, every[past - 1]) < 5e-6, chunks


@pytest.mark.parametrize(("family", "plan"), ROUNDED)
def test_integers_round_activations_as_xnnpack_says(cases: Cases, family: str, plan: str) -> None:
    """What is left of the error is another order of sums, which tips a value over now and then."""
    case = cases(family, plan)
    emulated = round_inputs(case)
    tiles = random_tiles(2, case.eager.spec.vision.image_size)
    ids, embeddings = spliced(case)
    every = torch.from_numpy(embeddings)[None]
    got = case.engine.encode(tiles)
    exact, near = case.eager.encode(tiles).numpy(), emulated.encode(tiles).numpy()
    assert 1e-3 < off(got, exact) < 0.1
    assert off(got, near) < 0.5 * off(got, exact)
    table = case.engine.embed(np.array(ids, np.int64))
    assert np.array_equal(table, case.eager.embed(ids)[0].numpy())
    chunks = [5] + [1] * (len(ids) - 5)
    exact, near = case.eager.logits(every, chunks).numpy(), emulated.logits(every, chunks).numpy()
    state, past, errors = case.engine.new_state(), 0, []
    for step, size in enumerate(chunks):
        logits = state.run(embeddings[past : past + size], past)
        past += size
        assert 1e-4 < off(logits, exact[step]) < 0.15
        errors.append(off(logits, near[step]))
    assert np.median(errors) < 1e-3


@pytest.mark.parametrize(("family", "plan"), [EXACT[0], ROUNDED[0]])
def test_states_are_independent_and_cut_back(cases: Cases, family: str, plan: str) -> None:
    case = cases(family, plan)
    ids, embeddings = spliced(case)
    one, other = case.engine.new_state(), case.engine.new_state()
    whole = one.run(embeddings, 0).copy()
    other.run(embeddings[::-1][:9], 0)
    one.run(embeddings[:4] * 3, len(ids))  # written behind the prompt, then cut off
    other.run(embeddings[:2], 9)
    assert off(one.run(embeddings[-5:], len(ids) - 5), whole) < 1e-5
    assert off(one.run(embeddings[6:], 6), whole) < 1e-5
    fresh = case.engine.new_state()
    wanted = np.concatenate([embeddings[::-1][:9], embeddings[:3]])
    assert off(other.run(embeddings[2:3], 11), fresh.run(wanted, 0)) < 1e-5


def test_the_cache_fills_to_the_end(cases: Cases) -> None:
    case = cases(*EXACT[0])
    state, size = case.engine.new_state(), case.eager.context
    embeddings = case.eager.embed(list(range(3, 3 + size)))
    chunks = [size - 2, 1, 1]
    every = case.eager.logits(embeddings, chunks).numpy()
    state.run(embeddings[0, : size - 2].numpy(), 0)
    state.run(embeddings[0, size - 2 : size - 1].numpy(), size - 2)
    assert off(state.run(embeddings[0, size - 1 :].numpy(), size - 1), every[-1]) < 5e-6
    with pytest.raises(ValueError, match=f"{size} \\+ 1 positions in {size}"):
        state.run(embeddings[0, :1].numpy(), size)


def numbered_tokenizer(path: Path, size: int) -> None:
    """A tokenizer whose piece of every id is the id: random models say what is no text."""
    vocabulary = {f"<{number}>": number for number in range(size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


@pytest.mark.parametrize(("family", "plan"), [*EXACT, *ROUNDED])
def test_the_stock_runner_says_the_same_tokens(
    cases: Cases, tmp_path: Path, family: str, plan: str
) -> None:
    """Executorch's C++ runner takes the file as it is: texts and tiles by turns."""
    from executorch.extension.llm import runner

    case, steps = cases(family, plan), 12
    engine, stops = case.engine, case.parts.prompt.stop_token_ids
    tiles = random_tiles(2, case.eager.spec.vision.image_size)
    words = [int(i) for i in np.random.default_rng(3).integers(3, 400, 12)]
    inputs, embeddings = [], []
    for text, tile in zip((words[:4], words[4:8]), tiles, strict=True):
        inputs += [runner.make_token_input(text), runner.make_image_input(torch.from_numpy(tile))]
        embeddings += [engine.embed(np.array(text)), engine.encode(tile[None])[0]]
    inputs.append(runner.make_token_input(words[8:]))
    embeddings.append(engine.embed(np.array(words[8:])))
    prompt = np.concatenate(embeddings)
    state = engine.new_state()
    wanted, past = [int(state.run(prompt, 0).argmax())], len(prompt)
    while len(wanted) < steps and wanted[-1] not in stops:
        logits = state.run(engine.embed(np.array(wanted[-1:])), past)
        wanted, past = [*wanted, int(logits.argmax())], past + 1
    numbered_tokenizer(tmp_path / "tokenizer.json", case.eager.spec.text.vocab_size)
    stock = runner.MultimodalRunner(str(case.file), str(tmp_path / "tokenizer.json"))
    pieces: list[str] = []
    config = runner.GenerationConfig(max_new_tokens=steps, temperature=0.0, echo=False)
    stock.generate(inputs, config, token_callback=pieces.append)
    said = [int(number) for number in re.findall(r"<(\d+)>", "".join(pieces))]
    assert said == wanted[: len(said)]
    assert len(said) >= len(wanted) - 1  # a stop token ends it unsaid
    assert len(set(said)) > 3


@pytest.mark.parametrize(("family", "plan"), ROUNDED)
def test_codes_come_back_from_the_file(cases: Cases, family: str, plan: str) -> None:
    case = cases(family, plan)
    wanted = {
        (component, name)
        for component, source in case.quantized.sources.items()
        for name in source.matrices
        if source.rule(name).scheme.is_integer and name not in case.report(component).kept_in_float
    }
    found = set()
    for stored in read_codes(case.folder, case.manifest):
        made = case.quantized.sources[stored.component].codes(stored.name)
        assert stored.bits == made.scheme.bits
        assert np.array_equal(stored.codes, made.codes[:, : made.columns]), stored.name
        assert np.array_equal(stored.scales, made.scales), stored.name
        assert (made.scales < 0).any()  # so that signs were put back, too
        found.add((stored.component, stored.name))
    assert found == wanted
    assert all(not report.exceptions for report in case.lowered)


def test_what_stays_outside_is_told_with_its_line(cases: Cases) -> None:
    case = cases(*ROUNDED[0])
    vision, table, decoder = (
        case.report(n) for n in ("vision_encoder", "token_embedding", "decoder")
    )
    layers = case.eager.spec.text.layers
    assert vision.operators["delegate"] == 1
    assert decoder.operators["delegate"] == layers + 2
    found = {each.operator: each for each in decoder.fallbacks}
    attention = found["llama.custom_sdpa.default"]
    assert attention.count == layers
    assert attention.reason
    path, line = attention.source.split(":")
    written = (Path(__file__).parents[2] / path).read_text().splitlines()[int(line) - 1]
    assert "custom_sdpa" in written
    assert "quantized_decomposed.embedding_4bit.default" in {e.operator for e in table.fallbacks}
    assert set(vision.kept_in_float) == {"tower.embed.projection.weight"}
    assert "no kernel" in vision.kept_in_float["tower.embed.projection.weight"]
    assert decoder.kept_in_float == {}


def test_a_plan_of_which_nothing_would_be_left_is_refused(cases: Cases) -> None:
    from lorgnette.export.matrices import matrices_of

    target, case = find_target("executorch-xnnpack"), cases(*ROUNDED[0])
    matrices = matrices_of(case.parts.components)
    problems = " ".join(target.check(matrices, PLANS["int8"]))
    assert "no kernel of int8 in groups" in problems
    assert "int8-channel" in problems
    for plan in (PLANS["fp32"], PLANS["int4-fast"], INT8_CHANNEL):
        assert not list(target.check(matrices, plan)), plan.name


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_a_file_cut_off_is_refused(cases: Cases, tmp_path: Path, kept: int) -> None:
    case = cases(*EXACT[0])
    shutil.copytree(case.folder, tmp_path / "bundle")
    path = tmp_path / "bundle" / case.lowered[0].graph
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BundleError, match="executorch refuses the graph") as caught:
        ExecutorchEngine(case.bundle(tmp_path / "bundle"), threads=1)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_refused_before_it_is_loaded(cases: Cases, tmp_path: Path) -> None:
    case = cases(*EXACT[0])
    shutil.copytree(case.folder, tmp_path / "bundle")
    path = tmp_path / "bundle" / case.lowered[0].graph
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="was changed or damaged"):
        ExecutorchEngine(case.bundle(tmp_path / "bundle", listed=case.folder), threads=1)


def test_another_models_file_is_refused(cases: Cases, tmp_path: Path) -> None:
    case, other = cases(*EXACT[0]), cases(*EXACT[1])
    with pytest.raises(BundleError, match="graph is not what the manifest says"):
        ExecutorchEngine(case.bundle(other.folder), threads=1)


def test_nothing_is_called_executorch_but_the_package() -> None:
    import executorch

    assert "targets" not in str(list(executorch.__path__))
    assert "lorgnette.targets.executorch" in sys.modules
