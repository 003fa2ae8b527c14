"""The page of ``dlora-edge serve``, and which pages may ask the server: headers, origins, and a chat in Chromium."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, browser
from endpoints import CHAT, GOOD, Endpoint, Place, endpoint_place, endpoint_process
from waiting import eventually

from dlora.edge.endpoint.running import page_url

KEY = "a-long-secret"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with endpoint_place(tmp_path_factory.mktemp("endpoint")) as made:
        yield made


@pytest.fixture(scope="module")
def endpoint(place: Place) -> Iterator[Endpoint]:
    with endpoint_process(place, "--adapters", place.adapters, "--max-new-tokens", 400) as running:
        eventually(running.is_ready)
        yield running


@pytest.fixture(scope="module")
def locked(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """One with a key, which lets any ``Host`` in."""
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text(f"{KEY}\n")
    arguments = ("--adapters", place.adapters, "--max-new-tokens", 16, "--host", "0.0.0.0", "--api-key-file", file)
    with endpoint_process(place, *arguments) as running:
        eventually(running.is_ready)
        yield running


# -- what is sent -------------------------------------------------------------------------------------------


def test_the_page_comes_without_a_key_and_may_ask_nobody_else(locked: Endpoint) -> None:
    connection = HTTPConnection("127.0.0.1", locked.port, timeout=60)
    connection.request("GET", "/")
    answer = connection.getresponse()
    content = answer.read().decode()
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    policy = dict(each.strip().split(" ", 1) for each in answer.headers["Content-Security-Policy"].split(";"))
    digests = {name: policy.pop(name) for name in ("script-src", "style-src")}
    assert all(re.fullmatch(r"'sha256-[\w+/]{43}='", digest, re.ASCII) for digest in digests.values())
    assert policy == {"connect-src": "'self'"} | dict.fromkeys(
        ("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'"
    )
    wanted = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
    assert {name: answer.headers[name] for name in wanted} == wanted
    assert not re.search(r"https?://|//\w+\.|innerHTML|localStorage|sessionStorage|cookie", content)
    assert locked.request("/", {})[0] == 405
    assert locked.request("/v1/models", method="GET")[0] == 401


# -- which pages may ask ------------------------------------------------------------------------------------


def status(endpoint: Endpoint, **headers: str) -> int:
    return endpoint.request(CHAT, GOOD, **headers)[0]


def test_its_own_page_may_ask(endpoint: Endpoint) -> None:
    port = endpoint.port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "127.0.0.1:9000"):  # also by a tunnel
        assert status(endpoint, Host=host, Origin=f"http://{host}") == 200, host
    # A proxy with TLS before it, and names as browsers do not spell them.
    for host, origin in (
        ("localhost", "https://localhost"), ("localhost:443", "https://localhost"), ("localhost", "http://localhost"),
        ("LOCALHOST.", "http://localhost:80"), ("localhost:8443", "https://localhost:8443"),
    ):  # fmt: skip
        assert status(endpoint, Host=host, Origin=origin) == 200, (host, origin)


def test_a_page_of_another_place_may_not_ask(endpoint: Endpoint) -> None:
    port = endpoint.port
    own = f"127.0.0.1:{port}"
    for origin in (
        "http://evil.example", f"http://evil.example:{port}", f"http://127.0.0.1:{port + 1}", "http://127.0.0.1",
        f"https://127.0.0.1:{port + 1}", f"http://localhost:{port}", "null", "", own, f"file://{own}", f"ftp://{own}",
        f"http://{own}/", f"http://{own}@evil.example", f"http://{own}.evil.example", f"http://evil.example#{own}",
        f"http://{own} http://evil.example", f"http://{own}, http://evil.example", "http://", "http://[::1",
    ):  # fmt: skip
        assert status(endpoint, Host=own, Origin=origin) == 403, origin
    assert status(endpoint, Host="localhost:80", Origin="https://localhost") == 403


def test_a_name_that_is_pointed_at_this_machine_is_not_let_in(endpoint: Endpoint) -> None:
    """DNS rebinding: for a browser the page and the server are one origin then. Also the page itself is not given."""
    for name in ("evil.example", f"evil.example:{endpoint.port}", "127.0.0.1.evil.example"):
        for origin in (f"http://{name}", f"http://127.0.0.1:{endpoint.port}", "null"):
            assert status(endpoint, Host=name, Origin=origin) == 403, (name, origin)
        assert status(endpoint, Host=name) == 403
        assert endpoint.request("/", method="GET", Host=name)[0] == 403


def test_where_any_name_is_let_in_the_key_decides(locked: Endpoint) -> None:
    """A browser sends a page's requests without the key, unless the page itself has it."""
    name, bearer = "chat.example", {"Authorization": f"Bearer {KEY}"}
    for origin in (f"https://{name}", f"http://{name}"):
        assert status(locked, Host=name, Origin=origin) == 401
        assert status(locked, Host=name, Origin=origin, **bearer) == 200
    for origin in ("https://evil.example", "null", f"http://{name}:8080"):
        assert status(locked, Host=name, Origin=origin, **bearer) == 403, origin


