"""Conversations to hold with two sans-IO sessions: small messages, and a pair that speaks them to itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dlora.protocol import messages as m
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.frames import encode
from dlora.protocol.groups import GroupSpec, TargetSpec
from dlora.protocol.kill_revive import KillReviveConfig
from dlora.protocol.link import Link
from dlora.protocol.session import NUMBERED, Session
from dlora.protocol.states import Side, State
from dlora.protocol.tensors import WireTensor
from dlora.protocol.version import PROTOCOL_VERSIONS
from dlora.protocol.wire_codecs import Codecs, encode_floats

WIDTH = 4
MAX_TOKENS = 16
MAX_LENGTH = 8
MAX_CONTEXT = 20
TOKENS, LABELLED = 3, 2
GROUPS = (
    GroupSpec(0, WIDTH, (TargetSpec("layers.0.q", 4), TargetSpec("layers.0.v", 2))),
    GroupSpec(1, WIDTH, (TargetSpec("layers.1.q", 4),)),
    GroupSpec(1, 6, (TargetSpec("layers.1.down", 4),)),
)
ALL = (0, 1, 2)
UNITS = 2  # a block each
TOKEN = b"t" * m.RESUME_TOKEN_BYTES

FROM_EDGE = (
    m.Hello, m.OpenSession, m.ResumeSession, m.MakeAdapterState, m.Embeddings, m.GroupDelta, m.GradHiddenStates,
    m.GroupInputGrad, m.StepReport, m.CloseSession,
)  # fmt: skip


def floats(*shape: int, dtype: Any = "fp32") -> WireTensor:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 8 - 1
    return encode_floats(values, dtype)


def hello() -> m.Hello:
    return m.Hello(protocol_versions=list(PROTOCOL_VERSIONS), software="a device")


def welcome(version: int = PROTOCOL_VERSIONS[-1], *, packs: bool = True) -> m.Welcome:
    return m.Welcome(
        protocol_version=version,
        software="a server",
        base_model="tiny",
        base_fingerprint="ab" * 32,
        base_weight_format="full",
        embedding_size=WIDTH,
        hidden_size=WIDTH,
        max_sequence_length=MAX_LENGTH,
        max_tokens=MAX_TOKENS,
        packs=packs,
        max_context_length=MAX_CONTEXT,
    )


def open_session(**changes: Any) -> m.OpenSession:
    settings: dict[str, Any] = {
        "base_fingerprint": "ab" * 32,
        "groups": GROUPS,
        "adapter": AdapterSpec(r=2),
        "codecs": Codecs.all(changes.get("wire_dtype", "fp32")),
        "evaluation_codecs": Codecs.all(changes.pop("wire_dtype", "fp32")),
    }
    run = {"kill_revive": KillReviveConfig(active_fraction=0.125, score="grad"), "seed": 1, "total_steps": 9}
    for name in ("kill_revive", "seed", "total_steps", "next_step", "ticket"):
        if name in changes:
            run[name] = changes.pop(name)
    return m.OpenSession(**{**settings, "purpose": m.Train(**run), **changes})


def session_opened(units: bytes = b"\1\1") -> m.SessionOpened:
    return m.SessionOpened(
        session="one", units=WireTensor.from_bytes(units), ticket=WireTensor.from_bytes(b"signed"), token=TOKEN
    )


def resume_session(received: int = 0) -> m.ResumeSession:
    return m.ResumeSession(session="one", token=TOKEN, received=received)


def session_resumed(received: int = 0) -> m.SessionResumed:
    return m.SessionResumed(token=TOKEN, received=received)


def adapter_state(group: int = 0, **changes: Any) -> m.AdapterState:
    return m.AdapterState(group=group, **{"tensors": (floats(GROUPS[group].in_features),), **changes})


GIVES = KillReviveConfig(active_fraction=0.5, score="grad", on_kill="give_to_server")


def parameters(group: int = 0, r: int = 2) -> m.GroupParameters:
    """What a device gives of a group's LoRAs."""
    width, targets = GROUPS[group].in_features, GROUPS[group].targets
    shapes = [shape for target in targets for shape in ((r, width), (target.out_features, r))]
    return m.GroupParameters(group=group, tensors=tuple(floats(*shape) for shape in shapes))


