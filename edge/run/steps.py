"""The steps of a run: what comes between them, and what they come to."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from dlora.edge.files import write_atomically
from dlora.edge.training.metrics import MetricsLog, iterate_metrics
from dlora.edge.training.trainer import Trainer
from dlora.protocol.errors import DloraError, StoppedError
from dlora.protocol.kill_revive import UnitState

from .directory import CHECKPOINTS
from .display import Display
from .file_names import METRICS, SUMMARY
from .guard import Guard, worse_line
from .held_out import HeldOut, is_out_of_patience
from .pause import PauseRules, SystemSensors, wait_while_paused
from .run_file import block_numbers
from .saving import AdapterSaver
from .summary import summary_of
from .train_run import TrainRun
from .watcher import Watchers


class RunSteps:
    """All steps of a run whose trainer is ready for the first.

    Args:
        evaluations: of before a resumption; those to come are appended.
        kept_bytes: as ``AdapterSaver`` has it.
    """

    def __init__(
        self,
        run: TrainRun,
        trainer: Trainer,
        evaluations: list[dict[str, Any]],
        kept_bytes: int | None,
        display: Display,
        should_stop: Callable[[], bool],
    ) -> None:
        self._run, self._config = run, trainer.config
        self._trainer = trainer
        self._display = display
        self._should_stop = should_stop
        self._saver = AdapterSaver(trainer, run.dataset, evaluations, kept_bytes)
        self._watchers = Watchers(run.watchers, display.warn)
        self._held_out = HeldOut(
            run.eval_dataset, evaluations, trainer, self._saver, display, self._watchers, should_stop
        )
        self._guard = Guard(evaluations, has_held_out=run.eval_dataset is not None)

    def run(self, first_step: int, started: float) -> dict[str, Any]:
        """Step, evaluate and save to the end; returns the summary. ``started``: when, by ``time.perf_counter``."""
        total_steps, path = self._config.total_steps, self._run.out / METRICS
        set_up = self._trainer.traffic
        with self._watchers.following(first_step):
            if first_step == 0:
                self._warn_of_dropped_modules()
                self._held_out.add("before")
            with MetricsLog(path, first_step) as log:
                blocks = block_numbers(self._config, self._run.bundle.manifest)
                with self._display.training(total_steps, first_step, self._held_out.count_left, blocks):
                    for metrics in iterate_metrics(path):  # of an earlier start
                        self._display.add_to_map(metrics)
                        self._saver.add(metrics)
                        self._guard.losses.add(metrics.loss)
                    self._run_steps(log, set_up)
            trained_s = time.perf_counter() - started
            return self._finish(first_step, trained_s)

    def _warn_of_dropped_modules(self) -> None:
        """An adapter to start from may have modules in units that are killed from step 0 on."""
        if self._run.init is None:
            return
        adapters, modules = self._trainer.adapters, self._run.init.modules
        killed = {group for unit in adapters.units if unit.state is UnitState.KILLED for group in unit.groups}
        dropped = sum(target.name in modules for group in killed for target in adapters.group_specs[group].targets)
        if dropped:
            self._display.warn(
                f"{dropped} of the {len(modules)} modules of --init-adapter belong to units that are not active: "
                "they are left out, also of what is saved (--active-fraction 1 keeps all)"
            )

    def _run_steps(self, log: MetricsLog, set_up: tuple[int, int]) -> None:
        """Step to the end; save and evaluate on the way. ``set_up``: bytes up and down of before."""
        trainer, display, last = self._trainer, self._display, self._config.total_steps
        sensors = SystemSensors()
        pause = PauseRules.parse(self._config.device.pause_when)
        if warning := pause.warning(sensors):
            display.warn(warning)
        while trainer.next_step < last:
            if self._held_out.is_due() and not self._should_stop():
                # Whoever stops it stops the run, below, with all that is saved there.
                with self._save_on_error(), contextlib.suppress(StoppedError):
                    self._held_out.add(f"at step {trainer.next_step}")
            if reason := self._reason_to_end():
                display.say(f"ended at step {trainer.next_step}{reason}")
                self._save()
                return
            paused = time.perf_counter()
            has_paused = wait_while_paused(
                pause, sensors, say=display.say, should_stop=self._should_stop, on_pause=self._save
            )
            paused_s = time.perf_counter() - paused if has_paused else 0.0
            if self._should_stop():
                self._save()
                out = self._run.out
                raise StoppedError(f"stopped after step {trainer.next_step}; go on with dlora-edge resume {out}")
            with self._save_on_error():
                metrics = trainer.run_step()
            metrics = replace(metrics, paused_s=paused_s, set_up_bytes_up=set_up[0], set_up_bytes_down=set_up[1])
            set_up = (0, 0)
            log.write(metrics)
            self._saver.add(metrics)
            self._guard.losses.add(metrics.loss)
            display.step(metrics)
            self._watchers.step(metrics)
            if trainer.next_step % self._config.saving.save_every == 0 or trainer.next_step == last:
                self._save()

    def _reason_to_end(self) -> str:
        """Why the run ends here, before its last step; empty where it goes on, maybe with a warning."""
        saving, worsening = self._config.saving, self._guard.has_worsened()
        if worsening is not None:
            if saving.on_worse == "stop":
                return f", for --on-worse stop: {worsening}"
            self._display.warn(worse_line(worsening, self._trainer.peak_rate))
        if is_out_of_patience(self._held_out.evaluations, self._config):
            return f": {saving.patience} evaluations in a row were no better"
        return ""

    def _save(self) -> None:
        self._trainer.save_checkpoint(self._run.out / CHECKPOINTS)
        self._saver.save(self._run.out)
        self._watchers.saved()

    @contextlib.contextmanager
    def _save_on_error(self) -> Iterator[None]:
        """Where there is no server, or no more of it, save a checkpoint: that needs none."""
        try:
            yield
        except DloraError:
            if self._trainer.next_step > 0:
                self._trainer.save_checkpoint(self._run.out / CHECKPOINTS)
            raise

    def _finish(self, first_step: int, trained_s: float) -> dict[str, Any]:
        """Evaluate at the end, save the adapter that is to be kept, and sum up."""
        if not self._held_out.is_done():
            self._held_out.add("after")
        self._saver.save(self._run.out)
        worsening, saved_step, keep = self._guard.worsening, self._trainer.next_step, self._config.saving.keep
        if keep == "best" or (keep == "auto" and worsening is not None):
            saved_step = self._held_out.keep_best()
        if worsening is not None:
            self._display.warn(worse_line(worsening, self._trainer.peak_rate))
        live = self._held_out.live_loss(saved_step)
        crossed = self._trainer.side.crossed
        summary = summary_of(self._config, self._trainer.next_step, self._held_out, self._saver.totals) | {
            "first_step": first_step,
            "reconnects": crossed.reconnects,
            "sessions_resumed": crossed.resumed,
            "steps_rerun": self._trainer.steps_rerun,
            "eval_bytes_up": self._held_out.bytes_up,
            "eval_bytes_down": self._held_out.bytes_down,
            "is_worse": worsening is not None,
            "saved_step": saved_step,
            "eval_loss_live": None if live is None else live.loss,
            "is_worse_live": None if live is None else live.is_worse,
            "wall_s": round(trained_s, 3),
        }
        write_atomically(self._run.out / SUMMARY, json.dumps(summary, indent=1).encode() + b"\n")
        return summary
