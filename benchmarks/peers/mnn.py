"""MNN: decoder in 4 bits and tower in 8 bits, both by its own exporter."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from benchmarks.peers.peer import Case, Engine, Peer, PlainEngine, main

PEER = Peer(
    name="mnn",
    module="benchmarks.peers.mnn",
    rows=("mnn-int4",),
    requirements=(
        "MNN==3.6.1",
        "transformers==4.57.6",
        "torch==2.13.0",
        "numpy==2.4.6",
        "onnx==1.23.0",
        "onnxruntime==1.32.0",
        "onnxscript==0.7.2",
        "onnxslim==0.1.98",
        "pillow==13.0.0",
        "sentencepiece==0.2.3",
        "yaspin==3.5.1",
        "jinja2==3.1.6",
    ),
    unpinned=("llmexport==0.0.5",),  # the exporter; it pins nothing and asks for more than it uses
    formats={"mnn-int4": "MNN, decoder int4 groups of 32, vision tower 8-bit weights (llmexport)"},
)
PLAIN_ID = 100
"""Of an ordinary token."""


def convert(row: str, case: Case, folder: Path) -> None:
    """Runs MNN's exporter on the checkpoint, as a script: as a package it does not import."""
    if case.shape.startswith("OmniVLM"):
        raise SystemExit("MNN's exporter (llmexport) knows no OmniVLM")
    script = Path(sysconfig.get_paths()["purelib"]) / "llmexport/llmexport.py"
    command = [sys.executable, str(script), "--path", case.checkpoint, "--export", "mnn"]
    command += ["--quant_bit", "4", "--quant_block", "32", "--dst_path", str(folder)]
    subprocess.run(command, check=True)
    shutil.rmtree(folder / "onnx", ignore_errors=True)
    for name in ("llm.mnn.json", "export_args.json"):
        (folder / name).unlink(missing_ok=True)
    if not (folder / "config.json").exists():
        raise RuntimeError("llmexport wrote no config.json")


class MnnEngine(PlainEngine):
    """MNN's language model and its tower as a module, each with its default precisions."""

    def __init__(self, case: Case, folder: Path, threads: int) -> None:
        """Loads both."""
        import numpy as np
        from MNN import expr, nn

        super().__init__(case)
        # As an attribute of the package, `llm` is the C module of the same name.
        llm = importlib.import_module("MNN.llm")
        self._llm = llm.create(str(folder / "config.json"))
        self._llm.set_config({"thread_num": threads, "reuse_kv": True, "sampler_type": "greedy"})
        self._llm.load()
        self._llm.generate_init()
        self._runtime = nn.create_runtime_manager(
            ({"backend": "CPU", "numThread": threads, "precision": "normal", "memory": "low"},)
        )
        self._tower = nn.load_module_from_file(
            str(folder / "visual.mnn"),
            ["pixel_values"],
            ["image_embeds"],
            runtime_manager=self._runtime,
            shape_mutable=True,
        )
        shape = [1, 3, case.tile, case.tile]
        tile = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
        self._tile = expr.const(tile.tobytes(), shape, expr.NCHW, expr.float)

    def encode(self) -> None:
        """One tile; reading the outcome is what makes MNN compute it."""
        self._tower.forward(self._tile).read()

    def start(self) -> None:
        """Empties the KV cache."""
        self._llm.reset()

    def prefill(self, ids: list[int]) -> int:
        """All at once, logits for the last position.

        An image token's id without its picture makes MNN crash: another stands in its place.
        """
        ids = [PLAIN_ID if token == self.case.image_id else token for token in ids]
        return int(self._llm.forward(ids).read().argmax())


def load(row: str, case: Case, folder: Path, threads: int) -> Engine:
    """Opens what `convert` made."""
    return MnnEngine(case, folder, threads)


if __name__ == "__main__":
    main(convert, load)
