"""What a conversation with servers takes: bytes by what they carry, waiting, and the time that servers took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol, Self

from dlora.protocol import messages as m
from dlora.protocol.micro_batch import Key
from dlora.protocol.wire_codecs import TensorRole

REPORT: Final = "report"
SIGNAL: Final = "signal"
OTHER: Final = "other"

_ROLES: Final[Mapping[type[m.Message], str]] = {
    m.Embeddings: TensorRole.EMBEDDINGS.value,
    m.GroupInput: TensorRole.GROUP_INPUT.value,
    m.GroupDelta: TensorRole.DELTA.value,
    m.LabelledHiddenStates: TensorRole.LAST_HIDDEN_STATES.value,
    m.EncodedHiddenStates: TensorRole.LAST_HIDDEN_STATES.value,
    m.GradHiddenStates: TensorRole.LAST_HIDDEN_STATES_GRAD.value,
    m.GroupGrad: TensorRole.DELTA_GRAD.value,
    m.GroupInputGrad: TensorRole.INPUT_GRAD.value,
    m.AdapterState: TensorRole.ADAPTER_STATE.value,
    m.GroupParameters: TensorRole.GROUP_PARAMETERS.value,
    m.StepReport: REPORT,
    m.Signal: SIGNAL,
}


WireCounters = tuple[int, int, int]
"""Bytes up, bytes down, round trips."""


@dataclass
class WireUsage:
    """So far, over all connections.

    Attributes:
        up, down: bytes of whole frames, by the role of the tensors that they carry, or ``report`` and ``signal``. What
            is none of these, or crossed again, is not among them.
        waited_s: that the device waited for a server.
        computed_s: that servers computed; queued_s: that they let us wait for our turn. As far as they say so, and
            with what they computed while the device did.
    """

    up: Counter[str] = field(default_factory=Counter)
    down: Counter[str] = field(default_factory=Counter)
    waited_s: float = 0.0
    computed_s: float = 0.0
    queued_s: float = 0.0
    _told: dict[Key, tuple[float, float]] = field(default_factory=dict, repr=False, compare=False)

    def add_sent(self, message: m.AnyMessage, nbytes: int) -> None:
        """Count a frame that leaves for the first time."""
        if role := _ROLES.get(type(message)):
            self.up[role] += nbytes

    def add_received(self, message: m.AnyMessage, nbytes: int) -> None:
        """Count a frame that came for the first time, and what it says of the server's time."""
        if role := _ROLES.get(type(message)):
            self.down[role] += nbytes
        match message:
            case m.LabelledHiddenStates():
                self._take(message, (0.0, 0.0))
            case m.GroupGrad():
                self._take(message, self._told.get((message.step, message.micro_batch), (0.0, 0.0)))

    def forget_micro_batches(self) -> None:
        """None is under way any more."""
        self._told.clear()

    def _take(self, message: m.LabelledHiddenStates | m.GroupGrad, before: tuple[float, float]) -> None:
        """Each message tells of its whole micro-batch so far."""
        self.computed_s += max(0.0, message.computed_s - before[0])
        self.queued_s += max(0.0, message.queued_s - before[1])
        self._told[message.step, message.micro_batch] = message.computed_s, message.queued_s

    def __add__(self, other: WireUsage) -> WireUsage:
        return WireUsage(
            self.up + other.up,
            self.down + other.down,
            self.waited_s + other.waited_s,
            self.computed_s + other.computed_s,
            self.queued_s + other.queued_s,
        )

    def since(self, before: WireUsage) -> WireUsage:
        """What came on top of ``before``."""
        return WireUsage(
            self.up - before.up,
            self.down - before.down,
            self.waited_s - before.waited_s,
            self.computed_s - before.computed_s,
            self.queued_s - before.queued_s,
        )

    def copy(self) -> Self:
        """As it is now."""
        return type(self)(Counter(self.up), Counter(self.down), self.waited_s, self.computed_s, self.queued_s)


class Crossed(Protocol):
    """What a conversation with servers came to so far, over all connections."""

    @property
    def counters(self) -> WireCounters:
        """What crossed."""

    @property
    def usage(self) -> WireUsage:
        """Likewise, by role, and the time that it took."""

    @property
    def welcome(self) -> m.Welcome | None:
        """What the server that was asked last said of itself; None where none was."""

    @property
    def reconnects(self) -> int:
        """How often a connection was lost and replaced."""

    @property
    def resumed(self) -> int:
        """How often a session went on where it stood."""


@dataclass(frozen=True)
class CrossedSoFar:
    """``Crossed`` as it was at some time; by default, before anything crossed."""

    counters: WireCounters = (0, 0, 0)
    usage: WireUsage = field(default_factory=WireUsage)
    welcome: m.Welcome | None = None
    reconnects: int = 0
    resumed: int = 0

    @classmethod
    def of(cls, crossed: Crossed) -> Self:
        """As it is now."""
        return cls(crossed.counters, crossed.usage.copy(), crossed.welcome, crossed.reconnects, crossed.resumed)


def with_other(by_role: Mapping[str, int], total: int) -> dict[str, int]:
    """``by_role`` with ``other``, so that it adds up to ``total`` bytes: no role's, or crossed again."""
    rest = total - sum(by_role.values())
    return {**by_role, OTHER: rest} if rest > 0 else dict(by_role)
