"""A model as one `.pte`, method by method."""

from __future__ import annotations

import gc
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorgnette.export.check import Parts
from lorgnette.export.component import Component
from lorgnette.quantize.store import QuantizedModel, QuantizedSource
from lorgnette.runtime.engines.executorch import quiet
from lorgnette.runtime.prompt import Message, encode_prompt
from lorgnette.targets.executorch.build import Builder
from lorgnette.targets.executorch.fallbacks import left_outside, operator_counts
from lorgnette.targets.executorch.lowering import MATRICES_FILE, MODEL, functions
from lorgnette.targets.executorch.payload import find_pieces, read_graph
from lorgnette.targets.executorch.program import (
    METHODS,
    has_convolution,
    lower_method,
    register_operators,
    trace_method,
    write_program,
    xnnpack_partitioner,
)
from lorgnette.targets.target import LoweredComponent

if TYPE_CHECKING:
    from executorch.exir.backend.partitioner import Partitioner
    from torch import nn
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class Delegate:
    """Who takes a method.

    Attributes:
        partitioner: Makes what chooses operators for it, given the module.
        norms: Whether norms are written out in steps.
        talks: Whether it writes to the terminal, past every setting.
    """

    partitioner: Callable[[nn.Module], Partitioner]
    norms: bool = True
    talks: bool = False


XNNPACK = Delegate(lambda module: xnnpack_partitioner(lean=not has_convolution(module)))
Places = dict[str, list[dict[str, int]]]


def lower_model(
    parts: Parts,
    quantized: QuantizedModel,
    folder: Path,
    progress: Callable[[str], None],
    delegates: Mapping[str, Delegate] | None = None,
) -> list[LoweredComponent]:
    """Lowers every component to a method and writes them to one file.

    Args:
        parts: The parsed checkpoint.
        quantized: Its weights as they are rounded.
        folder: The bundle; has a folder for graphs.
        progress: Told about each step.
        delegates: Who takes a component, where that is not XNNPACK.
    """
    lowered: list[LoweredComponent] = []
    methods: dict[str, ExportedProgram] = {}
    places: dict[str, Places] = {}
    with _unlogged():
        register_operators()
        for component in parts.components:
            progress(f"lower {component.name}")
            source = quantized.sources[component.name]
            delegate = (delegates or {}).get(component.name, XNNPACK)
            program, found, report = _lower_component(
                component, source, parts.context_length, delegate
            )
            methods[METHODS[component.name]] = program
            places[component.name] = found
            lowered.append(report)
            gc.collect()  # graphs refer to themselves, and hold weights
        progress("write model.pte")
        write_program(folder / MODEL, methods, constant_methods(parts))
    text = json.dumps(places, indent=1, sort_keys=True)
    (folder / MATRICES_FILE).write_text(text + "\n", encoding="utf-8")
    return lowered


def _lower_component(
    component: Component, source: QuantizedSource, context_length: int, delegate: Delegate
) -> tuple[ExportedProgram, Places, LoweredComponent]:
    builder = Builder(component, source, norms=delegate.norms)
    module = builder.build()
    traced = trace_method(component, module, context_length)
    with quiet() if delegate.talks else nullcontext():
        method = lower_method(traced, delegate.partitioner(module))
    graphs = [read_graph(payload) for payload in method.payloads] if builder.pieces else []
    graph = method.program.graph
    report = LoweredComponent(
        graph=MODEL,
        operators=operator_counts(graph),
        weight_bytes=dict(sorted(builder.weight_bytes.items())),
        kept_in_float=builder.kept_in_float,
        functions=functions(component, context_length),
        exceptions=tuple(builder.exceptions),
        fallbacks=left_outside(graph),
    )
    return method.program, find_pieces(builder.pieces, graphs), report


def constant_methods(parts: Parts) -> dict[str, object]:
    """The numbers that the stock runner asks a file for."""
    first = encode_prompt(parts.prompt, parts.tokenizer, [Message("user", ("a",))])[0]
    return {
        "get_max_seq_len": parts.context_length,
        "get_max_context_len": parts.context_length,
        "get_vocab_size": parts.spec.text.vocab_size,
        "get_bos_id": first,
        "get_eos_ids": list(parts.prompt.stop_token_ids),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keeps the libraries' own words about what they do off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
