"""What two processes with half of the weights each take, beside one with all of them on as many cores.

Wall time of passes through the blocks, forward and back, and of a token of an answer, side by side in one run; what the
weights take in each process, and what crosses between processes for a token. Beside them is transformers' own division
of the same model (``tp_plan``), whose processes each compute with some heads. Weights are random (``shape_models.py``).
Prints one JSON object, which goes into ``docs/log/benchmarks/tensor_parallel.json``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from bars import write_bars
from children import log, new_parser, worker
from shape_models import SHAPES, make_model
from torch import Tensor

from dlora.cloud.model.base_model import BaseModel, load_base_model
from dlora.cloud.model.divided_linear import DividedLinear
from dlora.cloud.model.held_linear import bytes_of_weights
from dlora.cloud.model.workers import Workers

PROCESSES: Final = 2
TOKENS: Final = (1, 256, 1024)
ROUNDS: Final = 6  # the first is of what is set up once
WHOLE, DIVIDED, PLAN = "one process", "divided", "transformers' plan"


def main() -> None:
    """Print one JSON object."""
    parser = new_parser(__doc__)
    parser.add_argument("--models", type=Path, default=Path("build/shapes"), help="where they are made")
    parser.add_argument("--only", default="smollm2-135m,smollm2-1.7b")
    options = parser.parse_args()
    found = {name: measure(name, options.models / name) for name in options.only.split(",")}
    command = f"python benchmarks/tensor_parallel.py --only {options.only}"
    write_bars(options.docs / "benchmarks" / "tensor_parallel.json", {
        name: {**each, "command": command} for name, each in found.items()
    })  # fmt: skip
    print(json.dumps(found, indent=1))


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Of one model, in bfloat16, on as many cores as processes."""
    log(f"{name}: loading")
    make_model(SHAPES[name], folder)
    torch.set_num_threads(PROCESSES)
    workers = Workers(PROCESSES)
    with ExitStack() as stack:
        stack.callback(workers.close)
        whole = load_base_model(str(folder), torch.bfloat16)
        divided = load_base_model(str(folder), torch.bfloat16, workers=workers)
        ways: dict[str, Callable[[int], float]] = {
            WHOLE: lambda tokens: _seconds(whole, tokens, PROCESSES),
            DIVIDED: lambda tokens: _seconds(divided, tokens, 1),
        }
        result: dict[str, Any] = {
            "weights_mb": {WHOLE: bytes_of_weights(whole.model) / 1e6, DIVIDED: bytes_of_weights(divided.model) / 1e6},
            "crossing_bytes_a_token": crossing_bytes(divided),
        }
        ask = stack.enter_context(worker("tensor_parallel_plan.py", folder, PROCESSES))
        plan = ask({"tokens": 1})
        if "error" in plan:
            result[PLAN] = plan["error"]
        else:
            ways[PLAN] = lambda tokens: float(ask({"tokens": tokens})["seconds"])
        for tokens in TOKENS:
            taken: dict[str, list[float]] = {way: [] for way in ways}
            for number in range(ROUNDS):
                for way, run in ways.items():
                    seconds = run(tokens)
                    if number:
                        taken[way].append(seconds)
            log(f"{name}, {tokens} tokens: { ({way: round(median(each), 3) for way, each in taken.items()}) } s")
            result[f"{tokens}_tokens"] = {
                "seconds": {way: median(each) for way, each in taken.items()},
                "ratio": {
                    way: median(ours / one for ours, one in zip(each, taken[WHOLE], strict=True))
                    for way, each in taken.items()
                },
            }
    return result


def crossing_bytes(base: BaseModel) -> dict[str, float]:
    """Bytes between the processes for a token in bfloat16, forward; and back, where a gradient is wanted of all that
    goes into the blocks."""
    shared: dict[int, int] = {}
    outputs = inputs = 0
    for target in base.targets.values():
        assert isinstance(target.module, DividedLinear)
        shared[target.input_id] = target.in_features
        outputs += target.out_features - len(target.module.held_values)
        inputs += target.in_features * (PROCESSES - 1)
    return {"forward": 2 * (sum(shared.values()) * (PROCESSES - 1) + outputs), "backward": 2 * (outputs + inputs)}


def _seconds(base: BaseModel, tokens: int, threads: int) -> float:
    torch.set_num_threads(threads)
    embeds = torch.ones(1, tokens, base.embedding_size, dtype=base.dtype)
    return there_and_back(lambda x: base.last_hidden_state(x), embeds)


def there_and_back(run: Callable[[Tensor], Tensor], embeds: Tensor) -> float:
    """Wall seconds of a pass forward and back to what went in; of a single token forward alone, as in an answer."""
    started = time.perf_counter()
    if len(embeds[0]) == 1:
        with torch.no_grad():
            run(embeds)
    else:
        embeds.requires_grad_()
        hidden = run(embeds)
        torch.autograd.grad(hidden, embeds, torch.ones_like(hidden))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
