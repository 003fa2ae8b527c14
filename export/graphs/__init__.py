"""The graphs of a bundle: ONNX text, torch modules, numpy references."""
