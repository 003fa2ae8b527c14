"""A loop of one's own: the verbs give the command's bits, torch's gradients, and go on where they stopped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from families import VOCABULARY
from processes import run_edge
from serving import serving
from test_cli import Place
from tiny import Tiny, TinyFactory

from dlora.edge.client.datum import Datum
from dlora.edge.client.losses import dpo_loss
from dlora.edge.client.training_client import TrainingClient
from dlora.edge.data.batches import Batches
from dlora.edge.data.reading import load_examples
from dlora.edge.data.tokenizer import EdgeTokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.settings import Optimizer, Settings
from dlora.protocol.errors import CheckpointError, DataError, UsageError
from dlora.protocol.tensors import FloatArray

LR = 1e-2


@pytest.fixture(scope="module")
def model(tiny: TinyFactory) -> Tiny:
    return tiny("llama", head_dtype="fp32", max_position_embeddings=512)


@pytest.fixture(scope="module")
def place(model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    data = tmp_path_factory.mktemp("client") / "data.jsonl"
    rows = [{"prompt": f"w{n} w2", "completion": f" w{n + 1} w{n + 3}"} for n in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(model.base) as server:
        yield Place(model.bundle, data, server.url)


PLAIN: Final = {
    "seed": 0, "threads": 1, "wire_dtype": "fp32", "kind": "lora", "lr": LR, "schedule": "constant", "warmup": 0.0,
}  # fmt: skip


def client(place: Place, *, state: Path | None = None, on_progress: Any = None, **options: Any) -> Any:
    more = {} if on_progress is None else {"on_progress": on_progress}
    settings = Settings.of(**{"bundle": place.bundle, "server": place.url, **PLAIN, **options})
    return TrainingClient.create(settings, state=state, **more)


def some_data(count: int = 4, length: int = 7) -> list[Datum]:
    random = np.random.default_rng(0)
    return [Datum(random.integers(3, VOCABULARY, length + index)) for index in range(count)]


def step(own: TrainingClient, data: Sequence[Datum], params: Optimizer | float | None = None, **how: Any) -> None:
    own.forward_backward(data, **how)
    own.optim_step(params)


def weights(own: TrainingClient, directory: Path) -> bytes:
    own.save_adapter(directory)
    return (directory / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("passes", ["live", "2,2"])
def test_a_loop_gives_the_commands_bits(place: Place, tmp_path: Path, passes: str) -> None:
    """Plain cross-entropy, in the command's order of data."""
    words = place.train(
        tmp_path / "by-command", steps=4, batch_size=2, grad_accum=2, lr=LR, schedule="constant", warmup=0,
        wire_dtype="fp32", passes=passes,
    )  # fmt: skip
    done = run_edge(*words, "--json")
    assert done.code == 0, done.stderr
    dataset = load_examples(place.data, EdgeTokenizer.open(Bundle.open(place.bundle)), max_length=512)
    batches = Batches(dataset, 2, 2, (0,))
    losses = []
    with client(place, passes=passes) as own:
        for number in range(4):
            data = [Datum.of(dataset[int(index)]) for index in batches.step_indices(number)]
            losses.append(own.forward_backward(data, batch_size=2).loss)
            own.optim_step()
        by_loop = weights(own, tmp_path / "by-loop")
    assert (tmp_path / "by-command" / "adapter_model.safetensors").read_bytes() == by_loop
    rows = [json.loads(line) for line in (tmp_path / "by-command" / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx([row["loss"] for row in rows], rel=1e-6)


def gradients_of(own: TrainingClient) -> dict[str, FloatArray]:
    return {
        name: np.array(parameter.grad)
        for name, parameter in own._training.adapters.parameters().items()
        if parameter.grad is not None
    }


def test_weights_are_those_of_a_custom_loss(place: Place) -> None:
    data = [Datum(datum.tokens, weights=np.linspace(0.5, 2, len(datum.tokens))) for datum in some_data()]

    def loss(data: Sequence[Datum], logprobs: list[FloatArray]) -> tuple[float, list[FloatArray]]:
        total = sum(float(datum.label_weights.sum()) for datum in data)
        pairs = [*zip(data, logprobs, strict=True)]
        value = -sum(float((datum.label_weights * each).sum()) for datum, each in pairs) / total
        return value, [-datum.label_weights / np.float32(total) for datum in data]

    found = []
    for batch_size in (4, 1):
        with client(place) as own, client(place) as other:
            _randomize(own)
            _randomize(other)
            weighted = own.forward_backward(data, batch_size=batch_size)
            custom = other.forward_backward_custom(data, loss, batch_size=batch_size)
            found += [gradients_of(own), gradients_of(other)]
        assert custom.loss == pytest.approx(weighted.loss, rel=1e-6)
        for one, other in zip(custom.logprobs, weighted.logprobs, strict=True):
            assert np.abs(one - other).max() < 1e-5
    for other in found[1:]:
        for name, gradient in found[0].items():
            assert np.abs(gradient - other[name]).max() < 1e-6


def _randomize(own: TrainingClient) -> None:
    random = np.random.default_rng(7)
    for parameter in own._training.adapters.parameters().values():
        parameter.value = random.normal(0, 0.05, parameter.value.shape).astype(np.float32)


def test_a_state_goes_on_with_the_same_bits(place: Place, tmp_path: Path) -> None:
    """In another client, and in the one that has saved it."""
    data, params = some_data(), Optimizer(lr=2 * LR, weight_decay=0.1)
    with client(place) as own:
        for _ in range(2):
            step(own, data)
        own.save_state(tmp_path / "state")
        step(own, data, params, batch_size=1)
        whole = weights(own, tmp_path / "whole")
        own.load_state(tmp_path / "state")
        step(own, data, params, batch_size=1)
        assert weights(own, tmp_path / "again") == whole
    with client(place, state=tmp_path / "state", seed=None) as own:
        assert own.next_step == 2
        step(own, data, params, batch_size=1)
        assert weights(own, tmp_path / "resumed") == whole
    with pytest.raises(CheckpointError, match="no saved state"), client(place, state=tmp_path / "nowhere"):
        pass
    with pytest.raises(CheckpointError), client(place, state=tmp_path / "state", rank=2):
        pass


def test_a_state_that_is_refused_changes_nothing(place: Place, tmp_path: Path) -> None:
    data, found = some_data(), []
    with client(place, rank=2) as other:
        other.save_state(tmp_path / "other")
    for tries in (False, True):
        with client(place) as own:
            own.forward_backward(data)
            if tries:
                with pytest.raises(CheckpointError):
                    own.load_state(tmp_path / "other")
            own.optim_step()
            step(own, data)
            found.append(weights(own, tmp_path / str(tries)))
    assert found[0] == found[1]


def test_a_state_is_loaded_where_the_server_has_room_for_one(model: Tiny, place: Place, tmp_path: Path) -> None:
    with serving(model.base, max_sessions=1) as server:
        only = Place(model.bundle, place.data, server.url)
        with client(only, max_retry_s=20) as own:
            own.save_state(tmp_path)
            step(own, some_data())
            own.load_state(tmp_path)
            step(own, some_data())
            assert own.next_step == 1


def test_each_sequence_is_checked_where_the_server_takes_shorter_ones_than_the_model(model: Tiny, place: Place) -> None:
    with serving(model.base, max_tokens=64) as server:
        only = Place(model.bundle, place.data, server.url)
        with client(only) as own:
            own.forward_backward(some_data())
            with pytest.raises(DataError, match="65 tokens, the server takes 64"):
                own.forward_backward([Datum(np.full(65, 5))])


def test_no_data_and_weights_that_add_up_to_nothing_are_errors(place: Place) -> None:
    """Advantages, which may be negative, are divided by what the caller says."""
    advantages = [Datum([5, 6, 7], weights=[1, 1, 0]), Datum([5, 6, 8], weights=[-1, -1, 0])]
    with client(place) as own:
        for call in (own.forward, own.forward_backward, lambda data: own.forward_backward_custom(data, _sum)):
            with pytest.raises(UsageError, match="no data"):
                call([])
        for data, options in ((advantages, {}), (advantages[1:], {}), (advantages, {"total_weight": 0.0})):
            with pytest.raises(UsageError, match="give total_weight"):
                own.forward_backward(data, **options)
        assert np.isnan(own.forward(advantages).loss)
        own.forward_backward_custom(advantages, _sum, batch_size=1)
        assert not np.isnan(own.forward_backward(advantages, total_weight=2.0).loss)
        assert np.isfinite(own.optim_step().grad_norm)


def test_progress_is_told(place: Place) -> None:
    told: list[tuple[int, int]] = []
    with client(place, on_progress=lambda *counts: told.append(counts)) as own:
        own.forward_backward(some_data(5), batch_size=2)
        own.forward(some_data(5), batch_size=3)
        own.forward_backward_custom(some_data(2), dpo_loss([np.zeros(6), np.zeros(7)]))
    assert told == [(2, 5), (4, 5), (5, 5), (3, 5), (5, 5), (2, 2)]


def test_samples_are_of_the_adapters_as_they_are(place: Place, tmp_path: Path) -> None:
    with client(place) as own:
        datum = own.datum("w5 w6", " w7")
        own.save_state(tmp_path)
        with own.sampling_client() as sampling:
            before = sampling.sample("w5 w6", max_new_tokens=4, as_it_is=True, logprobs=True)
        untrained = own.forward([datum]).loss
        for _ in range(40):
            step(own, [datum], 0.1)
        with own.sampling_client() as sampling:
            after = asyncio.run(sampling.sample_async("w5 w6", max_new_tokens=4, as_it_is=True))
        assert len(before.tokens) == len(before.logprobs or ())
        assert after.text.strip() == "w7"
        assert own.sample("w5 w6", max_new_tokens=4, as_it_is=True) == after
        assert own.forward([datum]).loss < untrained - 1
        own.load_state(tmp_path)
        in_a_thread = asyncio.run(own.sample_async("w5 w6", max_new_tokens=4, as_it_is=True))
        assert in_a_thread.tokens == before.tokens
        assert asyncio.run(own.forward_async([datum])).loss == pytest.approx(untrained)
        asyncio.run(own.forward_backward_async([datum]))
        asyncio.run(own.optim_step_async())


def test_mistakes_are_errors() -> None:
    for arguments, words in (
        (([1, 2, 3], [1, 2]), "as many as its tokens"), (([1, 2], None, [1.0]), "one for each"),
        (([1, 2], [-100, -100]), "nothing of a datum counts"), (([1, -2],), "token ids"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=words):
            Datum(*arguments)


def test_a_gradient_of_another_shape_is_an_error(place: Place) -> None:
    with client(place) as own:
        with pytest.raises(UsageError, match="a number for each log-probability"):
            own.forward_backward_custom(some_data(), lambda data, logprobs: (0.0, logprobs[:-1]))
        own.forward_backward(some_data())
        assert np.isfinite(own.optim_step().grad_norm)


def test_the_gradient_of_preferences_is_torchs(place: Place, model: Tiny) -> None:
    """DPO through the split, and with autograd through the whole model with PEFT's LoRA."""
    import torch
    from peft_reference import parameter, with_adapters
    from transformers import AutoModelForCausalLM

    data = [Datum(datum.tokens) for datum in some_data()]
    with client(place, rank=4) as own:
        reference = own.forward(data).logprobs
        _randomize(own)
        found = own.forward_backward_custom(data, dpo_loss(reference, 0.5))
        gradients = gradients_of(own)
        wrapped = with_adapters(
            AutoModelForCausalLM.from_pretrained(model.model), own._training.adapters, 4,
            own._training.config.adapter.alpha,
        )  # fmt: skip
    sums = []
    for datum in data:
        ids = torch.tensor([list(datum.tokens)])
        likely = wrapped(ids).logits[0, :-1].log_softmax(-1)
        sums.append(likely.gather(1, ids[0, 1:, None]).sum())
    before = [float(each.sum(dtype=np.float64)) for each in reference]
    margins = [0.5 * ((sums[at] - before[at]) - (sums[at + 1] - before[at + 1])) for at in range(0, len(data), 2)]
    loss = torch.stack([-torch.nn.functional.logsigmoid(margin) for margin in margins]).mean()
    loss.backward()
    assert found.loss == pytest.approx(loss.item(), abs=1e-5)
    assert gradients
    for name, gradient in gradients.items():
        theirs = parameter(wrapped, name).grad
        assert theirs is not None
        assert np.abs(gradient - theirs.numpy()).max() <= 1e-5


def test_a_call_that_fails_halfway_leaves_no_gradient(place: Place) -> None:
    (good,), too_long = some_data(1), Datum(np.full(600, 5))
    with client(place) as own:
        own.forward_backward([good])
        wanted = gradients_of(own)
        for fails in (own.forward_backward, lambda data, **options: own.forward_backward_custom(data, _sum, **options)):
            with pytest.raises(DataError):
                fails([good, too_long], batch_size=1)
            found = gradients_of(own)
            assert found.keys() == wanted.keys()
            assert all((found[name] == wanted[name]).all() for name in wanted)


def _sum(data: Sequence[Datum], logprobs: list[FloatArray]) -> tuple[float, list[FloatArray]]:
    return -sum(float(each.sum()) for each in logprobs), [np.full(len(each), -1, np.float32) for each in logprobs]
