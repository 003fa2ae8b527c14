"""--pause-when: the rules, their margins, and waiting."""

from __future__ import annotations

import math
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlora.edge.run import pause
from dlora.edge.run.pause import POLL_S, PauseRule, PauseRules, SystemSensors, wait_while_paused
from dlora.protocol.errors import StorageError, UsageError

PLUGGED = math.inf  # the charge of a battery on mains power


def holding(rules: str, held: dict[PauseRule, str] | None = None, **sensors: float) -> dict[PauseRule, str]:
    """The rules that hold on a device with these sensors."""
    return PauseRules.parse([rules]).holding_rules(sensors.get, held or {})


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

ALL = "battery<20,temperature>80,metered"


@pytest.mark.parametrize(
    ("rules", "sensors", "reason"),
    [
        ("battery<20", {"battery": 14}, "battery at 14 % (below 20 %) and not charging"),
        ("battery<20", {"battery": 20}, None),
        ("battery<20", {"battery": PLUGGED}, None),
        ("temperature>80", {"temperature": 83.5}, "temperature at 83.5 °C (above 80 °C)"),
        ("temperature>80", {"temperature": 80}, None),
        ("memory<200MB", {"memory": 150e6}, "150.0 MB of memory available (below 200 MB)"),
        ("memory<200MB", {"memory": 200e6}, None),
        ("metered", {"metered": True}, "the network is metered"),
        ("metered", {"metered": False}, None),
        ("metered", {}, None),
        # The first that holds says why.
        (ALL, {"temperature": 90, "metered": True}, "temperature at 90 °C (above 80 °C)"),
        (ALL, {"temperature": 20, "metered": True}, "the network is metered"),
    ],
)
def test_rule_gives_its_reason(rules: str, sensors: dict[str, float], reason: str | None) -> None:
    assert next(iter(holding(rules, **sensors).values()), None) == reason


def test_rule_without_sensor_gives_a_warning() -> None:
    rules = PauseRules.parse(["battery<20,memory<1MB,metered"])
    warning = rules.warning({"memory": 5e8}.get)
    assert warning is not None
    assert "battery<20,metered:" in warning
    assert "memory" not in warning
    assert rules.warning({"battery": PLUGGED, "memory": 5e8, "metered": False}.get) is None


# -- margins ---------------------------------------------------------------------------------------------

# A rule, where it starts to hold, and where it lets go.
MARGINS = [("battery<20", 20, 23), ("temperature>80", 80, 75), ("memory<200MB", 200e6, 220e6)]


@pytest.mark.parametrize(("rule", "starts", "ends"), MARGINS)
@given(data=st.data())
def test_rule_holds_until_clear_of_the_threshold(rule: str, starts: float, ends: float, data: st.DataObject) -> None:
    """So that no change that is smaller than its margin switches it twice."""
    side = 1 if starts < ends else -1
    (parsed,), held = PauseRules.parse([rule]).rules, dict[PauseRule, str]()
    for value in data.draw(st.lists(st.floats(starts * 0.7, starts * 1.3))):
        before, held = bool(held), holding(rule, held, **{parsed.name: value})
        if held and not before:
            assert side * value < side * starts
        if before and not held:
            assert side * value >= side * ends - 1e-6


@pytest.mark.parametrize(
    ("rules", "before", "now", "still"),
    [
        ("battery<99", {"battery": 50}, {"battery": 99.5}, True),
        ("battery<99", {"battery": 50}, {"battery": 100}, False),  # a full battery always ends the pause
        ("battery<20", {"battery": 5}, {"battery": PLUGGED}, False),
        # The margin is only for the rule that held.
        ("battery<20,temperature>80", {"battery": 10, "temperature": 78}, {"battery": 30, "temperature": 78}, False),
        ("metered", {"metered": True}, {}, True),  # a sensor that is silent keeps the state
    ],
)
def test_what_held_goes_on_or_ends(rules: str, before: dict[str, float], now: dict[str, float], still: bool) -> None:
    held = holding(rules, **before)
    assert len(held) == 1
    assert bool(holding(rules, held, **now)) is still


# -- waiting ---------------------------------------------------------------------------------------------


