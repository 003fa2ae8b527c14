"""Letting go of the libraries' pages that only the start touched.

Importing, registering operators and optimising graphs runs through most of the code of the libraries, and what was
touched stays mapped: 60 MB where training needs 30. The pages are the files' own, so the next touch brings them back.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any, ClassVar, Final

# Of <elf.h>: PT_LOAD, PT_DYNAMIC, PF_W; DT_NULL, DT_TEXTREL, DT_FLAGS, DF_TEXTREL.
_LOAD: Final = 1
_DYNAMIC: Final = 2
_WRITABLE: Final = 2
_END, _RELOCATED, _FLAGS, _RELOCATED_FLAG = 0, 22, 30, 4


class _Segment(ctypes.Structure):
    """``Elf64_Phdr`` of <elf.h>."""

    _fields_: ClassVar = [
        ("type", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("physical", ctypes.c_uint64),
        ("file_bytes", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("alignment", ctypes.c_uint64),
    ]


class _Library(ctypes.Structure):
    """The beginning of ``dl_phdr_info`` of <link.h>."""

    _fields_: ClassVar = [
        ("base", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("segments", ctypes.POINTER(_Segment)),
        ("count", ctypes.c_uint16),
    ]


_Visit: Final = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Library), ctypes.c_size_t, ctypes.c_void_p)


def release_code() -> int:
    """Unmap what is resident of the shared libraries' read-only segments; returns how many bytes of segments those are.

    Nothing is lost: the loader writes into no segment that is not writable, so that each page is as it is in its file,
    and the system may take it at any time anyway. Libraries that say that they are an exception are left alone. 0 where
    the system is no 64-bit Linux.
    """
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        return 0
    try:
        libc: Any = ctypes.CDLL(None)
        iterate, madvise, advice = libc.dl_iterate_phdr, libc.madvise, mmap.MADV_DONTNEED
    except (AttributeError, OSError):
        return 0
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    found: list[tuple[int, int]] = []

    def visit(pointer: Any, _size: int, _data: Any) -> int:
        library = pointer.contents
        segments = library.segments[: library.count]
        # Without a path it is the program itself, or the kernel's own, which has no file.
        if b"/" in (library.name or b"") and not any(_is_relocated(library.base, segment) for segment in segments):
            found.extend(_pages(library.base, segment) for segment in segments if _is_read_only(segment))
        return 0

    iterate(_Visit(visit), None)
    return sum(size for start, size in found if size > 0 and madvise(start, size, advice) == 0)


def _is_read_only(segment: _Segment) -> bool:
    return segment.type == _LOAD and not segment.flags & _WRITABLE


def _pages(base: int, segment: _Segment) -> tuple[int, int]:
    """Start and size of a segment's whole pages: its ends may share one with a neighbour."""
    start = -(-(base + segment.address) // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (base + segment.address + segment.bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    return start, end - start


def _is_relocated(base: int, segment: _Segment) -> bool:
    """Whether this is a dynamic section that says that code was relocated: those pages differ from their file."""
    if segment.type != _DYNAMIC:
        return False
    words = (ctypes.c_uint64 * (segment.bytes // 8)).from_address(base + segment.address)
    for tag, value in zip(words[::2], words[1::2], strict=False):
        if tag == _END:
            return False
        if tag == _RELOCATED or (tag == _FLAGS and value & _RELOCATED_FLAG):
            return True
    return False
