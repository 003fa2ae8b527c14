"""How quickly answers come: PEFT's ``generate`` in one process, and the split, over loopback and slower networks.

Four parts, of which --only chooses: ``speed`` (tokens a second, first token, bytes and round trips a token, with
drafts and without, at several round-trip times), ``equal`` (answers with drafts against those without, and in passes
against live), ``many`` (several devices at once against one after the other: the server's processor time) and
``memory`` (of the device's process in a chat of 2,000 tokens, and in training). What has to be reached is written into
docs/log/benchmarks/generate.json. Adapters are trained on the demo's dialogue, and asked what was held out of it.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from bars import Entry, at_least, at_most, write_bars
from children import cloud_process, cloud_server, cpu_seconds, log, need_bundle, new_parser, run_json, worker
from delaying_proxy import delaying_proxy

from dlora.edge.data.prompt import prompt_tokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.generation.generate import Counters, TokenAnswer, acts_from
from dlora.edge.generation.sampling import Sampling
from dlora.edge.model.context import Context
from dlora.edge.model.device_lora import trained_device_blocks
from dlora.edge.model.opening import Opening, open_to_generate
from dlora.protocol.choices import Drafts

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from dialogue import write_dialogue

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


@dataclass(frozen=True)
class Way:
    """How answers are made.

    Attributes:
        recipe: the options that train its adapter; None: there is none.
        drafts: who makes drafts, side by side.
        opening: fields of ``Opening``.
        is_on_device: whether it needs a bundle with blocks.
        has_peft: whether it is compared with PEFT.
    """

    recipe: tuple[str, ...] | None
    drafts: tuple[Drafts, ...]
    opening: dict[str, Any] = field(default_factory=dict)
    is_on_device: bool = False
    has_peft: bool = False


PASSES: Final = ("--passes", "2,2")
WAYS: Final = {
    "base_model": Way(None, ("off", "auto"), has_peft=True),
    "lora_4_groups": Way(
        ("--kind", "lora", "--target-modules", "q_proj,v_proj", "--blocks", "spread:4"), ("prompt",), has_peft=True
    ),
    "live": Way((), ("prompt", "auto"), has_peft=True),
    "passes": Way(PASSES, ("off", "auto"), {"passes": "auto"}),
    "lent": Way(PASSES, ("auto",), {"lends": True}),
    "trunk": Way(("--device-blocks", "12"), ("off", "auto"), is_on_device=True),
}
Ask = Callable[[dict[str, Any]], dict[str, Any]]
"""Asks a device."""
DRAWN: Final = Sampling(temperature=0.7, top_p=0.95, seed=7)
FIXED: Final = {"draft_length": 3}  # for letters: how many are guessed follows the clock, and rounding that number
TIE: Final = 1e-4  # logits that differ by less may stand in either order: sums of several rows round otherwise


def main() -> None:
    """Print one JSON object, and write the bars."""
    options = _options()
    command = f"{COMMAND} --only"
    result: dict[str, Any] = {"threads": options.threads, "wire_dtype": options.wire_dtype}
    bars: dict[str, Entry] = {}
    with tempfile.TemporaryDirectory() as work, cloud_server(options.model, options.threads) as url:
        place = Place(options, Path(work), url)
        if "speed" in options.only:
            result["speed"] = place.measure_speed()
            bars |= _speed_bars(result["speed"])
        if "memory" in options.only:
            result["memory"] = place.measure_memory()
            bars["memory"] = at_most(1.1, result["memory"]["ratio"], f"{command} memory")
        if "equal" in options.only:
            result["equal"] = place.measure_equal()
            for name in options.ways:
                others = sum(row["others"] for key, row in result["equal"].items() if key.startswith(f"{name},"))
                bars[f"letter_for_letter_{name}"] = at_most(0, others, f"{command} equal")
        if "many" in options.only:
            result["many"] = many = place.measure_many()
            bars["many_server_cpu"] = at_most(0.5, many["cpu_ratio"], f"{command} many")
            bars["many_other_answers"] = at_most(0, many["other_answers"], f"{command} many")
            bars["one_beside_idle_ones"] = at_most(1, many["beside_idle_ratio"], f"{command} many")
    write_bars(options.docs / FILE, bars)
    print(json.dumps(result, indent=1))


class Place:
    """A server, and adapters that were trained with it."""

    def __init__(self, options: argparse.Namespace, work: Path, url: str) -> None:
        self._options = options
        self._work = work
        self._url = url
        with prompt_tokenizer(Bundle.open(need_bundle(options.bundle))) as tokenizer:
            asked = [json.loads(line)["messages"][:1] for line in write_dialogue(work, 200, seed=0)[1].open()]
            self._prompts = [tokenizer.encode_chat(messages) for messages in asked]
            self._stop = tokenizer.stop_token_ids
        self._made: dict[str, list[list[int]]] = {}

    # -- speed -------------------------------------------------------------------------------------------

    def measure_speed(self) -> dict[str, Any]:
        options, found = self._options, dict[str, Any]()
        stop = ",".join(map(str, self._stop))
        with worker("peft_generate.py", options.model, options.threads, stop) as peft:
            for name in options.ways:
                way, adapter = WAYS[name], self._adapter(WAYS[name])
                found[name] = {}
                if way.has_peft:
                    theirs = list[dict[str, Any]]()
                    for ids in self._prompts[: options.prompts]:
                        request = {"adapter": adapter and str(adapter), "ids": ids.tolist(), "tokens": options.tokens}
                        theirs.append(peft(request))
                    found[name] = {
                        "peft_tokens_per_s": round(statistics.median(map(_rate_of_peft, theirs)), 2),
                        "peft_first_token_s": round(statistics.median(each["first_s"] for each in theirs), 3),
                    }
                found[name]["networks"] = self._measure_networks(way)
        return found

    def _measure_networks(self, way: Way) -> list[dict[str, Any]]:
        options, rows = self._options, []
        for round_trip_ms in options.round_trips_ms:
            with delaying_proxy(self._url, round_trip_ms / 1e3) as url:
                for drafts in way.drafts:
                    with self._open(way, url, drafts) as context:
                        started = time.perf_counter()
                        self._answer(context, self._prompts[0], 2, drafts)
                        a_token_s = (time.perf_counter() - started) / 3
                        tokens = int(np.clip(options.seconds / a_token_s, 8, options.tokens))
                        prompts = self._prompts[: options.prompts]
                        answers = [self._answer(context, ids, tokens, drafts)[1] for ids in prompts]
                    rows.append({"round_trip_ms": round_trip_ms, "drafts": drafts, **_summary(answers)})
                    log(f"{json.dumps(rows[-1])}")
        return rows

    @contextmanager
    def _open(self, way: Way, url: str, drafts: Drafts) -> Iterator[Context]:
        adapter, options = self._adapter(way), self._options
        opening = Opening(
            Bundle.open(need_bundle(options.blocks_bundle if way.is_on_device else options.bundle)), url, adapter,
            trained_device_blocks(adapter), options.wire_dtype, threads=options.threads,
            drafts=drafts in ("server", "auto"), **way.opening,
        )  # fmt: skip
        with open_to_generate(opening, context_length=512) as model:
            yield Context(model)

    def _answer(
        self, context: Context, ids: Any, tokens: int, drafts: Drafts, sampling: Sampling = Sampling()
    ) -> tuple[list[int], Counters]:
        answer = TokenAnswer(context, ids, sampling, max_new_tokens=tokens, stop_token_ids=(), drafts=drafts)
        found = [choice.token for choice in answer]
        context.logits(np.array([0]))  # the next answer's prompt is not held
        return found, answer.counters

    # -- equal -------------------------------------------------------------------------------------------

    def measure_equal(self) -> dict[str, Any]:
        """How many answers with drafts are those without, greedy and drawn with a seed, and how many in passes are
        those live."""
        found: dict[str, Any] = {}
        for name in self._options.ways:
            way = WAYS[name]
            for how, sampling in (("greedy", Sampling()), ("drawn", DRAWN)):
                found[f"{name}, {how}"] = row = self._compare(way, way, "auto", sampling)
                log(f"{name}, {how}: {row}")
            if "passes" in way.opening:
                row = self._compare(way, Way(way.recipe, ()), "off", Sampling())
                found[f"{name}, greedy, against live"] = {"answers": row["answers"], "others": 0, "not_live": row}
        return found

    def _compare(self, way: Way, other: Way, drafts: Drafts, sampling: Sampling) -> dict[str, Any]:
        """Answers one way with ``drafts`` against those another way without."""
        row = {"answers": 0, "tokens": 0, "equal_answers": 0, "ties": 0, "others": 0, "other_tokens": 0}
        answers = self._answers(way, drafts, sampling)
        every_wanted = self._answers(other, "off", sampling)
        with self._open(other, self._url, "off") as plain:
            for ids, answer, wanted in zip(self._prompts, answers, every_wanted, strict=False):
                row["answers"] += 1
                row["tokens"] += len(wanted)
                row["equal_answers"] += wanted == answer
                differ = np.flatnonzero(np.array(wanted) != np.array(answer))
                if len(differ):
                    first = int(differ[0])
                    text = np.concatenate([ids, wanted[:first]]).astype(np.int64)
                    logits = plain.logits(text, acts_from(ids, plain.model.invocation))[0]
                    gap = abs(float(logits[wanted[first]] - logits[answer[first]]))
                    row["ties" if gap <= TIE else "others"] += 1
                    row["other_tokens"] += len(differ)
        return row

    def _answers(self, way: Way, drafts: Drafts, sampling: Sampling) -> list[list[int]]:
        """To every prompt. Those of one way, drafts and sampling are made once."""
        options, key = self._options, f"{way.recipe, way.opening, drafts, sampling}"
        if key not in self._made:
            with self._open(way, self._url, drafts) as context:
                prompts = self._prompts[: options.answers]
                self._made[key] = [
                    self._answer(context, ids, options.answer_tokens, drafts, sampling)[0] for ids in prompts
                ]
        return self._made[key]

    # -- many ------------------------------------------------------------------------------------------

    def measure_many(self) -> dict[str, Any]:
        """Of devices whose adapters run in passes, on a server in bfloat16: each answers a prompt of its own."""
        options, adapter = self._options, self._adapter(WAYS["passes"])
        count, found = options.devices, dict[str, list[Any]]()
        opened = {"bundle": str(options.bundle), "adapter": str(adapter), "threads": 1}
        requests = [{"ids": ids.tolist(), "tokens": options.tokens} for ids in self._prompts[:count]]
        with cloud_process(options.model, options.threads, "--dtype", "bfloat16") as (url, process), ExitStack() as one:

            def device(stack: ExitStack) -> Ask:
                ask = stack.enter_context(worker("answering_device.py", json.dumps({**opened, "url": url})))
                ask({**requests[0], "tokens": 2})
                return ask

            def note(name: str, answer: Callable[[], list[dict[str, Any]]]) -> list[list[int]]:
                began = cpu_seconds(process)
                answers = answer()
                tokens = sum(len(each["tokens"]) for each in answers)
                a_token = statistics.median((each["s"] - each["first_s"]) / (options.tokens - 1) for each in answers)
                row = {"cpu_ms": 1e3 * (cpu_seconds(process) - began) / tokens, "ms": 1e3 * a_token}
                found.setdefault(name, []).append(row)
                log(f"{name}: {row}")
                return [each["tokens"] for each in answers]

            first, equal = device(one), 0
            for _ in range(options.rounds):
                note("alone", lambda: [first(each) for each in requests[:3]])
                with ExitStack() as others, ThreadPoolExecutor(count) as pool:
                    asks = [first, *(device(others) for _ in range(count - 1))]
                    note("beside idle ones", lambda: [first(each) for each in requests[:3]])

                    def in_turn(extra: dict[str, Any], asks: list[Ask] = asks) -> list[dict[str, Any]]:
                        return [ask(each | extra) for ask, each in zip(asks, requests, strict=True)]

                    def at_once(
                        extra: dict[str, Any], asks: list[Ask] = asks, pool: ThreadPoolExecutor = pool
                    ) -> list[dict[str, Any]]:
                        return list(pool.map(lambda ask, each: ask(each | extra), asks, requests))

                    note("in turn", lambda: in_turn({}))
                    note("at once", lambda: at_once({}))
                    wanted = note("in turn, drafts of 3", lambda: in_turn(FIXED))
                    equal += sum(map(list.__eq__, wanted, note("at once, drafts of 3", lambda: at_once(FIXED))))
        of = {
            name: {key: round(statistics.median(row[key] for row in rows), 1) for key in rows[0]}
            for name, rows in found.items()
        }
        return {
            "devices": count,
            "of_a_token": of,
            "cpu_ratio": round(of["at once"]["cpu_ms"] / of["in turn"]["cpu_ms"], 2),
            "beside_idle_ratio": round(of["beside idle ones"]["ms"] / of["alone"]["ms"], 2),
            "answers": count * options.rounds,
            "other_answers": count * options.rounds - equal,
        }

    # -- memory ------------------------------------------------------------------------------------------

    def measure_memory(self) -> dict[str, Any]:
        """Of the default recipe: the peak in training, and in a chat of 2,000 tokens and more."""
        out = self._work / "memory"
        training = self._training(self._options.bundle, out, ())
        trained = run_json("-m", "dlora.edge", "train", *training, "--steps", 12, "--lr", "2e-3")
        command = [
            sys.executable, "-m", "dlora.edge", "chat", "--bundle", str(self._options.bundle), "--server", self._url,
            "--adapter", str(out), "--threads", str(self._options.threads), "--max-new-tokens", "200",
            "--verbose",
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

    def _adapter(self, way: Way) -> Path | None:
        """Trained once a recipe, and kept where ``--work`` says."""
        if way.recipe is None:
            return None
        options = self._options
        bundle = options.blocks_bundle if way.is_on_device else options.bundle
        out = (options.work or self._work) / re.sub(r"\W+", "-", f"adapter {' '.join(way.recipe)}")
        if not (out / "dlora_adapter.json").exists():
            training = self._training(bundle, out, way.recipe)
            run_json("-m", "dlora.edge", "train", *training, "--steps", options.steps)
        return out

    def _training(self, bundle: Path, out: Path, recipe: Sequence[str]) -> list[object]:
        data = self._work / "train.jsonl"
        return [
            "--bundle", need_bundle(bundle), "--server", self._url, "--data", data, "--out", out, "--seed", "0",
            "--json", *recipe,
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
    """Of loopback against PEFT: 0.8 of its tokens a second is 1.25 times its time. Of networks: seconds a token, and
    round trips; on loopback, in passes against live as it was."""
    command, bars = f"{COMMAND} --only speed", dict[str, Entry]()

    def row(name: str, round_trip_ms: int, drafts: Drafts) -> dict[str, Any] | None:
        rows = speed.get(name, {}).get("networks", [])
        return next((each for each in rows if (each["round_trip_ms"], each["drafts"]) == (round_trip_ms, drafts)), None)

    if found := row("lora_4_groups", 0, "prompt"):
        peft = speed["lora_4_groups"]
        token = peft["peft_tokens_per_s"] / found["tokens_per_s"]
        bars["time_per_token"] = at_most(1.25, token, command)
        bars["first_token"] = at_most(1.3, found["first_token_s"] / peft["peft_first_token_s"], command)
    for name, round_trip_ms, rate in (
        ("passes", 20, 6), ("passes", 80, 3.5), ("lent", 20, 10), ("lent", 80, 8), ("trunk", 80, 6),
    ):  # fmt: skip
        if found := row(name, round_trip_ms, "auto"):
            bars[f"{name}_tokens_per_s_at_{round_trip_ms}_ms"] = at_least(rate, found["tokens_per_s"], command)
    if found := row("passes", 80, "auto"):
        bars["passes_round_trips_per_token"] = at_most(1.2, found["round_trips_per_token"], command)
    if (found := row("passes", 0, "auto")) and (before := row("live", 0, "prompt")):
        bars["loopback_against_live"] = at_most(1, before["tokens_per_s"] / found["tokens_per_s"], command)
    if found := row("trunk", 0, "off"):
        bars["trunk_round_trips_per_token"] = at_most(1, found["round_trips_per_token"], command)
    return bars


def _options() -> argparse.Namespace:
    parts = ["speed", "equal", "many", "memory"]
    parser = new_parser(__doc__)
    parser.add_argument("--blocks-bundle", type=Path, default=Path("build/smollm2-blocks"), help="for trunk")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="for speed and equal")
    parser.add_argument("--only", nargs="+", choices=parts, default=["speed", "memory"])
    parser.add_argument("--steps", type=int, default=120, help="that adapters are trained for")
    parser.add_argument("--work", type=Path, help="where adapters are kept for the next time")
    parser.add_argument("--answers", type=int, default=200, help="that are compared, for equal")
    parser.add_argument("--answer-tokens", type=int, default=16, help="of each of these")
    parser.add_argument("--devices", type=int, default=8, help="that are answered at once, for many")
    parser.add_argument("--rounds", type=int, default=3, help="of these, for many")
    parser.add_argument("--wire-dtype", default="fp16")
    parser.add_argument("--prompts", type=int, default=5, help="that are answered, for speed")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--round-trips-ms", type=int, nargs="*", default=[0, 20, 80], help="of the networks tried")
    parser.add_argument("--seconds", type=float, default=10.0, help="that an answer over a slow network may take")
    return parser.parse_args()


if __name__ == "__main__":
    main()
