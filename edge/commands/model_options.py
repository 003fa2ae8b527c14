"""What says which model is used, by every command that uses one without training it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlora.edge.choices import UseMode
from dlora.protocol.errors import UsageError

from .options import (
    AdapterOption,
    BundleOption,
    EngineOption,
    MaxRetryOption,
    OptionalServerOption,
    SendOption,
    ThreadsOption,
    WireDtypeOption,
)
from .output import warn

if TYPE_CHECKING:
    from dlora.edge.engine.bundle import Bundle
    from dlora.edge.model.generating import GeneratingModel
    from dlora.edge.wire.credentials import Credentials
    from dlora.edge.wire.recorder import Recorder

UseModeOption = Annotated[
    UseMode | None,
    typer.Option(
        "--mode",
        help="Where blocks run: split, all on the server; trunk, those with an adapter here, so that nothing of the "
        "adapter is sent, the others there; local, all here, without a server. Without it: as it was trained.",
    ),
]


def find_adapter(adapter: Path | None, directory: Path) -> Path | None:
    """An adapter as a user names it: a directory, or one of ``directory`` by its name."""
    from dlora.edge.adapters.store import is_name

    if adapter is None or adapter.is_dir() or not is_name(str(adapter)) or not (directory / adapter).is_dir():
        return adapter
    return directory / adapter


@dataclass(frozen=True)
class ModelOptions:
    """A bundle, a server and an adapter, as a group of options."""

    bundle: BundleOption
    server: OptionalServerOption = None
    adapter: AdapterOption = None
    wire_dtype: WireDtypeOption = "fp16"
    send: SendOption = "embeddings"
    threads: ThreadsOption = 0
    engine: EngineOption = "auto"
    max_retry_s: MaxRetryOption = None

    def open_generating(
        self,
        bundle: Bundle,
        credentials: Credentials,
        mode: UseMode | None,
        *,
        context_length: int,
        longest_outage_s: float | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        recorder: Recorder | None = None,
    ) -> AbstractContextManager[GeneratingModel]:
        """The model to generate with, connected.

        Args:
            bundle: the one that these name.
            mode: None: that in which the adapter was trained.
            context_length: as ``open_model`` has it.
            longest_outage_s: of the server, from the first connection on, where these say nothing.
            should_stop: asked while the server is waited for.
            recorder: keeps what crosses.

        Raises what ``open_model``, ``open_trunk`` and ``open_local_generator`` do, and ``UsageError`` for a server that
        is lacking.
        """
        from dlora.edge.model.device_lora import trained_mode
        from dlora.edge.model.local_use import open_local_generator
        from dlora.edge.model.trunk_use import open_trunk
        from dlora.edge.model.use import open_model

        adapter = self.find_adapter()
        chosen = mode or trained_mode(adapter)
        if chosen != "split":
            self.warn_of_storage(bundle)
        if chosen == "local":
            return open_local_generator(
                bundle, adapter, context_length=context_length, threads=self.threads, engine=self.engine
            )
        settings = self.settings(credentials, longest_outage_s, should_stop, recorder)
        open_it = open_trunk if chosen == "trunk" else open_model
        return open_it(bundle, self.server_for(chosen), adapter, context_length=context_length, **settings)

    def check_mode(self, mode: UseMode | None) -> None:
        """Raise ``UsageError`` for a server that nobody asks."""
        if mode == "local" and self.server is not None:
            raise UsageError("--mode local asks no server: leave --server out")

    def warn_of_storage(self, bundle: Bundle) -> None:
        """Say where the adapter was trained with blocks that are stored otherwise than those on this device."""
        from dlora.edge.model.device_lora import other_storage_line

        if line := other_storage_line(bundle.manifest, self.find_adapter()):
            warn(line)

    def server_for(self, mode: UseMode) -> str:
        """The server that a mode asks. Raises ``UsageError`` where none is named."""
        if self.server is None:
            raise UsageError(f"--mode {mode} needs --server, which runs blocks; --mode local needs none")
        return self.server

    def find_adapter(self) -> Path | None:
        """The adapter's directory."""
        from dlora.edge.adapters.store import default_directory

        return find_adapter(self.adapter, default_directory())

    def settings(
        self,
        credentials: Credentials,
        longest_outage_s: float | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        recorder: Recorder | None = None,
    ) -> dict[str, Any]:
        """What the modes take that ask a server."""
        from dlora.edge.wire.connecting import ConnectSettings, Retry
        from dlora.edge.wire.identity import load_device_id

        longest_s = longest_outage_s if self.max_retry_s is None else self.max_retry_s
        retry = Retry(max_s=longest_s, at_start=bool(self.max_retry_s))
        connecting = ConnectSettings(
            credentials, load_device_id(warn=warn), retry, say=warn, should_stop=should_stop, recorder=recorder
        )
        return {
            "wire_dtype": self.wire_dtype,
            "send": self.send,
            "threads": self.threads,
            "engine": self.engine,
            "connecting": connecting,
        }
