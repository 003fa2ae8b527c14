"""What a server that holds its weights in eight or four bits takes, and what that costs, beside bfloat16.

Memory; the processor's time of the blocks alone, side by side in one process, and of a server's step; and losses after
training, of each set with the default recipe, with a bundle and a server of each kind. Losses are kept in
``docs/log/benchmarks/low-bits-losses.json``, where a run that is there is not made again, and numbers that have a bar
in ``low_bits.json`` beside it. Prints one JSON object.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Any, Final

import torch
from bars import Entry, at_most, write_bars
from children import cloud_process, cloud_server, cpu_seconds, log, new_parser, pss_mb, run_json, write_texts
from torch import Tensor
from trained_losses import SETS, TrainedLosses
from transformers import PreTrainedModel

from dlora.cloud.model.held_linear import bytes_of_weights
from dlora.cloud.model.loading import load_model
from dlora.cloud.model.low_bits import hold_in_low_bits
from dlora.cloud.model.source import find_source
from dlora.protocol.choices import LowBits, WeightFormat

WEIGHTS: Final[tuple[WeightFormat, ...]] = ("full", "int8", "nf4")
BARS: Final[dict[LowBits, dict[str, float]]] = {
    "int8": {"weights": 0.65, "step": 1.15, "passes_256_tokens": 1.15, "loss": 1.01},
    "nf4": {"weights": 0.45, "loss": 1.05},
}
TOKENS: Final = (256, 1024)
ROUNDS: Final = 11
SESSIONS, SESSION_STEPS = 5, 8


def main() -> None:
    """Print one JSON object."""
    parser = new_parser(__doc__)
    parser.add_argument("--data", type=Path, help="folder with banking77/ in it; without it losses are not measured")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--name", default="", help="what is put before the names of files and bars, of another model")
    parser.add_argument("--only-losses", action="store_true", help="leave out what a busy machine would falsify")
    options = parser.parse_args()
    command = f"python benchmarks/low_bits.py --model {options.model}"
    found: dict[str, Any] = {}
    bars: dict[str, Entry] = {}
    with tempfile.TemporaryDirectory() as folder:
        bundles = {weights: Path(folder) / weights for weights in WEIGHTS}
        for weights, bundle in bundles.items():
            log(f"exporting {weights} weights")
            run_json("-m", "dlora.export", options.model, "--out", bundle, "--weights", weights, "--json")
        if not options.only_losses:
            found = {**measure_passes(options.model, options.threads), **measure_steps(options, bundles)}
            for bits, wanted in BARS.items():
                for name in wanted.keys() - {"loss"}:
                    bars[f"{bits}_{name}"] = at_most(wanted[name], found[name][bits], command)
        if options.data is not None:
            losses = measure_losses(options, bundles)
            found["losses"] = losses.found
            for bits, wanted in BARS.items():
                for name, both in losses.pairs(bits, "full").items():
                    ratio = mean(ours for ours, _ in both) / mean(full for _, full in both)
                    how = f"{command} --steps {options.steps} --data DATA"
                    bars[f"{bits}_loss_{name}"] = at_most(wanted["loss"], ratio, how)
    named = {f"{options.name}{name}": bar for name, bar in bars.items()}
    write_bars(options.docs / "benchmarks" / "low_bits.json", named)
    print(json.dumps({**found, "bars": named}, indent=1))


def measure_passes(model: str, threads: int) -> dict[str, Any]:
    """Of the blocks alone, in this process: bytes of the weights, and the processor's seconds for a forward and a
    backward pass and for a token of an answer. Medians of ratios to full weights in the same round."""
    torch.set_num_threads(threads)
    models = {weights: _model(model, weights) for weights in WEIGHTS}
    held = {name: bytes_of_weights(each) / 1e6 for name, each in models.items()}
    found: dict[str, Any] = {"weights_mb": held, "weights": {name: mb / held["full"] for name, mb in held.items()}}
    vocabulary = models["full"].config.get_text_config().vocab_size
    for tokens in TOKENS:
        ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
        found[f"passes_{tokens}_tokens"] = _compared(models, lambda each, ids=ids: _there_and_back(each, ids))
    found["token_of_an_answer"] = _compared(models, _answer)
    return found


def measure_steps(options: Any, bundles: dict[WeightFormat, Path]) -> dict[str, Any]:
    """A server of each kind, all in bfloat16: its memory at rest, and the processor's seconds of steps of a device that
    trains with the default recipe, in turns."""
    with ExitStack() as servers, tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "text.jsonl"
        write_texts(data)
        running = {
            weights: servers.enter_context(cloud_process(options.model, options.threads, *serve(weights)))
            for weights in WEIGHTS
        }
        memory = {weights: pss_mb(process) for weights, (_, process) in running.items()}
        seconds: dict[WeightFormat, list[float]] = {weights: [] for weights in WEIGHTS}
        for number in range(SESSIONS):
            for weights, (url, process) in running.items():
                before, out = cpu_seconds(process), Path(folder) / f"{weights}-{number}"
                run_json(
                    "-m", "dlora.edge", "train", "--data", data, "--hold-out", 0, "--out", out,
                    "--steps", SESSION_STEPS,
                    "--bundle", bundles[weights], "--server", url, "--threads", options.threads, "--json",
                )  # fmt: skip
                seconds[weights].append((cpu_seconds(process) - before) / SESSION_STEPS)
            log(f"seconds of the server a step: { ({name: round(each[-1], 3) for name, each in seconds.items()}) }")
    return {
        "server_mb": memory,
        "step_s": {name: median(each) for name, each in seconds.items()},
        "step": _ratios(seconds),
    }


def measure_losses(options: Any, bundles: dict[WeightFormat, Path]) -> TrainedLosses:
    """Train with each."""
    kept = options.docs / "benchmarks" / f"{options.name}low-bits-losses.json"
    with tempfile.TemporaryDirectory() as folder:
        work, sets = Path(folder), options.sets.split(",")
        losses = TrainedLosses(
            options.model, kept, options.data, work, sets, options.seeds, options.steps, options.threads
        )
        for weights in filter(losses.missing, WEIGHTS):
            with cloud_server(options.model, options.threads, *serve(weights)) as url:
                losses.measure(weights, bundles[weights], url)
    return losses


def serve(weights: WeightFormat) -> tuple[str, ...]:
    """Options of a server."""
    return "--weights", weights, "--dtype", "bfloat16"


def _model(name: str, weights: WeightFormat) -> PreTrainedModel:
    model = load_model(find_source(name), torch.bfloat16).eval().requires_grad_(False)
    hold_in_low_bits(model, weights)
    return model


def _compared(
    models: dict[WeightFormat, PreTrainedModel], work: Callable[[PreTrainedModel], None]
) -> dict[WeightFormat, float]:
    """The processor's seconds of ``work`` in rounds, as ratios."""
    seconds: dict[WeightFormat, list[float]] = {name: [] for name in models}
    for number in range(ROUNDS):
        for name, model in models.items():
            before = time.process_time()
            work(model)
            if number:  # the first is of what is set up once
                seconds[name].append(time.process_time() - before)
    return _ratios(seconds)


def _ratios(seconds: dict[WeightFormat, list[float]]) -> dict[WeightFormat, float]:
    return {
        name: median(ours / full for ours, full in zip(each, seconds["full"], strict=True))
        for name, each in seconds.items()
    }


def _there_and_back(model: PreTrainedModel, ids: Tensor) -> None:
    """Forward, and back to what the blocks were given."""
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    hidden = model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    torch.autograd.grad(hidden, embeds, torch.ones_like(hidden))


def _answer(model: PreTrainedModel) -> None:
    """Some tokens, one after the other."""
    embeds = model.get_input_embeddings()(torch.tensor([[1]]))
    with torch.no_grad():
        for _ in range(4):
            model.base_model(inputs_embeds=embeds, use_cache=False)


if __name__ == "__main__":
    main()
