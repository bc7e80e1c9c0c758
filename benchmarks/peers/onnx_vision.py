"""The vision tower as plain ONNX: torch.onnx.export, and onnxruntime's dynamic int8 of it."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.peer import Case


def export_vision(case: Case, file: Path, *, int8: bool) -> None:
    """Writes the tower.

    Args:
        case: The shape.
        file: Where to.
        int8: Whether its matrices become int8 with dynamic activations.
    """
    import torch

    from benchmarks.peers.modules import tower_of

    tile = torch.zeros(1, 3, case.tile, case.tile)
    plain = file.with_name("vision-fp32.onnx") if int8 else file
    torch.onnx.export(
        tower_of(case),
        (tile,),
        plain,
        input_names=["pixels"],
        output_names=["image_tokens"],
        dynamo=True,
        external_data=False,
    )
    if int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            plain,
            file,
            per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            extra_options={"DefaultTensorType": 1},
        )
        plain.unlink()


class OnnxVision:
    """A session of such a tower and a random tile."""

    def __init__(self, case: Case, file: Path, threads: int) -> None:
        """Opens the session."""
        import numpy as np
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
        shape = (1, 3, case.tile, case.tile)
        self._tile = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)

    def encode(self) -> None:
        """One tile."""
        self._session.run(None, {"pixels": self._tile})
