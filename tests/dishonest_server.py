"""A server that keeps only those rules that a test wants it to: what a device must hold out against.

It has no model. It greets as the server of a bundle's base model, opens a session and resumes it, and then does what
its ``script`` says, with numbers and shapes that are in order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from dlora.protocol import messages as m
from dlora.protocol.frames import encode
from dlora.protocol.kill_revive import UnitState
from dlora.protocol.manifest import Manifest
from dlora.protocol.session import Session
from dlora.protocol.states import Side, State
from dlora.protocol.tensors import WireTensor
from dlora.protocol.version import PROTOCOL_VERSIONS
from dlora.protocol.wire_codecs import encode_floats

Script = Callable[["DishonestServer", ServerConnection], None]


class DishonestServer:
    """One session of one device, over as many connections as it takes.

    Attributes:
        connections: how many there were so far.
        session: the session's state, once it is open.
    """

    def __init__(self, manifest: Manifest, script: Script) -> None:
        self.url = ""
        self.connections = 0
        self.session = Session(Side.CLOUD)
        self._manifest = manifest
        self._script = script

    def handle(self, connection: ServerConnection) -> None:
        self.connections += 1
        with suppress(ConnectionClosed):
            self._greet(connection)
            self._script(self, connection)

    def _greet(self, connection: ServerConnection) -> None:
        handshake, base = Session(Side.CLOUD), self._manifest.base_model
        handshake.receive(receive(connection))
        welcome = m.Welcome(
            protocol_version=PROTOCOL_VERSIONS[-1],
            software="dishonest",
            base_model=base.name,
            base_fingerprint=base.fingerprint,
            base_weight_format=base.weight_format,
            embedding_size=base.embedding_size,
            hidden_size=base.hidden_size,
            max_sequence_length=base.max_sequence_length,
            max_tokens=4096,
            packs=True,
        )
        connection.send(handshake.send(welcome))
        token = bytes(m.RESUME_TOKEN_BYTES)
        match handshake.receive(receive(connection)):
            case m.OpenSession(purpose=m.Encode()):
                connection.send(handshake.send(m.SessionOpened(session="one", token=token)))
                self.session = handshake
            case m.OpenSession(purpose=purpose):
                units = WireTensor.from_bytes(bytes([UnitState.ACTIVE]) * len(handshake.units.groups))
                ticket = WireTensor.from_bytes(b"ticket")
                opened = m.SessionOpened(session="one", units=units, ticket=ticket, token=token)
                # With units where nothing is trained, against the rules.
                connection.send(handshake.send(opened) if isinstance(purpose, m.Train) else encode(opened))
                self.session = handshake
            case m.ResumeSession(received=received):
                resumed = m.SessionResumed(token=token, received=self.session.link.received)
                connection.send(handshake.send(resumed))
                for frame in self.session.resume(handshake, received):
                    connection.send(frame)

    # -- for scripts -------------------------------------------------------------------------------------

    def hear(self, connection: ServerConnection) -> m.AnyMessage:
        """The device's next message that did not come before."""
        while True:
            message = self.session.receive(receive(connection))
            if message is not None:
                return message

    def say(self, connection: ServerConnection, message: m.AnyMessage) -> bytearray:
        """By the rules."""
        frame = self.session.send(message)
        connection.send(frame)
        return frame

    def say_anyway(self, connection: ServerConnection, message: m.AnyMessage) -> None:
        """Against them, with the number that is next."""
        connection.send(encode(message, seq=self.session.link.sent + 1, ack=self.session.link.received))

    def next_message(self) -> m.AnyMessage:
        """What an honest server would say next in a training micro-batch, with ones for all values."""
        session = self.session
        begun, live = next(iter(session.under_way.values())), session.units.group_states.live
        place: dict[str, Any] = dict(zip(("step", "micro_batch"), begun.key, strict=True))
        tokens = begun.tokens
        if session.state is State.BACKWARD:
            group = next(group for group in reversed(live) if group not in begun.grads_sent)
            grads = tuple(ones(tokens, target.out_features) for target in session.groups[group].targets)
            return m.GroupGrad(**place, groups=(group,), grads=grads, answer=group != live[0])
        if begun.asked < len(live):
            group = live[begun.asked]
            return m.GroupInput(**place, groups=(group,), hidden_states=ones(tokens, session.groups[group].in_features))
        hidden_states = ones(begun.labelled, self._manifest.base_model.hidden_size)
        return m.LabelledHiddenStates(**place, hidden_states=hidden_states, gradients=len(live))

    def answer(self, connection: ServerConnection) -> None:
        """All that an honest server would say now, in a training micro-batch."""
        if self.session.state is not State.IDLE:
            self.say(connection, self.next_message())
        while self.session.state is State.BACKWARD and not any(
            each.unanswered for each in self.session.under_way.values()
        ):
            self.say(connection, self.next_message())


def ones(*shape: int) -> WireTensor:
    return encode_floats(np.ones(shape, np.float32), "fp32")


def receive(connection: ServerConnection) -> bytes:
    return bytes(connection.recv(decode=False))


@contextmanager
def dishonest(manifest: Manifest, script: Script) -> Iterator[DishonestServer]:
    """Serve until the context ends."""
    server = DishonestServer(manifest, script)
    with serve(server.handle, "127.0.0.1", 0, compression=None, max_size=None) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        server.url = f"ws://127.0.0.1:{listening.socket.getsockname()[1]}"
        yield server
        listening.shutdown()
