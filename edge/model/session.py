"""The session through which a model uses the server: opened, set up, and opened again where the server has lost it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import msgspec
import numpy as np

from dlora.edge.adapters.units import AdapterSet
from dlora.edge.wire.connection import Connection
from dlora.protocol import messages as m
from dlora.protocol.errors import RemoteProtocolError, SessionLostError
from dlora.protocol.wire_codecs import Codecs, TensorRole, decode_floats

T = TypeVar("T")


class ModelSession(ABC):
    """What a model does with a server goes through ``run``, so that a lost session is nobody else's concern.

    Attributes:
        before_group: called before the server makes what it keeps of each group, with how many groups are done and how
            many there are; what it raises ends the set-up.
    """

    def __init__(self, connection: Connection, adapters: AdapterSet) -> None:
        self.connection = connection
        self.adapters = adapters
        self.before_group: Callable[[int, int], None] = lambda done, groups: None

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

    @abstractmethod
    def run_basis_pass(self) -> int:
        """Let the server learn from gradients what it will keep of the groups, where it is to make that from them; how
        many micro-batches that were."""

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

    def _give_parameters(self) -> None:
        """Give the server what groups have learnt that it is to apply, as far as it does not have it."""
        opening = self.connection.session.opened_with
        assert opening is not None
        codec = opening.codecs.of(TensorRole.GROUP_PARAMETERS)
        for group in self.connection.session.units.groups_to_give:
            tensors = tuple(codec.encode(tensor) for tensor in self.adapters.groups[group].given_to_server())
            self.connection.send(m.GroupParameters(group=group, tensors=tensors))
            self.connection.receive(m.GroupParameters)

    def _set_up(self) -> None:
        """Let the server make what it keeps of each group, or give it to one that has not made it, or has lost it."""
        if not self.connection.session.has_adapter_state:
            return
        groups = self.adapters.groups
        micro_batches = 0
        if not all(group.adapter_state for group in groups):
            micro_batches = self.run_basis_pass()
        for index, group in enumerate(groups):
            if group.adapter_state:
                self.connection.send(m.AdapterState(group=index, tensors=group.adapter_state))
                self.connection.receive(m.AdapterState)
            else:
                self.before_group(index, len(groups))
                self.connection.send(m.MakeAdapterState(group=index))
                state = self.connection.receive(m.AdapterState)
                group.check_made_state([decode_floats(tensor) for tensor in state.tensors])
                group.adapter_state = tuple(tensor.copied() for tensor in state.tensors)
                if micro_batches:
                    norm = min(state.gradient_norm / micro_batches, float(np.finfo(np.float32).max))
                    group.first_gradient_norm = float(np.float32(norm))


class UntrainedSession(ModelSession):
    """A session of the purpose ``use`` or ``encode``: no units, no reports, nothing that is learnt from data.

    Args:
        adapters: of the groups that have one; all of them are live.
        purpose: for how many tokens of a context the server is to keep keys and values, or fewer where it has no room
            for as many; and which blocks it runs.
        window: how many micro-batches may be under way at a time, where the server allows as many.
    """

    def __init__(
        self,
        connection: Connection,
        adapters: AdapterSet,
        purpose: m.Use | m.Encode,
        codecs: Codecs,
        *,
        base_fingerprint: str,
        window: int = 1,
    ) -> None:
        super().__init__(connection, adapters)
        self._purpose = purpose
        self._codecs = codecs
        self._base_fingerprint = base_fingerprint
        self._window = window

    def opening_message(self) -> m.OpenSession:
        welcome = self.connection.welcome
        context_length = min(self._purpose.context_length, welcome.max_context_length)
        return m.OpenSession(
            base_fingerprint=self._base_fingerprint,
            groups=self.adapters.group_specs,
            adapter=self.adapters.adapter_spec,
            codecs=self._codecs,
            evaluation_codecs=self._codecs,
            purpose=msgspec.structs.replace(self._purpose, context_length=context_length),
            window=min(self._window, welcome.window),
        )

    def handle_opened(self, opened: m.SessionOpened) -> None:
        pass

    def handle_signal(self, signal: m.Signal) -> None:
        raise RemoteProtocolError("a signal where nothing is trained")

    def send_unanswered(self) -> None:
        self._give_parameters()

    def run_basis_pass(self) -> int:
        return 0
