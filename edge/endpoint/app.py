"""The HTTP side: routes, who may come in, and answers as they come."""

from __future__ import annotations

import hmac
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dlora.edge.generation.sampling import Sampling
from dlora.protocol.errors import DloraError

from .answers import Events, Generation
from .bodies import Bodies
from .errors import RequestError, as_request_error
from .event_stream import PING_EVERY_S, EventStream
from .formats import ChatFormat, CompletionFormat, Format
from .page import chat_page
from .requests import GenerationRequest, PromptLimit, read_chat, read_completion
from .responses import ResponsesFormat, read_response
from .slots import ServedAdapter, Slots
from .tools import ToolForm

_LOCAL_HOSTS: Final = ("localhost", "127.0.0.1", "::1")
_HOST: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([\w.-]+))(?::([0-9]*))?", re.ASCII)
_NO_KEY: Final = ("/", "/health")  # a page, which asks for the key itself, and whether there are answers


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a server answers with, and its answers.

    Attributes:
        base_name: what clients call the plain base model.
        adapters: gives the adapters that there are now; the first of all models is the default one.
        defaults: how tokens are chosen where a request says nothing.
        knows_tools, tool_form, prompt_limit: as ``read_chat`` takes them.
        api_key: who does not show it is refused; None: everybody may come in.
        hosts: names under which clients may reach the server; None: any.
        origins: web pages beside its own whose scripts may use it.
        log: is told of each request in one line, never of its content.
        problem: why it cannot answer yet; None once it can.
        is_stopping: whether it ends: answers under way end with what they have.
    """

    base_name: str
    adapters: Callable[[], Sequence[ServedAdapter]]
    generation: Generation
    slots: Slots
    defaults: Sampling
    knows_tools: bool
    tool_form: ToolForm | None
    prompt_limit: PromptLimit
    api_key: str | None
    hosts: Sequence[str] | None
    origins: Sequence[str]
    log: Callable[[str], None]
    problem: Callable[[], str | None]
    is_stopping: Callable[[], bool]
    _bodies: Bodies = field(default_factory=Bodies)

    async def health(self, _: Request) -> Response:
        problem = self.problem()
        if problem is not None:
            return JSONResponse({"status": "loading", "reason": problem}, 503)
        slots = self.slots
        return JSONResponse({"status": "ok", "answering": slots.busy, "waiting": slots.waiting})

    async def page(self, _: Request) -> Response:
        return chat_page()

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model_entry(each) for each in self._models()]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(_model_entry(self._find(request.path_params["name"])))

    async def chat(self, request: Request) -> Response:
        asked = read_chat(
            await self._bodies.read(request), self.defaults, self.prompt_limit, knows_tools=self.knows_tools,
            tool_form=self.tool_form,
        )  # fmt: skip
        return await self._answer(request, asked, ChatFormat)

    async def response(self, request: Request) -> Response:
        asked = read_response(await self._bodies.read(request), self.defaults, self.prompt_limit)
        return await self._answer(request, asked, ResponsesFormat)

    async def completion(self, request: Request) -> Response:
        asked = read_completion(await self._bodies.read(request), self.defaults, self.prompt_limit)
        return await self._answer(request, asked, CompletionFormat)

    def _models(self) -> list[ServedAdapter]:
        try:
            return [*self.adapters(), ServedAdapter(self.base_name, None)]
        except DloraError as error:
            raise as_request_error(error) from None

    def _find(self, name: str) -> ServedAdapter:
        models = self._models()
        found = next((each for each in models if each.name == name), None) if name else models[0]
        if found is None:
            known = ", ".join(each.name for each in models[:8])
            raise RequestError(404, f"there is no model {name[:100]!r}; there are {known}", code="model_not_found",
                               param="model")  # fmt: skip
        return found

    async def _answer(self, request: Request, asked: GenerationRequest, form: type[Format]) -> Response:
        if (problem := self.problem()) is not None:
            raise RequestError(503, f"not ready yet: {problem}", retry_after_s=5)
        adapter = self._find(asked.model)
        format_ = form(asked, adapter.name)
        log = self._log(request, format_)
        events = Events(self.generation, self.slots, self.is_stopping, adapter, asked, request)
        try:
            await events.start(PING_EVERY_S if asked.stream else None)
        except RequestError:
            await events.close()
            raise
        if asked.stream:
            return EventStream(events, format_, log=log)
        try:
            async for event in events:
                format_.take(event)
        finally:
            await events.close()
        log()
        return JSONResponse(format_.whole())

    def _log(self, request: Request, format_: Format) -> Callable[[], None]:
        began = time.monotonic()

        def log() -> None:
            counters = format_.counters()
            prompt, tokens = sum(each.prompt_tokens for each in counters), sum(each.tokens for each in counters)
            self.log(
                f"{request.scope['path']}: {tokens} tokens after {prompt} of a prompt, "
                f"{time.monotonic() - began:.1f} s, "
                f"{sum(each.bytes_sent + each.bytes_received for each in counters) / 1e3:.0f} KB"
            )

        return log


def make_app(served: Served) -> Starlette:
    """The application."""
    routes = [
        Route("/v1/chat/completions", served.chat, methods=["POST"]),
        Route("/v1/responses", served.response, methods=["POST"]),
        Route("/v1/completions", served.completion, methods=["POST"]),
        Route("/v1/models", served.models),
        Route("/v1/models/{name:path}", served.model),
        Route("/health", served.health),
        Route("/", served.page),
    ]
    middleware = [Middleware(_Door, served=served)]
    if served.origins:
        cors = Middleware(CORSMiddleware, allow_origins=list(served.origins), allow_methods=["*"], allow_headers=["*"])
        middleware.insert(0, cors)
    handlers = {RequestError: _error_response, 404: _not_found, 405: _wrong_method}
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)  # type: ignore[arg-type]
    app.router.redirect_slashes = False  # to an address that would be made of the peer's Host
    return app


def _error_response(_: Request, error: RequestError) -> Response:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


def _not_found(request: Request, _: Exception) -> Response:
    return _error_response(request, RequestError(404, f"there is no {request.method} {request.scope['path']} here"))


def _wrong_method(request: Request, _: Exception) -> Response:
    return _error_response(request, RequestError(405, f"{request.scope['path']} takes no {request.method}"))


class _Door:
    """Lets requests in. A page in a browser of this machine can send requests to any port of it: it has an origin, or
    comes under a name that is not ours."""

    def __init__(self, app: ASGIApp, served: Served) -> None:
        self._app = app
        self._served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            self._check(request)
        except RequestError as error:
            await _error_response(request, error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check(self, request: Request) -> None:
        """Nothing here may look at ``request.url``: that is made of the ``Host`` that the peer names, path and all."""
        served = self._served
        # First: a page of a name that was pointed at this machine has an origin that equals its Host.
        host = _host_name(request.headers.get("host"))
        if served.hosts is not None and host not in served.hosts:
            raise RequestError(403, f"this server is not called {host!r}; use its address")
        origin = request.headers.get("origin")
        if origin is not None and not (self._is_named(origin) or self._is_own(origin, request.headers.get("host"))):
            text = "pages of other sites may not use this server; allow this one with --cors"
            raise RequestError(403, f"{text} (behind a proxy: have it pass on the Host)")
        if served.api_key is None or request.scope["path"] in _NO_KEY:
            return
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(shown.strip().encode(), served.api_key.encode()):
            raise RequestError(401, "give the server's key, as Authorization: Bearer KEY", code="invalid_api_key")

    def _is_named(self, origin: str) -> bool:
        return origin in self._served.origins or "*" in self._served.origins

    def _is_own(self, origin: str, host: str | None) -> bool:
        """Whether a request comes from a page of this server: its origin has the name and port of its ``Host``.

        That tells nothing where any ``Host`` is let in: whoever owns a name can point it at this machine, and the pages
        of that name are then the server's own for a browser. There the key decides, which a browser sends for no page
        by itself; where there is none either, no page is the server's own.
        """
        if self._served.hosts is None and self._served.api_key is None:
            return False
        # Of https, too: a proxy with TLS before this server passes on its own name. "null" is no origin of ours.
        scheme, separator, place = origin.partition("://")
        port = {"http": "80", "https": "443"}.get(scheme)
        if port is None or host is None or not separator or _HOST.fullmatch(place) is None:
            return False
        return _name_and_port(place, port) == _name_and_port(host, port)


def _host_name(header: str | None) -> str:
    """The name or address in a ``Host`` header, without a port; "" where there is none. Raises ``RequestError``."""
    if header is None:
        return ""
    if _HOST.fullmatch(header) is None:
        raise RequestError(400, "the Host header is no name or address; use the server's own")
    return _name_and_port(header, "")[0]


def _name_and_port(place: str, default: str) -> tuple[str, str]:
    """Of what ``_HOST`` matches."""
    found = _HOST.fullmatch(place)
    assert found is not None
    return (found[1] or found[2]).lower().rstrip("."), found[3] or default


def local_hosts(host: str) -> Sequence[str] | None:
    """The names of a server that only its own machine reaches; None for one that listens to others."""
    return _LOCAL_HOSTS if host in ("127.0.0.1", "::1", "localhost") else None


def _model_entry(adapter: ServedAdapter) -> dict[str, Any]:
    created = adapter.version // 10**9
    return {"id": adapter.name, "object": "model", "created": created, "owned_by": "dlora"}
