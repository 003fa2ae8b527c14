"""What the device and the server did when, in some steps: for a profile. Off, it costs a look at a flag."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from dlora.protocol import messages as m

STEPS: Final = "steps"
COMPUTE: Final = "computes"
SEND: Final = "sends"
WAIT: Final = "waits for the server"


@dataclass(frozen=True, slots=True)
class Span:
    """Something that the device did.

    Attributes:
        lane: with which others of its kind it stands in a row.
        start, end: ``time.perf_counter``.
    """

    name: str
    lane: str
    start: float
    end: float
    args: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServerMessage:
    """What a message of the server's says of its time.

    Attributes:
        step: that was under way.
        sent, received: by the device's clock: when it sent what it sent last, and when this was there.
        times: by the server's, as ``GroupInput`` has them.
    """

    name: str
    step: int
    sent: float
    received: float
    times: tuple[float, ...]


@dataclass
class Spans:
    """What was taken so far.

    Attributes:
        asks_server: whether the server is to say when it did what.
        is_on: whether something is taken now.
    """

    asks_server: bool = False
    is_on: bool = False
    device: list[Span] = field(default_factory=list)
    server: list[ServerMessage] = field(default_factory=list)
    _sent: float = 0.0

    def add(self, name: str, lane: str, start: float, end: float, **args: int) -> None:
        """Take a span of the device's, where it is on."""
        if self.is_on:
            self.device.append(Span(name, lane, start, end, args))

    def add_sent(self, message: m.AnyMessage, start: float, end: float, nbytes: int) -> None:
        """Take a message that left."""
        self._sent = start
        if self.is_on:
            self.add(name_of(message), SEND, start, end, bytes=nbytes)

    def add_received(self, message: m.AnyMessage, start: float, end: float) -> None:
        """Take a message that came, and the wait for it."""
        if not self.is_on:
            return
        self.add(name_of(message), WAIT, start, end)
        if isinstance(message, (m.GroupInput, m.LabelledHiddenStates, m.GroupGrad)) and message.times:
            name = name_of(message)
            self.server.append(ServerMessage(name, message.step, self._sent, end, message.times))


def name_of(message: m.AnyMessage) -> str:
    """A message as people read it: with its group, where it has one, and else the first and the last of them."""
    name = str(message.__struct_config__.tag).replace("_", " ")
    if isinstance(message, (m.GroupInput, m.GroupDelta, m.GroupGrad, m.GroupInputGrad)):
        first, *others = message.groups
        return f"{name} {first} to {others[-1]}" if others else f"{name} {first}"
    group = getattr(message, "group", None)
    return name if group is None else f"{name} {group}"
