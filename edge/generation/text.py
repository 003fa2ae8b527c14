"""The text of an answer as it grows, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from dlora.edge.data.prompt import TextStream
from dlora.protocol.errors import DloraError, UsageError

MAX_STOPS = 16


class AnswerText:
    """Text for the reader, token by token. What may be the beginning of a stop string is held back until it is clear.

    Args:
        stop: texts that end the answer, and are no part of it.

    Attributes:
        text: all of the answer that the reader has.
        has_stopped: whether a stop string came.

    Raises ``UsageError`` for a stop string that is empty, and for too many.
    """

    def __init__(self, stream: TextStream, stop: Sequence[str] = ()) -> None:
        if len(stop) > MAX_STOPS or not all(stop):
            raise UsageError(f"stop strings must not be empty, nor more than {MAX_STOPS}")
        self.text = ""
        self.has_stopped = False
        self._stream = stream
        self._stop = tuple(stop)
        self._held = ""

    def push(self, token: int) -> str:
        """What the reader gets now."""
        self._held += self._stream.push(token)
        found = [place for place in map(self._held.find, self._stop) if place >= 0]
        if found:
            self.has_stopped = True
            return self._give(min(found))
        return self._give(len(self._held) - self._possible_beginning())

    def finish(self) -> str:
        """The rest, where no stop string came any more."""
        return "" if self.has_stopped else self._give(len(self._held))

    def close(self) -> None:
        """Forget the stream; where its process is gone, there is nothing to forget."""
        with suppress(DloraError):
            self._stream.close()

    def _give(self, length: int) -> str:
        given, self._held = self._held[:length], self._held[length:]
        self.text += given
        return given

    def _possible_beginning(self) -> int:
        """Characters at the end of what is held that a stop string may begin with."""
        longest = max(map(len, self._stop), default=0)
        for length in range(min(longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
