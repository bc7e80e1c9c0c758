"""Outlier twins: the same function of other weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lorgnette.export.check import golden_picture
from lorgnette.export.checkpoint import open_files
from lorgnette.export.pipeline import read_parts
from lorgnette.export.reference import Reference
from lorgnette.recipe import Recipe
from lorgnette.runtime.preprocess import prepare
from tests.zoo import checkpoint
from tests.zoo.evaluate import transformers_answer
from tests.zoo.families import FAMILIES
from tests.zoo.families.base import Family
from tests.zoo.oracle import oracle
from tests.zoo.outliers import CHANNELS, FACTORS, rescale, sites, write_twin
from tests.zoo.questions import HELD_OUT, draw_sample

ALL = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A twin of every committed checkpoint."""
    folder = tmp_path_factory.mktemp("twins")
    return {
        f.name: write_twin(checkpoint.CHECKPOINTS / f.name, folder / f.name)
        for f in FAMILIES.values()
    }


def run(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Image tokens and logits of the project's own reference."""
    parts = read_parts(open_files(folder), Recipe())
    components = {component.name: component for component in parts.components}
    reference = Reference(components, parts.sources)
    image = reference.encode(prepare(golden_picture(), parts.preprocess).pixels)
    embeddings = np.concatenate([image.reshape(-1, image.shape[-1])[:40], reference.embed([5, 60])])
    return image, reference.follow(embeddings, [7, 30, 8])


def assert_equal_but_for_order_of_sums(got: np.ndarray, wanted: np.ndarray) -> None:
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


@ALL
def test_a_twin_has_the_logits_and_answers_of_the_original_in_transformers(
    family: Family, twins: dict[str, Path]
) -> None:
    torch.set_num_threads(1)
    original, twin = checkpoint.CHECKPOINTS / family.name, twins[family.name]
    one, two = transformers_answer(original), transformers_answer(twin)
    for index in range(4):
        sample = draw_sample(HELD_OUT, index, family.exam)
        picture, question = sample.scene.image, sample.question.text
        assert one(picture, question) == two(picture, question)
    _, config, weights, tokens = checkpoint.read(original)
    pixels = family.pixels(picture)
    ids = family.prefix(tokens, config, pixels.grid) + family.asked(tokens, question)
    wanted = oracle(config, weights).logits(ids, pixels)
    got = oracle(config, checkpoint.read(twin)[2]).logits(ids, pixels)
    assert_equal_but_for_order_of_sums(got.numpy(), wanted.numpy())


@ALL
def test_a_twin_gives_the_numbers_of_the_original_in_the_reference(
    family: Family, twins: dict[str, Path]
) -> None:
    torch.set_num_threads(1)
    original = run(checkpoint.CHECKPOINTS / family.name)
    for got, wanted in zip(run(twins[family.name]), original, strict=True):
        assert_equal_but_for_order_of_sums(got, wanted)


@ALL
def test_every_place_of_a_twin_has_its_outliers(family: Family, twins: dict[str, Path]) -> None:
    _, config, weights, _ = checkpoint.read(checkpoint.CHECKPOINTS / family.name)
    twin = checkpoint.read(twins[family.name])[2]
    places = list(sites(family, config, weights))
    towers = sum("layer_norm1" in place.producers[0] for place in places)
    assert (len(places) - 3 * towers) / 4 == 4
    assert towers >= 4
    for place in places:
        name = place.producers[0]
        # A row's own factor is what most of its columns have; some read an outlier themselves.
        ratio = (twin[name] / weights[name]).reshape(len(twin[name]), -1)
        factors = ratio.nanmedian(dim=1).values
        assert (factors > 1).sum() == CHANNELS
        assert set(factors.tolist()) <= {1.0, *FACTORS}
    changed = {n for n in weights if not torch.equal(weights[n], twin[n])}
    touched = {n for place in places for n in (*place.producers, *place.consumers)}
    # The biases of a layer that nothing uses are zero.
    assert changed == {n for n in touched if weights[n].any()}
    assert {value.dtype for value in twin.values()} == {torch.float32}


@ALL
def test_another_seed_chooses_other_channels(family: Family) -> None:
    _, config, weights, _ = checkpoint.read(checkpoint.CHECKPOINTS / family.name)
    one, same, other = (rescale(family, config, weights, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[n], same[n]) for n in weights)
    place = next(sites(family, config, weights))
    assert not torch.equal(one[place.producers[0]], other[place.producers[0]])


@ALL
def test_rounding_a_twin_to_groups_of_32_loses_far_more(
    family: Family, twins: dict[str, Path]
) -> None:
    """In the matrices that read an outlier, measured where it matters: at their outputs."""
    _, config, weights, _ = checkpoint.read(checkpoint.CHECKPOINTS / family.name)
    twin = checkpoint.read(twins[family.name])[2]
    place = next(sites(family, config, weights))
    inputs = torch.randn(64, len(weights[place.producers[0]]))

    def error(w: dict[str, torch.Tensor]) -> float:
        matrix = w[place.consumers[0]]
        groups = matrix.view(len(matrix), -1, 32)
        scale = groups.abs().amax(-1, keepdim=True) / 7
        rounded = ((groups / scale).round() * scale).view_as(matrix)
        x = inputs * w[place.producers[0]]
        return float((x @ (rounded - matrix).T).square().mean() / (x @ matrix.T).square().mean())

    assert error(twin) > 3 * error(weights)
