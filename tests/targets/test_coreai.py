"""Whole models in the engine for Core AI against eager torch, for every family and plan."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from lorgnette.errors import BundleError
from lorgnette.runtime.engines.coreai import CoreAiEngine
from lorgnette.targets.coreai.read_codes import read_codes
from tests.coreai_support import Made, make, relative
from tests.eager import prompt_ids, random_tiles
from tests.small import WITHOUT_PICTURES

BOUND = 1e-5
"""Of float32 sums in another order; measured: up to 2e-6."""
FEW = [
    ("smolvlm", "fp32"),
    ("mobilevlm-v1", "fp16"),
    ("mobilevlm-v2", "int8"),
    ("omnivlm", "int4-fast"),
]
REST = [
    (case, plan)
    for case in ("smolvlm", "mobilevlm-v1", "mobilevlm-v2", "omnivlm")
    for plan in WITHOUT_PICTURES
    if (case, plan) not in FEW
]


Maker = Callable[[str, str], Made]


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Makes each model once."""
    return cache(lambda case, plan: make(tmp_path_factory.mktemp("coreai"), case, plan))


@pytest.fixture(
    scope="module",
    params=[*FEW, *(pytest.param(each, marks=pytest.mark.slow) for each in REST)],
    ids="-".join,
)
def made(request: pytest.FixtureRequest, maker: Maker) -> Made:
    return maker(*request.param)


@pytest.fixture(scope="module")
def small(maker: Maker) -> Made:
    return maker("omnivlm", "int4-fast")


def test_image_tokens_are_those_of_eager_torch_for_any_number_of_tiles(made: Made) -> None:
    tiles = random_tiles(3, made.eager.spec.vision.image_size)
    wanted = made.eager.encode(tiles).numpy()
    for count in (1, 3):
        got = made.engine.encode(tiles[:count])
        assert got.shape == wanted[:count].shape
        assert relative(got, wanted[:count]) < BOUND


def test_embeddings_are_exactly_those_of_eager_torch(made: Made) -> None:
    for ids in ([7], prompt_ids(made.eager, 1), [0, made.eager.spec.text.vocab_size - 1]):
        got = made.engine.embed(np.array(ids))
        assert np.array_equal(got, made.eager.embed(ids)[0].numpy())


def test_logits_are_those_of_eager_torch_however_a_prompt_is_cut(made: Made) -> None:
    """Through prefill and decode, each with an empty and with a partly filled cache."""
    ids = prompt_ids(made.eager, 1)
    tiles = random_tiles(1, made.eager.spec.vision.image_size)
    embeddings = made.eager.splice(ids, tiles)
    last = len(ids) - 11
    for chunks in ([len(ids)], [1, 1, 5, 1, 2, last, 1]):
        wanted = made.eager.logits(embeddings, chunks).numpy()
        state, past = made.engine.new_state(), 0
        for size, each in zip(chunks, wanted, strict=True):
            got = state.run(embeddings[0, past : past + size].numpy(), past)
            assert got.shape == each.shape
            assert relative(got, each) < BOUND, (chunks, past)
            past += size


def test_a_cache_is_cut_back_and_filled_to_its_end(made: Made) -> None:
    ids = prompt_ids(made.eager, 1)
    embeddings = made.eager.embed(ids * 8)
    state = made.engine.new_state()
    with pytest.raises(ValueError, match="positions in"):
        state.run(embeddings[0, : state.capacity + 1].numpy(), 0)
    full = embeddings[:, : state.capacity]
    wanted = made.eager.logits(full, [9, state.capacity - 9]).numpy()
    assert relative(state.run(full[0].numpy(), 0), wanted[1]) < BOUND
    assert relative(state.run(full[0, 8:9].numpy(), 8), wanted[0]) < BOUND
    again = state.run(full[0, 9:].numpy(), 9)
    assert relative(again, wanted[1]) < BOUND


