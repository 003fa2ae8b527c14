"""A kind of adapter that the product does not know: added here by its three registries, and by nothing else.

The server projects a group's input on three columns and expands three numbers again; what it keeps of a group is drawn
at random, so that nobody can make it a second time. The device holds a 3×3 matrix. Every second token crosses.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from drawn import one_in
from families import VOCABULARY, tiny_model
from serving import RunningServer, config, random_dataset, serving, training
from tiny import TinyFactory
from torch import Tensor
from waiting import eventually

from dlora.cloud.admission.quotas import QuotaLimits, SessionQuota
from dlora.cloud.exchange.kinds import SITE_KINDS
from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.serving.transport import DeviceGoneError
from dlora.edge.adapters.kind import GroupAdapters, LoadGraph, Parameter, SavedModule
from dlora.edge.adapters.units import DEVICE_KINDS, AdapterSet
from dlora.edge.data.batches import MicroBatch
from dlora.edge.data.examples import Dataset
from dlora.edge.model.session import ModelSession
from dlora.edge.training.checkpoint import load_latest
from dlora.edge.training.resolved import Resolved
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.edge.wire.connection import Connection
from dlora.protocol.adapters import KINDS, AdapterSpec, Crossing, crossings, kind_of, state_bytes
from dlora.protocol.errors import CheckpointError, NonFiniteError, RefusedError
from dlora.protocol.groups import GroupSpec
from dlora.protocol.tensors import FloatArray, IntArray
from dlora.protocol.traffic import Traffic, adapter_state_traffic, micro_batch_traffic, report_traffic
from dlora.protocol.wire_codecs import Codecs

COLUMNS = 3
BLOCKS = 4


# -- one file a side ---------------------------------------------------------------------------------------


class CoreKind:
    """For both sides: widths and shapes."""

    name = "core"
    server_makes_state = True

    def check(self, spec: AdapterSpec) -> None:
        pass

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

    def __call__(self, group: GroupSpec, state: Sequence[Tensor]) -> CoreSite:
        project_on, expand_by = state
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



def every_second_row(adapters: AdapterSet, batch: MicroBatch) -> IntArray:
    return np.arange(0, len(batch.ids), 2, dtype=np.int32)


# -- the tests ---------------------------------------------------------------------------------------------


@pytest.fixture
def servers_core(monkeypatch: pytest.MonkeyPatch) -> ServersCore:
    torch.manual_seed(3)
    made = ServersCore()
    monkeypatch.setitem(KINDS, "core", CoreKind())
    monkeypatch.setitem(SITE_KINDS, "core", made)
    monkeypatch.setitem(DEVICE_KINDS, "core", CoreGroup)
    monkeypatch.setattr(AdapterSet, "crossing_positions", every_second_row)
    return made


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory) -> Path:
    return tiny(blocks=BLOCKS, head_dtype="fp32").bundle


@pytest.fixture(scope="module")
def base(tiny: TinyFactory) -> BaseModel:
    return tiny(blocks=BLOCKS).base


def run_of_cores(**changes: Any) -> Resolved:
    return config(kind="core", basis="weights", rank=COLUMNS, **{"optimizer": {"lr": 0.5}, **changes})


KILLING = {
    "active_fraction": 0.5, "on_kill": "fade", "warmup_steps": 2, "warmup_fraction": 0.0, "ramp_fraction": 0.3,
    "kill_every": 2, "revive_every": 2, "probation": 1,
}  # fmt: skip


def bits(trainer: Trainer) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in trainer.adapters.state().items()}


def lose_sessions(server: RunningServer) -> None:
    """What a server that is started again does not have any more."""
    for live in server.server.service.sessions:
        server.server.service.sessions.remove(live)
        live.transport._loop.call_soon_threadsafe(live.transport.end, DeviceGoneError("lost"))


@pytest.mark.usefixtures("servers_core")
def test_gradients_are_those_of_the_whole_model_in_torch(bundle: Path, base: BaseModel) -> None:
    dataset = random_dataset(VOCABULARY)
    with serving(base) as server, training(bundle, server.url, run_of_cores(batch_size=1), dataset) as trainer:
        random = np.random.default_rng(0)
        for parameter in trainer.adapters.parameters().values():
            parameter.value = random.normal(0, 0.5, parameter.value.shape).astype(np.float32)
        (batch,) = trainer.batches.step_batches(0)
        losses = trainer.model.forward_backward([batch], step=0, grad_scale=1.0)[0]
        found = {name: parameter.grad for name, parameter in trainer.adapters.parameters().items()}
    wanted_loss, wanted = whole_model(trainer, batch)
    assert float(losses.sum()) == pytest.approx(wanted_loss, rel=1e-5)
    assert set(found) == set(wanted)
    for name, grad in wanted.items():
        assert np.abs(grad).max() > 0
        np.testing.assert_allclose(found[name], grad, rtol=1e-4, atol=1e-5 * np.abs(grad).max(), err_msg=name)


def whole_model(trainer: Trainer, batch: MicroBatch) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of one sequence by autograd alone, with the change added to each module's output by a hook."""
    model = tiny_model("llama", num_hidden_layers=BLOCKS).eval().requires_grad_(False)
    cores: dict[str, Tensor] = {}
    crosses = torch.zeros(len(batch.ids), 1)
    crosses[::2] = 1
    for group, spec in zip(trainer.adapters.groups, trainer.adapters.group_specs, strict=True):
        project_on, expand_by = (torch.from_numpy(np.array(tensor)) for tensor in group.adapter_state_values())
        ((name, parameter),) = group.parameters().items()
        core = cores[name] = torch.from_numpy(np.array(parameter.value)).requires_grad_()
        widths = [target.out_features for target in spec.targets]
        for target, expand in zip(spec.targets, expand_by.split(widths, dim=-1), strict=True):

            change = (project_on, core, expand * target.gain)
            model.get_submodule(target.name).register_forward_hook(
                lambda _, args, output, change=change: output + crosses * _through(args[0], *change)
            )
    logits = model(input_ids=torch.from_numpy(batch.ids)[None]).logits[0]
    labels = torch.from_numpy(np.array(batch.labels))
    loss = torch.nn.functional.cross_entropy(logits[batch.label_positions], labels, reduction="sum")
    loss.backward()
    return loss.item(), {name: core.grad.numpy() for name, core in cores.items() if core.grad is not None}


