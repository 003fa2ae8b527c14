"""What one micro-batch of very different lengths costs a server whose base model cannot pack: time, memory, and after.

A model of OPT's family is made and served with the server's own defaults. Each case opens a session without adapters
and evaluates one micro-batch. The first two are what an honest device may send. The last is one long sequence and as
many of one token as `--max-tokens` admits, which once ran as hundreds of times as many tokens.

    python benchmarks/padding.py

Prints JSON on stdout; what it does on stderr.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from children import cloud_server, log
from transformers import OPTConfig, OPTForCausalLM
from websockets.sync.client import connect

from dlora.cloud.model.base_model import BaseModel
from dlora.protocol import messages as m
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.counting import counted_tokens
from dlora.protocol.frames import Decoder, encode
from dlora.protocol.tensors import WireTensor
from dlora.protocol.version import PROTOCOL_VERSIONS
from dlora.protocol.wire_codecs import Codecs, encode_floats

REST_S = 12.0  # the server gives memory back once nothing has computed for five seconds


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as directory:
        base = _make_model(Path(directory), options)
        with cloud_server(directory, options.threads) as (url, pid):
            health = json.load(urlopen(url.replace("ws", "http", 1) + "/healthz"))
            most, longest = health["max_tokens"], options.longest
            cases = {
                "equal lengths": [longest] * (most // longest),
                "padded to the limit": [longest] + [1] * (most // longest - 1),
                "one long, many of one token": [longest] + [1] * (most - longest),
            }
            _evaluate(url, pid, base, [longest])  # libraries make their buffers with the first
            time.sleep(REST_S)
            results, before = [], _memory_mb(pid, "VmRSS")
            for name, lengths in cases.items():
                found = [_evaluate(url, pid, base, lengths) for _ in range(options.rounds)]
                results.append(
                    {
                        "case": name,
                        "sequences": len(lengths),
                        "tokens": sum(lengths),
                        "counted_tokens": counted_tokens(np.array(lengths, np.int32), packs=False),
                        "answer": found[0]["answer"],
                        "s": round(statistics.median(one["s"] for one in found), 3),
                        "peak_mb": round(max(one["peak_mb"] for one in found)),
                    }
                )
                log(json.dumps(results[-1]))
            time.sleep(REST_S)
            after = _memory_mb(pid, "VmRSS")
    whole, padded, bomb = results
    print(
        json.dumps(
            {
                "max_tokens": most,
                "live_mb_limit": health["live_mb_limit"],
                "cases": results,
                "rss_mb": {"before": round(before), "after": round(after)},
                "holds": {
                    "the bomb is refused": bomb["answer"] == "limit",
                    "padding holds the gate no longer than tokens do": padded["s"] <= 1.25 * whole["s"],
                    "memory stays within the limit": max(r["peak_mb"] for r in results) - before
                    <= health["live_mb_limit"],
                    "memory goes back": after - before <= 0.1 * (whole["peak_mb"] - before) + 20,
                },
            },
            indent=1,
        )
    )


def _make_model(directory: Path, options: argparse.Namespace) -> BaseModel:
    config = OPTConfig(
        vocab_size=1000, hidden_size=options.width, word_embed_proj_dim=options.width, ffn_dim=4 * options.width,
        num_hidden_layers=options.blocks, num_attention_heads=options.width // 64, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    OPTForCausalLM(config).save_pretrained(directory)
    return BaseModel.from_model(OPTForCausalLM.from_pretrained(directory), "opt")


def _evaluate(url: str, pid: int, base: BaseModel, lengths: list[int]) -> dict[str, Any]:
    """One micro-batch in a session of its own; seconds to its answer, and the most memory that the server had."""
    opening = m.OpenSession(
        base_fingerprint=base.fingerprint,
        groups=(),
        adapter=AdapterSpec(),
        codecs=Codecs.all("fp32"),
        evaluation_codecs=Codecs.all("fp32"),
        purpose=m.Use(),
    )
    rng = np.random.default_rng(0)
    hidden_states = rng.normal(0, 0.02, (sum(lengths), base.embedding_size)).astype(np.float32)
    begun = m.Embeddings(
        step=0,
        micro_batch=0,
        mode="evaluate",
        hidden_states=encode_floats(hidden_states, "fp32"),
        sequence_lengths=WireTensor.from_ints(lengths),
        label_positions=WireTensor.from_ints([0]),
    )
    with connect(url, compression=None, proxy=None, max_size=None) as websocket:
        websocket.send(encode(m.Hello(protocol_versions=list(PROTOCOL_VERSIONS), software="a benchmark")))
        websocket.recv()
        websocket.send(encode(opening))
        websocket.recv()
        frame = encode(begun, seq=1)
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # begins VmHWM anew
        started = time.perf_counter()
        websocket.send(frame)
        answer = Decoder().decode(bytes(websocket.recv(decode=False)))
        seconds = time.perf_counter() - started
        if not isinstance(answer, m.Error):
            websocket.send(encode(m.CloseSession()))
    peak = _memory_mb(pid, "VmHWM")
    return {"answer": answer.code if isinstance(answer, m.Error) else "ok", "s": seconds, "peak_mb": peak}


def _memory_mb(pid: int, name: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024 / 1e6


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--longest", type=int, default=256, help="tokens of the longest sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
