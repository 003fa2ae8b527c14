"""The ExecuTorch shim: where it is, and its C ABI in ctypes. ``native/dlora_executorch.h`` describes that.

No Python of executorch's is ever imported: it would bring torch.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from dlora.protocol.errors import BundleError, DloraError, MissingExtraError

from .engine import DTYPES, Array

ABI: Final = 1
LIBRARY: Final = "libdlora_executorch.so"
VARIABLE: Final = "DLORA_EXECUTORCH_DIR"
MAX_DIMS: Final = 4
_MESSAGE_BYTES: Final = 400
_WHAT_TO_DO: Final = "close other programs if it needs their memory, or export the bundle again"
_OK, _UNREADABLE, _DAMAGED, _INCOMPATIBLE = 0, 1, 2, 3
_CODES: Final = {dtype: code for code, dtype in enumerate(DTYPES.values())}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("dims", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * MAX_DIMS),
    )

    @classmethod
    def of(cls, array: Array) -> _Tensor:
        """A view of an array, which must be C-contiguous and live as long."""
        sizes = (ctypes.c_int64 * MAX_DIMS)(*array.shape)
        return cls(array.ctypes.data, _CODES[array.dtype], array.ndim, sizes)


_TENSORS: Final = ctypes.POINTER(_Tensor)
_NUMBER: Final = ctypes.POINTER(ctypes.c_int32)
_ARGUMENTS: Final[dict[str, tuple[Any, ...]]] = {  # after the program
    "dlora_et_free": (),
    "dlora_et_count": (_NUMBER, _NUMBER),
    "dlora_et_describe": (ctypes.c_int32, ctypes.c_int32, _TENSORS),
    "dlora_et_run": (_TENSORS, ctypes.c_int32, _TENSORS, ctypes.c_int32, ctypes.c_char_p, ctypes.c_size_t),
}


class Program:
    """A loaded ``.pte``; several threads may call it, one after the other."""

    def __init__(self, library: ctypes.CDLL, path: Path, handle: ctypes.c_void_p) -> None:
        self._library = library
        self._path = path
        self._handle = handle
        self._free = weakref.finalize(self, library.dlora_et_free, handle)

    def signature(self) -> list[list[tuple[str, tuple[int, ...]]]]:
        """Dtype and largest shape of every input and every output."""
        counts = (ctypes.c_int32(), ctypes.c_int32())
        self._library.dlora_et_count(self._handle, *map(ctypes.byref, counts))
        return [[self._describe(side, index) for index in range(count.value)] for side, count in enumerate(counts)]

    def run(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
        """Compute ``outputs``, in place, from ``inputs``; all C-contiguous. Raises ``BundleError``."""
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        status = self._library.dlora_et_run(
            self._handle,
            (_Tensor * len(inputs))(*map(_Tensor.of, inputs)),
            len(inputs),
            (_Tensor * len(outputs))(*map(_Tensor.of, outputs)),
            len(outputs),
            message,
            len(message),
        )
        if status != _OK:
            raise BundleError(f"{self._path} fails on ExecuTorch: {_text_of(message)}; {_WHAT_TO_DO}")

    def _describe(self, side: int, index: int) -> tuple[str, tuple[int, ...]]:
        tensor = _Tensor()
        if self._library.dlora_et_describe(self._handle, side, index, ctypes.byref(tensor)) != _OK:
            return "", ()
        names = list(DTYPES)
        name = names[tensor.dtype] if 0 <= tensor.dtype < len(names) else ""
        return name, tuple(tensor.sizes[: tensor.dims])


class Shim:
    """The library, loaded.

    Attributes:
        directory: where it is; version: of ExecuTorch, ``"1.5.1"``.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self._library = ctypes.CDLL(str(directory / LIBRARY))
            abi: int = self._library.dlora_et_abi()
        except (OSError, AttributeError) as error:
            raise MissingExtraError(
                f"the ExecuTorch engine in {directory} does not load ({error}); build it again with make shim"
            ) from None
        if abi != ABI:
            raise MissingExtraError(
                f"the ExecuTorch engine in {directory} is of another dlora (ABI {abi}, this one wants {ABI}); build it "
                "again with make shim"
            )
        self._library.dlora_et_version.restype = ctypes.c_char_p
        self._library.dlora_et_free.restype = None
        for name, arguments in _ARGUMENTS.items():
            getattr(self._library, name).argtypes = [ctypes.c_void_p, *arguments]
        self.version: str = self._library.dlora_et_version().decode()

    def set_threads(self, threads: int) -> None:
        """Threads that ExecuTorch's own kernels share, in the whole process."""
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        if self._library.dlora_et_set_threads(threads, message, len(message)) != _OK:
            raise DloraError(f"ExecuTorch: {_text_of(message)}")

    def load(self, path: Path) -> Program:
        """Load a program. Raises ``BundleError`` with what to do."""
        handle, message = ctypes.c_void_p(), ctypes.create_string_buffer(_MESSAGE_BYTES)
        status = self._library.dlora_et_load(os.fsencode(path), ctypes.byref(handle), message, len(message))
        if status == _OK:
            return Program(self._library, path, handle)
        reason = _text_of(message)
        if status in (_UNREADABLE, _DAMAGED):
            raise BundleError(f"{path} is damaged ({reason}); export the bundle again")
        if status == _INCOMPATIBLE:
            raise BundleError(f"{path} is not for ExecuTorch {self.version} ({reason}); export it with that version")
        raise BundleError(f"{path} does not load on ExecuTorch {self.version}: {reason}; {_WHAT_TO_DO}")


def shim_directories() -> list[Path]:
    """The directories in which the shim may be, in order."""
    if chosen := os.environ.get(VARIABLE):
        return [Path(chosen)]
    package = Path(__file__).resolve().parents[1]  # dlora.edge
    frozen = getattr(sys, "_MEIPASS", None) if getattr(sys, "frozen", False) else None
    return [
        *([Path(frozen) / "dlora_executorch"] if frozen else []),
        package / "native" / "lib",
        package.parent / "build" / "shim" / platform.machine(),
    ]


def find_shim() -> Path:
    """The directory of the shim. Raises ``MissingExtraError``."""
    tried = shim_directories()
    for place in tried:
        if (place / LIBRARY).is_file():
            return place
    raise MissingExtraError(
        f"ExecuTorch engine not installed: no {LIBRARY} in {', '.join(map(str, tried))}; build it with make shim and "
        f"set {VARIABLE} to its directory, or use --engine onnx"
    )


@cache
def load_shim() -> Shim:
    """The shim, once a process. Raises ``MissingExtraError``."""
    return Shim(find_shim())


def _text_of(message: ctypes.Array[ctypes.c_char]) -> str:
    return " ".join(message.value.decode(errors="replace").split())
