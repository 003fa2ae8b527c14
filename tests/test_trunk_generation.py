"""Generation in ``trunk`` and ``local`` gives the tokens of PEFT, and of ``split``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from answers import INVOCATION
from block_bundles import with_last_blocks
from canaries import Scanner
from drawn import one_in
from families import tiny_model
from generating import answer_of, generated, generated_while_sessions_are_lost, save_lora
from peft import LoraConfig, PeftModel, get_peft_model
from proxy import payloads, recording_proxy
from serving import RunningServer, open_model, serving
from test_generation import SAMPLING, generated_by_peft
from tiny import Tiny, TinyFactory

from dlora.cloud.admission.ledger import QuotaLimits
from dlora.edge.adapters.peft import load_adapter
from dlora.edge.engine.bundle import Bundle
from dlora.edge.model import decode_blocks
from dlora.edge.model.context import Context
from dlora.edge.model.decode_blocks import DecodeBlocks
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.edge.wire.connection import Connection
from dlora.protocol.errors import BundleError, DataError, NonFiniteError, UsageError

PROMPTS = [[9, 10, 11, *INVOCATION], [5, 6, 5, 6, 5, 6, *INVOCATION], [7, 8, 20, 21, 22, *INVOCATION, 12]]
TOKENS = 24
LAST = (1, 2)  # the blocks on the device, of three
WHEREVER = pytest.mark.parametrize("blocks", [None, 0], ids=["trunk", "split"])
"""As many blocks on the device as hold the adapter; and none."""


@pytest.fixture(scope="module")
def model(tiny: TinyFactory) -> Tiny:
    return tiny(blocks=3, device_blocks=3, head_dtype="fp32")


@pytest.fixture(scope="module")
def server(model: Tiny) -> Iterator[RunningServer]:
    with serving(model.base, max_sessions=16) as running:
        yield running


@pytest.fixture(scope="module")
def adapter(model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    save_lora(model.bundle, directory, blocks=LAST)
    return directory


def opening(
    model: Tiny | Path, server: RunningServer, adapter: Path | None, **settings: Any
) -> AbstractContextManager[Any]:
    settings = {"wire_dtype": "fp32", "context_length": 64, "device_blocks": settings.pop("blocks", None), **settings}
    bundle = Bundle.open(model if isinstance(model, Path) else model.bundle)
    return open_model(bundle, settings.pop("url", server.url), adapter, **settings)


# -- the same tokens as PEFT --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", *one_in(2, ["gemma2", "gemma3_text", "phi3", "qwen3"])])
def test_greedy_tokens_are_those_of_peft(family: str, tiny: TinyFactory, tmp_path: Path) -> None:
    """Without drafts, with the length that pays, and with long ones that mostly miss."""
    untied = {"tie_word_embeddings": False}  # else some repeat one token for ever
    check_tokens(tiny(family, head_dtype="fp32", device_blocks=2, **untied), family, (1,), tmp_path, **untied)


def test_greedy_tokens_of_two_blocks_are_those_of_peft(model: Tiny, tmp_path: Path) -> None:
    check_tokens(model, "llama", LAST, tmp_path, num_hidden_layers=3)


@pytest.mark.parametrize("blocks", [(2,), LAST], ids=str)
def test_an_adapter_that_acts_on_answers_gives_pefts_tokens(
    blocks: tuple[int, ...], model: Tiny, tmp_path: Path
) -> None:
    """What comes before its invocation goes through the device's blocks without it."""
    check_tokens(model, "llama", blocks, tmp_path, invocation=INVOCATION, num_hidden_layers=3)


