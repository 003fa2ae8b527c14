"""Where autograd meets the wire in passes: all groups read at once, and write at once.

::

    base pass   texts ── blocks ── z of every group ──▶ device
    pass        u of every group, which are leaves ──▶ blocks ── z'  ──▶ device, or, in the last one, hidden states
    backward    dh ──▶ graph of the last pass ── du of every leaf ──▶ device
    again       dz of every group ──▶ the same graph, from its own reads down ── du' ──▶ device

A device answers z with u, and du with dz. No autograd function waits for anybody: what the device gives are leaves of
the last pass, and what it answers to their gradients is a term of another backward pass over the same graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dlora.cloud.model.base_model import BaseModel
from dlora.protocol.groups import GroupSpec
from dlora.protocol.micro_batch import GroupStates
from dlora.protocol.passes import Passes, backward_waves, forward_waves

from .exchange import RowRunner
from .kinds import Site

Reads = Mapping[int, Tensor]
"""Of each group what goes to the device, (rows, input_width)."""
Outputs = Mapping[int, Sequence[Tensor]]
"""Of each group what its adapters give, (rows, output_width) each."""


class GroupsDevice(Protocol):
    """The device of a micro-batch, as passes see it."""

    def write(self, reads: Reads) -> Outputs: ...
    def input_grads(self, grads: Outputs, reading: Sequence[int], number: int) -> Reads: ...


class PassRunner(RowRunner):
    """One pass. Groups read what they are given, and write what the device said after an earlier pass.

    Args:
        outputs: what they write; none in the base pass.
        live, given, rows, graded: as ``RowRunner`` has them.

    Attributes:
        reads: in the last pass with its graph.
    """

    def __init__(
        self,
        base: BaseModel,
        groups: Sequence[GroupSpec],
        sites: Sequence[Site],
        *,
        live: Collection[int],
        given: Mapping[int, Sequence[Tensor]],
        rows: Tensor | None,
        graded: Tensor | None,
        outputs: Outputs,
    ) -> None:
        super().__init__(base, groups, sites, live=live, given=given, rows=rows, graded=graded)
        self.reads: dict[int, Tensor] = {}
        self._written = outputs

    def exchange(self, group: int, x: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor] | None]:
        """The frozen products, and the deltas; None where there are none yet."""
        deltas = self._read(group, x)
        return self.run_frozen(group, x), deltas

    def add_deltas(self, name: str, x: Tensor, output: Tensor) -> None:
        """Add to what a target module gives, in place, what ``run_target`` would: of all of a group when one is called.

        Under ``torch.no_grad``; x: (…, tokens, in_features), output: (…, tokens, out_features).
        """
        group = self._group_of[name]
        targets = self._groups[group].targets
        if group not in self._inputs:
            self._inputs[group] = x
            deltas = self._given_deltas(group, x) if group in self._given else self._read(group, x)
            if deltas is not None:
                self._outputs.update(zip((target.name for target in targets), deltas, strict=True))
        if name in self._outputs:
            gain = next(target.gain for target in targets if target.name == name)
            output.add_(self._unpack(self._outputs.pop(name), output), alpha=gain)

    def _read(self, group: int, x: Tensor) -> Sequence[Tensor] | None:
        """Read; and the deltas, if the device has said any."""
        site = self.sites[group]
        self.reads[group] = site.project(self.pack(x))
        outputs = self._written.get(group)
        return None if outputs is None else site.expand(outputs)


class PassExchange:
    """The exchange of one micro-batch.

    Args:
        make_runner: of a pass, of what groups write in it.
        trains: whether a backward pass follows.
    """

    def __init__(
        self, states: GroupStates, passes: Passes, make_runner: Callable[[Outputs], PassRunner], *, trains: bool
    ) -> None:
        self._live = states.live
        self._trained = states.active if trains else frozenset()
        self._passes = passes
        self._make_runner = make_runner
        self._outputs: dict[int, Sequence[Tensor]] = {}
        self._reads: Reads = {}

    def forward(self, device: GroupsDevice, reads: Reads, run: Callable[[PassRunner], Tensor]) -> Tensor:
        """All passes: what ``run`` gives in the last one, with its graph where something is trained.

        Args:
            reads: of the base pass.
            run: the base model, at the rows that adapters act at and after, with this runner of its target modules.
        """
        waves = forward_waves(self._live, self._passes)
        for number, asked in enumerate(waves):
            self._outputs |= device.write({group: reads[group] for group in asked})
            has_graph = bool(self._trained) and number == len(waves) - 1
            if has_graph:
                lowest = min(self._trained)
                for leaf in (leaf for group in self._live if group >= lowest for leaf in self._outputs[group]):
                    leaf.requires_grad_()
            runner = self._make_runner(self._outputs)
            with torch.set_grad_enabled(has_graph):
                hidden_states = run(runner)
            reads = dict(runner.reads)
        self._reads = reads
        return hidden_states

    @property
    def wanted(self) -> list[list[int]]:
        """Of each backward pass the groups whose outputs' gradients are sent, from the highest down."""
        return backward_waves(self._live, self._trained, self._reading, self._passes) if self._trained else []

    def backward(self, device: GroupsDevice, labelled: Tensor, grad: Tensor) -> None:
        """All backward passes, of the gradient of ``labelled``, a part of what ``forward`` gave."""
        wanted, reading = self.wanted, self._reading
        places = [(group, leaf) for group, leaves in self._outputs.items() for leaf in leaves if leaf.requires_grad]
        leaves = [leaf for _, leaf in places]
        first = torch.autograd.grad(labelled, leaves, grad, retain_graph=len(wanted) > 1, materialize_grads=True)
        grads, answers = first, dict[int, Tensor]()
        for number, groups in enumerate(wanted):
            of_group: dict[int, list[Tensor]] = {group: [] for group in groups}
            for (group, _), each in zip(places, grads, strict=True):
                if group in of_group:
                    of_group[group].append(each)
            is_last = number == len(wanted) - 1
            asked = [] if is_last else [group for group in groups if group in reading]
            answers |= device.input_grads(of_group, asked, number)
            if is_last:
                return
            # Linear: what comes for reads adds to what came from the loss.
            through = torch.autograd.grad(
                [self._reads[group] for group in answers], leaves, list(answers.values()),
                retain_graph=number < len(wanted) - 2, materialize_grads=True,
            )  # fmt: skip
            grads = tuple(one + other for one, other in zip(first, through, strict=True))

    @property
    def _reading(self) -> list[int]:
        """The groups whose reads depend on what others write."""
        return [group for group, read in self._reads.items() if read.requires_grad]
