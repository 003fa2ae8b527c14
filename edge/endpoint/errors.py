"""What a client is told that asked for something that cannot be."""

from __future__ import annotations

from typing import Any, Final

from dlora.protocol import errors

QUEUE_RETRY_S: Final = 5


class RequestError(Exception):
    """A request that is refused.

    Attributes:
        status: of the HTTP answer; code, param: as OpenAI's errors have them.
        retry_after_s: when it may be asked again; None: the same will be refused again.
    """

    def __init__(
        self,
        status: int,
        text: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(text)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def as_request_error(error: errors.DloraError, shaped_by: str | None = None) -> RequestError:
    """What an error of ours is for the client whose request met it: its own fault, or the server's.

    ``shaped_by``: what of the request needs an extra.
    """
    text = str(error)
    match error:
        case errors.DataError() | errors.UsageError():
            code = "context_length_exceeded" if "say less" in text or "begin anew" in text else None
            return RequestError(400, text, code=code)
        case errors.MissingExtraError():
            return RequestError(400, text, param=shaped_by)
        case errors.CheckpointError() | errors.ModelMismatchError():
            return RequestError(409, text, param="model")
        case errors.ConnectionFailedError() | errors.StoppedError():
            return RequestError(503, text, retry_after_s=10)
        case errors.RefusedError() if error.retryable:
            return RequestError(503, text, retry_after_s=round(error.retry_after_s or 10))
        case errors.BundleError():
            return RequestError(500, text)
        case _:
            return RequestError(502, text)
