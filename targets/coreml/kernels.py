"""What operators of MIL compute, number by number and by reductions: one small function each.

Floats are float32 here; the evaluator rounds results to float16 where the program says so.

Source: the definitions in coremltools/converters/mil/mil/ops/defs of coremltools 9.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lorgnette.targets.coreml.call import TORCH_DTYPES, Call, Kernel


def unary(compute: Callable[[Tensor], Tensor]) -> Kernel:
    """An operator of one tensor, number by number."""

    def run(call: Call) -> Tensor:
        return compute(call.tensor("x"))

    return run


def binary(compute: Callable[[Tensor, Tensor], Tensor]) -> Kernel:
    """An operator of two tensors that are repeated to one shape."""

    def run(call: Call) -> Tensor:
        x, y = call.tensor("x"), call.tensor("y")
        call.expect(np.broadcast_shapes(x.shape, y.shape))
        return compute(x, y)

    return run


def cast(call: Call) -> Tensor:
    """Numbers in another type; floats to integers lose what is behind the point."""
    wanted = {"fp16": "float16", "fp32": "float32"}.get(call.text("dtype"), call.text("dtype"))
    call.only("dtype", call.out.dtype, wanted)
    return call.tensor("x").to(TORCH_DTYPES[wanted])


def gelu(call: Call) -> Tensor:
    """GELU: exact, by tanh, or by a sigmoid."""
    x, mode = call.tensor("x"), call.text("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    approximate = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode]
    return functional.gelu(x, approximate=approximate)


def sigmoid_hard(call: Call) -> Tensor:
    """`min(max(alpha * x + beta, 0), 1)`."""
    x = call.tensor("x")
    return (call.number("alpha") * x + call.number("beta")).clamp(0, 1)


def rsqrt(call: Call) -> Tensor:
    """`1 / sqrt(x + epsilon)`."""
    return torch.rsqrt(call.tensor("x") + call.number("epsilon"))


def reduce(compute: Callable[[Tensor, list[int], bool], Tensor]) -> Kernel:
    """A reduction over some axes."""

    def run(call: Call) -> Tensor:
        return compute(call.tensor("x"), call.ints("axes"), call.flag("keep_dims"))

    return run


def layer_norm(call: Call) -> Tensor:
    """`gamma * (x - mean) / sqrt(variance + epsilon) + beta`, the variance that of all numbers."""
    x = call.tensor("x")
    axes = sorted(axis % x.dim() for axis in call.ints("axes"))
    call.only("axes", list(range(x.dim() - len(axes), x.dim())), axes)
    gamma, beta = (call.tensor(name) if call.has(name) else None for name in ("gamma", "beta"))
    return functional.layer_norm(x, x.shape[-len(axes) :], gamma, beta, call.number("epsilon"))


def linear(call: Call) -> Tensor:
    """`x @ weight.T + bias`."""
    x, weight = call.tensor("x"), call.tensor("weight")
    call.expect((*x.shape[:-1], weight.shape[0]))
    return functional.linear(x, weight, call.tensor("bias") if call.has("bias") else None)


def conv(call: Call) -> Tensor:
    """A two-dimensional convolution with the same border on both sides."""
    call.only("pad_type", "custom", call.text("pad_type"))
    top, bottom, left, right = call.ints("pad")
    call.only("pad", (top, left), (bottom, right))
    x, weight = call.tensor("x"), call.tensor("weight")
    strides, dilations = call.ints("strides"), call.ints("dilations")
    borders = (top, left)
    sizes = [
        (x.shape[i + 2] + 2 * borders[i] - dilations[i] * (weight.shape[i + 2] - 1) - 1)
        // strides[i]
        + 1
        for i in range(2)
    ]
    call.expect((x.shape[0], weight.shape[0], *sizes))
    bias = call.tensor("bias") if call.has("bias") else None
    groups = call.integer("groups", 1)
    return functional.conv2d(x, weight, bias, strides, borders, dilations, groups)


def avg_pool(call: Call) -> Tensor:
    """Means of windows that lie inside the picture."""
    call.only("pad_type", "valid", call.text("pad_type"))
    call.only("ceil_mode", False, call.flag("ceil_mode"))
    x = call.tensor("x")
    return functional.avg_pool2d(x, call.ints("kernel_sizes"), call.ints("strides"))


def attention(call: Call) -> Tensor:
    """Softmax attention; positions that no query sees are left out, which changes nothing."""
    query, key, value = (call.tensor(name) for name in ("query", "key", "value"))
    call.expect((*query.shape[:-1], value.shape[-1]))
    if not call.has("attn_mask"):
        return functional.scaled_dot_product_attention(query, key, value)
    mask = call.tensor("attn_mask")
    if mask.dtype == torch.bool:
        seen = int(mask.reshape(-1, mask.shape[-1]).any(0).nonzero().max()) + 1
        key, value, mask = key[..., :seen, :], value[..., :seen, :], mask[..., :seen]
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def blockwise(call: Call) -> Tensor:
    """`scale * (data - offset)`, a scale and an offset for each block of the data."""
    data, scale = call.tensor("data"), call.tensor("scale")
    call.expect(data.shape)
    if data.dim() != scale.dim() or any(
        d % s for d, s in zip(data.shape, scale.shape, strict=True)
    ):
        raise call.error("blocks do not fit", got=tuple(scale.shape), wanted=tuple(data.shape))
    pairs = list(zip(data.shape, scale.shape, strict=True))
    split = [size for whole, count in pairs for size in (count, whole // count)]
    alone = [size for _, count in pairs for size in (count, 1)]
    made = data.to(torch.float32).reshape(split)
    if call.has("offset"):
        made -= call.tensor("offset").reshape(alone)
    made *= scale.reshape(alone)
    return made.reshape(data.shape)


def lut_to_dense(call: Call) -> Tensor:
    """Values of tables by index, a table for each block of the indices."""
    indices, lut = call.tensor("indices"), call.tensor("lut")
    call.expect(indices.shape)
    call.only("vector size", 1, lut.shape[-1])
    call.only("tables", indices.dim(), lut.dim() - 2)
    counts = lut.shape[:-2]
    if any(d % c for d, c in zip(indices.shape, counts, strict=True)):
        raise call.error("tables do not fit", got=tuple(counts), wanted=tuple(indices.shape))
    flat = lut.reshape(math.prod(counts), -1)
    numbers = torch.arange(len(flat)).reshape(counts)
    for axis, (size, count) in enumerate(zip(indices.shape, counts, strict=True)):
        if count > 1:  # an axis of one table is repeated below without memory
            numbers = numbers.repeat_interleave(size // count, axis)
    return flat[numbers.expand(indices.shape), indices.long()]


KERNELS: dict[str, Kernel] = {
    "abs": unary(torch.abs),
    "floor": unary(torch.floor),
    "relu": unary(torch.relu),
    "sigmoid": unary(torch.sigmoid),
    "silu": unary(functional.silu),
    "gelu": gelu,
    "sigmoid_hard": sigmoid_hard,
    "rsqrt": rsqrt,
    "cast": cast,
    "add": binary(torch.add),
    "sub": binary(torch.sub),
    "mul": binary(torch.mul),
    "real_div": binary(torch.div),
    "maximum": binary(torch.maximum),
    "less_equal": binary(torch.le),
    "reduce_max": reduce(lambda x, axes, keep: torch.amax(x, axes, keep)),
    "reduce_mean": reduce(lambda x, axes, keep: torch.mean(x, axes, keep)),
    "layer_norm": layer_norm,
    "linear": linear,
    "conv": conv,
    "avg_pool": avg_pool,
    "scaled_dot_product_attention": attention,
    "constexpr_blockwise_shift_scale": blockwise,
    "constexpr_lut_to_dense": lut_to_dense,
}
