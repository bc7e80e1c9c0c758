"""Rotation of the residual stream: the same function of other weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lorgnette.errors import ConfigError
from lorgnette.export.check import Parts, golden_picture, golden_prompt
from lorgnette.export.families import open_checkpoint
from lorgnette.export.pipeline import quantize_parts, read_parts
from lorgnette.export.reference import Reference
from lorgnette.quantize.plan import QuantPlan, Rule
from lorgnette.quantize.rotation import hadamard, random_signs, rotated_back
from lorgnette.quantize.scheme import FLOAT32, QuantScheme
from lorgnette.quantize.store import QuantizedModel
from lorgnette.recipe import Recipe
from lorgnette.runtime.preprocess import prepare
from tests.zoo.checkpoint import CHECKPOINTS
from tests.zoo.outliers import write_twin

PLAN = QuantPlan("turned", "", (Rule("*", FLOAT32),), rotate=True)
ROTATED = pytest.mark.parametrize("name", ["smolvlm-tiny", "omnivlm-tiny"])


def read(path: Path) -> Parts:
    torch.set_num_threads(1)
    return read_parts(open_checkpoint(path), Recipe())


def turned(parts: Parts, folder: Path, plan: QuantPlan = PLAN) -> QuantizedModel:
    return quantize_parts(parts, plan, folder / "model", (), lambda step: None)


def reference(parts: Parts, model: QuantizedModel | None = None) -> Reference:
    components = {component.name: component for component in parts.components}
    return Reference(components, parts.sources if model is None else model.sources)


def run(parts: Parts, made: Reference) -> tuple[np.ndarray, np.ndarray]:
    """Image tokens `[G, N, D]`, and logits of a prompt with them in it."""
    tokens = made.encode(prepare(golden_picture(), parts.preprocess).pixels)
    ids = golden_prompt(parts, golden_picture())
    embeddings = made.embed(ids).copy()
    slots = np.flatnonzero(np.array(ids) == parts.spec.image_token_id)
    embeddings[slots] = tokens.reshape(len(slots), -1)
    return tokens, made.follow(embeddings, [7, 30, 8])


@ROTATED
@pytest.mark.parametrize("twin", [False, True])
def test_a_rotated_model_says_what_it_did(name: str, twin: bool, tmp_path: Path) -> None:
    path = CHECKPOINTS / name
    parts = read(write_twin(path, tmp_path / "twin") if twin else path)
    tokens, logits = run(parts, reference(parts))
    model = turned(parts, tmp_path)
    seen, said = run(parts, reference(parts, model))
    assert np.abs(said - logits).max() <= 5e-5 * np.abs(logits).max()
    assert np.abs(seen - tokens).max() > 0.1 * np.abs(tokens).max()
    width = tokens.shape[-1]
    # A rotation written down in full, the one that `rotated` applies without forming it.
    turn = random_signs(width)[:, None] * hadamard(width)
    np.testing.assert_allclose(seen, tokens @ turn, atol=2e-5 * np.abs(tokens).max())
    back = rotated_back(seen.reshape(-1, width)).reshape(tokens.shape)
    np.testing.assert_allclose(back, tokens, atol=2e-5 * np.abs(tokens).max())


@ROTATED
def test_gains_end_in_the_matrices_behind_them(name: str, tmp_path: Path) -> None:
    parts = read(CHECKPOINTS / name)
    decoder = turned(parts, tmp_path).sources["decoder"]
    gains = [n for n in decoder.shapes if n.endswith(("norm1.weight", "norm2.weight"))]
    assert len(gains) == 2 * parts.spec.text.layers
    for gain in (*gains, "norm.weight"):
        assert (decoder.unrounded(gain) == 1).all()
        assert (parts.sources["decoder"].array(gain) != 1).any()


def test_a_tied_head_becomes_a_matrix_of_its_own(tmp_path: Path) -> None:
    parts = read(CHECKPOINTS / "omnivlm-tiny")
    scheme = QuantScheme(bits=8, group_size=32)
    plain = turned(parts, tmp_path / "plain", QuantPlan("plain", "", (Rule("*", scheme),)))
    assert plain.sources["decoder"].is_tied("head.weight")
    plan = QuantPlan("turned", "", (Rule("*", scheme),), rotate=True)
    model = turned(parts, tmp_path, plan)
    head, table = model.sources["decoder"], model.sources["token_embedding"]
    assert not head.is_tied("head.weight")
    assert head.storage_key("head.weight") != table.storage_key("table.weight")
    assert not np.array_equal(head.codes("head.weight").codes, table.codes("table.weight").codes)


def test_a_projector_that_ends_in_no_matrix_is_refused_in_one_line(tmp_path: Path) -> None:
    parts = read(CHECKPOINTS / "mobilevlm-tiny")
    with pytest.raises(ConfigError) as caught:
        turned(parts, tmp_path)
    text = str(caught.value)
    assert "Projector" in text
    assert "rotate" in text
    assert len(text.splitlines()) == 1
