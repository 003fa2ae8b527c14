"""A few rows of a model in one thread against all of them: models of several widths and two families, random weights.

The server runs a few rows of a small model in one thread, because between Python's small operations another has to be
woken up for each product. For each width: milliseconds a block takes, with one thread and with two, in turns, medians.
JSON goes to stdout; docs/log/benchmarks/few-rows.json has for each width whether the rule takes the quicker way, or one
that is at most a tenth slower.
"""

from __future__ import annotations

import json
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any, Final

from bars import at_most, write_bars
from children import log, new_parser

# isort: split
# After children, which has quiet threads.
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.layout import random_embeds
from dlora.cloud.model.part_forward import PartForward, few_rows_in_one_thread
from dlora.cloud.model.parts import ModelParts

FILE: Final = Path("benchmarks") / "few-rows.json"  # in docs
BLOCKS, PAST = 3, 100
WIDTHS: Final = (256, 576, 768, 1024, 2048)
ROWS: Final = (1, 2, 4, 8)


def _llama(width: int) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=BLOCKS,
            num_attention_heads=width // 64,
        )
    )  # fmt: skip


def _gpt2(width: int) -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=width, n_layer=BLOCKS, n_head=width // 64))


def main() -> None:
    """Print one JSON object, and write the bars."""
    parser = new_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    found, bars = dict[str, Any](), {}
    for (name, make), width in product({"llama": _llama, "gpt2": _gpt2}.items(), WIDTHS):
        parts = ModelParts.of(BaseModel.from_model(make(width).eval(), name))
        assert parts is not None
        rows = {count: _milliseconds(parts, count, options.threads, options.rounds) for count in ROWS}
        of_best = [each["rule"] / min(each["one"], each["all"]) for each in rows.values()]
        found[f"{name}, {width}"] = {"largest_product": parts.largest_product, "rows": rows}
        log(json.dumps({f"{name}, {width}": found[f"{name}, {width}"]}))
        bars[f"{name}_{width}"] = at_most(1.1, max(of_best), "python benchmarks/few_rows.py")
    write_bars(options.docs / FILE, bars)
    print(json.dumps({"threads": options.threads, "of_a_block": found}, indent=1))


def _milliseconds(parts: ModelParts, count: int, threads: int, rounds: int) -> dict[str, float]:
    times: dict[int, list[float]] = {1: [], threads: []}
    cache = parts.new_cache(room=PAST + count)
    embeds = random_embeds(parts.base, PAST + count)
    with torch.no_grad():
        PartForward(parts, embeds[:, :PAST], 0, None, cache).run()
        for _ in range(rounds):
            for number, took in times.items():
                torch.set_num_threads(number)
                began = time.perf_counter()
                parts.run(embeds[:, PAST:], cache=cache)
                took.append(1e3 * (time.perf_counter() - began) / BLOCKS)
                cache.crop(PAST)
    torch.set_num_threads(threads)
    with few_rows_in_one_thread(parts, count):
        chosen = torch.get_num_threads()
    one, every = (round(statistics.median(took), 3) for took in times.values())
    return {"one": one, "all": every, "rule": one if chosen == 1 else every}


if __name__ == "__main__":
    main()