def _through(x: Tensor, project_on: Tensor, core: Tensor, expand: Tensor) -> Tensor:
    return x @ project_on @ core.T @ expand


def test_core_kind_learns_with_kill_and_revive(bundle: Path, base: BaseModel, servers_core: ServersCore) -> None:
    dataset = Dataset.of([([3 + index] * 6, [2, 3, 4]) for index in range(6)])
    with serving(base) as server:
        with training(bundle, server.url, run_of_cores(total_steps=12), dataset) as trainer:
            losses = [trainer.run_step().loss for _ in range(12)]
        with training(bundle, server.url, run_of_cores(total_steps=24, kill_revive=KILLING), dataset) as trainer:
            units = [trainer.run_step().units for _ in range(24)]
    assert losses[-1] < 0.9 * losses[0]
    assert servers_core.made == 2 * BLOCKS
    history = list(itertools.pairwise(units))
    assert any(before[unit] == "1" != after[unit] for before, after in history for unit in range(BLOCKS)), "killed"
    assert any(before[unit] == "0" and after[unit] == "1" for before, after in history for unit in range(BLOCKS))


@pytest.mark.parametrize("kill_revive", [{}, KILLING], ids=["all", "killing"])
@pytest.mark.parametrize("after", one_in(3, range(1, 7)))
def test_lost_server_changes_no_bit(
    bundle: Path, base: BaseModel, servers_core: ServersCore, kill_revive: dict[str, Any], after: int
) -> None:
    """Another server has another draw, and gets the first one's back."""
    dataset, run = random_dataset(VOCABULARY), run_of_cores(total_steps=8, kill_revive=kill_revive)
    found = []
    with serving(base) as server:
        for is_lost in (False, True):
            torch.manual_seed(3)
            with training(bundle, server.url, run, dataset, ConnectSettings(retry=Retry(max_s=30))) as trainer:
                losses = []
                for step in range(8):
                    if is_lost and step == after:
                        lose_sessions(server)
                    losses.append(trainer.run_step().loss)
                trainer.wait_for_signal()
                found.append((losses, bits(trainer)))
    assert found[0] == found[1]
    assert servers_core.made == 2 * BLOCKS, "made once a run, never again"


def test_checkpoint_resumes_at_another_server(
    bundle: Path, base: BaseModel, servers_core: ServersCore, tmp_path: Path
) -> None:
    dataset, run = random_dataset(VOCABULARY), run_of_cores(total_steps=8, kill_revive=KILLING)
    with serving(base) as server, training(bundle, server.url, run, dataset) as trainer:
        for step in range(8):
            if step == 5:
                trainer.save_checkpoint(tmp_path)
            trainer.run_step()
        trainer.wait_for_signal()
    checkpoint = load_latest(tmp_path)
    assert checkpoint is not None
    with serving(base) as server, training(bundle, server.url, run, dataset, checkpoint=checkpoint) as resumed:
        for _ in range(3):
            resumed.run_step()
        resumed.wait_for_signal()
    assert bits(resumed) == bits(trainer)
    assert servers_core.made == BLOCKS


