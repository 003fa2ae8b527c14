"""A run's session where no server takes part in its steps: Kill and Revive's controller is on the device itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dlora.edge.adapters.units import AdapterSet
from dlora.edge.seeds import seed_for_server
from dlora.protocol.controller import Controller
from dlora.protocol.errors import CheckpointError
from dlora.protocol.tensors import FloatArray

from .resolved import Resolved

T = TypeVar("T")


class DeviceSession:
    """What ``TrainSession`` is with a server, without one: the same controller, asked at once."""

    def __init__(self, adapters: AdapterSet, config: Resolved) -> None:
        self.step = 0
        self.ticket: bytes | None = None
        self.unanswered: FloatArray | None = None  # a report is answered when it is made
        self._adapters = adapters
        self._config = config
        self._controller: Controller | None = None

    def open(self) -> None:
        """Begin, or go on from ``ticket``. Raises ``CheckpointError`` for one of another run."""
        config, adapters = self._config, self._adapters
        controller = Controller(
            config.units,
            adapters.group_specs,
            seed=seed_for_server(config.seed),
            total_steps=config.steps,
            adapter=adapters.adapter_spec,
            counts_costs=False,  # costs are bytes and round trips
            learnt=tuple(index for index, unit in enumerate(adapters.units) if unit.has_learnt),
        )
        if self.ticket is not None:
            try:
                controller.load_state(self.ticket)
            except ValueError:
                raise CheckpointError("the checkpoint's units are those of another run; start anew") from None
            if controller.next_step != self.step or (controller.states != adapters.states()).any():
                raise CheckpointError("the checkpoint's units are those of another step; start anew")
        self._controller = controller
        adapters.apply_signal(controller.states)
        self.ticket = controller.state()

    def unchanged_steps(self, step: int) -> range:
        """The steps around ``step`` in which the units' states stay as they are."""
        assert self._controller is not None
        return self._controller.timetable.unchanged_steps(step)

    def run(self, work: Callable[[], T]) -> T:
        """Do some work; there is no session to be lost."""
        return work()

    def report(self, scores: FloatArray) -> None:
        """Take the scores of a step that is done, one a unit; the next step's states are set at once."""
        assert self._controller is not None
        states = self._controller.report(self.step, scores)
        self.step += 1
        self._adapters.apply_signal(states)
        self.ticket = self._controller.state()

    def wait_for_signal(self) -> None:
        """Nothing: it has come."""
