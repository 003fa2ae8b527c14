"""Whom connections count for, and how many of them a process may have."""

from __future__ import annotations

import ipaddress
import resource


def source_of(address: str) -> str:
    """Whom an IP address belongs to, as far as limits are concerned: of IPv6 a /64, which is what one customer has, and
    an IPv4 address in IPv6's clothes is that address. What is no address is a source of its own."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or ipaddress.ip_network((int(found) >> 64 << 64, 64)))


def raise_file_limit() -> int:
    """Let this process open as many files, and so connections, as it may; gives that number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
