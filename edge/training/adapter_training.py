"""Forward and backward, and the optimizer's step, of a set of adapters: what a run and a loop of one's own stand on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from dlora.edge.adapters.compatibility import check_passes, load_weights, with_saved_gains
from dlora.edge.adapters.kind import SavedModule
from dlora.edge.adapters.parts import Parts
from dlora.edge.adapters.peft import LoadedAdapter, load_adapter, save_adapter
from dlora.edge.adapters.units import AdapterSet
from dlora.edge.data.batches import MicroBatch
from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.model.ends import LossGradient, finishing
from dlora.edge.model.evaluation import Evaluation, evaluate
from dlora.edge.model.split import SplitModel
from dlora.edge.wire.spans import COMPUTE
from dlora.protocol.adapter_record import TrainingRecord
from dlora.protocol.errors import CheckpointError, DloraError, NonFiniteError
from dlora.protocol.groups import with_gains
from dlora.protocol.kill_revive import UnitState
from dlora.protocol.targets import target_names
from dlora.protocol.tensors import FloatArray

from .checkpoint import Checkpoint, save_checkpoint
from .optimizer import AdamW
from .resolved import Resolved, RunIdentity, check_identity, check_units
from .scores import unit_score
from .selection import target_modules_of
from .side import BasisSteps, MakeSide
from .trainer_state import TrainerState, trainer_state

_SCORES: Final = "unanswered.scores"


@dataclass(frozen=True)
class OptimizerStep:
    """What an optimizer's step was: its learning rate, the gradients' norm before clipping, and how long it took this
    device."""

    learning_rate: float
    grad_norm: float
    seconds: float


class AdapterTraining:
    """Adapters that are trained in steps that somebody else makes.

    Gradients add up from ``forward_backward`` to ``forward_backward`` until ``optim_step`` takes them.

    Args:
        make_side: makes what is otherwise for where the blocks are.
        data: fingerprint of the training data, or what stands for it: a checkpoint goes on with the same.
        init: a PEFT adapter to start from.
        checkpoint: a checkpoint of this very run to go on from, or of its end where ``config.part_begins`` is there.

    ``open`` has to be called before anything is asked of it.

    Attributes:
        groups: the exchange groups that are trained.
        side: where the blocks are; its session, its model; spans: what happens when, where somebody wants to know.
        steps_rerun: how often an exchange was run again, because its session was lost before it was through.
    """

    # Seven parameters: four that a run is made of, where its blocks are, and two that most runs leave out.
    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        make_side: MakeSide,
        config: Resolved,
        data: str,
        *,
        init: LoadedAdapter | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        manifest = bundle.manifest
        self.bundle = bundle
        self.config = config
        self.groups = with_saved_gains(config.groups(manifest), config.adapter.kind, init)
        if checkpoint is not None:
            gains = trainer_state(checkpoint).gains
            self.groups = with_gains(self.groups, lambda name: gains.get(name, 1.0))
        self.adapters = AdapterSet.create(
            config.spec,
            self.groups,
            scaling=config.scaling,
            seed=config.seed,
            unit=config.units.unit,
            kill_every=config.units.kill_every,
            draws_state=config.adapter.basis == "random",
            state_dtype=config.codecs.adapter_state,
        )
        check_units(config.units, len(self.adapters.units))
        if init is not None:
            check_passes(init, config.server.passes)
            load_weights(self.adapters, init, config.invocation)
            for unit in self.adapters.units:
                names = target_names(self.groups[group] for group in unit.groups)
                unit.has_learnt = any(name in init.modules for name in names)
        self.identity = RunIdentity.of(config, manifest, data)
        self.steps_rerun = 0
        # Why the report of the last committed step could not be sent.
        self._failure: DloraError | None = None
        self.side = side = make_side(bundle, engine, self.adapters, config)
        self.session, self.model, self.spans = side.session, side.model, side.spans
        self._recorder = side.recorder
        if self._recorder is not None:
            self._recorder.seed_was_chosen = len(config.seed) == 1
        if checkpoint is not None:
            self._restore(checkpoint)
        self.optimizer = AdamW(engine, config.optimizer, config.steps)

    def begin(self) -> None:
        """Begin, or go on, with sequences of at most ``--max-length`` tokens. Raises as ``open`` does."""
        self.open(self.config.data.max_length)

    def open(
        self,
        longest: int | None,
        basis_steps: BasisSteps | None = None,
        before_group: Callable[[int, int], None] = lambda done, groups: None,
    ) -> None:
        """Begin, or go on.

        Args:
            longest: tokens of the longest sequence that will come; None: not known, each is checked as it comes.
            basis_steps, before_group: as ``Side.open`` takes them.

        Raises for what the server or this device would refuse at an unlucky step hours later.
        """
        self.side.check(longest)
        with self._naming_step():
            self.side.open(basis_steps, before_group)

    @property
    def next_step(self) -> int:
        """The step that comes next, counted over the whole run."""
        return self.config.part_begins + self.session.step

    # -- the verbs -----------------------------------------------------------------------------------------

    def forward_backward(
        self, batches: Sequence[MicroBatch], *, grad_scale: float, gradients: Sequence[LossGradient] = ()
    ) -> list[FloatArray]:
        """Exchange micro-batches and add their gradients to those of this step; a lost session costs all of them,
        which are run again.

        Args:
            grad_scale: what the gradient of the sum of all cross-entropies is multiplied with.
            gradients: of each micro-batch's own loss, in place of that; none is cut then.

        Returns: cross-entropies float32 (labelled,), of each micro-batch, or of each part of one that was cut.

        Raises what ``Connection`` raises, ``NonFiniteError`` where the run diverges, ``DataError`` for an example that
        the server does not take.
        """
        tries = 0
        failures = list[Exception]()
        safe = [finishing(gradient, failures) for gradient in gradients]

        def attempt() -> list[FloatArray]:
            nonlocal tries
            self.steps_rerun += tries > 0
            tries += 1
            forget()
            failures.clear()
            self.record_parameters()
            if gradients:  # each is of its whole micro-batch
                parts = list(batches)
            else:  # anew for each session: another server may take less at once
                parts = [part for batch in batches for part in self.model.cut(batch)]
            losses = self.model.forward_backward(parts, step=self.session.step, grad_scale=grad_scale, gradients=safe)
            if self._recorder is not None:
                named = self.adapters.parameters().items()
                self._recorder.add_gradients({name: parameter.grad for name, parameter in named})
            return losses

        with self._naming_step(), self.all_or_nothing() as forget:
            losses = self.session.run(attempt)
            if failures:
                raise failures[0]
            return losses

    @contextmanager
    def all_or_nothing(self) -> Iterator[Callable[[], None]]:
        """Within, gradients are added; an error takes away all that were, and leaves earlier ones of the step. Gives
        what takes them away, for another try."""
        earlier = [(parameter, parameter.grad) for parameter in self.adapters.parameters().values()]

        def forget() -> None:
            for parameter, grad in earlier:
                parameter.grad = grad

        try:
            yield forget
        except BaseException:
            forget()
            raise

    def optim_step(self, learning_rate: float | None = None) -> OptimizerStep:
        """Step AdamW with the gradients so far, forget them, and report the scores: the step is committed then.

        Where only the report fails, that is raised by what is asked for next.

        ``learning_rate``: None: that of the schedule.

        Raises ``NonFiniteError`` where they are not finite; nothing has changed then.
        """
        with self._naming_step():
            rate = self.optimizer.lr(self.session.step) if learning_rate is None else learning_rate
            started = time.perf_counter()
            scores = self._scores()
            norm = self.optimizer.step(self.adapters, lr=rate)
        seconds = time.perf_counter() - started
        self.spans.add("optimizer", COMPUTE, started, started + seconds)
        self.adapters.zero_grad()
        try:
            # Committed: from here on this step is done, whatever happens to the connection.
            self.session.report(scores)
        except DloraError as error:
            self._failure = error
        return OptimizerStep(rate, norm, seconds)

    def evaluate_batch(self, batch: MicroBatch) -> FloatArray:
        """Cross-entropies float32 (labelled,) of a micro-batch, with the adapters as they are. Raises likewise."""
        with self._naming_step():
            return self.model.evaluate(batch)[0]

    def evaluate(
        self, dataset: Dataset, progress: Callable[[int, int], None] | None = None, *, live: bool = False
    ) -> Evaluation:
        """Loss and accuracy on a data set, with the adapters as they are: in the run's passes, or ``live``. Raises as
        ``forward_backward`` does."""
        asked = self.model.asked_live() if live and isinstance(self.model, SplitModel) else nullcontext()
        with self._naming_step(), asked:
            self.record_parameters()
            return evaluate(self.model, dataset, self.config.training.batch_size, progress)

    def wait_for_signal(self) -> None:
        """Wait for the signal to the last report, so that what is saved now is what the next step starts from."""
        with self._naming_step():
            self.session.wait_for_signal()

    def record_parameters(self) -> None:
        """Put what adapters are now into the recording, where there is one."""
        if self._recorder is not None:
            self._recorder.add_parameters(self.adapters.for_recording())

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
            gains=self.adapters.gains,
        )
        tensors = self.adapters.state()
        if session.unanswered is not None:
            tensors[_SCORES] = session.unanswered
        save_checkpoint(directory, self.next_step, tensors, state)

    def save_adapter(self, directory: Path, training: TrainingRecord | None = None) -> None:
        """Write the units that have an effect as a PEFT adapter; a fading unit's scale is folded into its B.

        ``training``: what is to be said of what it learnt. Raises ``StorageError``, and as ``forward_backward`` does
        where the last signal has not come.
        """
        self.wait_for_signal()
        tensors, config = self.adapters.parts(), self.config
        parts = None
        if tensors:
            parts = Parts(config.adapter.kind, config.adapter.rank, config.scaling, self.adapters.gains, tensors)
        self._save_modules(directory, self._factors(), parts, training)

    def copy_adapter(self, source: Path, directory: Path, **known: Any) -> None:
        """Write an adapter of this run again, elsewhere or there. ``known``: of its ``TrainingRecord``, what is known
        since."""
        loaded = load_adapter(source)
        training = loaded.record.training if loaded.record is not None else None
        if training is not None:
            training = msgspec.structs.replace(training, **known)
        self._save_modules(directory, loaded.modules.values(), loaded.parts, training)

    def take_adapter(self, source: Path) -> bool:
        """Go on with the weights of an adapter of this run; False, and nothing is done, where units have been killed:
        it may be of others than those that take part now."""
        if any(unit.state is not UnitState.ACTIVE for unit in self.adapters.units):
            return False
        load_weights(self.adapters, load_adapter(source), self.config.invocation)
        return True

    # -- inside ------------------------------------------------------------------------------------------

    def _factors(self) -> Iterator[SavedModule]:
        """What has an effect, a group at a time."""
        for index, group in enumerate(self.adapters.groups):
            scale = np.float32(self.adapters.scale(index))
            for module in group.factors() if scale > 0 else ():
                yield replace(module, lora_B=module.lora_B * scale) if scale < 1 else module

    def _save_modules(
        self, directory: Path, modules: Iterable[SavedModule], parts: Parts | None, training: TrainingRecord | None
    ) -> None:
        config, manifest = self.config, self.bundle.manifest
        asked = target_modules_of(config.adapter.target_modules or None) or manifest.defaults.target_modules
        save_adapter(
            directory,
            modules,
            r=config.adapter.rank,
            lora_alpha=config.adapter.alpha,
            base_model_name=manifest.base_model.name,
            target_modules=asked,
            fan_in_fan_out=manifest.base_model.architecture == "gpt2",
            parts=parts,
            invocation=config.invocation,
            base_fingerprint=manifest.base_model.fingerprint,
            base_weight_format=manifest.base_model.weight_format,
            training=training,
        )

    @contextmanager
    def _naming_step(self) -> Iterator[None]:
        """Raise first what the last report failed with; within, an error names the step."""
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except NonFiniteError as error:
            if not self.next_step:
                raise NonFiniteError(
                    f"step 0 failed, and nothing was learnt yet: {error}; the weights of bundle or server, or the "
                    f"adapter that it begins with, are damaged: try dlora-edge selftest --bundle {self.bundle.path}"
                ) from None
            than = "" if self.config.optimizer.lr is None else f" than {self.config.optimizer.lr:g}"
            raise NonFiniteError(
                f"training diverged at step {self.next_step}: {error}; start anew in another --out with a lower --lr"
                f"{than}: this run would diverge again"
            ) from None

    def _scores(self) -> FloatArray:
        """One a unit, before AdamW steps, 0 for units that are not trained; in the first step, what the basis pass says
        of each, where that is what units are scored by."""
        scores = np.zeros(len(self.adapters.units), np.float64)
        has_norms = all(group.first_gradient_norm for group in self.adapters.groups)
        takes_norms = self.next_step == 0 and has_norms and self.config.units.score == "grad"
        for index, unit in enumerate(self.adapters.units):
            groups = list(self.adapters.of_unit(unit))
            if takes_norms:
                scores[index] = self.adapters.scaling * math.hypot(*(group.first_gradient_norm for group in groups))
            elif unit.state is UnitState.ACTIVE:
                scores[index] = unit_score(self.config.units.score, groups)
        # A weight may be finite whose square is not.
        return np.clip(scores, None, np.finfo(np.float32).max).astype(np.float32)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = trainer_state(checkpoint)
        check_identity(self.identity, state.run)
        begins_here = self.config.part_begins == state.run.total_steps
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
