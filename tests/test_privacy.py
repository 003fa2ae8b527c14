"""Canaries: a device trains on marked data, and nothing marked is in what the server gets, logs or writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from canaries import Scanner
from processes import cloud_process, run_edge
from proxy import payloads, recording_proxy
from serving import config, training
from tiny import TinyFactory

from dlora.edge.data.examples import Dataset
from dlora.edge.data.reading import load_examples
from dlora.edge.data.tokenizer import EdgeTokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.seeds import adapter_generator, seed_for_server
from dlora.edge.training.trainer import Trainer
from dlora.protocol import messages as m
from dlora.protocol.frames import Decoder

STEPS = 3
SECRET = "CanaryZebra4711"
RANK = 8
RECEIVED = "what the server received"
REQUESTS = "the HTTP requests"
RUNS = (("lora", "fp32"), ("lora", "fp16"), ("bottleneck", "fp32"), ("bottleneck", "int8"), ("ffa", "fp16"))
SEEDS = [(3 + index,) for index in range(len(RUNS))]  # with the same, ffa would hand over the A that lora begins with


@dataclass(frozen=True)
class Leak:
    """All that left the device, all that must not have, and what may be seen.

    Attributes:
        scanner: finds what must be nowhere; kept: what a server may hold, and not write down.
    """

    places: dict[str, bytes]
    scanner: Scanner
    kept: Scanner
    dataset: Dataset
    embedding: np.ndarray
    received: list[bytes]
    sent: list[bytes]
    model: Path


def marked_data(path: Path) -> None:
    rng = np.random.default_rng(4)
    with path.open("w") as file:
        for _ in range(6):
            words = [f"w{index}" for index in rng.permutation(90)[:14]]
            row = {"prompt": f"{SECRET} {' '.join(words[:6])}", "completion": f" {' '.join(words[6:])} {SECRET}"}
            file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="module")
def leak(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Leak:
    directory = tmp_path_factory.mktemp("privacy")
    model = tiny(rank=RANK, head_dtype="fp32")
    path, server = model.bundle, directory / "server"
    marked_data(directory / "data.jsonl")
    bundle = Bundle.open(path)
    tokenizer = EdgeTokenizer.open(bundle)
    dataset = load_examples(directory / "data.jsonl", tokenizer, max_length=64)
    scanner, kept = Scanner(), Scanner()
    scanner.add_text(SECRET)
    for index in range(len(dataset)):
        example = dataset[index]
        scanner.add_tokens(example.ids.tolist(), f"token ids of example {index}")
        scanner.add_tokens(example.labels.tolist(), f"labels of example {index}")
    with cloud_process(model.model, server) as cloud:
        with recording_proxy(cloud.url) as proxy:
            for (kind, wire_dtype), seed in zip(RUNS, SEEDS, strict=True):
                run = config(kind=kind, total_steps=STEPS, rank=RANK, wire_dtype=wire_dtype, basis_steps=2, seed=seed)
                with training(path, proxy.url, run, dataset) as trainer:
                    for step in range(STEPS):
                        trainer.run_step()
                        add_adapters(scanner, trainer, f"after step {step}, {wire_dtype}")
                    add_what_the_server_keeps(kept, trainer)
                    trainer.save_checkpoint(directory / kind)
                    trainer.save_adapter(directory / "adapter")
        assert cloud.end() == 0
    assert len(proxy.recordings) == len(RUNS)
    received = [payload for recording in proxy.recordings for payload in payloads(recording.up)]
    sent = [payload for recording in proxy.recordings for payload in payloads(recording.down)]
    requests = b"".join(bytes(each.up[: each.up.index(b"\r\n\r\n")]) for each in proxy.recordings)
    written = {str(path.relative_to(server)): path.read_bytes() for path in server.rglob("*") if path.is_file()}
    places = {RECEIVED: b"".join(received), REQUESTS: requests, **written}
    embedding = np.array(bundle.weight(bundle.manifest.embedding.weight), np.float32)
    return Leak(places, scanner, kept, dataset, embedding, received, sent, model.model)


def add_adapters(scanner: Scanner, trainer: Trainer, when: str) -> None:
    for full_name, parameter in trainer.adapters.parameters().items():
        module, _, half = full_name.rpartition(".")
        for name in ("value", "exp_avg", "exp_avg_sq"):
            scanner.add_matrix(getattr(parameter, name), f"{half} {name} of {module} {when}")


def add_what_the_server_keeps(scanner: Scanner, trainer: Trainer) -> None:
    """A and B of a ``bottleneck``, A of ``ffa``."""
    for group in trainer.adapters.groups:
        for index, tensor in enumerate(group.adapter_state_values()):
            scanner.add_matrix(np.asarray(tensor, np.float32), f"tensor {index} that the server keeps of {group.name}")


def test_no_private_data_leaves_the_device(leak: Leak) -> None:
    assert list(leak.scanner.find(leak.places)) == []


def test_server_writes_down_nothing_of_what_it_keeps(leak: Leak) -> None:
    assert len(leak.kept.patterns) > 1000
    written = {place: content for place, content in leak.places.items() if place not in (RECEIVED, REQUESTS)}
    assert list(leak.kept.find(written)) == []
    assert list(leak.kept.find(leak.places)), "ffa's A is drawn by the device, and crosses"


def test_recorder_finds_what_is_sent(leak: Leak) -> None:
    """The embeddings cross, as the docs say: a recorder that missed them would miss a canary too."""
    decoder = Decoder()
    messages = [decoder.decode(payload) for payload in leak.received]
    assert {type(message) for message in messages} >= {m.Embeddings, m.GroupDelta, m.GroupInputGrad, m.StepReport}
    rows = Scanner()
    tokens = sorted({token for index in range(len(leak.dataset)) for token in leak.dataset[index].ids.tolist()})
    for token in tokens:
        rows.add_matrix(leak.embedding[token : token + 1], f"embedding {token}")
    found = {line.split(",")[0] for line in rows.find({RECEIVED: leak.places[RECEIVED]})}
    assert found == {f"embedding {token}" for token in tokens}


def test_onnxruntime_reports_nothing_to_its_maker(tiny: TinyFactory, tmp_path: Path) -> None:
    """Its packages do by default, and keep an id of the device for it."""
    home = tmp_path / "home"
    home.mkdir()
    done = run_edge("selftest", "--bundle", tiny().bundle, "--engine", "onnx", HOME=str(home), XDG_CACHE_HOME="")
    assert done.code == 0, done.stderr
    assert not [path for path in home.rglob("*") if "onnx" in path.name.lower()]


def test_server_writes_only_keys_and_log(leak: Leak) -> None:
    assert set(leak.places) - {RECEIVED, REQUESTS} == {"log", "state/ticket.key", "state/tokens.sqlite"}
    assert len(leak.places["state/ticket.key"]) == 32
    assert b"closed at step" in leak.places["log"]


@pytest.mark.parametrize("place", [RECEIVED, "log"])
def test_the_scanner_finds_a_planted_canary(leak: Leak, place: str) -> None:
    ids, labels = leak.dataset[2].ids, leak.dataset[2].labels
    adapter_rows, moments, cores = (
        [pattern for pattern, name in leak.scanner.patterns.items() if name.startswith(start)]
        for start in ("lora_B value", "lora_A exp_avg_sq", "core value")
    )
    assert adapter_rows
    assert moments
    assert cores
    planted = [
        f"prompt was {SECRET}".encode(),
        ids[2:8].astype(np.int32).tobytes(),
        labels.astype(np.int64).tobytes(),
        str(ids.tolist()).encode(),
        adapter_rows[0],
        moments[-1],
        cores[-1],
    ]
    content = leak.places[place]
    for canary in planted:
        middle = len(content) // 2
        spoiled = content[:middle] + canary + content[middle:]
        assert list(leak.scanner.find({place: spoiled})), canary


def test_seed_that_is_sent_is_not_the_adapters_seed(leak: Leak) -> None:
    """Whoever has the seed of A has A, and with it the rest."""
    decoder = Decoder()
    openings = [each for each in map(decoder.decode, leak.received) if isinstance(each, m.OpenSession)]
    assert [each.adapter.kind for each in openings] == [kind for kind, _ in RUNS]
    for opening, seed in zip(openings, SEEDS, strict=True):
        assert isinstance(opening.purpose, m.Train)
        told = opening.purpose.seed
        assert told == seed_for_server(seed)
        assert told not in seed
        theirs, ours = (adapter_generator(each).random(8) for each in ((told,), seed))
        assert not np.isin(theirs, ours).any()


def test_server_does_not_send_its_model_path(leak: Leak) -> None:
    welcomes = [each for each in map(Decoder().decode, leak.sent) if isinstance(each, m.Welcome)]
    assert [welcome.base_model for welcome in welcomes] == ["model"] * len(RUNS)
    assert str(leak.model.parent).encode() not in b"".join(leak.sent)


def test_device_messages_have_only_known_fields() -> None:
    """What a device may say: embeddings, deltas, gradients, scores, settings, its name, and what it was given."""
    allowed = {
        "step", "micro_batch", "group", "protocol_versions", "software", "base_fingerprint", "groups", "adapter",
        "passes", "kept_reads", "codecs", "evaluation_codecs", "purpose", "window", "times", "tensors", "gradient_norm",
        "mode", "hidden_states", "sequence_lengths", "label_positions",
        "crossing_positions", "examples", "token_ids", "decoding", "context_length", "drafts", "lends",
        "kill_revive", "seed", "total_steps", "next_step", "ticket", "learnt", "deltas",
        "grad_hidden_states", "scores", "code", "message", "retryable", "retry_after_s", "device", "session", "token",
        "received",
    }  # fmt: skip
    spoken = (
        m.Hello, m.OpenSession, m.Train, m.Use, m.MakeAdapterState, m.AdapterState, m.GroupParameters,
        m.Embeddings, m.GroupDelta, m.GradHiddenStates, m.GroupInputGrad, m.StepReport, m.ResumeSession, m.CloseSession,
        m.Error,
    )  # fmt: skip
    assert {field for kind in spoken for field in kind.__struct_fields__} == allowed
