"""Runs in ``trunk`` by the real commands: without a server once it has answered, and to the same bits."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dishonest_server import DishonestServer, dishonest
from peft import PeftModel
from peft_reference import loss_of
from processes import Finished, finish, run_edge, start_edge
from runs import settings_in
from serving import serving
from small_disk import small_disk
from test_cli import assert_fails
from test_resume import KILLING, SAVE_EVERY, STEPS, Place, assert_same_run, rows, wait_for_lines
from tiny import Tiny, TinyFactory
from transformers import AutoModelForCausalLM
from websockets.sync.server import ServerConnection

from dlora.cloud.serving import handler
from dlora.edge.data.batches import pack
from dlora.edge.data.loading import Reading, load_datasets
from dlora.edge.data.read_settings import ReadSettings
from dlora.edge.engine.bundle import Bundle
from dlora.edge.run.blocks import CACHE
from dlora.edge.run.file_names import METRICS
from dlora.edge.training.metrics import iterate_metrics
from dlora.protocol import messages as m
from dlora.protocol.controller import Controller
from dlora.protocol.manifest import load_manifest
from dlora.protocol.tensors import WireTensor
from dlora.protocol.wire_codecs import encode_floats

BLOCKS = 4
TRUNK = ("--device-blocks", 3)
NOWHERE = "ws://127.0.0.1:9"


@pytest.fixture(scope="module")
def model(tiny: TinyFactory) -> Tiny:
    return tiny(blocks=BLOCKS, device_blocks=3, head_dtype="fp32")


@pytest.fixture(scope="module")
def place(model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    data = tmp_path_factory.mktemp("trunk") / "data.jsonl"
    data.write_text(records(10))
    with serving(model.base) as server:
        yield Place(model.bundle, data, server.url)


def records(count: int, longest: int = 12, seed: int = 2) -> str:
    rng = np.random.default_rng(seed)
    lines = [" ".join(f"w{n}" for n in rng.integers(0, 89, int(rng.integers(4, longest)))) for _ in range(count)]
    return "".join(json.dumps({"text": line}) + "\n" for line in lines)


def summary(done: Finished) -> dict[str, Any]:
    assert done.code == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def whole(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with Kill and Revive that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    found = summary(run_edge(*place.train(out, *TRUNK, *KILLING, "--eval", place.data, "--json")))
    assert found["round_trips"] == found["eval_bytes_down"] == 0
    for way in ("up", "down"):
        assert found[f"bytes_{way}"] == found[f"set_up_bytes_{way}"] > 0
    assert all(step.bytes_up == step.bytes_down == 0 for step in iterate_metrics(out / METRICS))
    assert found["eval_loss_after"] < found["eval_loss_before"]
    assert not (out / CACHE).exists()
    return out


def kill_after(steps: int, out: Path, words: list[object]) -> None:
    process = start_edge(*words)
    wait_for_lines(out / "metrics.jsonl", steps)
    process.send_signal(signal.SIGKILL)
    finish(process)


def test_what_was_left_open_is_chosen_once(whole: Path) -> None:
    settings = settings_in(whole)
    assert (settings.device_blocks, settings.kind, settings.active_from) == ("3", "lora", "start")
    assert (settings.blocks, settings.target_modules, settings.kr_on_kill) == ("1-3", "all-linear", "hold_forward")
    card = json.loads((whole / "dlora_adapter.json").read_text())
    assert card["training"]["recipe"]["device_blocks"] == 3
    assert card["training"]["block_dtype"] == "fp32"
    assert card["training"]["bytes_per_token"] > 0


@pytest.mark.parametrize("after", [0, 2, SAVE_EVERY + 3])
def test_killed_run_goes_on_without_a_server_to_the_same_bits(
    place: Place, whole: Path, after: int, tmp_path: Path
) -> None:
    """Killed while the server answers, before the first checkpoint and after it; then the server is gone for good, but
    for what is missing in the first case."""
    words = place.train(tmp_path, *TRUNK, *KILLING, "--eval", place.data)
    process = start_edge(*words)
    if after:
        wait_for_lines(tmp_path / "metrics.jsonl", after)
    else:
        cache = tmp_path / CACHE
        while not (cache.exists() and cache.stat().st_size > 700) and process.poll() is None:
            pass
    process.send_signal(signal.SIGKILL)
    finish(process)
    server = ("--server", NOWHERE) if after else ()
    done = run_edge("resume", tmp_path, *server)
    assert done.code == 0, done.stderr
    assert_same_run(tmp_path, whole)
    assert not (tmp_path / CACHE).exists()


def test_a_kept_cache_makes_a_longer_run_without_a_server(place: Place, tmp_path: Path) -> None:
    found = summary(run_edge(*place.train(tmp_path, *TRUNK, "--keep-cache", "--json")))
    assert (tmp_path / CACHE).stat().st_mode & 0o777 == 0o600
    longer = summary(run_edge("resume", tmp_path, "--steps", STEPS + 5, "--server", NOWHERE, "--json"))
    assert longer["bytes_up"] == longer["set_up_bytes_up"] == found["set_up_bytes_up"], "nothing more crossed"
    assert (found["steps"], longer["steps"]) == (STEPS, STEPS + 5)


def test_kill_and_revive_is_that_of_a_server(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same units are active at each step as with all blocks on the server, where killed ones keep their effect as
    here, and where the server, too, does not count what a unit costs."""
    maps = []
    monkeypatch.setattr(handler, "Controller", partial(Controller, counts_costs=False))
    for name, options in (
        ("trunk", TRUNK),
        ("split", ("--blocks", "1-3", "--target-modules", "all-linear", "--kr-on-kill", "hold_forward")),
    ):
        done = run_edge(*place.train(tmp_path / name, *options, *KILLING, "--wire-dtype", "fp32"))
        assert done.code == 0, done.stderr
        maps.append([(row["units"], row["active_units"]) for row in rows(tmp_path / name)])
        assert len(set(maps[-1])) > 1
    assert maps[0] == maps[1]