def parameters_taken(group: int = 0) -> m.GroupParameters:
    return m.GroupParameters(group=group, tensors=())


def embeddings(step: int = 0, micro_batch: int = 0, *, mode: Any = "train", **changes: Any) -> m.Embeddings:
    tensors = {
        "hidden_states": floats(TOKENS, WIDTH),
        "sequence_lengths": WireTensor.from_ints([1, TOKENS - 1]),
        "label_positions": WireTensor.from_ints([0, 2]),
    }
    return m.Embeddings(step=step, micro_batch=micro_batch, mode=mode, **{**tensors, **changes})


def embeddings_of(lengths: Sequence[int], width: int, value: float = 1.0, **changes: Any) -> m.Embeddings:
    """Of sequences of these lengths, each number ``value``; the first token has a label."""
    tensors = {
        "hidden_states": WireTensor("fp32", np.full((sum(lengths), width), value, np.float32)),
        "sequence_lengths": WireTensor.from_ints(list(lengths)),
        "label_positions": WireTensor.from_ints([0]),
    }
    return embeddings(**{**tensors, **changes})


def group_input(step: int = 0, micro_batch: int = 0, group: int = 0, **changes: Any) -> m.GroupInput:
    own = {"groups": (group,), "hidden_states": floats(TOKENS, GROUPS[min(group, 2)].in_features)}
    return m.GroupInput(step=step, micro_batch=micro_batch, **{**own, **changes})


def outputs(group: int, dtype: Any = "fp32") -> tuple[WireTensor, ...]:
    return tuple(floats(TOKENS, target.out_features, dtype=dtype) for target in GROUPS[min(group, 2)].targets)


def group_delta(step: int = 0, micro_batch: int = 0, group: int = 0, **changes: Any) -> m.GroupDelta:
    own = {"groups": (group,), "deltas": outputs(group)}
    return m.GroupDelta(step=step, micro_batch=micro_batch, **{**own, **changes})


def labelled(step: int = 0, micro_batch: int = 0, gradients: int = 0, **changes: Any) -> m.LabelledHiddenStates:
    tensors = {"hidden_states": floats(LABELLED, WIDTH)}
    return m.LabelledHiddenStates(step=step, micro_batch=micro_batch, gradients=gradients, **{**tensors, **changes})


def grad_hidden_states(step: int = 0, micro_batch: int = 0, **changes: Any) -> m.GradHiddenStates:
    tensors = {"grad_hidden_states": floats(LABELLED, WIDTH)}
    return m.GradHiddenStates(step=step, micro_batch=micro_batch, **{**tensors, **changes})


def group_grad(
    step: int = 0, micro_batch: int = 0, group: int = 0, *, answer: bool = True, **changes: Any
) -> m.GroupGrad:
    own = {"groups": (group,), "grads": outputs(group), "answer": answer}
    return m.GroupGrad(step=step, micro_batch=micro_batch, **{**own, **changes})


def group_input_grad(step: int = 0, micro_batch: int = 0, group: int = 0, **changes: Any) -> m.GroupInputGrad:
    own = {"groups": (group,), "grad_hidden_states": floats(TOKENS, GROUPS[min(group, 2)].in_features)}
    return m.GroupInputGrad(step=step, micro_batch=micro_batch, **{**own, **changes})


def report(step: int = 0, units: int = UNITS) -> m.StepReport:
    return m.StepReport(step=step, scores=WireTensor("fp32", np.ones(units, np.float32)))


def signal(step: int = 0, units: bytes = b"\1\1") -> m.Signal:
    return m.Signal(step=step, units=WireTensor.from_bytes(units), ticket=WireTensor.from_bytes(b"signed"))


def error() -> m.Error:
    return m.Error(code="internal", message="enough")


# The only policy under which no unit at all need be active.
NONE_NEED_BE_ACTIVE = KillReviveConfig(score="static", active_fraction=0.0)


def opening(**changes: Any) -> list[m.AnyMessage]:
    return [hello(), welcome(), open_session(**changes), session_opened()]


