"""Adapters that act on answers only: PEFT's activated LoRA."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from answers import INVOCATION, answered, random_answers
from families import VOCABULARY, tiny_model
from generating import generated
from peft_reference import loss_of, parameter
from processes import run_edge
from serving import config, randomize_all, serving
from test_cli import GOOD_ROW, Place, assert_fails
from tiny import TinyFactory
from training_runs import BLOCKS, Runs, in_peft, loss_in_peft, step_traffic

from dlora.edge.adapters.peft import load_adapter
from dlora.edge.data.batches import evaluation_batches, pack
from dlora.edge.data.examples import Dataset, last_occurrence
from dlora.edge.data.invocation import find_invocation, uninvoked_line
from dlora.edge.model.context import Context
from dlora.edge.model.evaluation import evaluate
from dlora.edge.training.resolved import Resolved
from dlora.protocol.choices import Send
from dlora.protocol.errors import CheckpointError, ProtocolError, UsageError
from dlora.protocol.traffic import Traffic, report_traffic

ANSWERS = random_answers()
KINDS = ["lora", "bottleneck", "ffa"]


@pytest.fixture(scope="module")
def runs(tiny: TinyFactory) -> Iterator[Runs]:
    with Runs.of(tiny) as made:
        yield made


def run_of(kind: str, **changes: Any) -> Resolved:
    settings = {"target_modules": ("all-linear",), "lora_alpha": 4.0, "invocation": INVOCATION, "basis_steps": 1}
    return config(kind=kind, **{**settings, **changes})


def test_start_says_what_becomes_of_conversations(runs: Runs, tmp_path: Path) -> None:
    said = [{"role": role, "content": word} for role, word in (("user", "w1"), ("assistant", "w2 w3")) * 2]
    data = tmp_path / "data.jsonl"
    data.write_text((json.dumps({"messages": said}) + "\n") * 3)
    place = Place(runs.bundle, data, runs.server.url)
    done = run_edge(*place.train(tmp_path / "out", kind=None))
    assert done.code == 0, done.stderr
    assert "each answer is an example of its own: 6 of 3 conversations" in done.stderr
    assert "PEFT loads them so, and cannot merge them" in done.stderr


def test_modules_that_peft_does_not_activate_get_no_activated_adapter(tiny: TinyFactory, tmp_path: Path) -> None:
    """OPT flattens what it gives to fc1 and fc2."""
    model = tiny("opt", head_dtype="fp32")
    data = tmp_path / "data.jsonl"
    data.write_text((GOOD_ROW + "\n") * 4)
    with serving(model.base) as server:
        place = Place(model.bundle, data, server.url)
        done = run_edge(*place.train(tmp_path / "default", kind=None))
        assert done.code == 0, done.stderr
        assert "PEFT has no activated LoRA for fc1, fc2 of this base model: these get no adapters" in done.stderr
        trained = load_adapter(tmp_path / "default")
        assert trained.invocation
        assert {name.rpartition(".")[2] for name in trained.modules} == {"q_proj", "k_proj", "v_proj", "out_proj"}
        named = {"kind": None, "target_modules": "fc1,q_proj"}
        done = run_edge(*place.train(tmp_path / "named", **named))
        assert done.code == 0, done.stderr
        assert "adapters act at all tokens: PEFT has no activated LoRA for fc1 of this base model" in done.stderr
        assert not load_adapter(tmp_path / "named").invocation
        refused = run_edge(*place.train(tmp_path / "refused", **named, active_from="answer"))
        data.write_text('{"text": "w1 w2 w3 w4 w5"}\n' * 4)
        text = run_edge(*place.train(tmp_path / "text", kind=None))
        assert "adapters act at all tokens: data of the form 'text' have no answers" in text.stderr
        assert "fc1, fc2, k_proj, out_proj, q_proj, v_proj in 2 blocks" in text.stderr, "nothing is left out then"
    assert_fails(refused, UsageError.exit_code, "no activated LoRA for fc1", "leave these out of --target-modules")


# -- the invocation ------------------------------------------------------------------------------------------


def test_invocation_is_the_shortest_tail_that_no_answer_contains() -> None:
    shared = [answered([9, 10], [20, 21]), answered([11], [22])]
    assert find_invocation(Dataset.of(shared)) == (8,)
    assert find_invocation(Dataset.of([*shared, answered([12], [8, 23])])) == (7, 8)
    # In a prompt it may stand before: the last occurrence counts.
    assert find_invocation(Dataset.of([*shared, answered([8, 8], [24])])) == (8,)


def test_invocation_is_the_templates_header_where_that_fits() -> None:
    dataset = Dataset.of([answered([9, 10], [20, 21]), answered([11], [22])])
    dataset.facts.assistant_header = (7, 8)
    assert find_invocation(dataset) == (7, 8)
    dataset.facts.assistant_header = (6, 8)  # tokenised in another way here
    assert find_invocation(dataset) == (8,)


def test_invocation_is_one_that_held_out_answers_do_not_contain_either() -> None:
    dataset, held_out = Dataset.of([answered([9], [20]), answered([10], [21])]), Dataset.of([answered([9], [8, 20])])
    assert find_invocation(dataset) == (8,)
    assert find_invocation(dataset, [held_out]) == (7, 8)
    worse = Dataset.of([answered([9], [7, 8, 20]), answered([9], [20])])
    assert "1 of 2 examples" in str(uninvoked_line(worse, find_invocation(dataset, [worse])))
    assert uninvoked_line(dataset, (7, 8)) is None


@pytest.mark.parametrize(
    "examples",
    [
        [answered([9], [20]), answered([9], [20], tail=(10,))],
        [answered([9], [20, 8]), answered([10], [7, 8, 20]), answered([9, 7, 8], [9, 7, 8])],
        [answered([], [3, 4, 5], tail=(3,)), ([3, 4, 5], [0, 1])],
        [([1, 4, 5], [0, 1]), ([1, 6], [0])],
    ],
    ids=["nothing in common", "in the answers, too", "no prompts", "texts that begin alike"],
)
def test_data_without_an_invocation_are_refused(examples: list[tuple[list[int], list[int]]]) -> None:
    with pytest.raises(UsageError, match="--active-from start"):
        find_invocation(Dataset.of(examples))


def test_last_occurrence() -> None:
    ids = np.array([7, 8, 7, 8, 7], np.int32)
    tokens = [(7, 8), (7,), (8, 8), (7, 8, 7, 8, 7), (7,) * 9]
    assert [last_occurrence(ids, each) for each in tokens] == [2, 4, 5, 0, 5]


def test_each_answer_becomes_an_example() -> None:
    ids = list(range(10, 30))
    both, one = (ids, [2, 3, 8, 9, 10]), ([5, 6, 7], [1])
    cut = Dataset.of([both, one]).one_answer_each()
    assert [(each.ids.tolist(), each.label_positions.tolist()) for each in cut] == [
        (ids[:5], [2, 3]), (ids[:12], [8, 9, 10]), ([5, 6, 7], [1]),
    ]  # fmt: skip
    assert cut.one_answer_each() is cut
    # What follows an answer goes: a conversation cut short in its next header is no reason to find no invocation.
    (trailing,) = Dataset.of([([9, *INVOCATION, 20, 5, *INVOCATION], [2])]).one_answer_each()
    assert trailing.ids.tolist() == [9, *INVOCATION, 20]
    assert sum(len(each.labels) for each in cut) == 6


def test_rows_that_cross_end_with_the_last_label() -> None:
    dataset = Dataset.of([answered([9, 10], [20, 21]), ([9, 7, 8, 20, 21, 22], [2, 3])]).acting_on_answers(INVOCATION)
    batch = pack(list(dataset))
    assert batch.crossing_positions is not None
    assert batch.crossing_positions.tolist() == [2, 3, 4, 7, 8, 9]
    parts = batch.cut(max_tokens=6, packs=True)
    crossing = [part.crossing_positions for part in parts]
    assert [positions.tolist() for positions in crossing if positions is not None] == [[2, 3, 4], [1, 2, 3]]


# -- against PEFT --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wire_dtype", "tolerance"), [("fp32", 1e-4), ("fp16", 2e-3), ("int8", 2e-3)])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_the_loss_of_the_saved_adapter(
    runs: Runs, kind: str, wire_dtype: str, tolerance: float, tmp_path: Path
) -> None:
    """In data where it is invoked, in some where it is not, and in some where it is invoked twice."""
    with runs.train(run_of(kind, wire_dtype=wire_dtype), ANSWERS) as trainer:
        randomize_all(trainer)
        trainer.run_step()
        others = [([9, 10, 11, 12], [1, 2]), ([7, 8, 9, 7, 8, 10, 11], [1, 2, 4, 5])]
        held_out = Dataset.of([*others, answered([9, 9], [10, 30]), *others])
        loss = trainer.evaluate(held_out).loss
        trainer.save_adapter(tmp_path)
    assert load_adapter(tmp_path).invocation == INVOCATION
    assert loss_in_peft(tmp_path, held_out) == pytest.approx(loss, abs=tolerance)
    with runs.open(tmp_path) as opened:
        assert evaluate(opened, held_out, 3).loss == pytest.approx(loss, abs=tolerance)
    assert "cannot merge" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_uninvoked_adapter_is_the_base_model(runs: Runs, kind: str) -> None:
    """No row crosses at all."""
    with runs.train(run_of(kind), ANSWERS) as trainer:
        randomize_all(trainer)
        uninvoked = Dataset.of([([9, 10, 11, 12], [1, 2]), ([8, 7, 9], [0, 1])])
        loss = trainer.evaluate(uninvoked).loss
    model = tiny_model("llama", num_hidden_layers=BLOCKS).eval()
    with torch.no_grad():
        assert loss_of(model, list(evaluation_batches(uninvoked, 2))).item() == pytest.approx(loss, abs=1e-5)


@pytest.mark.usefixtures("exact_factors")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_peft(runs: Runs, kind: str, tmp_path: Path) -> None:
    """Of each module's lora_B, which PEFT has of every kind; of a core by way of it."""
    with runs.train(run_of(kind), ANSWERS) as trainer:
        randomize_all(trainer)
        trainer.save_adapter(tmp_path)
        (batch,) = trainer.batches.step_batches(0)
        trainer.model.forward_backward([batch], step=0, grad_scale=1 / len(batch.labels))
        found = {name: parameter.grad for name, parameter in trainer.adapters.parameters().items()}
        states = {group.name: group.adapter_state_values() for group in trainer.adapters.groups}
    model = in_peft(tmp_path, is_trainable=True)
    loss_of(model, [batch]).backward()
    for spec in trainer.groups:
        grads = {
            f"{target.name}.lora_B": target.gain * parameter(model, f"{target.name}.lora_B").grad.numpy()
            for target in spec.targets
        }
        if kind == "bottleneck":
            stacked = np.concatenate(list(grads.values()))
            grads = {f"{spec.targets[0].name}.core": states[spec.targets[0].name][1].T @ stacked}
        for name, grad in grads.items():
            np.testing.assert_allclose(found[name], grad, rtol=1e-3, atol=1e-4 * np.abs(grad).max(), err_msg=name)


