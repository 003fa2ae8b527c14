"""The base model with what a session has around it: what is kept of each of its exchange groups."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from dlora.cloud.model.base_model import BaseModel, find_embedding
from dlora.cloud.model.parts import ModelParts
from dlora.cloud.model.row_blocks import RowBlocks
from dlora.protocol import messages as m
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.choices import WireDtype
from dlora.protocol.errors import RemoteProtocolError
from dlora.protocol.groups import GroupSpec
from dlora.protocol.tensors import WireTensor
from dlora.protocol.wire_codecs import TensorRole

from .kept_tensor import KeptTensor
from .kinds import SITE_KINDS, Site
from .passes import Outputs, PassRunner
from .sketch import GroupSketch, sketch_bytes
from .torch_codecs import from_wire, to_wire


@dataclass
class SessionModel:
    """The base model, for the micro-batches of one session.

    Attributes:
        opening: what the device asked for.
        seed: of the server's draws.
        sites: one a group, in order; fewer until the session is set up.
        sketches: of what the base model computes at each group, from the first micro-batch of the mode ``basis`` on;
            each goes once the group's state is made.
        parameters: what devices would train, of groups that the device has given; as ``Site.compute_outputs`` takes it.
        parts: of the base model, where it can be run so; row_blocks: likewise.
    """

    base: BaseModel
    opening: m.OpenSession
    seed: int = 0
    sites: list[Site] = field(default_factory=list)
    sketches: list[GroupSketch | None] = field(default_factory=list)
    parameters: dict[int, Sequence[Tensor]] = field(default_factory=dict)
    parts: ModelParts | None = None
    row_blocks: RowBlocks | None = None

    @property
    def groups(self) -> Sequence[GroupSpec]:
        return self.opening.groups

    @property
    def adapter(self) -> AdapterSpec:
        return self.opening.adapter

    @property
    def state_dtype(self) -> WireDtype:
        """How what is kept of a group is stored. Who trains keeps it for hours, as it crossed."""
        return self.opening.codecs.adapter_state if isinstance(self.opening.purpose, m.Train) else "fp32"

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
        kind, group = SITE_KINDS[self.adapter.kind], self.groups[index]
        made, gradient_norm = kind.make_state(self.adapter, group, self.base, self.seed + index, sketch)
        tensors = tuple(to_wire(tensor, self.opening.codecs, TensorRole.ADAPTER_STATE) for tensor in made)
        return m.AdapterState(group=index, tensors=tensors, gradient_norm=gradient_norm)

    def add(self, state: Sequence[WireTensor]) -> None:
        """Make the next group's site, with what the server keeps of it."""
        index = len(self.sites)
        if self.sketches:
            self.sketches[index] = None
        kind, group = SITE_KINDS[self.adapter.kind], self.groups[index]
        torch_device, decoded = self.torch_device_of(group), self.state_dtype == "fp32"
        self.sites.append(kind(group, [KeptTensor.of(each, torch_device, decoded=decoded) for each in state]))

    def take_parameters(self, given: m.GroupParameters) -> None:
        """Keep what the device has learnt of a group, to apply it."""
        torch_device = self.torch_device_of(self.groups[given.group])
        # Copies: what came is a view of its frame.
        self.parameters[given.group] = [from_wire(each, torch_device, torch.float32).clone() for each in given.tensors]

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

    def embed(self, token_ids: Sequence[int], *, as_ids: bool) -> Tensor:
        """Guessed tokens as ``embeddings`` would give them if the device sent them, (tokens, embedding_size).

        ``as_ids``: whether it sends token ids.
        """
        base, purpose = self.base, self.opening.purpose
        end, ids = find_embedding(base), torch.tensor(token_ids, device=base.device)
        if as_ids:
            return end(ids).to(base.dtype)
        assert isinstance(purpose, m.Use | m.Encode)
        dtype = torch.float16 if purpose.drafts == "fp16" else torch.float32
        rows = end.weight[ids].to(dtype).to(torch.float32) * end.scale
        codecs = self.opening.evaluation_codecs
        return from_wire(to_wire(rows, codecs, TensorRole.EMBEDDINGS), base.device, base.dtype)

    def pass_runner(
        self,
        live: Collection[int],
        given: Collection[int] = (),
        rows: Tensor | None = None,
        *,
        graded: Tensor | None = None,
        outputs: Outputs = MappingProxyType({}),
    ) -> PassRunner:
        """One pass, as ``PassRunner`` has it, of the session's groups; ``given`` ones run with their parameters."""
        return PassRunner(
            self.base,
            self.groups,
            self.sites,
            live=live,
            given={group: self.parameters[group] for group in given},
            rows=None if rows is None else rows.to(self.base.device),
            graded=graded,
            outputs=outputs,
        )

    def torch_device_of(self, group: GroupSpec) -> torch.device:
        """Where a group's modules are."""
        return self.base.targets[group.targets[0].name].device
