"""The units of a session, as both sides hold them: their states, and what the device gives the server of them.

``Session`` says when a message may come; here is what one may say of units.
"""

from __future__ import annotations

import numpy as np

from . import messages as m
from .adapters import kind_of
from .errors import ViolationError
from .groups import group_units
from .kill_revive import LIVE, KillReviveConfig, UnitState
from .micro_batch import GroupStates
from .tensors import ByteArray, WireTensor


class Units:
    """What Kill and Revive switches in a session; nothing where a session does not train.

    Attributes:
        states: uint8 (units,), the ``UnitState`` of each as last signalled; groups: the exchange groups of each.
        group_states: the exchange groups that take part, by what their units do.
        handed_over: the groups whose parameters E has given C, as long as their units are HELD or GIVEN, or lent.
    """

    def __init__(self, opened_with: m.OpenSession | None = None) -> None:
        self.states: ByteArray = np.zeros(0, np.uint8)
        self.groups: tuple[tuple[int, ...], ...] = ()
        self.group_states = GroupStates()
        self.handed_over: set[int] = set()
        self._opened_with = opened_with
        self._config: KillReviveConfig | None = None
        if opened_with is None:
            return
        if isinstance(opened_with.purpose, m.Train):
            self._config = opened_with.purpose.kill_revive
            self.groups = group_units(opened_with.groups, self._config.unit)
        elif self._lends:
            self.group_states = GroupStates(given=frozenset(range(len(opened_with.groups))))
        else:
            self.group_states = GroupStates(tuple(range(len(opened_with.groups))))

    @property
    def _lends(self) -> bool:
        purpose = None if self._opened_with is None else self._opened_with.purpose
        return isinstance(purpose, m.Use) and purpose.lends

    @property
    def groups_to_give(self) -> list[int]:
        """The groups whose parameters C must have and has not: of GIVEN units before the next micro-batch, of HELD ones
        before the next report; of all that are lent. In their order."""
        if self._lends:
            return sorted(self.group_states.given - self.handed_over)
        if self._config is None or not self._config.gives_to_server:
            return []
        return sorted(self._groups_in(UnitState.HELD, UnitState.GIVEN) - self.handed_over)

    def take_opened(self, states: WireTensor) -> None:
        """What C says of the units as it opens the session. Raises ``ViolationError`` for what it may not say."""
        self._check(states)
        assert self._opened_with is not None
        purpose = self._opened_with.purpose
        assert isinstance(purpose, m.Train)
        if purpose.ticket is None and (states.data == UnitState.GIVEN).any():
            raise ViolationError("units given to the server before the run's first step")
        self._take(states.data)

    def take_signalled(self, states: WireTensor) -> None:
        """The same of a signal, by which no unit becomes GIVEN that E has not given."""
        self._check(states)
        for state, groups in zip(states.data.tolist(), self.groups, strict=True):
            if state == UnitState.GIVEN and not self.handed_over.issuperset(groups):
                raise ViolationError(f"group {groups[0]} given to the server, which the device has not done")
        self._take(states.data)

    def check_parameters(self, message: m.GroupParameters) -> tuple[tuple[int, ...], ...]:
        """The shapes that E must give of this group. Raises ``ViolationError`` where it is not the next to be given."""
        to_give = self.groups_to_give
        if not to_give or message.group != to_give[0]:
            raise ViolationError(f"the parameters of group {message.group}, which are not due")
        assert self._opened_with is not None
        adapter, group = self._opened_with.adapter, self._opened_with.groups[message.group]
        return tuple(kind_of(adapter).parameter_shapes(adapter, group).values())

    def check_given_before_report(self) -> None:
        """Raise ``ViolationError`` where E still has to give something."""
        if to_give := self.groups_to_give:
            raise ViolationError(f"a report before the parameters of group {to_give[0]}")

    def check_given_before_micro_batch(self) -> None:
        """Raise ``ViolationError`` where C could not apply what it is to apply."""
        if missing := self.group_states.given - self.handed_over:
            raise ViolationError(f"a micro-batch before the parameters of group {min(missing)}")

    def _check(self, states: WireTensor) -> None:
        config = self._config
        assert config is not None
        states.check("uint8", (len(self.groups),))
        if states.data.size and int(states.data.max()) > max(UnitState):
            raise ViolationError("an unknown unit state")
        if not config.gives_to_server and (states.data == UnitState.GIVEN).any():
            raise ViolationError("units given to the server, which the device did not ask for")
        active = states.data == UnitState.ACTIVE
        if config.score == "static" and not active[list(config.static)].all():
            raise ViolationError("a unit is not active that the device has named")
        if int(active.sum()) < config.budget_floor(len(active)) or not active[list(config.pinned)].all():
            raise ViolationError("fewer active units than the device asked for")

    def _take(self, states: ByteArray) -> None:
        self.states = states
        self.group_states = GroupStates(
            tuple(sorted(self._groups_in(*LIVE))),
            frozenset(self._groups_in(UnitState.ACTIVE)),
            frozenset(self._groups_in(UnitState.GIVEN)),
        )
        self.handed_over &= self._groups_in(UnitState.HELD, UnitState.GIVEN)

    def _groups_in(self, *states: UnitState) -> set[int]:
        """The groups of the units that are in one of these states."""
        units = zip(self.states.tolist(), self.groups, strict=True) if self.states.size else ()
        return {group for state, groups in units if state in states for group in groups}
