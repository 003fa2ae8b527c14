"""What a server shows of itself: metrics that are what happened, however many devices come, and a log for machines."""

from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import VOCABULARY
from processes import CloudProcess, cloud_process, run_cloud
from prometheus_client import generate_latest
from serving import RunningServer, config, greeted_device, random_dataset, raw_device, serving, training
from test_server import embeddings, open_session, opened_device
from tiny import Tiny, TinyFactory
from tools import find_tool
from waiting import PassingClock, eventually
from websockets.exceptions import InvalidStatus

from dlora.cloud.admission.access import Access
from dlora.cloud.admission.quotas import QuotaLimits
from dlora.cloud.admission.tokens import BearerTokenStore
from dlora.cloud.commands.log_lines import JsonLines
from dlora.cloud.serving.metrics import METRICS, registry_of, start_metrics
from dlora.cloud.serving.timeouts import SessionTimeouts
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.protocol import messages as m
from dlora.protocol.controller import Controller
from dlora.protocol.frames import encode
from dlora.protocol.wire_codecs import encode_floats

ROOT = Path(__file__).parents[1]
DASHBOARD, ALERTS = ROOT / "packaging/grafana.json", ROOT / "packaging/alerts.yaml"
STEPS = 3
MOST_SERIES = 2_000

Scrape = dict[tuple[str, str], float]
"""By the name of a series and the value of its label, "" for none."""


@pytest.fixture(scope="module")
def model(tiny: TinyFactory) -> Tiny:
    return tiny(head_dtype="fp32")


@pytest.fixture(scope="module")
def cloud(model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudProcess]:
    """A server as a process, where a device has trained a step."""
    directory = tmp_path_factory.mktemp("cloud")
    with cloud_process(model.model, directory, "--metrics", "0", "--log-format", "json") as running:
        with training(model.bundle, running.url, config(), random_dataset(VOCABULARY)) as trainer:
            trainer.run_step()
            trainer.wait_for_signal()
        yield running
        assert running.end() == 0


def scraped(server: RunningServer) -> Scrape:
    samples = [sample for family in registry_of(server.server).collect() for sample in family.samples]
    return {(sample.name, *sample.labels.values(), "")[:2]: sample.value for sample in samples}  # type: ignore[misc]


def of(name: str, now: Scrape) -> dict[str, float]:
    """A metric's numbers by its label, but for those that are 0."""
    return {label: value for (each, label), value in now.items() if each == name and value}


def registry_text(server: RunningServer) -> str:
    return generate_latest(registry_of(server.server)).decode()


def fetch(cloud: CloudProcess) -> str:
    with urllib.request.urlopen(cloud.hello["metrics_url"], timeout=120) as answer:
        return str(answer.read().decode())