def forward(
    step: int = 0,
    micro_batch: int = 0,
    live: Sequence[int] = ALL,
    gradients: int | None = None,
    *,
    mode: Any = "train",
) -> Iterator[m.AnyMessage]:
    """A micro-batch up to the last hidden states; in training as many gradients to come as groups, or ``gradients``."""
    yield embeddings(step, micro_batch, mode=mode)
    for group in live:
        yield group_input(step, micro_batch, group)
        yield group_delta(step, micro_batch, group)
    announced = len(live) if gradients is None and mode == "train" else gradients or 0
    yield labelled(step, micro_batch, announced)


def backward(step: int = 0, micro_batch: int = 0, live: Sequence[int] = ALL) -> Iterator[m.AnyMessage]:
    """The rest of it, where groups follow one another: the lowest gets no answer."""
    yield grad_hidden_states(step, micro_batch)
    for group in sorted(live, reverse=True):
        answer = group != min(live)
        yield group_grad(step, micro_batch, group, answer=answer)
        if answer:
            yield group_input_grad(step, micro_batch, group)


class Pair:
    """A device's and a server's session, and what each thinks of the other's frames."""

    def __init__(self, messages: Sequence[m.AnyMessage] = ()) -> None:
        self.sides = {side: Session(side) for side in Side}
        for message in messages:
            self.say(message)

    def say(self, message: m.AnyMessage, sender: Side | None = None) -> None:
        """One side sends, the other receives the same; both must stand at the same place before and after."""
        if sender is None:
            gives_back = isinstance(message, m.AdapterState) and self.sides[Side.EDGE].state is State.SETTING_UP
            sender = Side.EDGE if gives_back else sender_of(message)
        speaker, listener = self.sides[sender], self.sides[other(sender)]
        frame = speaker.send(message)
        assert listener.receive(frame) == message
        assert listener.bytes_received == speaker.bytes_sent
        assert shared(self.sides[Side.EDGE]) == shared(self.sides[Side.CLOUD])


def frame_for(listener: Session, message: m.AnyMessage) -> bytearray:
    """The frame of ``message`` as ``listener``'s peer would number it now."""
    if not isinstance(message, NUMBERED):
        return encode(message)
    return encode(message, seq=listener.link.received + 1, ack=listener.link.sent)


def hear(listener: Session, message: m.AnyMessage) -> m.AnyMessage | None:
    """What ``listener`` makes of ``message``, as its peer would send it now."""
    return listener.receive(frame_for(listener, message))


def sender_of(message: m.AnyMessage) -> Side:
    if isinstance(message, m.GroupParameters):
        return Side.EDGE if message.tensors else Side.CLOUD
    return Side.EDGE if isinstance(message, FROM_EDGE) else Side.CLOUD


def other(side: Side) -> Side:
    return Side.CLOUD if side is Side.EDGE else Side.EDGE


def everything(session: Session) -> dict[str, Any]:
    """All that a session remembers, in a form that compares and that nothing changes later."""
    remembered = {
        name: value.tobytes() if isinstance(value, np.ndarray) else copy.deepcopy(value)
        for name, value in vars(session).items()
        if name not in ("_decoder", "link", "under_way", "units")
    }
    remembered["units"] = copy.deepcopy(vars(session.units) | {"states": session.units.states.tobytes()})
    remembered["under_way"] = {key: copy.deepcopy(vars(each)) for key, each in session.under_way.items()}
    return remembered | {"link": (session.link.sent, session.link.received, session.link.missing(session.link.sent))}


def copy_link(link: Link) -> Link:
    """A link that stands where ``link`` does, and goes its own way."""
    copied = Link()
    for name, value in vars(link).items():
        if name != "_lock":
            setattr(copied, name, copy.copy(value))
    return copied


def shared(session: Session) -> dict[str, Any]:
    """What both sides must agree on."""
    own = {"side", "bytes_sent", "bytes_received", "round_trips", "_sent_since_received", "link",
           "_last_of_handshake", "_repeats"}  # fmt: skip
    return {name: value for name, value in everything(session).items() if name not in own}
