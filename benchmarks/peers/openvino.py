"""OpenVINO: a stateful decoder with compressed weights, a vision tower quantised by nncf."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.peer import Case, Engine, Peer, PlainEngine, main

if TYPE_CHECKING:
    from openvino import Model

PEER = Peer(
    name="openvino",
    module="benchmarks.peers.openvino",
    rows=("openvino-int8", "openvino-int4"),
    requirements=(
        "openvino==2026.4.1",
        "openvino-genai==2026.4.1.0",
        "nncf==3.4.0",
        "torch==2.13.0",
        "numpy==2.4.6",
    ),
    formats={
        "openvino-int8": "OpenVINO, decoder int8 weights (nncf), vision tower int8 static (nncf)",
        "openvino-int4": "OpenVINO, decoder int4 groups of 32 (nncf), vision tower float32",
    },
)


def convert(row: str, case: Case, folder: Path) -> None:
    """Traces both parts, makes the cache a state and quantises."""
    import nncf
    import openvino

    decoder = _decoder(case)
    if row == "openvino-int4":
        decoder = nncf.compress_weights(
            decoder,
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=32,
            ratio=1.0,
            all_layers=True,
        )
    else:
        decoder = nncf.compress_weights(decoder, mode=nncf.CompressWeightsMode.INT8_ASYM)
    openvino.save_model(decoder, folder / "decoder.xml", compress_to_fp16=True)
    tower = _tower(case)
    if row == "openvino-int8":
        tower = nncf.quantize(
            tower,
            nncf.Dataset(_tiles(case, 8)),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
        )
    openvino.save_model(tower, folder / "vision.xml", compress_to_fp16=True)


def _decoder(case: Case) -> Model:
    """The decoder with its caches as states of the graph."""
    import openvino
    import torch
    from openvino._offline_transformations import apply_make_stateful_transformation

    from benchmarks.peers.modules import decoder_of

    decoder = decoder_of(case)
    layers, (batch, heads, _, size) = len(decoder.layers), decoder.cache_shape
    caches = [torch.zeros(batch, heads, 3, size) for _ in range(2 * layers)]
    example = (torch.ones(1, 5, dtype=torch.long), torch.zeros(1, dtype=torch.int32), *caches)
    with torch.no_grad():
        traced = torch.jit.trace(decoder, example, check_trace=False)
    dynamic = openvino.PartialShape([-1, heads, -1, size])
    # Fusing caches into the attention asks for i32[?]: see stateful_sdpa_fusion.cpp of OpenVINO.
    inputs = [(openvino.PartialShape([1, -1]), openvino.Type.i64)]
    inputs += [(openvino.PartialShape([-1]), openvino.Type.i32)]
    inputs += [(dynamic, openvino.Type.f32)] * (2 * layers)
    model = openvino.convert_model(traced, example_input=example, input=inputs)
    names = ["input_ids", "beam_idx", *(f"past.{i}" for i in range(2 * layers))]
    for port, name in zip(model.inputs, names, strict=True):
        port.get_tensor().set_names({name})
    made = ["logits", *(f"present.{i}" for i in range(2 * layers))]
    for port, name in zip(model.outputs, made, strict=True):
        port.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(
        model, {f"past.{i}": f"present.{i}" for i in range(2 * layers)}
    )
    _start_empty(model)
    return model


def _start_empty(model: Model) -> None:
    """Gives each state an empty cache to begin with; the fused attention wants one."""
    import numpy as np
    from openvino import opset13

    batch = opset13.shape_of(model.input("beam_idx"), output_type="i64")
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, size = node.get_output_partial_shape(0)
            rest = np.array([heads.get_length(), 0, size.get_length()], np.int64)
            shape = opset13.concat([batch, opset13.constant(rest)], 0)
            zero = opset13.constant(0.0, node.get_output_element_type(0))
            node.set_arguments([opset13.broadcast(zero, shape).output(0)])
    model.validate_nodes_and_infer_types()


def _tower(case: Case) -> Model:
    import openvino
    import torch

    from benchmarks.peers.modules import tower_of

    example = torch.zeros(1, 3, case.tile, case.tile)
    with torch.no_grad():
        traced = torch.jit.trace(tower_of(case), example, check_trace=False)
    return openvino.convert_model(traced, example_input=example, input=[example.shape])


def _tiles(case: Case, count: int) -> list[Any]:
    """Random tiles, as the tower gets them."""
    import numpy as np

    draw = np.random.default_rng(0)
    shape = (1, 3, case.tile, case.tile)
    return [draw.uniform(-1, 1, shape).astype(np.float32) for _ in range(count)]


class OpenvinoEngine(PlainEngine):
    """Two compiled models and one request each."""

    def __init__(self, case: Case, folder: Path, threads: int) -> None:
        """Compiles both."""
        import numpy as np
        import openvino

        super().__init__(case)
        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        decoder = core.compile_model(folder / "decoder.xml", "CPU", settings)
        vision = core.compile_model(folder / "vision.xml", "CPU", settings)
        self._decoder, self._vision = (m.create_infer_request() for m in (decoder, vision))
        self._tile, self._beam = _tiles(case, 1)[0], np.zeros(1, np.int32)

    def encode(self) -> None:
        """One tile."""
        self._vision.infer([self._tile])

    def start(self) -> None:
        """Empties the KV cache."""
        self._decoder.reset_state()

    def prefill(self, ids: list[int]) -> int:
        """All at once."""
        import numpy as np

        self._decoder.infer({"input_ids": np.array([ids], np.int64), "beam_idx": self._beam})
        return int(self._decoder.get_tensor("logits").data.argmax())


def load(row: str, case: Case, folder: Path, threads: int) -> Engine:
    """Opens what `convert` made."""
    return OpenvinoEngine(case, folder, threads)


if __name__ == "__main__":
    main(convert, load)
