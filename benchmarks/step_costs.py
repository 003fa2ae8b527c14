"""What a step costs a device beside seconds: adapter FLOPs and round trips, by formula, and CPU without the ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, ParamSpec, TypeVar, cast

from economy_recipes import DEFAULT, RECIPES

from dlora.edge.model.ends import Embedding
from dlora.edge.model.split import SplitModel
from dlora.protocol.adapters import AdapterSpec, crossings, parameter_count
from dlora.protocol.groups import GroupSpec, TargetSpec
from dlora.protocol.traffic import micro_batch_traffic
from dlora.protocol.wire_codecs import Codecs

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Widths:
    """A llama's.

    Attributes:
        kv: of keys and values; mlp: between the MLP's two products.
    """

    blocks: int
    hidden: int
    kv: int
    mlp: int

    def groups(self, blocks: Sequence[int], modules: Sequence[str]) -> tuple[GroupSpec, ...]:
        """The exchange groups of these modules in these blocks; a block has four at most."""
        shared = (
            (self.hidden, {"q_proj": self.hidden, "k_proj": self.kv, "v_proj": self.kv}),
            (self.hidden, {"o_proj": self.hidden}),
            (self.hidden, {"gate_proj": self.mlp, "up_proj": self.mlp}),
            (self.mlp, {"down_proj": self.hidden}),
        )
        found = []
        for block in blocks:
            for in_features, outputs in shared:
                targets = tuple(TargetSpec(f"{block}.{name}", outputs[name]) for name in outputs if name in modules)
                if targets:
                    found.append(GroupSpec(block, in_features, targets))
        return tuple(found)


SMOLLM2: Final = Widths(blocks=30, hidden=576, kv=192, mlp=1536)  # SmolLM2-135M
LLAMA_3_8B: Final = Widths(blocks=32, hidden=4096, kv=1024, mlp=14336)
ALL_MODULES: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapter_flops(spec: AdapterSpec, groups: Sequence[GroupSpec]) -> int:
    """FLOPs that the device's adapters take in training for each row at which they act.

    A matrix of m by n that is multiplied with a row takes 2mn in the forward pass, 2mn for its input's gradient and 2mn
    for its own: 6mn. So it is six times what the device trains:

        lora, of each module:       A (r, in) and B (out, r)    6 r (in + out)
        ffa, of each module:        B (out, r)                  6 r out
        bottleneck, of each group:  the core (r, r)             6 r r

    A bottleneck's does not grow with the model's width. Scaling and what is added up are left out, and AdamW, which
    is once a step.
    """
    return 6 * parameter_count(spec, groups)


def adapter_flops_table() -> dict[str, dict[str, float]]:
    """By hidden size: LoRA of rank 8 on q and v of all blocks, the default recipe, and how many times less that is."""
    table, rank = {}, RECIPES[DEFAULT].adapter["rank"]
    for widths in (SMOLLM2, LLAMA_3_8B):
        every, eight = range(widths.blocks), range(widths.blocks - 8, widths.blocks)
        lora = adapter_flops(AdapterSpec("lora", 8), widths.groups(every, ("q_proj", "v_proj")))
        core = adapter_flops(AdapterSpec("bottleneck", rank), widths.groups(eight, ALL_MODULES))
        table[str(widths.hidden)] = {"lora": lora, "bottleneck": core, "ratio": round(lora / core, 2)}
    return table


def round_trips(spec: AdapterSpec, groups: Sequence[GroupSpec]) -> int:
    """Of a step of one micro-batch in which all groups are trained: 2 * groups + 1."""
    live = range(len(groups))
    found = micro_batch_traffic(
        crossings(spec, groups), live=live, with_grads=live, answered=live[1:], tokens=1, sequences=1, labelled=1,
        embedding_size=1, hidden_size=1, codecs=Codecs.parse("fp16"),
    )  # fmt: skip
    return found.round_trips


class EndsClock:
    """CPU time, of all threads, that a model spends in its two ends while it trains: embedding, and head with loss.

    They are as large for every recipe, so that what recipes differ in shows only without them.

    Attributes:
        seconds: so far.
    """

    def __init__(self, model: SplitModel) -> None:
        self.seconds = 0.0
        parts = model._parts
        parts.embedding = cast(Embedding, self._timed(parts.embedding.__call__))  # it is called, and no more
        parts.head.loss_and_grad = self._timed(parts.head.loss_and_grad)  # type: ignore[method-assign]

    def _timed(self, function: Callable[P, T]) -> Callable[P, T]:
        def timed(*args: Any, **kwargs: Any) -> T:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - started

        return timed
