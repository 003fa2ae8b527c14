"""What a step of a real model takes of processor time, at the server and on the device: a part of fleet.py."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from children import cpu_seconds
from fleet_replicas import Case, check_devices, end_device, replicas, start_case, steps_done

from dlora.edge.run.file_names import METRICS


def measure(case: Case, directory: Path) -> dict[str, Any]:
    """One device alone, its first steps left out, and what comes after its last."""
    out = directory / "device"
    with replicas(case.place, directory / "server", count=1) as running:
        device = start_case(case, out, running.url(0), 0)
        pids, seen = (running.servers[0].pid, device.pid), []
        for steps in (2, case.steps - 1):
            while steps_done(out) < steps:
                check_devices([device])
                time.sleep(0.02)
            seen.append((steps_done(out), *map(cpu_seconds, pids)))
        end_device(device)
    (first, *before), (last, *after) = seen
    rows = [json.loads(line) for line in (out / METRICS).read_text().splitlines()][first:last]
    tokens = sum(row["tokens"] for row in rows)
    server_s, device_s = (later - earlier for earlier, later in zip(before, after, strict=True))
    return {
        "tokens_a_step": tokens / len(rows),
        "server_ms_a_token": 1e3 * server_s / tokens,
        "device_ms_a_token": 1e3 * device_s / tokens,
        "bytes_up_a_token": sum(row["bytes_up"] for row in rows) / tokens,
        "bytes_down_a_token": sum(row["bytes_down"] for row in rows) / tokens,
        "round_trips_a_step": sum(row["round_trips"] for row in rows) / len(rows),
    }
