"""Who may say what when: the states of a conversation and of its micro-batches, and what leads from one to the next."""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from . import messages as m


class Side(Enum):
    """The device or the server."""

    EDGE = "edge"
    CLOUD = "cloud"


class State(Enum):
    """Where a conversation stands; from FORWARD to BACKWARD, where a micro-batch of it stands."""

    START = auto()
    GREETING = auto()
    GREETED = auto()
    OPENING = auto()
    RESUMING = auto()
    RESUMED = auto()
    SETTING_UP = auto()
    MAKING_STATE = auto()
    TAKING_STATE = auto()
    TAKING_PARAMETERS = auto()
    IDLE = auto()
    FORWARD = auto()
    AHEAD = auto()
    LOSS = auto()
    BACKWARD = auto()
    CLOSED = auto()


E, C = Side.EDGE, Side.CLOUD

TRANSITIONS: Final[dict[State, dict[type, tuple[Side, State]]]] = {
    State.START: {m.Hello: (E, State.GREETING)},
    State.GREETING: {m.Welcome: (C, State.GREETED)},
    State.GREETED: {
        m.OpenSession: (E, State.OPENING),
        m.ResumeSession: (E, State.RESUMING),
        m.CloseSession: (E, State.CLOSED),
    },
    State.OPENING: {m.SessionOpened: (C, State.IDLE)},
    State.RESUMING: {m.SessionResumed: (C, State.RESUMED), m.SessionGone: (C, State.GREETED)},
    State.RESUMED: {},
    State.SETTING_UP: {
        m.AdapterState: (E, State.TAKING_STATE),
        m.MakeAdapterState: (E, State.MAKING_STATE),
        m.CloseSession: (E, State.CLOSED),
    },
    State.MAKING_STATE: {m.AdapterState: (C, State.SETTING_UP)},
    State.TAKING_STATE: {m.AdapterState: (C, State.SETTING_UP)},
    State.TAKING_PARAMETERS: {m.GroupParameters: (C, State.IDLE)},
    State.IDLE: {
        m.Embeddings: (E, State.FORWARD),
        m.GroupParameters: (E, State.TAKING_PARAMETERS),
        m.StepReport: (E, State.IDLE),
        m.CloseSession: (E, State.CLOSED),
    },
    State.FORWARD: {
        m.DraftTokens: (C, State.FORWARD),
        m.GroupInput: (C, State.FORWARD),
        m.GroupDelta: (E, State.FORWARD),
        m.LabelledHiddenStates: (C, State.LOSS),
        m.EncodedHiddenStates: (C, State.IDLE),
    },
    State.AHEAD: {
        m.DraftTokens: (C, State.AHEAD),
        m.GroupInput: (C, State.AHEAD),
        m.Embeddings: (E, State.FORWARD),
        m.CloseSession: (E, State.CLOSED),
    },
    State.LOSS: {m.GradHiddenStates: (E, State.BACKWARD)},
    State.BACKWARD: {m.GroupGrad: (C, State.BACKWARD), m.GroupInputGrad: (E, State.BACKWARD)},
    State.CLOSED: {},
}
"""State, then message type, to (who may send it, next state). Some rules stand beside the table:
``SessionOpened`` leads to SETTING_UP where the adapters' kind keeps state on the server, and C's last ``AdapterState``
to IDLE; in SETTING_UP, before the first state, micro-batches of the mode ``basis`` may be run, one at a time, which
``GradHiddenStates`` ends; ``LabelledHiddenStates`` with a ``next_token`` leads
to AHEAD; with no gradients to come, it leads to IDLE, as the last message of AHEAD and of BACKWARD do;
C sends ``Signal`` while a ``StepReport`` is unanswered, before it asks for anything of a micro-batch; either side may
send ``Error``."""
