"""Chromium without a window, steered through its DevTools protocol: what a page asks for, says and looks like."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

from websockets.sync.client import ClientConnection, connect

AXE = os.environ.get("DLORA_AXE")  # axe-core, which is no part of the repository
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
START_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 60.0


class Page:
    """One tab.

    Attributes:
        requests: addresses that were asked for since ``open``; said: errors, warnings and exceptions of its scripts.
    """

    def __init__(self, socket: ClientConnection, *, offline: bool = True) -> None:
        self.requests: list[str] = []
        self.said: list[str] = []
        self._socket = socket
        self._count = 0
        self._loaded = False
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")
        if offline:  # whatever is asked for but files ends here
            conditions = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
            self.ask("Network.emulateNetworkConditions", **conditions)

    def open(self, page: Path | str, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Open a file or an address in a window of this size, and wait until its scripts are through."""
        self.requests, self.said, self._loaded = [], [], False
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=page if isinstance(page, str) else page.absolute().as_uri())
        until = time.monotonic() + ANSWER_TIMEOUT_S
        while not self._loaded:
            self._take(json.loads(self._socket.recv(timeout=until - time.monotonic())))
        self.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")

    def run(self, script: str) -> Any:
        """What an expression comes to, awaited."""
        answer = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def picture(self, path: Path, *, height: int | None = None) -> None:
        """A PNG of the whole page, or of its first ``height`` pixels."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        found = self.ask("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def find_barriers(self) -> list[tuple[str, Any]]:
        """What axe-core finds that is serious, and where: nothing where there is no axe-core."""
        if AXE is None:
            return []
        self.run(Path(AXE).read_text() + ";0")
        found = json.loads(self.run("axe.run().then((found) => JSON.stringify(found.violations))"))
        return [(each["id"], each["nodes"]) for each in found if each["impact"] in ("serious", "critical")]

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; events that come before its answer are taken."""
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        until = time.monotonic() + ANSWER_TIMEOUT_S
        while True:
            message = json.loads(self._socket.recv(timeout=until - time.monotonic()))
            if message.get("id") == self._count:
                if "error" in message:
                    raise AssertionError(f"{method}: {message['error']}")
                return dict(message["result"])
            self._take(message)

    def _take(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                self.said.append(json.dumps(parameters["args"]))
            case "Runtime.exceptionThrown":
                self.said.append(json.dumps(parameters["exceptionDetails"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.said.append(parameters["entry"]["text"])


@contextmanager
def browser(profile: Path, *, offline: bool = True) -> Iterator[Page]:
    """A browser with one tab; ``profile`` is a directory of its own."""
    assert CHROMIUM is not None
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0")
    process = subprocess.Popen(
        [CHROMIUM, *options, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(profile)},
    )
    try:
        tabs = f"http://127.0.0.1:{_port(profile / 'DevToolsActivePort')}/json"
        with build_opener(ProxyHandler({})).open(tabs, timeout=ANSWER_TIMEOUT_S) as answer:
            (url,) = (each["webSocketDebuggerUrl"] for each in json.load(answer) if each["type"] == "page")
        with connect(url, max_size=None, proxy=None) as socket:
            yield Page(socket, offline=offline)
    finally:
        process.terminate()
        process.wait(120)


def _port(file: Path) -> int:
    """Where it listens, which it writes to a file."""
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until:
        if file.exists() and len(lines := file.read_text().splitlines()) == 2:
            return int(lines[0])
        time.sleep(0.05)
    raise AssertionError("the browser did not start")
