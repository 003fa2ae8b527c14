"""Which addresses never leave this machine: both sides let plain ``ws://`` go there and nowhere else."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether ``host`` is loopback: ``localhost`` or such an address, with or without brackets.

    Other names are not, wherever they resolve to: what they resolve to can change.
    """
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
