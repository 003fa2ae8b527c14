"""Ways to every state of a session, and what both of its sides refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import conversations as c
import msgspec
import pytest
from conversations import MAX_CONTEXT, TOKENS, Pair

from dlora.protocol import messages as m
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from dlora.protocol.kill_revive import KillReviveConfig
from dlora.protocol.session import Session
from dlora.protocol.states import Side, State
from dlora.protocol.tensors import WireTensor

f, ints = c.floats, WireTensor.from_ints
ENCODED_WIDTH = 6
OPENED = m.SessionOpened(session="one", token=c.TOKEN)

BOTTLENECK = AdapterSpec(kind="bottleneck", r=2)


def state_of(group: int = 0) -> m.AdapterState:
    """What a server keeps of a group of bottlenecks."""
    spec = c.GROUPS[group]
    return c.adapter_state(group, tensors=(f(2, spec.in_features), f(spec.out_features, 2)))


SETTING_UP = c.opening(adapter=BOTTLENECK)
ONE_ASKED: Final = "a group was asked"
# The shortest way to each state.
WAYS: dict[State | str, list[m.AnyMessage]] = {
    State.START: [],
    State.GREETING: c.opening()[:1],
    State.GREETED: c.opening()[:2],
    State.OPENING: c.opening()[:3],
    State.SETTING_UP: SETTING_UP,
    State.MAKING_STATE: [*SETTING_UP, m.MakeAdapterState(group=0)],
    State.TAKING_STATE: [*SETTING_UP, state_of()],
    State.TAKING_PARAMETERS: [
        *c.opening(kill_revive=c.GIVES),
        c.report(),
        c.signal(units=b"\3\1"),
        c.parameters(),
    ],
    State.IDLE: c.opening(),
    State.FORWARD: [*c.opening(), c.embeddings()],
    State.LOSS: [*c.opening(), *c.forward()],
    State.BACKWARD: [*c.opening(), *c.forward(), c.grad_hidden_states(), c.group_grad(group=2)],
    State.RESUMING: [*c.opening()[:2], c.resume_session()],
    State.RESUMED: [*c.opening()[:2], c.resume_session(), c.session_resumed()],
    State.CLOSED: [*c.opening(), m.CloseSession()],
    ONE_ASKED: [*c.opening(), c.embeddings(), c.group_input()],
}


def refuses(session: Session, act: Callable[[], object], kind: type[ProtocolError]) -> Any:
    """That ``act`` raises ``kind`` and leaves the session as it was; gives the error."""
    before = c.everything(session)
    with pytest.raises(kind) as raised:
        act()
    assert c.everything(session) == before
    return raised.value


def refused_by_both(
    pair: Pair, message: m.AnyMessage, text: str, code: m.ErrorCode = m.ErrorCode.PROTOCOL, sender: Side | None = None
) -> None:
    """That neither side sends or takes ``message``, and why."""
    sender = sender or c.sender_of(message)
    speaker, listener = pair.sides[sender], pair.sides[c.other(sender)]
    error = refuses(listener, lambda: c.hear(listener, message), RemoteProtocolError)
    assert text in str(error)
    assert error.code == code
    if code is not m.ErrorCode.NON_FINITE:  # ours are looked at where floats become wire tensors
        assert text in str(refuses(speaker, lambda: speaker.send(message), LocalProtocolError))


def say_all(pair: Pair, messages: Iterable[m.AnyMessage]) -> None:
    for message in messages:
        pair.say(message)


def changed(message: m.AnyMessage, **changes: Any) -> m.AnyMessage:
    return msgspec.structs.replace(message, **changes)


def using(context_length: int = MAX_CONTEXT, **changes: Any) -> list[m.AnyMessage]:
    return [*c.opening()[:2], c.open_session(purpose=m.Use(context_length=context_length), **changes), OPENED]


def decoding(position: int | None, tokens: int = TOKENS, **changes: Any) -> m.Embeddings:
    """``changes``: of ``Decoding``, or of the message."""
    asked = {name: changes.pop(name) for name in ("drafts", "ahead", "is_ahead") if name in changes}
    tensors = {"hidden_states": f(tokens, c.WIDTH), "sequence_lengths": ints([tokens])}
    place = None if position is None else m.Decoding(position, **asked)
    return c.embeddings(mode="decode", decoding=place, **{**tensors, **changes})


def decoded(position: int, tokens: int = TOKENS) -> Iterator[m.AnyMessage]:
    yield decoding(position, tokens)
    for group in c.ALL:
        yield c.group_input(group=group, hidden_states=f(tokens, c.GROUPS[group].in_features))
        yield c.group_delta(group=group, deltas=tuple(f(tokens, each.out_features) for each in c.GROUPS[group].targets))
    yield c.labelled()


def encoding(**changes: Any) -> list[m.AnyMessage]:
    settings = {"groups": (), "purpose": m.Encode(blocks=2, width=ENCODED_WIDTH), **changes}
    return [*c.opening()[:2], c.open_session(**settings), OPENED]


def to_encode(**changes: Any) -> m.Embeddings:
    return c.embeddings(mode="encode", **{"label_positions": ints([]), **changes})


def encoded(*lengths: int, micro_batch: int = 0, width: int = ENCODED_WIDTH) -> m.EncodedHiddenStates:
    tensors = tuple(f(length, width) for length in lengths)
    return m.EncodedHiddenStates(step=0, micro_batch=micro_batch, hidden_states=tensors)


HALF = KillReviveConfig(active_fraction=0.5)
HELD = [*c.opening(kill_revive=c.GIVES), c.report(0), c.signal(0, b"\1\3")]
GIVING = [c.parameters(1), c.parameters_taken(1), c.parameters(2), c.parameters_taken(2)]
GOES_ON = [*c.opening(kill_revive=c.GIVES, next_step=3, ticket=b"signed")[:-1], c.session_opened(b"\1\4")]
BASIS = [c.embeddings(mode="basis"), c.labelled(), c.grad_hidden_states()]
ENCODED_CONTEXT = encoding(purpose=m.Encode(blocks=2, width=ENCODED_WIDTH, context_length=5))


# -- answers in passes, with guesses of the server ---------------------------------------------------------

ANSWER_PASSES: Final = m.Passes(2, 1)


def answering(**purpose: Any) -> list[m.AnyMessage]:
    """A session of bottleneck adapters in passes, for which the server guesses."""
    settings = {"context_length": MAX_CONTEXT, "passes": ANSWER_PASSES, "drafts": "fp16", **purpose}
    states = [each for group in c.ALL for each in (state_of(group), m.AdapterState(group=group, tensors=()))]
    return [*c.opening()[:2], c.open_session(purpose=m.Use(**settings), adapter=BOTTLENECK), OPENED, *states]


def begun(position: int, tokens: int = 1, **changes: Any) -> m.Embeddings:
    settings = {"passes": ANSWER_PASSES, "label_positions": ints([tokens - 1]), **changes}
    return decoding(position, tokens, **settings)


def reads(rows: int, *groups: int, **changes: Any) -> m.GroupInput:
    return c.group_input(groups=groups, hidden_states=f(len(groups) * rows, BOTTLENECK.r), **changes)


def writes(rows: int, *groups: int, **changes: Any) -> m.GroupDelta:
    return c.group_delta(groups=groups, deltas=(f(len(groups) * rows, BOTTLENECK.r),), **changes)


def in_passes(rows: int, **changes: Any) -> list[m.AnyMessage]:
    """From what groups read to what they write in the last pass."""
    waves = (c.ALL, c.ALL[1:])
    return [each for groups in waves for each in (reads(rows, *groups, **changes), writes(rows, *groups, **changes))]


def drafts(*ids: int, **changes: Any) -> m.DraftTokens:
    return m.DraftTokens(**{"step": 0, "micro_batch": 0, "token_ids": ints(ids), **changes})


def last(rows: int, next_token: int | None = None, **changes: Any) -> m.LabelledHiddenStates:
    return c.labelled(hidden_states=f(rows, c.WIDTH), gradients=0, next_token=next_token, **changes)


WAYS[State.AHEAD] = [*answering(), begun(0, 3, ahead=2), *in_passes(3), last(1, 9)]
