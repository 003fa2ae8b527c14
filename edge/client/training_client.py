"""Training from Python: forward, backward and the optimizer's step of adapters that lie here.

The verbs are Tinker's (Thinking Machines, 2025); the adapters, the data and the loss stay on this machine.
"""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np

from dlora.edge.adapters.peft import load_adapter
from dlora.edge.data.batches import MicroBatch
from dlora.edge.data.prompt import PromptTokenizer, prompt_tokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.choose import make_engine
from dlora.edge.model.ends import LossGradient
from dlora.edge.settings import Optimizer, Settings
from dlora.edge.training.adapter_training import AdapterTraining, OptimizerStep
from dlora.edge.training.checkpoint import Checkpoint
from dlora.edge.training.resolved import ChosenOptimizer
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.credentials import Credentials
from dlora.protocol.errors import UsageError
from dlora.protocol.tensors import FloatArray

from .datum import Datum, pack_data
from .losses import LossFunction
from .opening import ClientOpening, datasets_of, read_state, resolve_settings
from .sampling_client import Sample, SamplingClient, connect_settings, in_thread

Progress = Callable[[int, int], None]
"""Called with how many sequences are through, and of how many."""


@dataclass(frozen=True)
class ForwardBackward:
    """What came out of a forward pass, with a backward pass or without.

    Attributes:
        loss: what was minimised.
        logprobs: of each datum, the log-probabilities of its targets that count, float32 (labelled,).
    """

    loss: float
    logprobs: list[FloatArray]


