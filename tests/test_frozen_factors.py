"""The kinds whose server keeps a part: ``bottleneck`` and ``ffa``, against torch, PEFT and an undisturbed run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import peft_reference
import pytest
import torch
from answers import INVOCATION, random_answers
from drawn import one_in
from families import VOCABULARY, tiny_model
from safetensors import safe_open
from safetensors.numpy import save_file
from serving import RunningServer, config, random_dataset, randomize_all
from test_adapter_kinds import KILLING, count_set_up_traffic
from tiny import TinyFactory
from torch import Tensor
from training_runs import (
    BLOCKS,
    DATA,
    Change,
    Leaves,
    Runs,
    assert_gradients_are_torchs,
    lose_sessions,
    loss_in_peft,
    sizes_of,
    step_traffic,
)
from waiting import eventually

from dlora.cloud.admission.ledger import QuotaLimits
from dlora.cloud.exchange.basis import BasisPass
from dlora.cloud.exchange.sketch import GroupSketch, sketch_bytes, weight_basis
from dlora.cloud.exchange.target_modules import running_targets, wrap_target_modules
from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.serving import session_loop
from dlora.edge.adapters.kind import GroupAdapters
from dlora.edge.adapters.parts import PARTS_NAME
from dlora.edge.adapters.peft import load_adapter
from dlora.edge.data.batches import MicroBatch
from dlora.edge.engine.bundle import Bundle
from dlora.edge.model.evaluation import evaluate
from dlora.edge.training.resolved import Resolved
from dlora.protocol.adapters import crossings, state_bytes
from dlora.protocol.errors import CheckpointError, NonFiniteError, RefusedError, RemoteProtocolError, UsageError
from dlora.protocol.groups import GroupSpec, TargetSpec
from dlora.protocol.traffic import Traffic, adapter_state_traffic, micro_batch_traffic, report_traffic
from dlora.protocol.wire_codecs import TensorRole

KINDS = ["bottleneck", "ffa"]
STEPS = 10  # of a run that would have more: with KILLING a unit fades in two of them,
IN_FADE = 4  # before and after this one begins
TOTAL = 16


@pytest.fixture(scope="module")
def base(tiny: TinyFactory) -> BaseModel:
    return tiny(blocks=BLOCKS).base


@pytest.fixture(scope="module")
def runs(tiny: TinyFactory) -> Iterator[Runs]:
    with Runs.of(tiny) as made:
        yield made


def run_of(kind: str, **changes: Any) -> Resolved:
    settings = {"optimizer": {"lr": 0.5}, "target_modules": ("all-linear",), "lora_alpha": 4.0, "basis_steps": 2}
    return config(kind=kind, **{**settings, **changes})


# -- against torch and PEFT ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["fp32", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_torch(runs: Runs, kind: str, stored: str) -> None:
    """Both sides compute with what is left of A and B, however they are stored."""
    run = run_of(kind, lora_alpha=6.0, batch_size=1, wire_dtype=f"fp32,adapter_state={stored}")
    with runs.train(run) as trainer:
        assert {tensor.dtype for group in trainer.adapters.groups for tensor in group.adapter_state} == {stored}
        randomize_all(trainer)
        assert_gradients_are_torchs(trainer, partial(changes_of, run.scaling))


def changes_of(scaling: float, group: GroupAdapters, spec: GroupSpec, leaves: Leaves) -> list[Change]:
    """Of each module, as its kind has it."""
    lora_a, *lora_b = (torch.from_numpy(np.array(tensor)) for tensor in group.adapter_state_values())
    if lora_b:
        rows = lora_b[0].split([target.out_features for target in spec.targets])
        factors = [each @ leaves[f"{group.name}.core"] for each in rows]
    else:
        factors = [leaves[f"{target.name}.lora_B"] for target in spec.targets]

    def change(factor: Tensor) -> Change:
        return lambda x: x @ lora_a.T @ factor.T

    return [change(scaling * target.gain * each) for target, each in zip(spec.targets, factors, strict=True)]


@pytest.mark.parametrize(
    ("wire_dtype", "tolerance"), [("fp32", 1e-4), ("fp16", 2e-3), ("fp32,adapter_state=int8", 1e-4)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapter_has_the_same_loss_in_peft_and_as_what_it_was_trained_as(
    runs: Runs, kind: str, wire_dtype: str, tolerance: float, tmp_path: Path
) -> None:
    """For a kind's own traffic, in a session whose own codec is another; and as an ordinary LoRA, where that is all
    that is left of it."""
    run = run_of(kind, wire_dtype=wire_dtype)
    with runs.train(run) as trainer:
        randomize_all(trainer)
        trainer.run_step()
        loss = trainer.evaluate(DATA).loss
        trainer.save_adapter(tmp_path)
        own_width = crossings(trainer.config.spec, trainer.groups)[0].input_width
        stored = {tensor.dtype for group in trainer.adapters.groups for tensor in group.adapter_state}
    in_peft = loss_in_peft(tmp_path)
    assert in_peft == pytest.approx(loss, abs=tolerance)
    widths = []
    for _ in range(2):
        with runs.open(tmp_path) as model:
            assert evaluate(model, DATA, 4).loss == pytest.approx(in_peft, abs=1e-4)  # whose factors are float16
            if not widths:
                kept = {tensor.dtype for group in model.session.adapters.groups for tensor in group.adapter_state}
                assert kept == stored
            opened = model.session.connection.session.opened_with
            widths.append(crossings(opened.adapter, opened.groups)[0].input_width)
        (tmp_path / PARTS_NAME).unlink(missing_ok=True)
    assert widths[0] == own_width < widths[1]


# -- the basis -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("invocation", [(), INVOCATION], ids=["all rows", "answers"])
def test_basis_is_what_the_data_vary_most_in(runs: Runs, invocation: tuple[int, ...]) -> None:
    """Against torch, which holds all that goes into the modules, and all gradients of what comes out."""
    dataset = random_answers() if invocation else DATA
    run = run_of("bottleneck", rank=3, invocation=invocation)
    with runs.train(run, dataset) as trainer:
        steps = range(run.adapter.basis_steps or 0)
        batches = [batch for step in steps for batch in trainer.batches.step_batches(step)]
        model = tiny_model("llama", num_hidden_layers=BLOCKS).eval()
        seen: dict[str, list[torch.Tensor]] = {}
        for spec in trainer.adapters.group_specs:
            for target in spec.targets:
                _keep_rows(model.get_submodule(target.name), target.name, seen)
        acting: list[torch.Tensor] = []
        for batch in batches:
            peft_reference.loss_of(model, [batch]).backward()
            acting.append(_rows_that_act(batch))
        for group, spec in zip(trainer.adapters.groups, trainer.adapters.group_specs, strict=True):
            lora_a, lora_b = (torch.from_numpy(np.array(tensor)).double() for tensor in group.adapter_state_values())
            x = _joined(seen[spec.targets[0].name], acting)
            grads = torch.cat([_joined(seen[f"{target.name}.grad"], acting) for target in spec.targets], dim=1)
            # A tiny random model's rows go in nearly all directions: the worst case for a sketch.
            for basis, rows in ((lora_a, x), (lora_b.T, grads)):
                assert _share_held(basis, rows) > 0.8, spec.targets[0].name
                torch.testing.assert_close(basis @ basis.T, torch.eye(3).double(), atol=1e-5, rtol=0)
    if invocation:
        assert all(len(rows) < len(batch.ids) for rows, batch in zip(acting, batches, strict=True))


def _rows_that_act(batch: MicroBatch) -> torch.Tensor:
    """Where they lie in the reference's padded batch."""
    longest, lengths = int(batch.sequence_lengths.max()), batch.sequence_lengths.tolist()
    padded = np.concatenate([index * longest + np.arange(length) for index, length in enumerate(lengths)])
    return torch.from_numpy(padded if batch.crossing_positions is None else padded[batch.crossing_positions])


