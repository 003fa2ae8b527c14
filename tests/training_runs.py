"""Runs of a tiny llama of four blocks against its server, and what torch and PEFT make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft_reference
import torch
from families import VOCABULARY, tiny_model
from peft import PeftModel
from serving import RunningServer, open_model, random_dataset, randomize_all, serving, training
from tiny import TinyFactory
from torch import Tensor

from dlora.cloud.serving.transport import DeviceGoneError
from dlora.edge.adapters.kind import GroupAdapters
from dlora.edge.data.batches import MicroBatch, evaluation_batches
from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.training.checkpoint import load_latest
from dlora.edge.training.resolved import Resolved
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.protocol.adapters import crossings
from dlora.protocol.groups import GroupSpec
from dlora.protocol.traffic import Traffic, micro_batch_traffic

BLOCKS = 4
DATA = random_dataset(VOCABULARY)
FROM_LOST = ConnectSettings(retry=Retry(max_s=30))

Leaves = dict[str, Tensor]
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Done:
    """Some steps of a run, and all bits after them."""

    losses: list[float]
    units: list[str]
    bits: dict[str, bytes]


@dataclass(frozen=True)
class Runs:
    """A bundle, and the server of its blocks."""

    bundle: Path
    server: RunningServer

    @classmethod
    @contextmanager
    def of(cls, tiny: TinyFactory, **settings: Any) -> Iterator[Runs]:
        """``settings``: of the server."""
        with serving(tiny(blocks=BLOCKS).base, **settings) as server:
            yield cls(tiny(blocks=BLOCKS, head_dtype="fp32").bundle, server)

    def train(
        self, run: Resolved, dataset: Dataset = DATA, connecting: ConnectSettings | None = None, **how: Any
    ) -> AbstractContextManager[Trainer]:
        return training(self.bundle, self.server.url, run, dataset, connecting, **how)

    def open(self, adapter: Path | None, **changes: Any) -> AbstractContextManager[Any]:
        return open_model(Bundle.open(self.bundle), self.server.url, adapter, **{"wire_dtype": "fp32", **changes})

    def save_random(self, run: Resolved, directory: Path, dataset: Dataset = DATA) -> float:
        """Save an adapter of random weights; its loss."""
        with self.train(run, dataset) as trainer:
            randomize_all(trainer)
            trainer.save_adapter(directory)
            return trainer.evaluate(dataset).loss

    def steps(self, run: Resolved, steps: int, lost_after: int | None = None, **how: Any) -> Done:
        """The first steps of a run; with a server that forgets it all after some."""
        with self.train(run, connecting=FROM_LOST, **how) as trainer:
            found = []
            for step in range(steps):
                if step == lost_after:
                    lose_sessions(self.server)
                found.append(trainer.run_step())
            trainer.wait_for_signal()
            return Done([each.loss for each in found], [each.units for each in found], bits(trainer))

    def resumed_steps(self, run: Resolved, steps: int, saved_after: int, directory: Path) -> Done:
        """The same of a run that goes on from a checkpoint."""
        with self.train(run) as trainer:
            before = [trainer.run_step() for _ in range(saved_after)]
            trainer.save_checkpoint(directory)
        more = self.steps(run, steps - saved_after, checkpoint=load_latest(directory))
        losses, units = [each.loss for each in before], [each.units for each in before]
        return Done([*losses, *more.losses], [*units, *more.units], more.bits)


def bits(trainer: Trainer) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in trainer.adapters.state().items()}


def lose_sessions(server: RunningServer) -> None:
    """What a server that is started again does not have any more."""
    for live in server.server.service.sessions:
        server.server.service.sessions.remove(live)
        live.transport._loop.call_soon_threadsafe(live.transport.end, DeviceGoneError("lost"))


def in_peft(adapter: Path, **how: Any) -> PeftModel:
    return PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=BLOCKS).eval(), adapter, **how)


def loss_in_peft(adapter: Path, dataset: Dataset = DATA) -> float:
    """Of the base model with a saved adapter."""
    with torch.no_grad():
        return peft_reference.loss_of(in_peft(adapter), list(evaluation_batches(dataset, 4))).item()


def step_traffic(trainer: Trainer, batch: MicroBatch, **how: Any) -> Traffic:
    """What a micro-batch that trains every group puts on the wire; ``how``: what is otherwise."""
    base, live = trainer.bundle.manifest.base_model, range(len(trainer.groups))
    given = {
        "live": live, "with_grads": live, "answered": live[1:], **sizes_of(batch), "codecs": trainer.config.codecs,
        "embedding_size": base.embedding_size, "hidden_size": base.hidden_size, **how,
    }  # fmt: skip
    return micro_batch_traffic(crossings(trainer.config.spec, trainer.groups), **given)


def sizes_of(batch: MicroBatch) -> dict[str, int]:
    return {"tokens": len(batch.ids), "sequences": len(batch.sequence_lengths), "labelled": len(batch.labels)}


def assert_gradients_are_torchs(
    trainer: Trainer, changes_of: Callable[[GroupAdapters, GroupSpec, Leaves], list[Change]]
) -> None:
    """Loss and gradients of one sequence are those of autograd alone, where a hook adds each module's change of its
    input, as ``changes_of`` has them of a group."""
    (batch,) = trainer.batches.step_batches(0)
    losses = trainer.model.forward_backward([batch], step=0, grad_scale=1.0)[0]
    model = tiny_model("llama", num_hidden_layers=BLOCKS).eval().requires_grad_(False)
    parameters = trainer.adapters.parameters()
    leaves = {name: torch.from_numpy(np.array(each.value)).requires_grad_() for name, each in parameters.items()}
    for group, spec in zip(trainer.adapters.groups, trainer.adapters.group_specs, strict=True):
        for target, change in zip(spec.targets, changes_of(group, spec, leaves), strict=True):
            model.get_submodule(target.name).register_forward_hook(
                lambda _, args, output, change=change: output + change(args[0])
            )
    logits = model(input_ids=torch.from_numpy(batch.ids)[None]).logits[0]
    labels = torch.from_numpy(np.array(batch.labels))
    loss = torch.nn.functional.cross_entropy(logits[batch.label_positions], labels, reduction="sum")
    loss.backward()
    np.testing.assert_allclose(losses.sum(), loss.item(), rtol=1e-5)
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        wanted = leaf.grad.numpy()
        assert np.abs(wanted).max() > 0, name
        atol = 1e-5 * np.abs(wanted).max()
        np.testing.assert_allclose(parameters[name].grad, wanted, rtol=1e-4, atol=atol, err_msg=name)
