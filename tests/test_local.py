"""Training in ``local``: all blocks on the device, no server; what torch and PEFT do in one process."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from block_bundles import with_last_blocks
from families import tiny_model
from peft_reference import assert_steps_are_those_of_peft, loss_of, with_adapters
from processes import finish, run_edge, start_edge
from runs import settings_in
from serving import random_dataset, randomize
from test_cli import assert_fails
from test_resume import KILLING, SAVE_EVERY, Place, assert_same_run, wait_for_lines
from tiny import Tiny, TinyFactory
from transformers import AutoModelForCausalLM
from trunk_runs import trunk_config

from dlora.cloud.model.base_model import BaseModel
from dlora.edge.data.batches import pack
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.model.embedding_source import EmbeddingSource
from dlora.edge.training.side import DeviceSide
from dlora.edge.training.trainer import Trainer
from dlora.export.bundle import export_bundle
from dlora.export.settings import ExportSettings
from dlora.export.tracing.entry import CannotBeginOnDevice, find_entry
from dlora.protocol.errors import ExportError

LOCAL = ("--device-blocks", "all")


def local_training(bundle: Path, blocks: int, **changes: object) -> Trainer:
    opened = Bundle.open(bundle)
    engine = OnnxEngine(opened, 1)
    run = trunk_config(tuple(range(blocks)), is_local=True, **changes)
    data = random_dataset(opened.manifest.base_model.vocabulary_size)
    return Trainer(opened, engine, partial(DeviceSide, source=EmbeddingSource(opened, engine)), run, data)


# What stands between embeddings and block 0: a row for each position, nothing, a factor.
@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(family, marks=pytest.mark.slow) for family in ("llama", "granite"))]
)
def test_a_run_is_that_of_peft(family: str, tiny: TinyFactory) -> None:
    """Losses and gradients of each step, the weights after some, and an evaluation."""
    model = tiny(family, device_blocks=2, head_dtype="fp32", tie_word_embeddings=False)
    trainer = local_training(model.bundle, 2)
    randomize(trainer)
    reference = with_adapters(AutoModelForCausalLM.from_pretrained(model.model), trainer.adapters, 4, 8.0)
    assert_steps_are_those_of_peft(trainer, reference, 4)
    data = random_dataset(model.base.vocabulary_size)
    whole = loss_of(reference, [pack([data[index] for index in range(len(data))])]).item()
    assert abs(trainer.evaluate(data).loss - whole) < 1e-4


@pytest.mark.parametrize(
    ("family", "changes", "wanted"),
    [
        ("bloom", {}, "go through a norm"),
        ("nanochat", {}, "go through a norm"),
        ("opt", {}, "are 8 wide and made 16 before block 0, by a projection"),
        ("opt", {"word_embed_proj_dim": 16}, (1.0, True)),
        ("gemma2", {}, (1.0, False)),  # its factor is the embedding's own
        ("granite", {}, (3.0, False)),
    ],
)
def test_what_stands_before_the_first_block_is_found_or_refused(
    family: str, changes: dict[str, int], wanted: str | tuple[float, bool]
) -> None:
    base = BaseModel.from_model(tiny_model(family, **changes), family)
    if isinstance(wanted, str):
        with pytest.raises(CannotBeginOnDevice, match=wanted):
            find_entry(base)
    else:
        found = find_entry(base)
        assert (found.scale, found.positions is not None) == wanted


def test_a_family_that_cannot_begin_on_a_device_is_told_how_many_blocks_it_can_have(
    tiny: TinyFactory, tmp_path: Path
) -> None:
    settings = ExportSettings(str(tiny("bloom").model), tmp_path / "bundle", device_blocks=2)
    with pytest.raises(ExportError, match="--device-blocks 1 is the most"):
        export_bundle(settings)


@pytest.fixture(scope="module")
def model(tiny: TinyFactory) -> Tiny:
    return tiny(device_blocks=2, head_dtype="fp32")


@pytest.fixture(scope="module")
def place(model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Place:
    rng = np.random.default_rng(2)
    rows = [{"text": " ".join(f"w{n}" for n in rng.integers(0, 89, int(rng.integers(4, 12))))} for _ in range(10)]
    data = tmp_path_factory.mktemp("local") / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Place(model.bundle, data, "")


def local(place: Place, out: Path, *options: object) -> list[object]:
    """A command without a server."""
    words = place.train(out, *LOCAL, *options)
    at = words.index("--server")
    return [*words[:at], *words[at + 2 :]]


def test_a_run_needs_no_server_and_goes_on_to_the_same_bits(place: Place, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_edge(*local(place, whole, *KILLING, "--eval", place.data, "--json"))
    assert done.code == 0, done.stderr
    assert "nothing will cross the wire" in done.stderr
    found = json.loads(done.stdout)
    assert found["eval_loss_after"] < found["eval_loss_before"]
    assert {found[name] for name in ("bytes_up", "bytes_down", "round_trips", "set_up_bytes_up", "reconnects")} == {0}
    settings = settings_in(whole)
    assert (settings.server, settings.device_blocks, settings.blocks) == (None, "all", "0-1")
    assert (settings.kind, settings.cache_mb, settings.batch_size) == ("lora", 4000, 3)
    words = ("evaluate", "--bundle", place.bundle, "--data", place.data, "--threads", 1, "--json", *LOCAL)
    evaluated = json.loads(run_edge(*words, "--adapter", whole).stdout)
    assert abs(evaluated["loss"] - found["eval_loss_after"]) < 1e-5
    assert abs(json.loads(run_edge(*words).stdout)["loss"] - found["eval_loss_before"]) < 1e-5
    nobody = ("--server", "ws://127.0.0.1:9", "--adapter", whole)
    done = run_edge(*words[: -len(LOCAL)], *nobody)  # as it was trained
    assert json.loads(done.stdout) == evaluated
    assert "all blocks run here, and --server is not asked" in done.stderr
    process = start_edge(*local(place, killed, *KILLING, "--eval", place.data))
    wait_for_lines(killed / "metrics.jsonl", SAVE_EVERY + 3)
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert run_edge("resume", killed).code == 0
    assert_same_run(killed, whole)


def test_evaluations_change_no_bit_of_the_training(place: Place, tmp_path: Path) -> None:
    """Blocks are killed meanwhile, and what comes out of them is held."""
    seldom, often = tmp_path / "seldom", tmp_path / "often"
    for out, options in ((seldom, ()), (often, ("--eval", place.data, "--eval-every", 1))):
        done = run_edge(*local(place, out, *KILLING, *options))
        assert done.code == 0, done.stderr
    assert len((often / "evaluations.jsonl").read_text().splitlines()) > 20
    assert_same_run(often, seldom)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--server", "ws://127.0.0.1:9"), "--device-blocks all asks no server: all blocks run here"),
        (("--keep-cache",), "--keep-cache is for what a server gave"),
        (("--kind", "ffa"), "--kind ffa cannot be with --device-blocks"),
        (("--device-blocks", 1), "--device-blocks 1 needs --server"),
    ],
)
def test_what_cannot_be_is_one_line(place: Place, options: tuple[object, ...], text: str, tmp_path: Path) -> None:
    assert_fails(run_edge(*local(place, tmp_path / "out", *options)), 2, text)
    assert not (tmp_path / "out").exists()


def test_a_bundle_without_all_blocks_is_one_line(place: Place, tmp_path: Path) -> None:
    other = Place(with_last_blocks(place.bundle, tmp_path / "bundle", 1), place.data, "")
    text = "has 1 of the model's 2 blocks for a device; export it again with --device-blocks all"
    assert_fails(run_edge(*local(other, tmp_path / "out")), 4, text)
