"""PEFT's ``generate`` in one process, an answer a JSON line: what benchmarks/generate.py compares the split with.

Reads {"adapter": …, "ids": […], "tokens": n} and answers {"first_s": …, "s": …, "tokens": […]}: greedy, n tokens at
most, up to a stop token. The adapter is loaded anew where it is another than the last; null is the base model.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from peft import PeftModel

from dlora.cloud.model.base_model import load_base_model


def main(model: str, threads: int, stop: str) -> None:
    """Answer requests until stdin ends."""
    torch.set_num_threads(threads)
    stop_ids = [int(each) for each in stop.split(",")]
    loaded: dict[str | None, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        adapter = request["adapter"]
        if adapter not in loaded:
            base = load_base_model(model).model
            loaded = {adapter: base if adapter is None else PeftModel.from_pretrained(base, adapter).eval()}

        def generate(count: int, model: Any = loaded[adapter], request: Any = request) -> tuple[float, list[int]]:
            ids = torch.tensor([request["ids"]])
            started = time.perf_counter()
            with torch.no_grad():
                output = model.generate(
                    input_ids=ids, max_new_tokens=count, do_sample=False, eos_token_id=stop_ids, pad_token_id=0
                )
            return time.perf_counter() - started, output[0, ids.shape[1] :].tolist()

        first_s, _ = generate(1)
        seconds, tokens = generate(request["tokens"])
        print(json.dumps({"first_s": first_s, "s": seconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
