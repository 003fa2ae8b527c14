"""--pause-when: the rules, their margins, and waiting."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlora.edge.run import pause
from dlora.edge.run.pause import POLL_S, Battery, PauseRule, PauseRules, SystemSensors, wait_while_paused
from dlora.protocol.errors import StorageError, UsageError


@dataclass
class FakeSensors:
    """Sensors that say what a test lets them."""

    charge: Battery | None = None
    celsius: float | None = None
    memory: float | None = None
    costly: bool | None = None

    def battery(self) -> Battery | None:
        return self.charge

    def temperature_c(self) -> float | None:
        return self.celsius

    def available_memory(self) -> float | None:
        return self.memory

    def metered(self) -> bool | None:
        return self.costly


def _on_battery(percent: float) -> FakeSensors:
    return FakeSensors(charge=Battery(percent, plugged=False))


# -- the grammar -----------------------------------------------------------------------------------------


def test_rules_come_repeated_or_with_commas_and_keep_their_order() -> None:
    rules = PauseRules.parse(["metered, memory < 1.5GB", "temperature>80°C,battery<20%,"])
    assert [rule.text for rule in rules.rules] == ["metered", "memory < 1.5GB", "temperature>80°C", "battery<20%"]
    assert [rule.threshold for rule in rules.rules] == [0, 1.5e9, 80, 20]


@pytest.mark.parametrize(
    "text",
    [
        "charge<20", "battery", "battery<", "battery>20", "battery<-1", "battery<20MB", "battery<101", "battery<0",
        "temperature<80", "temperature>80F", "temperature>nan", "temperature>1e3", "memory<200", "memory<0MB",
        "memory<99999999999999999GB", "metered<1", "metered=yes", "battery=<20", "battery<20 temperature>80",
    ],
)  # fmt: skip
def test_invalid_rule_is_refused_with_the_known_rules(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        PauseRules.parse(["battery<20", text])
    assert text in str(refused.value)
    assert pause.GRAMMAR in str(refused.value)
    assert "\n" not in str(refused.value)


@given(st.text(max_size=20))
def test_any_text_is_a_rule_or_a_usage_error(text: str) -> None:
    with suppress(UsageError):
        PauseRules.parse([text])


# -- when a rule holds -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "sensors", "reason"),
    [
        ("battery<20", _on_battery(14), "battery at 14 % (below 20 %) and not charging"),
        ("battery<20", _on_battery(20), None),
        ("battery<20", FakeSensors(charge=Battery(14, plugged=True)), None),
        ("temperature>80", FakeSensors(celsius=83.5), "temperature at 83.5 °C (above 80 °C)"),
        ("temperature>80", FakeSensors(celsius=80), None),
        ("memory<200MB", FakeSensors(memory=150e6), "150.0 MB of memory available (below 200 MB)"),
        ("memory<200MB", FakeSensors(memory=200e6), None),
        ("metered", FakeSensors(costly=True), "the network is metered"),
        ("metered", FakeSensors(costly=False), None),
    ],
)
def test_rule_gives_its_reason(rule: str, sensors: FakeSensors, reason: str | None) -> None:
    assert PauseRules.parse([rule]).reason(sensors) == reason


def test_reason_is_of_the_first_rule_that_holds() -> None:
    rules = PauseRules.parse(["battery<20,temperature>80,metered"])
    assert rules.reason(FakeSensors(celsius=90, costly=True)) == "temperature at 90 °C (above 80 °C)"
    assert rules.reason(FakeSensors(celsius=20, costly=True)) == "the network is metered"


def test_rule_without_sensor_never_holds_and_gives_a_warning() -> None:
    rules = PauseRules.parse(["battery<20,memory<1MB,metered"])
    sensors = FakeSensors(memory=5e8)
    assert rules.reason(sensors) is None
    warning = rules.warning(sensors)
    assert warning is not None
    assert "battery<20,metered:" in warning
    assert "memory" not in warning
    assert rules.warning(FakeSensors(charge=Battery(50, plugged=True), memory=5e8, costly=False)) is None


# -- margins ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Margin:
    """A rule, its sensor, where it starts to hold and where it lets go."""

    rule: str
    sensors: Callable[[float], FakeSensors]
    starts: float
    ends: float


MARGINS = {
    "battery": Margin("battery<20", _on_battery, 20, 23),
    "temperature": Margin("temperature>80", lambda celsius: FakeSensors(celsius=celsius), 80, 75),
    "memory": Margin("memory<200MB", lambda size: FakeSensors(memory=size), 200e6, 220e6),
}


def _states(margin: Margin, values: list[float]) -> Iterator[tuple[float, bool, bool]]:
    """For each value: whether the rule held before, and whether it holds now."""
    rules = PauseRules.parse([margin.rule])
    held: dict[PauseRule, str] = {}
    for value in values:
        before = bool(held)
        held = rules.holding_rules(margin.sensors(value), held)
        yield value, before, bool(held)


@pytest.mark.parametrize("margin", MARGINS.values(), ids=MARGINS)
@given(data=st.data())
def test_rule_holds_until_clear_of_the_threshold(margin: Margin, data: st.DataObject) -> None:
    side = 1 if margin.starts < margin.ends else -1
    values = data.draw(st.lists(st.floats(margin.starts * 0.7, margin.starts * 1.3)))
    for value, before, now in _states(margin, values):
        if now and not before:
            assert side * value < side * margin.starts
        if before and not now:
            assert side * value >= side * margin.ends - 1e-6


@pytest.mark.parametrize("margin", MARGINS.values(), ids=MARGINS)
@given(data=st.data())
def test_small_changes_do_not_switch_a_rule(margin: Margin, data: st.DataObject) -> None:
    width = abs(margin.ends - margin.starts) * 0.99
    low = data.draw(st.floats(margin.starts * 0.7, margin.starts * 1.3))
    values = data.draw(st.lists(st.floats(low, low + width)))
    assert sum(before != now for _, before, now in _states(margin, values)) <= 1


def test_a_full_battery_always_ends_the_pause() -> None:
    rules = PauseRules.parse(["battery<99"])
    held = rules.holding_rules(_on_battery(50))
    assert rules.holding_rules(_on_battery(99.5), held)
    assert not rules.holding_rules(_on_battery(100), held)


def test_mains_power_ends_the_pause_at_once() -> None:
    rules = PauseRules.parse(["battery<20"])
    assert not rules.holding_rules(FakeSensors(charge=Battery(5, plugged=True)), rules.holding_rules(_on_battery(5)))


def test_the_margin_is_only_for_the_rule_that_held() -> None:
    rules = PauseRules.parse(["battery<20,temperature>80"])
    held = rules.holding_rules(FakeSensors(charge=Battery(10, plugged=False), celsius=78))
    assert [rule.text for rule in held] == ["battery<20"]
    assert not rules.holding_rules(FakeSensors(charge=Battery(30, plugged=False), celsius=78), held)


def test_sensor_without_reading_keeps_the_state() -> None:
    rules = PauseRules.parse(["metered"])
    assert not rules.holding_rules(FakeSensors(costly=None))
    assert rules.holding_rules(FakeSensors(costly=None), rules.holding_rules(FakeSensors(costly=True)))


# -- waiting ---------------------------------------------------------------------------------------------


@dataclass
class Waiting:
    """A wait in which the sensors say one thing after the other, one at each look; records what happened."""

    readings: list[FakeSensors]
    rule: str = "battery<20,temperature>80"
    stop_after_s: float = float("inf")
    slept_s: float = 0.0
    log: list[str] = field(default_factory=list)

    def run(self, on_pause: Callable[[], None] | None = None) -> None:
        readings = iter(self.readings)
        rules = PauseRules.parse([self.rule])
        sensors = FakeSensors()

        def look() -> None:
            sensors.__dict__.update(next(readings).__dict__)

        def sleep(seconds: float) -> None:
            self.slept_s += seconds
            if self.slept_s % POLL_S == 0:
                look()

        look()
        wait_while_paused(
            rules,
            sensors,
            say=self.log.append,
            should_stop=lambda: self.slept_s >= self.stop_after_s,
            on_pause=on_pause,
            sleep=sleep,
        )


def test_no_pause_where_no_rule_holds() -> None:
    waiting = Waiting([_on_battery(50)])
    waiting.run(on_pause=lambda: waiting.log.append("saved"))
    assert waiting.log == []
    assert waiting.slept_s == 0


def test_pause_prints_its_reason_saves_once_and_ends() -> None:
    waiting = Waiting([_on_battery(14), _on_battery(19), _on_battery(22), _on_battery(23)])
    waiting.run(on_pause=lambda: waiting.log.append("saved"))
    assert waiting.log == [
        "paused: battery at 14 % (below 20 %) and not charging; goes on by itself",
        "saved",
        "going on: nothing to pause for any more",
    ]
    assert waiting.slept_s == 3 * POLL_S


def test_pause_prints_a_changed_reason() -> None:
    hot = FakeSensors(charge=Battery(90, plugged=False), celsius=90)
    waiting = Waiting([_on_battery(14), hot, hot, FakeSensors(celsius=70)])
    waiting.run()
    assert waiting.log[1:] == [
        "still paused: temperature at 90 °C (above 80 °C)",
        "going on: nothing to pause for any more",
    ]


def test_stop_request_ends_the_pause_at_once() -> None:
    waiting = Waiting([_on_battery(14)], stop_after_s=1.0)
    waiting.run()
    assert waiting.slept_s == 1.0
    assert len(waiting.log) == 1


def test_earlier_stop_request_prevents_the_pause() -> None:
    waiting = Waiting([_on_battery(14)], stop_after_s=0.0)
    waiting.run()
    assert waiting.slept_s == 0


def test_failed_save_ends_the_pause() -> None:
    def fail() -> None:
        raise StorageError("full")

    waiting = Waiting([_on_battery(14)])
    with pytest.raises(StorageError):
        waiting.run(on_pause=fail)
    assert waiting.slept_s == 0


# -- this system's sensors -------------------------------------------------------------------------------


def test_sensors_of_this_machine_are_read_without_error() -> None:
    sensors = SystemSensors()
    assert (sensors.available_memory() or 0) > 0
    PauseRules.parse(["battery<20,temperature>80,memory<1MB,metered"]).warning(sensors)


@pytest.mark.parametrize(("plugged", "expected"), [(True, True), (False, False), (None, False)])
def test_battery_is_read_from_psutil(monkeypatch: pytest.MonkeyPatch, plugged: bool | None, expected: bool) -> None:
    found = SimpleNamespace(percent=41.5, power_plugged=plugged)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: found, raising=False)
    assert SystemSensors().battery() == Battery(41.5, expected)


def test_the_hottest_plausible_sensor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: [SimpleNamespace(current=celsius)] for name, celsius in
             {"cpu": 71.0, "disk": 44.0, "unconnected": 127.5, "absent": 0.0}.items()}  # fmt: skip
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: found, raising=False)
    assert SystemSensors().temperature_c() == 71


@pytest.mark.parametrize("trouble", [None, FileNotFoundError("/sys/class/power_supply")])
def test_a_sensor_that_is_missing_or_fails_is_none(monkeypatch: pytest.MonkeyPatch, trouble: OSError | None) -> None:
    def fail() -> Any:
        assert trouble is not None
        raise trouble

    for name in ("sensors_battery", "sensors_temperatures", "virtual_memory"):
        if trouble is None:
            monkeypatch.delattr(psutil, name, raising=False)
        else:
            monkeypatch.setattr(psutil, name, fail, raising=False)
    sensors = SystemSensors()
    assert (sensors.battery(), sensors.temperature_c(), sensors.available_memory()) == (None, None, None)


OLD_NMCLI = 'case "$*" in *general*) exit 2;; esac\n'


@pytest.fixture
def nmcli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a program ``nmcli`` with these shell lines first on the path; gives the file that counts its calls."""

    def install(script: str) -> Path:
        calls = tmp_path / "calls"
        program = tmp_path / "nmcli"
        program.write_text(f'#!/bin/sh\necho "$LC_ALL $*" >> {calls}\n{script}\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return calls

    return install


@pytest.mark.parametrize(
    ("script", "metered"),
    [
        ("echo yes", True),
        ("echo 'yes (guessed)'", True),
        ("echo 'no (guessed)'", False),
        ("echo unknown", False),
        (OLD_NMCLI + "printf 'GENERAL.METERED:no\\n\\nGENERAL.METERED:yes (guessed)\\n'", True),
        (OLD_NMCLI + "printf 'GENERAL.METERED:no\\n\\nGENERAL.METERED:unknown\\n'", False),
        ("echo 'Error: NetworkManager is not running.' >&2; exit 8", None),
    ],
)
def test_metered_is_read_from_network_manager(nmcli: Callable[[str], Path], script: str, metered: bool | None) -> None:
    calls = nmcli(script)
    assert SystemSensors().metered() is metered
    assert calls.read_text().startswith("C -t -f METERED general\n")


def test_metered_is_unknown_without_network_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert SystemSensors().metered() is None


def test_network_manager_call_has_a_timeout(
    nmcli: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    nmcli("exec sleep 60")
    monkeypatch.setattr(pause, "_NMCLI_TIMEOUT_S", 0.05)
    assert SystemSensors().metered() is None


def test_metered_is_read_at_most_every_ten_seconds(nmcli: Callable[[str], Path]) -> None:
    calls = nmcli("echo yes")
    steps = iter((0.0, 3.0, 9.9, 10.0, 12.0))
    sensors = SystemSensors(clock=lambda: next(steps))
    assert all(sensors.metered() for _ in range(5))
    assert len(calls.read_text().splitlines()) == 2
