"""What a fuzz target is, and mutations that any of them can use.

Random bytes rarely get past a checksum or a digest. So beside raw bytes, a target changes what the bytes *mean*
(a field, a shape, a length), writes them again and seals them, as an attacker would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Final

import msgspec

INTERESTING: Final[tuple[Any, ...]] = (
    0, 1, -1, 2, 0.5, -0.0, 1e-300, 1e308, 255, 256, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63,
    2**64 - 1, "", "x", "\0", "/", "..", "../x", "a/b", "é\U0001f642", "a" * 300, "(a|a)*", "(.*)*b", "a{9}",
    None, True, False, [], {}, [[]], [0], {"a": 0}, [0, 0], [2**31, 2**31], [-1, 4],
)  # fmt: skip
_DEEP: Final = "@deep@"  # stands for arrays in arrays, deeper than any encoder would go
_DEPTH: Final = 5000


@dataclass(frozen=True)
class Target:
    """Something that reads bytes of strangers.

    Attributes:
        corpus: valid inputs to start from.
        mutate: one input made from another, its checksums written anew.
        run: read one input. Returns where it gave a value or the documented error; raises for anything else.
        sealed: an input with its checksums written anew, where it has any.
    """

    name: str
    corpus: tuple[bytes, ...]
    mutate: Callable[[bytes, Random], bytes]
    run: Callable[[bytes], None]
    sealed: Callable[[bytes], bytes] = bytes


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """Flip, cut, insert, repeat or overwrite a few bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(changed):
                changed[at] = rng.randrange(256)
            case 2:
                del changed[at : at + rng.choice((1, 4, 64, len(changed)))]
            case 3:
                changed[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
            case 4:
                changed[at:at] = changed[at : at + rng.choice((4, 64, 256))]
            case _:
                number = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, len(data)))
                changed[at : at + 4] = number.to_bytes(4, "little")
    return bytes(changed)


def mutate_value(value: Any, rng: Random) -> Any:
    """A JSON-like value with one to three places changed; ``value`` itself stays as it is."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        value = _replaced(value, rng.choice(places), rng, places)
    return value


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _places(child, (*path, key))


def _replaced(value: Any, path: tuple[Any, ...], rng: Random, places: list[tuple[Any, ...]]) -> Any:
    if not path:
        return _changed(value, rng)
    key, rest = path[0], path[1:]
    copy = dict(value) if isinstance(value, dict) else list(value)
    if not rest and rng.random() < 0.25:
        moved = copy.pop(key)
        if rng.random() < 0.5 and isinstance(copy, dict):
            other = rng.choice(places) or ("x",)
            copy[rng.choice((f"{key}x", str(other[-1]), ""))] = moved
        return copy
    copy[key] = _replaced(copy[key], rest, rng, places)
    return copy


def _changed(value: Any, rng: Random) -> Any:
    if rng.random() < 0.02:
        return _DEEP
    if rng.random() < 0.5:
        return rng.choice(INTERESTING)
    match value:
        case bool():
            return not value
        case int() | float():
            return rng.choice((value + 1, value - 1, -value, value * 2, value / 2, value * 2**31))
        case str():
            return mutate_bytes(value.encode(), rng).decode(errors="replace")
        case bytes():
            return mutate_bytes(value, rng)
        case list() if value:
            return [*value, rng.choice(value)] if rng.random() < 0.5 else rng.sample(value, len(value))
        case _:
            return [value]


def decode_json(raw: bytes) -> Any:
    """A JSON value. Raises ``ValueError`` for anything that is none."""
    return _decoded(msgspec.json.decode, raw)


def decode_msgpack(raw: bytes) -> Any:
    """A msgpack value. Raises ``ValueError`` for anything that is none."""
    return _decoded(msgspec.msgpack.decode, raw)


def _decoded(decode: Callable[[bytes], Any], raw: bytes) -> Any:
    try:
        return decode(raw)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise ValueError(str(error)) from None


def encode_json(value: Any) -> bytes:
    """A mutated value as JSON."""
    return msgspec.json.encode(value).replace(msgspec.json.encode(_DEEP), b"[" * _DEPTH + b"]" * _DEPTH)


def encode_msgpack(value: Any) -> bytes:
    """A mutated value as msgpack."""
    return msgspec.msgpack.encode(value).replace(msgspec.msgpack.encode(_DEEP), b"\x91" * _DEPTH + b"\x90")


def join(first: bytes, rest: bytes) -> bytes:
    """Two parts of an input as one."""
    return len(first).to_bytes(4, "little") + first + rest


def split(data: bytes) -> tuple[bytes, bytes]:
    """The two parts of an input; whatever the bytes, there are two."""
    length = int.from_bytes(data[:4], "little")
    return data[4 : 4 + length], data[4 + length :]
