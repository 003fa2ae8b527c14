"""What a run of the tests tries of what is too much to try each time: another part each day.

The day is in the first lines of each run, and ``DLORA_TEST_DAY`` sets it: so a run can be had again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, TypeVar

Each = TypeVar("Each")

# Set in the environment as well, as test processes must agree that were started before and after midnight.
DAY: Final = int(os.environ.setdefault("DLORA_TEST_DAY", str(datetime.now(UTC).date().toordinal())))


def one_in(parts: int, all_of_them: Sequence[Each], other: int = 0) -> Sequence[Each]:
    """One in ``parts`` of them, today's; ``other`` shifts which."""
    return all_of_them[(DAY + other) % parts :: parts]
