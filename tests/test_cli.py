"""Bad input, as a user meets it: one clear line, the documented exit code, and nothing saved harmed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil
import pytest
from processes import Finished, cloud_process, finish, run_cloud, run_edge, start_edge
from serving import serving
from small_disk import small_disk
from tiny import TinyFactory
from waiting import eventually
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from dlora.protocol import messages as m
from dlora.protocol.errors import (
    BundleError,
    CheckpointError,
    ConnectionFailedError,
    DataError,
    DloraError,
    ProtocolError,
    StorageError,
    UsageError,
)
from dlora.protocol.frames import encode
from dlora.protocol.version import PROTOCOL_VERSIONS

GOOD_ROW = json.dumps({"prompt": "w1 w2 w3", "completion": " w4 w5"})


@dataclass(frozen=True)
class Place:
    """What a good command line needs."""

    bundle: Path
    data: Path
    url: str

    def train(self, out: Path, **changes: object) -> list[object]:
        """``dlora-edge train`` with these options; None leaves one out."""
        options: dict[str, object] = {
            "bundle": self.bundle, "server": self.url, "data": self.data, "out": out, "steps": 2, "batch_size": 2,
            "threads": 1, "seed": 0, "kind": "lora", **changes,
        }  # fmt: skip
        words: list[object] = ["train"]
        for name, value in options.items():
            words += [] if value is None else [f"--{name.replace('_', '-')}", value]
        return words


@pytest.fixture(scope="module")
def place(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("cli")
    model = tiny()
    data = directory / "good.jsonl"
    data.write_text((GOOD_ROW + "\n") * 4)
    with serving(model.base) as server:
        yield Place(model.bundle, data, server.url)


def assert_fails(done: Finished, code: int, *words: str) -> None:
    """One ``error:`` line, the last thing on stderr, with these words in it; the exit code; no traceback."""
    assert done.code == code, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.errors) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == done.errors[0]
    for word in words:
        assert word in done.errors[0]
    assert len(re.sub(r"/\S+", "", done.errors[0])) < 400


# -- the bundle ------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_manifest(bundle: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "does not exist"),
    "no manifest": (lambda bundle: (bundle / "manifest.json").unlink(), "has no manifest.json"),
    "a flipped byte in a weight": (lambda bundle: flip(next(bundle.rglob("*.npy"))), "SHA-256"),
    "a flipped byte in a graph": (lambda bundle: flip(next(bundle.rglob("*.onnx"))), "SHA-256"),
    "a file cut short": (lambda bundle: next(bundle.rglob("*.npy")).write_bytes(b"short"), "size"),
    "a file missing": (lambda bundle: next(bundle.rglob("*.onnx")).unlink(), "missing"),
    "a newer format": (lambda bundle: edit_manifest(bundle, lambda it: it.update(format=99)), "update dlora"),
    "not JSON": (lambda bundle: (bundle / "manifest.json").write_text("{"), "damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_unusable_bundle_is_a_one_line_error(place: Place, damage: str, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(place.bundle, bundle)
    harm, word = DAMAGE[damage]
    harm(bundle)
    done = run_edge(*place.train(tmp_path / "out", bundle=bundle))
    assert_fails(done, BundleError.exit_code, str(bundle), word)
    assert not (tmp_path / "out").exists()


# -- the data --------------------------------------------------------------------------------------------

BAD_DATA: dict[str, tuple[str, bytes | None, tuple[str, ...]]] = {
    "malformed": ("bad.jsonl", f'{GOOD_ROW}\n{GOOD_ROW}\n{{"prompt": \n'.encode(), ("3",)),
    "unknown fields": ("bad.jsonl", b'{"question": "w1"}\n', ("1",)),
    "not an object": ("bad.jsonl", f"{GOOD_ROW}\n[1]\n".encode(), ("2",)),
    "wrong type": ("bad.jsonl", b'{"text": 7}\n', ("1",)),
    "empty": ("bad.jsonl", b"\n\n", ()),
    "too long": (
        "bad.jsonl", f"{GOOD_ROW}\n{json.dumps({'prompt': 'w1', 'completion': ' w1' * 40})}\n".encode(),
        ("2", "--max-length"),
    ),
    "damaged table": ("bad.parquet", b"PAR1", ("1: not valid Parquet",)),
    "missing": ("bad.jsonl", None, ()),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_DATA)
def test_unusable_data_is_a_one_line_error(place: Place, bad: str, tmp_path: Path) -> None:
    name, content, words = BAD_DATA[bad]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = run_edge(*place.train(tmp_path / "out", data=tmp_path / name, max_length=20))
    assert_fails(done, DataError.exit_code, name, *words)
    assert not (tmp_path / "out").exists()


def with_template(place: Place, bundle: Path, template: str) -> Path:
    """A copy of the bundle with this chat template, whose digest is right."""
    shutil.copytree(place.bundle, bundle)
    name = "tokenizer/chat_template.jinja"
    (bundle / name).write_text(template)
    spec = {"bytes": len(template), "sha256": hashlib.sha256(template.encode()).hexdigest()}
    edit_manifest(bundle, lambda it: it["files"].update({name: spec}))  # type: ignore[attr-defined]
    return bundle


def test_template_that_takes_all_memory_is_an_error(place: Place, tmp_path: Path) -> None:
    bundle = with_template(place, tmp_path / "bundle", "{{ 'a' * 10**11 }}")
    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    train = place.train(tmp_path / "out", bundle=bundle, data=tmp_path / "talk.jsonl")
    where = ["--bundle", bundle, "--server", place.url]
    evaluate, generate = ["evaluate", *where, "--data", tmp_path / "talk.jsonl"], ["generate", *where, "--prompt", "w1"]
    for command, said in ((train, "talk.jsonl:1"), (evaluate, "talk.jsonl:1"), (generate, "chat template")):
        assert_fails(run_edge(*command), DataError.exit_code, said, "more memory than there is")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_a_looping_template(place: Place, tmp_path: Path, number: signal.Signals) -> None:
    forever = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    bundle = with_template(place, tmp_path / "bundle", forever)
    process = start_edge("generate", "--bundle", bundle, "--server", place.url, "--prompt", "w1")
    eventually(lambda: bool(psutil.Process(process.pid).children()))
    (child,) = psutil.Process(process.pid).children()
    process.send_signal(number)
    assert_fails(finish(process), 130, "interrupted")
    eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pin": "5-2"}, ("--pin",)),
        ({"pin": "1-"}, ("--pin",)),
        ({"pin": "0-999999999999"}, ("--pin",)),
        ({"columns": "prompt=a"}, ("columns",)),
        ({"columns": "nonsense"}, ("columns",)),
        ({"server": "ftp://127.0.0.1:1"}, ("ws://",)),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_contradicting_options_are_a_usage_error(
    place: Place, changes: dict[str, object], words: tuple[str, ...], tmp_path: Path
) -> None:
    assert_fails(run_edge(*place.train(tmp_path / "out", **changes)), UsageError.exit_code, *words)


def test_missing_adapter_is_a_one_line_error(place: Place, tmp_path: Path) -> None:
    done = run_edge(*place.train(tmp_path / "out", init_adapter=tmp_path / "nowhere"))
    assert_fails(done, CheckpointError.exit_code, "nowhere")
    done = run_edge("evaluate", "--bundle", place.bundle, "--server", place.url, "--data", place.data,
                    "--adapter", tmp_path / "nowhere")  # fmt: skip
    assert_fails(done, CheckpointError.exit_code, "nowhere")


# -- the server ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "doctor"])
def test_missing_token_file_is_reported_first(command: str, tmp_path: Path) -> None:
    """Every command that shows a server who it is reads the token before anything else."""
    where = ["--bundle", tmp_path, "--server", "ws://127.0.0.1:1"]
    needed = {
        "train": ["--data", "x", "--out", tmp_path / "out"],
        "evaluate": ["--data", "x"],
        "generate": ["--prompt", "x"],
    }
    done = run_edge(command, *where, *needed.get(command, []), "--token-file", tmp_path / "no.token")
    assert_fails(done, UsageError.exit_code, "--token-file", "no.token", "cannot be read")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextmanager
def fake_server(answer: Callable[[ServerConnection], None]) -> Iterator[str]:
    """A websocket server that says what it likes."""
    with serve(answer, "127.0.0.1", 0, compression=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()


NEWER = m.Welcome(
    protocol_version=PROTOCOL_VERSIONS[-1] + 1, software="x", base_model="x", base_fingerprint="x",
    base_weight_format="full", embedding_size=1, hidden_size=1, max_sequence_length=1, max_tokens=1, packs=True,
)  # fmt: skip
ANSWERS: dict[str, tuple[bytes | str | None, type[DloraError], tuple[str, ...]]] = {
    "refuses the version": (
        encode(m.Error(code="version", message="this server speaks wire versions [99]")), ProtocolError,
        ("versions [99]", "update"),
    ),
    "has another version": (encode(NEWER), ProtocolError, ("version",)),
    "is another service": ("hello, I am a chat", ProtocolError, ()),
    "closes at once": (None, ConnectionFailedError, ("is it a dlora server?",)),
}  # fmt: skip


@pytest.mark.parametrize("server", ANSWERS)
def test_server_that_answers_otherwise_is_an_error(place: Place, server: str, tmp_path: Path) -> None:
    said, error, words = ANSWERS[server]

    def answer(connection: ServerConnection) -> None:
        if said is not None:
            connection.recv()
            connection.send(said)
            with suppress(ConnectionClosed):
                connection.recv()

    with fake_server(answer) as url:
        assert_fails(run_edge(*place.train(tmp_path / "out", server=url)), error.exit_code, *words)


def test_port_with_another_protocol_is_an_error(place: Place, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def speak() -> None:
            other, _ = listener.accept()
            with other:
                other.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                other.recv(4096)

        threading.Thread(target=speak, daemon=True).start()
        url = f"ws://127.0.0.1:{listener.getsockname()[1]}"
        done = run_edge(*place.train(tmp_path / "out", server=url))
    assert_fails(done, ConnectionFailedError.exit_code, url, "no dlora server")


# -- the disk --------------------------------------------------------------------------------------------


def test_full_disk_leaves_saved_files_intact(place: Place, tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        out = disk / "out"
        options = {"steps": 60, "save_every": 1, "rank": 4}
        process = start_edge(*place.train(out, **options))
        eventually(lambda: (out / "adapter_model.safetensors").exists())
        kept = set(fill(disk))
        done = finish(process)
        assert_fails(done, StorageError.exit_code, "cannot write", "what was saved at step", "dlora-edge resume")
        for path in kept:
            path.unlink()
        resumed = run_edge(*place.train(out, **options), "--resume")
        assert resumed.code == 0, resumed.stderr
        assert "warning" not in resumed.stderr


def fill(disk: Path) -> Iterator[Path]:
    """Take every last byte, also those that are let go of while this runs."""
    for index in range(200):
        path = disk / f"filler-{index}"
        with path.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1024))
            except OSError:
                pass
        yield path


# -- stopping --------------------------------------------------------------------------------------------


def test_a_second_interrupt_stops_at_once(place: Place, tmp_path: Path) -> None:
    """A server that never answers keeps the step from ending; what the user says twice is obeyed."""
    greeted, released = threading.Event(), threading.Event()

    def go_silent(connection: ServerConnection) -> None:
        with serving_frames(place.url, connection):
            greeted.set()
            released.wait(120)

    with fake_server(go_silent) as url:
        process = start_edge(*place.train(tmp_path / "out", server=url, lr=0.01))
        assert greeted.wait(120)
        eventually(lambda: (tmp_path / "out" / "metrics.jsonl").exists())
        time.sleep(0.3)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        started = time.monotonic()
        done = finish(process)
        assert time.monotonic() - started < 8
        released.set()
    assert_fails(done, 130, "interrupted")


@contextmanager
def serving_frames(url: str, device: ServerConnection) -> Iterator[None]:
    """Pass a device's opening through to a real server, and nothing after it."""
    from websockets.sync.client import connect

    with connect(url, compression=None, proxy=None) as server:
        for _ in range(2):
            server.send(device.recv())
            device.send(server.recv())
        yield