@pytest.fixture(scope="module")
def saved(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    runs.save_random(run_of("bottleneck"), directory, ANSWERS)
    return directory


def test_generation_acts_from_the_prompts_invocation_on(runs: Runs, saved: Path) -> None:
    model = in_peft(saved)
    ids = np.array([9, 10, 7, 8, 11, 12], np.int64)
    with runs.open(saved) as opened, torch.no_grad():
        logits = Context(opened).logits(ids, last_occurrence(ids.astype(np.int32), opened.invocation))[0]
        wanted = model(input_ids=torch.from_numpy(ids)[None]).logits[0, -1].numpy()
        everywhere = Context(opened).logits(ids)[0]
    np.testing.assert_allclose(logits, wanted, atol=1e-3 * np.abs(wanted).max())
    assert np.abs(everywhere - wanted).max() > 1e-3 * np.abs(wanted).max()


def test_uninvoked_generation_is_the_base_models(runs: Runs, saved: Path) -> None:
    """Also at the tokens that it has produced, with and without a cache."""
    for context_length in (0, 20):
        answers = {}
        for adapter in (None, saved):
            with runs.open(adapter, context_length=context_length) as model:
                for prompt in ((9, 10, 11), (9, 7, 8)):
                    answers[adapter, prompt] = generated(model, prompt, 6)
        assert answers[None, (9, 10, 11)] == answers[saved, (9, 10, 11)]
        assert answers[None, (9, 7, 8)] != answers[saved, (9, 7, 8)]


# -- what crosses, and what fits -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wire_dtype", "send"), [("int8", "embeddings"), ("fp16", "embeddings"), ("fp32", "token-ids")]
)
def test_only_answers_cross(runs: Runs, wire_dtype: str, send: Send) -> None:
    run = run_of("bottleneck", wire_dtype=wire_dtype, send=send)
    with runs.train(run, ANSWERS) as trainer:
        metrics = trainer.run_step()
        (batch,) = trainer.batches.step_batches(0)
    wanted = step_traffic(trainer, batch, rows=3 * (len(INVOCATION) + 2), send=send)
    wanted += Traffic(report_traffic(len(trainer.adapters.units), 0).bytes_up, 0, 0)
    assert (metrics.bytes_up, metrics.bytes_down) == (wanted.bytes_up, wanted.bytes_down)


