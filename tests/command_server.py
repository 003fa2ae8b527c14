"""A process that has imported what commands need, and forks one whenever it is asked to: ``processes.Command`` asks.

A fork takes milliseconds where a new Python takes a second, or six with torch. A forked command has its own arguments,
environment, directory and streams, ends as Python ends, and is the asking process's own child.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import socket
import sys
from typing import Any, Final

FOR_EDGE: Final = (
    "onnxruntime", "jinja2", "rich.console", "rich.progress", "rich.table", "tokenizers", "websockets.sync.client",
    "dlora.edge.commands.app", "dlora.edge.run.display", "dlora.edge.data.tokenizer", "dlora.edge.run.run",
)  # fmt: skip
FOR_TORCH: Final = (
    "torch", "transformers.models.llama.modeling_llama", "transformers.masking_utils", "rich.progress",
    "dlora.cloud.commands.app", "dlora.cloud.model.base_model", "dlora.cloud.serving.server", "dlora.export.cli",
    "dlora.export.bundle",
)  # fmt: skip
MODULES: Final = {"edge": FOR_EDGE, "cloud": FOR_TORCH, "export": FOR_TORCH}
MOST_BYTES: Final = 1 << 20


def serve(asking: socket.socket, modules: tuple[str, ...]) -> dict[str, Any]:
    """Fork whenever it is asked to, until the other side is gone. Returns in a forked process, what it is to run."""
    for name in modules:
        importlib.import_module(name)
    assert ("torch" in sys.modules) == ("torch" in modules)
    gc.collect()
    gc.freeze()  # a fork need not go through all that again
    while True:
        content, streams, _, _ = socket.recv_fds(asking, MOST_BYTES, 3)
        if not content:
            sys.exit()
        reader, writer = os.pipe()
        between = os.fork()
        if between == 0:
            # Its child is given to the nearest process above that takes orphans: the one that asks.
            forked = os.fork()
            if forked == 0:
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                for descriptor in (*streams, reader, writer, asking.fileno()):
                    os.close(descriptor)
                asking.detach()
                wanted: dict[str, Any] = json.loads(content)
                return wanted
            os.write(writer, str(forked).encode())
            os._exit(0)
        os.waitpid(between, 0)
        asking.send(os.read(reader, 100))
        for descriptor in (*streams, reader, writer):
            os.close(descriptor)


def leave(code: list[int]) -> None:
    """End without what C++ libraries do at the end: onnxruntime waits for a thread that a fork does not have."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code[-1])


def main() -> None:
    """``python command_server.py PACKAGE DESCRIPTOR``"""
    package, descriptor = sys.argv[1:]
    code = [1]
    atexit.register(leave, code)  # the first, so that it is called last
    wanted = serve(socket.socket(fileno=int(descriptor)), MODULES[package])
    os.environ.clear()
    os.environ.update(wanted["environment"])
    os.chdir(wanted["directory"])
    if os.isatty(1):
        with contextlib.suppress(AttributeError):
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = wanted["arguments"]
    command = importlib.import_module(f"dlora.{wanted['package']}.__main__")
    try:
        command.main()
        code.append(0)
    except SystemExit as end:
        code.append(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


if __name__ == "__main__":
    main()
