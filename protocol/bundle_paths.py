"""The paths that stand in a manifest, and whether each leads to a file of its bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import msgspec.inspect


def paths_in(value: Any, type_info: msgspec.inspect.Type, field: str) -> Iterator[tuple[str, str]]:
    """Every path that stands anywhere in ``value``, with the name of its field: what its type calls ``BundlePath``."""
    match type_info:
        case msgspec.inspect.Metadata(extra={"path": True}):
            yield field, value
        case msgspec.inspect.StructType(fields=fields):
            for member in fields:
                yield from paths_in(getattr(value, member.name), member.type, f"{field}.{member.name}")
        case msgspec.inspect.UnionType(types=types):
            for some_type in types if value is not None else ():
                yield from paths_in(value, some_type, field)
        case msgspec.inspect.VarTupleType(item_type=item_type):
            for item in value:
                yield from paths_in(item, item_type, field)
        case msgspec.inspect.DictType(key_type=key_type, value_type=value_type):
            for key, item in value.items():
                yield from paths_in(key, key_type, field)
                yield from paths_in(item, value_type, f"{field}.{key}")
        case _:
            pass


def lies_inside(bundle: Path, root: Path, name: str) -> bool:
    """Whether ``name`` is a path as docs/reference/bundle.md has them, and leads nowhere else, not even by a symbolic
    link. ``root``: ``bundle`` as it is where no link is left."""
    path = PurePosixPath(name)
    is_plain = bool(path.parts) and str(path) == name and not {"\\", "\0"} & set(name)
    if not is_plain or path.is_absolute() or ".." in path.parts:
        return False
    try:
        return (bundle / name).resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # links in a circle
        return False
