"""Tensors as they cross the wire: a dtype, a shape, a power-of-two exponent, and raw little-endian bytes.

How floating-point values become such a tensor is ``wire_codecs.py``.
"""

from __future__ import annotations

import math
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from .errors import RemoteProtocolError, ViolationError

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
ByteArray = npt.NDArray[np.uint8]

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "fp32": np.dtype("<f4"),
    "fp16": np.dtype("<f2"),
    "int8": np.dtype("u1"),  # of each row, its integers and then the bytes of its scale
    "int4": np.dtype("u1"),  # the same; two integers a byte, the first in the lower half
    "int32": np.dtype("<i4"),
    "uint8": np.dtype("u1"),
}
SCALE_BYTES: Final = 2  # of a row of int8 or int4: a bfloat16
SCALED: Final = ("int8", "int4")
MAX_DIMENSIONS: Final = 4
MAX_EXPONENT: Final = 127
_FP16_HEADROOM: Final = 15  # the largest magnitude is scaled into [2**14, 2**15), well below fp16's 65504


class WireTensor:
    """A tensor on its way over the wire; the bytes are viewed, never copied.

    Attributes:
        dtype: a key of ``DTYPES``.
        exponent: the value is ``data * 2**exponent``. Only ``fp16`` uses it: gradients lie far below the
            smallest normal fp16 and some families' activations far above the largest.
        data: the stored array, C-contiguous, of any shape with at most ``MAX_DIMENSIONS`` dimensions; of ``int8`` and
            ``int4`` (rows, ``stored_width``).
        width: of the values, of ``int4``, whose stored rows do not say it; None for others.
    """

    __slots__ = ("data", "dtype", "exponent", "width")

    def __init__(self, dtype: str, data: npt.NDArray[Any], exponent: int = 0, width: int | None = None) -> None:
        self.dtype = dtype
        self.data = data
        self.exponent = exponent
        self.width = width

    def __repr__(self) -> str:
        return f"WireTensor({self.dtype}, {self.shape}, exponent={self.exponent})"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, WireTensor)
            and (self.dtype, self.exponent, self.shape) == (other.dtype, other.exponent, other.shape)
            and self.data.tobytes() == other.data.tobytes()
        )

    __hash__ = None  # type: ignore[assignment]

    def copied(self) -> WireTensor:
        """The same with an array of its own: what has come is a view of its whole frame."""
        return WireTensor(self.dtype, self.data.copy(), self.exponent, self.width)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values; scales do not count."""
        if self.dtype in SCALED:
            rows, stored = self.data.shape
            return rows, stored - SCALE_BYTES if self.width is None else self.width
        return self.data.shape

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def check(self, dtype: str, shape: tuple[int | None, ...]) -> None:
        """Raise ``ViolationError`` unless it has this dtype and shape; None is any size."""
        fits = len(self.shape) == len(shape) and all(
            want is None or want == have for want, have in zip(shape, self.shape, strict=True)
        )
        if self.dtype != dtype or not fits:
            raise ViolationError(f"a tensor of {self.dtype} {self.shape} where {dtype} {shape} was due")

    @classmethod
    def from_ints(cls, values: npt.ArrayLike) -> WireTensor:
        return cls("int32", np.ascontiguousarray(values, DTYPES["int32"]))

    @classmethod
    def from_bytes(cls, values: bytes | ByteArray) -> WireTensor:
        data = np.frombuffer(values, np.uint8) if isinstance(values, bytes) else np.ascontiguousarray(values)
        return cls("uint8", data)


def stored_width(dtype: str, width: int) -> int:
    """Of a row of ``width`` values as it is stored: of ``int8`` and ``int4`` in bytes, with its scale."""
    if dtype not in SCALED:
        return width
    return (-(-width // 2) if dtype == "int4" else width) + SCALE_BYTES


def fp16_exponent(peak: float) -> int:
    """The exponent that scales a tensor whose largest magnitude is ``peak`` into fp16's upper range."""
    if peak == 0.0:
        return 0
    exponent = math.frexp(peak)[1] - _FP16_HEADROOM
    return max(-MAX_EXPONENT + 1, min(MAX_EXPONENT - 1, exponent))


def is_exponent(exponent: int, dtype: str) -> bool:
    """Whether a tensor of ``dtype`` may have this exponent."""
    return abs(exponent) <= MAX_EXPONENT and (not exponent or dtype == "fp16")


def tensors_of(message: msgspec.Struct) -> list[WireTensor]:
    """The tensors of a message, in the order in which their bytes follow its header."""
    found: list[WireTensor] = []
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, WireTensor):
            found.append(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], WireTensor):
            found.extend(value)
    return found


def parse_descriptor(descriptor: Any, frame: memoryview, offset: int) -> tuple[WireTensor, int]:
    """View the tensor that ``descriptor`` names at ``offset`` of ``frame``, without a copy; gives it and its end.

    Raises ``RemoteProtocolError`` unless it is ``[dtype, shape, exponent]`` within limits and the frame.
    """
    match descriptor:
        case [str(dtype), list(shape), int(exponent)] if dtype in DTYPES:
            pass
        case _:
            raise RemoteProtocolError("malformed tensor descriptor")
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise RemoteProtocolError("malformed tensor shape")
    if type(exponent) is not int or not is_exponent(exponent, dtype):
        raise RemoteProtocolError("malformed tensor exponent")
    width = shape[1] if dtype == "int4" and len(shape) == 2 else None
    if dtype in SCALED:
        if len(shape) != 2:
            raise RemoteProtocolError("malformed tensor shape")
        shape = [shape[0], stored_width(dtype, shape[1])]
    count = math.prod(shape)
    end = offset + count * DTYPES[dtype].itemsize
    if end > len(frame):
        raise RemoteProtocolError("a tensor's shape and dtype claim more bytes than the frame has")
    data = np.frombuffer(frame, DTYPES[dtype], count, offset if count else 0).reshape(shape)
    return WireTensor(dtype, data, exponent, width), end