# -- the first line -----------------------------------------------------------------------------------------


def test_the_first_line_says_what_to_open(place: Place, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    with endpoint_process(place) as running:
        assert running.process.stderr is not None
        line = running.process.stderr.readline()
    assert line.startswith(
        f"open http://127.0.0.1:{running.port}/ to chat; clients take http://127.0.0.1:{running.port}/v1; models:"
    )
    with endpoint_process(place, "--host", "0.0.0.0", "--api-key-file", tmp_path / "key") as running:
        assert running.process.stderr is not None
        line = running.process.stderr.readline()
    assert line.startswith(f"open http://127.0.0.1:{running.port}/ to chat")
    assert "; both ask for the key; elsewhere with this machine's name or address; models:" in line


def test_an_address_is_one_that_can_be_opened() -> None:
    hosts = ("127.0.0.1", "0.0.0.0", "192.168.1.7", "::1", "::", "fd00::7")
    shown = ["127.0.0.1", "127.0.0.1", "192.168.1.7", "[::1]", "[::1]", "[fd00::7]"]
    assert [page_url(host, 80) for host in hosts] == [f"http://{each}:80/" for each in shown]


# -- a chat in a browser ------------------------------------------------------------------------------------

in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
SIZES = [(390, False), (390, True), (1280, False), (1280, True)]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile"), offline=False) as page:
        yield page


def until(tab: Page, condition: str) -> None:
    """Wait until an expression of the page is true."""
    ends = time.monotonic() + 60
    while not tab.run(f"Boolean({condition})"):
        assert time.monotonic() < ends, (condition, tab.run("document.body.innerText"))
        tab.run("new Promise((done) => setTimeout(done, 20))")


def press(tab: Page, key: str, modifiers: int = 0) -> None:
    text = "\r" if key == "Enter" else ""
    for kind in ("keyDown", "keyUp"):
        tab.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, text=text if kind == "keyDown" else "",
                windowsVirtualKeyCode={"Enter": 13, "Tab": 9}[key], modifiers=modifiers)  # fmt: skip


def write(tab: Page, text: str) -> None:
    tab.run("message.focus()")
    tab.ask("Input.insertText", text=text)


def said(tab: Page, who: str) -> list[str]:
    return list(tab.run(f"[...document.querySelectorAll('.{who} .said')].map((each) => each.textContent)"))


def find_nothing(tab: Page, width: int) -> None:
    """Nothing that axe finds, nothing that is too wide."""
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.find_barriers() == []


@in_a_browser
@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_a_chat_is_answered_on_the_page(tab: Page, endpoint: Endpoint, width: int, dark: bool) -> None:
    tab.open(f"http://127.0.0.1:{endpoint.port}/", width=width, dark=dark)
    until(tab, "model.options.length === 3")
    assert tab.run("[...model.options].map((each) => each.value)") == endpoint.models
    find_nothing(tab, width)
    tab.run("model.value = 'second'")
    write(tab, "<b>One</b>" + "x" * 200)
    press(tab, "Enter", modifiers=8)  # Shift: a new line
    tab.ask("Input.insertText", text="two")
    assert tab.run("message.value").endswith("x\ntwo")
    press(tab, "Enter")
    until(tab, "answering === null && chat.length === 2")
    assert said(tab, "user") == ["<b>One</b>" + "x" * 200 + "\ntwo"]
    assert tab.run("chat[1].content") == said(tab, "assistant")[0] != ""
    assert tab.run("turns.querySelectorAll('b').length") == 0
    assert "the server allows" in tab.run("turns.innerText") or tab.run("chat[1].content.length") < 400
    find_nothing(tab, width)
    assert tab.said == []
    assert {url.split("/", 3)[2] for url in tab.requests} == {f"127.0.0.1:{endpoint.port}"}