def test_interrupt_during_start_is_a_one_line_error(place: Place, tmp_path: Path) -> None:
    """Ctrl-C before there is anything to save, where typer would end without a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:  # takes the connection, and says nothing
        process = start_edge(*place.train(tmp_path / "out", server=f"ws://127.0.0.1:{listener.getsockname()[1]}"))
        listener.accept()
        process.send_signal(signal.SIGINT)
        done = finish(process)
    assert_fails(done, 130, "interrupted")


# -- the other command -----------------------------------------------------------------------------------


def test_server_that_cannot_start_is_a_one_line_error(tiny: TinyFactory, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for model, place, at, error, words in (
            (tmp_path / "nowhere", tmp_path, 0, UsageError, "nowhere"),
            (tiny().model, tmp_path / "file", 0, StorageError, "--state-dir"),
            (tiny().model, tmp_path, port, ConnectionFailedError, "cannot listen"),
        ):
            done = run_cloud("serve", model, "--state-dir", place, "--port", at, "--json")
            assert_fails(done, error.exit_code, words)


def test_a_server_shows_no_path_dates_its_log_and_ends_well(tiny: TinyFactory, tmp_path: Path) -> None:
    with cloud_process(tiny().model, tmp_path) as cloud:
        with urllib.request.urlopen(cloud.url.replace("ws://", "http://") + "/healthz", timeout=120) as answer:
            body = answer.read().decode()
        log = cloud.log.read_text().splitlines()
        assert cloud.end(signal.SIGINT) == 0
        assert "Traceback" not in cloud.log.read_text()
    assert json.loads(body)["base_model"] == "model"
    assert str(tiny().model.parent) not in body
    assert log
    for line in log:
        datetime.strptime(line[:20], "%Y-%m-%d %H:%M:%S ")


@pytest.mark.parametrize(("change", "command", "words"), [
    ("sys.modules['onnxruntime'] = None", "selftest", "'onnxruntime' is not installed"),
    # armv7: pip finds neither numpy nor onnxruntime, and no extra would help.
    ("sys.maxsize = 2**31 - 1; sys.modules['typer'] = None", "doctor", "where getconf LONG_BIT says 64"),
], ids=["missing library", "32 bits"])  # fmt: skip
def test_system_that_cannot_run_it_is_a_one_line_error(place: Place, change: str, command: str, words: str) -> None:
    code = f"import sys; {change}; from dlora.edge.__main__ import main; main()"
    words_typed = [sys.executable, "-c", code, command, "--bundle", str(place.bundle)]
    ended = subprocess.run(words_typed, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (12, 1), ended.stderr
    assert words in ended.stderr
