"""The settings of a training run, and what a checkpoint must agree with to go on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

import msgspec

from dlora.edge.choices import RunMode
from dlora.edge.seeds import Seed
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.choices import Basis, Send
from dlora.protocol.errors import CheckpointError, UsageError
from dlora.protocol.groups import GroupSpec, without_gains
from dlora.protocol.kill_revive import KillReviveConfig
from dlora.protocol.manifest import Manifest
from dlora.protocol.targets import choose_groups
from dlora.protocol.wire_codecs import Codecs

from .optimizer import OptimizerConfig


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings that change a run's bits.

    Attributes:
        mode: where the base model's blocks run; device_blocks: how many of the last ones on the device.
        exact: whether the server runs each text by itself.
        holds_outputs: whether what comes out of the lowest of these is kept while they are not trained.
        total_steps: optimizer steps of the whole run.
        part_begins: where this part of it begins: 0, or the end of a run that was made longer. Schedules, and Kill and
            Revive, begin anew there.
        batch_size: sequences of a micro-batch; grad_accum: micro-batches of a step.
        kind: of the adapters, a name of ``dlora.protocol.adapters.KINDS``.
        basis: what a server makes its part of them from; basis_steps: how many steps' data it takes for ``data``.
        invocation: the tokens from which on adapters act, as PEFT's activated LoRA has them; none: they act everywhere.
        seed: of adapter initialisation and data order; empty: to be drawn when the run begins.
        wire_dtype: as ``Codecs.parse`` reads it; evaluations cross as ``for_evaluation`` says.
        send: what a micro-batch begins with on the wire.
        target_modules, blocks: which modules get adapters, as ``choose_groups`` reads them; empty: the bundle's
            default, and all blocks.
    """

    mode: RunMode = "split"
    device_blocks: int = 0
    exact: bool = False
    holds_outputs: bool = False
    total_steps: int
    part_begins: int = 0
    batch_size: int
    grad_accum: int
    seed: Seed
    kind: str = "lora"
    basis: Basis = "data"
    basis_steps: int = 8
    invocation: tuple[int, ...] = ()
    rank: int
    lora_alpha: float
    target_modules: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    wire_dtype: str
    send: Send = "embeddings"
    optimizer: OptimizerConfig
    kill_revive: KillReviveConfig

    @property
    def adapter(self) -> AdapterSpec:
        """The adapters of every exchange group."""
        return AdapterSpec(kind=self.kind, r=self.rank)

    @property
    def codecs(self) -> Codecs:
        """How tensors cross. Raises ``UsageError``."""
        return Codecs.parse(self.wire_dtype)

    def basis_pass_steps(self, examples: int) -> int:
        """How many steps' data a basis is made from, of a data set of so many examples: never one twice."""
        return min(self.basis_steps, self.steps, -(-examples // (self.batch_size * self.grad_accum)))

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.rank

    def groups(self, manifest: Manifest) -> tuple[GroupSpec, ...]:
        """The exchange groups that are trained. Raises ``UsageError`` where the bundle has no such module or block."""
        return choose_groups(manifest, self.target_modules, self.blocks)

    @property
    def steps(self) -> int:
        """Steps of this part of the run."""
        return self.total_steps - self.part_begins


def check_units(config: KillReviveConfig, units: int) -> None:
    """Raise ``UsageError`` where the settings cannot work for ``units`` units, or would train none of them."""
    config.check(units)
    if not config.budget_floor(units):
        raise UsageError("no unit would be trained: name some with --static-units, or raise --active-fraction")


def continued_config(config: TrainConfig, before: TrainConfig, next_step: int, out: Path) -> TrainConfig:
    """``config`` for the run in ``out``, of ``before``, that goes on at ``next_step``.

    What the user left open is as it was. A finished run that is to have more steps begins a new part at its end.
    Raises ``UsageError`` where one that is not finished is to be made longer.
    """
    part_begins = before.part_begins
    if config.total_steps > before.total_steps:
        if next_step < before.total_steps:
            raise UsageError(
                f"this run is at step {next_step:,} of {before.total_steps:,}, and only a finished one can be made "
                f"longer; finish it first: dlora-edge resume {out} --steps {before.total_steps}, with a larger "
                "--patience where that ended it"
            )
        part_begins = before.total_steps
    optimizer = config.optimizer
    if optimizer.lr is None:
        optimizer = msgspec.structs.replace(optimizer, lr=before.optimizer.lr)
    return msgspec.structs.replace(
        config,
        seed=config.seed or before.seed,
        holds_outputs=before.holds_outputs,
        part_begins=part_begins,
        optimizer=optimizer,
    )


class RunIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a run's bits. A checkpoint goes on only with the same.

    Attributes:
        base_model: fingerprint; head: how the LM head is stored; block_dtype: likewise the device's blocks.
        groups: SHA-256 of the exchange groups that are trained, whatever words ``config`` has for them; without their
            gains, which a checkpoint has.
        data: fingerprint of the training data.
    """

    config: TrainConfig
    base_model: str
    head: str
    block_dtype: str = ""
    groups: str
    data: str

    @classmethod
    def of(cls, config: TrainConfig, manifest: Manifest, data: str) -> RunIdentity:
        modules = without_gains(config.groups(manifest))
        groups = hashlib.sha256(msgspec.json.encode(modules, order="deterministic")).hexdigest()
        return cls(
            config=config,
            base_model=manifest.base_model.fingerprint,
            head=manifest.head.dtype,
            block_dtype=manifest.device_blocks.dtype if config.device_blocks and manifest.device_blocks else "",
            groups=groups,
            data=data,
        )

    def differences(self, other: RunIdentity) -> list[str]:
        """What ``other`` has otherwise, for people: the option, what it is here and what it is there."""
        mine, theirs = _flat(msgspec.to_builtins(self)), _flat(msgspec.to_builtins(other))
        differ = [name for name in mine if mine[name] != theirs[name]]
        if "groups" in differ:
            differ = [name for name in differ if name not in _UNITS]
        if not _WORDS.isdisjoint(differ):
            differ.remove("groups")
        if not _LEADS_TO_STATIC.isdisjoint(differ):
            differ = [name for name in differ if name != "config.kill_revive.static"]
        return [
            _WHOLE.get(name) or f"{_option(name)} {_shown(name, mine[name])}, not {_shown(name, theirs[name])}"
            for name in differ
        ]


def check_identity(mine: RunIdentity, theirs: RunIdentity, out: Path = Path("DIRECTORY")) -> None:
    """Raise ``CheckpointError``, naming what differs, unless ``mine`` goes on with the run ``theirs``, or after it."""
    if mine.config.part_begins == theirs.config.total_steps:
        ends = {"part_begins": mine.config.part_begins, "total_steps": mine.config.total_steps}
        theirs = msgspec.structs.replace(theirs, config=msgspec.structs.replace(theirs.config, **ends))
    if mine.groups == theirs.groups:  # the same modules, perhaps in other words
        words = {"target_modules": mine.config.target_modules, "blocks": mine.config.blocks}
        theirs = msgspec.structs.replace(theirs, config=msgspec.structs.replace(theirs.config, **words))
    if mine != theirs:
        raise CheckpointError(
            f"the run that the checkpoint is of has {'; '.join(theirs.differences(mine))}. Go on with the same: "
            f"dlora-edge resume {out}; or start anew in another --out"
        )


_WORDS: Final = frozenset({"config.target_modules", "config.blocks"})  # for what ``groups`` is the digest of
_LEADS_TO_STATIC: Final = frozenset({"config.kill_revive.pinned", "config.kill_revive.active_fraction"})
_UNITS: Final = frozenset({"config.kill_revive.pinned", "config.kill_revive.static"})  # which ones depends on groups
# Digests say nothing to people.
_WHOLE: Final = {
    "config.seed": "another --seed",  # and it stays untold
    # Counted among the units that are trained, which are not the numbers that the user gave.
    "config.kill_revive.pinned": "another --pin",
    "config.kill_revive.static": "another --static-units",
    "base_model": "another base model",
    "groups": "other target modules (--target-modules, --blocks; or another default in --bundle)",
    "data": "other training data (--data, --max-length, --too-long)",
}
_OPTIONS: Final = {
    "head": "the bundle's head is",
    "block_dtype": "the bundle's blocks are",
    "config.total_steps": "--steps (or what --epochs came to)",
    "config.lora_alpha": "--alpha",
    "config.kill_revive.active_fraction": "--active-fraction",
}
_OPEN: Final = {"config.target_modules": "(the bundle's)", "config.blocks": "(all)"}


def _option(name: str) -> str:
    """The command line's name of a setting."""
    if name in _OPTIONS:
        return _OPTIONS[name]
    path, _, last = name.rpartition(".")
    prefix = "kr-" if path.endswith("kill_revive") else ""
    return f"--{prefix}{last.replace('_', '-')}"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _shown(name: str, value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or _OPEN.get(name, "(none)")
    return str(value)
