"""Frames at random for hypothesis: bytes as they come, and bytes that an attacker sealed, which reach the parser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
from hypothesis import strategies as st

from dlora.protocol.errors import DamagedFrameError, RemoteProtocolError
from dlora.protocol.frames import ALIGNMENT, HEADER_BLOCK, PREFIX_BYTES, write_checksum

_NUMBERS = st.integers(0, 3) | st.sampled_from((-1, 2**31 - 1, 2**32, 2**64 - 1))
_DESCRIPTORS = st.tuples(
    st.sampled_from(("fp32", "fp16", "i32", "u8", "x")),
    st.lists(st.integers(-1, 9), max_size=3),
    st.integers(-128, 128),
)
_VALUES = st.one_of(
    _NUMBERS, st.text(max_size=5), st.binary(max_size=5), _DESCRIPTORS, st.lists(_DESCRIPTORS, max_size=2)
)
_NAMES = st.sampled_from(("step", "micro_batch", "group", "mode", "hidden_states", "deltas", "units", "ticket", "code"))


def _of_header(header: bytes, tail: bytes) -> bytes:
    """A frame that is right as far as it can be without knowing what is in ``header``: length, padding, checksum."""
    start = len(header).to_bytes(4, "little") + bytes(PREFIX_BYTES - 4) + header
    padded = start.ljust(-(-len(start) // HEADER_BLOCK) * HEADER_BLOCK, b"\0")
    return bytes(write_checksum(bytearray(padded + tail)))


def _headers(types: Sequence[str]) -> st.SearchStrategy[bytes]:
    maps = st.builds(
        lambda kind, fields: msgspec.msgpack.encode({"type": kind, **fields}),
        st.sampled_from(types), st.dictionaries(_NAMES, _VALUES, max_size=4),
    )  # fmt: skip
    return st.binary(max_size=80) | maps


def _changed(frame: bytes, changes: Sequence[tuple[int, int]], cut: int) -> bytes:
    changed = bytearray(frame)
    for where, value in changes:
        changed[where % len(changed)] = value
    return bytes(write_checksum(changed[: max(PREFIX_BYTES, len(changed) - cut)]))


def frames(valid: Sequence[bytes], types: Sequence[str]) -> st.SearchStrategy[bytes]:
    """Half of them without a checksum that fits; the others sealed: made up, or of ``valid`` ones with changes."""
    tails = st.integers(0, 3).flatmap(
        lambda blocks: st.binary(min_size=blocks * ALIGNMENT, max_size=blocks * ALIGNMENT)
    )
    made_up = st.builds(_of_header, _headers(types), tails)
    changes = st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=3)
    changed = st.builds(_changed, st.sampled_from(valid), changes, st.sampled_from((0, 0, 0, 1, ALIGNMENT)))
    unsealed = st.binary(max_size=700)
    return st.one_of(unsealed, unsealed, made_up, changed)


@dataclass
class Reached:
    """How far frames came: past the checksum, and to the parser of headers at least."""

    past_checksum: int = 0
    parsed: int = 0

    def count(self, read: Callable[[], object]) -> bool:
        """Whether ``read`` took its frame; raises what is not a documented error."""
        try:
            read()
        except DamagedFrameError:
            return False
        except RemoteProtocolError as error:
            self.past_checksum += 1
            self.parsed += str(error).startswith("malformed header")
            return False
        self.past_checksum += 1
        self.parsed += 1
        return True
