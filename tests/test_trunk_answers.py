"""Runs in ``trunk`` whose adapters act on answers only: the losses of all rows, and what comes before is run once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from answers import INVOCATION, answered, random_answers
from generating import save_lora
from processes import run_edge
from runs import settings_in
from serving import RunningServer, config, final_weights, randomize, serving, training
from test_cli import assert_fails
from test_resume import Place, assert_same_run
from test_trunk_command import BLOCKS as MODEL_BLOCKS
from test_trunk_command import TRUNK, kill_after, summary
from tiny import Tiny, TinyFactory
from training_runs import loss_in_peft
from trunk_runs import HARMS, losses_in_two_parts, trunk_config, trunk_training

from dlora.edge.adapters.peft import load_adapter
from dlora.edge.client.datum import Datum
from dlora.edge.client.training_client import TrainingClient
from dlora.edge.data.batches import pack
from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.model.answer_block import AnswerBlock
from dlora.edge.model.answer_blocks import AnswerBlocks
from dlora.edge.model.block_weights import keys_width
from dlora.edge.model.cache_key import CacheKey
from dlora.edge.model.kept_outputs_cache import kept_outputs_path
from dlora.edge.run.blocks import open_blocks
from dlora.edge.run.directory import KEPT_OUTPUTS
from dlora.edge.settings import Placement, Settings
from dlora.edge.training.expected import first_rows_bytes
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connecting import ConnectSettings
from dlora.protocol.errors import BundleError
from dlora.protocol.manifest import load_manifest

BLOCKS = (1, 2, 3)
FRESH: dict[str, Any] = {"is_new": True, "connecting": ConnectSettings(), "warn": print}
LAST_ONLY = {"score": "static", "static": (2,), "on_kill": "hold_forward"}  # of the units, blocks 1 to 3
STEPS = 12  # of three examples each: four epochs
ANSWERS = random_answers()
SAID = answered([9, 10, 11], [12, 13])
OTHERS = [(each.ids.tolist(), each.label_positions.tolist()) for each in ANSWERS]
MIXED = Dataset.of([*OTHERS, SAID, SAID, answered([], [30])])
"""Some with a text that comes twice, and one in which nothing comes before the invocation."""


@pytest.fixture(scope="module")
def model(tiny: TinyFactory) -> Tiny:
    return tiny(blocks=MODEL_BLOCKS, device_blocks=3, head_dtype="fp32")


@pytest.fixture(scope="module")
def server(model: Tiny) -> Iterator[RunningServer]:
    with serving(model.base) as running:
        yield running


def answers_config(**changes: Any) -> Any:
    return trunk_config(BLOCKS, **{"total_steps": STEPS, "invocation": INVOCATION, **changes})


@pytest.fixture
def first_rows(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How many first rows each block ran."""
    found: Counter[int] = Counter()
    for name in ("run_first", "keys_of"):
        original: Callable[..., Any] = getattr(AnswerBlock, name)

        def counted(block: Any, *given: Any, original: Callable[..., Any] = original) -> Any:
            found[block.spec.index] += len(given[1])
            return original(block, *given)

        monkeypatch.setattr(AnswerBlock, name, counted)
    return found


def test_killed_units_are_those_of_a_run_whose_blocks_are_all_on_the_server(
    model: Tiny, server: RunningServer, tmp_path: Path
) -> None:
    """Steps of several micro-batches, and of one that is cut in parts."""
    save_lora(model.bundle, tmp_path / "saved", blocks=BLOCKS, invocation=INVOCATION, size=0.05)
    changes = {
        "kill_revive": LAST_ONLY, "grad_accum": 2, "total_steps": 6, "invocation": INVOCATION, "rank": 3,
        "lora_alpha": 6.0,
    }  # fmt: skip
    of_server = config(blocks=BLOCKS, target_modules=("all-linear",), **changes)
    init = load_adapter(tmp_path / "saved")
    found = []
    with training(model.bundle, server.url, of_server, MIXED, init=init) as trainer:
        found.append([trainer.run_step().loss for _ in range(6)])
    run = answers_config(**changes, keeps_outputs=True)
    with trunk_training(model.bundle, server.url, run, MIXED, tmp_path / "cache", init=init) as trainer:
        trainer.model._most_tokens = 16
        found.append([trainer.run_step().loss for _ in range(6)])
    assert np.allclose(found[1], found[0], rtol=2e-3)
    assert len(set(found[0])) == 6


