"""A kind of adapter that the product does not know: added here by its three registries, and by nothing else.

The server projects a group's input on three columns and expands three numbers again; what it keeps of a group is drawn
at random, so that nobody can make it a second time. The device holds a 3×3 matrix. Every second token crosses.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from drawn import one_in
from families import VOCABULARY
from serving import config, random_dataset, serving
from tiny import TinyFactory
from torch import Tensor
from training_runs import BLOCKS, FROM_LOST, Change, Leaves, Runs, assert_gradients_are_torchs, bits, lose_sessions
from waiting import eventually

from dlora.cloud.admission.ledger import QuotaLimits
from dlora.cloud.admission.quotas import SessionQuota
from dlora.cloud.exchange.kept_tensor import KeptTensor
from dlora.cloud.exchange.kinds import SITE_KINDS
from dlora.cloud.model.base_model import BaseModel
from dlora.edge.adapters.kind import GroupAdapters, LoadGraph, Parameter, SavedModule
from dlora.edge.adapters.units import DEVICE_KINDS
from dlora.edge.data import batches
from dlora.edge.data.examples import Dataset, Example
from dlora.edge.model.session import ModelSession
from dlora.edge.training.checkpoint import load_latest
from dlora.edge.training.expected import set_up_mb
from dlora.edge.training.resolved import Resolved
from dlora.edge.wire.connection import Connection
from dlora.protocol.adapters import KINDS, AdapterSpec, Crossing, kind_of
from dlora.protocol.errors import CheckpointError, NonFiniteError
from dlora.protocol.groups import GroupSpec
from dlora.protocol.manifest import load_manifest
from dlora.protocol.tensors import FloatArray, IntArray
from dlora.protocol.traffic import Traffic, adapter_state_traffic

COLUMNS = 3


# -- one file a side ---------------------------------------------------------------------------------------


class CoreKind:
    """For both sides: widths and shapes."""

    name = "core"
    server_makes_state = True

    def crossing(self, spec: AdapterSpec, group: GroupSpec) -> Crossing:
        return Crossing(COLUMNS, (COLUMNS,))

    def parameter_shapes(self, spec: AdapterSpec, group: GroupSpec) -> dict[str, tuple[int, ...]]:
        return {f"{group.targets[0].name}.core": (COLUMNS, COLUMNS)}

    def state_shapes(self, spec: AdapterSpec, group: GroupSpec) -> tuple[tuple[int, ...], ...]:
        return (group.in_features, COLUMNS), (COLUMNS, group.out_features)


@dataclass
class CoreSite:
    project_on: Tensor
    expand_by: Tensor
    widths: tuple[int, ...]

    def project(self, x: Tensor) -> Tensor:
        return x @ self.project_on

    def expand(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return (outputs[0] @ self.expand_by).split(self.widths, dim=-1)


class ServersCore:
    """For the server; ``made`` counts how many groups' state it has drawn."""

    def __init__(self) -> None:
        self.made = 0

    def make_state(self, spec: AdapterSpec, group: GroupSpec, *_: object) -> tuple[list[Tensor], float]:
        self.made += 1
        shapes = kind_of(spec).state_shapes(spec, group)
        return [torch.randn(shape) / shape[0] ** 0.5 for shape in shapes], 0.0

    def __call__(self, group: GroupSpec, state: Sequence[KeptTensor]) -> CoreSite:
        project_on, expand_by = (kept.values() for kept in state)
        return CoreSite(project_on, expand_by, tuple(target.out_features for target in group.targets))


