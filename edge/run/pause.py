"""Pausing between steps while the device has better things to do: low battery, heat, little memory, costly network.

A rule that holds keeps holding until its value is clear of the threshold by a margin, so that training does not
start and stop at every poll.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

from dlora.protocol.errors import UsageError

POLL_S: Final = 10.0
GRAMMAR: Final = "battery<PERCENT, temperature>CELSIUS, memory<SIZE (200MB, 2GB), metered"
HELP: Final = (
    f"Pause between steps while one of these holds, and go on by itself: {GRAMMAR}. "
    "Several with commas, or the option again; quote it, < and > mean something to the shell."
)

_STOP_CHECK_S: Final = 0.5  # how long Ctrl-C may go unnoticed
_METERED_EVERY_S: Final = 10.0
_NMCLI_TIMEOUT_S: Final = 2.0
_PLAUSIBLE_C: Final = (0.0, 120.0)  # inputs of a sensor chip that lead nowhere read 0, 127 or 255
_RULE: Final = re.compile(r"([a-z]+)\s*(?:([<>])\s*(\d+(?:\.\d+)?)\s*(%|°?C|[MG]B)?)?")
_BYTES: Final = {"MB": 1e6, "GB": 1e9}


class Battery(NamedTuple):
    """A battery's charge in percent, and whether the device is on mains power."""

    percent: float
    plugged: bool


class Sensors(Protocol):
    """What a device can say of itself; None for what it cannot."""

    def battery(self) -> Battery | None: ...

    def temperature_c(self) -> float | None:
        """The hottest sensor, in °C."""

    def available_memory(self) -> float | None:
        """What programs can still take without swapping, in bytes."""

    def metered(self) -> bool | None:
        """Whether the network is paid for by volume."""


@dataclass(frozen=True)
class _Gauge:
    """What a kind of rule measures, when it holds and how it is worded.

    Attributes:
        sign: "<" where the rule holds below its threshold, ">" above.
        units: what may follow the number, and its factor.
        thresholds: the lowest and highest that make sense.
        read: the value now.
        release_threshold: from a threshold, the one at which a rule that holds lets go.
        sentence: from value and threshold, why training pauses.
    """

    sign: str
    units: dict[str, float]
    thresholds: tuple[float, float]
    read: Callable[[Sensors], float | None]
    release_threshold: Callable[[float], float]
    sentence: Callable[[float, float], str]


def _charge(sensors: Sensors) -> float | None:
    battery = sensors.battery()
    if battery is None:
        return None
    return math.inf if battery.plugged else battery.percent  # mains power never runs low


_GAUGES: Final = {
    "battery": _Gauge(
        sign="<",
        units={"": 1, "%": 1},
        thresholds=(1, 100),
        read=_charge,
        release_threshold=lambda percent: min(percent + 3, 100),
        sentence=lambda now, limit: f"battery at {now:.3g} % (below {limit:g} %) and not charging",
    ),
    "temperature": _Gauge(
        sign=">",
        units={"": 1, "C": 1, "°C": 1},
        thresholds=(10, 120),
        read=lambda sensors: sensors.temperature_c(),
        release_threshold=lambda celsius: celsius - 5,
        sentence=lambda now, limit: f"temperature at {now:.4g} °C (above {limit:g} °C)",
    ),
    "memory": _Gauge(
        sign="<",
        units=_BYTES,
        thresholds=(1e6, 1e15),
        read=lambda sensors: sensors.available_memory(),
        release_threshold=lambda size: size * 1.1,
        sentence=lambda now, limit: f"{now / 1e6:,.1f} MB of memory available (below {limit / 1e6:,.10g} MB)",
    ),
    "metered": _Gauge(
        sign="",
        units={"": 1},
        thresholds=(0, 0),
        read=lambda sensors: sensors.metered(),
        release_threshold=lambda nothing: nothing,
        sentence=lambda now, limit: "the network is metered",
    ),
}


@dataclass(frozen=True)
class PauseRule:
    """One rule, with its text as it was written: ``battery<20``."""

    text: str
    threshold: float
    gauge: _Gauge = field(compare=False)

    def reason(self, sensors: Sensors, *, held: bool = False) -> str | None:
        """Why training pauses by this rule, as a sentence; None where it does not hold.

        Args:
            held: whether it held at the last look. It then holds up to its margin, and while its sensor is silent.
        """
        now = self.gauge.read(sensors)
        if now is None:
            return f"{self.text} held, and its sensor is silent now" if held else None
        limit = self.gauge.release_threshold(self.threshold) if held else self.threshold
        holds = now < limit if self.gauge.sign == "<" else now > limit
        return self.gauge.sentence(now, limit) if holds else None


