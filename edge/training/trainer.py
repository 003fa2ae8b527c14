"""A training run against one server: its steps, evaluations, checkpoints and the saved adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from dlora.edge.adapters.compatibility import check_base_model, check_sequence_length, load_weights
from dlora.edge.adapters.parts import Parts
from dlora.edge.adapters.peft import LoadedAdapter, SavedModule, load_adapter, save_adapter
from dlora.edge.adapters.units import AdapterSet
from dlora.edge.data.batches import Batches, MicroBatch
from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.memory import peak_rss_mb
from dlora.edge.model.evaluation import Evaluation, evaluate
from dlora.edge.model.source import HiddenStateSource
from dlora.edge.model.split import SplitModel
from dlora.edge.model.trunk import TrunkModel
from dlora.edge.wire.connection import Connection
from dlora.edge.wire.spans import COMPUTE, STEPS, Spans
from dlora.edge.wire.usage import with_other
from dlora.protocol.adapter_record import TrainingRecord
from dlora.protocol.errors import CheckpointError, DloraError, NonFiniteError
from dlora.protocol.kill_revive import LIVE, UnitState
from dlora.protocol.messages import Welcome
from dlora.protocol.tensors import FloatArray

from .checkpoint import Checkpoint, save_checkpoint
from .config import RunIdentity, TrainConfig, check_identity, check_units
from .device_session import DeviceSession
from .metrics import StepMetrics
from .optimizer import AdamW
from .scores import Scorer
from .train_session import TrainSession

_SCORES: Final = "unanswered.scores"


class TrainerState(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint holds beside the tensors.

    Attributes:
        next_step: the step that comes next.
        run: whose step that is.
        ticket: the controller's state, before the report of the last step where that is ``unanswered``.
        fade_ages, adam_steps, states: one a unit.
        unanswered: whether the last step's report must be sent again; its scores are among the tensors.
    """

    next_step: int
    run: RunIdentity
    ticket: bytes
    unanswered: bool = False
    states: list[int]
    fade_ages: list[int]
    adam_steps: list[int]


