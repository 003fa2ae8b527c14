"""The controller: what always holds, what each policy does, and a planted toy in which it must find the right units."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlora.cloud.serving.ticket import load_ticket, ticket_of
from dlora.protocol.adapters import AdapterSpec, crossings
from dlora.protocol.controller import Controller, unit_costs
from dlora.protocol.errors import RefusedError, RemoteProtocolError, UsageError
from dlora.protocol.groups import GroupSpec, TargetSpec, group_units
from dlora.protocol.kill_revive import LIVE, KillReviveConfig, Timetable, UnitState, steps_needed

KEY = b"a key of the server"
EIGHTH = KillReviveConfig(active_fraction=0.125, score="grad")


def make_groups(blocks: int, groups_a_block: int = 1) -> tuple[GroupSpec, ...]:
    return tuple(
        GroupSpec(block, 16, (TargetSpec(f"blocks.{block}.{g}", 16 + 8 * g),))
        for block in range(blocks)
        for g in range(groups_a_block)
    )


def scores_of(step: int, units: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, step]).random(units).astype(np.float32)


def run(controller: Controller, steps: int, seed: int = 0) -> np.ndarray:
    """Report random scores for ``steps`` steps; the states of each step, uint8 (steps + 1, units)."""
    history = [controller.states]
    for step in range(controller.next_step, controller.next_step + steps):
        history.append(controller.report(step, scores_of(step, len(history[0]), seed)))
    return np.stack(history)


configs = st.builds(
    KillReviveConfig, active_fraction=st.sampled_from([0.0, 0.125, 0.3, 0.5, 0.9, 1.0]),
    unit=st.sampled_from(["block", "group"]), score=st.sampled_from(["sensitivity", "grad", "random", "static"]),
    warmup_fraction=st.sampled_from([0.0, 0.05, 1.0]), warmup_steps=st.integers(0, 30),
    ramp_fraction=st.sampled_from([0.0, 0.25, 0.6, 1.0]), kill_every=st.integers(1, 12),
    revive_every=st.integers(0, 12), probation=st.integers(0, 12),
    on_kill=st.sampled_from(["fade", "bypass", "hold_forward", "give_to_server"]),
    pinned=st.sampled_from([(), (1,), (0, 2), (1, 1)]), static=st.just((0, 3)),
)  # fmt: skip
runs = {
    "config": configs, "blocks": st.integers(4, 9), "groups_a_block": st.integers(1, 3),
    "seed": st.integers(0, 2**32 - 1), "total": st.integers(1, 120),
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(**runs)
def test_controller_invariants_hold(
    config: KillReviveConfig, blocks: int, groups_a_block: int, seed: int, total: int
) -> None:
    groups = make_groups(blocks, groups_a_block)
    all_units = range(len(group_units(groups, config.unit)))
    controller = Controller(config, groups, seed=seed, total_steps=total, learnt=all_units)
    timetable = controller.timetable
    history = run(controller, total)
    active = (history == UnitState.ACTIVE).sum(axis=1)
    assert history.shape[1] == len(group_units(groups, config.unit))
    assert (history[:, list(config.pinned)] == UnitState.ACTIVE).all()
    if config.active_fraction == 1 and config.score != "static":
        assert (history == UnitState.ACTIVE).all()
    if config.score == "static":
        assert (history[1:] == history[-1]).all()
        assert (active == active[0]).all()
        assert active[0] == config.budget_floor(history.shape[1])
    else:
        assert active.tolist() == [timetable.budget(step) for step in range(total + 1)]
    # Traffic is promised: once the ramp is over, nothing else exchanges, unless the user wants it held.
    if config.on_kill != "hold_forward":
        live = np.isin(history, list(LIVE))
        if config.gives_to_server:
            # But for the one step in which the server is given what a unit has learnt.
            held = history == UnitState.HELD
            assert (history[1:][held[:-1]] != UnitState.HELD).all()
            assert not (history == UnitState.KILLED).any()
            given = history == UnitState.GIVEN
            assert (held[:-1] | given[:-1])[given[1:]].all()
            live &= ~held
        live = live.sum(axis=1)
        assert (live[timetable.ramp_end :] == active[timetable.ramp_end :]).all()
    settled = timetable.last_change + config.gives_to_server
    assert (history[settled:] == history[-1]).all()
    assert not controller._on_trial.any()  # whoever was tried was judged
    # Fades last kill_every steps and end in KILLED.
    fading = history == UnitState.FADING
    begins = fading & ~np.vstack([np.zeros_like(fading[:1]), fading[:-1]])
    for step, unit in np.argwhere(begins):
        fade = history[step : step + config.kill_every + 1, unit]
        assert (fade[:-1] == UnitState.FADING).all()
        assert fade[-1] == UnitState.KILLED
    again = run(Controller(config, groups, seed=seed, total_steps=total, learnt=all_units), total)
    assert (again == history).all()


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 1), **runs)
def test_controller_from_ticket_continues_identically(
    config: KillReviveConfig, blocks: int, groups_a_block: int, seed: int, total: int, cut: float
) -> None:
    groups = make_groups(blocks, groups_a_block)
    whole = run(Controller(config, groups, seed=seed, total_steps=total), total)
    first = Controller(config, groups, seed=seed, total_steps=total)
    size = len(ticket_of(first, KEY))
    step = int(cut * total)
    run(first, step)
    ticket = ticket_of(first, KEY)
    assert len(ticket) == size
    second = Controller(config, groups, seed=seed, total_steps=total)
    load_ticket(second, ticket, KEY, step)
    assert ticket_of(second, KEY) == ticket
    assert (run(second, total - step) == whole[step:]).all()


GROUPS = make_groups(8)
CONFIG = KillReviveConfig(score="grad", warmup_steps=5, kill_every=5, revive_every=5, probation=5, active_fraction=0.5)


def open_again(ticket: bytes, key: bytes = KEY, next_step: int = 30, **changes: Any) -> None:
    controller = Controller(**{"config": CONFIG, "groups": GROUPS, "seed": 1, "total_steps": 60} | changes)
    load_ticket(controller, ticket, key, next_step)


def test_ticket_is_valid_for_its_own_run_only() -> None:
    controller = Controller(CONFIG, GROUPS, seed=1, total_steps=60)
    run(controller, 30)
    ticket = ticket_of(controller, KEY)
    open_again(ticket)
    others: list[dict[str, Any]] = [
        {"key": b"another"},
        {"config": KillReviveConfig()},
        {"groups": make_groups(8, 2)},
        {"groups": make_groups(9)},
        {"seed": 2},
        {"total_steps": 61},
        {"next_step": 29},
    ]
    for other in others:
        with pytest.raises(RefusedError) as caught:
            open_again(ticket, **other)
        assert caught.value.code == "ticket"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_forged_ticket_is_refused(data: st.DataObject) -> None:
    ticket = bytearray(ticket_of(Controller(CONFIG, GROUPS, seed=1, total_steps=60), KEY))
    if data.draw(st.booleans()):
        position = data.draw(st.integers(0, len(ticket) - 1))
        ticket[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del ticket[data.draw(st.integers(0, len(ticket) - 1)) :]
    with pytest.raises(RefusedError) as caught:
        open_again(bytes(ticket), next_step=0)
    assert caught.value.code == "ticket"


@pytest.mark.parametrize(
    ("step", "scores", "code"),
    [
        (1, np.zeros(8), "protocol"), (0, np.zeros(7), "protocol"), (0, np.zeros((8, 1)), "protocol"),
        (0, np.full(8, -1.0), "protocol"), (0, np.full(8, np.nan), "non_finite"),
        (0, np.full(8, np.inf), "non_finite"),
    ],
)  # fmt: skip
def test_a_bad_report_is_refused_and_changes_nothing(step: int, scores: np.ndarray, code: str) -> None:
    controller = Controller(CONFIG, GROUPS, seed=1, total_steps=60)
    before = ticket_of(controller, KEY)
    with pytest.raises(RemoteProtocolError) as caught:
        controller.report(step, scores)
    assert caught.value.code == code
    assert ticket_of(controller, KEY) == before


def test_no_report_after_the_last_step() -> None:
    controller = Controller(CONFIG, GROUPS, seed=1, total_steps=3)
    run(controller, 3)
    with pytest.raises(RemoteProtocolError):
        controller.report(3, np.zeros(8))


AT_FLOOR = KillReviveConfig(active_fraction=0.375, warmup_steps=0, warmup_fraction=0.0, ramp_fraction=0.0,
                            score="grad", revive_every=10, probation=5, kill_every=5)  # fmt: skip


def test_a_run_without_warm_up_begins_with_units_evenly_along_the_depth() -> None:
    def first(**changes: object) -> list[int]:
        config = msgspec.structs.replace(AT_FLOOR, **changes)
        return np.flatnonzero(Controller(config, GROUPS, seed=0, total_steps=80).states).tolist()

    assert first() == [1, 4, 7]
    assert first(active_fraction=0.125) == [7]
    assert first(active_fraction=0.5, pinned=(3, 4)) == [2, 3, 4, 7]
    assert first(pinned=(0, 1, 2)) == [0, 1, 2]


def test_the_first_report_of_a_run_without_warm_up_chooses_among_all_units() -> None:
    scores = np.array([8, 1, 1, 9, 1, 1, 7, 1], np.float64)
    controller = Controller(AT_FLOOR, GROUPS, seed=0, total_steps=80, counts_costs=False)
    assert np.flatnonzero(controller.report(0, scores) == UnitState.ACTIVE).tolist() == [0, 3, 6]
    # From then on a killed unit's score counts no more; what is remembered of it is in the measure of one step.
    after = controller.report(1, 3 * scores * [1, 1, 1, 1, 1, 100, 1, 1])
    assert np.flatnonzero(after == UnitState.ACTIVE).tolist() == [0, 3, 6]
    np.testing.assert_allclose(controller._ema, 3 * scores)


def test_a_run_without_warm_up_begins_with_what_has_learnt_something() -> None:
    """Of an earlier part of it, or of an adapter to start from; the others' effect is kept where that is asked for."""

    def first(on_kill: Any, learnt: tuple[int, ...]) -> list[int]:
        config = msgspec.structs.replace(AT_FLOOR, on_kill=on_kill)
        return Controller(config, GROUPS, seed=0, total_steps=80, learnt=learnt).states.tolist()

    assert first("bypass", (0, 2, 3)) == [1, 0, 1, 1, 0, 0, 0, 0]
    assert first("bypass", (2,)) == [0, 0, 1, 1, 0, 0, 0, 1]
    for on_kill in ("give_to_server", "hold_forward"):
        assert first(on_kill, ()) == [0, 1, 0, 0, 1, 0, 0, 1]
        assert first(on_kill, (0, 1, 2, 3)) == [1, 1, 3, 1, 0, 0, 0, 0]
    static = KillReviveConfig(score="static", static=(5,), on_kill="give_to_server")
    assert Controller(static, GROUPS, seed=0, total_steps=9, learnt=(4,)).states.tolist() == [0, 0, 0, 0, 3, 1, 0, 0]


