"""MNN: its own exporter's 4-bit decoder and its tower."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.peer import Case, Peer

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
        "onnxslim",
        "pillow",
        "sentencepiece",
        "yaspin",
        "jinja2",
    ),
    unpinned=("llmexport==0.0.5",),
    formats={"mnn-int4": "MNN, decoder 4 bits in groups of 32, tower by its exporter"},
)


def convert(row: str, case: Case, folder: Path) -> None:
    """Runs MNN's exporter."""
