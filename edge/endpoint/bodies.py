"""Bodies of requests, while they come: how large, how slow, and how much of all of them together."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final

from starlette.requests import ClientDisconnect, Request

from .errors import QUEUE_RETRY_S, RequestError

MAX_BODY_BYTES: Final = 2 << 20  # it is decoded on the event loop
MAX_BODIES_BYTES: Final = 32 << 20
BODY_S: Final = 60.0


@dataclass(eq=False)
class _Body:
    content: bytearray = field(default_factory=bytearray)
    gave_way: bool = False


class Bodies:
    """Reads bodies. Of those that come at a time the largest gives way where all of them are too much together, so that
    a small one is read however many large ones come, or stand still in the middle.

    Args:
        most: bytes of all that are being read.
    """

    def __init__(self, most: int = MAX_BODIES_BYTES) -> None:
        self._most = most
        self._under_way: list[_Body] = []

    async def read(self, request: Request) -> bytearray:
        """The whole body.

        Raises ``RequestError``: 413 for one that is too large, before all of it has come, 408 for one that takes longer
        than ``BODY_S``, 429 for one that gave way, 499 where the client has left.
        """
        body = _Body()
        self._under_way.append(body)
        try:
            async with asyncio.timeout(BODY_S):
                async for part in request.stream():
                    self._take(body, part)
                    _check(body)
        except ClientDisconnect:
            raise RequestError(499, "the client left") from None
        except TimeoutError:
            raise RequestError(408, f"the request's body did not come within {BODY_S:.0f} s; send it again") from None
        finally:
            self._under_way.remove(body)
        return body.content

    def _take(self, body: _Body, part: bytes) -> None:
        body.content += part
        while sum(len(each.content) for each in self._under_way) > self._most:
            largest = max(self._under_way, key=lambda each: len(each.content))
            largest.content, largest.gave_way = bytearray(), True


def _check(body: _Body) -> None:
    if len(body.content) > MAX_BODY_BYTES:
        raise RequestError(413, f"a request may have {MAX_BODY_BYTES >> 20} MB")
    if body.gave_way:
        text = "too many large requests come at a time; send it again"
        raise RequestError(429, text, retry_after_s=QUEUE_RETRY_S)
