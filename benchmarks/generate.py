"""How quickly answers come: PEFT's ``generate`` in one process, and the split, over loopback and slower networks.

Two parts, of which --only chooses: ``speed`` (tokens a second, first token, bytes and round trips a token, with drafts
and without, at several round-trip times) and ``memory`` (of the device's process in a chat of 2,000 tokens, and in
training). What has to be reached is written into docs/log/benchmarks/generate.json. Adapters are trained for a few
steps: what they cost does not depend on what they say.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from bars import Entry, at_most, write_bars
from children import cloud_server, log, need_bundle, new_parser, run_json, worker
from delaying_proxy import delaying_proxy

from dlora.edge.data.prompt import prompt_tokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.generation.generate import Counters, TokenAnswer
from dlora.edge.generation.sampling import Sampling
from dlora.edge.model.context import Context
from dlora.edge.model.device_lora import trained_device_blocks
from dlora.edge.model.opening import Opening, open_to_generate

FILE: Final = Path("benchmarks") / "generate.json"  # in docs
COMMAND: Final = "python benchmarks/generate.py"
QUESTIONS: Final = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List five fruits, one a line.",
    "Repeat this three times: the quick brown fox jumps over the lazy dog.",
    "Write a Python function that adds two numbers, and then one that subtracts them.",
    "Who wrote Hamlet, and when?",
    "Translate into French: good morning, my friend.",
    "What should I cook tonight with rice, eggs and spinach?",
    "Tell me a joke about computers.",
)
TRUNK: Final = "trunk_4_blocks"
# Adapters by what they exchange: the options that train them.
RECIPES: Final[dict[str, list[str]]] = {
    "lora_1_group": ["--kind", "lora", "--target-modules", "q_proj,v_proj", "--blocks", "29"],
    "lora_4_groups": ["--kind", "lora", "--target-modules", "q_proj,v_proj", "--blocks", "spread:4"],
    "default": [],
    "lora_all": ["--kind", "lora", "--target-modules", "q_proj,v_proj"],
    TRUNK: ["--device-blocks", "4"],  # on the device, which answers in that mode, too
}


def main() -> None:
    """Print one JSON object, and write the bars."""
    options = _options()
    result: dict[str, Any] = {"threads": options.threads, "wire_dtype": options.wire_dtype}
    bars: dict[str, Entry] = {}
    with tempfile.TemporaryDirectory() as work, cloud_server(options.model, options.threads) as url:
        place = Place(options, Path(work), url)
        if "speed" in options.only:
            result["speed"] = place.measure_speed()
            bars |= _speed_bars(result["speed"])
        if "memory" in options.only:
            result["memory"] = place.measure_memory()
            bars["memory"] = at_most(1.1, result["memory"]["ratio"], f"{COMMAND} --only memory")
    write_bars(options.docs / FILE, bars)
    print(json.dumps(result, indent=1))


class Place:
    """A server, and adapters that were trained with it."""

    def __init__(self, options: argparse.Namespace, work: Path, url: str) -> None:
        self._options = options
        self._work = work
        self._url = url
        with prompt_tokenizer(Bundle.open(need_bundle(options.bundle))) as tokenizer:
            self._prompts = [tokenizer.encode_chat([{"role": "user", "content": asked}]) for asked in QUESTIONS]
            self._stop = tokenizer.stop_token_ids

    # -- speed -------------------------------------------------------------------------------------------

    def measure_speed(self) -> dict[str, Any]:
        options, found = self._options, dict[str, Any]()
        stop = ",".join(map(str, self._stop))
        with worker("peft_generate.py", options.model, options.threads, stop) as peft:
            for name in options.adapters:
                path = need_bundle(options.blocks_bundle if name == TRUNK else options.bundle)
                adapter = self._train(path, name, RECIPES[name]) if name in RECIPES else None
                bundle, theirs, ours = Bundle.open(path), list[dict[str, Any]](), list[Counters]()
                with self._open(bundle, adapter, self._url) as context:
                    self._answer(context, self._prompts[0], 4, 0)  # loads what is loaded when first used
                    for ids in self._prompts[: options.prompts]:  # taking turns
                        request = {"adapter": adapter and str(adapter), "ids": ids.tolist(), "tokens": options.tokens}
                        theirs.append(peft(request))
                        ours.append(self._answer(context, ids, len(theirs[-1]["tokens"]), 0))
                        log(f"{name}: PEFT {_rate_of_peft(theirs[-1]):.1f} tokens/s, ours {_rate(ours[-1]):.1f}")
                found[name] = {
                    "peft_tokens_per_s": round(statistics.median(map(_rate_of_peft, theirs)), 2),
                    "peft_first_token_s": round(statistics.median(each["first_s"] for each in theirs), 3),
                    "loopback": _summary(ours),
                    "networks": self._measure_networks(bundle, name, adapter),
                }
        return found

    def _measure_networks(self, bundle: Bundle, name: str, adapter: Path | None) -> list[dict[str, Any]]:
        options, rows = self._options, []
        for round_trip_ms in options.round_trips_ms:
            with (
                delaying_proxy(self._url, round_trip_ms / 1e3) as url,
                self._open(bundle, adapter, url) as context,
            ):
                started = time.perf_counter()
                self._answer(context, self._prompts[0], 2, 0)
                a_token_s = (time.perf_counter() - started) / 3
                tokens = int(np.clip(options.seconds / a_token_s, 8, options.tokens))
                for draft_length in (0, None):
                    answers = [self._answer(context, ids, tokens, draft_length) for ids in self._prompts[::3]]
                    row = {"round_trip_ms": round_trip_ms, "drafts": draft_length is None}
                    rows.append({**row, **_summary(answers)})
                    log(f"{name}: {json.dumps(rows[-1])}")
        return rows

    @contextmanager
    def _open(self, bundle: Bundle, adapter: Path | None, url: str) -> Iterator[Context]:
        wire, threads = self._options.wire_dtype, self._options.threads
        opening = Opening(bundle, url, adapter, trained_device_blocks(adapter), wire, threads=threads)
        with open_to_generate(opening, context_length=512) as model:
            yield Context(model)

    def _answer(self, context: Context, ids: Any, tokens: int, draft_length: int | None) -> Counters:
        answer = TokenAnswer(
            context, ids, Sampling(), max_new_tokens=tokens, stop_token_ids=(), draft_length=draft_length
        )
        for _ in answer:
            pass
        context.logits(np.array([0]))  # the next answer's prompt is not held
        return answer.counters

    # -- memory ------------------------------------------------------------------------------------------

    def measure_memory(self) -> dict[str, Any]:
        """Of the default recipe: the peak in training, and in a chat of 2,000 tokens and more."""
        out = self._work / "memory"
        trained = run_json("-m", "dlora.edge", "train", *self._training(self._options.bundle, out, []))
        command = [
            sys.executable, "-m", "dlora.edge", "chat", "--bundle", str(self._options.bundle), "--server", self._url,
            "--adapter", str(out), "--threads", str(self._options.threads), "--max-new-tokens", "200",
        ]  # fmt: skip
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, text=True)
        assert process.stdin is not None
        assert process.stderr is not None
        tokens = turn = 0
        while tokens < 2000:
            process.stdin.write(QUESTIONS[turn % len(QUESTIONS)] + "\n")
            process.stdin.flush()
            while not (answered := re.match(r"(\d+) tokens", line := process.stderr.readline())):
                if not line:
                    raise SystemExit("error: the chat ended before its time")
            tokens, turn = tokens + int(answered[1]) + len(self._prompts[turn % len(QUESTIONS)]), turn + 1
            log(f"{tokens} tokens of chat")
        status = Path(f"/proc/{process.pid}/status").read_text()
        chat_mb = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1e3
        process.communicate(timeout=30)
        found = {"training_peak_mb": trained["peak_rss_mb"], "chat_peak_mb": round(chat_mb, 1), "tokens": tokens}
        return {**found, "ratio": chat_mb / trained["peak_rss_mb"]}

    # -- adapters ----------------------------------------------------------------------------------------

    def _train(self, bundle: Path, name: str, recipe: Sequence[str]) -> Path:
        out = self._work / re.sub(r"\W+", "-", f"{bundle.name}-{name}")
        run_json("-m", "dlora.edge", "train", *self._training(bundle, out, recipe), "--wire-dtype", "fp32")
        return out

    def _training(self, bundle: Path, out: Path, recipe: Sequence[str]) -> list[object]:
        data, lines = self._work / "data.jsonl", []
        for number, asked in enumerate(QUESTIONS):
            answer = f"Well, number {number}: {asked.lower()} I would say so, my friend, any day."
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"messages": turns}) + "\n")
        data.write_text("".join(lines * 4))
        return [
            "--bundle", bundle, "--server", self._url, "--data", data, "--out", out, "--steps", "12", "--lr", "2e-3",
            "--seed", "0", "--json", *recipe,
        ]  # fmt: skip


def _rate(counters: Counters) -> float:
    """Tokens a second after the first."""
    return (counters.tokens - 1) / (counters.seconds - counters.first_token_s)


def _rate_of_peft(answer: dict[str, Any]) -> float:
    return float((len(answer["tokens"]) - 1) / (answer["s"] - answer["first_s"]))


def _summary(answers: Sequence[Counters]) -> dict[str, Any]:
    tokens = sum(each.tokens for each in answers)
    drafted = sum(each.drafted for each in answers)
    return {
        "tokens_per_s": round(statistics.median(map(_rate, answers)), 2),
        "first_token_s": round(statistics.median(each.first_token_s for each in answers), 3),
        "bytes_per_token": round(sum(each.bytes_sent + each.bytes_received for each in answers) / tokens),
        "round_trips_per_token": round(sum(each.round_trips for each in answers) / tokens, 2),
        "drafts_right": round(sum(each.accepted for each in answers) / drafted, 2) if drafted else None,
    }


def _speed_bars(speed: dict[str, Any]) -> dict[str, Entry]:
    """How much longer the split takes: 0.8 of PEFT's tokens a second is 1.25 times its time.

    That is wanted of four live groups; the default recipe's adapter stands beside it, by the same bars. And how often a
    token of trunk waits for the server.
    """
    command, bars = f"{COMMAND} --only speed", dict[str, Entry]()
    for name, before in (("lora_4_groups", ""), ("default", "default_recipe_")):
        if (row := speed.get(name)) is not None:
            token = row["peft_tokens_per_s"] / row["loopback"]["tokens_per_s"]
            bars[f"{before}time_per_token"] = at_most(1.25, token, command)
            first = row["loopback"]["first_token_s"] / row["peft_first_token_s"]
            bars[f"{before}first_token"] = at_most(1.3, first, command)
    if (row := speed.get(TRUNK)) is not None:
        bars["trunk_round_trips_per_token"] = at_most(1, row["loopback"]["round_trips_per_token"], command)
    return bars


def _options() -> argparse.Namespace:
    names, parts = ["base_model", *RECIPES], ["speed", "memory"]
    parser = new_parser(__doc__)
    parser.add_argument("--blocks-bundle", type=Path, default=Path("build/smollm2-blocks"), help="for trunk")
    parser.add_argument("--adapters", nargs="+", choices=names, default=names, help="for --only speed")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--wire-dtype", default="fp16")
    parser.add_argument("--prompts", type=int, default=5, help="questions that are compared with PEFT's speed")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--round-trips-ms", type=int, nargs="*", default=[0, 20, 80], help="of the networks tried")
    parser.add_argument("--seconds", type=float, default=10.0, help="that an answer over a slow network may take")
    return parser.parse_args()


if __name__ == "__main__":
    main()
