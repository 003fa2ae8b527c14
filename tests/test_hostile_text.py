"""What a model says, what files are called and what is in them does not steer the terminal that it is shown on."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from endpoints import replace_file
from processes import BIN, END_TIMEOUT_S, quiet_environment, run_edge
from serving import RunningServer, serving
from test_data_command import write
from tiny import TinyFactory

from dlora.protocol.text import one_line, visible, visible_json

BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
CONTROLS = "".join(map(chr, (*range(32), *range(0x7F, 0xA0))))
HOSTILE = "\x1b]52;c;cm0=\x07\x1b]0;title\x1b\\\x1b[2J\x9b2J\x9d0;x\x9c\r\u202eexe\u2066"
SAFE = r"\x1b]52;c;cm0=\x07\x1b]0;title\x1b\\x1b[2J\x9b2J\x9d0;x\x9c\r\u202eexe\u2066"


def test_only_what_steers_becomes_visible() -> None:
    honest = "a\tb\nc \u00a0é שלום مرحبا ع\u200cل 👩\u200d🚀 \U000e0067 ⟦x|y⟧ \\x1b"
    assert visible(honest) == honest
    for each in CONTROLS + BIDI + "\ud800\udfff":
        assert visible(each) == (each if each in "\t\n" else each.encode("unicode_escape").decode())
        assert json.loads(visible_json([each])) == [each]
    shown = visible(CONTROLS + BIDI)
    assert all(each.isprintable() or each in "\t\n" for each in shown)
    assert one_line(shown) == " ".join(shown.split())  # nothing of it is left out where a line is asked for
    assert "".join(map(visible, HOSTILE)) == visible(HOSTILE) == SAFE  # a sequence in pieces
    assert visible_json({"a": f"é{HOSTILE}"}, indent=1).count("é") == 1
    assert all(each.isprintable() or each == "\n" for each in visible_json({"a": HOSTILE, "b": [CONTROLS]}, indent=1))


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose model can say nothing but what is hostile."""
    found = tmp_path_factory.mktemp("hostile") / "bundle"
    shutil.copytree(tiny("llama", head_dtype="fp32").bundle, found)
    value = json.loads((found / "tokenizer" / "tokenizer.json").read_text())
    words = value["model"]["vocab"]
    value["model"]["vocab"] = {f"{word}{HOSTILE}" if word[0] == "w" else word: at for word, at in words.items()}
    replace_file(found, "file", json.dumps(value))
    return found


@pytest.fixture(scope="module")
def server(tiny: TinyFactory) -> Iterator[RunningServer]:
    with serving(tiny("llama").base) as running:
        yield running


def in_terminal(*arguments: object, said: bytes = b"") -> str:
    """All that a command shows on a terminal, which is its stdout and stderr; it is told ``said``."""
    terminal, theirs = pty.openpty()
    with subprocess.Popen(
        [str(BIN / "dlora-edge"), *map(str, arguments)], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs,
        env={**quiet_environment(), "TERM": "dumb"},
    ) as process:  # fmt: skip
        os.close(theirs)
        assert process.stdin is not None
        process.stdin.write(said)
        process.stdin.close()
        shown = b""
        try:
            while some := os.read(terminal, 4096):
                shown += some
        except OSError:  # what Linux says once nobody holds the other end
            assert sys.platform == "linux"
        os.close(terminal)
        assert process.wait(END_TIMEOUT_S) == 0, shown
    return shown.decode().replace("\r\n", "\n")


def test_an_answer_does_not_steer_the_terminal(bundle: Path, server: RunningServer, tmp_path: Path) -> None:
    """A pipe has it as it is, JSON the same text, and what is saved as well."""
    asked = ["--bundle", bundle, "--server", server.url, "--max-new-tokens", 3, "--temperature", 0]
    shown = in_terminal("generate", *asked, "--prompt", "user")
    assert shown.count(SAFE) == 3
    assert visible(shown) == shown
    piped = run_edge("generate", *asked, "--prompt", "user")
    assert piped.stdout.count(HOSTILE.replace("\r", "\n")) == 3  # Python reads a line end there
    as_json = run_edge("generate", *asked, "--prompt", "user", "--json")
    assert as_json.code == 0, as_json.stderr
    assert visible(as_json.stdout) == as_json.stdout
    assert json.loads(as_json.stdout)["answer"].count(HOSTILE) == 3
    saved = tmp_path / "talk.json"
    shown = in_terminal("chat", *asked, said=f"user\n/adapter {HOSTILE}\n/save {saved}\n".encode())
    assert shown.count(SAFE) == 3
    assert visible(shown) == shown
    assert json.loads(saved.read_text())["messages"][1]["content"].count(HOSTILE) == 3


def test_data_do_not_steer_the_terminal(tiny: TinyFactory, tmp_path: Path) -> None:
    """Neither what files are called, in rows and problems, nor what is in them; words of the bundle's neither."""
    directory = tmp_path / f"dir{HOSTILE[:30]}"
    directory.mkdir()
    path = directory / f"d\n{BIDI}.jsonl"
    write(path, {"prompt": f"w1 {HOSTILE}", "completion": " w2"}, {"prompt": 1}, {"completion": " "})
    bundle = tiny("llama", head_dtype="fp32").bundle
    for file in (path, directory):
        done = run_edge("data", file, "--bundle", bundle)
        assert done.code == 3
        assert visible(done.stdout) == done.stdout
        assert visible(done.stderr) == done.stderr
        assert r"\u202e" in done.stdout
        assert not any(line.startswith("\\u061c") for line in done.stdout.splitlines())  # no line of a name's own
        found = run_edge("data", file, "--bundle", bundle, "--json")
        assert visible(found.stdout) == found.stdout
        assert json.loads(found.stdout)["shown"][0]["place"] == f"{path}:1"
