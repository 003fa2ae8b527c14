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
from dataclasses import dataclass
from typing import Any, Final

from dlora.protocol.errors import UsageError

POLL_S: Final = 10.0
GRAMMAR: Final = "battery<PERCENT, temperature>CELSIUS, memory<SIZE (200MB, 2GB), metered"

_STOP_CHECK_S: Final = 0.5  # how long Ctrl-C may go unnoticed
_METERED_EVERY_S: Final = 10.0
_NMCLI_TIMEOUT_S: Final = 2.0
_PLAUSIBLE_C: Final = (0.0, 120.0)  # inputs of a sensor chip that lead nowhere read 0, 127 or 255
_RULE: Final = re.compile(r"([a-z]+)\s*(?:([<>])\s*(\d+(?:\.\d+)?)\s*(%|°?C|[MG]B)?)?")

Sensors = Callable[[str], float | None]
"""What a device says of itself, by the name of a rule: a battery's charge in percent, which is infinite on mains power;
the °C of its hottest sensor; bytes of memory that programs can still take; 1 or 0, whether the network is paid for by
volume. None for what it cannot say."""


@dataclass(frozen=True)
class _Gauge:
    """When a kind of rule holds, and how it is worded.

    Attributes:
        sign: "<" where the rule holds below its threshold, ">" or nothing above.
        units: what may follow the number, and its factor.
        thresholds: the lowest and highest that make sense.
        release_threshold: from a threshold, the one at which a rule that holds lets go.
        sentence: from value and threshold, why training pauses.
    """

    sign: str
    units: dict[str, float]
    thresholds: tuple[float, float]
    release_threshold: Callable[[float], float]
    sentence: Callable[[float, float], str]


_GAUGES: Final = {
    "battery": _Gauge(
        sign="<",
        units={"": 1, "%": 1},
        thresholds=(1, 100),
        release_threshold=lambda percent: min(percent + 3, 100),
        sentence=lambda now, limit: f"battery at {now:.3g} % (below {limit:g} %) and not charging",
    ),
    "temperature": _Gauge(
        sign=">",
        units={"": 1, "C": 1, "°C": 1},
        thresholds=(10, 120),
        release_threshold=lambda celsius: celsius - 5,
        sentence=lambda now, limit: f"temperature at {now:.4g} °C (above {limit:g} °C)",
    ),
    "memory": _Gauge(
        sign="<",
        units={"MB": 1e6, "GB": 1e9},
        thresholds=(1e6, 1e15),
        release_threshold=lambda size: size * 1.1,
        sentence=lambda now, limit: f"{now / 1e6:,.1f} MB of memory available (below {limit / 1e6:,.10g} MB)",
    ),
    "metered": _Gauge(
        sign="",
        units={"": 1},
        thresholds=(0, 0),
        release_threshold=lambda nothing: nothing,
        sentence=lambda now, limit: "the network is metered",
    ),
}


@dataclass(frozen=True)
class PauseRule:
    """One rule, with its text as it was written: ``battery<20``; and what it measures."""

    text: str
    name: str
    threshold: float

    @classmethod
    def parse(cls, text: str) -> PauseRule:
        """Raises ``UsageError`` that says what is known."""
        match = _RULE.fullmatch(text)
        gauge = _GAUGES.get(match[1]) if match else None
        if match is None or gauge is None or (match[2] or "") != gauge.sign:
            raise UsageError(f"--pause-when {text!r} is not known; known are {GRAMMAR}")
        factor = gauge.units.get(match[4] or "")
        threshold = float(match[3] or 0) * (factor or 0)
        lowest, highest = gauge.thresholds
        if factor is None or not lowest <= threshold <= highest:
            raise UsageError(f"--pause-when {text!r}: threshold or unit not allowed; write {GRAMMAR}")
        return cls(text, match[1], threshold)

    def reason(self, sensors: Sensors, *, held: bool = False) -> str | None:
        """Why training pauses by this rule, as a sentence; None where it does not hold.

        Args:
            held: whether it held at the last look. It then holds up to its margin, and while its sensor is silent.
        """
        now, gauge = sensors(self.name), _GAUGES[self.name]
        if now is None:
            return f"{self.text} held, and its sensor is silent now" if held else None
        limit = gauge.release_threshold(self.threshold) if held else self.threshold
        holds = now < limit if gauge.sign == "<" else now > limit
        return gauge.sentence(now, limit) if holds else None


@dataclass(frozen=True)
class PauseRules:
    """All rules of a run, in the order of the command line."""

    rules: tuple[PauseRule, ...]

    @classmethod
    def parse(cls, texts: Iterable[str]) -> PauseRules:
        """From texts such as ``battery<20,metered``. Raises ``UsageError`` that says what is known."""
        parts = (part.strip() for text in texts for part in text.split(","))
        return cls(tuple(PauseRule.parse(part) for part in parts if part))

    def holding_rules(self, sensors: Sensors, held: Container[PauseRule] = ()) -> dict[PauseRule, str]:
        """The rules that hold now and why, in order; ``held`` are those that held at the last look."""
        found = {rule: rule.reason(sensors, held=rule in held) for rule in self.rules}
        return {rule: reason for rule, reason in found.items() if reason is not None}

    def warning(self, sensors: Sensors) -> str | None:
        """One line about the rules that can never hold here, for want of a sensor; None where there are none."""
        without_sensor = [rule.text for rule in self.rules if sensors(rule.name) is None]
        if not without_sensor:
            return None
        return f"--pause-when {','.join(without_sensor)}: this device has no such sensor, training never pauses for it"


def wait_while_paused(
    rules: PauseRules,
    sensors: Sensors,
    *,
    say: Callable[[str], None],
    should_stop: Callable[[], bool],
    on_pause: Callable[[], None],
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

    def __call__(self, name: str) -> float | None:
        if name == "metered":
            now = self._clock()
            if now - self._asked_at >= _METERED_EVERY_S:
                self._metered = _ask_network_manager()
                self._asked_at = now
            return self._metered
        import psutil  # slow to load, and most runs have no rules

        try:
            return _READ[name](psutil)
        except (AttributeError, NotImplementedError, OSError, ValueError, psutil.Error):
            return None  # this system lacks it, or refuses


def _charge(psutil: Any) -> float | None:
    battery = psutil.sensors_battery()
    if battery is None:
        return None
    # psutil does not know the mains in every device; unknown counts as unplugged, to be on the safe side.
    return math.inf if battery.power_plugged else float(battery.percent)


def _hottest_c(psutil: Any) -> float | None:
    """psutil falls back to /sys/class/thermal by itself where there is no hwmon."""
    low, high = _PLAUSIBLE_C
    readings = (reading.current for sensor in (psutil.sensors_temperatures() or {}).values() for reading in sensor)
    return max((celsius for celsius in readings if low < celsius < high), default=None)


_READ: Final[dict[str, Callable[[Any], float | None]]] = {
    "battery": _charge,
    "temperature": _hottest_c,
    "memory": lambda psutil: float(psutil.virtual_memory().available),
}


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
