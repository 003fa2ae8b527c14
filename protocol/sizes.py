"""Amounts of memory as people write them: ``2GB``, ``500 MB``."""

from __future__ import annotations

import re
from typing import Final

from .errors import UsageError

_SIZE: Final = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([MG]B)\s*", re.IGNORECASE)
_BYTES: Final = {"MB": 1e6, "GB": 1e9}


def parse_size(text: str, option: str) -> float:
    """Bytes, MB being 10**6 and GB 10**9 of them. Raises ``UsageError``, which names the ``option``."""
    found = _SIZE.fullmatch(text)
    size = float(found[1]) * _BYTES[found[2].upper()] if found else 0.0
    if not size:
        raise UsageError(f"{option} {text[:40]!r}: write an amount of memory as 2GB or 500MB")
    return size
