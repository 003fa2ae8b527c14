"""A command, and the memory of it and of all processes that it starts, as it goes: PSS, so that what processes share
counts once, and mapped files count where their pages are in memory."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil
from children import log

SAMPLE_S: Final = 0.03
_FIELD: Final = re.compile(r"^(Pss|Pss_Anon):\s+(\d+) kB$", re.MULTILINE)


@dataclass
class Sample:
    """At one time, in MB of 10**6 bytes: all of it, what of it no file has, and what disks were asked for so far."""

    at: float
    pss_mb: float
    anonymous_mb: float
    read_mb: float = 0.0


@dataclass
class Ran:
    """A command that has ended.

    Attributes:
        lines: of stderr, each with the time at which it came.
        cpu_s: processor seconds of the command and its children.
    """

    output: str
    code: int = 0
    lines: list[tuple[float, str]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0
    cpu_s: float = 0.0

    def time_of(self, words: str, *, last: bool = False) -> float:
        """When a line with these words came, the first or the last of them; the end where none did."""
        found = [at for at, line in self.lines if words in line]
        return (found[-1] if last else found[0]) if found else self.ended

    def read_mb(self, begin: float = 0.0, end: float = float("inf")) -> float:
        """What disks were asked for in a time."""
        during = [each.read_mb for each in self.samples if begin <= each.at <= end]
        return max(during) - min(during) if during else 0.0

    def peak(self, begin: float = 0.0, end: float = float("inf")) -> Sample:
        """The largest sample of a time."""
        return max(
            (each for each in self.samples if begin <= each.at <= end),
            key=lambda each: each.pss_mb,
            default=Sample(begin, 0.0, 0.0),
        )


def run_measured(command: Sequence[object], *, cgroup: Path | None = None, may_fail: bool = False) -> Ran:
    """Run a command to its end. ``cgroup``: of memory (v1), whose limit counts for it."""

    def enter() -> None:
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))

    ran, began = Ran(""), os.times()
    ran.began = time.time()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=enter
    )
    threads = [
        threading.Thread(target=_read_lines, args=(process, ran)),
        threading.Thread(target=lambda: setattr(ran, "output", process.stdout.read() if process.stdout else "")),
    ]
    for thread in threads:
        thread.start()
    while process.poll() is None:
        before = time.monotonic()
        sample = sample_tree(process.pid)
        if sample is not None:
            ran.samples.append(sample)
        # Looking at 16 GB takes a tenth of a second, of which the command is to feel nothing.
        time.sleep(max(SAMPLE_S, 19 * (time.monotonic() - before)))
    for thread in threads:
        thread.join()
    ended = os.times()
    ran.ended = time.time()
    ran.cpu_s = ended.children_user + ended.children_system - began.children_user - began.children_system
    ran.code = process.returncode
    if ran.code and not may_fail:
        log("\n".join(line for _, line in ran.lines[-5:]))
        raise SystemExit(f"error: {' '.join(map(str, command[:5]))} … failed; its error is above")
    return ran


def sample_tree(process: int) -> Sample | None:
    """Of a process and those that it has started; None where it has ended."""
    try:
        root = psutil.Process(process)
        every = [root, *root.children(recursive=True)]
    except psutil.Error:
        return None
    total: Mapping[str, int] = {"Pss": 0, "Pss_Anon": 0}
    for each in every:
        try:
            found = dict(_FIELD.findall(Path(f"/proc/{each.pid}/smaps_rollup").read_text()))
        except OSError:  # it has just ended
            continue
        total = {name: total[name] + int(found.get(name, 0)) for name in total}
    return Sample(time.time(), total["Pss"] * 1024 / 1e6, total["Pss_Anon"] * 1024 / 1e6, _read_bytes(process) / 1e6)


def _read_bytes(process: int) -> int:
    try:
        found = re.search(r"^read_bytes: (\d+)$", Path(f"/proc/{process}/io").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def _read_lines(process: subprocess.Popen[str], ran: Ran) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        ran.lines.append((time.time(), line.rstrip()))
