"""The page to chat on, which asks nothing of anybody but the server that it came from."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources
from typing import Final

from starlette.responses import Response

_INLINE: Final = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def chat_page() -> Response:
    """The answer to ``GET /``. It has nothing of the server in it, so it is given to whoever asks, without a key."""
    content, policy = _page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",  # another version of the server has another page
    }
    return Response(content, media_type="text/html", headers=headers)


@functools.cache
def _page() -> tuple[str, str]:
    """The page, and what it may do: run its own script, have its own style, and ask its own server."""
    content = resources.files(__package__).joinpath("chat.html").read_text(encoding="utf-8")
    digests = {"script": "", "style": ""}
    for kind, text in _INLINE.findall(content):
        digests[kind] += f" 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    sources = f"script-src{digests['script']}; style-src{digests['style']}; connect-src 'self'"
    return content, f"default-src 'none'; {sources}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
