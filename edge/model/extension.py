"""What a model gives for a text that goes on, and what the server is to guess that may follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dlora.protocol.tensors import FloatArray


class Guesses(NamedTuple):
    """What a server is asked to guess, as far as there is room and it can.

    Attributes:
        drafts: how many tokens after the last one; the model has had them then.
        ahead: how many after the one that it expects to be chosen next, to begin with these before they are asked for;
            None: not to.
    """

    drafts: int = 0
    ahead: int | None = None


class Fed(NamedTuple):
    """What blocks on the device were given of a text: how many of its tokens need not cross again, which tokens the
    server has guessed after it, which they have had, too, and the seconds that it took to guess these."""

    held: int
    drafts: tuple[int, ...] = ()
    drafts_s: float = 0.0


@dataclass(frozen=True)
class Extension:
    """What a model gives.

    Attributes:
        logits: float32 (count + drafts, vocabulary), of what follows the last ``count`` tokens and each draft.
        drafts: the tokens that the server has guessed.
        held: how many tokens of the text it held already; 0 where it has lost them.
        drafts_s: seconds that it took to guess these.
        expects: the token with which the server goes on meanwhile; None: it does not.
    """

    logits: FloatArray
    drafts: tuple[int, ...] = ()
    held: int = 0
    drafts_s: float = 0.0
    expects: int | None = None
