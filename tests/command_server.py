"""A process that has imported what commands need, and forks one whenever it is asked to: ``processes.Command`` asks.

A fork takes milliseconds where a new Python takes a second, or six with torch. A forked command has its own arguments,
environment, directory and streams, ends as Python ends, and is the asking process's own child.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import socket
import sys
from typing import Any, Final

# Beside all of dlora's own: what it loads only when it is needed.
COMMON: Final = (
    "encodings.idna", "importlib.resources.readers", "jinja2", "numpy.ma", "pydantic.fields", "rich.console",
    "rich.progress", "rich.table", "typer._adapters",
)  # fmt: skip
FOR_EDGE: Final = (*COMMON, "onnxruntime", "tokenizers", "websockets.sync.client")
FOR_TORCH: Final = (*COMMON, "torch", "transformers.models.llama.modeling_llama", "transformers.masking_utils")
READ: Final = (("protocol.manifest", "Manifest"), ("edge.run.run_file", "RunFile"), ("protocol.messages", "AnyMessage"))
MOST_BYTES: Final = 1 << 20


def load_all(*packages: str) -> None:
    """Every module of dlora's packages, but what needs a package that is not here."""
    for package in packages:
        paths = importlib.import_module(f"dlora.{package}").__path__
        for module in pkgutil.walk_packages(paths, f"dlora.{package}."):
            if not module.name.endswith("__main__"):
                with contextlib.suppress(ImportError):
                    importlib.import_module(module.name)


def prepare_edge() -> None:
    """Typer's work on all options is most of what a short ``dlora-edge`` takes, and the same each time; so is msgspec's
    on the types that files and frames are read as."""
    typer: Any = importlib.import_module("typer.main")
    typer.get_command = functools.cache(typer.get_command)
    typer.get_command(importlib.import_module("dlora.edge.commands.app").app)
    msgspec: Any = importlib.import_module("msgspec")
    for module, name in READ:
        msgspec.json.Decoder(getattr(importlib.import_module(f"dlora.{module}"), name))


def serve(asking: socket.socket) -> dict[str, Any]:
    """Fork whenever it is asked to, until the other side is gone. Returns in a forked process, what it is to run."""
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
    """``python command_server.py edge|cloud DESCRIPTOR``"""
    has_torch, descriptor = sys.argv[1] != "edge", int(sys.argv[2])
    code = [1]
    atexit.register(leave, code)  # the first, so that it is called last
    for name in FOR_TORCH if has_torch else FOR_EDGE:
        with contextlib.suppress(ImportError):  # of another version; whoever needs it imports what there is
            importlib.import_module(name)
    load_all(*("cloud", "export") if has_torch else ("edge",))
    get_command = importlib.import_module("typer.main").get_command
    if not has_torch:
        prepare_edge()
    assert ("torch" in sys.modules) == has_torch
    wanted = serve(socket.socket(fileno=descriptor))
    os.environ.clear()
    os.environ.update(wanted["environment"])
    coverage = sys.modules.get("coverage")
    if coverage and (measuring := coverage.Coverage.current()):
        measuring.switch_context(os.environ.get("PYTEST_CURRENT_TEST", ""))
    if any(name.startswith("_TYPER") for name in os.environ):  # which options there are depends on these
        importlib.import_module("typer.main").get_command = get_command
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