class Trainer:
    """One training run.

    Args:
        connection: to the server; or, in the modes ``trunk`` and ``local``, the source of what goes into the device's
            blocks.
        init: a PEFT adapter to start from.
        checkpoint: a checkpoint of this very run to go on from, or of its end where ``config.part_begins`` is there.
        window: how many micro-batches of a step may be under way at a time, where the server allows as many.
        before_basis_step: called before each step's data that a basis is made from, with how many are done and how
            many there are; what it raises ends the run before its first step.

    Attributes:
        groups: the exchange groups that are trained.
        spans: what happens when, where somebody wants to know.
        steps_rerun: how often a step was run again, because its session was lost before it was committed.
    """

    # Nine parameters: four that a run is made of, the connection, and four that most runs leave out.
    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        connection: Connection | HiddenStateSource,
        config: TrainConfig,
        dataset: Dataset,
        *,
        init: LoadedAdapter | None = None,
        checkpoint: Checkpoint | None = None,
        window: int = 1,
        before_basis_step: Callable[[int, int], None] = lambda done, steps: None,
    ) -> None:
        manifest = bundle.manifest
        dataset = dataset.acting_on_answers(config.invocation)
        self.bundle = bundle
        self.config = config
        self.connection = connection
        self.groups = config.groups(manifest)
        self.adapters = AdapterSet.create(
            config.adapter,
            self.groups,
            scaling=config.scaling,
            seed=config.seed,
            unit=config.kill_revive.unit,
            kill_every=config.kill_revive.kill_every,
            draws_state=config.basis == "random",
        )
        check_units(config.kill_revive, len(self.adapters.units))
        if init is not None:
            load_weights(self.adapters, init, config.invocation)
            for unit in self.adapters.units:
                targets = (target for group in unit.groups for target in self.groups[group].targets)
                unit.has_learnt = any(target.name in init.modules for target in targets)
        self.identity = RunIdentity.of(config, manifest, dataset.fingerprint)
        self.steps_rerun = 0
        # Why the report of the last committed step could not be sent.
        self._failure: DloraError | None = None
        self._recorder = connection.recorder if isinstance(connection, Connection) else None
        self.spans = connection.spans if isinstance(connection, Connection) else Spans()
        if self._recorder is not None:
            self._recorder.seed_was_chosen = len(config.seed) == 1
        self.session: TrainSession | DeviceSession
        self.model: SplitModel | TrunkModel
        if isinstance(connection, Connection):
            self.session = TrainSession(
                connection, self.adapters, config, base_fingerprint=manifest.base_model.fingerprint, window=window
            )
            self.model = SplitModel(
                bundle, engine, self.session, invocation=config.invocation, send=config.send
            )
        else:
            self.session = DeviceSession(self.adapters, config)
            self.model = TrunkModel(bundle, engine, self.adapters, config.device_blocks, connection)
        if checkpoint is not None:
            self._restore(checkpoint)
        self.batches = Batches(dataset, config.batch_size, config.grad_accum, config.seed)
        self.optimizer = AdamW(engine, config.optimizer, config.steps)
        self._scorer = Scorer(config.kill_revive.score)
        if isinstance(connection, Connection):
            self._check_limits(connection.welcome)
        if isinstance(self.model, TrunkModel):
            self.model.check_fits(self.batches.max_sequence_length)
        if isinstance(self.session, TrainSession) and config.basis == "data":
            self.session.basis_pass = partial(self._run_basis_pass, before_basis_step)
        self.session.open()
        if config.holds_outputs and isinstance(self.session, DeviceSession) and isinstance(self.model, TrunkModel):
            self.model.hold(dataset, config.batch_size * config.grad_accum, self.session.unchanged_steps)

    @property
    def next_step(self) -> int:
        """The step that comes next, counted over the whole run."""
        return self.config.part_begins + self.session.step

    # -- for a run ---------------------------------------------------------------------------------------

    def run_step(self) -> StepMetrics:
        """One optimizer step: exchange every micro-batch, step AdamW, report the scores.

        A lost session costs the exchange of this step, which is run again; the optimizer steps once. Where the step is
        done and only its report fails, that is raised by what is asked for next.

        Raises what ``Connection`` raises, ``NonFiniteError`` where the run diverges, ``DataError`` for an example that
        the server does not take.
        """
        self._raise_failure()
        step, started = self.next_step, time.perf_counter()
        before, computed = self.model.counters, self.model.compute_seconds
        usage_before = self.connection.usage.copy()
        batches = self.batches.step_batches(step)
        labelled = sum(len(batch.labels) for batch in batches)
        with self._name_step_in_error():
            losses = self._exchange(batches, labelled)
        self.spans.add("micro-batches", STEPS, started, time.perf_counter())
        states = self.adapters.states()
        optimizing = time.perf_counter()
        learning_rate = self.optimizer.lr(self.session.step)
        with self._name_step_in_error():
            scores, norm = self._optimize()
        optimized = time.perf_counter() - optimizing
        self.spans.add("optimizer", COMPUTE, optimizing, optimizing + optimized)
        self.adapters.zero_grad()
        try:
            # Committed: from here on this step is done, whatever happens to the connection.
            self.session.report(scores)
        except DloraError as error:
            self._failure = error
        self.spans.add(f"step {step}", STEPS, started, time.perf_counter())
        after, usage = self.model.counters, self.connection.usage.since(usage_before)
        bytes_up, bytes_down = after[0] - before[0], after[1] - before[1]
        return StepMetrics(
            step=step,
            total_steps=self.config.total_steps,
            loss=losses / labelled,
            learning_rate=learning_rate,
            grad_norm=norm,
            tokens=sum(len(batch.ids) for batch in batches),
            labelled=labelled,
            bytes_up=bytes_up,
            bytes_down=bytes_down,
            round_trips=after[2] - before[2],
            active_units=int((states == UnitState.ACTIVE).sum()),
            live_units=int(np.isin(states, list(LIVE)).sum()),
            edge_compute_s=self.model.compute_seconds - computed + optimized,
            step_s=time.perf_counter() - started,
            units="".join(map(str, states)),
            up=with_other(usage.up, bytes_up),
            down=with_other(usage.down, bytes_down),
            waiting_s=usage.waited_s,
            server_compute_s=usage.computed_s,
            server_queued_s=usage.queued_s,
            peak_rss_mb=round(peak_rss_mb(), 1),
        )

    def evaluate(self, dataset: Dataset, progress: Callable[[int, int], None] | None = None) -> Evaluation:
        """Loss and accuracy on a data set, with the adapters as they are. Raises as ``run_step`` does."""
        self._raise_failure()
        if self._recorder is not None:
            self._recorder.add_parameters(self.adapters.for_recording())
        with self._name_step_in_error():
            return evaluate(self.model, dataset, self.config.batch_size, progress)

    def wait_for_signal(self) -> None:
        """Wait for the signal to the last report, so that what is saved now is what the next step starts from."""
        self._raise_failure()
        with self._name_step_in_error():
            self.session.wait_for_signal()

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes up and bytes down so far, over all sessions."""
        return self.model.counters[:2]

    def save_checkpoint(self, directory: Path) -> None:
        """Write a checkpoint of everything the next step depends on; no server is needed. Raises ``StorageError``."""
        units, session = self.adapters.units, self.session
        assert session.ticket is not None
        state = TrainerState(
            next_step=self.next_step,
            run=self.identity,
            ticket=session.ticket,
            states=[int(unit.state) for unit in units],
            fade_ages=[unit.fade_age for unit in units],
            adam_steps=[unit.adam_steps for unit in units],
            unanswered=session.unanswered is not None,
        )
        tensors = self.adapters.state()
        if session.unanswered is not None:
            tensors[_SCORES] = session.unanswered
        save_checkpoint(directory, self.next_step, tensors, state)

    def save_adapter(self, directory: Path, training: TrainingRecord | None = None) -> None:
        """Write the units that have an effect as a PEFT adapter; a fading unit's scale is folded into its B.

        ``training``: what is to be said of what it learnt. Raises ``StorageError``, and as ``run_step`` does where the
        last signal has not come.
        """
        self.wait_for_signal()
        modules = []
        for index, group in enumerate(self.adapters.groups):
            scale = np.float32(self.adapters.scale(index))
            if scale > 0:
                modules += [
                    SavedModule(name, lora_A, lora_B * scale if scale < 1 else lora_B)
                    for name, lora_A, lora_B, _ in group.factors()
                ]
        parts = self.adapters.parts()
        config = self.config
        self._save_modules(
            directory, modules, Parts(config.kind, config.rank, config.scaling, parts) if parts else None, training
        )

    def copy_adapter(self, source: Path, directory: Path) -> None:
        """Write an adapter of this run again, elsewhere."""
        loaded = load_adapter(source)
        training = loaded.record.training if loaded.record is not None else None
        self._save_modules(directory, list(loaded.modules.values()), loaded.parts, training)

    # -- inside ------------------------------------------------------------------------------------------

    def _run_basis_pass(self, before_step: Callable[[int, int], None]) -> int:
        """Let the server see the data of the first steps; gives the number of micro-batches."""
        assert isinstance(self.model, SplitModel)
        steps, micro_batches = self.config.basis_pass_steps(self.batches.examples), 0
        with self._name_step_in_error():
            for step in range(steps):
                before_step(step, steps)
                micro_batches += self.model.run_basis_pass(self.batches.step_batches(step))
        return micro_batches

    def _save_modules(
        self, directory: Path, modules: list[SavedModule], parts: Parts | None, training: TrainingRecord | None
    ) -> None:
        save_adapter(
            directory,
            modules,
            r=self.config.rank,
            lora_alpha=self.config.lora_alpha,
            base_model_name=self.bundle.manifest.base_model.name,
            target_modules=self.config.target_modules or self.bundle.manifest.defaults.target_modules,
            fan_in_fan_out=self.bundle.manifest.base_model.architecture == "gpt2",
            parts=parts,
            invocation=self.config.invocation,
            base_fingerprint=self.bundle.manifest.base_model.fingerprint,
            training=training,
        )

    @contextmanager
    def _name_step_in_error(self) -> Iterator[None]:
        try:
            yield
        except NonFiniteError as error:
            raise NonFiniteError(
                f"training diverged at step {self.next_step}: {error}; start anew in another --out with a lower --lr "
                f"than {self.config.optimizer.lr:g}: this run would diverge again"
            ) from None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _exchange(self, batches: list[MicroBatch], labelled: int) -> float:
        """Forward and backward of all micro-batches: the summed losses; the gradients are in the adapters."""
        tries = 0

        def attempt() -> float:
            nonlocal tries
            self.steps_rerun += tries > 0
            tries += 1
            self.adapters.zero_grad()
            if self._recorder is not None:
                self._recorder.add_parameters(self.adapters.for_recording())
            # Anew for each session: another server may take less at once.
            parts = [part for batch in batches for part in self.model.cut(batch)]
            losses = self.model.forward_backward(parts, step=self.session.step, grad_scale=1.0 / labelled)
            total = 0.0
            for found in losses:
                total += float(found.sum(dtype=np.float64))
            if self._recorder is not None:
                named = self.adapters.parameters().items()
                self._recorder.add_gradients({name: parameter.grad for name, parameter in named})
            return total

        return self.session.run(attempt)

    def _optimize(self) -> tuple[FloatArray, float]:
        """Step AdamW; returns one score a unit, 0 for units that are not trained, and the gradients' norm."""
        active = [(index, unit) for index, unit in enumerate(self.adapters.units) if unit.state is UnitState.ACTIVE]
        groups = self.adapters.groups
        before = {group: self._scorer.before(groups[group]) for _, unit in active for group in unit.groups}
        norm = self.optimizer.step(self.adapters, self.session.step)
        scores = self._first_scores()
        if not scores.any():
            for index, unit in active:
                scores[index] = self._scorer.unit_score(
                    part for group in unit.groups for part in self._scorer.parts(groups[group], before[group])
                )
        # A weight may be finite whose square is not.
        return np.clip(scores, None, np.finfo(np.float32).max).astype(np.float32), norm

    def _first_scores(self) -> npt.NDArray[np.float64]:
        """Zeros; in the first step, what the basis pass says of each unit, where that is what units are scored by."""
        scores = np.zeros(len(self.adapters.units), np.float64)
        has_norms = all(group.first_gradient_norm for group in self.adapters.groups)
        if self.next_step == 0 and has_norms and self._scorer.score == "grad":
            for index, unit in enumerate(self.adapters.units):
                norms = [group.first_gradient_norm for group in self.adapters.of_unit(unit)]
                scores[index] = self.adapters.scaling * math.hypot(*norms)
        return scores

    def _check_limits(self, welcome: Welcome) -> None:
        """Raise for what the server would refuse at an unlucky step hours later."""
        check_base_model(self.bundle, welcome)
        check_sequence_length(self.batches.max_sequence_length, welcome)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = trainer_state(checkpoint)
        check_identity(self.identity, state.run)
        begins_here = self.config.part_begins == state.run.config.total_steps
        # The identity covers all settings, so that what follows fails only for a file that was made by hand.
        try:
            self.adapters.load_state(checkpoint.tensors)
            for unit, unit_state, age, steps in zip(
                self.adapters.units, state.states, state.fade_ages, state.adam_steps, strict=True
            ):
                unit.adam_steps = steps
                unit.has_learnt |= begins_here and unit_state != UnitState.KILLED
                if not begins_here:
                    unit.state, unit.fade_age = UnitState(unit_state), age
            if not begins_here:
                self.session.unanswered = checkpoint.tensors[_SCORES] if state.unanswered else None
                self.session.ticket = state.ticket
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{checkpoint.path} lacks a part ({error}); start anew in another --out") from None
        self.session.step = state.next_step - self.config.part_begins


def trainer_state(checkpoint: Checkpoint) -> TrainerState:
    """What a checkpoint holds beside the tensors. Raises ``CheckpointError`` for one of another version."""
    try:
        return msgspec.convert(checkpoint.state, TrainerState)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{checkpoint.path} is of another version ({error}); start anew") from None
