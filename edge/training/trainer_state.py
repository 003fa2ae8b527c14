"""What a checkpoint of a run holds beside its tensors."""

from __future__ import annotations

import msgspec

from dlora.protocol.errors import CheckpointError
from dlora.protocol.groups import Gain
from dlora.protocol.structure_words import structure_words

from .checkpoint import Checkpoint
from .resolved import RunIdentity


class TrainerState(msgspec.Struct, frozen=True, kw_only=True):
    """As it is saved.

    Attributes:
        run: whose step comes next.
        ticket: the controller's state, before the report of the last step where that is ``unanswered``.
        fade_ages, adam_steps, states: one a unit.
        unanswered: whether the last step's report must be sent again; its scores are among the tensors.
        gains: of target modules, by name.
    """

    next_step: int
    run: RunIdentity
    ticket: bytes
    unanswered: bool = False
    states: list[int]
    fade_ages: list[int]
    adam_steps: list[int]
    gains: dict[str, Gain]


def trainer_state(checkpoint: Checkpoint) -> TrainerState:
    """Of a checkpoint. Raises ``CheckpointError`` for one of another version."""
    try:
        return msgspec.convert(checkpoint.state, TrainerState)
    except msgspec.ValidationError as error:
        reason = structure_words(error)
        raise CheckpointError(f"{checkpoint.path} is of another version ({reason}); start anew") from None
