"""Training from Python: forward, backward and the optimizer's step of adapters that lie here.

The verbs are Tinker's (Thinking Machines, 2025); the adapters, the data and the loss stay on this machine.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import msgspec
import numpy as np

from dlora.edge.adapters.peft import LoadedAdapter, load_adapter
from dlora.edge.choices import EngineChoice
from dlora.edge.data.batches import MicroBatch
from dlora.edge.data.prompt import PromptTokenizer, prompt_tokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.choose import make_engine
from dlora.edge.engine.engine import Engine
from dlora.edge.model.ends import LossGradient
from dlora.edge.model.local_source import LocalSource
from dlora.edge.seeds import draw_seed
from dlora.edge.training.adapter_training import AdapterTraining, OptimizerStep, trainer_state
from dlora.edge.training.checkpoint import Checkpoint, load_latest
from dlora.edge.training.config import TrainConfig
from dlora.edge.training.defaults import DEFAULTS, default_alpha, default_rank, default_target_modules
from dlora.edge.training.optimizer import OptimizerConfig
from dlora.edge.wire.connecting import ConnectSettings
from dlora.edge.wire.connection import Connection
from dlora.edge.wire.credentials import Credentials
from dlora.protocol.choices import KindChoice
from dlora.protocol.errors import CheckpointError, UsageError
from dlora.protocol.kill_revive import KillReviveConfig
from dlora.protocol.limits import MAX_STEPS
from dlora.protocol.targets import choose_groups
from dlora.protocol.tensors import FloatArray

from .datum import Datum, pack_data
from .losses import LossFunction
from .sampling_client import Sample, SamplingClient, connect_settings

Progress = Callable[[int, int], None]
"""Called with how many sequences are through, and of how many."""

_NO_DATA: Final = "of a loop of one's own"


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
        self, opening: _Opening, tokenizer: PromptTokenizer, checkpoint: Checkpoint | None, on_progress: Progress
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
        bundle: Path | str,
        server: str | None = None,
        *,
        kind: KindChoice = "lora",
        rank: int | None = None,
        alpha: float | None = None,
        target_modules: Sequence[str] = (),
        blocks: Sequence[int] = (),
        seed: int | None = None,
        total_steps: int | None = None,
        optimizer: OptimizerConfig | None = None,
        init_adapter: Path | str | None = None,
        state: Path | str | None = None,
        wire_dtype: str | None = None,
        max_sequence_length: int | None = None,
        threads: int = 0,
        engine: EngineChoice = "auto",
        credentials: Credentials | None = None,
        max_retry_s: float | None = None,
        on_progress: Progress = lambda done, total: None,
    ) -> Iterator[Self]:
        """A client that trains new adapters, or those of ``init_adapter``, or goes on from ``state``.

        Args:
            bundle: its directory; server: its address; None: all blocks run here, where the bundle has all of them.
            kind, rank, alpha, target_modules, blocks: as ``dlora-edge train`` has them; a bottleneck's A and B are
                those of the base model's weights, for there are no data yet.
            total_steps: for schedules that end; None: there is no end, and the learning rate is constant.
            optimizer: AdamW's settings, until ``optim_step`` is given others.
            state: a directory of ``save_state``.
            max_sequence_length: tokens of the longest sequence that will come, to be refused now where it cannot be
                run; None: each is looked at as it comes.
            max_retry_s: how long a server that is gone is waited for; None: for ever.
            on_progress: called after each micro-batch with how many sequences of the call are through, and of how many.

        Raises what opening a bundle, a server and an adapter raise.
        """
        opened = Bundle.open(Path(bundle))
        manifest = opened.manifest
        defaults = DEFAULTS[kind]
        names = tuple(target_modules) or default_target_modules(kind, manifest, "all")
        groups = choose_groups(manifest, names, tuple(blocks))
        r = rank or default_rank(kind, manifest, groups)
        settings = optimizer or OptimizerConfig(lr=defaults.lr, weight_decay=defaults.weight_decay)
        _check_rate(settings)
        if total_steps is None and settings.schedule != "constant":
            raise UsageError("a schedule that ends needs total_steps")
        if server is None and kind != "lora":
            raise UsageError("adapters in blocks on this machine are of the kind lora; name a server for another")
        config = TrainConfig(
            mode="split" if server is not None else "local",
            device_blocks=0 if server is not None else manifest.base_model.blocks,
            total_steps=total_steps or MAX_STEPS,
            batch_size=1,
            grad_accum=1,
            seed=draw_seed() if seed is None else (seed,),
            kind=kind,
            basis="weights",
            rank=r,
            lora_alpha=alpha or default_alpha(kind, manifest, r),
            target_modules=names,
            blocks=tuple(blocks),
            wire_dtype=wire_dtype or defaults.wire_dtype,
            optimizer=settings,
            kill_revive=KillReviveConfig(active_fraction=1.0, warmup_steps=0),
        )
        checkpoint = None if state is None else _load_state(Path(state))
        init = None if init_adapter is None else load_adapter(Path(init_adapter))
        with prompt_tokenizer(opened) as tokenizer:  # before there is an engine
            opening = _Opening(
                bundle=opened,
                engine=make_engine(opened, engine, threads),
                server=server,
                config=config,
                init=init,
                connecting=connect_settings(credentials, max_retry_s),
                longest=max_sequence_length,
                threads=threads,
                engine_choice=engine,
            )
            client = cls(opening, tokenizer, checkpoint, on_progress)
            with closing(client):
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

    # -- the verbs -----------------------------------------------------------------------------------------

    def forward(self, data: Sequence[Datum], *, batch_size: int | None = None) -> ForwardBackward:
        """Log-probabilities with the adapters as they are; no gradient. The loss is NaN where the weights add up to 0.

        Raises what ``Connection`` raises, and ``UsageError`` where there are no data.
        """
        with self._lock:
            return self._forward(data, batch_size or len(data))

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
            return self._forward_backward(data, batch_size or len(data), total_weight)

    def forward_backward_custom(
        self, data: Sequence[Datum], loss: LossFunction, *, batch_size: int | None = None
    ) -> ForwardBackward:
        """Add the gradient of any loss of the log-probabilities of all ``data``.

        Where they are exchanged at once, and the server takes them so, in one pass. Else there are two: a forward pass
        finds the log-probabilities, and the loss's gradient by them weighs the cross-entropies of the second.

        Raises as ``forward_backward`` does, and ``UsageError`` for a gradient of other shapes.
        """
        with self._lock, self._training.all_or_nothing():
            return self._forward_backward_custom(data, loss, batch_size or len(data))

    def optim_step(self, params: float | OptimizerConfig | None = None) -> OptimizerStep:
        """Step AdamW with the gradients so far, and forget them.

        Args:
            params: the learning rate, or AdamW's settings from now on; None: as before, with the schedule's rate.

        Raises ``NonFiniteError`` where they are not finite, and ``UsageError`` for settings without a rate; nothing has
        changed then.
        """
        with self._lock:
            self._forget_sampler()
            if isinstance(params, OptimizerConfig):
                _check_rate(params)
                self._training.optimizer.config = params
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
        checkpoint = _load_state(Path(directory))
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

    async def forward_async(self, *arguments: Any, **options: Any) -> ForwardBackward:
        """``forward`` in a thread."""
        return await asyncio.to_thread(self.forward, *arguments, **options)

    async def forward_backward_async(self, *arguments: Any, **options: Any) -> ForwardBackward:
        """``forward_backward`` in a thread."""
        return await asyncio.to_thread(self.forward_backward, *arguments, **options)

    async def forward_backward_custom_async(self, *arguments: Any, **options: Any) -> ForwardBackward:
        """``forward_backward_custom`` in a thread."""
        return await asyncio.to_thread(self.forward_backward_custom, *arguments, **options)

    async def optim_step_async(self, params: float | OptimizerConfig | None = None) -> OptimizerStep:
        """``optim_step`` in a thread."""
        return await asyncio.to_thread(self.optim_step, params)

    async def sample_async(self, prompt: str | Sequence[Any], **options: Any) -> Sample:
        """``sample`` in a thread."""
        return await asyncio.to_thread(self.sample, prompt, **options)

    # -- inside --------------------------------------------------------------------------------------------

    def _open_training(self, checkpoint: Checkpoint | None) -> AdapterTraining:
        """In place of what was open, which is closed once the checkpoint is known to be good, and before another
        session begins: a server may allow a device one."""
        with ExitStack() as opened:
            training = opened.enter_context(self._opening.make_training(checkpoint))
            self._forget_sampler()
            self._opened.close()
            training.open(self._opening.longest)
            self._opened = opened.pop_all()
            return training

    def _forget_sampler(self) -> None:
        self._sampling.close()
        self._sampling, self._sampler = ExitStack(), None

    def _forward(self, data: Sequence[Datum], batch_size: int) -> ForwardBackward:
        total = float(_weights(data).sum(dtype=np.float64))
        losses = [self._training.evaluate_batch(batch) for batch in self._packed(data, batch_size)]
        return _result(data, np.concatenate(losses), total)

    def _forward_backward(
        self, data: Sequence[Datum], batch_size: int, total_weight: float | None
    ) -> ForwardBackward:
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

    def _forward_backward_custom(
        self, data: Sequence[Datum], loss: LossFunction, batch_size: int
    ) -> ForwardBackward:
        value = 0.0

        def gradient_of(logprobs: FloatArray) -> FloatArray:
            nonlocal value
            value, gradients = loss(data, _split(data, logprobs))
            return _joined(data, gradients)

        if data and len(data) <= batch_size and len(self._training.model.cut(batch := pack_data(data))) == 1:
            (losses,) = self._training.forward_backward([batch], grad_scale=0.0, gradients=[gradient_of])
            self._on_progress(len(data), len(data))
            return ForwardBackward(value, _split(data, -losses))
        before = self._forward(data, batch_size)
        self._weighed(data, batch_size, gradient_of(np.concatenate(before.logprobs)))
        return ForwardBackward(value, before.logprobs)

    def _weighed(self, data: Sequence[Datum], batch_size: int, gradient: FloatArray) -> list[FloatArray]:
        """Forward and backward, of a loss whose gradient by the log-probabilities, (labelled,), is known."""
        losses, start = list[FloatArray](), 0
        for batch in self._packed(data, batch_size):
            for part in self._training.model.cut(batch):
                of_part = gradient[start : start + len(part.labels)].astype(np.float32)
                losses += self._training.forward_backward([part], grad_scale=0.0, gradients=[_known(of_part)])
                start += len(part.labels)
        return losses

    def _packed(self, data: Sequence[Datum], size: int) -> Iterator[MicroBatch]:
        """Micro-batches; once one is through, and the next is asked for, ``on_progress`` is told."""
        for start in range(0, len(data), size):
            yield pack_data(data[start : start + size])
            self._on_progress(min(start + size, len(data)), len(data))


@dataclass(frozen=True)
class _Opening:
    """How connections are opened: more than once, where a state is loaded or the adapters are sampled from."""

    bundle: Bundle
    engine: Engine
    server: str | None
    config: TrainConfig
    init: LoadedAdapter | None
    connecting: ConnectSettings
    longest: int | None
    threads: int
    engine_choice: EngineChoice

    @contextmanager
    def make_training(self, checkpoint: Checkpoint | None) -> Iterator[AdapterTraining]:
        """Adapters, new or from a checkpoint, connected to what they are trained against; it has to be opened yet."""
        config = self.config
        if checkpoint is not None:  # whatever was drawn then
            config = msgspec.structs.replace(config, seed=trainer_state(checkpoint).run.config.seed)
        opening: AbstractContextManager[Connection | LocalSource] = (
            closing(LocalSource(self.bundle, self.engine))
            if self.server is None
            else Connection(self.server, self.connecting)
        )
        with opening as source:
            yield AdapterTraining(
                self.bundle, self.engine, source, config, _NO_DATA, init=self.init, checkpoint=checkpoint
            )

    def open_sampling(
        self, adapter: Path, tokenizer: PromptTokenizer
    ) -> AbstractContextManager[SamplingClient]:
        """A client that samples with a saved adapter."""
        return SamplingClient.create(
            self.bundle.path,
            self.server,
            adapter=adapter,
            wire_dtype=self.config.wire_dtype,
            threads=self.threads,
            engine=self.engine_choice,
            credentials=self.connecting.credentials,
            max_retry_s=self.connecting.retry.max_s,
            tokenizer=tokenizer,
        )


def _load_state(directory: Path) -> Checkpoint:
    checkpoint = load_latest(directory)
    if checkpoint is None:
        raise CheckpointError(f"{directory} has no saved state; give a directory of save_state")
    return checkpoint


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


def _check_rate(settings: OptimizerConfig) -> None:
    """Raise ``UsageError`` where it is left open: there are no data yet to find one with."""
    if settings.lr is None:
        raise UsageError("optimizer: give it a learning rate, lr; only a run of dlora-edge train finds one")