def test_first_rows_are_kept_where_all_blocks_are_here(
    tiny: TinyFactory, first_rows: Counter[int], tmp_path: Path
) -> None:
    """Each different text's once, encrypted or not."""
    bundle = Bundle.open(tiny(blocks=3, device_blocks=3, head_dtype="fp32").bundle)
    engine, losses = OnnxEngine(bundle, 1), []
    texts = {bytes(each.ids): int(each.acts_from or 0) for each in MIXED.acting_on_answers(INVOCATION)}
    for keeps, key in ((False, None), (True, None), (True, CacheKey(bytes(range(32))))):
        run = trunk_config((0, 1, 2), is_local=True, total_steps=STEPS, invocation=INVOCATION, keeps_outputs=keeps)
        run = msgspec.structs.replace(run, placement=Placement(cache_mb=9))
        out = tmp_path / str(len(losses))
        out.mkdir()
        first_rows.clear()
        with open_blocks(bundle, engine, run, out, key=key, **FRESH) as blocks:
            trainer = Trainer(bundle, engine, blocks.make_side, run, MIXED)
            losses.append([trainer.run_step().loss for _ in range(STEPS)])
        assert (out / KEPT_OUTPUTS).exists() == keeps
        if keeps:
            assert dict(first_rows) == dict.fromkeys((0, 1, 2), sum(texts.values()))
    assert losses[1] == losses[2]
    assert np.allclose(losses[0], losses[1], rtol=2e-3)


def test_steps_are_those_of_a_run_whose_blocks_are_all_on_the_server(
    model: Tiny, server: RunningServer, tmp_path: Path
) -> None:
    """It runs all rows with PEFT's own LoRA, whatever acts on them."""
    of_server = config(blocks=BLOCKS, target_modules=("all-linear",), total_steps=STEPS, invocation=INVOCATION, rank=4)
    found = []
    with training(model.bundle, server.url, of_server, ANSWERS) as trainer:
        found.append(([trainer.run_step().loss for _ in range(STEPS)], final_weights(trainer)))
    with trunk_training(model.bundle, server.url, answers_config(), ANSWERS, tmp_path / "cache") as trainer:
        found.append(([trainer.run_step().loss for _ in range(STEPS)], final_weights(trainer)))
        trainer.save_adapter(tmp_path / "adapter")
        uninvoked = [([9, 10, 11, 12], [1, 2]), ([7, 8, 9, 7, 8, 10, 11], [1, 2, 4, 5])]
        held_out = Dataset.of([*uninvoked, answered([9, 9], [10, 30]), ([7, 8, 20], [1])])
        loss = trainer.evaluate(held_out).loss
    (of_all, weights), (of_answers, same) = found
    assert np.allclose(of_answers, of_all, rtol=1e-4)
    assert all(np.allclose(same[name], value, rtol=1e-3, atol=1e-5) for name, value in weights.items())
    assert load_adapter(tmp_path / "adapter").invocation == INVOCATION
    assert loss_in_peft(tmp_path / "adapter", held_out) == pytest.approx(loss, abs=1e-4)


def test_first_rows_are_run_once_for_each_text(
    model: Tiny, server: RunningServer, first_rows: Counter[int], tmp_path: Path
) -> None:
    """With the losses of a run that runs them at each step, to half precision."""
    losses = {}
    first = sum(int(each.acts_from or 0) for each in ANSWERS.acting_on_answers(INVOCATION))
    for keeps in (True, False):
        run = answers_config(keeps_outputs=keeps)
        with trunk_training(model.bundle, server.url, run, ANSWERS, tmp_path / str(keeps)) as trainer:
            randomize(trainer)
            first_rows.clear()
            losses[keeps] = [trainer.run_step().loss for _ in range(STEPS)]
        epochs = 1 if keeps else STEPS * 3 // len(ANSWERS)
        assert dict(first_rows) == dict.fromkeys(BLOCKS, first * epochs)
    assert np.allclose(losses[True], losses[False], rtol=2e-3)
    assert kept_outputs_path(tmp_path / "True").exists()
    assert not kept_outputs_path(tmp_path / "False").exists()
    kept = kept_outputs_path(tmp_path / "True").stat().st_size
    manifest = load_manifest(model.bundle)
    least = 2 * first * keys_width(manifest, 3)
    assert least < kept < first_rows_bytes(answers_config(), manifest, ANSWERS)