def waited(
    *looks: dict[str, float], stop_after_s: float = math.inf, on_pause: Callable[[], None] | None = None
) -> tuple[float, list[str]]:
    """Wait while sensors say one thing after the other, one at each look: for how long, and what was said and done."""
    slept_s, log = 0.0, list[str]()

    def sleep(seconds: float) -> None:
        nonlocal slept_s
        slept_s += seconds

    wait_while_paused(
        PauseRules.parse(["battery<20,temperature>80"]),
        lambda name: looks[int(slept_s // POLL_S)].get(name),
        say=log.append,
        should_stop=lambda: slept_s >= stop_after_s,
        on_pause=on_pause or (lambda: log.append("saved")),
        sleep=sleep,
    )
    return slept_s, log


def test_no_pause_where_no_rule_holds() -> None:
    assert waited({"battery": 50}) == (0, [])


def test_pause_prints_its_reason_saves_once_and_ends() -> None:
    slept_s, log = waited({"battery": 14}, {"battery": 19}, {"battery": 22}, {"battery": 23})
    assert log == [
        "paused: battery at 14 % (below 20 %) and not charging; goes on by itself",
        "saved",
        "going on: nothing to pause for any more",
    ]
    assert slept_s == 3 * POLL_S


def test_pause_prints_a_changed_reason() -> None:
    hot: dict[str, float] = {"battery": 90, "temperature": 90}
    _, log = waited({"battery": 14}, hot, hot, {"temperature": 70, "battery": 90})
    assert log[2:] == ["still paused: temperature at 90 °C (above 80 °C)", "going on: nothing to pause for any more"]


@pytest.mark.parametrize("asked_after_s", [0.0, 1.0])
def test_stop_request_ends_the_pause_at_once(asked_after_s: float) -> None:
    slept_s, log = waited({"battery": 14}, stop_after_s=asked_after_s)
    assert slept_s == asked_after_s
    assert len(log) == 2


def test_failed_save_ends_the_pause() -> None:
    def fail() -> None:
        raise StorageError("full")

    with pytest.raises(StorageError):
        waited({"battery": 14}, on_pause=fail)


# -- this system's sensors -------------------------------------------------------------------------------


def test_sensors_of_this_machine_are_read_without_error() -> None:
    sensors = SystemSensors()
    assert (sensors("memory") or 0) > 0
    PauseRules.parse(["battery<20,temperature>80,memory<1MB,metered"]).warning(sensors)


@pytest.mark.parametrize(("plugged", "expected"), [(True, PLUGGED), (False, 41.5), (None, 41.5)])
def test_battery_is_read_from_psutil(monkeypatch: pytest.MonkeyPatch, plugged: bool | None, expected: float) -> None:
    found = SimpleNamespace(percent=41.5, power_plugged=plugged)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: found, raising=False)
    assert SystemSensors()("battery") == expected


def test_the_hottest_plausible_sensor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: [SimpleNamespace(current=celsius)] for name, celsius in
             {"cpu": 71.0, "disk": 44.0, "unconnected": 127.5, "absent": 0.0}.items()}  # fmt: skip
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: found, raising=False)
    assert SystemSensors()("temperature") == 71


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
    assert [sensors(name) for name in ("battery", "temperature", "memory")] == [None] * 3


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
    assert SystemSensors()("metered") is metered
    assert calls.read_text().startswith("C -t -f METERED general\n")


def test_metered_is_unknown_where_network_manager_is_not_there_or_hangs(
    nmcli: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nmcli("exec sleep 60")
    monkeypatch.setattr(pause, "_NMCLI_TIMEOUT_S", 0.05)
    assert SystemSensors()("metered") is None
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert SystemSensors()("metered") is None


def test_metered_is_read_at_most_every_ten_seconds(nmcli: Callable[[str], Path]) -> None:
    calls = nmcli("echo yes")
    steps = iter((0.0, 3.0, 9.9, 10.0, 12.0))
    sensors = SystemSensors(clock=lambda: next(steps))
    assert all(sensors("metered") for _ in range(5))
    assert len(calls.read_text().splitlines()) == 2
