"""The session through which a model uses the server: opened, set up, and opened again where the server has lost it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from dlora.edge.adapters.units import AdapterSet
from dlora.edge.wire.connection import Connection
from dlora.protocol import messages as m
from dlora.protocol.adapters import kind_of
from dlora.protocol.errors import SessionLostError
from dlora.protocol.tensors import WireTensor

T = TypeVar("T")


class ModelSession(ABC):
    """What a model does with a server goes through ``run``, so that a lost session is nobody else's concern."""

    def __init__(self, connection: Connection, adapters: AdapterSet) -> None:
        self.connection = connection
        self.adapters = adapters

    @abstractmethod
    def opening_message(self) -> m.OpenSession:
        """The message that opens a session where we stand now."""

    @abstractmethod
    def handle_opened(self, opened: m.SessionOpened) -> None:
        """Take what the server says of the session that it has opened."""

    @abstractmethod
    def handle_signal(self, signal: m.Signal) -> None:
        """Take a signal, before anything of the next step is computed."""

    @abstractmethod
    def send_unanswered(self) -> None:
        """Send again what the server must know before the next micro-batch, once a session is open."""

    def open(self) -> None:
        """Open a session where we stand, or another in place of one that the server has forgotten."""
        while True:
            try:
                self.handle_opened(self.connection.open(self.opening_message()))
                self._set_up()
                self.send_unanswered()
                return
            except SessionLostError:
                continue

    def run(self, work: Callable[[], T]) -> T:
        """Do some work with the server; where that loses the session, all of it again in another."""
        while True:
            try:
                return work()
            except SessionLostError:
                self.open()

    def _set_up(self) -> None:
        """Let the server make what it keeps of each group, or give it back to one that has lost it."""
        spec = self.adapters.adapter_spec
        shapes = [kind_of(spec).state_shapes(spec, group) for group in self.adapters.group_specs]
        if not any(shapes):
            return
        for index, (group, each) in enumerate(zip(self.adapters.groups, shapes, strict=True)):
            if len(group.adapter_state) == len(each):
                tensors = tuple(WireTensor("fp32", tensor) for tensor in group.adapter_state)
                self.connection.send(m.AdapterState(group=index, tensors=tensors))
                self.connection.receive(m.AdapterState)
            else:
                self.connection.send(m.MakeAdapterState(group=index))
                state = self.connection.receive(m.AdapterState)
                group.adapter_state = tuple(np.array(tensor.data) for tensor in state.tensors)
