"""How long a server waits for its devices, and what it remembers of each for longer than a session lasts.

A device that is too slow for its deadlines loses its session and opens another, where it runs the same micro-batch
again. Deadlines that began anew with each session would end it at the same place for ever.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, fields
from typing import Final

from dlora.cloud.admission.access import Caller
from dlora.protocol.deadline import Deadline
from dlora.protocol.errors import UsageError

MAX_DEVICES: Final = 4096
MAX_WAIT_S: Final = 365 * 86_400.0  # a lock cannot wait for ever, nor for a number that is none


@dataclass(frozen=True)
class SessionTimeouts:
    """How long a session waits for its device, in seconds. Raises ``UsageError`` where that cannot be.

    Attributes:
        exchange_s: least time for one answer within a micro-batch; a device that was slower before gets more.
        step_s: least time for all answers of a micro-batch together, likewise.
        idle_s: between micro-batches.
        park_s: without a connection; 0 is allowed.
    """

    exchange_s: float = 120.0
    step_s: float = 900.0
    idle_s: float = 3600.0
    park_s: float = 120.0

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not (0 < value <= MAX_WAIT_S or (value == 0 and limit.name == "park_s")):
                text = f"the timeout {limit.name} must be above 0 and at most {MAX_WAIT_S:.0f} s, a year, not {value}"
                raise UsageError(text)


@dataclass(frozen=True)
class Deadlines:
    """One device's, within a micro-batch: of one answer, and of all answers together."""

    one_answer: Deadline
    all_answers: Deadline


@dataclass(frozen=True)
class DeviceDeadlines:
    """The deadlines of the devices that opened a session last, at most ``MAX_DEVICES``. For the event loop."""

    timeouts: SessionTimeouts
    _devices: OrderedDict[tuple[Caller, str], Deadlines] = field(default_factory=OrderedDict)

    def of(self, caller: Caller, device_id: str) -> Deadlines:
        """Those of a device, by its own name too: one caller may have several. Its sessions share them."""
        key = caller, device_id
        if key not in self._devices:
            self._devices[key] = Deadlines(Deadline(self.timeouts.exchange_s), Deadline(self.timeouts.step_s))
            if len(self._devices) > MAX_DEVICES:
                self._devices.popitem(last=False)
        self._devices.move_to_end(key)
        return self._devices[key]
