"""Cookies of a server's handshakes, shown again at the next: a proxy finds by them where a device's session is."""

from __future__ import annotations

from http.cookies import CookieError, SimpleCookie
from typing import Final

from websockets.datastructures import Headers

MOST_BYTES: Final = 4096  # as of one cookie in RFC 6265, section 6.1


class Cookies:
    """What one server has set last. Kept in memory, for as long as the conversation lasts, and shown to nobody else.

    Of a cookie's attributes none counts: there is one server, and one path.
    """

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def headers(self) -> dict[str, str]:
        """The header of the next handshake, or none."""
        return {"Cookie": "; ".join(f"{name}={value}" for name, value in self._values.items())} if self._values else {}

    def keep(self, answer: Headers) -> None:
        """Keep what an answer sets: one without a value is dropped, and so are all where they are too large."""
        for line in answer.get_all("Set-Cookie"):
            try:
                found = SimpleCookie(line)
            except CookieError:  # a name that no cookie may have
                continue
            self._values |= {name: morsel.coded_value for name, morsel in found.items()}
        self._values = {name: value for name, value in self._values.items() if value}
        if sum(map(len, (*self._values, *self._values.values()))) > MOST_BYTES:
            self._values = {}
