"""onnxruntime-genai: its model builder's int4 decoder, and the tower as plain ONNX with int8."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.onnx_vision import OnnxVision, export_vision
from benchmarks.peers.peer import Case, Engine, Peer, PlainEngine, main

PEER = Peer(
    name="ortgenai",
    module="benchmarks.peers.ortgenai",
    rows=("ortgenai-int4", "ortgenai-int4-fp32"),
    requirements=(
        "onnxruntime-genai==0.18.0",
        "onnxruntime==1.32.0",
        "onnx==1.23.0",
        "onnx-ir==1.1.0",
        "onnxscript==0.7.2",
        "torch==2.13.0",
        "transformers==5.23.0",
        "numpy==2.4.6",
    ),
    formats={
        "ortgenai-int4": "onnxruntime-genai, int4 (accuracy level 4), vision tower dynamic int8",
        "ortgenai-int4-fp32": "onnxruntime-genai, int4 (accuracy level 4), vision tower float32",
    },
)


def convert(row: str, case: Case, folder: Path) -> None:
    """Runs the model builder on the decoder and exports the tower."""
    source = folder / "source"
    shutil.copytree(case.text, source)
    shutil.copy(Path(case.bundle) / "tokenizer/tokenizer.json", source)
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source)]
    builder += ["-o", str(folder / "decoder"), "-p", "int4", "-e", "cpu"]
    builder += ["-c", str(folder / "cache"), "--extra_options", "int4_accuracy_level=4"]
    subprocess.run(builder, check=True)
    shutil.rmtree(source)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    export_vision(case, folder / "vision.onnx", int8=row == "ortgenai-int4")


class GenaiEngine(PlainEngine):
    """A generator for each prompt, as the library is used."""

    def __init__(self, case: Case, folder: Path, threads: int) -> None:
        """Opens both parts with as many threads."""
        import onnxruntime_genai as og

        super().__init__(case)
        self._og = og
        config = og.Config(str(folder / "decoder"))
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)
        self._params = og.GeneratorParams(self._model)
        self._params.set_search_options(do_sample=False, max_length=case.context)
        self._generator: Any = None
        self._vision = OnnxVision(case, folder / "vision.onnx", threads)

    def encode(self) -> None:
        """One tile."""
        self._vision.encode()

    def start(self) -> None:
        """A new generator; the one before gives its cache back first."""
        self._generator = None
        self._generator = self._og.Generator(self._model, self._params)

    def prefill(self, ids: list[int]) -> int:
        """All at once, then the choice of the next id."""
        import numpy as np

        self._generator.append_tokens(np.array([ids], np.int32))
        logits = np.asarray(self._generator.get_logits()).reshape(-1)
        return int(logits[-self.case.vocab_size :].argmax())

    def decode(self, token: int) -> int:
        """One id."""
        return self.prefill([token])


def load(row: str, case: Case, folder: Path, threads: int) -> Engine:
    """Opens what `convert` made."""
    return GenaiEngine(case, folder, threads)


if __name__ == "__main__":
    main(convert, load)
