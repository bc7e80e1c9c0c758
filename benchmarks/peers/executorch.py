"""ExecuTorch with XNNPACK: the file that our own lowering writes, run by ExecuTorch's runtime."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

from benchmarks.peers.ours import OurEngine
from benchmarks.peers.peer import Case, Engine, Peer, main

PEER = Peer(
    name="executorch",
    module="benchmarks.peers.executorch",
    rows=("executorch-8da4w",),
    formats={
        "executorch-8da4w": "ExecuTorch XNNPACK by our lowering (int4-fast), through lorgnette",
    },
)


def convert(row: str, case: Case, folder: Path) -> None:
    """Exports the same checkpoint for the other target."""
    command = [sys.executable, "-m", "lorgnette", "export", case.checkpoint]
    command += ["--target", "executorch-xnnpack", "--quant", "int4-fast"]
    command += ["--context", str(case.context), "--measure", "0"]
    subprocess.run([*command, "--out", str(folder / "model.lorg")], check=True)


def load(row: str, case: Case, folder: Path, threads: int) -> Engine:
    """Opens what `convert` made."""
    return OurEngine(dataclasses.replace(case, bundle=str(folder / "model.lorg")), threads)


if __name__ == "__main__":
    main(convert, load)
