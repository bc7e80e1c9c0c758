"""ONNX graphs for onnxruntime, with its contrib operators."""
