"""How floating-point tensors are stored on the wire: one codec a storage, chosen by what a tensor is.

A codec has the ``dtype`` of what it stores, a key of ``DTYPES``. ``encode`` takes a float32 array, and raises
``NonFiniteError`` on NaN or infinity; ``is_finite`` says whether what is stored has neither; ``decode`` gives float32,
maybe a view of the frame, so do not write into it; ``nbytes`` are those of the stored array of (rows, width) values.
The server has a twin of each codec in torch (``dlora.cloud.exchange.torch_codecs``), which gives the same bits.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Final

import msgspec
import numpy as np

from .choices import DifferenceDtype, WireDtype
from .errors import NonFiniteError, UsageError
from .tensors import DTYPES, SCALE_BYTES, ByteArray, FloatArray, WireTensor, fp16_exponent, stored_width

SCALE_LIMIT: Final = 2.0**120
"""A row of integers has a smaller scale than this: 128 times it is finite."""
LARGEST: Final = {"int8": 127, "int4": 7}
"""The largest integer that each stores."""


class TensorRole(StrEnum):
    """What a floating-point tensor is; a field of the same name in ``Codecs`` says how it crosses."""

    EMBEDDINGS = "embeddings"
    GROUP_INPUT = "group_input"
    DELTA = "delta"
    DELTA_GRAD = "delta_grad"
    INPUT_GRAD = "input_grad"
    LAST_HIDDEN_STATES = "last_hidden_states"
    LAST_HIDDEN_STATES_GRAD = "last_hidden_states_grad"
    ADAPTER_STATE = "adapter_state"
    GROUP_PARAMETERS = "group_parameters"
    DIFFERENCE = "difference"
    """Of what crosses once more for a group in a later pass, to what crossed in the one before."""


class Codecs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The codec of each role, as the device asks for it in ``OpenSession``."""

    embeddings: WireDtype
    group_input: WireDtype
    delta: WireDtype
    delta_grad: WireDtype
    input_grad: WireDtype
    last_hidden_states: WireDtype
    last_hidden_states_grad: WireDtype
    adapter_state: WireDtype
    group_parameters: WireDtype
    difference: DifferenceDtype

    @classmethod
    def all(cls, name: WireDtype) -> Codecs:
        """The same codec for every role."""
        return cls(**dict.fromkeys(cls.__struct_fields__, name))

    @classmethod
    def parse(cls, text: str) -> Codecs:
        """What a user asks for: ``int8``, ``fp16`` or ``fp32`` for all roles that it is good for, and then other ones
        for some: ``int8,embeddings=fp16,last_hidden_states=fp16``. Raises ``UsageError``.

        What a device has learnt crosses as fp16 where all else is int8: it is given once, and there is no mean of many
        tokens over which its rounding would vanish. Differences cross as int4 there: they are small.
        """
        first, *others = (part.strip() for part in text.split(","))
        if first not in FOR_ALL:
            raise UsageError(f"--wire-dtype {text[:80]}: begin with one of {', '.join(FOR_ALL)}")
        chosen = dict.fromkeys(cls.__struct_fields__, first)
        if first == "int8":
            chosen |= {TensorRole.GROUP_PARAMETERS: "fp16", TensorRole.DIFFERENCE: "int4"}
        for other in others:
            role, _, name = other.partition("=")
            if role not in chosen or name not in (CODECS if role == TensorRole.DIFFERENCE else FOR_ALL):
                raise UsageError(
                    f"--wire-dtype {text[:80]}: write others as ROLE=DTYPE, with a role of {', '.join(chosen)}, and "
                    f"{', '.join(FOR_ALL)}; difference may be int4, too"
                )
            chosen[role] = name
        return msgspec.convert(chosen, cls)

    def for_evaluation(self) -> Codecs:
        """How evaluations of a run with these cross: as fp32 where all of them are, else as fp16, so that what is
        measured is the adapter and not its wire. Differences are as exact in int8 then, for they are small."""
        if self == Codecs.all("fp32"):
            return self
        chosen = Codecs.all("fp16")
        return msgspec.structs.replace(chosen, difference="int8") if self.difference in ("int4", "int8") else chosen

    def of(self, role: TensorRole) -> Codec:
        """The codec of a role."""
        return CODECS[getattr(self, role.value)]


class _Fp32:
    dtype: Final = "fp32"

    def encode(self, values: FloatArray) -> WireTensor:
        tensor = WireTensor("fp32", np.ascontiguousarray(values, DTYPES["fp32"]))
        if not self.is_finite(tensor):
            raise NonFiniteError(_NOT_FINITE)
        return tensor

    def decode(self, tensor: WireTensor) -> FloatArray:
        return tensor.data

    def is_finite(self, tensor: WireTensor) -> bool:
        return bool(np.isfinite(tensor.data).all())

    def nbytes(self, rows: int, width: int) -> int:
        return 4 * rows * width


