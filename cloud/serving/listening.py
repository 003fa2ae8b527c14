"""Whether an address can be listened on, and what to say where it cannot."""

from __future__ import annotations

import os
import socket

from dlora.protocol.errors import ConnectionFailedError


def check_address(host: str, port: int, options: str = "--port or --host") -> None:
    """Raise ``ConnectionFailedError`` where nobody can listen there now: before a model is loaded for minutes."""
    try:
        for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            socket.create_server(address[:2], family=family).close()
    except OSError as error:
        raise cannot_listen(host, port, error, options) from None


def cannot_listen(host: str, port: int, error: OSError, options: str = "--port or --host") -> ConnectionFailedError:
    """The one line for an address that cannot be had, which ``options`` say."""
    reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
    return ConnectionFailedError(f"cannot listen on {host}:{port}: {reason}; choose another {options}")
