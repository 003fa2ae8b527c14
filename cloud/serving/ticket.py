"""Signed tickets: a controller's state as opaque bytes that the device keeps, so that any replica can go on.

The controller itself is in ``dlora.protocol.controller`` and knows of no keys.

::

    offset  bytes
    0       magic, with the format's version, 5 bytes
    5       digest of what the state belongs to, SHA-256, 32 bytes
    37      the state
    end-32  HMAC-SHA256 of everything before it
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from dlora.protocol.controller import Controller, state_bytes
from dlora.protocol.errors import RefusedError

MAGIC: Final = b"DLKR\x01"
DIGEST_BYTES: Final = 32
OVERHEAD_BYTES: Final = len(MAGIC) + 2 * DIGEST_BYTES


def ticket_of(controller: Controller, key: bytes) -> bytes:
    """The controller's whole state, signed with ``key``; its size depends on the number of units alone."""
    body = MAGIC + controller.digest + controller.state()
    return body + _mac(body, key)


def load_ticket(controller: Controller, ticket: bytes, key: bytes, next_step: int) -> None:
    """Let a ``controller`` that was just made go on at ``next_step``, from the state that ``ticket`` holds.

    Raises ``RefusedError`` with code ``ticket`` if it is forged, damaged, of a run with other settings, groups,
    seed or length, or does not stand at ``next_step``.
    """
    try:
        controller.load_state(_verify(bytes(ticket), controller.digest, key))
    except ValueError:
        raise RefusedError("the ticket has the wrong length", code="ticket") from None
    if controller.next_step != next_step:
        raise RefusedError(
            f"the ticket stands at step {controller.next_step}, the session at step {next_step}", code="ticket"
        )


def ticket_bytes(units: int) -> int:
    """Size of a controller's ticket, in bytes."""
    return OVERHEAD_BYTES + state_bytes(units)


def _verify(ticket: bytes, digest: bytes, key: bytes) -> bytes:
    """The state in a ticket that is ours, unchanged, and bound to ``digest``; else raises ``RefusedError``."""
    if len(ticket) < OVERHEAD_BYTES or not ticket.startswith(MAGIC):
        raise RefusedError("this is not a ticket of this version; start the run afresh", code="ticket")
    body, mac = ticket[:-DIGEST_BYTES], ticket[-DIGEST_BYTES:]
    if not hmac.compare_digest(mac, _mac(body, key)):
        text = "the ticket's signature is wrong: another server's, or damaged; a server has its key in --state-dir"
        raise RefusedError(text, code="ticket")
    start = len(MAGIC)
    if not hmac.compare_digest(body[start : start + DIGEST_BYTES], digest):
        raise RefusedError("the ticket belongs to a run with other settings, groups, seed or steps", code="ticket")
    return body[start + DIGEST_BYTES :]


def _mac(body: bytes, key: bytes) -> bytes:
    return hmac.digest(key, body, hashlib.sha256)