@pytest.mark.parametrize("harm", HARMS)
def test_keys_and_values_are_made_again_with_the_same_bits(
    model: Tiny, server: RunningServer, harm: str, tmp_path: Path
) -> None:
    run = answers_config(keeps_outputs=True)
    whole = losses_in_two_parts(model.bundle, server.url, run, MIXED, tmp_path / "whole")
    assert losses_in_two_parts(model.bundle, server.url, run, MIXED, tmp_path / "cache", HARMS[harm]) == whole


def test_bits_do_not_depend_on_room(model: Tiny, server: RunningServer, tmp_path: Path) -> None:
    """A cache that is too small for some: these are run again at each step."""
    run, found = answers_config(keeps_outputs=True), []
    with trunk_training(model.bundle, server.url, run, ANSWERS, tmp_path / "large") as trainer:
        found.append([trainer.run_step().loss for _ in range(STEPS)])
        room = kept_outputs_path(tmp_path / "large").stat().st_size // 2
    size = (tmp_path / "large").stat().st_size
    with trunk_training(model.bundle, server.url, run, ANSWERS, tmp_path / "small", limit=size + room) as trainer:
        found.append([trainer.run_step().loss for _ in range(STEPS)])
    assert room / 2 < kept_outputs_path(tmp_path / "small").stat().st_size <= room
    assert found[0] == found[1]


def test_a_text_is_cut_after_its_last_label_with_the_rows_that_adapters_act_on() -> None:
    dataset = Dataset.of([answered([9, 10], [20, 21]), ([9, 7, 8, 20, 21, 22], [2, 3])]).acting_on_answers(INVOCATION)
    batch = pack(list(dataset))
    cut = batch.until_last_label()
    assert cut.sequence_lengths.tolist() == [5, 4]
    assert cut.crossing_positions is not None
    assert cut.crossing_positions.tolist() == [2, 3, 4, 6, 7, 8]
    assert cut.ids[cut.crossing_positions].tolist() == [7, 8, 20, 7, 8, 20]


def test_a_micro_batch_with_nothing_to_train_gives_no_gradient(model: Tiny) -> None:
    blocks = AnswerBlocks(Bundle.open(model.bundle), OnnxEngine(Bundle.open(model.bundle), 1), 3, 4)
    lora = {name: np.ones(shape, np.float32) for name, shape in blocks.parameter_shapes.items()}
    dataset = Dataset.of([([9, 10, 11, 12], [1, 2])]).acting_on_answers(INVOCATION)
    batch = pack(list(dataset)).until_last_label()
    x = np.random.default_rng(0).standard_normal((len(batch.ids), 16), np.float32)
    last, kept = blocks.forward(x, batch, lora, 1.0)
    assert last.shape[0] == 2
    assert np.isfinite(last).all()
    assert blocks.backward(last, kept, lora, 1.0) == {}


# -- the commands ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(model: Tiny, server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Place:
    data = tmp_path_factory.mktemp("answers") / "data.jsonl"
    rng = np.random.default_rng(3)
    rows = [
        {"prompt": " ".join(f"w{n}" for n in rng.integers(0, 80, int(rng.integers(2, 8)))) + " w81 w82",
         "completion": f" w{n} w{n + 1}"}
        for n in range(10)
    ]  # fmt: skip
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Place(model.bundle, data, server.url)


ON_ANSWERS = (*TRUNK, "--active-from", "answer")