def test_a_cache_grows_and_keeps_what_it_holds(
    small: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorgnette.runtime.engines.coreai.FIRST_POSITIONS", 8)
    embeddings = small.eager.embed(prompt_ids(small.eager, 1))
    chunks = [6, 1, 1, 1, len(embeddings[0]) - 9]
    wanted = small.eager.logits(embeddings, chunks).numpy()
    state, past = small.engine.new_state(), 0
    for size, each in zip(chunks, wanted, strict=True):
        assert relative(state.run(embeddings[0, past : past + size].numpy(), past), each) < BOUND
        past += size


def test_two_states_know_nothing_of_each_other(made: Made) -> None:
    ids = prompt_ids(made.eager, 1)
    embeddings = made.eager.embed(ids)
    wanted = made.eager.logits(embeddings, [6, 1]).numpy()
    one, other = made.engine.new_state(), made.engine.new_state()
    one.run(embeddings[0, :6].numpy(), 0)
    other.run(embeddings[0, :6].numpy()[::-1], 0)
    assert relative(one.run(embeddings[0, 6:7].numpy(), 6), wanted[1]) < BOUND
    assert relative(other.run(embeddings[0, 6:7].numpy(), 6), wanted[1]) > 100 * BOUND


def test_codes_and_scales_on_disk_are_those_that_were_computed(made: Made) -> None:
    integers = {
        (component, name)
        for component, source in made.quantized.sources.items()
        for name in source.matrices
        if source.rule(name).scheme.is_integer
    }
    bundle = made.bundle()
    stored = {
        (each.component, each.name): each for each in read_codes(made.folder, bundle.manifest)
    }
    assert set(stored) == integers
    for (component, name), each in stored.items():
        wanted = made.quantized.sources[component].codes(name)
        assert np.array_equal(each.codes, wanted.codes[:, : wanted.columns])
        assert np.array_equal(each.scales, wanted.scales)
        assert each.bits == wanted.scheme.bits


def test_entry_points_share_their_weights(made: Made) -> None:
    """What the report counts is on disk, and hardly more."""
    for asset, components in (
        ("vision", ["vision_encoder"]),
        ("text", ["token_embedding", "decoder"]),
    ):
        counted = sum(sum(made.reports[name].weight_bytes.values()) for name in components)
        assert counted < made.asset_bytes(asset) < counted + 90_000


def test_a_head_that_is_the_table_is_stored_once(small: Made) -> None:
    vocab, width = small.eager.spec.text.vocab_size, small.eager.spec.text.hidden_size
    scheme = small.quantized.sources["decoder"].rule("head.weight").scheme
    table = vocab * width // 2 + 4 * vocab * scheme.groups(width)
    assert small.reports["token_embedding"].weight_bytes == {"int4g32h": table}
    matrices = small.quantized.sources["decoder"].matrices - {"head.weight"}
    shapes = small.quantized.sources["decoder"].shapes
    rest = sum(
        rows * scheme.padded(columns) // 2 + 4 * rows * scheme.groups(columns)
        for rows, columns in (shapes[name] for name in matrices)
    )
    assert small.reports["decoder"].weight_bytes == {"int4g32h": rest}


def test_a_report_names_operators_functions_and_wider_scales(small: Made) -> None:
    decoder = small.reports["decoder"]
    assert decoder.operators["composite::sdpa"] == 2 * small.eager.spec.text.layers
    assert [each.entry_point for each in decoder.functions] == ["prefill", "decode"]
    assert decoder.functions[1].inputs[0].shape == (1, 1, small.eager.spec.text.hidden_size)
    assert len(decoder.functions[0].states) == 2 * small.eager.spec.text.layers
    assert any("float32" in line for line in decoder.exceptions)


@pytest.mark.parametrize("place", [0, 1000, -100, None])
@pytest.mark.parametrize("told", [True, False], ids=["digest-told", "digest-true"])
def test_a_damaged_program_is_refused_in_one_line(
    small: Made, tmp_path: Path, place: int | None, told: bool
) -> None:
    """Also one whose manifest was written for it: the library itself would end the process."""
    copied = small.at(tmp_path / "bundle")
    shutil.copytree(small.folder, copied.folder)
    bundle = copied.bundle()
    program = copied.folder / "graphs/vision.aimodel/main.mlirb"
    data = bytearray(program.read_bytes())
    if place is None:
        del data[len(data) // 2 :]
    else:
        data[place] ^= 0xFF
    program.write_bytes(data)
    with pytest.raises(BundleError) as refused:
        CoreAiEngine(copied.bundle() if told else bundle, threads=1)
    assert "main.mlirb" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_function_that_is_not_what_the_manifest_says_is_refused(small: Made) -> None:
    decode = small.reports["decoder"].functions[1]
    states = (structs.replace(decode.states[0], dtype="float16"), *decode.states[1:])
    for lie, wanted in (
        (structs.replace(decode, states=states), "float16"),
        (structs.replace(decode, outputs=()), "0 tensors"),
        (structs.replace(decode, inputs=small.reports["vision_encoder"].functions[0].inputs), "ti"),
    ):
        with pytest.raises(BundleError, match="not what the manifest says") as refused:
            CoreAiEngine(small.bundle({"decode": lie}), threads=1)
        assert wanted in str(refused.value)
    with pytest.raises(BundleError, match="refuses"):
        CoreAiEngine(small.bundle({"decode": structs.replace(decode, name="none")}), threads=1)


def test_an_entry_point_that_is_missing_is_told(small: Made) -> None:
    other = structs.replace(small.reports["decoder"].functions[1], entry_point="prefill")
    with pytest.raises(BundleError, match=r"entry point 'decode'.*no function"):
        CoreAiEngine(small.bundle({"decode": other}), threads=1)


def test_inputs_that_do_not_fit_are_told_in_one_line(small: Made) -> None:
    with pytest.raises(BundleError, match="embed"):
        small.engine.embed(np.array([10**6]))


@pytest.mark.slow
def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    """In another process: the library draws names and hashes anew in each."""
    code = (
        "import sys; from pathlib import Path; from tests.coreai_support import make; "
        "make(Path(sys.argv[1]), 'smolvlm', 'int4-fast')"
    )
    digests = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / name)],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            check=True,
            capture_output=True,
        )
        files = sorted((tmp_path / name / "bundle").rglob("*.*"))
        digests.append(
            [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
        )
    assert digests[0] == digests[1]
    assert len(digests[0]) == 6
