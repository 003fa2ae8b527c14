"""What a server shows to Prometheus: each metric a line of one table, read when somebody asks for ``/metrics``.

docs/reference/server-metrics.md is made of the table. No label is a device's or a session's, and the values of each are
few and known before: however many devices come, the series are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from dlora.cloud.admission.reasons import Reason
from dlora.protocol.messages import ErrorCode

from .counts import OTHER, Count, Waits
from .listening import cannot_listen

if TYPE_CHECKING:  # which loads torch, and the table is read without
    from .server import CloudServer

Read = Callable[["CloudServer"], float | Mapping[str, float] | Count | Waits]


class _Shown(NamedTuple):
    """One metric.

    Attributes:
        read: a number, one for each value of ``label``, or a histogram.
    """

    name: str
    help: str
    read: Read
    label: str = ""


def _sessions(server: CloudServer) -> dict[str, float]:
    sessions = server.service.sessions
    parked = sessions.parked
    return {"connected": max(0, len(sessions) - parked), "parked": parked}


def _seconds(server: CloudServer) -> dict[str, float]:
    quotas, counts = server.service.quotas, server.service.counts
    read = {"compute": quotas.computed_s, "gate": counts.gate_waits.seconds, "memory": quotas.memory_waited_s}
    return {**read, **counts.waited_s.values}


def _live_limit(server: CloudServer) -> float:
    most = server.service.quotas.total_live_bytes
    return math.inf if most is None else most


def _refusals(server: CloudServer) -> dict[str, float]:
    found: dict[str, float] = dict.fromkeys((*ErrorCode, *Reason, OTHER), 0)
    for counted in (server.service.counts.refusals.values, dict(server.guard.refused)):
        for code, count in counted.items():
            found[code if code in found else OTHER] += count
    return found


METRICS: Final = (
    _Shown("dlora_sessions", "Open sessions; a device that trains or answers has one.", _sessions, "state"),
    _Shown("dlora_sessions_limit", "Most open sessions.", lambda it: it.service.sessions.limit),
    _Shown("dlora_sessions_opened_total", "Sessions opened.", lambda it: it.service.counts.opened),
    _Shown("dlora_sessions_resumed_total", "Sessions resumed after a lost link.", lambda it: it.service.counts.resumed),
    _Shown("dlora_sessions_ended_total", "Sessions ended.", lambda it: it.service.counts.ended, "why"),
    _Shown("dlora_connections_without_session", "Connections without a session.", lambda it: it.guard.unfinished),
    _Shown("dlora_draining", "1 while the server drains.", lambda it: it.service.draining.is_set()),
    _Shown("dlora_steps_total", "Training steps finished.", lambda it: it.service.counts.steps),
    _Shown("dlora_tokens_total", "Tokens of micro-batches begun.", lambda it: it.service.counts.tokens, "mode"),
    _Shown("dlora_received_bytes_total", "Bytes from devices.", lambda it: it.service.counts.received, "message"),
    _Shown("dlora_sent_bytes_total", "Bytes to devices.", lambda it: it.service.counts.sent, "message"),
    _Shown("dlora_phase_seconds_total", "Seconds of computing, and of waiting for each thing.", _seconds, "phase"),
    _Shown("dlora_gate_wait_seconds", "Each wait for a turn to compute.", lambda it: it.service.counts.gate_waits),
    _Shown("dlora_live_bytes", "Memory of running micro-batches.", lambda it: it.service.quotas.live_bytes),
    _Shown("dlora_live_limit_bytes", "Most memory of running micro-batches.", _live_limit),
    _Shown("dlora_refusals_total", "Refusals, by code or the log's words.", _refusals, "code"),
    _Shown("dlora_ledger_up", "0 while the ledger does not answer.", lambda it: it.service.quotas.ledger.is_up),
    _Shown(
        "dlora_ledger_errors_total",
        "Questions to the ledger without an answer.",
        lambda it: it.service.quotas.ledger.errors,
    ),
    _Shown("dlora_draft_tokens_total", "Tokens guessed for devices.", lambda it: it.service.counts.guessed),
    _Shown("dlora_draft_tokens_right_total", "Guessed tokens that were right.", lambda it: it.service.counts.right),
)


class ServerCollector:
    """Reads a server's numbers for ``prometheus_client``, from the thread that asks."""

    def __init__(self, server: CloudServer) -> None:
        self._server = server

    def collect(self) -> Iterable[Metric]:
        for name, help_, read, label in METRICS:
            found = read(self._server)
            if isinstance(found, Waits):
                yield HistogramMetricFamily(name, help_, buckets=list(found.up_to()), sum_value=found.seconds)
                continue
            family = (CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily)(
                name, help_, labels=[label] if label else []
            )
            values = found.values if isinstance(found, Count) else found
            for value, number in dict(values).items() if isinstance(values, Mapping) else (("", values),):
                family.add_metric([value] if label else [], float(number))
            yield family


def registry_of(server: CloudServer) -> CollectorRegistry:
    """All that is shown of one server, and of its process."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    registry.register(ServerCollector(server))
    return registry


def start_metrics(server: CloudServer, host: str, port: int) -> int:
    """Answer ``GET /metrics`` there, in threads that end with the process; gives the port. Raises
    ``ConnectionFailedError`` where that address cannot be had."""
    try:
        http_server, _ = start_http_server(port, host, registry_of(server))
    except OSError as error:
        raise cannot_listen(host, port, error, "--metrics") from None
    return http_server.server_port