def check_tokens(
    model: Tiny, family: str, blocks: tuple[int, ...], out: Path, invocation: tuple[int, ...] = (), **changes: Any
) -> None:
    save_lora(model.bundle, out, blocks=blocks, invocation=invocation)
    reference = PeftModel.from_pretrained(tiny_model(family, **changes), out).eval()
    bundle, settings = Bundle.open(model.bundle), {"wire_dtype": "fp32", "context_length": 64}
    with (
        serving(model.base) as server,
        open_model(bundle, server.url, out, device_blocks=None, **settings) as trunk,
        open_model(bundle, server.url, out, **settings) as split,
    ):
        assert trunk._source.crossed.encoder.connection.session.groups == ()
        context = Context(trunk)
        for prompt in PROMPTS:
            wanted = generated_by_peft(reference, prompt, TOKENS)
            for draft_length in (0, None, 5):
                assert generated(context, prompt, TOKENS, draft_length=draft_length) == wanted
        with open_model(bundle, server.url, out, device_blocks=None, drafts=True, **settings) as guessed:
            assert generated(guessed, prompt, TOKENS, drafts="server", draft_length=4) == wanted
        assert generated(split, prompt, TOKENS) == wanted
        assert wanted != generated_by_peft(tiny_model(family, **changes), prompt, TOKENS)  # the adapter does something


def test_an_adapter_of_pefts_with_ranks_of_its_own_gives_pefts_tokens(
    model: Tiny, server: RunningServer, tmp_path: Path
) -> None:
    """Of other ranks and scalings in some modules, and none in most."""
    config = LoraConfig(
        r=3, lora_alpha=12, target_modules=["q_proj", "down_proj"], layers_to_transform=[2], task_type="CAUSAL_LM",
        rank_pattern={"q_proj": 5}, alpha_pattern={"down_proj": 20}, init_lora_weights=False,
    )  # fmt: skip
    peft = get_peft_model(tiny_model("llama", num_hidden_layers=3), config).eval()
    peft.save_pretrained(tmp_path)
    with opening(model, server, tmp_path) as trunk:
        assert generated(trunk, PROMPTS[0], TOKENS) == generated_by_peft(peft, PROMPTS[0], TOKENS)


def test_the_base_model_alone_gives_its_own_tokens(model: Tiny, server: RunningServer) -> None:
    base = tiny_model("llama", num_hidden_layers=3)
    with opening(model, server, None) as trunk:
        assert generated(trunk, PROMPTS[0], TOKENS) == generated_by_peft(base, PROMPTS[0], TOKENS)


def test_the_base_model_guesses_what_it_says_itself(model: Tiny, server: RunningServer) -> None:
    """In the blocks that it runs for the device, and in those that the device runs; some of these it runs later."""
    base = tiny_model("llama", num_hidden_layers=3)
    with opening(model, server, None, drafts=True) as trunk:
        context = Context(trunk)
        for prompt in PROMPTS:
            wanted = generated_by_peft(base, prompt, TOKENS)
            for length in (3, 0, 1, 16):
                answer = answer_of(context, prompt, TOKENS, drafts="server", draft_length=length)
                assert [choice.token for choice in answer] == wanted
                assert answer.counters.accepted == answer.counters.drafted >= min(1, length)


@WHEREVER
@pytest.mark.parametrize("send", ["embeddings", "token-ids"])
@pytest.mark.parametrize("wire_dtype", ["fp16", "int8"])
def test_drafts_change_nothing_on_narrower_wires(
    wire_dtype: str, send: str, blocks: int | None, model: Tiny, server: RunningServer, adapter: Path
) -> None:
    with opening(model, server, adapter, wire_dtype=wire_dtype, send=send, blocks=blocks) as opened:
        plain, drafted = (generated(opened, PROMPTS[1], TOKENS, draft_length=length) for length in (0, 4))
    assert plain == drafted


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_all_blocks_on_the_device_give_pefts_tokens_without_a_server(
    family: str, tiny: TinyFactory, tmp_path: Path
) -> None:
    """An adapter that acts on answers, and one that acts everywhere."""
    bundle = Bundle.open(tiny(family, device_blocks=2, head_dtype="fp32").bundle)
    for invocation in ((), INVOCATION):
        out = tmp_path / str(invocation)
        save_lora(bundle.path, out, blocks=(0, 1), invocation=invocation)
        reference = PeftModel.from_pretrained(tiny_model(family), out).eval()
        with open_model(bundle, None, out, device_blocks=2, context_length=48) as local:
            context = Context(local)
            wanted = [generated_by_peft(reference, prompt, TOKENS) for prompt in PROMPTS]
            for draft_length in (0, None, 4):
                found = [generated(context, prompt, TOKENS, draft_length=draft_length) for prompt in PROMPTS]
                assert found == wanted
            with pytest.raises(DataError, match="has 49 tokens, there is room for 48; begin anew"):
                context.logits(np.full(49, 5))


