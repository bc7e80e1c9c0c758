"""A table and a head that are one tensor, whose codes calibration chooses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lorgnette.cli.predict import bundle_weight_bytes
from lorgnette.export.check import Parts
from lorgnette.export.families import open_checkpoint
from lorgnette.export.matrices import matrix_names
from lorgnette.export.pipeline import quantize_parts, read_parts
from lorgnette.quantize.plan import QuantPlan, Rule
from lorgnette.quantize.samples import default_samples, read_samples
from lorgnette.quantize.scheme import FLOAT32, QuantScheme
from lorgnette.quantize.store import QuantizedModel
from lorgnette.recipe import Recipe
from tests.zoo.checkpoint import CHECKPOINTS

INT4 = QuantScheme(bits=4, group_size=32, scale_bits=16)
INT8 = QuantScheme(bits=8, group_size=32, scale_bits=16)


@pytest.fixture(scope="module")
def tied() -> Parts:
    return read_parts(open_checkpoint(CHECKPOINTS / "omnivlm-tiny"), Recipe())


def plan_of(table: QuantScheme, head: str) -> QuantPlan:
    return QuantPlan(
        "p",
        "",
        (
            Rule("token_embedding/*", table, "mse"),
            Rule("decoder/head.weight", INT4, head),
            Rule("*", FLOAT32),
        ),
    )


def rounded(parts: Parts, plan: QuantPlan, folder: Path) -> QuantizedModel:
    samples = read_samples(default_samples(), 3)
    return quantize_parts(parts, plan, folder / "codes", samples, lambda step: None)


def test_a_table_takes_the_codes_that_calibration_chose_for_its_head(
    tied: Parts, tmp_path: Path
) -> None:
    model = rounded(tied, plan_of(INT4, "gptq"), tmp_path)
    table, decoder = model.sources["token_embedding"], model.sources["decoder"]
    codes = decoder.codes("head.weight").codes
    np.testing.assert_array_equal(table.codes("table.weight").codes, codes)
    assert table.storage_key("table.weight") == decoder.storage_key("head.weight")
    assert table.method("table.weight") == "gptq"
    plain = QuantizedModel(
        tied.sources, matrix_names(tied.components), plan_of(INT4, "mse"), tmp_path / "plain"
    )
    assert not np.array_equal(plain.sources["decoder"].codes("head.weight").codes, codes)


def test_a_table_of_another_form_keeps_its_own(tied: Parts, tmp_path: Path) -> None:
    model = rounded(tied, plan_of(INT8, "gptq"), tmp_path)
    table = model.sources["token_embedding"]
    assert not table.is_tied("table.weight")
    assert table.method("table.weight") == "mse"
    assert table.codes("table.weight").scheme == INT8


def test_one_matrix_is_predicted(tied: Parts) -> None:
    names = matrix_names(tied.components)
    calibrated, plain, apart = (
        bundle_weight_bytes(tied.sources, names, plan)
        for plan in (plan_of(INT4, "gptq"), plan_of(INT4, "mse"), plan_of(INT8, "gptq"))
    )
    assert calibrated == plain
    assert apart > plain
