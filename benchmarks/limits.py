"""What this machine can do at most: memory bandwidth and peaks of multiplication, measured.

    python -m benchmarks.limits [--threads N]

Bandwidths come from a small C program (reads, each thread its own part), the peaks from the best
matrix product of torch and onnxruntime: what a kernel can reach here, rather than what the
processor's sheet says. The best of several tries, because other work only takes away.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

SOURCE = Path(__file__).with_suffix(".c")
DRAM_BYTES = 128 << 20
"""A thread; beyond the caches of any small machine."""
CACHES = {"L2": 192 << 10, "L3": 1536 << 10}
"""Bytes a thread that fit a level and not the one before, on most machines."""
SECONDS = 0.5
TRIES = 5
SIDE = 2048


def measure(threads: int) -> dict[str, float]:
    """Every limit, by name with unit; bandwidths are left out where there is no C compiler."""
    return _bandwidths(threads) | {
        "fp32 GEMM GFLOP/s": fp32_gemm(threads),
        "int8 GEMM GOP/s": int8_gemm(threads),
    }


def cached_limits(folder: Path, threads: int) -> dict[str, float]:
    """The limits measured now, or better ones measured in this folder before."""
    file = folder / f"limits-{threads}.json"
    limits = measure(threads)
    if file.exists():
        for name, value in json.loads(file.read_text()).items():
            limits[name] = max(value, limits.get(name, 0.0))
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(limits, indent=1))
    return limits


def _bandwidths(threads: int) -> dict[str, float]:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return {}
    with tempfile.TemporaryDirectory() as temporary:
        program = Path(temporary) / "limits"
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-pthread"]
        subprocess.run([compiler, *flags, str(SOURCE), "-o", str(program)], check=True)

        def best(what: str, size: int) -> float:
            command = [str(program), what, str(threads), str(size), str(SECONDS)]
            runs = (
                subprocess.run(command, capture_output=True, text=True, check=True)
                for _ in range(TRIES)
            )
            return max(float(done.stdout) for done in runs)

        speeds = {"DRAM GB/s": best("read", DRAM_BYTES)}
        speeds |= {f"{level} GB/s": best("read", size) for level, size in CACHES.items()}
        return speeds | {"fp32 registers GFLOP/s": best("fp32", 0)}


def _best(action: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs."""
    action()
    fastest, end = float("inf"), time.perf_counter() + TRIES * SECONDS
    while time.perf_counter() < end:
        started = time.perf_counter()
        action()
        fastest = min(fastest, time.perf_counter() - started)
    return fastest


def fp32_gemm(threads: int) -> float:
    """GFLOP/s of the better of torch's and onnxruntime's product of two square matrices."""
    import numpy as np
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x = torch.rand(SIDE, SIDE)
    y = torch.rand(SIDE, SIDE)
    seconds = _best(lambda: torch.mm(x, y))
    torch.set_num_threads(before)
    draw = np.random.default_rng(0)
    a = draw.random((SIDE, SIDE), np.float32)
    b = draw.random((SIDE, SIDE), np.float32)
    seconds = min(seconds, _onnx_gemm("MatMul", a, b, threads))
    return 2 * SIDE**3 / seconds / 1e9


def int8_gemm(threads: int) -> float:
    """GOP/s of onnxruntime's product of uint8 with int8 matrices, and torch's where better."""
    import numpy as np
    import torch

    draw = np.random.default_rng(0)
    a = draw.integers(0, 128, (SIDE, SIDE), np.uint8)
    b = draw.integers(-64, 64, (SIDE, SIDE), np.int8)
    seconds = _onnx_gemm("MatMulInteger", a, b, threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x = torch.from_numpy(a.astype(np.int8))
    y = torch.from_numpy(b)
    seconds = min(seconds, _best(lambda: torch._int_mm(x, y)))
    torch.set_num_threads(before)
    return 2 * SIDE**3 / seconds / 1e9


def _onnx_gemm(kind: str, a: NDArray[np.generic], b: NDArray[np.generic], threads: int) -> float:
    """Seconds of one operator, the second matrix known beforehand so that it can be packed."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    whole = kind == "MatMulInteger"
    given = TensorProto.UINT8 if whole else TensorProto.FLOAT
    made = TensorProto.INT32 if whole else TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(kind, ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", given, [SIDE, SIDE])],
        [helper.make_tensor_value_info("c", made, [SIDE, SIDE])],
        [numpy_helper.from_array(b, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return _best(lambda: session.run(None, {"a": a}))


def main() -> None:
    """Prints the limits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    for name, value in measure(parser.parse_args().threads).items():
        print(f"{name:24}{value:10.0f}")


if __name__ == "__main__":
    main()
