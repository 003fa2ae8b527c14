"""What a server has done since it started, over all sessions: plain numbers, which ``metrics.py`` shows.

They are always counted: each takes less than a microsecond, and nothing of Prometheus is loaded for it. What stands
somewhere else already (how many sessions there are, how much memory is taken) is read there.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Final, get_args

from dlora.protocol import messages as m

OTHER: Final = "other"
KINDS: Final[dict[type[m.Message], str]] = {kind: kind.__struct_config__.tag for kind in get_args(m.AnyMessage)}
"""Of messages, by what the wire calls them: ``group_input``."""
_BOUNDS_S: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Count:
    """A number that only grows, for each of a few labels. Any thread may add to it.

    Args:
        labels: all there are; what is counted under another counts as ``OTHER``, which is one of them then.

    Attributes:
        values: so far, by label.
        operations: how often something was added.
    """

    def __init__(self, *labels: str) -> None:
        self.values: dict[str, float] = dict.fromkeys(labels or ("",), 0)
        self.operations = 0
        self._lock = threading.Lock()

    def add(self, amount: float = 1, label: str = "") -> None:
        """Below 0 counts as 0: a difference of times may be, by rounding, and Prometheus would see a restart."""
        with self._lock:
            self.values[label if label in self.values else OTHER] += max(0, amount)
            self.operations += 1


class Waits:
    """How often something was waited for, and for how long. Any thread may add to it.

    Attributes:
        seconds: of all together.
        operations: how often.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.operations = 0
        self._counts = [0] * (len(_BOUNDS_S) + 1)
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        with self._lock:
            self._counts[bisect.bisect_left(_BOUNDS_S, seconds)] += 1
            self.seconds += max(0.0, seconds)
            self.operations += 1

    def up_to(self) -> Iterable[tuple[str, int]]:
        """How many took at most so many seconds, as text; the last is ``+Inf``."""
        total = 0
        for bound, count in zip((*map(str, _BOUNDS_S), "+Inf"), tuple(self._counts), strict=True):
            total += count
            yield bound, total


def _bytes() -> Count:
    return Count(*KINDS.values(), OTHER)


@dataclass(frozen=True)
class Counts:
    """All of it.

    Attributes:
        steps: that devices have reported; tokens: of micro-batches that began, by mode.
        received, sent: bytes of frames, by kind of message; ``OTHER`` is what came twice.
        waited_s: seconds that micro-batches waited for their device, or until its quota let them begin.
        gate_waits: each time that one waited for its turn to compute.
        guessed, right: tokens that the server guessed, once the device has gone on from them or from others; and of
            these the right ones.
        opened, resumed: sessions; ended: by why.
        refusals: by ``ErrorCode``, beside those that ``Guard`` counts.
    """

    steps: Count = field(default_factory=Count)
    tokens: Count = field(default_factory=lambda: Count(*get_args(m.Mode)))
    received: Count = field(default_factory=_bytes)
    sent: Count = field(default_factory=_bytes)
    waited_s: Count = field(default_factory=lambda: Count("device", "quota"))
    gate_waits: Waits = field(default_factory=Waits)
    guessed: Count = field(default_factory=Count)
    right: Count = field(default_factory=Count)
    opened: Count = field(default_factory=Count)
    resumed: Count = field(default_factory=Count)
    ended: Count = field(default_factory=lambda: Count("closed", "away", "evicted", "gave_up", "refused", "internal"))
    refusals: Count = field(default_factory=lambda: Count(*m.ErrorCode, OTHER))

    @property
    def operations(self) -> int:
        """How often something was counted: what a step adds, times what ``Count.add`` takes, is what counting costs."""
        return sum(getattr(self, each.name).operations for each in fields(self))