def test_saved_adapter_has_in_peft_the_loss_that_the_device_saw(place: Place, model: Tiny, tmp_path: Path) -> None:
    found = summary(run_edge(*place.train(tmp_path, *TRUNK, "--eval", place.data, "--wire-dtype", "fp32", "--json")))
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model.model), tmp_path).eval()
    bundle = Bundle.open(model.bundle)
    (data,) = load_datasets(Reading(bundle, [place.data], ReadSettings(max_length=64)), lambda _: None)
    with torch.no_grad():
        loss = loss_of(wrapped, [pack([data[index] for index in range(len(data))])]).item()
    assert abs(loss - found["eval_loss_after"]) <= 1e-4


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--keep-cache",), "--keep-cache needs --device-blocks"),
        ((*TRUNK, "--kind", "ffa"), "--kind ffa cannot be with --device-blocks 3: it trains LoRA"),
        ((*TRUNK, "--active-from", "answer"), "--active-from answer: data of the form 'text' have no answers"),
        ((*TRUNK, "--bytes-per-token", 9), "--bytes-per-token cannot be with --device-blocks 3"),
        ((*TRUNK, "--kr-on-kill", "give_to_server"), "--kr-on-kill give_to_server cannot be with"),
        ((*TRUNK, "--kr-on-kill", "bypass"), "a killed unit keeps its effect: leave that out"),
        (("--cache-mb", 9), "--cache-mb needs --device-blocks"),
        (("--device-blocks", 9), "--device-blocks 9: the model has 4 blocks"),
        ((*TRUNK, "--blocks", "0-3"), "only the blocks on this device can be trained, 1-3, not 0"),
        (("--device-blocks", 4), "--device-blocks 4 asks no server: all blocks run here"),
        (("--mode", "trunk"), "no option --mode: say --device-blocks 0, N, all or auto"),  # a former option
    ],
)
def test_what_cannot_be_is_one_line(place: Place, options: tuple[object, ...], text: str, tmp_path: Path) -> None:
    assert_fails(run_edge(*place.train(tmp_path / "out", *options)), 2, text)
    assert not (tmp_path / "out").exists()


def test_a_bundle_without_blocks_is_one_line(tiny: TinyFactory, place: Place, tmp_path: Path) -> None:
    other = Place(tiny(blocks=BLOCKS).bundle, place.data, place.url)
    text = "the bundle has 0 of the model's 4 blocks for a device; export it again"
    assert_fails(run_edge(*other.train(tmp_path / "out", *TRUNK)), 4, text)


def ones16(*shape: int) -> WireTensor:
    return encode_floats(np.ones(shape, np.float32), "fp16")