@in_a_browser
def test_an_answer_is_stopped_and_a_chat_begun_anew(tab: Page, endpoint: Endpoint) -> None:
    tab.open(f"http://127.0.0.1:{endpoint.port}/", width=1280)
    until(tab, "model.options.length === 3")
    write(tab, "Stop soon")
    press(tab, "Enter")
    until(tab, "document.querySelector('.assistant .said').textContent.length > 3 || !answering")
    tab.run("stop.click()")
    until(tab, "answering === null")
    assert tab.run("[stop.hidden, send.hidden, error.hidden]") == [True, False, True]
    assert tab.run("document.activeElement === message")
    assert len(tab.run("chat")) == 2
    eventually(lambda: endpoint.request("/health", method="GET")[1]["answering"] == 0)
    tab.run("document.getElementById('new').click()")
    assert tab.run("chat") == []
    assert said(tab, "user") == []


@in_a_browser
@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_the_key_is_asked_for_and_kept_in_memory_alone(tab: Page, locked: Endpoint, width: int, dark: bool) -> None:
    url = f"http://127.0.0.1:{locked.port}/"
    tab.open(url, width=width, dark=dark)
    until(tab, "!locked.hidden")
    assert tab.run("[key === document.activeElement, error.hidden]") == [True, True]
    find_nothing(tab, width)
    for text, told in (("not-the-key", "That is not the key"), ("ключ", "without blanks")):
        tab.run("key.focus()")
        tab.ask("Input.insertText", text=text)
        press(tab, "Enter")
        until(tab, f"error.textContent.includes('{told}')")
    find_nothing(tab, width)
    tab.ask("Input.insertText", text=KEY)
    press(tab, "Enter")
    until(tab, "locked.hidden && model.options.length === 3")
    assert tab.run("error.hidden")
    write(tab, "Hello")
    tab.run("send.click()")
    until(tab, "answering === null && chat.length === 2")
    assert tab.run("[location.href, document.cookie, localStorage.length, sessionStorage.length]") == [url, "", 0, 0]
    assert KEY not in tab.run("document.documentElement.outerHTML") + tab.run("key.value")
    assert not any(KEY in each for each in tab.requests)


REFUSALS = {
    "busy": ("429", '{"message": "full"}', "Send it again in 7 seconds."),
    "loading": ("503", '{"message": "not ready yet: connecting"}', "cannot answer yet (not ready yet: connecting)"),
    "long": ("400", '{"message": "x", "code": "context_length_exceeded"}', "Begin a new chat, or shorten"),
    "other": ("409", '{"message": "the adapter is damaged"}', "the adapter is damaged"),
    "nothing said": ("500", "null", "status 500"),
}


@in_a_browser
@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_says_what_to_do_and_the_message_is_there_to_send_again(
    tab: Page, endpoint: Endpoint, name: str
) -> None:
    code, error, words = REFUSALS[name]
    tab.open(f"http://127.0.0.1:{endpoint.port}/", width=390)
    until(tab, "model.options.length === 3")
    answer = f"new Response(JSON.stringify({{error: {error}}}), {{status: {code}, headers: {{'Retry-After': '7'}}}})"
    tab.run(f"window.fetch = async () => {answer}; 0")
    write(tab, "Hello")
    press(tab, "Enter")
    until(tab, "!error.hidden")
    assert words in tab.run("error.textContent")
    assert (tab.run("message.value"), said(tab, "user")) == ("Hello", [])


@in_a_browser
def test_what_ends_in_the_middle_stays_as_text_and_a_server_that_is_gone_is_told(tab: Page, place: Place) -> None:
    with endpoint_process(place, "--max-new-tokens", 1900) as running:
        eventually(running.is_ready)
        tab.open(f"http://127.0.0.1:{running.port}/", width=390)
        until(tab, "model.options.length === 1")
        chunk = 'data: {"choices": [{"delta": {"content": "<img src=x>half"}}]}\n\n'
        stream = json.dumps(f'{chunk}: ping\n\ndata: {{"choi')
        tab.run(f"own = window.fetch; window.fetch = async () => new Response({stream}); 0")
        write(tab, "Hello")
        press(tab, "Enter")
        until(tab, "!error.hidden")
        assert "was lost in the middle" in tab.run("error.textContent")
        assert said(tab, "assistant") == ["<img src=x>half"]
        assert "begin a new chat" in tab.run("turns.innerText")
        tab.run("window.fetch = own; 0")
    write(tab, "Are you there?")
    press(tab, "Enter")
    until(tab, "error.textContent.includes('dlora-edge serve is running')")
    assert tab.run("message.value") == "Are you there?"
