"""Writes ``.npy`` files of the bundle, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlora.protocol.errors import StorageError

Array = npt.NDArray[Any]


def save_array(bundle: Path, name: str, values: Array) -> None:
    """Write one array to ``bundle / name``. Raises ``StorageError``."""
    save_pieces(bundle, {name: values.shape}, [(values,)])


def save_pieces(
    bundle: Path, shapes: Mapping[str, Sequence[int]], pieces: Iterable[Sequence[Array]]
) -> dict[str, Array]:
    """Write arrays of ``shapes``, by the names of their files, of pieces of their rows; ``pieces`` has one of each at a
    time. Gives them mapped, so that no more than a piece need be in memory. Raises ``StorageError``."""
    with ExitStack() as files:
        opened: list[Any] = []
        for each in pieces:
            if not opened:
                for (name, shape), piece in zip(shapes.items(), each, strict=True):
                    files.enter_context(_disk_errors(bundle / name))  # of closing it, too, which writes
                    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
                    opened.append(files.enter_context((bundle / name).open("wb")))
                    about = {
                        "descr": np.lib.format.dtype_to_descr(piece.dtype),
                        "fortran_order": False,
                        "shape": tuple(shape),
                    }
                    np.lib.format.write_array_header_1_0(opened[-1], about)
            for file, piece in zip(opened, each, strict=True):
                with _disk_errors(Path(file.name)):
                    file.write(np.ascontiguousarray(piece).data)
    return {name: np.load(bundle / name, mmap_mode="c") for name in shapes}


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        text = f"cannot write {path}: {error.strerror or error}; free space or choose another --out"
        raise StorageError(text) from None
