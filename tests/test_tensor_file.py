"""safetensors files that are written piece by piece."""

from __future__ import annotations

import numpy as np
import safetensors.numpy

from dlora.edge.tensor_file import safetensors_chunks

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.arange(5, dtype=np.float16),
    "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T, "step": np.array(7, np.int64),
    "big": np.arange(4, dtype=">f4"), "none": np.zeros((0, 3), np.float32),
    "states": np.arange(3, dtype=np.uint8), "é": np.ones(1, np.float64),
}  # fmt: skip


def test_file_is_the_libraries() -> None:
    written = b"".join(safetensors_chunks(TENSORS, {"format": "pt"}))
    floats = {name: np.ascontiguousarray(each) for name, each in TENSORS.items() if each.dtype == np.float32}
    assert b"".join(safetensors_chunks(floats, {"format": "pt"})) == safetensors.numpy.save(floats, {"format": "pt"})
    read = safetensors.numpy.load(written)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype.newbyteorder("="), tensor.shape)
        assert (read[name] == tensor).all()


def test_nothing_is_copied() -> None:
    _, *chunks = safetensors_chunks({"b": TENSORS["b"], "step": TENSORS["step"]}, {})
    for chunk, name in zip(chunks, ("step", "b"), strict=True):
        assert np.shares_memory(np.frombuffer(chunk, np.uint8), TENSORS[name])