class _Fp16:
    """Halves with one power-of-two exponent for the whole tensor: gradients lie far below the smallest normal half,
    and some families' activations far above the largest."""

    dtype: Final = "fp16"

    def encode(self, values: FloatArray) -> WireTensor:
        peak = max(float(values.max()), -float(values.min())) if values.size else 0.0
        if not math.isfinite(peak):
            raise NonFiniteError(_NOT_FINITE)
        exponent = fp16_exponent(peak)
        scaled = values * np.float32(2.0**-exponent) if exponent else values
        return WireTensor("fp16", np.ascontiguousarray(scaled, DTYPES["fp16"]), exponent)

    def decode(self, tensor: WireTensor) -> FloatArray:
        values: FloatArray = tensor.data.astype(np.float32)
        if tensor.exponent:
            values *= np.float32(2.0**tensor.exponent)
        return values

    def is_finite(self, tensor: WireTensor) -> bool:
        if tensor.exponent > _ALWAYS_FINITE_EXPONENT:
            with np.errstate(over="ignore", invalid="ignore"):
                return bool(np.isfinite(self.decode(tensor)).all())
        # Bits, not np.isfinite: halves are slow in numpy, and this runs on every tensor of every step.
        bits = tensor.data.view(np.uint16)
        return not bool(((bits & np.uint16(0x7C00)) == np.uint16(0x7C00)).any())

    def nbytes(self, rows: int, width: int) -> int:
        return 2 * rows * width


class _Integers:
    """Integers, with one scale a row: a token's largest magnitude over the largest integer, rounded up to bfloat16.

    Of each row alone and as it comes: a scale that were fixed in advance would be far off for some tokens.
    """

    def __init__(self, dtype: WireDtype | DifferenceDtype) -> None:
        self.dtype: Final = dtype
        self._largest = LARGEST[dtype]

    def encode(self, values: FloatArray) -> WireTensor:
        peaks = np.abs(values).max(axis=1, keepdims=True, initial=0.0).astype(np.float32, copy=False)
        if not np.isfinite(peaks).all():
            raise NonFiniteError(_NOT_FINITE)
        # Rounded up, so that no value is beyond the largest; never 0, so that a row of zeros divides.
        scales = np.maximum(peaks / np.float32(self._largest), _LEAST_SCALE)
        if scales.size and scales.max() >= SCALE_LIMIT:
            raise NonFiniteError(f"values that are too large for {self.dtype} in what was to be sent")
        upper = (scales.view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)
        stored = np.empty((values.shape[0], stored_width(self.dtype, values.shape[1])), np.uint8)
        stored[:, -SCALE_BYTES:] = upper.astype("<u2").view(np.uint8)
        scales = (upper << np.uint32(16)).view(np.float32)
        integers = np.rint(values / scales).astype(np.int8).view(np.uint8)
        if self.dtype == "int8":
            stored[:, :-SCALE_BYTES] = integers
            return WireTensor("int8", stored)
        stored[:, :-SCALE_BYTES] = integers[:, ::2] & np.uint8(0xF)
        stored[:, : integers.shape[1] // 2] |= integers[:, 1::2] << np.uint8(4)
        return WireTensor("int4", stored, width=integers.shape[1])

    def decode(self, tensor: WireTensor) -> FloatArray:
        values: FloatArray = self._signed(tensor).astype(np.float32)
        values *= self._scales(tensor)
        return values

    def is_finite(self, tensor: WireTensor) -> bool:
        return bool((np.abs(self._scales(tensor)) < SCALE_LIMIT).all())

    def nbytes(self, rows: int, width: int) -> int:
        return rows * stored_width(self.dtype, width)

    def _signed(self, tensor: WireTensor) -> np.ndarray[tuple[int, int], np.dtype[np.int8]]:
        stored: ByteArray = tensor.data[:, :-SCALE_BYTES]
        if self.dtype == "int8":
            return stored.view(np.int8)
        rows, width = tensor.shape
        integers = np.empty((rows, width), np.int8)
        # Through the upper half of a byte, so that the sign fills it.
        integers[:, ::2] = (stored << np.uint8(4)).view(np.int8) >> np.int8(4)
        integers[:, 1::2] = stored[:, : width // 2].view(np.int8) >> np.int8(4)
        return integers

    def _scales(self, tensor: WireTensor) -> FloatArray:
        upper = np.ascontiguousarray(tensor.data[:, -SCALE_BYTES:]).view("<u2").astype(np.uint32)
        scales: FloatArray = (upper << np.uint32(16)).view(np.float32)
        return scales


_LEAST_SCALE: Final = np.float32(1e-30)
_NOT_FINITE: Final = "NaN or infinity in what was to be sent"
_ALWAYS_FINITE_EXPONENT: Final = 112  # any finite half times 2**112 is below float32's largest

Codec = _Fp32 | _Fp16 | _Integers
CODECS: Final[dict[str, Codec]] = {
    "int4": _Integers("int4"), "int8": _Integers("int8"), "fp16": _Fp16(), "fp32": _Fp32(),
}  # fmt: skip
"""All codecs, by name, which is their dtype."""
FOR_ALL: Final = tuple(name for name in CODECS if name != "int4")
"""Of these, those that any role may have."""


def encode_floats(values: FloatArray, name: DifferenceDtype) -> WireTensor:
    """``values`` through the codec ``name``. Raises ``NonFiniteError`` on NaN or infinity."""
    return CODECS[name].encode(values)


def decode_floats(tensor: WireTensor) -> FloatArray:
    """The float32 values of a tensor that some codec stored."""
    return CODECS[tensor.dtype].decode(tensor)


def is_finite(tensor: WireTensor) -> bool:
    """Whether a tensor of any dtype has neither NaN nor infinity."""
    codec = CODECS.get(tensor.dtype)
    return codec is None or codec.is_finite(tensor)
