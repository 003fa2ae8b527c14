"""Looks for what must never leave the device in bytes that did: text, tokens, weights, moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

WINDOW = 5  # tokens in a row; a shorter run turns up by chance
FLOATS = 6  # numbers in a row
EXPONENTS = range(-24, 25)  # an fp16 tensor of the wire is scaled by a power of two
_KEY = 12  # bytes
TOKEN_DTYPES = ("<i8", "<i4", "<u2", "u1", ">i4")


@dataclass
class Scanner:
    """Patterns to look for, each with a name that says what it is."""

    patterns: dict[bytes, str] = field(default_factory=dict)

    def add_text(self, text: str) -> None:
        for encoding in ("utf-8", "utf-16-le"):
            self.patterns[text.encode(encoding)] = f"text {text!r} as {encoding}"

    def add_tokens(self, ids: Iterable[int], name: str) -> None:
        """Every run of ``WINDOW`` tokens, in binary of any width and as JSON."""
        row = list(ids)
        assert len(row) >= WINDOW, "too short to be told from chance"
        for start in range(len(row) - WINDOW + 1):
            run = row[start : start + WINDOW]
            for dtype in (each for each in TOKEN_DTYPES if max(run) <= np.iinfo(each).max):
                self.patterns[np.array(run, dtype).tobytes()] = f"{name} as {dtype}"
            for separator in (",", ", ", " "):
                self.patterns[separator.join(map(str, run)).encode()] = f"{name} in digits"

    def add_matrix(self, matrix: npt.NDArray[np.float32], name: str) -> None:
        """The start of every row and column, as fp32 and as fp16 at any power-of-two scale."""
        for side, rows in (("row", matrix), ("column", matrix.T)):
            for index, row in enumerate(rows):
                start = row[:FLOATS]
                if len(start) < FLOATS or len(np.unique(start)) < FLOATS:
                    continue  # zeros of an adapter that has not been trained
                self.patterns[np.ascontiguousarray(start).tobytes()] = f"{name}, {side} {index}"
                for exponent in EXPONENTS:
                    with np.errstate(over="ignore"):
                        scaled = np.ldexp(start, exponent).astype(np.float16)
                    if len(np.unique(scaled)) == FLOATS and np.isfinite(scaled).all():
                        self.patterns[scaled.tobytes()] = f"{name}, {side} {index} as fp16 * 2^{exponent}"

    def find(self, places: Mapping[str, bytes]) -> Iterator[str]:
        """One line for each pattern and place where it stands."""
        short = [pattern for pattern in self.patterns if len(pattern) < _KEY]
        for place, content in places.items():
            # One look-up a pattern instead of one search: there are a hundred thousand of them.
            keys = {content[start : start + _KEY] for start in range(len(content) - _KEY + 1)}
            likely = short + [pattern for pattern in self.patterns if pattern[:_KEY] in keys]
            yield from (f"{self.patterns[pattern]} in {place}" for pattern in likely if pattern in content)