class CoreGroup(GroupAdapters):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.core = Parameter.of(np.zeros((COLUMNS, COLUMNS), np.float32))

    @classmethod
    def create(cls, spec: AdapterSpec, group: GroupSpec, *, scaling: float, random: np.random.Generator) -> Self:
        return cls(group.targets[0].name)

    def parameters(self) -> dict[str, Parameter]:
        return {f"{self.name}.core": self.core}

    def load_graphs(self, load: LoadGraph) -> None:
        pass

    def forward(self, x: FloatArray, scale: float) -> tuple[list[FloatArray], None]:
        return [np.float32(scale) * (x @ self.core.value.T)], None

    def input_grad(self, grads: Sequence[FloatArray], scale: float) -> tuple[FloatArray, None]:
        return np.float32(scale) * (grads[0] @ self.core.value), None

    def weight_grads(
        self, x: FloatArray, forward: Any, grads: Sequence[FloatArray], backward: Any, scale: float
    ) -> dict[str, FloatArray]:
        return {f"{self.name}.core": np.float32(scale) * (grads[0].T @ x)}

    def given_to_server(self) -> list[FloatArray]:
        raise NotImplementedError

    def factors(self) -> list[SavedModule]:
        project_on, expand_by = self.adapter_state_values()
        return [SavedModule(self.name, self.core.value @ project_on.T, expand_by.T.copy())]

    def load_factors(self, modules: Mapping[str, SavedModule], scaling: Mapping[str, float]) -> None:
        raise CheckpointError("a core starts from nothing")


def every_second_row(examples: Sequence[Example], starts: IntArray) -> IntArray:
    return np.arange(0, sum(len(each.ids) for each in examples), 2, dtype=np.int32)


# -- the tests ---------------------------------------------------------------------------------------------


@pytest.fixture
def servers_core(monkeypatch: pytest.MonkeyPatch) -> ServersCore:
    torch.manual_seed(3)
    made = ServersCore()
    monkeypatch.setitem(KINDS, "core", CoreKind())
    monkeypatch.setitem(SITE_KINDS, "core", made)
    monkeypatch.setitem(DEVICE_KINDS, "core", CoreGroup)
    monkeypatch.setattr(batches, "_crossing_positions", every_second_row)
    return made


@pytest.fixture(scope="module")
def runs(tiny: TinyFactory) -> Iterator[Runs]:
    with Runs.of(tiny) as made:
        yield made


def run_of_cores(**changes: Any) -> Resolved:
    return config(kind="core", basis="weights", rank=COLUMNS, **{"optimizer": {"lr": 0.5}, **changes})


KILLING = {
    "active_fraction": 0.5, "on_kill": "fade", "warmup_steps": 2, "warmup_fraction": 0.0, "ramp_fraction": 0.3,
    "kill_every": 2, "revive_every": 2, "probation": 1,
}  # fmt: skip


@pytest.mark.usefixtures("servers_core")
def test_gradients_are_those_of_the_whole_model_in_torch(runs: Runs) -> None:
    with runs.train(run_of_cores(batch_size=1)) as trainer:
        random = np.random.default_rng(0)
        for parameter in trainer.adapters.parameters().values():
            parameter.value = random.normal(0, 0.5, parameter.value.shape).astype(np.float32)
        assert_gradients_are_torchs(trainer, changes_of_cores)


def changes_of_cores(group: GroupAdapters, spec: GroupSpec, leaves: Leaves) -> list[Change]:
    project_on, expand_by = (torch.from_numpy(np.array(tensor)) for tensor in group.adapter_state_values())
    core = leaves[f"{group.name}.core"]

    def change(expand: Tensor) -> Change:
        return lambda x: (torch.arange(x.shape[-2]) % 2 == 0)[:, None] * (x @ project_on @ core.T @ expand)

    parts = expand_by.split([target.out_features for target in spec.targets], dim=-1)
    return [change(part * target.gain) for part, target in zip(parts, spec.targets, strict=True)]