def _joined(seen: list[torch.Tensor], rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows of all micro-batches."""
    return torch.cat([each[chosen] for each, chosen in zip(seen, rows, strict=True)])


def _keep_rows(module: torch.nn.Module, name: str, seen: dict[str, list[torch.Tensor]]) -> None:
    """Keep the rows that go into a module, and the gradients of those that come out."""

    def keep(_: object, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.setdefault(name, []).append(given[0].detach().flatten(0, -2).double())
        output.register_hook(lambda grad: seen.setdefault(f"{name}.grad", []).append(grad.flatten(0, -2).double()))

    module.register_forward_hook(keep)


def _share_held(basis: torch.Tensor, rows: torch.Tensor) -> float:
    """Of the squared norm of rows that the best directions hold, what those of a basis (r, width) hold."""
    best = (torch.linalg.svdvals(rows)[: len(basis)] ** 2).sum()
    return float(torch.linalg.norm(rows @ basis.T) ** 2 / best)


def test_sketch_holds_what_the_best_basis_holds() -> None:
    """Of rows that fall off as those of models do, in parts."""
    torch.manual_seed(0)
    falling = torch.logspace(0, -2, 40)
    x, grads = (torch.randn(400, 40) * falling @ torch.linalg.qr(torch.randn(width, 40))[0].T for width in (64, 90))
    group = GroupSpec(0, 64, (TargetSpec("a", 30), TargetSpec("b", 60)))
    sketch = GroupSketch(group, 8, 0, torch.device("cpu"))
    for rows in torch.arange(400).split(130):
        sketch.add(x[rows], grads[rows])
    lora_a, lora_b, norm = sketch.basis()
    assert _share_held(lora_a, x) > 0.99
    assert _share_held(lora_b.T, grads) > 0.99
    assert norm == pytest.approx(float(torch.linalg.norm(lora_b.T @ grads.T @ x @ lora_a.T)), rel=0.1)
    held = [each for moments in (sketch._inputs, sketch._grads) for each in (moments.omega, moments.product)]
    assert sum(tensor.nbytes for tensor in (*held, sketch._gradient)) == sketch_bytes(group, 8)


def test_one_large_row_does_not_hide_the_others() -> None:
    """Some tokens' hidden states are thousands of times as large as all others."""
    torch.manual_seed(0)
    x = torch.randn(500, 64) @ torch.diag(torch.logspace(0, -2, 64))
    x[7] *= 1e4
    sketch = GroupSketch(GroupSpec(0, 64, (TargetSpec("a", 20),)), 8, 0, torch.device("cpu"))
    sketch.add(x, torch.randn(500, 20))
    lora_a, _, _ = sketch.basis()
    large = torch.nn.functional.normalize(x[7], dim=0)
    assert float((lora_a @ large).norm()) > 0.999
    others = x - torch.outer(x @ large, large)
    kept = torch.linalg.norm(others @ lora_a.T) ** 2
    assert float(kept / (torch.linalg.svdvals(others)[:7] ** 2).sum()) > 0.97


@pytest.mark.parametrize("graded", [None, torch.arange(10)])
def test_a_model_may_change_outputs_in_place(graded: Tensor | None) -> None:
    """As OLMo clamps queries, keys and values; its gradients are those of the model alone."""
    base = BaseModel.from_model(tiny_model("olmo", clip_qkv=0.5), "olmo")
    embeds = torch.randn(2, 5, base.embedding_size, requires_grad=True)
    alone, *_ = torch.autograd.grad(base.last_hidden_state(embeds).square().sum(), embeds)
    groups = base.groups(base.targets)
    sketches = [GroupSketch(group, 4, 0, torch.device("cpu")) for group in groups]
    wrap_target_modules(base)
    with running_targets(BasisPass(base, groups, sketches, None, graded)):
        hidden = base.last_hidden_state(embeds)
    found, *_ = torch.autograd.grad(hidden.square().sum(), embeds)
    torch.testing.assert_close(found, alone)
    assert all(sketch.basis()[2] > 0 for sketch in sketches)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_basis_of_few_rows_is_orthonormal(rows: int) -> None:
    """The rest of it is any directions."""
    torch.manual_seed(0)
    sketch = GroupSketch(GroupSpec(0, 30, (TargetSpec("a", 20),)), 8, 0, torch.device("cpu"))
    x, grads = torch.randn(rows, 30), torch.randn(rows, 20)
    sketch.add(x, grads)
    lora_a, lora_b, norm = sketch.basis()
    for basis, held in ((lora_a, x), (lora_b.T, grads)):
        torch.testing.assert_close(basis @ basis.T, torch.eye(8), atol=1e-5, rtol=0)
        torch.testing.assert_close(held @ basis.T @ basis, held, atol=1e-4, rtol=0)
    assert norm == pytest.approx(float(torch.linalg.norm(grads.T @ x)), rel=1e-3)


def test_sketch_of_what_is_not_finite_is_refused() -> None:
    sketch = GroupSketch(GroupSpec(0, 30, (TargetSpec("a", 20),)), 8, 0, torch.device("cpu"))
    sketch.add(torch.ones(3, 30), torch.full((3, 20), torch.inf))
    with pytest.raises(NonFiniteError, match="hidden states or gradients"):
        sketch.basis()


def test_sketch_is_smaller_than_a_large_models_weights() -> None:
    down = GroupSpec(0, 11_008, (TargetSpec("down", 4096),))
    assert sketch_bytes(down, 64) < 4 * 11_008 * 4096 / 2


def test_basis_pass_says_what_the_first_gradients_are(runs: Runs) -> None:
    """Of the same batch: the norm that the server gives with a basis is about that of the core's gradient in step 0."""
    run = run_of(
        "bottleneck", basis_steps=1, wire_dtype="fp32", optimizer={"lr": 3e-2, "max_grad_norm": 0.0},
        kill_revive={"score": "grad"},
    )  # fmt: skip
    with runs.train(run) as trainer:
        norms = np.array([group.first_gradient_norm for group in trainer.adapters.groups])
        trainer.run_step()
        moments = [group.parameters()[f"{group.name}.core"].exp_avg for group in trainer.adapters.groups]
        np.testing.assert_allclose(run.scaling * norms, [np.linalg.norm(m) / 0.1 for m in moments], rtol=0.25)
        reported = trainer.session.unanswered
        assert reported is not None
        by_unit = [run.scaling * np.linalg.norm(norms[list(unit.groups)]) for unit in trainer.adapters.units]
        np.testing.assert_allclose(reported, by_unit, rtol=1e-6)
        trainer.run_step()
        assert (trainer.session.unanswered != reported).any()


@pytest.mark.parametrize("basis", ["weights", "random"])
def test_other_bases(runs: Runs, base: BaseModel, basis: str) -> None:
    with runs.train(run_of("bottleneck", basis=basis)) as trainer:
        for group, spec in zip(trainer.adapters.groups, trainer.adapters.group_specs, strict=True):
            lora_a, lora_b = (torch.from_numpy(np.array(tensor)) for tensor in group.adapter_state_values())
            weights = torch.cat([base.targets[target.name].module.weight for target in spec.targets]).detach()
            held = float(torch.linalg.norm(lora_b.T @ weights @ lora_a.T) ** 2)
            best = float((torch.linalg.svdvals(weights)[:4] ** 2).sum())
            assert (held > 0.95 * best) is (basis == "weights"), (spec.targets[0].name, held, best)
            torch.testing.assert_close(lora_a @ lora_a.T, torch.eye(4), atol=1e-5, rtol=0)
        assert trainer.run_step().loss > 0


def test_weight_basis_is_the_same_again(base: BaseModel) -> None:
    group = base.groups([name for name in base.targets if name.endswith(("q_proj", "v_proj"))])[0]
    first, second = (weight_basis(base, group, 4, 1) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_too_large_a_rank_is_one_line(runs: Runs) -> None:
    words = "wide, and a bottleneck is no wider than that: --rank 500 is too large"
    with pytest.raises(UsageError, match=words), runs.train(run_of("bottleneck", rank=500)):
        pass


def test_a_window_of_two_makes_the_same_basis(tiny: TinyFactory) -> None:
    """One micro-batch of a basis pass at a time, whatever may be under way otherwise."""
    dataset, run = random_dataset(VOCABULARY, examples=24), run_of("bottleneck", basis_steps=8)
    found = set()
    with Runs.of(tiny, window=2) as own:
        for window in (1, 2, 2, 2):
            with own.train(run, dataset, window=window) as trainer:
                tensors = [tensor for group in trainer.adapters.groups for tensor in group.adapter_state]
                found.add(b"".join(tensor.data.tobytes() for tensor in tensors))
    assert len(found) == 1


@pytest.mark.parametrize("damage", [0.0, 2.0, 1e30])
def test_basis_that_is_none_is_refused(runs: Runs, damage: float) -> None:
    with runs.train(run_of("bottleneck")) as trainer:
        group = trainer.adapters.groups[0]
        lora_a, lora_b = group.adapter_state_values()
        group.check_made_state((lora_a, lora_b))
        for state in ((lora_a * np.float32(damage), lora_b), (lora_a, lora_b * np.float32(damage))):
            with pytest.raises(RemoteProtocolError, match="not orthonormal"):
                group.check_made_state(state)


def test_basis_is_made_from_no_data_twice() -> None:
    """Of fewer steps' data than asked for, where the data, or the run, have no more."""
    run = run_of("bottleneck", basis_steps=8, total_steps=50, batch_size=3)
    assert [run.basis_pass_steps(examples) for examples in (1, 6, 60)] == [1, 2, 8]
    assert run_of("bottleneck", basis_steps=8, total_steps=2).basis_pass_steps(60) == 2


# -- coming back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill_revive", [{}, KILLING], ids=["all", "killing"])
@pytest.mark.parametrize("kind", KINDS)
def test_lost_server_and_resumed_run_change_no_bit(
    runs: Runs, kind: str, kill_revive: dict[str, Any], tmp_path: Path
) -> None:
    for wire_dtype in ("fp16", f"fp32,adapter_state={'int8' if kill_revive else 'fp32'}"):
        run = run_of(kind, total_steps=TOTAL, kill_revive=kill_revive, wire_dtype=wire_dtype)
        whole = runs.steps(run, STEPS)
        assert all(("2" in each) is bool(kill_revive) for each in whole.units[IN_FADE - 1 : IN_FADE + 1])
        if wire_dtype == "fp16":
            for lost_after in one_in(3, (0, IN_FADE, 7), 2 * KINDS.index(kind) + bool(kill_revive)):
                assert runs.steps(run, STEPS, lost_after) == whole
        else:
            assert runs.resumed_steps(run, STEPS, IN_FADE, tmp_path) == whole


@pytest.mark.parametrize("messages", one_in(3, range(1, 12)))
def test_server_lost_while_it_is_set_up_changes_no_bit(
    runs: Runs, messages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each message of the set-up: in the basis pass, between two groups, and after some have their state."""
    run = run_of("bottleneck", blocks=(2, 3), total_steps=2)
    whole = runs.steps(run, 2)
    lose_after(messages, runs.server, monkeypatch)
    assert runs.steps(run, 2) == whole


def lose_after(messages: int, server: RunningServer, patch: pytest.MonkeyPatch) -> None:
    """Lose the server's sessions once, after so many messages of the device's after the opening one."""
    from dlora.edge.wire.connection import Connection

    send, sent = Connection.send, 0

    def counting(self: Connection, message: Any) -> None:
        nonlocal sent
        send(self, message)
        sent += 1
        if sent == messages:
            lose_sessions(server)

    patch.setattr(Connection, "send", counting)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_saved_in_a_fade_is_as_weak_as_the_run_has_it(runs: Runs, kind: str, tmp_path: Path) -> None:
    """In PEFT, and used as what it was trained as."""
    with runs.train(run_of(kind, total_steps=TOTAL, kill_revive=KILLING)) as trainer:
        randomize_all(trainer)
        for _ in range(IN_FADE):
            trainer.run_step()
        trainer.wait_for_signal()
        loss = trainer.evaluate(DATA).loss
        (unit,) = [unit for unit in trainer.adapters.units if unit.state == 2]
        assert 0 < trainer.adapters.scale(unit.groups[0]) < 1
        trainer.save_adapter(tmp_path)
    assert loss_in_peft(tmp_path) == pytest.approx(loss, abs=1e-4)
    with runs.open(tmp_path) as used:
        assert evaluate(used, DATA, 4).loss == pytest.approx(loss, abs=1e-5)


# -- starting from another -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_run_starts_from_an_adapter_of_its_own_kind(runs: Runs, kind: str, tmp_path: Path) -> None:
    """It has that one's loss, at another scaling, and a basis of no other data."""
    loss = runs.save_random(run_of(kind), tmp_path)
    init = load_adapter(tmp_path)
    assert init.parts is not None
    with runs.train(run_of(kind, lora_alpha=9.0), random_dataset(VOCABULARY, seed=9), init=init) as trainer:
        assert trainer.evaluate(DATA).loss == pytest.approx(loss, abs=1e-5)
        group = trainer.adapters.groups[0]
        kept = init.parts.tensors[f"{group.name}.adapter_state.0"]
        assert group.adapter_state[0].data.tobytes() == kept.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_run_starts_from_no_other(runs: Runs, kind: str, tmp_path: Path) -> None:
    for name in (kind, "lora"):
        runs.save_random(run_of(name), tmp_path / name)
    assert not (tmp_path / "lora" / PARTS_NAME).exists()
    for name, changes, message in (
        ("lora", {}, "start from this one with --kind lora"),
        (kind, {"rank": 3}, "rank 4; train with --rank 4"),
        (kind, {"target_modules": ("q_proj", "v_proj", "k_proj", "o_proj", "up_proj", "down_proj")}, "has no adapter"),
    ):
        init = load_adapter(tmp_path / name)
        with pytest.raises(CheckpointError, match=message), runs.train(run_of(kind, **changes), init=init):
            pass


@pytest.fixture(scope="module")
def saved(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bottlenecks, by what they crossed in."""
    directory = tmp_path_factory.mktemp("saved")
    for wire_dtype in ("fp16", "fp32"):
        runs.save_random(run_of("bottleneck", wire_dtype=wire_dtype), directory / wire_dtype)
    return directory


def with_other_parts(saved: Path, directory: Path, about: dict[str, str], exponents: np.ndarray | None = None) -> Path:
    """A copy whose parts were made by hand."""
    shutil.copytree(saved, directory, dirs_exist_ok=True)
    with safe_open(saved / PARTS_NAME, "np") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if exponents is not None:
        tensors[next(name for name in tensors if name.endswith(".exponents"))] = exponents
    save_file(tensors, directory / PARTS_NAME, {**metadata, **about})
    return directory


def test_parts_of_other_weights_are_passed_over(runs: Runs, saved: Path, tmp_path: Path) -> None:
    """PEFT may have saved the adapter again since, or our own saving was cut short between the two files."""
    parts = (saved / "fp16" / PARTS_NAME).read_bytes()
    runs.save_random(run_of("bottleneck"), tmp_path)
    assert load_adapter(tmp_path).parts is not None
    (tmp_path / PARTS_NAME).write_bytes(parts)
    assert load_adapter(tmp_path).parts is None
    (tmp_path / PARTS_NAME).write_bytes(parts[:100])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"r": "-3"}, {"scaling": "0.0"}, {"scaling": "nan"}, {"kind": "other"}, {"r": "x"}], ids=str
)
def test_parts_made_by_hand_are_refused(saved: Path, changes: dict[str, str], tmp_path: Path) -> None:
    with_other_parts(saved / "fp32", tmp_path, changes)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("wire_dtype", "exponents"),
    [("fp32", [3, 0]), ("fp16", [-128, 0]), ("fp16", [127, 127]), ("fp16", [0]), ("fp16", [0.0, 0.0])],
    ids=str,
)
def test_parts_with_exponents_that_cannot_be_are_refused(
    runs: Runs, saved: Path, wire_dtype: str, exponents: list[float], tmp_path: Path
) -> None:
    """Before anything is sent: a server that has nothing to do with it would refuse them."""
    dtype = np.int8 if isinstance(exponents[0], int) else np.float32
    init = load_adapter(with_other_parts(saved / wire_dtype, tmp_path, {}, np.array(exponents, dtype)))
    run = run_of("bottleneck", wire_dtype=wire_dtype)
    with pytest.raises(CheckpointError, match="other parts than these groups"), runs.train(run, init=init):
        pass


# -- what it costs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire_dtype", ["int8", "fp16", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_traffic_is_the_formulas(runs: Runs, kind: str, wire_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What setting up costs, and a step: of a bottleneck four ranks a token and group."""
    counted = count_set_up_traffic(monkeypatch)
    run = run_of(kind, wire_dtype=wire_dtype)
    with runs.train(run) as trainer:
        metrics = trainer.run_step()
    base = trainer.bundle.manifest.base_model
    widths = {"embedding_size": base.embedding_size, "hidden_size": base.hidden_size, "codecs": run.codecs}
    codec = run.codecs.of(TensorRole.ADAPTER_STATE)
    sizes = [[codec.nbytes(*tensor.shape) for tensor in group.adapter_state] for group in trainer.adapters.groups]
    set_up = adapter_state_traffic(sizes, made=kind == "bottleneck")
    if kind == "bottleneck":
        each = {(crossing.input_width, crossing.output_widths) for crossing in crossings(run.spec, trainer.groups)}
        assert each == {(4, (4,))}
        for step in range(run.adapter.basis_steps or 0):
            for batch in trainer.batches.step_batches(step):
                set_up += micro_batch_traffic(is_basis=True, **sizes_of(batch), **widths)
    assert counted == [set_up]
    (batch,) = trainer.batches.step_batches(0)
    # Its signal comes with the next step.
    wanted = step_traffic(trainer, batch) + Traffic(report_traffic(len(trainer.adapters.units), 0).bytes_up, 0, 0)
    assert (metrics.bytes_up, metrics.bytes_down, metrics.round_trips) == msgspec.structs.astuple(wanted)


def test_what_the_basis_takes_is_counted_and_given_back(tiny: TinyFactory, runs: Runs) -> None:
    run = run_of("bottleneck")
    groups = run.groups(Bundle.open(runs.bundle).manifest)
    kept = sum(state_bytes(run.spec, group, run.codecs.adapter_state) for group in groups)
    sketches = sum(sketch_bytes(group, run.adapter.rank) for group in groups)
    limits = [(sketches - 1, "lower --rank"), (sketches + 1, "beside .* that it keeps for the session.*--batch-size")]
    for limit, message in limits:
        with (
            Runs.of(tiny, quotas=QuotaLimits(live_bytes=limit)) as own,
            pytest.raises(RefusedError, match=message),
            own.train(run),
        ):
            pass
    with Runs.of(tiny) as own, own.train(run) as trainer:
        quotas = own.server.server.service.quotas
        eventually(lambda: quotas.live_bytes == kept)
        trainer.run_step()
        eventually(lambda: quotas.live_bytes == kept)


def test_memory_of_sketches_goes_back_to_the_system_before_the_first_step(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a session: eight of SmolLM2 that did not held 1.1 GB more while they trained."""
    released = []
    monkeypatch.setattr(session_loop, "release_freed_memory", lambda: released.append(True))
    with Runs.of(tiny) as own, own.train(run_of("bottleneck")) as trainer:
        trainer.run_step()
        assert released == [True]


def test_memory_of_a_large_micro_batch_goes_back_to_the_system_once_it_has_ended(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = []
    monkeypatch.setattr(session_loop, "MUCH_BYTES", 1)
    with Runs.of(tiny) as own, own.train(run_of("bottleneck")) as trainer:
        quotas = own.server.server.service.quotas
        trainer.run_step()
        eventually(lambda: not quotas._running_bytes)
        monkeypatch.setattr(session_loop, "release_freed_memory", lambda: released.append(quotas._running_bytes))
        trainer.run_step()
        eventually(lambda: released == [0])


@pytest.mark.parametrize("basis", ["data", "weights"])
def test_what_the_basis_computes_is_charged(tiny: TinyFactory, basis: str) -> None:
    """Of micro-batches, and of making what the server keeps: after the first of them the quota is used up."""
    limits = QuotaLimits(compute_s_per_hour=1e-6)
    run = run_of("bottleneck", basis=basis)
    with Runs.of(tiny, quotas=limits) as own, pytest.raises(RefusedError) as refused, own.train(run):
        pass
    assert refused.value.code == "quota_compute"