# -- what is kept, and where ------------------------------------------------------------------------------


def test_a_token_takes_one_round_trip_and_a_second_turn_only_what_is_new(
    model: Tiny, server: RunningServer, adapter: Path
) -> None:
    with opening(model, server, adapter) as trunk:
        context = Context(trunk)
        answer = answer_of(context, PROMPTS[0], TOKENS)
        first = [choice.token for choice in answer]
        assert answer.counters.round_trips == len(first) == TOKENS
        assert answer.counters.bytes_sent < TOKENS * 1000
        second = [*PROMPTS[0], *first, 30, 31, 32]
        answer = answer_of(context, second, TOKENS)
        found = [choice.token for choice in answer]
        assert answer.counters.reused_tokens == len(PROMPTS[0]) + TOKENS - 1
        assert found == generated(trunk, second, TOKENS)  # in a context that knows nothing
        with pytest.raises(DataError, match="the prompt has 64 tokens, the server takes 64; say less"):
            generated(trunk, [5] * 64, 1)


@pytest.mark.parametrize("draft_length", [0, 4])
def test_a_lost_server_is_given_the_text_again_and_the_device_keeps_its_part(
    draft_length: int, model: Tiny, server: RunningServer, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    appended: list[int] = []
    append = DecodeBlocks.append

    def count(self: DecodeBlocks, hidden_states: Any, **settings: Any) -> Any:
        appended.append(len(hidden_states))
        return append(self, hidden_states, **settings)

    with opening(model, server, adapter, connecting=ConnectSettings(retry=Retry(max_s=30))) as trunk:
        wanted = generated(trunk, PROMPTS[1], TOKENS, sampling=SAMPLING)
        monkeypatch.setattr(DecodeBlocks, "append", count)
        found, counters = generated_while_sessions_are_lost(trunk, server, PROMPTS[1], TOKENS, SAMPLING, draft_length)
        assert found == wanted
        assert trunk._source.crossed.reconnects == 2
    wrong = counters.drafted - counters.accepted
    assert sum(appended) == len(PROMPTS[1]) + TOKENS - 1 + wrong


@WHEREVER
def test_a_long_prompt_crosses_and_is_run_in_parts(
    blocks: int | None, model: Tiny, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [int(token) for token in np.random.default_rng(0).integers(3, 90, 45)]
    found = []
    for max_tokens, most_new in ((4096, 128), (16, 128), (16, 5)):
        monkeypatch.setattr(decode_blocks, "_MOST_NEW", most_new)
        with (
            serving(model.base, max_tokens=max_tokens) as server,
            opening(model, server, adapter, blocks=blocks) as opened,
        ):
            found.append(generated(opened, prompt, 12, draft_length=4))
    assert found[0] == found[1] == found[2]


def test_the_server_keeps_the_past_of_its_own_blocks_alone(model: Tiny, server: RunningServer, adapter: Path) -> None:
    parts = server.server.service.parts
    assert parts is not None
    with opening(model, server, adapter):
        (live,) = list(server.server.service.sessions)
        one_of_three, all_three = parts.cache_bytes_per_token(end=1), parts.cache_bytes_per_token()
        assert live.cache_bytes == 64 * one_of_three
    assert one_of_three == all_three / 3  # blocks that are left out keep nothing
    cache = parts.new_cache(end=1, room=64)
    with torch.no_grad():
        assert parts.run(torch.zeros(1, 7, model.base.embedding_size), end=1, cache=cache).shape == (1, 7, 16)
    assert cache.nbytes == 7 * one_of_three


# -- what crosses -------------------------------------------------------------------------------------------


def test_what_is_sent_depends_on_the_text_alone(
    model: Tiny, server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the adapter's values, and its rank: not a byte is another."""
    sent: list[list[bytes]] = []
    write = Connection._write
    monkeypatch.setattr(Connection, "_write", lambda self, frame: (sent[-1].append(bytes(frame)), write(self, frame)))
    ids, logits = np.array([*PROMPTS[0], *range(20, 40)]), []
    for rank in (2, 5):
        save_lora(model.bundle, tmp_path / str(rank), blocks=LAST, rank=rank)
        sent.append([])
        with opening(model, server, tmp_path / str(rank)) as trunk:
            context = Context(trunk)
            logits.append([context.logits(ids[:length]) for length in (9, 10, 16, 12, 25)])
    assert sent[0] == sent[1]
    assert len(sent[0]) >= 7
    assert not any(np.allclose(one, other) for one, other in zip(*logits, strict=True))


@WHEREVER
@pytest.mark.parametrize("wire_dtype", ["fp32", "fp16", "int8"])
def test_no_token_logit_or_adapter_value_crosses(
    wire_dtype: str, blocks: int | None, model: Tiny, server: RunningServer, adapter: Path
) -> None:
    scanner = Scanner()
    for module in load_adapter(adapter).modules.values():
        scanner.add_matrix(module.lora_A, f"{module.name} A")
        scanner.add_matrix(module.lora_B, f"{module.name} B")
    with recording_proxy(server.url) as proxy:
        with opening(model, server, adapter, url=proxy.url, wire_dtype=wire_dtype, blocks=blocks) as opened:
            context, prompt = Context(opened), [*PROMPTS[2], *range(40, 52)]
            found = generated(context, prompt, TOKENS, draft_length=3)
            scanner.add_tokens([*prompt, *found], "the context")
            for length in (len(prompt), len(prompt) + 8):
                logits = context.logits(np.array([*prompt, *found])[:length])
                scanner.add_matrix(np.concatenate([logits, np.zeros_like(logits)]), f"logits after {length}")
        sent = b"".join(payloads(proxy.recordings[0].up))
    assert len(sent) > (1_000 if blocks is None else 10_000)
    assert list(scanner.find({"the wire": sent})) == []


# -- what cannot be -----------------------------------------------------------------------------------------


def test_an_adapter_that_reaches_too_far_down_is_one_line(
    model: Tiny, tiny: TinyFactory, server: RunningServer, tmp_path: Path
) -> None:
    save_lora(model.bundle, tmp_path / "all", blocks=(0, 2))
    save_lora(model.bundle, tmp_path / "upper", blocks=LAST)
    with (
        pytest.raises(UsageError, match="block 0, which the server runs; use --device-blocks 0"),
        opening(model, server, tmp_path / "all"),
    ):
        pass
    fewer, none = with_last_blocks(model.bundle, tmp_path / "fewer", 1), tiny(blocks=3, head_dtype="fp32").bundle
    for other, text in ((fewer, "has 1 blocks for a device, and the adapter reaches down to block 1"),
                        (none, "has 0 blocks for a device, and the adapter reaches down to block 1")):  # fmt: skip
        with (
            pytest.raises(BundleError, match=f"{text}; export it again with --device-blocks 2"),
            opening(other, server, tmp_path / "upper"),
        ):
            pass
    with pytest.raises(BundleError, match="has no blocks for a device; export it again"), opening(none, server, None):
        pass


def test_a_server_that_keeps_no_context_is_one_line(model: Tiny) -> None:
    with (
        serving(model.base, quotas=QuotaLimits(live_bytes=100)) as server,
        pytest.raises(UsageError, match=r"keeps no context of this model, .* use --device-blocks 0"),
        opening(model, server, None),
    ):
        pass


def test_an_adapter_that_diverged_is_one_line(model: Tiny, server: RunningServer, tmp_path: Path) -> None:
    save_lora(model.bundle, tmp_path, blocks=(2,), size=1e30)
    with opening(model, server, tmp_path) as trunk, pytest.raises(NonFiniteError, match="a run that diverged"):
        generated(trunk, PROMPTS[0], 4)