def test_core_kind_learns_with_kill_and_revive(runs: Runs, servers_core: ServersCore) -> None:
    dataset = Dataset.of([([3 + index] * 6, [2, 3, 4]) for index in range(6)])
    with runs.train(run_of_cores(total_steps=12), dataset) as trainer:
        losses = [trainer.run_step().loss for _ in range(12)]
    with runs.train(run_of_cores(total_steps=24, kill_revive=KILLING), dataset) as trainer:
        units = [trainer.run_step().units for _ in range(24)]
    assert losses[-1] < 0.9 * losses[0]
    assert servers_core.made == 2 * BLOCKS
    history = list(itertools.pairwise(units))
    assert any(before[unit] == "1" != after[unit] for before, after in history for unit in range(BLOCKS)), "killed"
    assert any(before[unit] == "0" and after[unit] == "1" for before, after in history for unit in range(BLOCKS))


@pytest.mark.parametrize("kill_revive", [{}, KILLING], ids=["all", "killing"])
@pytest.mark.parametrize("after", one_in(3, range(1, 7)))
def test_lost_server_changes_no_bit(
    runs: Runs, servers_core: ServersCore, kill_revive: dict[str, Any], after: int
) -> None:
    """Another server has another draw, and gets the first one's back."""
    run, found = run_of_cores(total_steps=8, kill_revive=kill_revive), []
    for lost_after in (None, after):
        torch.manual_seed(3)
        found.append(runs.steps(run, 8, lost_after))
    assert found[0] == found[1]
    assert servers_core.made == 2 * BLOCKS, "made once a run, never again"


def test_checkpoint_resumes_at_another_server(
    tiny: TinyFactory, runs: Runs, servers_core: ServersCore, tmp_path: Path
) -> None:
    run = run_of_cores(total_steps=8, kill_revive=KILLING)
    with runs.train(run) as trainer:
        for step in range(8):
            if step == 5:
                trainer.save_checkpoint(tmp_path)
            trainer.run_step()
        trainer.wait_for_signal()
    with Runs.of(tiny) as other:
        resumed = other.steps(run, 3, checkpoint=load_latest(tmp_path))
    assert resumed.bits == bits(trainer)
    assert servers_core.made == BLOCKS


def count_set_up_traffic(monkeypatch: pytest.MonkeyPatch) -> list[Traffic]:
    """What each setting up will have put on the wire."""
    counted: list[Traffic] = []
    set_up = ModelSession._set_up

    def counting(self: ModelSession) -> None:
        session = self.connection.session
        before = session.bytes_sent, session.bytes_received, session.round_trips
        set_up(self)
        after = session.bytes_sent, session.bytes_received, session.round_trips
        counted.append(Traffic(*(now - then for now, then in zip(after, before, strict=True))))

    monkeypatch.setattr(ModelSession, "_set_up", counting)
    return counted


