"""Where a run's frozen blocks are: all that training does otherwise for that, and nothing else of it knows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

from dlora.edge.adapters.compatibility import check_base_model, check_sequence_length
from dlora.edge.adapters.units import AdapterSet
from dlora.edge.data.batches import MicroBatch
from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.model.evaluation import TrainableModel
from dlora.edge.model.kept_reads import KeptReads
from dlora.edge.model.source import HiddenStateSource
from dlora.edge.model.split import SplitModel
from dlora.edge.model.trunk import TrunkModel
from dlora.edge.wire.connection import Connection
from dlora.edge.wire.recorder import Recorder
from dlora.edge.wire.spans import Spans
from dlora.edge.wire.usage import Crossed

from .device_session import DeviceSession
from .resolved import Resolved
from .train_session import TrainSession

BasisSteps = Callable[[], Iterable[Sequence[MicroBatch]]]
"""The micro-batches of each step whose data a basis is made from."""


class Side(ABC):
    """A run's session, its model, and what they took.

    Attributes:
        session: where the run stands; model: with the run's adapters; crossed: what crossed so far.
        spans: what happens when, where somebody wants to know.
        recorder: keeps what crosses; None where nothing does, or nobody asks for that.
    """

    session: TrainSession | DeviceSession
    model: TrainableModel
    crossed: Crossed
    spans: Spans
    recorder: Recorder | None = None

    @abstractmethod
    def check(self, longest: int | None) -> None:
        """Raise for what would be refused at an unlucky step hours later: ``ModelMismatchError`` for a base model,
        ``DataError`` for a sequence of ``longest`` tokens."""

    @abstractmethod
    def open(self, basis_steps: BasisSteps | None, before_group: Callable[[int, int], None]) -> None:
        """Begin, or go on.

        Args:
            basis_steps: what a server is to see before it makes its part of the adapters from it.
            before_group: called before a server makes what it keeps of each group, with how many are done and how many
                there are; what it raises ends the set-up.
        """

    def keep_outputs(self, dataset: Dataset, examples_a_step: int) -> None:  # noqa: B027  # without blocks: nothing
        """Keep what comes out of blocks on the device that are not trained for long enough, where that is wanted."""


MakeSide = Callable[[Bundle, Engine, AdapterSet, Resolved], Side]


class ServerSide(Side):
    """All blocks on a server: at every step it exchanges with the adapters.

    ``kept_reads``: what is kept of what groups read, in a run that keeps it.
    """

    session: TrainSession
    model: SplitModel

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        adapters: AdapterSet,
        config: Resolved,
        *,
        connection: Connection,
        kept_reads: KeptReads | None = None,
    ) -> None:
        fingerprint = bundle.manifest.base_model.fingerprint
        self.crossed = connection
        self.recorder = connection.recorder
        self.spans = connection.spans
        self.session = TrainSession(connection, adapters, config, base_fingerprint=fingerprint)
        self.model = SplitModel(
            bundle, engine, self.session, invocation=config.invocation, send=config.server.send, passes=config.passes,
            kept_reads=kept_reads,
        )  # fmt: skip
        self._bundle = bundle
        self._connection = connection

    def check(self, longest: int | None) -> None:
        check_base_model(self._bundle, self._connection.welcome)
        if longest is not None:
            check_sequence_length(longest, self._connection.welcome)

    def open(self, basis_steps: BasisSteps | None, before_group: Callable[[int, int], None]) -> None:
        if basis_steps is not None:
            self.session.basis_pass = lambda: sum(map(self.model.run_basis_pass, basis_steps()))
        self.session.before_group = before_group
        self.session.open()


class DeviceSide(Side):
    """The last blocks here, and no server in a step.

    ``source``: of what goes into the first of them.
    """

    session: DeviceSession
    model: TrunkModel

    def __init__(
        self, bundle: Bundle, engine: Engine, adapters: AdapterSet, config: Resolved, *, source: HiddenStateSource
    ) -> None:
        self.crossed = source.crossed
        self.spans = Spans()
        self.session = DeviceSession(adapters, config)
        self.model = TrunkModel(bundle, engine, adapters, config.device_blocks, source, config.invocation)

    def check(self, longest: int | None) -> None:
        if longest is not None:
            self.model.check_fits(longest)

    def open(self, basis_steps: BasisSteps | None, before_group: Callable[[int, int], None]) -> None:
        self.session.open()  # what is trained here has no basis

    def keep_outputs(self, dataset: Dataset, examples_a_step: int) -> None:
        self.model.keep_outputs(dataset, examples_a_step, self.session.unchanged_steps)