@dataclass(frozen=True)
class PauseRules:
    """All rules of a run, in the order of the command line."""

    rules: tuple[PauseRule, ...] = ()

    @classmethod
    def parse(cls, texts: Iterable[str]) -> PauseRules:
        """From texts such as ``battery<20,metered``. Raises ``UsageError`` that says what is known."""
        parts = (part.strip() for text in texts for part in text.split(","))
        return cls(tuple(_parse(part) for part in parts if part))

    def reason(self, sensors: Sensors) -> str | None:
        """Why training must pause now, by the first rule that holds; None where none does."""
        return next(iter(self.holding_rules(sensors).values()), None)

    def holding_rules(self, sensors: Sensors, held: Container[PauseRule] = ()) -> dict[PauseRule, str]:
        """The rules that hold now and why, in order; ``held`` are those that held at the last look."""
        found = {rule: rule.reason(sensors, held=rule in held) for rule in self.rules}
        return {rule: reason for rule, reason in found.items() if reason is not None}

    def warning(self, sensors: Sensors) -> str | None:
        """One line about the rules that can never hold here, for want of a sensor; None where there are none."""
        without_sensor = [rule.text for rule in self.rules if rule.gauge.read(sensors) is None]
        if not without_sensor:
            return None
        return f"--pause-when {','.join(without_sensor)}: this device has no such sensor, training never pauses for it"


def wait_while_paused(
    rules: PauseRules,
    sensors: Sensors,
    *,
    say: Callable[[str], None],
    should_stop: Callable[[], bool],
    on_pause: Callable[[], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Come back when no rule holds any more; at once where none holds, or where the user wants to stop.

    Returns whether there was a pause.

    Args:
        say: called with one line when a pause begins, when its reason changes, and when it is over.
        should_stop: whether the user wants to stop; asked twice a second.
        on_pause: called once when a pause begins: the time to save, the battery may be at its end.
        sleep: waits so many seconds.
    """
    reasons = rules.holding_rules(sensors)
    if not reasons:
        return False
    announced = next(iter(reasons))
    say(f"paused: {reasons[announced]}; goes on by itself")
    if on_pause is not None:
        on_pause()
    while _wait(POLL_S, should_stop, sleep):
        reasons = rules.holding_rules(sensors, held=reasons)
        if not reasons:
            say("going on: nothing to pause for any more")
            return True
        if announced not in reasons:
            announced = next(iter(reasons))
            say(f"still paused: {reasons[announced]}")
    return True


def _wait(seconds: float, should_stop: Callable[[], bool], sleep: Callable[[float], None]) -> bool:
    """Sleep in naps; False as soon as the user wants to stop. A signal does not end Python's own sleep."""
    for _ in range(round(seconds / _STOP_CHECK_S)):
        if should_stop():
            return False
        sleep(_STOP_CHECK_S)
    return not should_stop()


class SystemSensors:
    """The sensors of this device, by psutil and NetworkManager. What goes wrong in reading one is a None.

    Args:
        clock: seconds that never go back; the network is asked at most every 10 s, for it takes a process.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked_at = -math.inf
        self._metered: bool | None = None

    def battery(self) -> Battery | None:
        found = _read_or_none(lambda psutil: psutil.sensors_battery())
        # psutil does not know the mains in every device; unknown counts as unplugged, to be on the safe side.
        return None if found is None else Battery(found.percent, found.power_plugged is True)

    def temperature_c(self) -> float | None:
        """The hottest sensor, in °C; psutil falls back to /sys/class/thermal by itself where there is no hwmon."""
        found = _read_or_none(lambda psutil: psutil.sensors_temperatures()) or {}
        low, high = _PLAUSIBLE_C
        readings = (reading.current for readings in found.values() for reading in readings)
        return max((celsius for celsius in readings if low < celsius < high), default=None)

    def available_memory(self) -> float | None:
        found = _read_or_none(lambda psutil: psutil.virtual_memory())
        return None if found is None else float(found.available)

    def metered(self) -> bool | None:
        now = self._clock()
        if now - self._asked_at >= _METERED_EVERY_S:
            self._metered = _ask_network_manager()
            self._asked_at = now
        return self._metered


def _read_or_none(read: Callable[[Any], Any]) -> Any:
    """What psutil says; None for a reading that this system lacks or refuses."""
    import psutil  # slow to load, and most runs have no rules

    try:
        return read(psutil)
    except (AttributeError, NotImplementedError, OSError, ValueError, psutil.Error):
        return None


def _ask_network_manager() -> bool | None:
    """Whether the network is metered or guessed to be; None where NetworkManager is not there."""
    # The first asks for the network of the default route; nmcli that is too old for it tells of each device.
    for question in (("-f", "METERED", "general"), ("-f", "GENERAL.METERED", "device", "show")):
        try:
            answer = subprocess.run(
                ["nmcli", "-t", *question],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_NMCLI_TIMEOUT_S,
                env={**os.environ, "LC_ALL": "C"},  # else "yes" is in the user's language
                check=False,
            )
        except (OSError, ValueError, subprocess.TimeoutExpired):
            return None
        if answer.returncode == 0:
            return any(line.rpartition(":")[2].startswith("yes") for line in answer.stdout.splitlines())
    return None


def _parse(text: str) -> PauseRule:
    match = _RULE.fullmatch(text)
    gauge = _GAUGES.get(match[1]) if match else None
    if match is None or gauge is None or (match[2] or "") != gauge.sign:
        raise UsageError(f"--pause-when {text!r} is not known; known are {GRAMMAR}")
    factor = gauge.units.get(match[4] or "")
    threshold = float(match[3] or 0) * (factor or 0)
    lowest, highest = gauge.thresholds
    if factor is None or not lowest <= threshold <= highest:
        raise UsageError(f"--pause-when {text!r}: threshold or unit not allowed; write {GRAMMAR}")
    return PauseRule(text, threshold, gauge)