def test_int8_run_evaluates_over_fp16(runs: Runs) -> None:
    bytes_of = {}
    for wire_dtype in ("int8", "fp16", "fp32"):
        with runs.train(run_of("bottleneck", wire_dtype=wire_dtype), ANSWERS) as trainer:
            before = trainer.traffic
            trainer.evaluate(ANSWERS)
            bytes_of[wire_dtype] = [now - then for now, then in zip(trainer.traffic, before, strict=True)]
    assert bytes_of["int8"] == bytes_of["fp16"] != bytes_of["fp32"]


def test_an_adapter_acts_where_it_did_when_a_run_starts_from_it(runs: Runs, tmp_path: Path) -> None:
    runs.save_random(run_of("lora"), tmp_path / "answers", ANSWERS)
    runs.save_random(run_of("lora", invocation=()), tmp_path / "all", ANSWERS)
    for name, invocation, message in (
        ("answers", (), "train with --active-from answer"),
        ("answers", (8,), "train with --active-from answer"),
        ("all", INVOCATION, "train with --active-from start"),
    ):
        init = load_adapter(tmp_path / name)
        run = run_of("lora", invocation=invocation)
        with pytest.raises(CheckpointError, match=message), runs.train(run, ANSWERS, init=init):
            pass


# -- token ids -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_in_place_of_embeddings_give_the_same_run(runs: Runs, kind: str) -> None:
    """The tiny bundle's embeddings are the base model's, to the bit."""
    sends = ("embeddings", "token-ids")
    first, second = (runs.steps(run_of(kind, send=each, total_steps=3), 3, dataset=ANSWERS) for each in sends)
    assert first == second


def test_token_that_the_base_model_does_not_have_is_refused(runs: Runs) -> None:
    beyond = Dataset.of([answered([VOCABULARY + 5], [9])])
    with (
        runs.train(run_of("lora", send="token-ids"), ANSWERS) as trainer,
        pytest.raises(ProtocolError, match="a token that the base model"),
    ):
        trainer.evaluate(beyond)
