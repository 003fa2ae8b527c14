"""Runs one micro-batch of a session: the frozen blocks here, its groups' adapters on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from dlora.cloud.model.base_model import BaseModel, find_embedding
from dlora.cloud.model.cache import PartCache
from dlora.cloud.model.decoding import Decoding
from dlora.cloud.model.layout import Layout, lay_out
from dlora.cloud.model.parts import ModelParts
from dlora.protocol import messages as m
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.errors import RemoteProtocolError
from dlora.protocol.groups import GroupSpec
from dlora.protocol.micro_batch import GroupStates, Key, does_exchange
from dlora.protocol.tensors import WireTensor
from dlora.protocol.wire_codecs import Codecs, TensorRole

from .basis import BasisPass
from .exchange import MicroBatchExchange
from .kinds import SITE_KINDS, MadeFrom, Site
from .sketch import GroupSketch, adding_bytes, sketch_bytes
from .target_modules import GroupRunner, running_targets
from .torch_codecs import from_wire, to_wire

M = TypeVar("M", bound=m.ExchangeMessage)


class DeviceMessages(Protocol):
    """The device's end of one micro-batch."""

    @property
    def computed_s(self) -> float:
        """Seconds that were computed on the micro-batch so far."""

    @property
    def queued_s(self) -> float:
        """Seconds that the micro-batch has waited for its turn to compute so far."""

    def take_times(self) -> tuple[float, ...]:
        """What ``GroupInput`` says of the time since the last message; nothing where the device did not ask."""

    def send(self, message: m.ExchangeMessage) -> None:
        """Send a message of the micro-batch; returns at once."""

    def receive(self) -> m.AnyMessage:
        """The device's next message of the micro-batch."""


@dataclass
class Sites:
    """What a session has around its exchange groups.

    Attributes:
        opening: what the device asked for.
        seed: of the server's draws.
        sites: one a group, in order; fewer until the session is set up.
        sketches: of what the base model computes at each group, from the first micro-batch of the mode ``basis`` on;
            each goes once the group's state is made.
        parameters: what devices would train, of groups that the device has given; as ``Site.compute_outputs`` takes it.
        parts: of the base model, where it can be run so.
        decoding, cache: of a session with a context length, the context's keys and values.
    """

    base: BaseModel
    opening: m.OpenSession
    seed: int = 0
    sites: list[Site] = field(default_factory=list)
    sketches: list[GroupSketch | None] = field(default_factory=list)
    parameters: dict[int, Sequence[Tensor]] = field(default_factory=dict)
    parts: ModelParts | None = None
    decoding: Decoding | None = None
    cache: PartCache | None = None

    @property
    def groups(self) -> Sequence[GroupSpec]:
        return self.opening.groups

    @property
    def adapter(self) -> AdapterSpec:
        return self.opening.adapter

    @property
    def sketch_bytes(self) -> int:
        """What ``begin_sketches`` takes."""
        return sum(sketch_bytes(group, self.adapter.r) for group in self.groups)

    def begin_sketches(self) -> None:
        """Make room for a sketch of every group."""
        self.sketches = [
            GroupSketch(group, self.adapter.r, self.seed + index, self.torch_device_of(group))
            for index, group in enumerate(self.groups)
        ]

    @property
    def making_bytes(self) -> int:
        """What ``make_state`` takes beside what it gives, about: copies of a sketch in float64, or of weights."""
        group = self.groups[len(self.sites)]
        if self.sketches:
            return 4 * sketch_bytes(group, self.adapter.r)
        return 2 * 4 * group.in_features * group.out_features

    def make_state(self) -> m.AdapterState:
        """Make anew what the server keeps of the next group; gives it as it crosses."""
        index = len(self.sites)
        sketch = self.sketches[index] if self.sketches else None
        made_from = MadeFrom(self.base, self.seed + index, sketch)
        made = SITE_KINDS[self.adapter.kind].make_state(self.adapter, self.groups[index], made_from)
        tensors = tuple(to_wire(tensor, self.opening.codecs, TensorRole.ADAPTER_STATE) for tensor in made.tensors)
        return m.AdapterState(group=index, tensors=tensors, gradient_norm=made.gradient_norm)

    def add(self, state: Sequence[WireTensor]) -> None:
        """Make the next group's site, with what the server keeps of it."""
        index = len(self.sites)
        if self.sketches:
            self.sketches[index] = None
        kind, group = SITE_KINDS[self.adapter.kind], self.groups[index]
        self.sites.append(kind.site(self.adapter, group, self._kept(index, state)))

    def take_parameters(self, given: m.GroupParameters) -> None:
        """Keep what the device has learnt of a group, to apply it."""
        self.parameters[given.group] = self._kept(given.group, given.tensors)

    def _kept(self, group: int, tensors: Sequence[WireTensor]) -> list[Tensor]:
        """Tensors that came, in the base model's dtype, where the group's modules are."""
        torch_device, dtype = self.torch_device_of(self.groups[group]), self.base.dtype
        # Copies: what came is a view of its frame.
        return [from_wire(each, torch_device, dtype).clone() for each in tensors]

    def embeddings(self, begun: m.Embeddings) -> Tensor:
        """What a micro-batch begins with, (tokens, embedding_size), in the base model's dtype on its device.

        Raises ``RemoteProtocolError`` for a token that the base model does not have.
        """
        base = self.base
        if begun.token_ids is not None:
            ids = begun.token_ids.data
            if ids.min() < 0 or ids.max() >= base.vocabulary_size:
                raise RemoteProtocolError(f"a token that the base model's {base.vocabulary_size} do not have")
            return find_embedding(base)(torch.from_numpy(ids).long().to(base.device)).to(base.dtype)
        assert begun.hidden_states is not None  # the session's rules
        return from_wire(begun.hidden_states, base.device, base.dtype)

    def torch_device_of(self, group: GroupSpec) -> torch.device:
        """Where a group's modules are."""
        weight = self.base.targets[group.targets[0].name].module.weight
        assert isinstance(weight, Tensor)
        return weight.device


