"""Whom a connection is for where a proxy stands in front: of those that the operator trusts, what they say of it.

Anybody can send these headers. They count only from an address that was given as ``--trusted-proxy``, and a proxy that
is trusted overwrites what its own clients send (packaging/haproxy.cfg).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from websockets.datastructures import Headers

from dlora.protocol.connections import parse_address
from dlora.protocol.errors import UsageError

FORWARDED_FOR: Final = "X-Forwarded-For"
# As in HAProxy's manual; RFC 9440 hands on whole certificates, which would have to be parsed here.
CERTIFICATE_NAME: Final = "X-SSL-Client-CN"


@dataclass(frozen=True)
class Origin:
    """Where a connection comes from.

    Attributes:
        address: an IP address.
        certificate_name: the common name of the certificate that was shown and verified, fit for a log; None for none.
    """

    address: str
    certificate_name: str | None = None


class TrustedProxies:
    """The proxies that are believed.

    Args:
        addresses: of proxies, or of networks with nothing else in them (``10.0.0.0/29``).

    Raises ``UsageError`` where one is neither.
    """

    def __init__(self, addresses: Iterable[str] = ()) -> None:
        try:
            self._networks = tuple(ipaddress.ip_network(address) for address in addresses)
        except ValueError as error:
            text = f"--trusted-proxy: {error}; give an IP address, or a network as 10.0.0.0/29"
            raise UsageError(text) from None

    def origin(self, peer: str, certificate: Mapping[str, Any] | None, headers: Headers) -> Origin:
        """Where a connection comes from: what a trusted proxy says, and otherwise ``peer``.

        The right-most address is the one that the proxy saw; what stands before it came from there. The certificate of
        a proxy is its own and no device's.

        Args:
            peer: the address at the other end of the connection.
            certificate: what ``ssl.SSLObject.getpeercert`` says of one that it has verified.
        """
        found = parse_address(peer)
        if found is None or not any(found in network for network in self._networks):
            return Origin(peer, _fit_for_log(_common_name(certificate)))
        seen, names = headers.get_all(FORWARDED_FOR), headers.get_all(CERTIFICATE_NAME)
        address = parse_address(seen[-1].rpartition(",")[2].strip()) if seen else None
        return Origin(peer if address is None else str(address), _fit_for_log(names[-1] if names else ""))


def _common_name(certificate: Mapping[str, Any] | None) -> str:
    for attributes in (certificate or {}).get("subject", ()):
        for key, value in attributes:
            if key == "commonName":
                return str(value)
    return ""


def _fit_for_log(name: str) -> str | None:
    return re.sub(r"[^\w.@ -]", "?", name, flags=re.ASCII)[:64] or None
