"""safetensors files, written from where the tensors lie.

The library's writer holds two more copies of all tensors while it writes, which was the peak of a run's memory. The
format is simple (https://huggingface.co/docs/safetensors): the header's length as eight bytes, the header as JSON,
padded with spaces to a multiple of eight, and the tensors' bytes. Files are read with the library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

_LETTERS: Final = {"f": "F", "i": "I", "u": "U"}  # by numpy's kind


def safetensors_chunks(
    tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """The bytes of a file, piece by piece, of tensors of integers and floats."""
    whole = {name: np.asarray(tensor, tensor.dtype.newbyteorder("<"), order="C") for name, tensor in tensors.items()}
    # Wide dtypes first, so that each tensor is aligned.
    order = sorted(whole, key=lambda name: (-whole[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        begin, end = end, end + whole[name].nbytes
        dtype = whole[name].dtype
        code = f"{_LETTERS[dtype.kind]}{8 * dtype.itemsize}"
        header[name] = {"dtype": code, "shape": whole[name].shape, "data_offsets": (begin, end)}
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield whole[name].reshape(-1).view(np.uint8).data