class MicroBatchRun:
    """One micro-batch, from its embeddings to its last gradient.

    Args:
        begun: its first message; group_states: what takes part.
        max_tokens: of the server, padding among them; packs: whether the base model runs sequences end to end.
    """

    def __init__(
        self, sites: Sites, begun: m.Embeddings, group_states: GroupStates, *, max_tokens: int, packs: bool
    ) -> None:
        self.key: Key = (begun.step, begun.micro_batch)
        self._codecs = sites.opening.codecs_of(begun.mode)
        self.layout: Layout = lay_out(
            sites.embeddings(begun),
            torch.from_numpy(begun.sequence_lengths.data).long(),
            may_pack=packs,
            max_tokens=max_tokens,
        )
        self._sites = sites
        self._mode = begun.mode
        self._position = begun.position or 0
        self._group_states = group_states if does_exchange(begun) else GroupStates()
        self._lengths: list[int] = begun.sequence_lengths.data.tolist()
        self._labelled = self._rows_of(begun.label_positions)
        self._crossing = self.layout.rows
        if begun.crossing_positions is not None:
            self._crossing = self._rows_of(begun.crossing_positions)

    @property
    def lowest_trained(self) -> GroupSpec | None:
        """The lowest group that wants gradients; None where none does, as when evaluating."""
        if self._mode == "basis":
            return self._sites.groups[0]
        active = self._group_states.active
        return self._sites.groups[min(active)] if active and self._mode == "train" else None

    @property
    def context_length(self) -> int:
        """Tokens that its last one sees, in the mode ``decode``; 0 in all others."""
        return self._position + self.layout.inputs_embeds.shape[1] if self._mode == "decode" else 0

    @property
    def sketched_bytes(self) -> int:
        """In the mode ``basis``: what goes into the groups' modules, kept until the backward pass; and what one group
        at a time takes there."""
        if self._mode != "basis":
            return 0
        sites, rows = self._sites, self.layout.inputs_embeds.shape[:-1].numel()
        itemsize = sites.base.dtype.itemsize
        kept = itemsize * sum(group.in_features for group in sites.groups)
        return rows * kept + max(adding_bytes(group, sites.adapter.r, rows, itemsize) for group in sites.groups)

    def run(self, device: DeviceMessages) -> None:
        """Forward, and backward where it trains. Raises what ``device`` does, and ``NonFiniteError``."""
        if self._mode == "basis":
            self._run_basis(_Channel(self._sites, self._codecs, self.key, device))
            return
        sites, groups = self._sites, self._group_states
        channel = _Channel(sites, self._codecs, self.key, device)
        if self._mode == "encode":
            channel.send_encoded(self._encode())
            return
        exchange = MicroBatchExchange(
            channel,
            sites.base,
            sites.groups,
            sites.sites,
            live=groups.live,
            trained=groups.active,
            given={group: sites.parameters[group] for group in groups.given},
            rows=self._crossing,
        )
        labelled = self._run_blocks(exchange)
        channel.send_labelled(labelled, exchange.gradients)
        if exchange.gradients:
            labelled.backward(channel.receive_labelled_grad(labelled))

    def _encode(self) -> list[Tensor]:
        """Of each sequence what comes out of the first blocks, (length, width)."""
        sites, purpose, layout = self._sites, self._sites.opening.purpose, self.layout
        assert isinstance(purpose, m.Encode)  # the session's rules
        assert sites.parts is not None  # check_opening
        with torch.no_grad():
            hidden = sites.parts.run(
                layout.inputs_embeds,
                attention_mask=layout.attention_mask,
                position_ids=layout.position_ids,
                end=purpose.blocks,
            )
            return list(self._packed(hidden).split(self._lengths))

    def _packed(self, padded: Tensor) -> Tensor:
        flat = padded.reshape(-1, padded.shape[-1])
        return flat if self.layout.rows is None else flat.index_select(0, self.layout.rows)

    def _run_basis(self, channel: _Channel) -> None:
        """The base model alone, forward and backward: what it computes at the groups goes into the sketches."""
        sites = self._sites
        sketches = [sketch for sketch in sites.sketches if sketch is not None]
        labelled = self._run_blocks(BasisPass(sites.base, sites.groups, sketches, self._crossing))
        channel.send_labelled(labelled, 0)
        labelled.backward(channel.receive_labelled_grad(labelled))

    def _run_blocks(self, runner: GroupRunner) -> Tensor:
        """The last hidden states at the labelled positions."""
        sites, layout = self._sites, self.layout
        with torch.set_grad_enabled(self._mode not in m.WITHOUT_GRADIENTS), running_targets(runner):
            if self._mode == "decode":
                assert sites.decoding is not None  # the session's rules
                assert sites.cache is not None
                hidden = sites.decoding.append(layout.inputs_embeds, sites.cache, self._position)
            else:
                hidden = sites.base.last_hidden_state(layout.inputs_embeds, layout.attention_mask, layout.position_ids)
            return hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._labelled.to(hidden.device))

    def _rows_of(self, positions: WireTensor) -> Tensor:
        """Where tokens lie in the flattened input, int64."""
        found = torch.from_numpy(positions.data).long().to(self._sites.base.device)
        return found if self.layout.rows is None else self.layout.rows.index_select(0, found)


