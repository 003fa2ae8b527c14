"""The settings of a training run, and what a checkpoint must agree with to go on."""

from __future__ import annotations

import hashlib

import msgspec

from dlora.protocol.kill_revive import KillReviveConfig
from dlora.protocol.manifest import Manifest
from dlora.protocol.tensors import WireDtype

from .optimizer import OptimizerConfig


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings that change a run's bits.

    Attributes:
        total_steps: optimizer steps of the whole run.
        batch_size: sequences of a micro-batch; grad_accum: micro-batches of a step.
        seed: of adapter initialisation, data order and kill-and-revive's draws.
    """

    total_steps: int
    batch_size: int
    grad_accum: int
    seed: int
    rank: int
    lora_alpha: float
    wire_dtype: WireDtype
    optimizer: OptimizerConfig
    kill_revive: KillReviveConfig

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.rank


def run_digest(config: TrainConfig, manifest: Manifest, data_fingerprint: str) -> str:
    """What a run is: settings, target modules, base model, head and data. A checkpoint goes on only with the same."""
    base, head = manifest.base_model.fingerprint, manifest.head.dtype
    whole = msgspec.json.encode((config, manifest.groups, base, head, data_fingerprint), order="deterministic")
    return hashlib.sha256(whole).hexdigest()