def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(place: Place, tmp_path: Path) -> None:
    """And its adapter has one loss, wherever its blocks run."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    found = summary(run_edge(*place.train(whole, *ON_ANSWERS, "--eval", place.data, "--json")))
    assert found["eval_loss_after"] < found["eval_loss_before"]
    assert settings_in(whole).active_from == "answer"
    kill_after(3, killed, place.train(killed, *ON_ANSWERS, "--eval", place.data))
    assert (killed / KEPT_OUTPUTS).stat().st_size > 0
    resumed = run_edge("resume", killed)
    assert resumed.code == 0, resumed.stderr
    assert_same_run(whole, killed)
    words = ("evaluate", "--bundle", place.bundle, "--server", place.url, "--adapter", whole, "--data", place.data)
    losses = [
        json.loads(run_edge(*words, "--wire-dtype", "fp32", "--device-blocks", blocks, "--json").stdout)["loss"]
        for blocks in ("3", "0")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(found["eval_loss_after"], rel=1e-3)


def test_one_epoch_keeps_nothing(place: Place, tmp_path: Path) -> None:
    """Nor does a cache that has no room for all of it, and says so."""
    kill_after(1, tmp_path / "once", place.train(tmp_path / "once", *ON_ANSWERS, "--steps", 6))
    assert not (tmp_path / "once" / KEPT_OUTPUTS).exists()
    done = run_edge(*place.train(tmp_path / "small", *ON_ANSWERS, "--cache-mb", 0.08))
    assert "what comes before answers is run in each epoch: --cache-mb has no room for 0." in done.stderr
    done = run_edge("plan", *place.train(tmp_path / "large", *ON_ANSWERS)[1:], "--json")
    assert done.code == 0, done.stderr


def test_a_client_keeps_nothing(tiny: TinyFactory, place: Place) -> None:
    """Its loop may bring other texts than the data have."""
    bundle = tiny(blocks=3, device_blocks=3, head_dtype="fp32").bundle
    settings = Settings.of(
        bundle=bundle, device_blocks="all", data=place.data, active_from="answer", kind="lora", steps=40
    )
    with TrainingClient.create(settings) as client:
        client.forward_backward(client.step_data(0))
        client.forward_backward([Datum([*range(20, 30), *INVOCATION, 40])])


def test_a_run_begins_with_an_adapter_that_acts_on_answers(place: Place, tmp_path: Path) -> None:
    """And need not be told so."""
    summary(run_edge(*place.train(tmp_path / "saved", *ON_ANSWERS, "--steps", 3, "--json")))
    summary(run_edge(*place.train(tmp_path / "run", *TRUNK, "--init-adapter", tmp_path / "saved", "--json")))
    assert settings_in(tmp_path / "run").active_from == "answer"


def test_blocks_that_do_not_go_on_are_refused_before_a_server_is_asked(
    tiny: TinyFactory, place: Place, tmp_path: Path
) -> None:
    bloom = tiny("bloom", head_dtype="fp32", device_blocks=1).bundle
    words = Place(bloom, place.data, "ws://127.0.0.1:9").train(
        tmp_path, "--device-blocks", 1, "--active-from", "answer"
    )
    assert_fails(run_edge(*words), 2, "--active-from answer cannot be with --device-blocks 1", "use --device-blocks 0")
    with pytest.raises(BundleError, match="go on from earlier tokens"):
        keys_width(load_manifest(bloom), 1)


def test_modules_that_peft_does_not_activate_are_left_out(tiny: TinyFactory, place: Place, tmp_path: Path) -> None:
    """OPT flattens what it gives to fc1 and fc2."""
    opt = tiny("opt", head_dtype="fp32", device_blocks=1)
    with serving(opt.base) as server:
        words = Place(opt.bundle, place.data, server.url).train(
            tmp_path, "--device-blocks", 1, "--active-from", "answer"
        )
        done = run_edge(*words)
    assert done.code == 0, done.stderr
    assert "PEFT has no activated LoRA for fc1, fc2 of this base model: these get no adapters" in done.stderr
    trained = {name.rpartition(".")[2] for name in load_adapter(tmp_path).modules}
    assert trained == {"q_proj", "k_proj", "v_proj", "out_proj"}
