"""How many files three things pass, by a profiler's hook in a run of a tiny model; and whether these are too many.

rank: `dlora-edge train --rank` from the command line to the first matrix; the files whose functions name it on the way.
activation: on the server, from what a device adds to a group to the next group's input; the files whose functions have
    a tensor in their hands on the way.
row: a chat row of a file to its token ids and labels; the files whose functions are called.

python .ci/paths.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final
from unittest.mock import patch

import numpy as np
from msgspec import Struct
from msgspec.structs import astuple

ROOT: Final = Path(__file__).resolve().parents[1]
MOST: Final = {"rank": 6, "activation": 12, "row": 9}
ROOMS: Final = tuple(f"{ROOT / room}/" for room in ("protocol", "edge", "cloud", "export"))
RANK: Final = 13
sys.path[:0] = [str(ROOT / "tests")]

Hook = Callable[[FrameType, str, Any], None]


@contextmanager
def hooked(hook: Hook) -> Iterator[None]:
    """Call ``hook`` for each function that is called or returns, in this thread and those that begin."""
    threading.setprofile(hook)
    sys.setprofile(hook)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def place_of(frame: FrameType) -> str | None:
    """The product's file that it is in; None: another's."""
    name = frame.f_code.co_filename
    return name[len(str(ROOT)) + 1 :] if name.startswith(ROOMS) else None


def names_in(code: CodeType) -> set[str]:
    """All that it names: variables, attributes, keywords of its calls."""
    keywords = {name for each in code.co_consts if isinstance(each, tuple) for name in each if isinstance(name, str)}
    return {*code.co_names, *code.co_varnames, *code.co_freevars, *keywords}


def files_of_rank(bundle: Path, url: str, place: Path) -> list[str]:
    """Files of functions that name the rank before there is a matrix of it."""
    from dlora.edge.__main__ import main

    found: set[str] = set()
    is_made = False

    def hook(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal is_made
        file = place_of(frame)
        if is_made or file is None:
            return
        is_body = frame.f_code.co_name == "<module>" or "__qualname__" in frame.f_locals  # of a module or a class
        if not is_body and names_in(frame.f_code) & {"rank", "r"}:
            found.add(file)
        values = [*frame.f_locals.values(), argument]
        is_made = any(
            isinstance(each, np.ndarray) and each.dtype == np.float32 and RANK in each.shape for each in values
        )

    words = ("train", "--bundle", bundle, "--server", url, "--data", place / "talks.jsonl", "--out", place / "out")
    sys.argv = ["dlora-edge", *map(str, (*words, "--kind", "lora", "--rank", RANK, "--steps", 1, "--lr", 0.01))]
    with hooked(hook), redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        try:
            main()
        except SystemExit as error:
            if error.code:
                raise
    assert is_made
    return sorted(found)


def has_tensor(value: Any, depth: int = 0) -> bool:
    """Whether it is a tensor of an exchange, or has one: a message, a list, a tuple."""
    from torch import Tensor

    from dlora.protocol.tensors import WireTensor

    if isinstance(value, Tensor | WireTensor):
        return True
    if isinstance(value, np.ndarray):
        return value.dtype.kind == "f"
    if depth < 2 and isinstance(value, list | tuple):
        return any(has_tensor(each, depth + 1) for each in value)
    return depth < 2 and isinstance(value, Struct) and has_tensor(astuple(value), depth + 1)


def files_of_activation(base: Any, bundle: Path) -> list[str]:
    """Files of functions that have a tensor while the server makes the next group's input of a delta."""
    from serving import config, random_dataset, serving, training

    from dlora.edge.wire.connection import Connection
    from dlora.protocol.messages import AnyMessage, GroupDelta, GroupInput

    found: set[str] = set()
    passed: set[str] = set()
    device, is_on = threading.current_thread(), False
    send, receive = Connection.send, Connection.receive_any

    def sent(connection: Connection, message: AnyMessage) -> None:
        nonlocal is_on
        is_on = isinstance(message, GroupDelta)
        passed.clear()
        send(connection, message)

    def received(connection: Connection) -> AnyMessage:
        nonlocal is_on
        message = receive(connection)
        if is_on and isinstance(message, GroupInput):
            found.update(passed)
        is_on = False
        return message

    def hook(frame: FrameType, event: str, argument: Any) -> None:
        file = place_of(frame)
        if not is_on or event != "return" or file is None or threading.current_thread() is device:
            return
        if any(has_tensor(each) for each in (argument, *frame.f_locals.values())):
            passed.add(file)

    with (
        hooked(hook),
        serving(base) as server,
        training(bundle, server.url, config(total_steps=2), random_dataset(64)) as trainer,
        patch.object(Connection, "send", sent),
        patch.object(Connection, "receive_any", received),
    ):
        trainer.run_step()
    return sorted(found)


def files_of_row(bundle: Path, place: Path) -> list[str]:
    """Files of functions that are called for a row."""
    from dlora.edge.data.reading import load_examples
    from dlora.edge.data.tokenizer import EdgeTokenizer
    from dlora.edge.engine.bundle import Bundle

    found: set[str] = set()

    def hook(frame: FrameType, event: str, argument: Any) -> None:
        file = place_of(frame)
        if event == "call" and file is not None:
            found.add(file)

    tokenizer = EdgeTokenizer.open(Bundle.open(bundle))
    with hooked(hook):
        load_examples(place / "talks.jsonl", tokenizer, max_length=100)
    return sorted(found)


def main() -> None:
    from families import save_tiny, tiny_model
    from serving import serving

    from dlora.cloud.model.base_model import BaseModel

    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        talk = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
        (place / "talks.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
        save_tiny(place / "model", "llama", 0)
        export = [sys.executable, "-m", "dlora.export", place / "model", "--out", place / "bundle"]
        subprocess.run(export, check=True, capture_output=True)
        base = BaseModel.from_model(tiny_model("llama", 0), "tiny")
        with serving(base) as server:
            rank = files_of_rank(place / "bundle", server.url, place)
        activation, row = files_of_activation(base, place / "bundle"), files_of_row(place / "bundle", place)
    found = {"rank": rank, "activation": activation, "row": row}
    assert all(found.values())  # else nothing was looked at
    wrong = [name for name, files in found.items() if len(files) > MOST[name]]
    print(json.dumps({name: {"count": len(files), "files": files} for name, files in found.items()}, indent=1))
    for name in wrong:
        print(f"{name} passes {len(found[name])} files, at most {MOST[name]} are meant to be", file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
