"""What may not be said: each rule, against both sides."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import conversations as c
import msgspec
import numpy as np
import pytest
import session_ways as w
from conversations import MAX_CONTEXT, Pair

from dlora.protocol import messages as m
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.groups import GroupSpec
from dlora.protocol.kill_revive import KillReviveConfig
from dlora.protocol.states import Side, State
from dlora.protocol.tensors import WireTensor

E = Side.EDGE
PROTOCOL, LIMIT, NON_FINITE = m.ErrorCode.PROTOCOL, m.ErrorCode.LIMIT, m.ErrorCode.NON_FINITE
f, ints = c.floats, WireTensor.from_ints
T, L, W = c.TOKENS, c.LABELLED, c.WIDTH

# -- right message, wrong content ------------------------------------------------------------------------


def nan(tensor: WireTensor) -> WireTensor:
    data = tensor.data.copy()
    data.reshape(-1)[-1] = np.nan
    return WireTensor(tensor.dtype, data, tensor.exponent)


LONG = c.MAX_TOKENS + 1
WRONG: dict[tuple[State | str, m.ErrorCode], dict[str, m.AnyMessage]] = {
    (State.GREETING, m.ErrorCode.VERSION): {"another version": c.welcome(version=99)},
    (State.GREETING, PROTOCOL): {
        "a sequence too long for a micro-batch": msgspec.structs.replace(c.welcome(), max_sequence_length=LONG),
    },
    (State.GREETED, PROTOCOL): {
        "a group of nothing": c.open_session(groups=(GroupSpec(0, 4, ()),)),
        "beyond the end": c.open_session(next_step=10),
    },
    (State.OPENING, PROTOCOL): {
        "too few units": c.session_opened(b"\1"),
        "unknown unit state": c.session_opened(b"\1\7"),
        "a ticket of floats": msgspec.structs.replace(c.session_opened(), ticket=f(3)),
    },
    (State.IDLE, PROTOCOL): {
        "a later step": c.embeddings(step=1),
        "a later step, evaluating": c.embeddings(step=1, mode="evaluate"),
        "a later micro-batch": c.embeddings(micro_batch=1),
        "embedding width": c.embeddings(hidden_states=f(T, W + 1)),
        "embedding rank": c.embeddings(hidden_states=f(1, T, W)),
        "embedding dtype": c.embeddings(hidden_states=f(T, W, dtype="fp16")),
        "lengths' sum": c.embeddings(sequence_lengths=ints([T + 1])),
        "lengths' sum overflows": c.embeddings(sequence_lengths=ints([2**31 - 1] * 2 + [T + 2])),
        "an empty sequence": c.embeddings(sequence_lengths=ints([T, 0])),
        "a negative length": c.embeddings(sequence_lengths=ints([T + 1, -1])),
        "no sequences": c.embeddings(sequence_lengths=ints([])),
        "lengths' dtype": c.embeddings(sequence_lengths=WireTensor("fp32", np.array([1, T - 1], np.float32))),
        "labels' dtype": c.embeddings(label_positions=WireTensor("fp32", np.array([0, 2], np.float32))),
        "no labels": c.embeddings(label_positions=ints([])),
        "labels twice": c.embeddings(label_positions=ints([1, 1])),
        "labels descending": c.embeddings(label_positions=ints([2, 0])),
        "a label before": c.embeddings(label_positions=ints([-1, 0])),
        "a label behind": c.embeddings(label_positions=ints([0, T])),
        "crossing positions twice": c.embeddings(crossing_positions=ints([1, 1])),
        "an example too few": c.embeddings(examples=ints([1])),
        "report of another step": c.report(1),
        "report of too many": c.report(0, units=3),
    },
    (State.IDLE, LIMIT): {
        "no tokens": c.embeddings(hidden_states=f(0, W)),
        "too many tokens": c.embeddings(hidden_states=f(LONG, W), sequence_lengths=ints([1] * LONG)),
        "too long a sequence": c.embeddings(hidden_states=f(9, W), sequence_lengths=ints([9])),
    },
    (State.IDLE, NON_FINITE): {
        "embedding NaN": c.embeddings(hidden_states=nan(f(T, W))),
        "scores' NaN": m.StepReport(step=0, scores=nan(f(2))),
    },
    (State.FORWARD, PROTOCOL): {
        "input of another step": c.group_input(step=1),
        "input of another micro-batch": c.group_input(micro_batch=1),
        "input of no group": c.group_input(group=3),
        "input's tokens": c.group_input(hidden_states=f(T + 1, W)),
        "input's dtype": c.group_input(hidden_states=f(T, W, dtype="fp16")),
        "two groups at once": c.group_input(groups=(0, 1), hidden_states=f(2 * T, W)),
        "deltas before the input": c.group_delta(),
    },
    (State.FORWARD, NON_FINITE): {"input's NaN": c.group_input(hidden_states=nan(f(T, W)))},
    (w.ONE_ASKED, PROTOCOL): {
        "delta of another step": c.group_delta(step=1),
        "delta of another group": c.group_delta(group=1),
        "a delta too few": c.group_delta(deltas=c.outputs(0)[:1]),
        "deltas changed about": c.group_delta(deltas=c.outputs(0)[::-1]),
        "delta's dtype": c.group_delta(deltas=c.outputs(0, "fp16")),
    },
    (w.ONE_ASKED, NON_FINITE): {"delta's NaN": c.group_delta(deltas=(c.outputs(0)[0], nan(c.outputs(0)[1])))},
    (State.LOSS, PROTOCOL): {
        "gradient's rows": c.grad_hidden_states(grad_hidden_states=f(L - 1, W)),
        "gradient's micro-batch": c.grad_hidden_states(micro_batch=2),
    },
    (State.LOSS, NON_FINITE): {"gradient's NaN": c.grad_hidden_states(grad_hidden_states=nan(f(L, W)))},
    (State.BACKWARD, PROTOCOL): {
        "gradients again": c.group_grad(group=2),
        "gradients of no group": c.group_grad(group=3),
        "gradients' shape": c.group_grad(group=1, grads=(f(T, 5),)),
        "dx unasked": c.group_input_grad(group=1),
        "dx's shape": c.group_input_grad(group=2, grad_hidden_states=f(T, W)),
    },
    (State.BACKWARD, NON_FINITE): {"dx's NaN": c.group_input_grad(group=2, grad_hidden_states=nan(f(T, 6)))},
}
WRONG_ROWS = [
    pytest.param(state, message, code, id=name)
    for (state, code), rows in WRONG.items() for name, message in rows.items()
]  # fmt: skip


@pytest.mark.parametrize(("state", "message", "code"), WRONG_ROWS)
def test_wrong_content_is_refused_with_its_code(state: State | str, message: m.AnyMessage, code: m.ErrorCode) -> None:
    w.refused_by_both(Pair(w.WAYS[state]), message, "", code)


# -- at a place where it has no place ----------------------------------------------------------------------

GREETED, IDLE = w.WAYS[State.GREETED], w.WAYS[State.IDLE]
ASKED = [*IDLE, *list(c.forward())[:-1]]
HALF_HELD = [*c.opening(kill_revive=w.HALF), c.report(0), c.signal(0, b"\3\1")]
GRADS = [*HALF_HELD, *c.forward(1, gradients=2), c.grad_hidden_states(1)]
FROM_DEVICE = c.opening(adapter=AdapterSpec(kind="ffa", r=2))
DECODED = [*w.using(), *w.decoded(0)]
ENCODING = [*w.encoding(), w.to_encode()]
MANY = m.MAX_ENCODED_SEQUENCES + 1
WIDE = [c.hello(), w.changed(c.welcome(), max_tokens=1000), *w.encoding()[2:]]
LONGER = m.Encode(blocks=2, width=w.ENCODED_WIDTH, context_length=MAX_CONTEXT + 1)


class Refused(NamedTuple):
    """What neither side says after ``way``."""

    way: list[m.AnyMessage]
    message: m.AnyMessage
    text: str
    code: m.ErrorCode = PROTOCOL
    sender: Side | None = None


REFUSED = [
    # With a micro-batch twice, a step's gradients would be those of other data.
    *(
        Refused([*IDLE, *c.forward(), *c.backward()], c.embeddings(0, number),
                f"micro-batch {number} when step 0, micro-batch 1 comes next")
        for number in (0, 2)
    ),
    Refused([*c.opening(kill_revive=c.NONE_NEED_BE_ACTIVE), c.report(0), c.signal(0, b"\0\0"), c.report(1),
             c.embeddings(2)], c.labelled(2), "the report of step 1 has no signal yet"),
    Refused([*IDLE, c.report(0), c.report(1)], c.report(2), "a report of step 2"),
    Refused([*IDLE, c.report(0)], c.signal(1), "for another step"),
    Refused([*IDLE, c.report(0)], c.signal(0, b"\1"), "where uint8 (2,) was due"),
    Refused([*IDLE, c.report(0)], w.changed(c.signal(0), ticket=f(3)), "where uint8"),
    Refused([*IDLE, c.report(0)], c.signal(0, b"\1\x09"), "an unknown unit state"),
    # Groups, and their gradients.
    Refused([*IDLE, c.report(0), c.signal(0, b"\0\1"), c.embeddings(1)], c.group_input(1), "belongs to a killed unit"),
    Refused([*IDLE, c.embeddings(), c.group_input(), c.group_delta()], c.group_input(), "group 0 out of turn"),
    *(Refused(ASKED, c.group_input(group=group), f"group {group} out of turn") for group in c.ALL),
    Refused(ASKED, c.labelled(hidden_states=f(L + 1, W), gradients=3), "was due"),
    Refused(ASKED[:-1], c.group_delta(group=2, deltas=(f(T, W + 1),)), "was due"),
    Refused(ASKED[:-2], c.group_input(group=2, hidden_states=f(T, W)), "was due"),
    Refused(ASKED, c.labelled(gradients=4), "more gradients than groups took part"),
    Refused([*IDLE, *list(c.forward(mode="evaluate"))[:-1]], c.labelled(gradients=1), "more gradients than groups"),
    *(
        Refused([*HALF_HELD, *list(c.forward(1))[:-1]], c.labelled(1, gradients=gradients),
                f"{gradients} gradients for 2 active groups")
        for gradients in (0, 1)
    ),
    Refused([*GRADS, c.group_grad(1, group=2), c.group_grad(1, group=1)], c.group_grad(1),
            "more gradients than were announced"),
    # Units whose parameters the server is given.
    Refused(w.HELD, c.report(1), "a report before the parameters of group 1"),
    Refused(w.HELD, c.parameters(0), "the parameters of group 0, which are not due"),
    Refused(w.HELD, c.parameters(2), "the parameters of group 2, which are not due"),
    Refused(w.HELD, c.parameters(1, r=3), "where fp32 (2, 4) was due"),
    Refused([*w.HELD, *w.GIVING], c.parameters(1), "not due"),
    Refused([*w.HELD, c.embeddings(1)], c.parameters(1), "under way"),
    Refused(w.GOES_ON, c.embeddings(3), "a micro-batch before the parameters of group 1"),
    Refused(c.opening(kill_revive=c.GIVES)[:-1], c.session_opened(b"\1\4"), "before the run's first step"),
    Refused([*c.opening(kill_revive=c.GIVES), c.report(0)], c.signal(0, b"\1\4"),
            "group 1 given to the server, which the device has not done"),
    # Setting up: each group once and in order, and a basis pass before the first.
    *(
        Refused(w.SETTING_UP, message, "group 1 when group 0 comes next", sender=E)
        for message in (m.MakeAdapterState(group=1), c.adapter_state(1))
    ),
    Refused(w.SETTING_UP, c.embeddings(), "of the mode train in SETTING_UP"),
    Refused(w.SETTING_UP, c.embeddings(mode="evaluate"), "of the mode evaluate in SETTING_UP"),
    Refused([*w.SETTING_UP, w.BASIS[0]], c.embeddings(mode="basis", micro_batch=1), "not now"),
    Refused([*w.SETTING_UP, w.BASIS[0]], m.MakeAdapterState(group=0), "under way"),
    Refused([*w.SETTING_UP, w.BASIS[0]], m.CloseSession(), "under way"),
    Refused([*w.SETTING_UP, w.BASIS[0]], c.group_input(), "group 0 does not exist"),
    Refused([*w.SETTING_UP, w.BASIS[0]], c.labelled(gradients=1), "more gradients"),
    Refused([*w.SETTING_UP, *w.BASIS, m.MakeAdapterState(group=0), w.state_of()],
            w.BASIS[0], "not now"),
    Refused(w.using(adapter=w.BOTTLENECK), w.BASIS[0], "in a session that does not"),
    Refused(IDLE, w.BASIS[0], "of the mode basis in IDLE"),
    *(Refused(FROM_DEVICE, message, "comes from the device") for message in (w.BASIS[0], m.MakeAdapterState(group=0))),
    Refused(GREETED, c.open_session(adapter=AdapterSpec(kind="bottleneck", r=64)), "no wider", LIMIT),
    Refused(w.WAYS[State.MAKING_STATE], c.adapter_state(gradient_norm=math.inf), "not finite", NON_FINITE),
    Refused(GREETED, c.open_session(window=2), "a window of 2 micro-batches; at most 1 fit"),
    Refused(w.WAYS[State.OPENING], w.OPENED, "no units, or no ticket, for a run that trains"),
    Refused(w.using()[:3], c.session_opened(), "units or a ticket where nothing is trained"),
    *(
        Refused(w.SETTING_UP, c.adapter_state(0, tensors=tensors), "where floats were due", sender=E)
        for tensors in ((ints([[1] * 4] * 2), ints([[1, 1]] * 6)), (WireTensor.from_bytes(b"12"),) * 2)
    ),
    # Embeddings, or tokens.
    Refused(IDLE, c.embeddings(hidden_states=None), "neither embeddings nor token ids"),
    Refused(IDLE, c.embeddings(token_ids=ints([5, 6, 7])), "or both"),
    Refused(IDLE, c.embeddings(hidden_states=None, token_ids=f(T)), "int32"),
    Refused([c.hello(), c.welcome(packs=False), *c.opening()[2:]],
            c.embeddings(hidden_states=f(8, W), sequence_lengths=ints([5, 1, 1, 1])),
            "8 tokens count as 20 with their padding; at most 16 fit", LIMIT),
    # What the server keeps of a context.
    Refused(DECODED, w.decoding(4), "tokens from position 4 on, where only 3 are held"),
    Refused([*DECODED, w.decoding(3)], w.decoding(3, micro_batch=1), "not now"),
    Refused([c.hello(), w.changed(c.welcome(), window=2), *w.using(window=2)[2:], w.decoding(0)],
            w.decoding(0, micro_batch=1), "not now"),
    Refused([*w.using(5), *w.decoded(0)], w.decoding(3), "a context of 6 tokens; this session has room for 5", LIMIT),
    Refused(GREETED, w.using(MAX_CONTEXT + 1)[2], "a context of 21 tokens; at most 20 fit", LIMIT),
    *(Refused(w.using(), each, "a position belongs to") for each in (
        w.decoding(None), c.embeddings(mode="evaluate", decoding=m.Decoding(0)),
        w.decoding(0, sequence_lengths=ints([1, T - 1])),
    )),
    *(Refused(way, w.decoding(0), "that has no context length") for way in (w.using(0), IDLE, w.encoding())),
    *(Refused(w.using(), c.embeddings(mode=mode), "trains, in a session that does not") for mode in ("train", "basis")),
    # The first blocks alone.
    *(Refused(ENCODING, wrong, "was due") for wrong in (w.encoded(1, 1), w.encoded(1, 2, width=W))),
    *(Refused(ENCODING, wrong, "tensors of 2 sequences") for wrong in (w.encoded(T), w.encoded(1, 2, 1))),
    Refused(ENCODING, c.labelled(), "not now"),
    Refused(w.encoding(), w.to_encode(label_positions=ints([0])), "some in the mode encode"),
    *(Refused(w.encoding(), w.to_encode(**{name: ints([0, 1])}), "in the mode encode")
      for name in ("crossing_positions", "examples")),
    *(Refused(w.encoding(), c.embeddings(mode=mode), f"of the mode {mode} in a session that is for something else")
      for mode in ("train", "evaluate", "basis")),
    Refused(WIDE, w.to_encode(hidden_states=f(MANY, W), sequence_lengths=ints([1] * MANY)),
            "129 sequences in the mode encode; at most 128 fit", LIMIT),
    Refused(w.encoding(), c.report(), "a report where nothing is trained"),
    Refused(w.using(), w.to_encode(), "of the mode encode in a session that is for something else"),
    Refused(IDLE, w.to_encode(), "of the mode encode in a session that is for something else"),
    Refused(GREETED, w.encoding(groups=c.GROUPS)[2], "groups in a session that only encodes"),
    Refused([*w.using(), c.embeddings(mode="evaluate")], w.encoded(1, 2), "not now"),
    Refused([*w.ENCODED_CONTEXT, w.decoding(0)], w.encoded(T), "not now"),
    Refused([*w.ENCODED_CONTEXT, w.decoding(0)], c.group_input(), "does not exist"),
    Refused([*w.ENCODED_CONTEXT, w.decoding(0)], c.labelled(), "was due"),  # as wide as last hidden states
    Refused([*w.ENCODED_CONTEXT, w.decoding(0)], c.labelled(hidden_states=f(L, w.ENCODED_WIDTH), gradients=1),
            "more gradients than groups took part"),
    Refused(GREETED, w.encoding(purpose=LONGER)[2], "a context of 21 tokens; at most 20 fit", LIMIT),
]  # fmt: skip


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.text)
def test_what_breaks_a_rule_is_refused_by_both_sides(row: Refused) -> None:
    w.refused_by_both(Pair(row.way), *row[1:])


@pytest.mark.parametrize("on_kill", ["fade", "bypass", "hold_forward"])
def test_a_server_cannot_ask_for_what_was_not_offered(on_kill: Any) -> None:
    """What a device has learnt leaves it only where its user chose that."""
    opening = c.opening(kill_revive=KillReviveConfig(active_fraction=0.5, on_kill=on_kill))
    w.refused_by_both(Pair(opening[:-1]), c.session_opened(b"\1\4"), "which the device did not ask for")
    pair = Pair([*opening, c.report(0)])
    w.refused_by_both(pair, c.signal(0, b"\1\4"), "which the device did not ask for")
    pair.say(c.signal(0, b"\1\3"))
    assert pair.sides[E].units.groups_to_give == []
    w.refused_by_both(pair, c.parameters(1), "not due")


@pytest.mark.parametrize("mode", ["train", "evaluate"])
@pytest.mark.parametrize("asked", [0, 1, 2])
def test_every_live_group_is_asked_in_order(asked: int, mode: str) -> None:
    """A server that leaves groups out trains nothing, and nobody would notice."""
    way = [message for group in range(asked) for message in (c.group_input(group=group), c.group_delta(group=group))]
    pair = Pair([*c.opening(), c.embeddings(mode=mode), *way])
    w.refused_by_both(pair, c.labelled(), f"only {asked} of 3 groups have written")
    for group in set(c.ALL) - {asked}:
        w.refused_by_both(pair, c.group_input(group=group), f"group {group} out of turn")
    pair.say(c.group_input(group=asked))