def test_a_unit_that_was_never_scored_is_tried_as_readily_as_the_best() -> None:
    """Without warm-up and basis pass nothing is known of those that are not active: it is not that they are bad."""
    tried = np.zeros(8, np.int64)
    for seed in range(40):
        controller = Controller(AT_FLOOR, GROUPS, seed=seed, total_steps=80, counts_costs=False)
        for step in range(60):
            active = controller.states == UnitState.ACTIVE
            tried += active
            controller.report(step, np.arange(1, 9) * active)
    assert (tried > 100).all(), tried


def test_the_first_report_that_scores_active_units_alone_changes_nothing() -> None:
    controller = Controller(AT_FLOOR, GROUPS, seed=0, total_steps=80)
    before = controller.states
    assert (controller.report(0, np.where(before == UnitState.ACTIVE, 0.5, 0.0)) == before).all()
    with_warm_up = msgspec.structs.replace(AT_FLOOR, warmup_steps=1)
    controller = Controller(with_warm_up, GROUPS, seed=0, total_steps=80)
    assert (controller.states == UnitState.ACTIVE).all()


def test_static_units_hold_from_the_first_step() -> None:
    def active(config: KillReviveConfig) -> list[int]:
        return np.flatnonzero(Controller(config, GROUPS, seed=0, total_steps=80).states).tolist()

    assert active(KillReviveConfig(score="static", static=(2, 5))) == [2, 5]
    assert active(KillReviveConfig(score="static", static=(2, 5), pinned=(0,))) == [0, 2, 5]
    assert active(KillReviveConfig(active_fraction=0, pinned=(1,))) == [1]
    assert active(KillReviveConfig()) == list(range(8))
    with pytest.raises(UsageError, match="--static-units"):
        active(KillReviveConfig(active_fraction=0.5))
    with pytest.raises(UsageError, match="--pin: there is no block 8; they are 0 to 7"):
        active(KillReviveConfig(pinned=(8,)))


