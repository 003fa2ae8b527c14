"""What a fleet does and takes, by formulas: its steps a second, and what ten thousand or a million devices need.

A closed network with think times, solved by mean value analysis: devices think, then ask for a step, which needs
processor time on a few cores that all share, and think again. Exact for one core where times are exponential (Reiser &
Lavenberg, Mean-value analysis of closed multichain queuing networks, J. ACM 27(2), 1980); several cores are one that is
as fast as all of them, and a delay for the rest of a step that runs on one (Seidmann, Schweitzer & Shalev-Oren,
Computerized closed queueing network models of flexible manufacturing systems, Large Scale Systems 12, 1987).

As a program it prints, as one JSON object, the table of docs/concepts/scaling.md, or that of another fleet.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Throughput:
    """What a fleet reaches.

    Attributes:
        steps_a_s: of all devices together; step_s: how long one step of a device takes; busy: share of all cores.
    """

    steps_a_s: float
    step_s: float
    busy: float


def throughput(devices: int, think_s: float, computed_s: float, cores: float) -> Throughput:
    """Of so many devices that think for ``think_s`` on the average between steps, each of which takes ``computed_s`` of
    one of ``cores``."""
    fast_s, delay_s = computed_s / cores, computed_s * (cores - 1) / cores
    queue = steps_a_s = step_s = 0.0
    for there in range(1, devices + 1):
        queued_s = fast_s * (1 + queue)
        step_s = queued_s + delay_s
        steps_a_s = there / (think_s + step_s)
        queue = steps_a_s * queued_s
    return Throughput(steps_a_s, step_s, steps_a_s * fast_s)


# -- what devices need ------------------------------------------------------------------------------------

DAY_S: Final = 86_400.0
PEAK: Final = 3.0
"""The busiest hour, to the mean."""
BUSY: Final = 0.7
"""Of the cores, in that hour: at more, steps wait for one another."""
CORE_S_A_TOKEN: Final = 5.2e-3
"""Of SmolLM2-135M in passes 2,2; python benchmarks/fleet.py --only costs."""
STEP_S: Final = 2.26
"""Of SmolLM2-135M, 256 tokens, over 80 ms and 100 Mbit/s; python benchmarks/network.py."""
BYTES_OF_RANK: Final = 6_700
BYTES_OF_WIDTH: Final = 1.6
"""Of a token: what crosses of adapters of rank 96, and of embeddings and last hidden states a unit of their width."""
SESSION_BYTES: Final = 39_000
QUESTIONS_A_STEP: Final = 4
"""To a shared ledger with quotas of tokens and of computing: before and after a micro-batch, and its report."""


@dataclass(frozen=True)
class Model:
    """A base model with the default recipe.

    Attributes:
        parameters: of its blocks; hidden, key_value, intermediate: widths.
        adapted_blocks, rank: what the adapters are.
    """

    parameters: float
    hidden: int
    key_value: int
    intermediate: int
    adapted_blocks: int = 8
    rank: int = 96

    @property
    def numbers(self) -> int:
        """Of A and B, which the server keeps of a device. q, k and v have one A, and so have gate and up."""
        inputs = 3 * self.hidden + self.intermediate
        outputs = (self.hidden + 2 * self.key_value) + self.hidden + 2 * self.intermediate + self.hidden
        return self.adapted_blocks * self.rank * (inputs + outputs)

    @property
    def kept_bytes(self) -> int:
        """Of a device that trains: A and B in int8, but for a scale each row, and its session."""
        return self.numbers + SESSION_BYTES

    @property
    def bytes_a_token(self) -> float:
        """In passes 2,2. Fitted to SmolLM2: for a model of another width it is a guess."""
        return BYTES_OF_RANK + BYTES_OF_WIDTH * self.hidden

    def operations_a_token(self, answers: float) -> float:
        """Floating-point operations in passes 2,2, where a share ``answers`` of the tokens are rows with adapters.

        2 a weight for each pass. The base pass is of all rows. Two passes forward and two back are of the rows with
        adapters, through the upper half of the blocks, where the adapters are. Frozen weights have no gradient.
        """
        return self.parameters * (2 + 4 * 2 * answers / 2)


SMOLLM2: Final = Model(106e6, 576, 192, 1536)
LLAMA_8B: Final = Model(7.0e9, 4096, 1024, 14_336)


def needs(devices: int, steps_a_day: float, tokens_a_step: float, answers: float) -> dict[str, float]:
    """Of a fleet in its busiest hour, with SmolLM2 where nothing else is said. Nothing of it was measured so large."""
    steps = devices * steps_a_day * PEAK / DAY_S
    tokens, connected = steps * tokens_a_step, steps * STEP_S
    return {
        "steps_a_s": steps,
        "tokens_a_s": tokens,
        "connected": connected,
        "server_cores": tokens * CORE_S_A_TOKEN / BUSY,
        "tera_operations_a_s": tokens * SMOLLM2.operations_a_token(answers) / 1e12,
        "adapters_gb": connected * SMOLLM2.kept_bytes / 1e9,
        "adapters_gb_if_all_stay": devices * SMOLLM2.kept_bytes / 1e9,
        "gbit_a_s": 8 * tokens * SMOLLM2.bytes_a_token / 1e9,
        "ledger_questions_a_s": steps * QUESTIONS_A_STEP,
        "tera_operations_a_s_8b": tokens * LLAMA_8B.operations_a_token(answers) / 1e12,
        "adapters_gb_if_all_stay_8b": devices * LLAMA_8B.kept_bytes / 1e9,
        "gbit_a_s_8b": 8 * tokens * LLAMA_8B.bytes_a_token / 1e9,
    }


def main() -> None:
    """Print what fleets need."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1_000, 10_000, 1_000_000])
    parser.add_argument("--steps-a-day", type=float, default=200, help="of each device")
    parser.add_argument("--tokens-a-step", type=float, default=256)
    parser.add_argument("--answers", type=float, default=1 / 3, help="share of the tokens that adapters act on")
    options = parser.parse_args()
    models = {"SmolLM2-135M": SMOLLM2, "Llama 3.1 8B": LLAMA_8B}
    found: dict[str, Any] = {
        name: {
            "adapters_mb": model.numbers / 1e6,
            "bytes_a_token": model.bytes_a_token,
            "operations_a_weight_and_token": model.operations_a_token(options.answers) / model.parameters,
        }
        for name, model in models.items()
    }
    for devices in options.devices:
        found[f"{devices:,}"] = needs(devices, options.steps_a_day, options.tokens_a_step, options.answers)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
