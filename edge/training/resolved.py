"""A run's settings with nothing left open, and what a checkpoint must agree with to go on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

import msgspec

from dlora.edge.seeds import Seed
from dlora.edge.settings import Adapter, Optimizer, Server, Settings, fields_of
from dlora.protocol.adapter_record import Setting
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.choices import KindChoice
from dlora.protocol.errors import CheckpointError, UsageError
from dlora.protocol.groups import GroupSpec, without_gains
from dlora.protocol.kill_revive import KillReviveConfig
from dlora.protocol.limits import MAX_WINDOW
from dlora.protocol.manifest import Manifest
from dlora.protocol.passes import Passes
from dlora.protocol.targets import choose_groups, number_ranges
from dlora.protocol.wire_codecs import Codecs

from .selection import parse_blocks, target_modules_of


class ChosenAdapter(Adapter, frozen=True, kw_only=True):
    """With nothing left open. ``basis`` is None where the server makes no A and B, ``basis_steps`` where no data do."""

    kind: KindChoice
    rank: int
    alpha: float
    target_modules: str


class ChosenOptimizer(Optimizer, frozen=True, kw_only=True):
    """With nothing left open but the rate, which a run finds before its first step."""

    weight_decay: float = 0.0

    def warmup_steps(self, total_steps: int) -> int:
        """Steps of warm-up in a run of ``total_steps``."""
        return round(self.warmup * total_steps) if self.warmup < 1 else round(self.warmup)


class ChosenServer(Server, frozen=True, kw_only=True):
    """With the precision chosen, and how the adapters are asked."""

    wire_dtype: str = "fp16"
    passes: str = "live"


class Resolved(Settings, frozen=True, kw_only=True):
    """All settings of a run, chosen once; and what they come to for its model and its data.

    Attributes:
        units: of ``kill_revive``, as it crosses.
        device_blocks: how many of the last blocks run on the device, of ``blocks``.
        total_steps: optimizer steps of the whole run.
        part_begins: where this part of it begins: 0, or the end of a run that was made longer. Schedules, and Kill and
            Revive, begin anew there.
        seed: of adapter initialisation and data order; empty: to be drawn when the run begins.
        invocation: the tokens from which on adapters act, as PEFT's activated LoRA has them; none: they act everywhere.
        keeps_outputs: whether what the device's blocks compute alike again and again is kept: what comes out of the
            lowest ones while they are not trained, or keys and values of what comes before answers.
        keeps_reads: whether what groups read in the base pass is kept, in passes. It changes no bit.
        evaluate_every: steps between evaluations; 0: before and after only.
    """

    adapter: ChosenAdapter
    optimizer: ChosenOptimizer = ChosenOptimizer()
    server: ChosenServer = ChosenServer()
    units: KillReviveConfig = KillReviveConfig()
    blocks: int
    device_blocks: int = 0
    total_steps: int
    part_begins: int = 0
    seed: Seed = ()
    invocation: tuple[int, ...] = ()
    keeps_outputs: bool = False
    keeps_reads: bool = False
    evaluate_every: int = 0

    @property
    def needs_server(self) -> bool:
        """Whether some block is not on the device."""
        return self.device_blocks < self.blocks

    @property
    def asks_once(self) -> bool:
        """Whether the server is asked once for each text, and not in every step."""
        return 0 < self.device_blocks < self.blocks

    @property
    def spec(self) -> AdapterSpec:
        """The adapters of every exchange group."""
        return AdapterSpec(kind=self.adapter.kind, r=self.adapter.rank)

    @property
    def scaling(self) -> float:
        return self.adapter.alpha / self.adapter.rank

    @property
    def codecs(self) -> Codecs:
        """How tensors cross. Raises ``UsageError``."""
        return Codecs.parse(self.server.wire_dtype)

    @property
    def passes(self) -> Passes | None:
        """How groups are asked; None: live."""
        return Passes.parse(self.server.passes)

    @property
    def window(self) -> int:
        """How many micro-batches may be under way at a time, where the server allows as many."""
        asked = self.server.window
        return min(self.training.grad_accum, MAX_WINDOW) if asked == "auto" else int(asked)

    def groups(self, manifest: Manifest) -> tuple[GroupSpec, ...]:
        """The exchange groups that are trained. Raises ``UsageError`` where the bundle has no such module or block."""
        names = target_modules_of(self.adapter.target_modules or None)
        return choose_groups(manifest, names, parse_blocks(self.adapter.blocks, manifest))

    @property
    def steps(self) -> int:
        """Steps of this part of the run."""
        return self.total_steps - self.part_begins

    @property
    def examples_a_step(self) -> int:
        return self.training.batch_size * self.training.grad_accum

    def basis_pass_steps(self, examples: int) -> int:
        """How many steps' data a basis is made from, of a data set of so many examples: never one twice."""
        return min(self.adapter.basis_steps or 0, self.steps, -(-examples // self.examples_a_step))

    def with_rate(self, lr: float | None) -> Resolved:
        """These with another learning rate."""
        return msgspec.structs.replace(self, optimizer=msgspec.structs.replace(self.optimizer, lr=lr))

    def as_settings(self) -> Settings:
        """As ``run.json`` keeps them: what was chosen in place of what was left open."""
        return Settings(**{name: getattr(self, name) for name in Settings.__struct_fields__})

    def recipe(self, manifest: Manifest) -> dict[str, Setting]:
        """The fields that make an adapter what it is, by the names of their options; no seed, for it stays here."""
        found: dict[str, Setting] = {"device_blocks": self.device_blocks} if self.device_blocks else {}
        for field in fields_of():
            value = field.value_in(self)
            is_off = field.section == "kill_revive" and self.kill_revive.active_fraction == 1
            if field.makes_bits and value is not None and not is_off:
                found[field.parameter] = value
        blocks = number_ranges({group.block for group in self.groups(manifest)})
        return {**found, "target_modules": self.adapter.target_modules, "blocks": blocks, "steps": self.total_steps}


def check_units(config: KillReviveConfig, units: int) -> None:
    """Raise ``UsageError`` where the settings cannot work for ``units`` units, or would train none of them."""
    config.check(units)
    if not config.budget_floor(units):
        raise UsageError("no unit would be trained: name some with --static-units, or raise --active-fraction")


def continued(config: Resolved, before: RunIdentity, next_step: int, out: Path) -> Resolved:
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
    if config.optimizer.lr is None:
        config = config.with_rate(before.settings["optimizer.lr"])
    return msgspec.structs.replace(
        config, seed=config.seed or before.seed, keeps_outputs=before.keeps_outputs, part_begins=part_begins
    )


class RunIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a run's bits. A checkpoint goes on only with the same.

    Attributes:
        settings: the fields that do so, by ``section.key``.
        base_model: fingerprint; head: how the LM head is stored; embedding, block_dtype: likewise the table and the
            device's blocks.
        groups: SHA-256 of the exchange groups that are trained, whatever words the settings have for them; without
            their gains, which a checkpoint has.
        data: fingerprint of the training data.
        the others: as ``Resolved`` has them.
    """

    settings: dict[str, Any]
    units: KillReviveConfig
    device_blocks: int
    total_steps: int
    part_begins: int
    seed: Seed
    invocation: tuple[int, ...]
    keeps_outputs: bool
    base_model: str
    head: str
    embedding: str
    block_dtype: str
    groups: str
    data: str

    @classmethod
    def of(cls, config: Resolved, manifest: Manifest, data: str) -> RunIdentity:
        modules = without_gains(config.groups(manifest))
        return cls(
            settings={field.path: field.value_in(config) for field in fields_of() if field.makes_bits},
            base_model=manifest.base_model.fingerprint,
            head=manifest.head.dtype,
            embedding=manifest.embedding.dtype,
            block_dtype=manifest.device_blocks.dtype if config.device_blocks and manifest.device_blocks else "",
            groups=hashlib.sha256(msgspec.json.encode(modules, order="deterministic")).hexdigest(),
            data=data,
            **{name: getattr(config, name) for name in _AS_RESOLVED},
        )

    def differences(self, other: RunIdentity) -> list[str]:
        """What ``other`` has otherwise, for people: the option, what it is here and what it is there."""
        mine, theirs = self._flat(), other._flat()
        differ = [name for name in mine if mine[name] != theirs[name]]
        if "groups" in differ:
            differ = [name for name in differ if name not in ("units.pinned", "units.static")]
        if any(field.path in differ for field in fields_of() if field.key in _MODULES):
            differ.remove("groups")
        if "units.pinned" in differ or "kill_revive.active_fraction" in differ:
            differ = [name for name in differ if name != "units.static"]
        words = {field.path: field.words for field in fields_of()} | _WORDS
        return [
            _WHOLE.get(name) or f"{words[name]} {_shown(name, mine[name])}, not {_shown(name, theirs[name])}"
            for name in differ
            if name in _WHOLE or name in words
        ]

    def _flat(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.to_builtins(self)
        units = {f"units.{name}": value for name, value in found.pop("units").items()}
        return {**found.pop("settings"), **units, **found}


def check_identity(mine: RunIdentity, theirs: RunIdentity, out: Path = Path("DIRECTORY")) -> None:
    """Raise ``CheckpointError``, naming what differs, unless ``mine`` goes on with the run ``theirs``, or after it."""
    if mine.part_begins == theirs.total_steps:
        theirs = msgspec.structs.replace(theirs, part_begins=mine.part_begins, total_steps=mine.total_steps)
    if mine.groups == theirs.groups:  # the same modules, perhaps in other words
        words = {path: value for path, value in mine.settings.items() if path.partition(".")[2] in _MODULES}
        theirs = msgspec.structs.replace(theirs, settings={**theirs.settings, **words})
    if mine._flat() != theirs._flat():
        raise CheckpointError(
            f"the run that the checkpoint is of has {'; '.join(theirs.differences(mine))}. Go on with the same: "
            f"dlora-edge resume {out}; or start anew in another --out"
        )


_AS_RESOLVED: Final = (
    "units",
    "device_blocks",
    "total_steps",
    "part_begins",
    "seed",
    "invocation",
    "keeps_outputs",
)
_MODULES: Final = ("target_modules", "blocks")  # words for what ``groups`` is the digest of
# Digests say nothing to people.
_WHOLE: Final = {
    "seed": "another --seed",  # and it stays untold
    # Counted among the units that are trained, which are not the numbers that the user gave.
    "units.pinned": "another --pin",
    "units.static": "another --static-units",
    "base_model": "another base model",
    "groups": "other target modules (--target-modules, --blocks; or another default in --bundle)",
    "data": "other training data (--data, --max-length, --too-long)",
    "invocation": "other tokens from which on adapters act (--active-from)",
}
_WORDS: Final = {
    "head": "the bundle's head is",
    "embedding": "the bundle's embedding is",
    "block_dtype": "the bundle's blocks are",
    "total_steps": "--steps (or what --epochs came to)",
    "device_blocks": "--device-blocks",
    "part_begins": "a part that begins at step",
    "keeps_outputs": "--cache-mb: outputs kept",
}


def _shown(name: str, value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "(none)"
    return str(value) or "(all)"
