"""What operators of MIL do that move numbers and compute none: one small function each.

Their results need no rounding: every number was one of the operands'.

Source: the definitions in coremltools/converters/mil/mil/ops/defs of coremltools 9.0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorgnette.targets.coreml.call import Call, Kernel


def reshape(call: Call) -> Tensor:
    """Another shape."""
    return call.tensor("x").reshape(call.ints("shape"))


def transpose(call: Call) -> Tensor:
    """Axes in another order."""
    return call.tensor("x").permute(call.ints("perm"))


def expand_dims(call: Call) -> Tensor:
    """New axes of size one, at these places of the result."""
    x = call.tensor("x")
    rank = x.dim() + len(call.ints("axes"))
    for axis in sorted(axis % rank for axis in call.ints("axes")):
        x = x.unsqueeze(axis)
    return x


def squeeze(call: Call) -> Tensor:
    """Without these axes of size one."""
    x = call.tensor("x")
    for axis in sorted((axis % x.dim() for axis in call.ints("axes")), reverse=True):
        call.only("axes", 1, x.shape[axis])
        x = x.squeeze(axis)
    return x


def concat(call: Call) -> Tensor:
    """Tensors behind one another."""
    call.only("interleave", False, call.flag("interleave"))
    values, axis = call.tensors("values"), call.integer("axis")
    shape = list(values[0].shape)
    shape[axis] = sum(value.shape[axis] for value in values)
    call.expect(shape)
    return torch.cat(values, axis)


def stack(call: Call) -> Tensor:
    """Tensors along a new axis."""
    values, axis = call.tensors("values"), call.integer("axis")
    shape = list(values[0].shape)
    shape.insert(axis % (len(shape) + 1), len(values))
    call.expect(shape)
    return torch.stack(values, axis)


def split(call: Call) -> Sequence[Tensor]:
    """Parts of an axis."""
    x, axis = call.tensor("x"), call.integer("axis")
    if call.has("split_sizes"):
        return torch.split(x, call.ints("split_sizes"), axis)
    count = call.integer("num_splits")
    return torch.split(x, x.shape[axis] // count, axis)


def pad(call: Call) -> Tensor:
    """One number around the last axes."""
    call.only("mode", "constant", call.text("mode", "constant"))
    x = call.tensor("x")
    pairs = torch.tensor(call.ints("pad")).reshape(-1, 2)
    shape = list(x.shape)
    for axis, (before, after) in enumerate(pairs.tolist(), x.dim() - len(pairs)):
        shape[axis] += before + after
    call.expect(shape)
    value = call.number("constant_val") if call.has("constant_val") else 0.0
    return torch.nn.functional.pad(x, pairs.flip(0).reshape(-1).tolist(), value=value)


def gather(call: Call) -> Tensor:
    """Slices of an axis by index; an index outside is refused, as Core ML says nothing of it."""
    call.only("batch_dims", 0, call.integer("batch_dims"))
    x, indices = call.tensor("x"), call.tensor("indices")
    axis = call.integer("axis") % x.dim()
    call.expect((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))
    if int(indices.min()) < 0 or int(indices.max()) >= x.shape[axis]:
        raise call.error("index is outside", got=indices.tolist(), wanted=f"< {x.shape[axis]}")
    flat = x.index_select(axis, indices.reshape(-1).long())
    return flat.reshape(call.out.shape)


def slice_by_size(call: Call) -> Tensor:
    """A box of a tensor by its corner and its sizes."""
    x, begin, size = call.tensor("x"), call.ints("begin"), call.ints("size")
    ends = [b + s for b, s in zip(begin, size, strict=True)]
    return x[_box(call, x, begin, ends)]


def slice_by_index(call: Call) -> Tensor:
    """A box of a tensor by two corners; axes of the squeeze mask are dropped."""
    x, begin, end = call.tensor("x"), call.ints("begin"), call.ints("end")
    _check_masks(call)
    squeezed = call.flags("squeeze_mask", x.dim())
    end = [b + 1 if drop else e for b, e, drop in zip(begin, end, squeezed, strict=True)]
    made = x[_box(call, x, begin, end)]
    for axis in reversed(range(x.dim())):
        made = made.squeeze(axis) if squeezed[axis] else made
    return made


def slice_update(call: Call) -> Tensor:
    """A tensor with a box of it replaced."""
    x, update = call.tensor("x"), call.tensor("update")
    _check_masks(call)
    call.only("squeeze_mask", False, call.has("squeeze_mask"))
    box = _box(call, x, call.ints("begin"), call.ints("end"))
    made = x if call.in_place else x.clone()
    if made[box].shape != update.shape:
        got = tuple(made[box].shape)
        raise call.error("update does not fit", got=got, wanted=tuple(update.shape))
    made[box] = update
    return made


def read_state(call: Call) -> Tensor:
    """What a state holds."""
    return call.states[call.text("input")]


def write_state(call: Call) -> Sequence[Tensor]:
    """Puts a tensor into a state; gives nothing."""
    name, data = call.text("input"), call.tensor("data")
    if data.shape != call.states[name].shape:
        got = tuple(data.shape)
        raise call.error("state is of another shape", got=got, wanted=call.states[name].shape)
    call.states[name] = data
    return ()


def _check_masks(call: Call) -> None:
    for name in ("stride", "begin_mask", "end_mask"):
        call.only(name, False, call.has(name))


def _box(call: Call, x: Tensor, begin: list[int], end: list[int]) -> tuple[slice, ...]:
    """A box that lies inside: Core ML says nothing of others."""
    if len(begin) != x.dim() or len(end) != x.dim():
        raise call.error("corner has another number of axes", got=len(begin), wanted=x.dim())
    for first, last, size in zip(begin, end, x.shape, strict=True):
        if not 0 <= first < last <= size:
            raise call.error("slice is outside", got=(first, last), wanted=f"within {size}")
    return tuple(slice(first, last) for first, last in zip(begin, end, strict=True))


MOVES: dict[str, Kernel] = {
    "reshape": reshape,
    "transpose": transpose,
    "expand_dims": expand_dims,
    "squeeze": squeeze,
    "concat": concat,
    "stack": stack,
    "split": split,
    "pad": pad,
    "gather": gather,
    "slice_by_size": slice_by_size,
    "slice_by_index": slice_by_index,
    "slice_update": slice_update,
    "read_state": read_state,
    "write_state": write_state,
}
