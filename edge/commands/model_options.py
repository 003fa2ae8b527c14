"""What says which model is used, by every command that uses one without training it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .options import (
    AdapterOption,
    BundleOption,
    EngineOption,
    MaxRetryOption,
    SendOption,
    ServerOption,
    ThreadsOption,
    WireDtypeOption,
)
from .output import warn

if TYPE_CHECKING:
    from dlora.edge.engine.bundle import Bundle
    from dlora.edge.model.split import SplitModel
    from dlora.edge.wire.credentials import Credentials


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
    server: ServerOption
    adapter: AdapterOption = None
    wire_dtype: WireDtypeOption = "fp16"
    send: SendOption = "embeddings"
    threads: ThreadsOption = 0
    engine: EngineOption = "auto"
    max_retry_s: MaxRetryOption = None

    def open(
        self,
        bundle: Bundle,
        credentials: Credentials,
        *,
        context_length: int = 0,
        longest_outage_s: float | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> AbstractContextManager[SplitModel]:
        """The model, connected.

        Args:
            bundle: the one that these name.
            context_length: as ``open_model`` has it.
            longest_outage_s: of the server, from the first connection on, where these say nothing.
            should_stop: asked while the server is waited for.
        """
        from dlora.edge.adapters.store import default_directory
        from dlora.edge.model.use import open_model
        from dlora.edge.wire.connecting import ConnectSettings, Retry
        from dlora.edge.wire.identity import load_device_id

        longest_s = longest_outage_s if self.max_retry_s is None else self.max_retry_s
        retry = Retry(max_s=longest_s, at_start=bool(self.max_retry_s))
        connecting = ConnectSettings(credentials, load_device_id(warn=warn), retry, say=warn, should_stop=should_stop)
        return open_model(
            bundle,
            self.server,
            find_adapter(self.adapter, default_directory()),
            wire_dtype=self.wire_dtype,
            context_length=context_length,
            send=self.send,
            threads=self.threads,
            engine=self.engine,
            connecting=connecting,
        )