NAN = WireTensor("fp16", np.full((1, 16), np.nan, np.float16))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda lengths: tuple(ones16(length, 17) for length in lengths), "was due"),
        (lambda lengths: tuple(ones16(length, 16) for length in lengths[1:]), "tensors of"),
        (lambda lengths: tuple(WireTensor("fp16", NAN.data.repeat(length, 0)) for length in lengths), "NaN"),
        (None, "not now"),
    ],
    ids=["another width", "too few", "NaN", "nothing of the kind"],
)
def test_a_server_that_lies_is_one_line(
    place: Place, make: Callable[[list[int]], tuple[WireTensor, ...]] | None, text: str, tmp_path: Path
) -> None:
    """And nothing of it is kept: an honest server's answers make the run."""

    def script(server: DishonestServer, connection: ServerConnection) -> None:
        while True:
            begun = server.hear(connection)
            assert isinstance(begun, m.Embeddings)
            place = {"step": begun.step, "micro_batch": begun.micro_batch}
            if make is None:
                server.say_anyway(connection, m.LabelledHiddenStates(**place, hidden_states=ones16(1, 16), gradients=0))
            else:
                tensors = make(begun.sequence_lengths.data.tolist())
                server.say_anyway(connection, m.EncodedHiddenStates(**place, hidden_states=tensors))

    with dishonest(load_manifest(place.bundle), script) as server:
        words = place.train(tmp_path, *TRUNK)
        assert_fails(run_edge(*[server.url if word == place.url else word for word in words]), 7, text)
    assert run_edge(*words).code == 0


def test_no_server_at_the_beginning_is_one_line(place: Place, tmp_path: Path) -> None:
    words = place.train(tmp_path, *TRUNK)
    nowhere = [NOWHERE if word == place.url else word for word in words]
    assert_fails(run_edge(*nowhere, "--max-retry-s", 0), 6)
    assert run_edge(*words).code == 0


def second_record_harmed(content: bytes) -> bytes:
    """The byte that says how long it is."""
    mark = b"\0text\r\n\x1a"
    place = content.index(mark, content.index(mark) + 1) + len(mark) + 32
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (lambda content: content[:-70], "was cut off while it was written"),
        (second_record_harmed, "is damaged in one place"),
        (lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:], "is damaged in one place"),
        (lambda content: b"", ""),
        (lambda content: content[:30], ""),
    ],
    ids=["cut off", "a length", "a bit", "empty", "the header cut off"],
)
def test_a_damaged_cache_is_asked_for_again(
    place: Place, whole: Path, change: Callable[[bytes], bytes], warning: str, tmp_path: Path
) -> None:
    """What is missing comes from the server again, and the run has the same bits."""
    words = place.train(tmp_path, *TRUNK, *KILLING, "--eval", place.data, "--keep-cache")
    kill_after(3, tmp_path, words)
    cache = tmp_path / CACHE
    cache.write_bytes(change(cache.read_bytes()))
    done = run_edge("resume", tmp_path)
    assert done.code == 0, done.stderr
    assert warning in done.stderr
    assert_same_run(tmp_path, whole)


def test_another_bundles_cache_is_refused(place: Place, tiny: TinyFactory, tmp_path: Path) -> None:
    """Of another model, or no cache at all; a run that begins puts its own in the place of one that came to nothing."""
    kill_after(SAVE_EVERY + 1, tmp_path, place.train(tmp_path, *TRUNK))
    cache = tmp_path / CACHE
    content = cache.read_bytes()
    fingerprint = Bundle.open(place.bundle).manifest.base_model.fingerprint.encode()
    assert fingerprint in content
    for wrong, text in (
        (content.replace(fingerprint, b"0" * 64, 1), "is of another base model, other blocks"),
        (b"not ours" * 9, "is no cache of hidden states"),
    ):
        cache.write_bytes(wrong)
        assert_fails(run_edge("resume", tmp_path), 10, text)
        assert cache.read_bytes() == wrong
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "adapter_model.safetensors").unlink()
    assert run_edge(*place.train(tmp_path, *TRUNK)).code == 0


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on(place: Place, tmp_path: Path) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text(records(450, longest=60))
    with small_disk(tmp_path, 600) as disk:
        out = disk / "run"
        words = Place(place.bundle, data, place.url).train(out, *TRUNK, "--wire-dtype", "fp32", "--eval", data)
        assert_fails(run_edge(*words), 9, "cannot write", "free space")
        wanted = tmp_path / "wanted"
        assert run_edge(*[wanted if word == out else word for word in words]).code == 0
        done = run_edge(*words, "--cache-mb", 0.2)  # what came is kept, the rest is asked for again each time
        assert done.code == 0, done.stderr
        assert "again, each time it is needed, what has no room in --cache-mb 0.2" in done.stderr
        # To rounding: texts that have no room are asked for alone, the others in packs.
        assert [row["loss"] for row in rows(out)] == pytest.approx([row["loss"] for row in rows(wanted)], rel=1e-6)
