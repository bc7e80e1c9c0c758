"""Projectors against a reference in plain functional torch, through their weight rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lorgnette.export.layers.projectors import (
    ConcatProjector,
    LdpProjector,
    LdpV2Projector,
    concat_rules,
    ldp_rules,
    ldpv2_rules,
    squeezed_width,
    to_map,
    to_tokens,
)
from lorgnette.export.weights import Rule, WeightSource, load_module, module_shapes
from tests import projector_oracle
from tests.projector_oracle import MOBILEVLM, OMNIVLM
from tests.projector_weights import concat_shapes, ldp_shapes, ldpv2_shapes, random_tensors
from tests.small import tensor_folder

TOLERANCE = 2e-5


class Projector(nn.Module):
    """A projector under the name that its rules use."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(x)  # type: ignore[no-any-return]


def compare(
    folder: Path,
    build: Callable[[], nn.Module],
    rules: Mapping[str, Rule],
    shapes: Mapping[str, tuple[int, ...]],
    reference: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    features: Tensor,
) -> Tensor:
    """Loads a projector from published tensors and holds it against the reference."""
    tensors = random_tensors(shapes)
    with torch.device("meta"):
        module: nn.Module = Projector(build())
    source = WeightSource(tensor_folder(folder, tensors), module_shapes(module), rules)
    assert source.used_tensors() == set(tensors)
    load_module(module, source)
    with torch.no_grad():
        got: Tensor = module(features)
    wanted = reference(tensors, features)
    assert got.shape == wanted.shape
    assert float(wanted.std()) > 0.3
    assert float((got - wanted).abs().max()) <= TOLERANCE
    return got


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("eye", "width", "grid", "squeezed"), [(20, 32, 24, 8), (12, 64, 6, 16), (9, 40, 2, 16)]
)
def test_ldp(tmp_path: Path, eye: int, width: int, grid: int, squeezed: int) -> None:
    got = compare(
        tmp_path,
        lambda: LdpProjector(eye, width, grid),
        ldp_rules(MOBILEVLM, width),
        ldp_shapes(MOBILEVLM, eye, width, squeezed),
        projector_oracle.ldp,
        draw(2, grid * grid, eye),
    )
    assert got.shape == (2, (grid // 2) ** 2, width)


@pytest.mark.parametrize(("eye", "width", "grid"), [(20, 32, 24), (12, 10, 4), (9, 40, 2)])
def test_ldp_v2(tmp_path: Path, eye: int, width: int, grid: int) -> None:
    got = compare(
        tmp_path,
        lambda: LdpV2Projector(eye, width, grid),
        ldpv2_rules(MOBILEVLM),
        ldpv2_shapes(MOBILEVLM, eye, width),
        projector_oracle.ldp_v2,
        draw(2, grid * grid, eye),
    )
    assert got.shape == (2, (grid // 2) ** 2, width)


@pytest.mark.parametrize(("grid", "joined"), [(27, 9), (27, 1), (6, 4), (3, 3)])
def test_concat(tmp_path: Path, grid: int, joined: int) -> None:
    got = compare(
        tmp_path,
        lambda: ConcatProjector(12, 40, 28, joined),
        concat_rules(OMNIVLM),
        concat_shapes(OMNIVLM, 12, joined, 40, 28),
        lambda weights, x: projector_oracle.omnivlm(weights, x, joined),
        draw(2, grid * grid, 12),
    )
    assert got.shape == (2, grid * grid // joined, 28)


@pytest.mark.parametrize(
    ("width", "ldp", "ldpv2"),
    [(2048, 18_936_832, 6_316_032), (2560, 28_913_920, 9_205_760), (4096, None, 21_020_672)],
)
def test_parameters_are_as_many_as_published(width: int, ldp: int | None, ldpv2: int) -> None:
    def count(build: Callable[[], nn.Module]) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build().parameters())

    assert ldp is None or count(lambda: LdpProjector(1024, width, 24)) == ldp
    assert count(lambda: LdpV2Projector(1024, width, 24)) == ldpv2
    assert count(lambda: ConcatProjector(1152, 4096, 896, 9)) == 46_142_336


@given(st.integers(4, 5000))
def test_squeezed_width_is_a_multiple_of_8_near_a_quarter(width: int) -> None:
    found, quarter = squeezed_width(width), width // 4
    # The nearest multiple of 8, halves upwards; the next one where more than a tenth is lost.
    near = min((8 * n for n in range(1, 700)), key=lambda m: (abs(m - quarter), -m))
    assert found == (near if near >= 0.9 * quarter else near + 8)


def test_squeezed_width_of_the_published_sizes() -> None:
    assert [squeezed_width(width) for width in (2048, 2560)] == [512, 640]


def test_map_and_tokens_are_inverse_and_row_major() -> None:
    x = draw(2, 12 * 12, 5)
    assert torch.equal(to_tokens(to_map(x, 12)), x)
    assert torch.equal(to_map(x, 12)[1, :, 3, 7], x[1, 3 * 12 + 7])
