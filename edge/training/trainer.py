"""The training loop: steps, reports, obedience to signals, evaluation, checkpoints and the saved adapter."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from dlora.edge.adapters.fitting import check_base_model, load_weights
from dlora.edge.adapters.peft import LoadedAdapter, SavedModule, load_adapter, save_adapter
from dlora.edge.adapters.units import Adapter, AdapterSet, Parameter
from dlora.edge.data.batches import Batches, MicroBatch
from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.model.evaluation import Evaluation, evaluate
from dlora.edge.model.split import SplitModel, unit_states
from dlora.edge.seeds import seed_for_server
from dlora.edge.wire.connection import Connection
from dlora.protocol import messages as m
from dlora.protocol.errors import CheckpointError, DataError, DivergedError, DloraError, SessionLostError
from dlora.protocol.kill_revive import UnitState
from dlora.protocol.tensors import FloatArray

from .checkpoint import Checkpoint, save_checkpoint
from .config import RunIdentity, TrainConfig, check_identity, check_units
from .metrics import StepMetrics
from .optimizer import AdamW
from .scores import ModuleScore, Scorer

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
    """One training run against one server.

    Args:
        init: a PEFT adapter to start from.
        checkpoint: a checkpoint of this very run to go on from, or of its end where ``config.part_begins`` is there.

    Attributes:
        groups: the exchange groups that are trained.
        next_step: the step that comes next.
        steps_rerun: how often a step was run again, because its session was lost before it was committed.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        connection: Connection,
        config: TrainConfig,
        dataset: Dataset,
        *,
        init: LoadedAdapter | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        manifest = bundle.manifest
        self.bundle = bundle
        self.config = config
        self.connection = connection
        self.groups = config.groups(manifest)
        self.adapters = AdapterSet.create(
            self.groups,
            rank=config.rank,
            scaling=config.scaling,
            seed=config.seed,
            unit=config.kill_revive.unit,
            kill_every=config.kill_revive.kill_every,
        )
        check_units(config.kill_revive, len(self.adapters.units))
        if init is not None:
            load_weights(self.adapters, init)
        self.identity = RunIdentity.of(config, manifest, dataset.fingerprint)
        self.next_step = config.part_begins
        self.steps_rerun = 0
        # The report of the last committed step, until its signal has come.
        self._unanswered: FloatArray | None = None
        # Why that report could not be sent.
        self._failure: DloraError | None = None
        self._ticket: bytes | None = None
        if checkpoint is not None:
            self._restore(checkpoint)
        self.batches = Batches(dataset, config.batch_size, config.grad_accum, config.seed)
        self.optimizer = AdamW(engine, config.optimizer, config.steps)
        self._scorer = Scorer(config.kill_revive.score)
        self.model = SplitModel(
            bundle, engine, connection, self.adapters,
            wire_dtype=config.wire_dtype, on_signal=self._obey, reopen=self._open,
        )  # fmt: skip
        self._check_limits()
        self._open()

    # -- the five verbs ----------------------------------------------------------------------------------

    def run_step(self) -> StepMetrics:
        """One optimizer step: exchange every micro-batch, step AdamW, report the scores.

        A lost session costs the exchange of this step, which is run again; the optimizer steps once. Where the step is
        done and only its report fails, that is raised by what is asked for next.
        """
        self._raise_failure()
        step, started = self.next_step, time.perf_counter()
        before, computed = _counters(self.connection), self.model.compute_seconds
        batches = self.batches.step_batches(step)
        labelled = sum(len(batch.labels) for batch in batches)
        with self._naming_the_step():
            losses = self._exchange(self._session_step, batches, labelled)
        states = self.adapters.states()
        optimizing = time.perf_counter()
        learning_rate = self.optimizer.lr(self._session_step)
        with self._naming_the_step():
            scores, norm = self._optimize(self._session_step)
        optimized = time.perf_counter() - optimizing
        # Committed: from here on this step is done, whatever happens to the connection.
        self.next_step = step + 1
        self.adapters.zero_grad()
        self._unanswered = scores
        try:
            self._report()
        except DloraError as error:
            self._failure = error
        after = _counters(self.connection)
        return StepMetrics(
            step=step,
            total_steps=self.config.total_steps,
            loss=losses / labelled,
            learning_rate=learning_rate,
            grad_norm=norm,
            tokens=sum(len(batch.ids) for batch in batches),
            labelled=labelled,
            bytes_up=after[0] - before[0],
            bytes_down=after[1] - before[1],
            round_trips=after[2] - before[2],
            active_units=int((states == UnitState.ACTIVE).sum()),
            live_units=int((states != UnitState.KILLED).sum()),
            edge_compute_s=self.model.compute_seconds - computed + optimized,
            step_s=time.perf_counter() - started,
            units="".join(map(str, states)),
        )

    def evaluate(self, dataset: Dataset, progress: Callable[[int, int], None] | None = None) -> Evaluation:
        """Loss and accuracy on a data set, with the adapters as they are."""
        self._raise_failure()
        with self._naming_the_step():
            return evaluate(self.model, dataset, self.config.batch_size, progress)

    def settle(self) -> None:
        """Wait for the signal to the last report, so that what is saved now is what the next step starts from."""
        self._raise_failure()
        while self._unanswered is not None:
            try:
                with self._naming_the_step():
                    self.model.await_signal()
            except SessionLostError:
                self._open()

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes up and bytes down so far, over all sessions."""
        return _counters(self.connection)[:2]

    def save_checkpoint(self, directory: Path) -> None:
        """Write a checkpoint of everything the next step depends on; no server is needed. Raises ``StorageError``."""
        units = self.adapters.units
        assert self._ticket is not None
        state = TrainerState(
            next_step=self.next_step,
            run=self.identity,
            ticket=self._ticket,
            states=[int(unit.state) for unit in units],
            fade_ages=[unit.fade_age for unit in units],
            adam_steps=[unit.adam_steps for unit in units],
            unanswered=self._unanswered is not None,
        )
        tensors = {} if self._unanswered is None else {_SCORES: self._unanswered}
        for adapter in self.adapters:
            for name, parameter in _parameters(adapter):
                tensors[f"{adapter.name}.{name}"] = parameter.value
                tensors[f"{adapter.name}.{name}.exp_avg"] = parameter.exp_avg
                tensors[f"{adapter.name}.{name}.exp_avg_sq"] = parameter.exp_avg_sq
        save_checkpoint(directory, self.next_step, tensors, state)

    def save_adapter(self, directory: Path) -> None:
        """Write the live units as a PEFT adapter; a fading unit's scale is folded into its B."""
        self.settle()
        modules = []
        for group, members in enumerate(self.adapters.groups):
            scale = np.float32(self.adapters.scale(group))
            if scale > 0:
                modules += [
                    SavedModule(a.name, a.lora_A.value, a.lora_B.value * scale if scale < 1 else a.lora_B.value)
                    for a in members
                ]
        self._save_modules(directory, modules)

    def copy_adapter(self, source: Path, directory: Path) -> None:
        """Write an adapter of this run again, elsewhere."""
        self._save_modules(directory, list(load_adapter(source).modules.values()))

    # -- inside ------------------------------------------------------------------------------------------

    def _save_modules(self, directory: Path, modules: list[SavedModule]) -> None:
        save_adapter(
            directory,
            modules,
            r=self.config.rank,
            lora_alpha=self.config.lora_alpha,
            base_model_name=self.bundle.manifest.base_model.name,
            target_modules=self.config.target_modules or self.bundle.manifest.defaults.target_modules,
            fan_in_fan_out=self.bundle.manifest.base_model.architecture == "gpt2",
        )

    @property
    def _session_step(self) -> int:
        """The step that comes next, as schedules and the server count: from the beginning of this part of the run."""
        return self.next_step - self.config.part_begins

    @contextmanager
    def _naming_the_step(self) -> Iterator[None]:
        try:
            yield
        except DivergedError as error:
            raise DivergedError(
                f"training diverged at step {self.next_step}: {error}; start anew in another --out with a lower --lr "
                f"than {self.config.optimizer.lr:g}: this run would diverge again"
            ) from None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _exchange(self, step: int, batches: list[MicroBatch], labelled: int) -> float:
        """Forward and backward of all micro-batches: the summed losses; the gradients are in the adapters."""
        while True:
            self.adapters.zero_grad()
            losses = 0.0
            # Anew for each session: another server may take less at once.
            parts = [part for batch in batches for part in self.model.cut(batch)]
            try:
                for index, part in enumerate(parts):
                    found = self.model.forward_backward(part, step=step, micro_batch=index, grad_scale=1.0 / labelled)
                    losses += float(found.sum(dtype=np.float64))
                return losses
            except SessionLostError:
                self.steps_rerun += 1
                self._open()

    def _optimize(self, step: int) -> tuple[FloatArray, float]:
        """Step AdamW; returns one score a unit, 0 for units that are not trained, and the gradients' norm."""
        units = [unit for unit in self.adapters.units if unit.state is UnitState.ACTIVE]
        adapters = [adapter for unit in units for adapter in self.adapters.of_unit(unit)]
        # AdamW replaces arrays and never writes into them, so holding the old ones costs nothing.
        old = {id(adapter): (adapter.lora_A.value, adapter.lora_B.value) for adapter in adapters}
        norm = self.optimizer.step(self.adapters, step)
        scores = np.zeros(len(self.adapters.units), np.float64)
        for index, unit in enumerate(self.adapters.units):
            if unit.state is UnitState.ACTIVE:
                scores[index] = self._scorer.unit_score(
                    self._module_score(adapter, old[id(adapter)]) for adapter in self.adapters.of_unit(unit)
                )
        # A weight may be finite whose square is not.
        return np.clip(scores, None, np.finfo(np.float32).max).astype(np.float32), norm

    def _module_score(self, adapter: Adapter, old: tuple[FloatArray, FloatArray]) -> ModuleScore:
        at_gradient = self._scorer.needs_gradient  # such a score belongs to the weights before the step
        return self._scorer.module_score(
            scaling=adapter.scaling,
            lora_A=old[0] if at_gradient else adapter.lora_A.value,
            lora_B=old[1] if at_gradient else adapter.lora_B.value,
            previous_A=old[0],
            previous_B=old[1],
            grad_A=adapter.lora_A.grad,
            grad_B=adapter.lora_B.grad,
        )

    def _check_limits(self) -> None:
        """Raise for what the server would refuse at an unlucky step hours later."""
        welcome = self.connection.welcome
        check_base_model(self.bundle, welcome)
        if self.batches.max_sequence_length > welcome.max_sequence_length:
            raise DataError(
                f"the data has a sequence of {self.batches.max_sequence_length} tokens, the server takes "
                f"{welcome.max_sequence_length}; set --max-length {welcome.max_sequence_length}"
            )

    def _open(self) -> None:
        """Open a session where we stand, or another in place of one that the server has forgotten."""
        while True:
            self._open_once()
            try:
                self._send_report()
                return
            except SessionLostError:
                continue

    def _open_once(self) -> None:
        """Before the last report, where that has no answer yet."""
        opened = self.connection.open(
            m.OpenSession(
                base_fingerprint=self.bundle.manifest.base_model.fingerprint,
                groups=self.groups,
                wire_dtype=self.config.wire_dtype,
                kill_revive=self.config.kill_revive,
                seed=seed_for_server(self.config.seed),
                total_steps=self.config.steps,
                next_step=self._session_step - (self._unanswered is not None),
                ticket=self._ticket,
            )
        )
        states = unit_states(opened)
        if self._ticket is None:
            self.adapters.obey(states)
        elif (states != self.adapters.states()).any():
            raise CheckpointError("the server's units are not the checkpoint's: its ticket belongs to another run")
        self._ticket = opened.ticket.data.tobytes()

    def _report(self) -> None:
        try:
            self._send_report()
        except SessionLostError:
            self._open()

    def _send_report(self) -> None:
        """Send the last step's report, until its signal has come."""
        if self._unanswered is not None:
            self.model.report(self._session_step - 1, self._unanswered)

    def _obey(self, signal: m.Signal) -> None:
        self.adapters.obey(unit_states(signal))
        self._ticket = signal.ticket.data.tobytes()
        self._unanswered = None

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = trainer_state(checkpoint)
        check_identity(self.identity, state.run)
        begins_here = self.config.part_begins == state.run.config.total_steps
        # The identity covers all settings, so that what follows fails only for a file that was made by hand.
        try:
            for adapter in self.adapters:
                for name, parameter in _parameters(adapter):
                    key = f"{adapter.name}.{name}"
                    parameter.value = checkpoint.tensors[key]
                    parameter.exp_avg = checkpoint.tensors[f"{key}.exp_avg"]
                    parameter.exp_avg_sq = checkpoint.tensors[f"{key}.exp_avg_sq"]
            for unit, unit_state, age, steps in zip(
                self.adapters.units, state.states, state.fade_ages, state.adam_steps, strict=True
            ):
                unit.adam_steps = steps
                if not begins_here:
                    unit.state, unit.fade_age = UnitState(unit_state), age
            if not begins_here:
                self._unanswered = checkpoint.tensors[_SCORES] if state.unanswered else None
                self._ticket = state.ticket
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{checkpoint.path} lacks a part ({error}); start anew in another --out") from None
        self.next_step = state.next_step


def trainer_state(checkpoint: Checkpoint) -> TrainerState:
    """What a checkpoint holds beside the tensors. Raises ``CheckpointError`` for one of another version."""
    try:
        return msgspec.convert(checkpoint.state, TrainerState)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{checkpoint.path} is of another version ({error}); start anew") from None


def _counters(connection: Connection) -> tuple[int, int, int]:
    """Bytes up, bytes down and round trips so far; a lost session takes none of them with it."""
    session = connection.session
    return session.bytes_sent, session.bytes_received, session.round_trips


def _parameters(adapter: Adapter) -> tuple[tuple[str, Parameter], tuple[str, Parameter]]:
    return ("lora_A", adapter.lora_A), ("lora_B", adapter.lora_B)
