"""What XNNPACK's kernels and ExecuTorch's table look-up can hold of a scheme."""

from __future__ import annotations

from lorgnette.quantize.scheme import QuantScheme

GROUPS = (32, 64, 128)
"""Columns of a group that XNNPACK's int4 kernels know: multiples of 32."""


def why_float(scheme: QuantScheme, columns: int, *, gathered: bool = False) -> str:
    """Why a matrix of an integer scheme is stored as floats; empty where it is not."""
    if gathered:
        return ""
    if scheme.bits == 8 and scheme.group_size:
        return "XNNPACK has no kernel of int8 in groups"
    if scheme.activations == "float":
        return "XNNPACK multiplies integers by rounded activations only"
    if scheme.group_size and columns % scheme.group_size:
        return f"{columns} columns do not fill groups of {scheme.group_size}"
    return ""
