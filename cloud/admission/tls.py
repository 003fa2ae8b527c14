"""TLS of the server, and the refusal to serve strangers without it."""

from __future__ import annotations

import ssl
from pathlib import Path

from dlora.protocol.connections import is_loopback
from dlora.protocol.errors import UsageError
from dlora.protocol.files import check_readable


def server_context(cert: Path, key: Path | None, client_ca: Path | None = None) -> ssl.SSLContext:
    """TLS 1.2 or newer with this certificate chain.

    Args:
        cert: PEM, the server's certificate first, then what leads to the root.
        key: PEM, not encrypted; None where it stands in ``cert``.
        client_ca: PEM; where given, a client may show a certificate that it signed, and none but such.

    Raises ``UsageError`` where a file is missing, damaged or belongs to another.
    """
    for option, path in (("--tls-cert", cert), ("--tls-key", key), ("--tls-client-ca", client_ca)):
        check_readable(option, path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Devices take up no TLS session again. A ticket would come just as a device's threads begin to read and to write,
    # and OpenSSL takes no two in one connection while it handles one: once in some thousand times the device stood
    # still (docs/log/experiments.md).
    context.num_tickets = 0

    def refuse_password() -> str:  # without it OpenSSL would ask for one on the terminal
        raise UsageError(f"--tls-key {key or cert} is encrypted; decrypt it: openssl pkey -in {key or cert} -out KEY")

    try:
        context.load_cert_chain(cert, key, password=refuse_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(f"--tls-key {key or cert} is not the key of --tls-cert {cert}") from None
        files = f"--tls-cert {cert}" + (f" or --tls-key {key}" if key else " (--tls-key is missing)")
        raise UsageError(f"{files} is no certificate or key in PEM form") from None
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except ssl.SSLError:
            raise UsageError(f"--tls-client-ca {client_ca} is no certificate in PEM form") from None
        # Who shows none is for ``Access`` to judge: it takes tokens too, and can say why it refuses. TLS 1.3 cannot:
        # the device would see no more than a server that hangs up.
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def check_exposure(host: str, *, tls: bool, authenticated: bool, insecure: bool) -> None:
    """Raise ``UsageError`` where the server would be open to a network without protection.

    Args:
        authenticated: whether a device must bring a token or a client certificate.
        insecure: whether the operator said ``--insecure``.
    """
    if insecure or is_loopback(host):
        return
    if not tls:
        raise UsageError(
            f"--host {host} is not loopback, and what devices send could be read on the way; give --tls-cert and "
            "--tls-key, or listen on 127.0.0.1 behind a proxy that speaks TLS, or add --insecure"
        )
    if not authenticated:
        raise UsageError(
            f"--host {host} is not loopback, and anybody could train; create a token first: dlora-cloud token create "
            "--device NAME, or give --tls-client-ca, or add --insecure"
        )
