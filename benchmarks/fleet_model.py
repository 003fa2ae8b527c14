"""What a fleet does and takes, by formulas: its steps a second, and what ten thousand or a million devices need.

A closed network with think times, solved by mean value analysis: devices think, then ask for a step, which needs
processor time on a few cores that all share, and think again. Exact for one core where times are exponential (Reiser &
Lavenberg, Mean-value analysis of closed multichain queuing networks, J. ACM 27(2), 1980); several cores are one that is
as fast as all of them, and a delay for the rest of a step that runs on one (Seidmann, Schweitzer & Shalev-Oren,
Computerized closed queueing network models of flexible manufacturing systems, Large Scale Systems 12, 1987).

As a program it prints docs/concepts/scaling.md's tables as one JSON object.
"""

from __future__ import annotations

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


# -- what a device needs ----------------------------------------------------------------------------------

STEPS_A_DAY: Final = 200
TOKENS_A_STEP: Final = 256
PEAK: Final = 3.0
"""The busiest hour, to the mean."""
DAY_S: Final = 86_400.0
FLEETS: Final = (1_000, 10_000, 1_000_000)

# python benchmarks/fleet.py --only costs devices sessions
SMOLLM2_CORE_S_A_TOKEN: Final = 5.0e-3
BYTES_OF_RANK: Final = 6_700
BYTES_OF_WIDTH: Final = 1.6
PROXY_S_A_ROUND_TRIP: Final = 1.1e-4
SESSION_BYTES: Final = 39_000
LEDGER_QUESTIONS_A_STEP: Final = 4
"""Before and after a micro-batch, and its report; cloud/admission/quotas.py."""

PORTS: Final = 60_999 - 32_768 + 1
"""Of one address to one other, Linux's default."""
CORE_BYTES: Final = 4
"""The server's part of the adapters is float32."""


@dataclass(frozen=True)
class Model:
    """A base model with the default recipe, in passes 2,2: what devices over a wide network choose.

    Attributes:
        parameters: of its blocks; hidden, key_value, intermediate: widths.
        adapted_blocks, rank: what the adapters are.
        round_trips, step_s: of a step over 80 ms and 100 Mbit/s.
    """

    parameters: float
    hidden: int
    key_value: int
    intermediate: int
    adapted_blocks: int = 8
    rank: int = 96
    round_trips: int = 5
    step_s: float = 2.26

    @property
    def kept_bytes(self) -> int:
        """What the server keeps of a device that is there: A and B of each group, and the session."""
        inputs = 3 * self.hidden + self.intermediate  # q, k and v read together, as gate and up do; o; down
        outputs = (self.hidden + 2 * self.key_value) + self.hidden + 2 * self.intermediate + self.hidden
        return self.adapted_blocks * self.rank * (inputs + outputs) * CORE_BYTES + SESSION_BYTES

    @property
    def bytes_a_token(self) -> float:
        """What crosses of the adapters depends on their rank, embeddings and last hidden states on the width."""
        return BYTES_OF_RANK + BYTES_OF_WIDTH * self.hidden


SMOLLM2: Final = Model(106e6, 576, 192, 1536)
LLAMA_8B: Final = Model(7.0e9, 4096, 1024, 14_336)


def tokens_a_s(devices: int) -> float:
    """Of all of them, in the busiest hour."""
    return devices * STEPS_A_DAY * TOKENS_A_STEP * PEAK / DAY_S


def needs(model: Model, devices: int) -> dict[str, float]:
    """In the busiest hour. Nothing of it was measured with so many."""
    tokens = tokens_a_s(devices)
    steps = tokens / TOKENS_A_STEP
    there = steps * model.step_s
    return {
        "steps_a_s": steps,
        "devices_there": there,
        # 2 a weight, forward and backward: frozen weights have no gradient. The first pass of 2,2 is a forward one.
        "tera_flops_a_s": tokens * 6 * model.parameters / 1e12,
        "kept_gb": there * model.kept_bytes / 1e9,
        "kept_gb_if_all_are_there": devices * model.kept_bytes / 1e9,
        "proxy_cores": steps * model.round_trips * PROXY_S_A_ROUND_TRIP,
        "gbit_a_s": 8 * tokens * model.bytes_a_token / 1e9,
        "replica_addresses": -(-there // PORTS),
        "replica_addresses_if_all_are_there": -(-devices // PORTS),
        "ledger_questions_a_s": steps * LEDGER_QUESTIONS_A_STEP,
    }


def main() -> None:
    """Print what each fleet needs."""
    found: dict[str, Any] = {
        name: {
            "kept_mb_each": model.kept_bytes / 1e6,
            "bytes_a_token": model.bytes_a_token,
            **{f"{n:,}": needs(model, n) for n in FLEETS},
        }
        for name, model in (("SmolLM2-135M", SMOLLM2), ("Llama 3.1 8B", LLAMA_8B))
    }
    for n in FLEETS:
        found["SmolLM2-135M"][f"{n:,}"]["server_cores"] = tokens_a_s(n) * SMOLLM2_CORE_S_A_TOKEN
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