class TrainingClient:
    """Adapters under training. Use it as a context: ``with TrainingClient.create(...) as client``.

    Its methods may be called from any thread, one after the other; each has a twin for asyncio that ends with
    ``_async``.

    Attributes:
        bundle: of the base model.
        tokenizer: its own, in a process of its own.
    """

    def __init__(
        self, opening: ClientOpening, tokenizer: PromptTokenizer, checkpoint: Checkpoint | None, on_progress: Progress
    ) -> None:
        self.bundle = opening.bundle
        self.tokenizer = tokenizer
        self._opening = opening
        self._on_progress = on_progress
        self._opened, self._sampling = ExitStack(), ExitStack()
        self._sampler: SamplingClient | None = None
        self._lock = threading.RLock()
        self._training = self._open_training(checkpoint)

    @classmethod
    @contextmanager
    def create(
        cls,
        settings: Settings,
        *,
        data: Sequence[Datum] | None = None,
        state: Path | str | None = None,
        credentials: Credentials | None = None,
        on_progress: Progress = lambda done, total: None,
    ) -> Iterator[Self]:
        """A client that trains new adapters, or those of ``init_adapter``, or goes on from ``state``.

        What settings leave open is chosen as ``dlora-edge train`` chooses it. That takes data: those of
        ``settings.data``, or ``data``. From them come the basis of a bottleneck, where adapters act, the learning rate
        and the number of steps; ``step_data`` gives them in the command's order. Without any, adapters act everywhere,
        a bottleneck's A and B are those of the base model's weights, and the rate is the kind's, and constant where
        ``steps`` names no end.

        Args:
            settings: ``Settings.of(bundle=..., server=..., rank=8)``; ``device_blocks="all"`` needs no server.
            data: what will be trained on; each target the next token, with weight 1.
            state: a directory of ``save_state``.
            credentials: in place of those that the settings name.
            on_progress: called after each micro-batch with how many sequences of the call are through, and of how many.

        Raises what opening a bundle, a server and an adapter raise, and ``UsageError`` for settings that cannot be.
        """
        if settings.device.bundle is None:
            raise UsageError("Settings.of(bundle=...): name a bundle")
        if settings.placement.device_blocks not in ("0", "all"):
            raise UsageError("device_blocks: a client's blocks are all here or all on the server, all or 0")
        bundle = Bundle.open(settings.device.bundle, verify=settings.device.verify)
        init_path = settings.adapter.init_adapter
        init = None if init_path is None else load_adapter(init_path)
        config, dataset = resolve_settings(settings, bundle.manifest, init, datasets_of(settings, bundle, data))
        checkpoint = None if state is None else read_state(Path(state))
        with prompt_tokenizer(bundle) as tokenizer:  # before there is an engine
            engine = make_engine(bundle, settings.device.engine, settings.device.threads)
            connecting = connect_settings(credentials or Credentials.of(settings.server), settings.server.max_retry_s)
            opening = ClientOpening(bundle, engine, config, init, dataset, connecting)
            with closing(cls(opening, tokenizer, checkpoint, on_progress)) as client:
                yield client

    def close(self) -> None:
        """End its connections; the context does so."""
        self._sampling.close()
        self._opened.close()

    # -- data ----------------------------------------------------------------------------------------------

    def datum(self, prompt: str, completion: str) -> Datum:
        """A text that continues another: the completion counts, and the end token after it. Raises ``DataError``."""
        return Datum.of(self.tokenizer.encode_example({"prompt": prompt, "completion": completion}))

    def chat_datum(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None = None) -> Datum:
        """A chat: the assistant's turns count. Raises ``DataError``."""
        fields: dict[str, Any] = {"messages": list(messages)}
        if tools is not None:
            fields["tools"] = list(tools)
        return Datum.of(self.tokenizer.encode_example(fields))

    def step_data(self, step: int) -> list[Datum]:
        """The data of a step, counted from 0, in the command's order. Raises ``UsageError`` where there are no data."""
        if not isinstance(self._training, Trainer):
            raise UsageError("this client was given no data: it has no order of its own")
        return [Datum.of(example) for example in self._training.step_examples(step)]

    @property
    def settings(self) -> Settings:
        """Those of ``create``, with what was chosen in place of what was left open."""
        return self._training.config.as_settings()

    # -- the verbs -----------------------------------------------------------------------------------------

    def forward(self, data: Sequence[Datum], *, batch_size: int | None = None) -> ForwardBackward:
        """Log-probabilities with the adapters as they are; no gradient. The loss is NaN where the weights add up to 0.

        Raises what ``Connection`` raises, and ``UsageError`` where there are no data.
        """
        with self._lock:
            total = float(_weights(data).sum(dtype=np.float64))
            losses = [self._training.evaluate_batch(batch) for batch in self._packed(data, batch_size)]
            return _result(data, np.concatenate(losses), total)

    def forward_backward(
        self, data: Sequence[Datum], *, batch_size: int | None = None, total_weight: float | None = None
    ) -> ForwardBackward:
        """Add the gradient of the cross-entropy: the sum of weights times cross-entropies, over ``total_weight``.

        Args:
            batch_size: sequences that are exchanged at once; None: all of them.
            total_weight: of the whole step, where it has more than this call; None: the sum of these weights.

        Raises what ``Connection`` raises, ``NonFiniteError`` where the run diverges, ``DataError`` for a sequence
        that the server does not take, and ``UsageError`` where there are no data, or ``total_weight`` is not positive.
        """
        with self._lock, self._training.all_or_nothing():
            weights = _weights(data)
            total = float(weights.sum(dtype=np.float64)) if total_weight is None else total_weight
            if not total > 0:
                raise UsageError(f"weights that add up to {total:g}: give total_weight, what they are to be divided by")
            if (weights == 1).all():  # the command's own way, bit for bit
                losses = []
                for batch in self._packed(data, batch_size):
                    losses += self._training.forward_backward([batch], grad_scale=1.0 / total)
            else:
                losses = self._weighed(data, batch_size, (-weights / total).astype(np.float32))
            return _result(data, np.concatenate(losses), total)

    def forward_backward_custom(
        self, data: Sequence[Datum], loss: LossFunction, *, batch_size: int | None = None
    ) -> ForwardBackward:
        """Add the gradient of any loss of the log-probabilities of all ``data``.

        Where they are exchanged at once, and the server takes them so, in one pass. Else there are two: a forward pass
        finds the log-probabilities, and the loss's gradient by them weighs the cross-entropies of the second.

        Raises as ``forward_backward`` does, and ``UsageError`` for a gradient of other shapes.
        """
        value = 0.0

        def gradient_of(logprobs: FloatArray) -> FloatArray:
            nonlocal value
            value, gradients = loss(data, _split(data, logprobs))
            return _joined(data, gradients)

        with self._lock, self._training.all_or_nothing():
            if 0 < len(data) <= (batch_size or len(data)):
                batch = pack_data(data, self._training.config.invocation)
                if len(self._training.model.cut(batch)) == 1:
                    (losses,) = self._training.forward_backward([batch], grad_scale=0.0, gradients=[gradient_of])
                    self._on_progress(len(data), len(data))
                    return ForwardBackward(value, _split(data, -losses))
            before = self.forward(data, batch_size=batch_size)
            self._weighed(data, batch_size, gradient_of(np.concatenate(before.logprobs)))
            return ForwardBackward(value, before.logprobs)

    def optim_step(self, params: float | Optimizer | None = None) -> OptimizerStep:
        """Step AdamW with the gradients so far, and forget them.

        ``params``: the learning rate, or AdamW's settings from now on; None: as before, with the schedule's rate.

        Raises ``NonFiniteError`` where they are not finite, and ``UsageError`` for settings without a rate; nothing has
        changed then.
        """
        with self._lock:
            self._forget_sampler()
            if isinstance(params, Optimizer):
                if params.lr is None:
                    raise UsageError("an optimizer's settings need a learning rate: Optimizer(lr=1e-3)")
                decay = params.weight_decay or 0.0
                given = {**msgspec.structs.asdict(params), "weight_decay": decay}
                self._training.optimizer.config = ChosenOptimizer(**given)
                params = params.lr
            return self._training.optim_step(params)

    def save_state(self, directory: Path | str) -> None:
        """Save adapters, moments and the number of the step, for ``create(state=...)``. Raises ``StorageError``."""
        with self._lock:
            self._training.save_checkpoint(Path(directory))

    def load_state(self, directory: Path | str) -> None:
        """Go on from where ``save_state`` was called, in another session; gradients are forgotten.

        Raises ``CheckpointError`` for a state of other adapters; nothing has changed then.
        """
        checkpoint = read_state(Path(directory))
        with self._lock:
            self._training = self._open_training(checkpoint)

    def save_adapter(self, directory: Path | str) -> None:
        """Save the adapters as PEFT has them. Raises ``StorageError``."""
        with self._lock:
            self._training.save_adapter(Path(directory))

    @contextmanager
    def sampling_client(self) -> Iterator[SamplingClient]:
        """A client that samples with the adapters as they are now, whatever they learn later."""
        with tempfile.TemporaryDirectory(prefix="dlora-") as directory:
            self.save_adapter(directory)
            with self._opening.open_sampling(Path(directory), self.tokenizer) as client:
                yield client

    def sample(self, prompt: str | Sequence[Any], **options: Any) -> Sample:
        """``SamplingClient.sample`` with the adapters as they are now; the client is kept until the next step."""
        with self._lock:
            if self._sampler is None:
                self._sampler = self._sampling.enter_context(self.sampling_client())
            return self._sampler.sample(prompt, **options)

    @property
    def next_step(self) -> int:
        """How many steps are done."""
        return self._training.next_step

    forward_async = in_thread(forward)
    forward_backward_async = in_thread(forward_backward)
    forward_backward_custom_async = in_thread(forward_backward_custom)
    optim_step_async = in_thread(optim_step)
    sample_async = in_thread(sample)

    # -- inside --------------------------------------------------------------------------------------------

    def _open_training(self, checkpoint: Checkpoint | None) -> AdapterTraining:
        """In place of what was open, which is closed once the checkpoint is known to be good, and before another
        session begins: a server may allow a device one."""
        with ExitStack() as opened:
            training = opened.enter_context(self._opening.make_training(checkpoint))
            self._forget_sampler()
            self._opened.close()
            training.begin()
            if isinstance(training, Trainer) and training.config.optimizer.lr is None:
                training.find_rate()
            self._opened = opened.pop_all()
            return training

    def _forget_sampler(self) -> None:
        self._sampling.close()
        self._sampling, self._sampler = ExitStack(), None

    def _weighed(self, data: Sequence[Datum], batch_size: int | None, gradient: FloatArray) -> list[FloatArray]:
        """Forward and backward, of a loss whose gradient by the log-probabilities, (labelled,), is known."""
        losses, start = list[FloatArray](), 0
        for batch in self._packed(data, batch_size):
            for part in self._training.model.cut(batch):
                of_part = gradient[start : start + len(part.labels)].astype(np.float32)
                losses += self._training.forward_backward([part], grad_scale=0.0, gradients=[_known(of_part)])
                start += len(part.labels)
        return losses

    def _packed(self, data: Sequence[Datum], batch_size: int | None) -> Iterator[MicroBatch]:
        """Micro-batches; once one is through, and the next is asked for, ``on_progress`` is told."""
        size = batch_size or len(data)
        for start in range(0, len(data), size):
            yield pack_data(data[start : start + size], self._training.config.invocation)
            self._on_progress(min(start + size, len(data)), len(data))


def _known(gradient: FloatArray) -> LossGradient:
    return lambda _: gradient


def _split(data: Sequence[Datum], values: FloatArray) -> list[FloatArray]:
    """Of each datum its own, of values that follow each other."""
    return np.split(values, np.cumsum([len(datum.rows) for datum in data])[:-1])


def _joined(data: Sequence[Datum], gradients: Sequence[FloatArray]) -> FloatArray:
    shapes = [np.shape(gradient) for gradient in gradients]
    wanted = [(len(datum.rows),) for datum in data]
    if shapes != wanted:
        raise UsageError(f"the loss's gradient must have a number for each log-probability: {wanted}, not {shapes}")
    return np.concatenate([np.asarray(gradient, np.float32) for gradient in gradients])


def _weights(data: Sequence[Datum]) -> FloatArray:
    """Of all targets that count, (labelled,)."""
    if not data:
        raise UsageError("no data: give at least one datum")
    return np.concatenate([datum.label_weights for datum in data])


def _result(data: Sequence[Datum], losses: FloatArray, total: float) -> ForwardBackward:
    value = float((losses.astype(np.float64) * _weights(data)).sum())
    return ForwardBackward(value / total if total else math.nan, _split(data, -losses))
