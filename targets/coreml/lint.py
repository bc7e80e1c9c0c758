"""What of a package may keep it off the Neural Engine, and why.

Nothing here was measured: where Core ML runs an operator is its own decision, made on the device
and for the device, and Apple publishes no list. Each rule names where it was read. What a device
really does is shown by Xcode's performance report, or by `MLComputePlan` in Swift.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from lorgnette.targets.coreml.package import Constant, FunctionCode, Operation, Package, ValueType

ROW_BYTES = 64
MOST_SIZE = 16384
STATE_MULTIPLE = 32
MOST_WRITTEN = 32
MOST_WEIGHT_BYTES = 1 << 31

TYPED = "coremltools guide, Typed Execution"
TRANSFORMERS = "Apple, Deploying Transformers on the Apple Neural Engine, 2022"
QUANTIZED = "coremltools guide, Quantization: Performance"
UNSUPPORTED = "hollance/neural-engine, unsupported-layers.md"
DESIGN = "ANE Guide, chapter 17"

_BYTES = {"float16": 2, "float32": 4, "int32": 4}
_WITHOUT_COST = ("const", "read_state", "write_state")


class Finding(NamedTuple):
    """A reason, and where it was read."""

    text: str
    source: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.text} [{self.source}]"


Rule = Callable[[Package, FunctionCode], Iterator[Finding]]


def lint(package: Package) -> tuple[str, ...]:
    """Advice about a package, a line each; lines that several functions share are told once."""
    found: dict[str, list[str]] = {}
    for name, code in package.functions.items():
        for rule in RULES:
            for finding in rule(package, code):
                found.setdefault(str(finding), []).append(name)
    return tuple(f"{', '.join(names)}: {line}" for line, names in found.items())


def float32_operators(_: Package, code: FunctionCode) -> Iterator[Finding]:
    """The Neural Engine computes in float16."""
    count = sum(type_.dtype == "float32" for _, type_ in _computed(code))
    if count:
        yield Finding(f"{count} operators give float32, which runs on the CPU or GPU", TYPED)


def gathers(_: Package, code: FunctionCode) -> Iterator[Finding]:
    """Rows by index."""
    count = sum(operation.type == "gather" for operation in code.operations)
    if count:
        yield Finding(f"{count} gathers, which run on the CPU: look tokens up there", UNSUPPORTED)


def layout(_: Package, code: FunctionCode) -> Iterator[Finding]:
    """Sequences as `[B, T, D]` in place of `[B, D, 1, T]`."""
    count = sum(operation.type == "linear" for operation in code.operations)
    if count:
        yield Finding(
            f"{count} linear layers on [B, T, D]; the engine prefers 1 x 1 convolutions on "
            "[B, D, 1, T]",
            TRANSFORMERS,
        )


def narrow_rows(_: Package, code: FunctionCode) -> Iterator[Finding]:
    """Last axes are filled up to 64 bytes."""
    narrow: Counter[int] = Counter()
    for _name, type_ in _computed(code):
        size = _BYTES.get(type_.dtype, 0) * (type_.shape[-1] if type_.shape else 0)
        if len(type_.shape) > 1 and size % ROW_BYTES:
            narrow[type_.shape[-1]] += 1
    if narrow:
        sizes = ", ".join(f"{size} ({count} times)" for size, count in sorted(narrow.items())[:4])
        more = "" if len(narrow) <= 4 else f" and {len(narrow) - 4} more"
        yield Finding(f"last axes are filled up to {ROW_BYTES} bytes: {sizes}{more}", TRANSFORMERS)


def many_axes(_: Package, code: FunctionCode) -> Iterator[Finding]:
    """Four axes are native."""
    count = sum(len(type_.shape) > 4 for _, type_ in _computed(code))
    if count:
        yield Finding(f"{count} values have more than 4 axes", TRANSFORMERS)


def large_sizes(_: Package, code: FunctionCode) -> Iterator[Finding]:
    """Axes end at 16384, but for channels."""
    largest = max((max(t.shape, default=0) for _, t in _computed(code)), default=0)
    if largest > MOST_SIZE:
        yield Finding(
            f"an axis has {largest} elements, more than {MOST_SIZE}: that operator falls back "
            "unless the axis is that of channels",
            DESIGN,
        )


def block_scales(_: Package, code: FunctionCode) -> Iterator[Finding]:
    """Scales in groups suit the GPU."""
    count = sum(
        each.type == "constexpr_blockwise_shift_scale" and _in_blocks(each)
        for each in code.operations
    )
    if count:
        yield Finding(
            f"{count} matrices have scales in groups, which suits the GPU; for the Neural Engine "
            "scales by channel or palettes are recommended",
            QUANTIZED,
        )


def state_sizes(_: Package, code: FunctionCode) -> Iterator[Finding]:
    """States whose last axis is no multiple of 32 were refused."""
    odd = {t.shape[-1] for t in code.states.values() if t.shape[-1] % STATE_MULTIPLE}
    if odd:
        yield Finding(
            f"states are {', '.join(map(str, sorted(odd)))} wide, no multiple of {STATE_MULTIPLE}, "
            "and were seen to fail",
            "coremltools issue 2631",
        )


def written_positions(_: Package, code: FunctionCode) -> Iterator[Finding]:
    """Long updates of a state were refused."""
    types = dict(_computed(code))
    written = {
        types[str(each.inputs["update"][0])].shape[-2]
        for each in code.operations
        if each.type == "slice_update" and str(each.inputs["update"][0]) in types
    }
    if code.states and max(written, default=0) > MOST_WRITTEN:
        yield Finding(
            f"{max(written)} positions of a state are written at once; up to {MOST_WRITTEN} were "
            "seen to run",
            "Anemll issue 27",
        )


def root_mean_squares(_: Package, code: FunctionCode) -> Iterator[Finding]:
    """RMS norms are written out."""
    count = sum(operation.type == "rsqrt" for operation in code.operations)
    if count:
        yield Finding(
            f"{count} RMS norms are 12 operators each: MIL has none for them, and float16 must not "
            "overflow",
            "coremltools, MIL operators of iOS 18; ExecuTorch pull request 19523",
        )


def weight_bytes(package: Package, _: FunctionCode) -> Iterator[Finding]:
    """One file of weights ends at 2 GiB."""
    size = package.blobs.path.stat().st_size
    if size > MOST_WEIGHT_BYTES:
        yield Finding(
            f"weights have {size} bytes, more than {MOST_WEIGHT_BYTES}: cut the model",
            "coremltools pull request 2593",
        )


RULES: tuple[Rule, ...] = (
    float32_operators,
    gathers,
    layout,
    narrow_rows,
    many_axes,
    large_sizes,
    block_scales,
    state_sizes,
    written_positions,
    root_mean_squares,
    weight_bytes,
)


def _computed(code: FunctionCode) -> Iterator[tuple[str, ValueType]]:
    """What is computed from inputs: constants and their expansion are not."""
    for operation in code.operations:
        known = operation.type in _WITHOUT_COST or operation.type.startswith("constexpr_")
        if not known:
            yield from operation.outputs


def _in_blocks(operation: Operation) -> bool:
    (scale,) = operation.inputs["scale"]
    return isinstance(scale, Constant) and math.prod(scale.type.shape[1:]) > 1
