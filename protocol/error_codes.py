"""The codes of the wire's ``error``."""

from enum import StrEnum


class ErrorCode(StrEnum):
    """Why the server refused or closed; stable names. ``retryable`` of ``Error`` says whether to come again."""

    PROTOCOL = "protocol"
    VERSION = "version"
    BASE_MODEL_MISMATCH = "base_model_mismatch"
    UNKNOWN_TARGET = "unknown_target"
    LIMIT = "limit"
    NON_FINITE = "non_finite"
    TICKET = "ticket"
    DAMAGED = "damaged"
    DEADLINE = "deadline"
    FLOOD = "flood"
    TOKEN_MISSING = "token_missing"
    TOKEN_WRONG = "token_wrong"
    TOKEN_EXPIRED = "token_expired"
    TOKEN_REVOKED = "token_revoked"
    TOO_MANY_FAILURES = "too_many_failures"
    QUOTA_SESSIONS = "quota_sessions"
    QUOTA_TOKENS = "quota_tokens"
    QUOTA_LIVE_BYTES = "quota_live_bytes"
    QUOTA_COMPUTE = "quota_compute"
    BUSY = "busy"
    SHUTTING_DOWN = "shutting_down"
    INTERNAL = "internal"
