"""Codes computed once and kept on disk, and parameters that a rescale has changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lorgnette.errors import ConfigError
from lorgnette.export.weights import WeightSource
from lorgnette.quantize.methods import load_method
from lorgnette.quantize.plan import QuantPlan, Rule
from lorgnette.quantize.scheme import FLOAT16, FLOAT32, QuantScheme
from lorgnette.quantize.store import QuantizedModel, QuantizedSource
from tests.small import draw, tensor_folder

INT4 = QuantScheme(bits=4, group_size=16)
INT8 = QuantScheme(bits=8, group_size=16)
SHARED, OWN = draw(12, 32), draw(8, 32) * 2
MATRICES = {"token_embedding": {"table.weight"}, "decoder": {"head.weight", "layer.weight"}}


def model(folder: Path, *rules: Rule) -> QuantizedModel:
    """A table and a head that were published as one tensor, and a matrix besides."""
    tensors = {"shared": SHARED, "own": OWN, "norm.weight": draw(32)}
    checkpoint = tensor_folder(
        folder / "checkpoint", {name: torch.from_numpy(value) for name, value in tensors.items()}
    )
    table = WeightSource(checkpoint, {"table.weight": (12, 32)}, {"table.weight": "shared"})
    shapes = {"head.weight": (12, 32), "layer.weight": (8, 32), "norm.weight": (32,)}
    origins = {"head.weight": "shared", "layer.weight": "own", "norm.weight": "norm.weight"}
    decoder = WeightSource(checkpoint, shapes, origins)
    plan = QuantPlan("one", "", rules or (Rule("*", INT4),))
    return QuantizedModel(
        {"token_embedding": table, "decoder": decoder}, MATRICES, plan, folder / "codes"
    )


def pair(found: QuantizedModel) -> tuple[QuantizedSource, QuantizedSource]:
    return found.sources["token_embedding"], found.sources["decoder"]


def equal_codes(one: QuantizedSource, other: QuantizedSource) -> bool:
    a, b = one.codes("table.weight"), other.codes("head.weight")
    return np.array_equal(a.codes, b.codes) and np.array_equal(a.scales, b.scales)


# What it gives


def test_matrices_are_what_their_codes_stand_for_and_the_rest_is_float(tmp_path: Path) -> None:
    _, decoder = pair(model(tmp_path))
    wanted = load_method("rtn").quantize(OWN, INT4)
    got = decoder.codes("layer.weight")
    np.testing.assert_array_equal(got.codes, wanted.codes)
    np.testing.assert_array_equal(got.scales, wanted.scales)
    np.testing.assert_array_equal(decoder.tensor("layer.weight").numpy(), wanted.dequantize())
    np.testing.assert_array_equal(decoder.unrounded("layer.weight"), OWN)
    np.testing.assert_array_equal(decoder.tensor("norm.weight").numpy(), draw(32))


@pytest.mark.parametrize(
    ("scheme", "wanted"), [(FLOAT32, OWN), (FLOAT16, OWN.astype(np.float16).astype(np.float32))]
)
def test_floats_are_kept_or_rounded_to_16_bits(
    tmp_path: Path, scheme: QuantScheme, wanted: np.ndarray
) -> None:
    _, decoder = pair(model(tmp_path, Rule("*", scheme)))
    got = decoder.tensor("layer.weight")
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), wanted)


def test_codes_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    original = QuantPlan.quantize

    def counted(self: QuantPlan, component: str, parameter: str, weight: np.ndarray) -> object:
        asked.append(parameter)
        return original(self, component, parameter, weight)

    monkeypatch.setattr(QuantPlan, "quantize", counted)
    table, decoder = pair(model(tmp_path))
    assert asked == []
    for _ in range(2):
        decoder.codes("layer.weight")
        decoder.tensor("layer.weight")
        decoder.codes("head.weight")
        table.tensor("table.weight")
    assert sorted(asked) == ["layer.weight", "table.weight"]


def test_codes_lie_in_files_of_the_components_own_folder(tmp_path: Path) -> None:
    table, decoder = pair(model(tmp_path))
    before = set(tmp_path.rglob("*"))
    made = decoder.codes("layer.weight")
    table.codes("table.weight")
    decoder.change("norm.weight", np.ones(32, np.float32))
    new = {path.relative_to(tmp_path / "codes") for path in set(tmp_path.rglob("*")) - before}
    assert {path.parts[0] for path in new} == {"decoder", "token_embedding"}
    assert len(new) == 3
    assert isinstance(made.codes, np.memmap)
    assert isinstance(decoder.unrounded("norm.weight"), np.memmap)


def test_a_folder_that_is_there_already_is_refused(tmp_path: Path) -> None:
    model(tmp_path)
    with pytest.raises(FileExistsError):
        model(tmp_path)


def test_all_of_a_tensor_is_kept(tmp_path: Path) -> None:
    palette = QuantScheme(bits=4, palette=True, table_rows=4)
    _, decoder = pair(model(tmp_path, Rule("*", palette, "kmeans")))
    got = decoder.codes("layer.weight")
    wanted = load_method("kmeans").quantize(OWN, palette)
    assert got.tables is not None
    np.testing.assert_array_equal(got.dequantize(), wanted.dequantize())
    assert (got.columns, got.scheme, got.input_range) == (32, palette, None)


# What calibration puts there


def test_placed_codes_are_given_and_stored_apart(tmp_path: Path) -> None:
    _, decoder = pair(model(tmp_path))
    key = decoder.storage_key("layer.weight")
    decoder.codes("layer.weight")
    other = load_method("mse").quantize(OWN, INT4)
    decoder.place("layer.weight", other)
    np.testing.assert_array_equal(decoder.codes("layer.weight").codes, other.codes)
    np.testing.assert_array_equal(decoder.tensor("layer.weight").numpy(), other.dequantize())
    assert decoder.storage_key("layer.weight") not in (key, "own")


def test_a_changed_parameter_is_rounded_anew(tmp_path: Path) -> None:
    _, decoder = pair(model(tmp_path))
    decoder.codes("layer.weight")
    decoder.change("layer.weight", OWN[::-1].copy())
    np.testing.assert_array_equal(decoder.unrounded("layer.weight"), OWN[::-1])
    wanted = load_method("rtn").quantize(OWN[::-1].copy(), INT4)
    np.testing.assert_array_equal(decoder.codes("layer.weight").codes, wanted.codes)
    decoder.change("layer.weight", OWN * 3)
    np.testing.assert_array_equal(decoder.unrounded("layer.weight"), OWN * 3)


def test_a_changed_float_parameter_is_given_and_stored_apart(tmp_path: Path) -> None:
    _, decoder = pair(model(tmp_path))
    key = decoder.storage_key("norm.weight")
    value = np.full(32, 2, np.float32)
    decoder.change("norm.weight", value)
    value[:] = 5
    assert float(decoder.tensor("norm.weight").mean()) == 2
    assert decoder.storage_key("norm.weight") != key


def test_a_range_of_the_kv_cache_must_have_been_found(tmp_path: Path) -> None:
    _, decoder = pair(model(tmp_path))
    with pytest.raises(ConfigError, match="KV cache"):
        decoder.cache_scale("key_0")
    decoder.place_cache_scale("key_0", np.ones((2, 4), np.float32))
    assert decoder.cache_scale("key_0").shape == (2, 4)


# Tensors that two matrices share


def test_a_table_and_a_head_of_one_tensor_and_one_scheme_are_stored_once(tmp_path: Path) -> None:
    table, decoder = pair(model(tmp_path))
    assert table.storage_key("table.weight") == decoder.storage_key("head.weight")
    assert decoder.codes("head.weight") is table.codes("table.weight")
    assert decoder.is_tied("head.weight")
    assert not table.is_tied("table.weight")
    assert not decoder.is_tied("layer.weight")


@pytest.mark.parametrize(
    "other",
    [
        Rule("decoder/head.weight", INT8),
        Rule("decoder/head.weight", INT4, "mse"),
        Rule("decoder/head.weight", INT4, "rtn", "awq"),
        Rule("decoder/head.weight", QuantScheme(bits=4, group_size=16, activations="int8_static")),
    ],
)
def test_they_go_apart_where_their_codes_are_made_differently(tmp_path: Path, other: Rule) -> None:
    _, decoder = pair(model(tmp_path, other, Rule("*", INT4)))
    assert not decoder.is_tied("head.weight")
    made = load_method(other.method).quantize(SHARED, other.scheme)
    np.testing.assert_array_equal(decoder.codes("head.weight").codes, made.codes)


def test_they_stay_together_where_only_inputs_are_rounded_differently(tmp_path: Path) -> None:
    other = QuantScheme(bits=4, group_size=16, activations="int8_group")
    table, decoder = pair(model(tmp_path, Rule("decoder/head.weight", other), Rule("*", INT4)))
    assert decoder.codes("head.weight") is table.codes("table.weight")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("scheme", [INT4, FLOAT32])
def test_they_part_when_one_of_them_is_changed(
    tmp_path: Path, first: bool, scheme: QuantScheme
) -> None:
    table, decoder = pair(model(tmp_path, Rule("*", scheme)))
    changed, name = (table, "table.weight") if first else (decoder, "head.weight")
    kept, other = (decoder, "head.weight") if first else (table, "table.weight")
    changed.change(name, SHARED * 2 + 1)
    assert table.storage_key("table.weight") != decoder.storage_key("head.weight")
    assert not decoder.is_tied("head.weight")
    np.testing.assert_array_equal(kept.unrounded(other), SHARED)
    if scheme.is_integer:
        assert not equal_codes(table, decoder)
        wanted = load_method("rtn").quantize(SHARED, scheme)
        np.testing.assert_array_equal(kept.codes(other).codes, wanted.codes)