def expressions() -> list[str]:
    """What the dashboard's panels ask for."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def promtool(*arguments: object, said: str | None = None) -> str:
    done = subprocess.run(
        [find_tool("promtool"), *map(str, arguments)], input=said, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# -- what is counted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2])
def test_metrics_are_what_happened(model: Tiny, window: int) -> None:
    dataset = random_dataset(VOCABULARY)
    run = config(grad_accum=2)
    with serving(model.base, window=window, live_limit=10**9) as server:
        with training(model.bundle, server.url, run, dataset, window=window) as trainer:
            metrics = [trainer.run_step() for _ in range(STEPS)]
            trainer.wait_for_signal()
            bytes_up, bytes_down, _ = trainer.side.crossed.counters
            # The server counts a message once it is on its way: the device may have it before.
            eventually(lambda: sum(of("dlora_sent_bytes_total", scraped(server)).values()) >= bytes_down)
            during = scraped(server)
        eventually(lambda: of("dlora_sessions_ended_total", scraped(server)) == {"closed": 1})
        after = scraped(server)
    assert of("dlora_sessions", during) == {"connected": 1}
    assert of("dlora_sessions", after) == of("dlora_draining", after) == of("dlora_live_bytes", after) == {}
    assert of("dlora_sessions_opened_total", after) == of("dlora_sessions_opened_total", during) == {"": 1}
    assert of("dlora_sessions_limit", after) == {"": 8}
    assert of("dlora_live_limit_bytes", after) == {"": 1e9}
    assert of("dlora_steps_total", after) == {"": STEPS}
    assert of("dlora_tokens_total", after) == {"train": sum(step.tokens for step in metrics)}
    received, sent = of("dlora_received_bytes_total", during), of("dlora_sent_bytes_total", during)
    assert (sum(received.values()), sum(sent.values())) == (bytes_up, bytes_down)
    assert received["group_delta"] == sum(step.up["delta"] for step in metrics)
    assert sent["group_input"] == sum(step.down["group_input"] for step in metrics)
    phases = of("dlora_phase_seconds_total", after)
    assert {"compute", "device"} <= set(phases) <= {"compute", "device", "gate", "memory"}
    # A turn for each micro-batch, and another after each answer: all groups' outputs and inputs but one, and the loss.
    turns = STEPS * run.training.grad_accum * (1 + 2 * len(trainer.adapters.groups))
    assert of("dlora_gate_wait_seconds_count", after) == {"": turns}
    assert of("dlora_gate_wait_seconds_bucket", after)["+Inf"] == turns
    assert of("dlora_refusals_total", after) == {}


def test_a_step_counts_little(model: Tiny) -> None:
    """At most two additions a message, and three a micro-batch: `Count.add` takes less than a microsecond."""
    with (
        serving(model.base) as server,
        training(model.bundle, server.url, config(), random_dataset(VOCABULARY)) as trainer,
    ):
        counts, link = server.server.service.counts, trainer.side.crossed.session.link
        before = counts.operations, link.sent + link.received
        for _ in range(STEPS):
            trainer.run_step()
        trainer.wait_for_signal()
        eventually(lambda: counts.steps.operations == STEPS)
        counted, messages = counts.operations - before[0], link.sent + link.received - before[1]
    assert messages > 10 * STEPS
    assert messages < counted <= 2 * messages + 3 * STEPS


def test_devices_add_no_series(model: Tiny, tmp_path: Path) -> None:
    """However many come, with names, addresses and sessions of their own, and whatever they are refused for."""
    tokens = BearerTokenStore(tmp_path / "tokens.sqlite")
    bearers = [tokens.create(f"device-{number}", None) for number in range(12)]
    with serving(model.base, access=Access(tokens, required=True), max_sessions=20) as server:
        before = scraped(server)
        for bearer in bearers * 3:
            with greeted_device(server.url, bearer) as device:
                device.say(open_session(model.base))
                assert isinstance(device.hear(), m.SessionOpened)
        with pytest.raises(InvalidStatus), greeted_device(server.url, "no token"):
            pass
        after = scraped(server)
        text = registry_text(server)
    assert of("dlora_sessions_opened_total", after) == {"": 36}
    assert after.keys() == before.keys()
    assert len(after) < MOST_SERIES
    assert "device-" not in text
    assert "127.0.0.1" not in text


def test_a_device_over_its_quota_is_counted_as_refused_and_as_waiting(model: Tiny) -> None:
    clock = PassingClock()
    connecting = ConnectSettings(retry=Retry(max_s=None), clock=clock, sleep=clock.sleep)
    settings = {"quotas": QuotaLimits(tokens_per_minute=40), "clock": clock}
    with (
        serving(model.base, **settings) as server,
        training(model.bundle, server.url, config(), random_dataset(VOCABULARY), connecting) as trainer,
    ):
        for _ in range(STEPS):
            trainer.run_step()
        now, times = scraped(server), trainer.side.crossed.reconnects
    assert times > 0
    assert of("dlora_refusals_total", now) == {m.ErrorCode.QUOTA_TOKENS: times}
    assert of("dlora_sessions_resumed_total", now) == {"": times}
    assert of("dlora_phase_seconds_total", now)["quota"] >= clock.slept_s / 2 > 1


@pytest.mark.parametrize(
    ("frame", "code"), [(b"nonsense", m.ErrorCode.DAMAGED), ("text", "a text frame")], ids=["a message", "beneath"]
)
def test_refusals_are_counted_by_code(model: Tiny, frame: bytes | str, code: str) -> None:
    with serving(model.base) as server, raw_device(server.url) as device:
        device.socket.send(frame)
        eventually(lambda: of("dlora_refusals_total", scraped(server)) == {code: 1})


def test_an_unknown_refusal_counts_as_another(model: Tiny) -> None:
    with serving(model.base) as server:
        server.server.service.counts.refusals.add(label="new code")
        server.server.guard.refused["new reason"] += 1
        assert of("dlora_refusals_total", scraped(server)) == {"other": 2}


def test_why_sessions_end(model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(model.base, max_sessions=1, timeouts=SessionTimeouts(park_s=0.2)) as server:

        def ended() -> dict[str, float]:
            return of("dlora_sessions_ended_total", scraped(server))

        with opened_device(server.url, model.base) as device:
            device.say(m.CloseSession())
            eventually(lambda: ended() == {"closed": 1})
        with opened_device(server.url, model.base):
            assert of("dlora_sessions", scraped(server)) == {"connected": 1}
            with greeted_device(server.url) as second:
                second.say(open_session(model.base))
                assert second.hear_error().code == m.ErrorCode.BUSY
            assert of("dlora_refusals_total", scraped(server)) == {m.ErrorCode.BUSY: 1}
        eventually(lambda: ended() == {"closed": 1, "away": 1})
        with opened_device(server.url, model.base):
            (live,) = server.server.service.sessions
            server.server.service.sessions._evict(live, "a test")
            eventually(lambda: ended() == {"closed": 1, "away": 1, "evicted": 1})
        with opened_device(server.url, model.base) as device:
            device.say(embeddings(), m.Error(code="data", message="the disk is full"))
            eventually(lambda: ended() == {"closed": 1, "away": 1, "evicted": 1, "gave_up": 1})
        with opened_device(server.url, model.base) as device:
            device.socket.send(encode(embeddings(step=3), seq=1))
            assert device.hear_error().code == m.ErrorCode.PROTOCOL
            eventually(lambda: ended().get("refused") == 1)
        monkeypatch.setattr(Controller, "report", lambda *_: 1 / 0)
        with opened_device(server.url, model.base) as device:
            device.say(m.StepReport(step=0, scores=encode_floats(np.ones(2, np.float32), "fp32")))
            assert device.hear_error().code == m.ErrorCode.INTERNAL
            eventually(lambda: ended().get("internal") == 1)
        refusals = dict.fromkeys((m.ErrorCode.BUSY, m.ErrorCode.PROTOCOL, m.ErrorCode.INTERNAL), 1)
        assert of("dlora_refusals_total", scraped(server)) == refusals


# -- the process -----------------------------------------------------------------------------------------


def test_the_page_is_as_prometheus_wants_it(cloud: CloudProcess) -> None:
    page = fetch(cloud)
    names = set(re.findall(r"^# HELP (\w+)", page, re.M))
    assert names >= {metric.name for metric in METRICS} | {"process_open_fds", "python_gc_collections_total"}
    assert len([line for line in page.splitlines() if not line.startswith("#")]) < MOST_SERIES
    assert promtool("check", "metrics", said=page) == ""


def test_dashboard_and_alerts_name_metrics_that_there_are(cloud: CloudProcess) -> None:
    known = set(re.findall(r"^(dlora_\w+)", fetch(cloud), re.M))
    shown = {metric.name for metric in METRICS} - {"dlora_gate_wait_seconds"} | {"dlora_gate_wait_seconds_bucket"}
    named = set(re.findall(r"dlora_\w+", DASHBOARD.read_text())) | set(re.findall(r"dlora_\w+", ALERTS.read_text()))
    assert named <= known
    few = {"dlora_steps_total", "dlora_connections_without_session", "dlora_ledger_errors_total"}
    assert {name for name in shown - named if "sessions_" not in name} <= few


def test_dashboard_can_be_imported() -> None:
    """Its datasource and its servers are variables, and its panels have places of their own."""
    board = json.loads(DASHBOARD.read_text())
    assert [each["name"] for each in board["templating"]["list"]] == ["datasource", "instance"]
    panels = board["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels) == 10
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all('{instance=~"$instance"' in each for each in expressions())


def test_promtool_reads_the_rules_and_each_panel(tmp_path: Path) -> None:
    assert "8 rules found" in promtool("check", "rules", ALERTS)
    found = [each.replace("$__rate_interval", "5m") for each in expressions()]
    rules = [{"record": f"panel:{number}", "expr": each} for number, each in enumerate(found)]
    file = tmp_path / "panels.yaml"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))  # JSON is YAML
    assert f"{len(rules)} rules found" in promtool("check", "rules", file)


def test_each_alert_says_what_to_do() -> None:
    alerts = re.split(r"- alert: ", ALERTS.read_text())[1:]
    for alert in alerts:
        (summary,) = re.findall(r'summary: "(.*)"$', alert, re.M)
        assert "{{ $labels.instance }}" in summary
        assert ": " in summary


def test_log_of_json_has_fields(cloud: CloudProcess) -> None:
    def closed() -> list[dict[str, Any]]:
        return [line for line in lines() if " closed at step 1" in line["message"]]

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in cloud.log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    eventually(lambda: len(closed()) == 1)
    opened, ended = (each for each in lines() if "session" in each)
    assert opened["message"].startswith(f"session {opened['session']}: opened at step 0 by 127.0.0.1 with ")
    assert ended.keys() == {"time", "level", "logger", "message", "device", "session", "step"}
    assert (ended["level"], ended["logger"], ended["device"], ended["step"]) == ("info", "dlora.cloud", "127.0.0.1", 1)
    assert ended["session"] == opened["session"]
    times = [datetime.fromisoformat(line["time"]) for line in lines()]
    assert times == sorted(times)
    assert all(line["time"].endswith("Z") for line in lines())
    assert f"metrics at {cloud.hello['metrics_url']}" in [line["message"] for line in lines()]


def test_a_line_of_json_has_a_bugs_traceback_and_no_other_field() -> None:
    try:
        raise ZeroDivisionError("of ours")
    except ZeroDivisionError:
        bug = sys.exc_info()
    record = logging.LogRecord("dlora.cloud", logging.ERROR, "", 0, "two\nlines \u2028 %s", ("here",), bug)
    record.token = "SECRET"
    text = JsonLines().format(record)
    line = json.loads(text)
    assert len(text.splitlines()) == 1
    assert line["message"] == "two\nlines \u2028 here"
    assert "ZeroDivisionError: of ours" in line["traceback"]
    assert line.keys() == {"time", "level", "logger", "message", "traceback"}


@pytest.mark.parametrize("text", ["http", "127.0.0.1:", "1:65536", "[::1]", "-1"])
def test_an_address_for_metrics_that_is_none_is_refused(model: Tiny, text: str, tmp_path: Path) -> None:
    done = run_cloud("serve", model.model, f"--metrics={text}", "--state-dir", tmp_path)
    assert (done.code, len(done.errors)) == (2, 1), done.stderr
    assert f"--metrics {text}: give a port" in done.errors[0]


def test_an_address_for_metrics_that_is_taken_is_refused(model: Tiny, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_cloud("serve", model.model, "--port", 0, "--metrics", port, "--state-dir", tmp_path)
    assert (done.code, len(done.errors)) == (6, 1), done.stderr
    assert done.errors[0].endswith("choose another --metrics")


def test_metrics_are_answered_over_ipv6(model: Tiny) -> None:
    with serving(model.base) as server:
        port = start_metrics(server.server, "::1", 0)
        with urllib.request.urlopen(f"http://[::1]:{port}/metrics", timeout=120) as answer:
            assert b"\ndlora_sessions_limit 8.0\n" in answer.read()


def test_prometheus_is_loaded_where_it_is_asked_for_only() -> None:
    texts = {path.name: path.read_text() for path in (ROOT / "cloud").rglob("*.py")}
    assert [name for name, text in texts.items() if "prometheus_client" in text] == ["metrics.py"]
    found = {name: re.findall(r"^( *)from \S*\.metrics import", text, re.M) for name, text in texts.items()}
    assert {name: indents for name, indents in found.items() if indents} == {"serve.py": ["    "]}
