"""Why connections end beneath messages: in the log, and as a label of a metric."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """What ends a connection beneath messages, as the log has it."""

    MANY_CONNECTIONS = "too many connections without a session"
    MANY_BYTES = "too many bytes without a session"
    NO_TLS = "no TLS handshake"
    PINGS = "a flood of pings"
    TEXT = "a text frame"
    FRAGMENTS = "a message in fragments"
    NO_MEMORY = "more messages than there is memory for"
    MESSAGES = "a flood of messages"
    UNREAD = "answers that nobody reads"