def test_run_of_60_steps_reaches_its_budget_after_warm_up() -> None:
    groups = make_groups(30)
    history = run(Controller(EIGHTH, groups, seed=0, total_steps=60), 60)
    live = (history != UnitState.KILLED).sum(axis=1)
    assert live.tolist() == [30] * 20 + [4] * 41


def test_steps_needed_covers_warm_up_ramp_and_trials() -> None:
    assert steps_needed(EIGHTH, 30) == 107
    assert [Timetable(EIGHTH, 30, steps).is_long_enough for steps in (60, 106, 107, 400)] == [False, False, True, True]
    never_revived = msgspec.structs.replace(EIGHTH, revive_every=0)
    assert steps_needed(never_revived, 30) == 81  # the ramp ends after the warm-up's 20 steps


def test_a_long_ramp_is_cubic_and_fades() -> None:
    timetable = Timetable(EIGHTH, 30, 400)
    assert (timetable.warmup, timetable.ramp_end, timetable.last_change, timetable.floor) == (20, 100, 380, 4)
    assert [timetable.budget(step) for step in (0, 19, 20, 60, 99, 100, 400)] == [30, 30, 30, 8, 5, 4, 4]
    history = run(Controller(EIGHTH, make_groups(30), seed=0, total_steps=400), 400)
    assert (history[:100] == UnitState.FADING).any()
    assert not (history[100:] == UnitState.FADING).any()


