"""One micro-batch of a session: the frozen blocks here, its groups' adapters on the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dlora.cloud.exchange.basis import BasisPass
from dlora.cloud.exchange.exchange import MicroBatchExchange
from dlora.cloud.exchange.passes import Outputs, PassExchange, PassRunner
from dlora.cloud.exchange.session_model import SessionModel
from dlora.cloud.exchange.sketch import adding_bytes
from dlora.cloud.exchange.target_modules import GroupRunner, running_targets
from dlora.cloud.model.layout import Layout, lay_out
from dlora.cloud.model.live_bytes import LiveBytes
from dlora.protocol import messages as m
from dlora.protocol.adapters import crossings
from dlora.protocol.groups import GroupSpec
from dlora.protocol.micro_batch import GroupStates, Key, does_exchange
from dlora.protocol.tensors import WireTensor

from .micro_batch_device import MicroBatchDevice
from .pass_device import PassDevice, exchanged_bytes
from .pass_rows import PassRows


class ServerMicroBatch:
    """One micro-batch of any mode but ``decode``, from its embeddings to its last gradient.

    Args:
        begun: its first message; group_states: what takes part.
        max_tokens: of the server, padding among them; packs: whether the base model runs sequences end to end.

    Attributes:
        codecs: how its tensors cross.
        layout: its input.
        graded: as ``GroupRunner`` has it.
        pass_rows: in passes, where ``RowBlocks`` runs them.
    """

    def __init__(
        self, model: SessionModel, begun: m.Embeddings, group_states: GroupStates, *, max_tokens: int, packs: bool
    ) -> None:
        self.key: Key = (begun.step, begun.micro_batch)
        self.codecs = model.opening.codecs_of(begun.mode)
        self._embeds = model.embeddings(begun)
        self.layout: Layout = lay_out(
            self._embeds,
            torch.from_numpy(begun.sequence_lengths.data).long(),
            may_pack=packs,
            max_tokens=max_tokens,
        )
        self._model = model
        self._mode = begun.mode
        self._passes = begun.passes
        self._kept_reads = begun.kept_reads
        self._group_states = group_states if does_exchange(begun) else GroupStates()
        self._lengths: list[int] = begun.sequence_lengths.data.tolist()
        self._labelled = self._rows_of(begun.label_positions)
        self._crossing = self.layout.rows
        if begun.crossing_positions is not None:
            self._crossing = self._rows_of(begun.crossing_positions)
        self._crossing_rows = begun.rows
        can_divide = begun.passes is not None and model.row_blocks is not None
        self.pass_rows = PassRows.of(begun) if can_divide else None
        self.graded = None if can_divide else self._find_graded(begun)

    @property
    def lowest_trained(self) -> GroupSpec | None:
        """The lowest group that wants gradients; None where none does, as when evaluating."""
        if self._mode == "basis":
            return self._model.groups[0]
        active = self._group_states.active
        return self._model.groups[min(active)] if active and self._mode == "train" else None

    @property
    def sketched_bytes(self) -> int:
        """In the mode ``basis``: what goes into the groups' modules, kept until the backward pass; and what one group
        at a time takes there."""
        if self._mode != "basis":
            return 0
        model, rows = self._model, self.layout.inputs_embeds.shape[:-1].numel()
        itemsize = model.base.dtype.itemsize
        kept = itemsize * sum(group.in_features for group in model.groups)
        return rows * kept + max(adding_bytes(group, model.adapter.r, rows, itemsize) for group in model.groups)

    def estimate(self, live_bytes: LiveBytes) -> int:
        """What it takes of memory."""
        texts = None if self.pass_rows is None else self.pass_rows.texts
        exchanged = 0
        if self._passes is not None:
            exchanged = exchanged_bytes(self._model, self._group_states.live, self._crossing_rows)
        computed = live_bytes.estimate(self.layout, self.lowest_trained, texts=texts)
        return computed + self.sketched_bytes + exchanged

    def run(self, device: MicroBatchDevice) -> None:
        """Forward, and backward where it trains. Raises what ``device`` does, and ``NonFiniteError``."""
        match self._mode:
            case "encode":
                device.send_encoded(self._encode())
            case "basis":
                self._run_basis(device)
            case _ if self._passes is not None and self._group_states.live:
                self._run_passes(device, self._passes)
            case _:
                self._run_exchange(device)

    def _run_exchange(self, device: MicroBatchDevice) -> None:
        """All blocks, with the groups' adapters on the device."""
        model, groups = self._model, self._group_states
        exchange = MicroBatchExchange(
            device,
            model.base,
            model.groups,
            model.sites,
            live=groups.live,
            trained=groups.active,
            given={group: model.parameters[group] for group in groups.given},
            rows=self._crossing,
            graded=self.graded,
        )
        labelled = self._run_blocks(exchange)
        device.send_labelled(labelled, exchange.gradients)
        if exchange.gradients:
            labelled.backward(device.receive_labelled_grad(labelled))

    def _run_passes(self, device: MicroBatchDevice, passes: m.Passes) -> None:
        """The same, with all groups asked at once."""
        model, base, rows = self._model, self._model.base, self.pass_rows
        if rows is None or model.row_blocks is None:
            acting, labels, graded = self._crossing, self._labelled, self.graded
            base_runner, run = self._pass_runner({}, acting, None), self._run_all_rows
            with torch.no_grad(), running_targets(base_runner):
                run()
        else:
            acting, labels, graded = rows.acting_in_last, rows.labels_in_last.to(base.device), None
            base_runner = self._pass_runner({}, rows.acting_in_base, None)
            with running_targets(base_runner):
                embeds = self._embeds.index_select(0, rows.base.to(self._embeds.device))
                run = model.row_blocks.begin(embeds, rows.texts, self._lowest_block).run
        exchange = PassExchange(
            self._group_states,
            passes,
            lambda outputs: self._pass_runner(outputs, acting, graded),
            trains=self._mode == "train",
        )
        widths = crossings(model.adapter, model.groups)
        groups_device = PassDevice(
            device, self.codecs, widths, self._crossing_rows, base.dtype, base.device, kept_reads=self._kept_reads
        )

        def run_pass(runner: PassRunner) -> Tensor:
            with running_targets(runner):
                return run()

        hidden = exchange.forward(groups_device, base_runner.reads, run_pass)
        labelled = hidden.reshape(-1, hidden.shape[-1]).index_select(0, labels)
        wanted = exchange.wanted
        device.send_labelled(labelled, sum(map(len, wanted)))
        if wanted:
            exchange.backward(groups_device, labelled, device.receive_labelled_grad(labelled))

    def _pass_runner(self, outputs: Outputs, rows: Tensor | None, graded: Tensor | None) -> PassRunner:
        states = self._group_states
        return self._model.pass_runner(states.live, states.given, rows, graded=graded, outputs=outputs)

    @property
    def _lowest_block(self) -> int:
        """Of those in which adapters act."""
        return self._model.groups[min((*self._group_states.live, *self._group_states.given))].block

    def _encode(self) -> list[Tensor]:
        """Of each sequence what comes out of the first blocks, (length, width)."""
        model, purpose, layout = self._model, self._model.opening.purpose, self.layout
        assert isinstance(purpose, m.Encode)  # the session's rules
        assert model.parts is not None  # check_opening
        with torch.no_grad():
            hidden = model.parts.run(
                layout.inputs_embeds,
                attention_mask=layout.attention_mask,
                position_ids=layout.position_ids,
                end=purpose.blocks,
            )
            packed = hidden.reshape(-1, hidden.shape[-1])
            if layout.rows is not None:
                packed = packed.index_select(0, layout.rows)
            return list(packed.split(self._lengths))

    def _run_basis(self, device: MicroBatchDevice) -> None:
        """The base model alone, forward and backward: what it computes at the groups goes into the sketches."""
        model = self._model
        sketches = [sketch for sketch in model.sketches if sketch is not None]
        labelled = self._run_blocks(BasisPass(model.base, model.groups, sketches, self._crossing, self.graded))
        device.send_labelled(labelled, 0)
        labelled.backward(device.receive_labelled_grad(labelled))

    def _run_blocks(self, runner: GroupRunner) -> Tensor:
        """The last hidden states at the labelled positions."""
        with torch.set_grad_enabled(self._mode not in m.WITHOUT_GRADIENTS), running_targets(runner):
            hidden = self._run_all_rows()
            return hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._labelled.to(hidden.device))

    def _run_all_rows(self) -> Tensor:
        layout = self.layout
        return self._model.base.last_hidden_state(layout.inputs_embeds, layout.attention_mask, layout.position_ids)

    def _find_graded(self, begun: m.Embeddings) -> Tensor | None:
        """The rows whose gradients lead to an adapter: of each text from the first one on that crosses; None: all."""
        if begun.crossing_positions is None or begun.mode in m.WITHOUT_GRADIENTS:
            return None
        crossing, lengths = begun.crossing_positions.data, begun.sequence_lengths.data
        ends = np.cumsum(lengths, dtype=np.int64)
        firsts = np.append(crossing, ends[-1])[np.searchsorted(crossing, ends - lengths)]
        pairs = zip(firsts.tolist(), ends.tolist(), strict=True)
        return self._rows_of(WireTensor.from_ints([row for first, end in pairs for row in range(first, end)]))

    def _rows_of(self, positions: WireTensor) -> Tensor:
        """Where tokens lie in the flattened input, int64."""
        found = torch.from_numpy(positions.data).long().to(self._model.base.device)
        return found if self.layout.rows is None else self.layout.rows.index_select(0, found)
