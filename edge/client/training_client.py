"""Training from Python: forward, backward and the optimizer's step of adapters that lie here.

The verbs are Tinker's (Thinking Machines, 2025); the adapters, the data and the loss stay on this machine.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import msgspec
import numpy as np

from dlora.edge.adapters.peft import load_adapter
from dlora.edge.choices import EngineChoice
from dlora.edge.data.prompt import PromptTokenizer, prompt_tokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.choose import make_engine
from dlora.edge.model.local_source import LocalSource
from dlora.edge.seeds import draw_seed
from dlora.edge.training.adapter_training import AdapterTraining, OptimizerStep, trainer_state
from dlora.edge.training.checkpoint import load_latest
from dlora.edge.training.config import TrainConfig
from dlora.edge.training.defaults import DEFAULTS, default_alpha, default_rank, default_target_modules
from dlora.edge.training.optimizer import OptimizerConfig
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.edge.wire.connection import Connection
from dlora.edge.wire.credentials import Credentials
from dlora.edge.wire.identity import load_device_id
from dlora.protocol.choices import KindChoice
from dlora.protocol.errors import CheckpointError, UsageError
from dlora.protocol.kill_revive import KillReviveConfig
from dlora.protocol.limits import MAX_STEPS
from dlora.protocol.targets import choose_groups
from dlora.protocol.tensors import FloatArray

from .datum import Datum, pack_data
from .losses import LossFunction
from .sampling_client import SamplingClient

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
        bundle: of the base model; config: of the adapters.
    """

    def __init__(
        self, bundle: Bundle, training: AdapterTraining, tokenizer: PromptTokenizer, sampling: Callable[..., Any]
    ) -> None:
        self.bundle = bundle
        self.config = training.config
        self.tokenizer = tokenizer
        self._training = training
        self._open_sampling = sampling
        self._lock = threading.Lock()

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
    ) -> Iterator[Self]:
        """A client that trains new adapters, or those of ``init_adapter``, or goes on from ``state``.

        Args:
            bundle: its directory; server: its address; None: all blocks run here, where the bundle has all of them.
            kind, rank, alpha, target_modules, blocks: as ``dlora-edge train`` has them; a bottleneck's A and B are
                those of the base model's weights, for there are no data yet.
            total_steps: for schedules that end; None: there is no end, and the learning rate is constant.
            optimizer: AdamW's settings; the learning rate may be given anew at each step.
            state: a directory of ``save_state``.
            max_sequence_length: tokens of the longest sequence that will come; None: what the base model takes.
            max_retry_s: how long a server that is gone is waited for; None: for ever.

        Raises what opening a bundle, a server and an adapter raise.
        """
        opened = Bundle.open(Path(bundle))
        manifest = opened.manifest
        defaults = DEFAULTS[kind]
        names = tuple(target_modules) or default_target_modules(kind, manifest, "all")
        groups = choose_groups(manifest, names, tuple(blocks))
        r = rank or default_rank(kind, manifest, groups)
        settings = optimizer or OptimizerConfig(lr=defaults.lr, weight_decay=defaults.weight_decay)
        steps = total_steps or MAX_STEPS
        if total_steps is None and settings.schedule != "constant":
            raise UsageError("a schedule that ends needs total_steps")
        if server is None and kind != "lora":
            raise UsageError("adapters in blocks on this machine are of the kind lora; name a server for another")
        config = TrainConfig(
            mode="split" if server is not None else "local",
            device_blocks=0 if server is not None else manifest.base_model.blocks,
            total_steps=steps,
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
        checkpoint = None
        if state is not None:
            checkpoint = load_latest(Path(state))
            if checkpoint is None:
                raise CheckpointError(f"{state} has no saved state; give a directory of save_state")
            if seed is None:  # what was drawn then is in it
                config = msgspec.structs.replace(config, seed=trainer_state(checkpoint).run.config.seed)
        init = None if init_adapter is None else load_adapter(Path(init_adapter))
        connecting = ConnectSettings(
            credentials or Credentials(), load_device_id(warn=lambda _: None), Retry(max_s=max_retry_s)
        )
        with ExitStack() as stack:
            tokenizer = stack.enter_context(prompt_tokenizer(opened))  # before there is an engine
            loaded = make_engine(opened, engine, threads)
            source: Connection | LocalSource
            if server is not None:
                source = stack.enter_context(Connection(server, connecting))
            else:
                source = stack.enter_context(closing(LocalSource(opened, loaded)))
            training = AdapterTraining(opened, loaded, source, config, _NO_DATA, init=init, checkpoint=checkpoint)
            training.open(max_sequence_length or manifest.base_model.max_sequence_length)

            def sampling(adapter: Path) -> Any:
                return SamplingClient.create(
                    opened.path, server, adapter=adapter, wire_dtype=config.wire_dtype, threads=threads, engine=engine,
                    credentials=credentials, max_retry_s=max_retry_s, tokenizer=tokenizer,
                )  # fmt: skip

            yield cls(opened, training, tokenizer, sampling)

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
        """Log-probabilities with the adapters as they are; no gradient. Raises what ``Connection`` raises."""
        with self._lock:
            return self._forward(data, batch_size or len(data))

    def forward_backward(
        self, data: Sequence[Datum], *, batch_size: int | None = None, total_weight: float | None = None
    ) -> ForwardBackward:
        """Add the gradient of the cross-entropy: the sum of weights times cross-entropies, over ``total_weight``.

        Args:
            batch_size: sequences that are exchanged at once; None: all of them.
            total_weight: of the whole step, where it has more than this call; None: the sum of these weights.

        Raises what ``Connection`` raises, ``NonFiniteError`` where the run diverges, and ``DataError`` for a sequence
        that the server does not take.
        """
        with self._lock:
            return self._forward_backward(data, batch_size or len(data), total_weight)

    def forward_backward_custom(
        self, data: Sequence[Datum], loss: LossFunction, *, batch_size: int | None = None
    ) -> ForwardBackward:
        """Add the gradient of any loss of the log-probabilities of all ``data``.

        Where they are exchanged at once, and the server takes them so, in one pass. Else there are two: a forward pass
        finds the log-probabilities, and the loss's gradient by them weighs the cross-entropies of the second.

        Raises as ``forward_backward`` does, and ``UsageError`` for a gradient of other shapes.
        """
        with self._lock:
            return self._forward_backward_custom(data, loss, batch_size or len(data))

    def optim_step(self, learning_rate: float | None = None) -> OptimizerStep:
        """Step AdamW with the gradients so far, and forget them. ``learning_rate``: None: that of the schedule.

        Raises ``NonFiniteError`` where they are not finite; nothing has changed then.
        """
        with self._lock:
            return self._training.optim_step(learning_rate)

    def save_state(self, directory: Path | str) -> None:
        """Save adapters, moments and the number of the step, for ``create(state=...)``. Raises ``StorageError``."""
        with self._lock:
            self._training.save_checkpoint(Path(directory))

    def save_adapter(self, directory: Path | str) -> None:
        """Save the adapters as PEFT has them. Raises ``StorageError``."""
        with self._lock:
            self._training.save_adapter(Path(directory))

    @contextmanager
    def sampling_client(self) -> Iterator[SamplingClient]:
        """A client that samples with the adapters as they are now."""
        with tempfile.TemporaryDirectory(prefix="dlora-") as directory:
            self.save_adapter(directory)
            with self._open_sampling(Path(directory)) as client:
                yield client

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

    async def optim_step_async(self, learning_rate: float | None = None) -> OptimizerStep:
        """``optim_step`` in a thread."""
        return await asyncio.to_thread(self.optim_step, learning_rate)

    # -- inside --------------------------------------------------------------------------------------------

    def _forward(self, data: Sequence[Datum], batch_size: int) -> ForwardBackward:
        losses = [self._training.evaluate_batch(pack_data(batch)) for batch in _batches(data, batch_size)]
        return _result(data, np.concatenate(losses), sum(float(datum.label_weights.sum()) for datum in data))

    def _forward_backward(
        self, data: Sequence[Datum], batch_size: int, total_weight: float | None
    ) -> ForwardBackward:
        weights = np.concatenate([datum.label_weights for datum in data])
        total = total_weight or float(weights.sum(dtype=np.float64))
        packed = [pack_data(batch) for batch in _batches(data, batch_size)]
        if (weights == 1).all():  # the command's own way, bit for bit
            losses = self._training.forward_backward(packed, grad_scale=1.0 / total)
        else:
            cut = [part for batch in packed for part in self._training.model.cut(batch)]
            gradients, start = [], 0
            for part in cut:
                of_part = weights[start : start + len(part.labels)] / np.float32(total)
                gradients.append(_constant((-of_part).astype(np.float32)))
                start += len(part.labels)
            losses = self._training.forward_backward(cut, grad_scale=0.0, gradients=gradients)
        return _result(data, np.concatenate(losses), total)

    def _forward_backward_custom(
        self, data: Sequence[Datum], loss: LossFunction, batch_size: int
    ) -> ForwardBackward:
        model, value = self._training.model, 0.0
        packed = [pack_data(batch) for batch in _batches(data, batch_size)]
        cut = [part for batch in packed for part in model.cut(batch)]

        def gradient_of(logprobs: FloatArray) -> FloatArray:
            nonlocal value
            value, gradients = loss(data, _split(data, logprobs))
            return _joined(data, gradients)

        if len(cut) == 1:
            (losses,) = self._training.forward_backward(cut, grad_scale=0.0, gradients=[gradient_of])
            return ForwardBackward(value, _split(data, -losses))
        before = -np.concatenate([self._training.evaluate_batch(part) for part in cut])
        gradient, gradients, start = gradient_of(before), [], 0
        for part in cut:
            gradients.append(_constant(gradient[start : start + len(part.labels)]))
            start += len(part.labels)
        self._training.forward_backward(cut, grad_scale=0.0, gradients=gradients)
        return ForwardBackward(value, _split(data, before))


def _batches(data: Sequence[Datum], size: int) -> Iterator[Sequence[Datum]]:
    if not data:
        raise UsageError("no data: give at least one datum")
    for start in range(0, len(data), size):
        yield data[start : start + size]


def _constant(values: FloatArray) -> Callable[[FloatArray], FloatArray]:
    return lambda _: values


def _split(data: Sequence[Datum], values: FloatArray) -> list[FloatArray]:
    """Of each datum its own, of values that follow each other."""
    return np.split(values, np.cumsum([len(datum.rows) for datum in data])[:-1])


def _joined(data: Sequence[Datum], gradients: Sequence[FloatArray]) -> FloatArray:
    shapes = [np.shape(gradient) for gradient in gradients]
    wanted = [(len(datum.rows),) for datum in data]
    if shapes != wanted:
        raise UsageError(f"the loss's gradient must have a number for each log-probability: {wanted}, not {shapes}")
    return np.concatenate([np.asarray(gradient, np.float32) for gradient in gradients])


def _result(data: Sequence[Datum], losses: FloatArray, total: float) -> ForwardBackward:
    weights = np.concatenate([datum.label_weights for datum in data])
    value = float((losses.astype(np.float64) * weights).sum() / total)
    return ForwardBackward(value, _split(data, -losses))