def test_trials_take_at_most_their_share() -> None:
    groups = make_groups(30)
    never = msgspec.structs.replace(EIGHTH, revive_every=0)
    without = run(Controller(never, groups, seed=0, total_steps=400), 400)
    assert (without[100:] == without[100]).all()
    history = run(Controller(EIGHTH, groups, seed=0, total_steps=400), 400) == UnitState.ACTIVE
    revived = (history[1:] & ~history[:-1]).sum(axis=1)
    ticks = np.flatnonzero(revived) + 1
    assert len(ticks)
    assert ((ticks - 100) % 25 == 0).all()
    assert ticks[-1] <= 375
    assert revived.max() <= 2


def test_trials_have_their_share_of_the_seats() -> None:
    halves = KillReviveConfig(active_fraction=0.5, score="random")
    assert Controller(halves, make_groups(32), seed=0, total_steps=400).trial_seats == 4


def test_trials_end_before_the_quiet_phase() -> None:
    config = KillReviveConfig(active_fraction=0.5, score="grad", warmup_steps=5, ramp_fraction=0.0, kill_every=5,
                              revive_every=10, probation=10)  # fmt: skip
    timetable = Timetable(config, 8, 44)
    assert (timetable.ramp_end, timetable.last_change) == (5, 42)
    # One that begins at 35 would be judged at 45.
    assert [step for step in range(45) if timetable.is_revive_tick(step)] == [15, 25]
    # A last time at 42, whatever the rhythm.
    assert [step for step in range(45) if timetable.is_kill_tick(step)] == [10, 15, 20, 25, 30, 35, 40, 42]


def test_a_state_of_other_units_is_refused() -> None:
    controller = Controller(CONFIG, GROUPS, seed=1, total_steps=60)
    state = controller.state()
    controller.load_state(state)
    for other in (state[:-1], state + bytes(1)):
        with pytest.raises(ValueError, match=f"{len(other)} bytes are no state of 8 units"):
            controller.load_state(other)