@pytest.mark.usefixtures("servers_core")
@pytest.mark.parametrize("kill_revive", [{}, KILLING], ids=["all", "killing"])
@pytest.mark.parametrize("wire_dtype", ["fp32", "fp16"])
def test_counted_bytes_match_the_formula(bundle: Path, base: BaseModel, wire_dtype: Any, kill_revive: Any) -> None:
    run = run_of_cores(total_steps=10, grad_accum=2, wire_dtype=wire_dtype, kill_revive=kill_revive)
    with serving(base) as server, training(bundle, server.url, run, random_dataset(VOCABULARY)) as trainer:
        assert trainer.session.ticket is not None
        report = report_traffic(BLOCKS, len(trainer.session.ticket))
        waiting = 0
        for step in range(10):
            batches = trainer.batches.step_batches(step)
            metrics = trainer.run_step()
            wanted = sum((expected(trainer, batch, metrics.units) for batch in batches), Traffic(0, 0, 0))
            wanted += Traffic(report.bytes_up, waiting, 0)
            assert (metrics.bytes_up, metrics.bytes_down, metrics.round_trips) == (
                wanted.bytes_up, wanted.bytes_down, wanted.round_trips,
            )  # fmt: skip
            waiting = report.bytes_down


def expected(trainer: Trainer, batch: MicroBatch, units: str) -> Traffic:
    live = [unit for unit, state in enumerate(units) if state != "0"]
    with_grads = [unit for unit in live if unit >= units.index("1")]
    base_model = trainer.bundle.manifest.base_model
    return micro_batch_traffic(
        crossings(trainer.config.spec, trainer.adapters.group_specs),
        live=live,
        with_grads=with_grads,
        answered=with_grads[1:],
        tokens=len(batch.ids),
        sequences=len(batch.sequence_lengths),
        labelled=len(batch.labels),
        embedding_size=base_model.embedding_size,
        hidden_size=base_model.hidden_size,
        codecs=Codecs.all(trainer.config.server.wire_dtype),
        rows=-(-len(batch.ids) // 2),
    )


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
def test_set_up_traffic_matches_the_formula(
    bundle: Path, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made by the first server, and given back to the next."""
    counted = count_set_up_traffic(monkeypatch)
    connecting = ConnectSettings(retry=Retry(max_s=30))
    dataset = random_dataset(VOCABULARY)
    with serving(base) as server, training(bundle, server.url, run_of_cores(), dataset, connecting) as run:
        run.run_step()
        run.wait_for_signal()
        lose_sessions(server)
        run.run_step()
        run.wait_for_signal()
        sizes = [[tensor.nbytes for tensor in group.adapter_state] for group in run.adapters.groups]
    assert counted == [adapter_state_traffic(sizes, made=is_made) for is_made in (True, False)]


@pytest.mark.usefixtures("servers_core")
def test_server_state_counts_in_the_quota(bundle: Path, base: BaseModel) -> None:
    dataset, run = random_dataset(VOCABULARY), run_of_cores()
    with serving(base) as server:
        with training(bundle, server.url, run, dataset) as trainer:
            kept = [state_bytes(run.spec, group) for group in trainer.adapters.group_specs]
            assert server.server.service.quotas.live_bytes == sum(kept) > 0
        eventually(lambda: server.server.service.quotas.live_bytes == 0)
        server.server.service.quotas.limits = QuotaLimits(live_bytes=sum(kept) - 1)
        with (
            pytest.raises(RefusedError, match="the adapters that it keeps takes"),
            training(bundle, server.url, run, dataset) as trainer,
        ):
            trainer.run_step()


@pytest.mark.usefixtures("servers_core")
def test_a_model_of_many_groups_is_set_up(tiny: TinyFactory) -> None:
    """More groups than frames may be unacknowledged: made, and given back."""
    model = tiny(blocks=12)
    run, dataset = run_of_cores(total_steps=2), random_dataset(VOCABULARY)
    with serving(model.base) as server:
        with training(model.bundle, server.url, run, dataset, ConnectSettings(retry=Retry(max_s=30))) as trainer:
            trainer.run_step()
            lose_sessions(server)
            trainer.run_step()
        assert len(trainer.adapters.groups) == 12


# -- several micro-batches at a time -------------------------------------------------------------------------


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
@pytest.mark.parametrize("kind", ["lora", "core"])
@pytest.mark.parametrize("kill_revive", [{}, KILLING], ids=["all", "killing"])
def test_a_window_of_two_micro_batches_changes_no_bit(
    bundle: Path, base: BaseModel, kind: str, kill_revive: dict[str, Any], most_under_way: list[int]
) -> None:
    dataset = random_dataset(VOCABULARY, examples=18)
    run = config(kind=kind, rank=COLUMNS, total_steps=4, grad_accum=3, batch_size=2, kill_revive=kill_revive)
    found, most = [], []
    with serving(base, window=2) as server:
        for window in (1, 2):
            torch.manual_seed(3)
            most_under_way.clear()
            with training(bundle, server.url, run, dataset, window=window) as trainer:
                losses = [trainer.run_step().loss for _ in range(4)]
                evaluation = trainer.evaluate(dataset)
                trainer.wait_for_signal()
                found.append((losses, bits(trainer), evaluation))
            most.append(max(most_under_way))
    assert found[0] == found[1]
    assert most == [1, 2]


@pytest.mark.usefixtures("servers_core")
@pytest.mark.parametrize("kind", ["lora", "core"])
def test_a_window_of_two_survives_a_lost_server(bundle: Path, base: BaseModel, kind: str) -> None:
    dataset = random_dataset(VOCABULARY, examples=18)
    run = config(kind=kind, rank=COLUMNS, total_steps=4, grad_accum=3, batch_size=2)
    found = []
    with serving(base, window=2) as server:
        for is_lost in (False, True):
            torch.manual_seed(3)
            connecting = ConnectSettings(retry=Retry(max_s=30))
            with training(bundle, server.url, run, dataset, connecting, window=2) as trainer:
                for step in range(4):
                    if is_lost and step == 2:
                        lose_sessions(server)
                    trainer.run_step()
                trainer.wait_for_signal()
                found.append(bits(trainer))
    assert found[0] == found[1]


def test_a_failure_in_one_of_two_micro_batches_ends_the_session_at_once(
    bundle: Path, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the session's own thread waits for what the device says next."""
    forward = BaseModel.last_hidden_state
    calls = itertools.count()

    def fail_at_the_third(self: BaseModel, *given: Any) -> Tensor:
        hidden = forward(self, *given)
        return hidden * float("nan") if next(calls) == 2 else hidden

    run = config(rank=COLUMNS, grad_accum=3, batch_size=2)
    dataset = random_dataset(VOCABULARY, examples=18)
    with serving(base, window=2) as server, training(bundle, server.url, run, dataset, window=2) as trainer:
        monkeypatch.setattr(BaseModel, "last_hidden_state", fail_at_the_third)
        with pytest.raises(NonFiniteError, match="NaN or infinity in the base model's results"):
            trainer.run_step()
        eventually(lambda: len(server.server.service.sessions) == 0)


def test_a_server_with_a_smaller_window_is_used_with_that(bundle: Path, base: BaseModel) -> None:
    run = config(total_steps=2, grad_accum=3, batch_size=2)
    dataset = random_dataset(VOCABULARY, examples=18)
    found = []
    with serving(base) as server:
        for window in (1, 2):
            with training(bundle, server.url, run, dataset, window=window) as trainer:
                trainer.run_step()
                trainer.wait_for_signal()
                found.append(bits(trainer))
    assert found[0] == found[1]


def test_two_micro_batches_share_a_quota_of_one(
    bundle: Path, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits for the first, which needs its device; nobody is sent away."""
    charged: list[int] = []
    charge = SessionQuota.charge

    def recording(self: SessionQuota, tokens: int, live_bytes: int) -> Any:
        charged.append(live_bytes)
        return charge(self, tokens, live_bytes)

    monkeypatch.setattr(SessionQuota, "charge", recording)
    run = config(total_steps=3, grad_accum=3, batch_size=2)
    dataset = random_dataset(VOCABULARY, examples=18)
    with serving(base, window=2) as server, training(bundle, server.url, run, dataset, window=2) as trainer:
        trainer.run_step()
        server.server.service.quotas.limits = QuotaLimits(live_bytes=int(1.6 * max(charged)))
        for _ in range(2):
            trainer.run_step()
        assert trainer.side.crossed.resumed == 0
        assert trainer.steps_rerun == 0
