"""The plain ONNX export that people make: optimum's decoder in 4 bits, torch's tower."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from benchmarks.peers.onnx_vision import OnnxVision, export_vision
from benchmarks.peers.peer import Case, Engine, Peer, PlainEngine, main

PEER = Peer(
    name="onnx-plain",
    module="benchmarks.peers.onnx_plain",
    rows=("onnx-plain-q4",),
    requirements=(
        "optimum==2.1.0",
        "optimum-onnx==0.1.0",
        "transformers==4.57.6",
        "onnxruntime==1.32.0",
        "onnx==1.23.0",
        "onnx-ir==1.1.0",
        "onnxscript==0.7.2",
        "torch==2.13.0",
        "numpy==2.4.6",
    ),
    formats={
        "onnx-plain-q4": "optimum-onnx decoder, MatMulNBits 4 bits, cache copied; tower float32",
    },
)


def convert(row: str, case: Case, folder: Path) -> None:
    """Exports with optimum, then quantises with onnxruntime's MatMulNBits quantiser."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )
    from optimum.exporters.onnx import main_export

    export_vision(case, folder / "vision.onnx", int8=False)
    source = folder / "source"
    main_export(case.text, output=source, task="text-generation-with-past", do_validation=False)
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer = MatMulNBitsQuantizer(onnx.load(source / "model.onnx"), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(folder / "decoder.onnx"), True)
    shutil.rmtree(source)


class OnnxEngine(PlainEngine):
    """A session whose cache goes in and out as arrays."""

    def __init__(self, case: Case, folder: Path, threads: int) -> None:
        """Opens both sessions."""
        import onnxruntime

        super().__init__(case)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(folder / "decoder.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._vision = OnnxVision(case, folder / "vision.onnx", threads)
        config = json.loads((Path(case.text) / "config.json").read_text())
        heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
        self._empty = (1, keys, 0, config["hidden_size"] // heads)
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        self.start()

    def encode(self) -> None:
        """One tile."""
        self._vision.encode()

    def start(self) -> None:
        """An empty cache."""
        import numpy as np

        names = [name for name in self._inputs if name.startswith("past_key_values")]
        self._past = {name: np.zeros(self._empty, np.float32) for name in names}
        self._filled = 0

    def prefill(self, ids: list[int]) -> int:
        """All at once; every position's logits, as this export gives them."""
        import numpy as np

        end = self._filled + len(ids)
        feeds = {"input_ids": np.array([ids], np.int64)} | self._past
        if "attention_mask" in self._inputs:
            feeds["attention_mask"] = np.ones((1, end), np.int64)
        if "position_ids" in self._inputs:
            feeds["position_ids"] = np.arange(self._filled, end, dtype=np.int64)[None]
        out = dict(zip(self._outputs, self._session.run(None, feeds), strict=True))
        self._filled = end
        present = ((name, value) for name, value in out.items() if name.startswith("present"))
        self._past = {f"past_key_values{name.removeprefix('present')}": v for name, v in present}
        return int(out["logits"][0, -1].argmax())


def load(row: str, case: Case, folder: Path, threads: int) -> Engine:
    """Opens what `convert` made."""
    return OnnxEngine(case, folder, threads)


if __name__ == "__main__":
    main(convert, load)
