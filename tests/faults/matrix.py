"""Every fault at every boundary of one training step, each in a run of its own that must end with the same bits."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from fault_proxy import ON_A_FRAME, Boundary, Fault, Plan
from fault_run import AtFile, FaultRun, Outcome, Reference, Replicas, make_place, record, replicas

from dlora.edge.adapters.parts import PARTS_NAME

STEP: Final = 2
"""The step that is disturbed; a unit was killed before it and one is revived after it."""
# Silence must be found in a fraction of a second.
DEVICE: Final[tuple[object, ...]] = ("--set", "server.exchange_timeout_s=1")
SERVER: Final[tuple[object, ...]] = ("--exchange-timeout-s", 1, "--drain-s", 5)
FAULTS: Final = [fault for fault in Fault if fault not in (Fault.FREEZE_DEVICE, Fault.FREEZE_SERVER)]
# A second fault while the device comes back from a first one.
COMING_BACK: Final = ("resume_session", "session_resumed")


@dataclass(frozen=True)
class Case:
    """One fault at one boundary."""

    fault: Fault
    boundary: Boundary | AtFile
    when: Literal["before", "after"] = "before"
    more: tuple[Boundary, ...] = ()

    @property
    def place(self) -> str:
        """The row of the table that it belongs to: what kind of boundary it is."""
        if isinstance(self.boundary, Boundary):
            return f"{self.boundary.name}, setting up" if self.boundary.step == 0 else str(self.boundary.name)
        return "checkpoint" if "checkpoint" in self.boundary.name else "saved adapter"

    def __str__(self) -> str:
        if isinstance(self.boundary, AtFile):
            return f"{self.fault.value} before {self.boundary.name}"
        return f"{self.fault.value} {self.when} {self.boundary.name} {self.boundary.nth}"


@dataclass(frozen=True)
class Cell:
    """A case and what came of it."""

    case: Case
    outcome: Outcome


class Matrix:
    """Runs cases, ``workers`` at a time, each with replicas of its own, until its context ends."""

    def __init__(self, directory: Path, workers: int = 2, run: str = "lora") -> None:
        self._directory = directory
        self._place = make_place(directory, run)
        self._closing = ExitStack()
        self._idle: queue.Queue[Replicas] = queue.Queue()
        self._workers = workers
        self._names = itertools.count()
        for worker in range(workers):
            self._idle.put(self._closing.enter_context(replicas(self._place, directory / f"servers-{worker}", SERVER)))
        running = self._idle.get()
        self.reference: Reference = record(self._place, running, directory / "reference" / "out", DEVICE)
        self._idle.put(running)

    def cases(self, fault: Fault, *, thorough: bool = False) -> list[Case]:
        """All of a fault's cases; or the first of each kind."""
        boundaries = self.reference.boundaries(STEP) + self.reference.set_up_boundaries()
        cases = [Case(fault, boundary) for boundary in boundaries]
        if thorough and fault not in ON_A_FRAME:
            cases += [Case(fault, boundary, "after") for boundary in boundaries if isinstance(boundary, Boundary)]
        first = (Boundary("group_delta", STEP),)
        cases += [Case(fault, Boundary(name), more=first) for name in COMING_BACK]
        return cases if thorough else list(_first_of_each(cases))

    def run(self, cases: Sequence[Case]) -> Iterator[Cell]:
        with ThreadPoolExecutor(self._workers) as pool:
            yield from pool.map(self._run, cases)

    def __enter__(self) -> Matrix:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def _run(self, case: Case) -> Cell:
        running = self._idle.get()
        try:
            fault_run = FaultRun(self._place, running, self._directory / f"run-{next(self._names)}" / "out", DEVICE)
            fault_run.proxy.plan(*(Plan(Fault.CUT_LINK, each) for each in case.more))
            if isinstance(case.boundary, Boundary):
                fault_run.proxy.plan(Plan(case.fault, case.boundary, case.when))
                outcome = fault_run.run()
            else:
                outcome = fault_run.run(case.boundary, case.fault)
            if not fault_run.proxy.done or fault_run.proxy.pending:
                outcome.wrong.append("the fault never happened")
            fault_run.compare(outcome, self.reference)
        finally:
            self._idle.put(running)
        return Cell(case, outcome)


def _first_of_each(cases: Sequence[Case]) -> Iterator[Case]:
    seen: set[str] = set()
    for case in cases:
        # Before the new checkpoint is opened, renamed, and the oldest removed are three different things.
        kind = case.boundary.name.split(" ")[0] + case.place if isinstance(case.boundary, AtFile) else case.place
        # Of a saved adapter, the file that no PEFT adapter has.
        if kind not in seen and (case.place != "saved adapter" or PARTS_NAME in str(case.boundary.name)):
            seen.add(kind)
            yield case
