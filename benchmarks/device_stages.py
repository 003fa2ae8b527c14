"""A child of device.py: what one training run takes in memory, stage by stage.

It does what ``dlora-edge train`` does, in the same order, and looks at itself after each stage. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
import threading
import time
from pathlib import Path
from typing import Any

STATUS, ROLLUP, CLEAR = (Path("/proc/self") / name for name in ("status", "smaps_rollup", "clear_refs"))
SAMPLE_S = 0.002


class Memory:
    """This process's memory, in MB of 10**6 bytes.

    Anonymous pages are the process's own. File pages are what is mapped of weights and libraries: the system's page
    cache, which it can take back.
    """

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []
        self.highest: dict[str, float] = {"rss_mb": 0.0}
        threading.Thread(target=self._sample, daemon=True).start()

    def stage(self, name: str) -> None:
        """What is there now, and the peak since the last stage."""
        peak_mb = _status_mb("VmHWM")
        self.stages.append({"stage": name, **_now(), "pss_mb": _pss_mb(), "peak_mb": peak_mb})
        CLEAR.write_text("5")  # the peak begins anew

    def _sample(self) -> None:
        while True:
            now = _now()
            if now["rss_mb"] > self.highest["rss_mb"]:
                self.highest = now
            time.sleep(SAMPLE_S)


def _now() -> dict[str, float]:
    text = STATUS.read_text()
    return {
        "rss_mb": _field_mb(text, "VmRSS"),
        "anonymous_mb": _field_mb(text, "RssAnon"),
        "file_mb": _field_mb(text, "RssFile"),
    }


def _status_mb(name: str) -> float:
    return _field_mb(STATUS.read_text(), name)


def _pss_mb() -> float:
    return _field_mb(ROLLUP.read_text(), "Pss")


def _field_mb(text: str, name: str) -> float:
    return round(int(text.split(f"{name}:", 1)[1].split("kB", 1)[0]) * 1024 / 1e6, 1)


def main() -> None:
    """Train as the command does."""
    memory = Memory()
    options = _options()
    memory.stage("python")

    # As the command imports them, and when.
    importlib.import_module("dlora.edge.commands.app")
    from dlora.edge.data.loading import Reading, load_datasets
    from dlora.edge.data.read_settings import ReadSettings
    from dlora.edge.engine.bundle import Bundle
    from dlora.edge.run.display import Display
    from dlora.edge.settings import Settings
    from dlora.edge.training.metrics import StepMetrics
    from dlora.edge.training.resolve import resolve

    memory.stage("imports")
    bundle = Bundle.open(options.bundle)
    memory.stage("bundle opened")
    how = ReadSettings(max_length=options.tokens // 2, too_long="truncate")
    (dataset,) = load_datasets(Reading(bundle, [options.data], how))
    memory.stage("data read, by a child")
    from dlora.edge.run.run import TrainRun, train

    memory.stage("engine imported")

    class Observer(Display):
        def step(self, metrics: StepMetrics) -> None:
            super().step(metrics)
            memory.stage(f"step {metrics.step}")

    settings = Settings.of(
        kind="lora", lr=1e-3, seed=0, steps=options.steps, batch_size=2, server=options.server, out=options.out,
        threads=options.threads,
    )  # fmt: skip
    config, (dataset,) = resolve(settings, bundle.manifest, None, [dataset])
    run = TrainRun(bundle, config, dataset)
    summary = train(run, Observer())
    memory.stage("end")
    steps = [stage for stage in memory.stages if stage["stage"].startswith("step ")]
    stages = [stage for stage in memory.stages if stage not in steps]
    # Of the steps: the first, and of all others the one with the highest peak.
    steady = max(steps[1:], key=lambda stage: stage["peak_mb"])
    stages[-1:-1] = [steps[0] | {"stage": "first step"}, steady | {"stage": "steady state"}]
    result = {
        "tokens_per_step": summary["tokens"] / options.steps,
        "labelled_per_step": summary["labelled"] / options.steps,
        "peak_mb": max(stage["peak_mb"] for stage in memory.stages),
        "at_peak": memory.highest | {"file_share": round(memory.highest["file_mb"] / memory.highest["rss_mb"], 3)},
        "stages": stages,
    }
    print(json.dumps(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--server", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
