"""A training run against one server: its steps, in the order of its data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import numpy as np

from dlora.edge.adapters.peft import LoadedAdapter
from dlora.edge.data.batches import Batches, MicroBatch
from dlora.edge.data.examples import Dataset, Example
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.memory import peak_rss_mb
from dlora.edge.wire.spans import STEPS
from dlora.edge.wire.usage import with_other
from dlora.protocol.errors import NonFiniteError
from dlora.protocol.kill_revive import LIVE, UnitState

from .adapter_training import AdapterTraining
from .checkpoint import Checkpoint
from .first_rate import FoundRate, find_rate, halvings, probed_steps, rate_for_size
from .metrics import StepMetrics
from .resolved import Resolved, RunIdentity
from .side import MakeSide

SetUpPiece = Literal["data", "groups", "rate"]


class Trainer(AdapterTraining):
    """One training run.

    Args:
        dataset: what it trains on; the other arguments are those of ``AdapterTraining``.
        before_set_up: called before each piece of setting up what the server keeps of the adapters: a step's ``data``,
            from which it makes that, and one of the ``groups`` that it is made for; with how many of these are done
            and how many there are. What it raises ends the run before its first step.

    ``batches``: the micro-batches of every step.
    """

    # Nine parameters: four that a run is made of, where its blocks are, and four that most runs leave out.
    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        make_side: MakeSide,
        config: Resolved,
        dataset: Dataset,
        *,
        init: LoadedAdapter | None = None,
        checkpoint: Checkpoint | None = None,
        before_set_up: Callable[[SetUpPiece, int, int], None] = lambda piece, done, total: None,
        begins: bool = True,
    ) -> None:
        dataset = dataset.acting_on_answers(config.invocation)
        super().__init__(bundle, engine, make_side, config, dataset.fingerprint, init=init, checkpoint=checkpoint)
        self._dataset = dataset
        self.batches = Batches(dataset, config.training.batch_size, config.training.grad_accum, config.seed)
        self._before_set_up = before_set_up
        if begins:
            self.begin()

    def begin(self) -> None:
        """Begin, or go on, at the server. Raises as ``open`` does."""
        config = self.config
        basis_steps = self._basis_steps if config.adapter.basis == "data" else None
        self.open(self.batches.max_sequence_length, basis_steps, partial(self._before_set_up, "groups"))
        if config.keeps_outputs:
            self.side.keep_outputs(self._dataset, config.examples_a_step)

    def step_examples(self, step: int) -> list[Example]:
        """The examples of a step, counted from 0, in order."""
        return [self._dataset[int(index)] for index in self.batches.step_indices(step)]

    @property
    def peak_rate(self) -> float:
        """The peak learning rate, given or found."""
        assert self.config.optimizer.lr is not None
        return self.config.optimizer.lr

    def find_rate(self, before_try: Callable[[int, int], None] = lambda done, total: None) -> FoundRate:
        """Find the peak learning rate, where the configuration leaves it open, and take it for the run.

        AdamW's first update, of the first step's data, is made in several sizes and taken back; the data of the next
        steps say what each is worth. Nothing but the rate is left of it.

        ``before_try``: called before each try with how many are done, and how many there are at the most.

        Raises as ``forward_backward`` does.
        """
        batches = self.batches.step_batches(0)
        self.forward_backward(batches, grad_scale=1.0 / sum(len(batch.labels) for batch in batches))
        examples_a_step, total_steps = self.config.examples_a_step, self.config.total_steps
        steps = probed_steps(examples_a_step, total_steps)
        probed = [batch for step in steps for batch in self.batches.step_batches(step)]
        parameters = self.adapters.parameters().values()
        before = [(each, each.value, each.exp_avg, each.exp_avg_sq) for each in parameters]
        adam_steps = [(unit, unit.adam_steps) for unit in self.adapters.units]

        def loss_after(size: float) -> float:
            self.optimizer.step(self.adapters, lr=size)
            self.record_parameters()
            try:
                loss = sum(float(self.evaluate_batch(batch).sum(dtype=np.float64)) for batch in probed)
            except NonFiniteError as error:  # in the middle of an exchange, which cannot be taken back
                raise NonFiniteError(f"no learning rate was found: {error}; give one: --lr 1e-3") from None
            for parameter, *values in before:
                parameter.value, parameter.exp_avg, parameter.exp_avg_sq = values
            for unit, count in adam_steps:
                unit.adam_steps = count
            return loss if math.isfinite(loss) else math.inf

        rate_of = partial(
            rate_for_size,
            self.config.adapter.kind,
            halvings=halvings(self._dataset, steps=total_steps, examples_a_step=examples_a_step),
            on_device=self.config.device_blocks > 0,
            in_passes=self.config.passes is not None,
        )
        found = find_rate(loss_after, rate_of, before_try)
        self.adapters.zero_grad()
        self.config = self.config.with_rate(found.lr)
        self.identity = RunIdentity.of(self.config, self.bundle.manifest, self._dataset.fingerprint)
        self.optimizer.config = self.config.optimizer
        return found

    def run_step(self) -> StepMetrics:
        """One optimizer step: exchange every micro-batch, step AdamW, report the scores.

        A lost session costs the exchange of this step, which is run again; the optimizer steps once.

        Raises as ``forward_backward`` and ``optim_step`` do.
        """
        step, started = self.next_step, time.perf_counter()
        before, computed = self.model.counters, self.model.compute_seconds
        usage_before = self.side.crossed.usage.copy()
        batches = self.batches.step_batches(step)
        labelled = sum(len(batch.labels) for batch in batches)
        parts = self.forward_backward(batches, grad_scale=1.0 / labelled)
        total = sum(float(losses.sum(dtype=np.float64)) for losses in parts)
        self.spans.add("micro-batches", STEPS, started, time.perf_counter())
        states = self.adapters.states()
        stepped = self.optim_step()
        self.spans.add(f"step {step}", STEPS, started, time.perf_counter())
        after, usage = self.model.counters, self.side.crossed.usage.since(usage_before)
        bytes_up, bytes_down = after[0] - before[0], after[1] - before[1]
        return StepMetrics(
            step=step,
            total_steps=self.config.total_steps,
            loss=total / labelled,
            learning_rate=stepped.learning_rate,
            grad_norm=stepped.grad_norm,
            tokens=sum(len(batch.ids) for batch in batches),
            labelled=labelled,
            bytes_up=bytes_up,
            bytes_down=bytes_down,
            round_trips=after[2] - before[2],
            active_units=int((states == UnitState.ACTIVE).sum()),
            live_units=int(np.isin(states, list(LIVE)).sum()),
            edge_compute_s=self.model.compute_seconds - computed + stepped.seconds,
            step_s=time.perf_counter() - started,
            units="".join(map(str, states)),
            up=with_other(usage.up, bytes_up),
            down=with_other(usage.down, bytes_down),
            waiting_s=usage.waited_s,
            server_compute_s=usage.computed_s,
            server_queued_s=usage.queued_s,
            peak_rss_mb=round(peak_rss_mb(), 1),
        )

    def _basis_steps(self) -> Iterator[Sequence[MicroBatch]]:
        steps = self.config.basis_pass_steps(self.batches.examples)
        for step in range(steps):
            self._before_set_up("data", step, steps)
            yield self.batches.step_batches(step)
