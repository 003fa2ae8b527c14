"""A bundle on the device's disk: checked, memory-mapped, and never copied into memory whole."""

from __future__ import annotations

import contextlib
import math
import mmap
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dlora.protocol.errors import BundleError
from dlora.protocol.manifest import GraphKind, GraphSpec, Manifest, load_manifest

from .checked_files import CheckedFiles

_STORED: Final[dict[str, np.dtype[Any]]] = {"<f4": np.dtype("<f4"), "<f2": np.dtype("<f2"), "|i1": np.dtype("i1")}
_MAGIC: Final = b"\x93NUMPY\x01\x00"
# As numpy writes it.
_HEADER: Final = re.compile(rb"\{'descr': '([<|]\w\d)', 'fortran_order': False, 'shape': \(([\d, ]{0,64})\), \} *\n")


class Bundle:
    """An opened bundle.

    Attributes:
        path: its directory; manifest: what it says of itself.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._weights: dict[str, tuple[npt.NDArray[Any], mmap.mmap]] = {}

    @classmethod
    def open(cls, path: Path, *, verify: bool = False) -> Bundle:
        """Open a bundle and check every file's size and SHA-256. Raises ``BundleError``.

        ``verify``: large files, too, that had the right one before and have not changed since.
        """
        manifest, checked = load_manifest(path), CheckedFiles()
        for name, spec in manifest.files.items():
            checked.check(path, name, spec, again=verify)
        checked.save()
        return cls(path, manifest)

    def weight(self, name: str) -> npt.NDArray[Any]:
        """A weight file as a read-only memory map: its pages come and go as the system likes.

        One map a file: a tied embedding and head share theirs, else its pages would count twice.
        """
        if name not in self._weights:
            self._weights[name] = _mapped(self.file(name))
        return self._weights[name][0]

    @contextlib.contextmanager
    def reading_rows(self, names: Iterable[str]) -> Iterator[None]:
        """While single rows of mapped weights are read: the disk is asked for these alone, and not for a hundred
        kilobytes around each."""
        self._advise(names, "MADV_RANDOM")
        try:
            yield
        finally:
            self._advise(names, "MADV_NORMAL")

    def _advise(self, names: Iterable[str], advice: str) -> None:
        for name in names:
            if name in self._weights:
                with contextlib.suppress(AttributeError, OSError):  # not Linux
                    self._weights[name][1].madvise(getattr(mmap, advice))

    def release(self, name: str) -> None:
        """Let a mapped weight's pages go until they are touched again: two milliseconds for 60 MB.

        They stay in the system's file cache, but no longer count as ours: a weight is needed for one moment of a step,
        and what the other moments need must not come on top.
        """
        self._advise([name], "MADV_DONTNEED")

    def graph_file(self, kind: GraphKind, key: str, engine: str) -> tuple[GraphSpec, Path]:
        """A graph's description and its file for an engine; raises ``BundleError`` where it has none."""
        spec = self.manifest.graph(kind, key)
        if engine not in spec.files:
            raise BundleError(f"{self.path} has no {engine} graphs; export it again with --engine both")
        return spec, self.file(spec.files[engine])

    def tokenizer_file(self) -> Path:
        return self.file(self.manifest.tokenizer.file)

    def golden_file(self) -> Path:
        return self.file(self.manifest.golden)

    def file(self, name: str) -> Path:
        """Where a file of the manifest lies. Raises ``BundleError`` for any other: only what was checked is opened."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: the manifest does not list {name!r}; export the bundle again")
        return self.path / name


def _mapped(path: Path) -> tuple[npt.NDArray[Any], mmap.mmap]:
    """Map an ``.npy`` file, whose header is checked first: numpy may fail in any way on one that lies, or crash.

    Its own reader evaluates the header as Python, which also fails now and then where several threads do so at once.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ValueError("not of .npy format 1.0")
            header = file.read(int.from_bytes(file.read(2), "little"))
            start = file.tell()
            found = _HEADER.fullmatch(header)
            if found is None or found[1].decode() not in _STORED:
                raise ValueError("not an array of weights")
            dtype, shape = _STORED[found[1].decode()], tuple(int(size) for size in found[2].split(b",") if size.strip())
            if min(shape, default=1) < 1:
                raise ValueError("not an array of weights")
            if start + math.prod(shape) * dtype.itemsize != path.stat().st_size:
                raise ValueError("its shape is not its size")
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapping, dtype, math.prod(shape), start).reshape(shape), mapping
    except (OSError, ValueError, OverflowError) as error:
        raise BundleError(f"{path} cannot be read ({error}); export the bundle again") from None