def test_failed_last_trial_is_replaced_by_the_best_idle_unit() -> None:
    config = KillReviveConfig(active_fraction=0.5, score="grad", warmup_steps=5, ramp_fraction=0.0, kill_every=5,
                              revive_every=10, probation=10)  # fmt: skip
    worth = np.array([9, 1, 8, 1, 7, 1, 6, 1], np.float32)
    controller = Controller(config, GROUPS, seed=3, total_steps=40, counts_costs=False)
    history = [controller.states]
    for step in range(40):
        history.append(controller.report(step, worth * (controller.states == UnitState.ACTIVE)))
    sets = [set(np.flatnonzero(states == UnitState.ACTIVE).tolist()) for states in history]
    assert sets[5] == {0, 2, 4, 6}
    assert any(each != sets[5] for each in sets[15:])  # others were tried
    assert sets[-1] == sets[5]


def test_costs_count_bytes_round_trips_and_depth() -> None:
    groups = make_groups(4, 2)
    widths = crossings(AdapterSpec(), groups)
    blocks = unit_costs(groups, group_units(groups, "block"), widths)
    np.testing.assert_allclose(blocks.mean(), 1.0)
    np.testing.assert_allclose(blocks, (2 + np.array([4, 3, 2, 1]) / 2.5) / 3)
    single = unit_costs(groups, group_units(groups, "group"), widths)
    np.testing.assert_allclose(single.mean(), 1.0)
    assert (single[1::2] > single[::2]).all()  # wider outputs
    wires = np.array([each.total_width for each in widths])
    np.testing.assert_allclose(single, (1 + wires / wires.mean() + np.repeat([4, 3, 2, 1], 2) / 2.5) / 3)


def test_of_units_with_equal_scores_the_deeper_ranks_higher_where_costs_count() -> None:
    def rank_values(*, counts_costs: bool) -> np.ndarray:
        controller = Controller(EIGHTH, GROUPS, seed=0, total_steps=80, counts_costs=counts_costs)
        controller.report(0, np.ones(8))
        return controller._rank_values(1)

    assert (np.diff(rank_values(counts_costs=True)) > 0).all()
    assert (rank_values(counts_costs=False) == 1).all()


def test_units_are_kept_apart_and_still_ranked() -> None:
    def survivors(scores: np.ndarray) -> list[int]:
        config = KillReviveConfig(active_fraction=0.125, score="grad", ramp_fraction=0.0)
        controller = Controller(config, make_groups(32), seed=0, total_steps=100, counts_costs=False)
        for step in range(20):
            controller.report(step, scores)
        return np.flatnonzero(controller.states == UnitState.ACTIVE).tolist()

    gaps = np.diff([-1, *survivors(np.ones(32)), 32])
    assert gaps.min() >= 3
    deep = np.linspace(1.0, 2.0, 32)
    assert np.diff(survivors(deep)).min() >= 3
    one = np.where(np.arange(32) == 13, 50.0, 1.0)
    assert 13 in survivors(one)


def test_controller_without_groups_has_no_units() -> None:
    controller = Controller(KillReviveConfig(), (), seed=0, total_steps=10)
    assert controller.report(0, np.zeros(0)).shape == (0,)


@pytest.mark.parametrize(("score", "finds"), [("grad", True), ("random", False)])
def test_units_that_are_worth_most_are_found_and_others_when_that_changes(score: str, finds: bool) -> None:
    """A unit's worth shows only while it is active; luck is 4 seats of 12, and one seat moves at a time."""
    config = KillReviveConfig(
        active_fraction=1 / 3, score=score, warmup_steps=20, ramp_fraction=0.1, kill_every=10, revive_every=10,
        probation=10,
    )  # fmt: skip
    hits: list[list[float]] = [[], []]  # in the last fifth of each half
    for seed in range(6):
        controller = Controller(config, make_groups(12), seed=seed, total_steps=1200, counts_costs=False)
        noise = np.random.default_rng(seed)
        for step in range(1200):
            half = step // 600
            worthy = ([0, 5], [3, 8])[half]
            active = controller.states == UnitState.ACTIVE
            if step % 600 >= 480:
                hits[half].append(float(active[worthy].mean()))
            worth = np.where(np.isin(np.arange(12), worthy), 10.0, 1.0) * noise.uniform(0.5, 1.5, 12)
            controller.report(step, worth * active)
    for half in hits:
        assert np.mean(half) > 0.9 if finds else np.mean(half) < 0.6
