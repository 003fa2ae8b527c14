"""What is exported appears whole or not at all: it is written beside its place and then renamed into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dlora.protocol.errors import StorageError, UsageError
from dlora.protocol.files import sync
from dlora.protocol.manifest import MANIFEST_NAME


@dataclass(frozen=True)
class Product:
    """What a directory is to be.

    Attributes:
        name: for people, with its article; marker: the file by which one is known.
    """

    name: str
    marker: str


BUNDLE: Final = Product("a bundle", MANIFEST_NAME)


def check_output_path(out: Path, force: bool, product: Product = BUNDLE) -> None:
    """Raise ``UsageError`` where a product may not be written at ``out``, ``StorageError`` where none can be.

    Even with ``force`` only one of its like or an empty directory is replaced, never another directory.
    """
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UsageError(f"{above} is a file; choose another --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write {out}: {above} is not writable; choose another --out")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; choose another --out")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / product.marker).is_file():
        raise UsageError(f"{out} is not empty and not {product.name}; choose another --out")
    if not force:
        raise UsageError(f"{out} is already {product.name}; give --force to replace it")


@contextmanager
def new_directory_for(out: Path, force: bool, product: Product = BUNDLE) -> Iterator[Path]:
    """Yield an empty directory that becomes ``out`` when the block ends well, and vanishes when it does not."""
    out = out.absolute()
    check_output_path(out, force, product)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:  # Ctrl-C may come between any two lines: whatever there is by then vanishes
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        except OSError as error:
            raise StorageError(f"cannot write {out}: {error.strerror}; choose another --out") from None
        yield partial
        for path in partial.rglob("*"):
            sync(path)
        sync(partial)
        check_output_path(out, force, product)
        _replace(partial, out)
        sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    try:
        out.rename(old)
        partial.rename(out)
    finally:
        if not out.exists():
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)