class _Channel:
    """Tensors of a micro-batch to messages and back; a ``Channel`` for its exchange."""

    def __init__(self, sites: Sites, codecs: Codecs, key: Key, device: DeviceMessages) -> None:
        self._sites = sites
        self._codecs = codecs
        self._step, self._micro_batch = key
        self._device = device
        self._input_grads: dict[int, WireTensor] = {}  # that came while another was waited for

    def send_input(self, group: int, x: Tensor) -> None:
        hidden_states = self._to_wire(x, TensorRole.GROUP_INPUT)
        self._device.send(
            m.GroupInput(
                step=self._step,
                micro_batch=self._micro_batch,
                group=group,
                hidden_states=hidden_states,
                times=self._device.take_times(),
            )
        )

    def receive_outputs(self, group: int, torch_device: torch.device) -> list[Tensor]:
        message = self._receive(m.GroupDelta)
        return [self._from_wire(delta, torch_device) for delta in message.deltas]

    def send_grads(self, group: int, grads: Sequence[Tensor], *, answer: bool) -> None:
        on_wire = tuple(self._to_wire(grad, TensorRole.DELTA_GRAD) for grad in grads)
        self._device.send(
            m.GroupGrad(
                step=self._step,
                micro_batch=self._micro_batch,
                group=group,
                grads=on_wire,
                answer=answer,
                computed_s=self._device.computed_s,
                queued_s=self._device.queued_s,
                times=self._device.take_times(),
            )
        )

    def receive_input_grad(self, group: int, torch_device: torch.device) -> Tensor:
        while group not in self._input_grads:
            message = self._receive(m.GroupInputGrad)
            self._input_grads[message.group] = message.grad_hidden_states
        return self._from_wire(self._input_grads.pop(group), torch_device)

    def send_labelled(self, hidden_states: Tensor, gradients: int) -> None:
        on_wire = self._to_wire(hidden_states, TensorRole.LAST_HIDDEN_STATES)
        self._device.send(
            m.LabelledHiddenStates(
                step=self._step,
                micro_batch=self._micro_batch,
                hidden_states=on_wire,
                gradients=gradients,
                computed_s=self._device.computed_s,
                queued_s=self._device.queued_s,
                times=self._device.take_times(),
            )
        )

    def send_encoded(self, hidden_states: Sequence[Tensor]) -> None:
        on_wire = tuple(self._to_wire(each, TensorRole.LAST_HIDDEN_STATES) for each in hidden_states)
        self._device.send(
            m.EncodedHiddenStates(step=self._step, micro_batch=self._micro_batch, hidden_states=on_wire)
        )

    def receive_labelled_grad(self, like: Tensor) -> Tensor:
        message = self._receive(m.GradHiddenStates)
        return self._from_wire(message.grad_hidden_states, like.device)

    def _receive(self, kind: type[M]) -> M:
        message = self._device.receive()
        assert isinstance(message, kind)  # the session's rules let nothing else through
        return message

    def _to_wire(self, tensor: Tensor, role: TensorRole) -> WireTensor:
        return to_wire(tensor, self._codecs, role)

    def _from_wire(self, tensor: WireTensor, torch_device: torch.device) -> Tensor:
        return from_wire(tensor, torch_device, self._sites.base.dtype)
