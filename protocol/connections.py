"""Whom connections count for, which of them never leave this machine, and how many a process may have."""

from __future__ import annotations

import ipaddress
import resource

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def source_of(address: str) -> str:
    """Whom an IP address belongs to, as far as limits are concerned: of IPv6 a /64, which is what one customer has, and
    an IPv4 address in IPv6's clothes is that address. What is no address is a source of its own."""
    found = parse_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))
    return address if found is None else str(found)


def is_loopback(host: str) -> bool:
    """Whether ``host`` is loopback: ``localhost`` or such an address, with or without brackets. Both sides let plain
    ``ws://`` go there and nowhere else.

    Other names are not, wherever they resolve to: what they resolve to can change.
    """
    found = parse_address(host.removeprefix("[").removesuffix("]"))
    return host.lower() == "localhost" or (found is not None and found.is_loopback)


def raise_file_limit() -> int:
    """Let this process open as many files, and so connections, as it may; gives that number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def parse_address(text: str) -> IPAddress | None:
    """The IP address that ``text`` is, an IPv4 address in IPv6's clothes as that; None where it is none."""
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found
