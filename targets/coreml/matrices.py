"""Matrices as their scheme says, for multiplications and for tables."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from lorgnette.quantize.scales import half_scales
from lorgnette.quantize.scheme import QuantScheme, QuantTensor
from lorgnette.targets.coreml.builder import (
    FunctionBuilder,
    Known,
    graph_value,
    mil_name,
    to_float,
    weight_name,
)
from lorgnette.targets.coreml.mil import Builder, Var
from lorgnette.targets.coreml.rearrange import pad_zeros, to_arithmetic


def linear(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
    """`x @ weight.T + bias`, the weight expanded from its codes where it is of integers.

    Where columns do not fill the last group the codes go on to its end, and the input with zeros.
    """
    x = graph_value(builder, known, node.args[0])
    name = weight_name(builder, known, node.args[1])
    scheme = builder.scheme(name)
    if not scheme.is_integer:
        weight = float_matrix(builder, name)
    else:
        weight = builder.shared(f"matrix {name}", lambda: integer_matrix(builder, name, scheme))
        missing = weight.shape[1] - builder.columns(name)
        if missing:
            x = pad_zeros(builder, x, [0, missing])
    bias = node.args[2] if len(node.args) > 2 else None
    added = builder.zeros(weight.shape[0]) if bias is None else graph_value(builder, known, bias)
    return Builder.linear(x=x, weight=weight, bias=added)


def float_matrix(builder: FunctionBuilder, name: str) -> Var:
    """A matrix of floats, in the type that the function computes in."""
    if builder.plan.half and builder.scheme(name).bits == 32:
        note(builder, name, "matrices of float32 stored as float16")
    return builder.float_weight(name)


def integer_matrix(builder: FunctionBuilder, name: str, scheme: QuantScheme) -> Var:
    """A matrix of codes, expanded by Core ML as it loads or multiplies.

    Symmetric codes are stored as signed integers, so that no offset is needed; others unsigned,
    with their zero points. A palette's are indices of a table.

    Shapes: `[rows, columns]`, columns filled up to whole groups.
    """
    if scheme.palette:
        return _palette(builder, name, scheme)
    rows, columns = builder.source.shapes[name]
    shape, groups = (rows, scheme.padded(columns)), scheme.groups(columns)
    signed = scheme.symmetric
    middle = 1 << (scheme.bits - 1)

    def codes() -> NDArray[np.generic]:
        made = builder.source.codes(name).codes
        return (made.astype(np.int16) - middle).astype(np.int8) if signed else made

    form = scheme.form
    dtype = f"{'int' if signed else 'uint'}{scheme.bits}"
    one = scheme.per_tensor
    parts = {
        "data": builder.constant(name, f"codes_{dtype}", dtype, shape, codes, form),
        "scale": scales(builder, name, scheme, (1, 1) if one else (rows, groups)),
    }
    if not signed:
        zeros_shape = (1, 1) if one else (rows, groups)
        parts["offset"] = builder.constant(
            name,
            "zeros",
            dtype,
            zeros_shape,
            lambda: builder.source.codes(name).zero_points[: zeros_shape[0], : zeros_shape[1]],
            form,
        )
    return Builder.constexpr_blockwise_shift_scale(**parts, name=mil_name(name))


def scales(builder: FunctionBuilder, name: str, scheme: QuantScheme, shape: tuple[int, ...]) -> Var:
    """Scales of a matrix, in the type that the function computes in.

    Of schemes for the whole matrix every row says the same, and one number is stored.
    """

    def make() -> NDArray[np.generic]:
        exact = builder.source.codes(name).scales[: shape[0], : shape[1]]
        if not builder.plan.half:
            return exact
        rounded = half_scales(exact)
        if not np.array_equal(rounded, exact):
            note(builder, name, f"scales of {scheme.form} rounded to float16")
        return rounded

    return builder.constant(
        name, f"scales_{builder.dtype}", builder.dtype, shape, make, scheme.form
    )


def _palette(builder: FunctionBuilder, name: str, scheme: QuantScheme) -> Var:
    rows, columns = builder.source.shapes[name]
    count = scheme.tables(rows)
    shape = (count, 1, 1 << scheme.bits, 1)

    def tables() -> NDArray[np.generic]:
        made = _tables(builder.source.codes(name))
        kept = to_float(made, builder.dtype, builder.where(name))
        if not np.array_equal(kept.astype(np.float32), made):
            note(builder, name, f"values of {scheme.form} rounded to float16")
        return kept.reshape(shape)

    indices = builder.constant(
        name,
        "codes",
        f"uint{scheme.bits}",
        (rows, columns),
        lambda: builder.source.codes(name).codes,
        scheme.form,
    )
    lut = builder.constant(name, "tables", builder.dtype, shape, tables, scheme.form)
    return Builder.constexpr_lut_to_dense(indices=indices, lut=lut, name=mil_name(name))


def _tables(made: QuantTensor) -> NDArray[np.float32]:
    return cast("NDArray[np.float32]", made.tables)


def note(builder: FunctionBuilder, name: str, exception: str) -> None:
    """Tells that a matrix is carried otherwise than the plan says."""
    builder.store.exceptions.setdefault(exception, set()).add(name)


def embedding(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
    """Rows of a table; rows of codes are gathered first and expanded after.

    Core ML would expand a compressed table whole to gather a few rows of it: of 49280 x 576 that
    is 57 MB in place of 16. Codes of 4 bits lie two in a byte, as gathering knows no smaller type.
    """
    name = weight_name(builder, known, node.args[0])
    ids = graph_value(builder, known, node.args[1])
    scheme = builder.scheme(name)
    if not scheme.is_integer:
        return _gather(float_matrix(builder, name), ids)
    rows, columns = builder.source.shapes[name]
    groups, padded = scheme.groups(columns), scheme.padded(columns)
    codes = _gathered_codes(builder, name, ids, (rows, padded))
    shape = [1, ids.shape[1], groups, padded // groups]
    codes = Builder.reshape(x=codes, shape=shape)
    zero = _zero_points(builder, name, ids, (rows, groups))
    steps = _gather(scales(builder, name, scheme, (rows, groups)), ids)
    centred = Builder.sub(x=codes, y=zero)
    values = Builder.mul(x=centred, y=Builder.expand_dims(x=steps, axes=[3]))
    values = Builder.reshape(x=values, shape=[1, ids.shape[1], padded])
    if padded == columns:
        return values
    return Builder.slice_by_index(x=values, begin=[0, 0, 0], end=[1, ids.shape[1], columns])


def _gather(table: Var, ids: Var) -> Var:
    """Shapes: `[V, D]` and `[1, T]` to `[1, T, D]`."""
    return Builder.gather(x=table, indices=ids, axis=0, validate_indices=False)


def _gathered_codes(builder: FunctionBuilder, name: str, ids: Var, shape: tuple[int, int]) -> Var:
    """Codes of some rows as numbers 0 to 2 ** bits - 1. Shapes: `[1, T, columns]`."""
    rows, columns = shape
    scheme = builder.scheme(name)
    if scheme.bits == 8:
        table = builder.constant(
            name, "codes", "uint8", shape, lambda: builder.source.codes(name).codes, scheme.form
        )
        return to_arithmetic(builder, _gather(table, ids))

    def packed() -> NDArray[np.generic]:
        codes = builder.source.codes(name).codes
        filled = np.pad(codes, ((0, 0), (0, columns % 2)))
        return filled[:, 0::2] | (filled[:, 1::2] << np.uint8(4))

    pairs = -(-columns // 2)
    table = builder.constant(name, "packed", "uint8", (rows, pairs), packed, scheme.form)
    both = to_arithmetic(builder, _gather(table, ids))
    # Whole numbers below 256 and their sixteenths are exact in float16.
    high = Builder.floor(x=Builder.mul(x=both, y=builder.number(1 / 16)))
    low = Builder.sub(x=both, y=Builder.mul(x=high, y=builder.number(16.0)))
    made = Builder.stack(values=[low, high], axis=3)
    made = Builder.reshape(x=made, shape=[1, ids.shape[1], 2 * pairs])
    if columns == 2 * pairs:
        return made
    return Builder.slice_by_index(x=made, begin=[0, 0, 0], end=[1, ids.shape[1], columns])


def _zero_points(
    builder: FunctionBuilder, name: str, ids: Var, shape: tuple[int, int]
) -> Var | NDArray[np.generic]:
    """Codes that mean zero, of some rows; one number where they are the same everywhere."""
    scheme = builder.scheme(name)
    if scheme.symmetric:
        return builder.number(float(1 << (scheme.bits - 1)))
    table = builder.constant(
        name, "zeros", "uint8", shape, lambda: builder.source.codes(name).zero_points, scheme.form
    )
    rows = to_arithmetic(builder, _gather(table, ids))
    return Builder.expand_dims(x=rows, axes=[3])
