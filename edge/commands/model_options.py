"""What says which model is used, by every command that uses one without training it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dlora.edge.settings import Settings
from dlora.protocol.errors import UsageError

from .output import warn
from .settings_options import takes_settings

if TYPE_CHECKING:
    from dlora.edge.engine.bundle import Bundle
    from dlora.edge.model.generating import GeneratingModel
    from dlora.edge.model.opening import Opening
    from dlora.edge.model.split import SplitModel
    from dlora.edge.model.trunk import TrunkModel
    from dlora.edge.wire.credentials import Credentials
    from dlora.edge.wire.recorder import Recorder

MODEL: Final = (
    "bundle", "server", "token_file", "ca", "client_cert", "client_key", "insecure", "wire_dtype", "send",
    "max_retry_s", "device_blocks", "engine", "threads",
)  # fmt: skip
"""The settings that such a command takes."""
CHANGES: Final[dict[str, dict[str, Any]]] = {
    "wire_dtype": {
        "default": "fp16",
        "help": "Precision on the wire: int8, fp16 or fp32; and others for some roles: int8,embeddings=fp16.",
    },
    "device_blocks": {
        "default": "auto",
        "help": "How many of the model's last blocks run here. 0: none. N: nothing of an adapter in them is sent. all: "
        "no server. auto: as the adapter was trained.",
    },
}
takes_model = functools.partial(takes_settings, *MODEL, required=("bundle",), changes=CHANGES)


def find_adapter(adapter: Path | None, directory: Path) -> Path | None:
    """An adapter as a user names it: a directory, or one of ``directory`` by its name."""
    from dlora.edge.adapters.store import is_name

    if adapter is None or adapter.is_dir() or not is_name(str(adapter)) or not (directory / adapter).is_dir():
        return adapter
    return directory / adapter


@dataclass(frozen=True)
class UsedModel:
    """A bundle, a server and an adapter, as settings and ``--adapter`` name them."""

    settings: Settings
    adapter: Path | None

    def check(self) -> None:
        """Raise ``UsageError`` for a precision that is none, and a server that nobody asks."""
        from dlora.protocol.wire_codecs import Codecs

        assert self.settings.server.wire_dtype is not None
        Codecs.parse(self.settings.server.wire_dtype)
        if self.settings.placement.device_blocks == "all" and self.settings.server.server is not None:
            raise UsageError("--device-blocks all asks no server: leave --server out")

    def device_blocks(self, bundle: Bundle) -> int:
        """How many blocks run here; by default as many as when the adapter was trained."""
        from dlora.edge.model.device_lora import trained_device_blocks

        word, last = self.settings.placement.device_blocks, bundle.manifest.base_model.blocks
        if word == "auto":
            return trained_device_blocks(self.find_adapter())
        count = last if word == "all" else int(word)
        if count > last:
            raise UsageError(f"--device-blocks {word}: the model has {last} blocks")
        return count

    def find_adapter(self) -> Path | None:
        """The adapter's directory."""
        from dlora.edge.adapters.store import default_directory

        return find_adapter(self.adapter, default_directory())

    def open_generating(
        self,
        bundle: Bundle,
        credentials: Credentials,
        *,
        context_length: int,
        longest_outage_s: float | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        recorder: Recorder | None = None,
    ) -> AbstractContextManager[GeneratingModel]:
        """The model to generate with, connected.

        Args:
            bundle: the one that the settings name.
            context_length: as ``open_to_generate`` has it.
            longest_outage_s: of the server, from the first connection on, where the settings say nothing.
            should_stop: asked while the server is waited for.
            recorder: keeps what crosses.

        Raises what ``open_to_generate`` does.
        """
        from dlora.edge.model.opening import open_to_generate

        opening = self._opening(bundle, credentials, longest_outage_s, should_stop, recorder)
        return open_to_generate(opening, context_length=context_length)

    def open_to_evaluate(
        self, bundle: Bundle, credentials: Credentials, longest: int, recorder: Recorder | None
    ) -> AbstractContextManager[SplitModel | TrunkModel]:
        """The model, connected where it has to be. ``longest``: tokens of the longest example."""
        from dlora.edge.model.opening import open_to_evaluate

        return open_to_evaluate(self._opening(bundle, credentials, recorder=recorder), longest=longest)

    def check_server(self, bundle: Bundle) -> None:
        """Raise ``UsageError`` where a server is needed and none is named."""
        if self.settings.server.server is None and self.device_blocks(bundle) < bundle.manifest.base_model.blocks:
            raise UsageError("--server is missing, which runs blocks; --device-blocks all needs none")

    def warn_of_server(self, bundle: Bundle) -> None:
        """Say where a server is to be told what an adapter computes that was trained without, or is not asked."""
        from dlora.edge.model.device_lora import trained_device_blocks

        count, trained = self.device_blocks(bundle), trained_device_blocks(self.find_adapter())
        if count == bundle.manifest.base_model.blocks and self.settings.server.server is not None:
            warn("the adapter was trained with --device-blocks all: all blocks run here, and --server is not asked")
        if not count and trained:
            warn(
                f"the adapter was trained with {trained} blocks here; the server is now sent what it computes, token "
                "by token"
            )

    def _warn_of_storage(self, bundle: Bundle, count: int) -> None:
        """Say where the adapter was trained with blocks that are stored otherwise than those on this device."""
        from dlora.edge.model.device_lora import other_storage_line

        if count and (line := other_storage_line(bundle.manifest, self.find_adapter())):
            warn(line)

    def _opening(
        self,
        bundle: Bundle,
        credentials: Credentials,
        longest_outage_s: float | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        recorder: Recorder | None = None,
    ) -> Opening:
        from dlora.edge.model.opening import Opening
        from dlora.edge.wire.connecting import ConnectSettings, Retry
        from dlora.edge.wire.identity import load_device_id

        self.check_server(bundle)
        server, device, adapter = self.settings.server, self.settings.device, self.find_adapter()
        count = self.device_blocks(bundle)
        self._warn_of_storage(bundle, count)
        is_all = count == bundle.manifest.base_model.blocks
        # What the adapter was trained with says that there are some, and it itself how many are needed.
        is_open = self.settings.placement.device_blocks == "auto" and count and not is_all
        longest_s = longest_outage_s if server.max_retry_s is None else server.max_retry_s
        connecting = None
        if not is_all:
            connecting = ConnectSettings(
                credentials,
                load_device_id(warn=warn),
                Retry(max_s=longest_s, at_start=bool(server.max_retry_s)),
                say=warn,
                should_stop=should_stop,
                recorder=recorder,
            )
        assert server.wire_dtype is not None
        return Opening(
            bundle, None if is_all else server.server, adapter, None if is_open else count, server.wire_dtype,
            server.send, device.threads, device.engine, connecting,
        )  # fmt: skip