@pytest.mark.usefixtures("servers_core")
def test_set_up_traffic_matches_the_formula(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made by the first server, and given back to the next."""
    counted = count_set_up_traffic(monkeypatch)
    with runs.train(run_of_cores(), connecting=FROM_LOST) as run:
        run.run_step()
        run.wait_for_signal()
        lose_sessions(runs.server)
        run.run_step()
        run.wait_for_signal()
        sizes = [[tensor.nbytes for tensor in group.adapter_state] for group in run.adapters.groups]
        said = set_up_mb(run.config, load_manifest(runs.bundle), random_dataset(VOCABULARY), has_state=False)
    assert counted == [adapter_state_traffic(sizes, made=is_made) for is_made in (True, False)]
    assert said == (counted[0].bytes_up + counted[0].bytes_down) / 1e6


@pytest.mark.usefixtures("servers_core")
def test_a_model_of_many_groups_is_set_up(tiny: TinyFactory) -> None:
    """More groups than frames may be unacknowledged: made, and given back."""
    model = tiny(blocks=12)
    with serving(model.base) as server:
        many = Runs(model.bundle, server)
        with many.train(run_of_cores(total_steps=2), connecting=FROM_LOST) as trainer:
            trainer.run_step()
            lose_sessions(server)
            trainer.run_step()
        assert len(trainer.adapters.groups) == 12


# -- several micro-batches at a time -------------------------------------------------------------------------

MANY = random_dataset(VOCABULARY, examples=18)


@pytest.fixture(scope="module")
def wide(tiny: TinyFactory) -> Iterator[Runs]:
    """Whose server allows two at a time."""
    with Runs.of(tiny, window=2) as made:
        yield made


@pytest.fixture
def most_under_way(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many micro-batches the device's session had under way, at each message."""
    seen: list[int] = []
    receive_any = Connection.receive_any

    def counting(self: Connection) -> Any:
        seen.append(len(self.session.under_way))
        return receive_any(self)

    monkeypatch.setattr(Connection, "receive_any", counting)
    return seen


@pytest.mark.usefixtures("servers_core")
@pytest.mark.parametrize(("kind", "passes"), [("lora", "live"), ("core", "live"), ("core", "2,2")])
@pytest.mark.parametrize("kill_revive", [{}, KILLING], ids=["all", "killing"])
def test_a_window_of_two_micro_batches_changes_no_bit(
    wide: Runs, kind: str, passes: str, kill_revive: dict[str, Any], most_under_way: list[int]
) -> None:
    """Nor where the server is lost meanwhile."""
    steps = {"total_steps": 4, "grad_accum": 3, "batch_size": 2}
    run = config(kind=kind, rank=COLUMNS, kill_revive=kill_revive, passes=passes, **steps)
    found, most = [], []
    for window, lost_after in ((1, None), (2, None), (2, 2)):
        torch.manual_seed(3)
        most_under_way.clear()
        with wide.train(run, MANY, FROM_LOST, window=window) as trainer:
            losses = []
            for step in range(4):
                if step == lost_after:
                    lose_sessions(wide.server)
                losses.append(trainer.run_step().loss)
            evaluation = trainer.evaluate(MANY)
            trainer.wait_for_signal()
            found.append((losses, bits(trainer), evaluation))
        most.append(max(most_under_way))
    assert found[0] == found[1] == found[2]
    assert most == [1, 2, 2]


def test_a_failure_in_one_of_two_micro_batches_ends_the_session_at_once(
    wide: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the session's own thread waits for what the device says next."""
    forward = BaseModel.last_hidden_state
    calls = itertools.count()

    def fail_at_the_third(self: BaseModel, *given: Any) -> Tensor:
        hidden = forward(self, *given)
        return hidden * float("nan") if next(calls) == 2 else hidden

    with wide.train(config(rank=COLUMNS, grad_accum=3, batch_size=2), MANY, window=2) as trainer:
        monkeypatch.setattr(BaseModel, "last_hidden_state", fail_at_the_third)
        with pytest.raises(NonFiniteError, match="NaN or infinity in the base model's results"):
            trainer.run_step()
        eventually(lambda: len(wide.server.server.service.sessions) == 0)


def test_a_server_with_a_smaller_window_is_used_with_that(runs: Runs) -> None:
    run = config(total_steps=2, grad_accum=3, batch_size=2)
    found = [runs.steps(run, 1, dataset=MANY, window=window) for window in (1, 2)]
    assert found[0] == found[1]


def test_two_micro_batches_share_a_quota_of_one(tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first, which needs its device; nobody is sent away."""
    charged: list[int] = []
    charge = SessionQuota.charge

    def recording(self: SessionQuota, tokens: int, live_bytes: int) -> Any:
        charged.append(live_bytes)
        return charge(self, tokens, live_bytes)

    monkeypatch.setattr(SessionQuota, "charge", recording)
    run = config(total_steps=3, grad_accum=3, batch_size=2)
    with Runs.of(tiny, window=2) as own, own.train(run, MANY, window=2) as trainer:
        trainer.run_step()
        own.server.server.service.quotas.limits = QuotaLimits(live_bytes=int(1.6 * max(charged)))
        for _ in range(2):
            trainer.run_step()
        assert trainer.side.crossed.resumed == 0
        assert trainer.steps_rerun == 0
