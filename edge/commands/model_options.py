"""What says which model is used, by every command that uses one without training it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dlora.edge.settings import Settings
from dlora.protocol.choices import Drafts
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
    "bundle", "verify", "server", "token_file", "ca", "client_cert", "client_key", "insecure", "wire_dtype", "send",
    "passes", "max_retry_s", "device_blocks", "engine", "threads",
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
    "passes": {
        "default": "auto",
        "help": "How the server asks the adapter. live: group after group, as PEFT computes. F,B: all groups at once, "
        "in F passes: F + 1 round trips a text, or a token of an answer. auto: as the adapter was trained.",
    },
}
takes_model = functools.partial(takes_settings, *MODEL, required=("bundle",), changes=CHANGES)


def find_adapter(adapter: Path | None, directory: Path) -> Path | None:
    """An adapter as a user names it: a directory, or one of ``directory`` by its name."""
    from dlora.edge.adapters.store import is_name

    if adapter is None or adapter.is_dir() or not is_name(str(adapter)) or not (directory / adapter).is_dir():
        return adapter
    return directory / adapter


def check_model(settings: Settings) -> None:
    """Raise ``UsageError`` for a precision that is none, and a server that nobody asks."""
    from dlora.protocol.wire_codecs import Codecs

    assert settings.server.wire_dtype is not None
    Codecs.parse(settings.server.wire_dtype)
    if settings.placement.device_blocks == "all" and settings.server.server is not None:
        raise UsageError("--device-blocks all asks no server: leave --server out")


@dataclass(frozen=True)
class UsedModel:
    """An open bundle, a server and an adapter, as settings and options name them."""

    settings: Settings
    bundle: Bundle
    credentials: Credentials
    adapter: Path | None
    drafts: Drafts
    lends: bool

    @classmethod
    def of(cls, settings: Settings, adapter: Path | None, drafts: Drafts = "auto", *, lends: bool = False) -> UsedModel:
        """Reads tokens and certificates, and opens the bundle; ``lends``: whether ``--lend-adapter`` was given, which
        is said. Raises ``UsageError`` and ``BundleError``."""
        from dlora.edge.engine.bundle import Bundle
        from dlora.edge.wire.credentials import Credentials

        credentials = Credentials.of(settings.server, warn)
        if lends and settings.server.server is not None:
            warn(
                f"--lend-adapter: {settings.server.server} is GIVEN what the adapter has learnt, and has it in memory "
                "until the session ends; it could keep it for good (SECURITY.md)"
            )
        assert settings.device.bundle is not None  # every such command asks for it
        bundle = Bundle.open(settings.device.bundle, verify=settings.device.verify)
        return cls(settings, bundle, credentials, adapter, drafts, lends)

    def with_adapter(self, adapter: Path | None) -> UsedModel:
        """The same base model with another adapter."""
        return replace(self, adapter=adapter)

    def find_adapter(self) -> Path | None:
        """The adapter's directory."""
        from dlora.edge.adapters.store import default_directory

        return find_adapter(self.adapter, default_directory())

    def open_generating(
        self,
        *,
        context_length: int,
        longest_outage_s: float | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        recorder: Recorder | None = None,
    ) -> AbstractContextManager[GeneratingModel]:
        """The model to generate with, connected.

        Args:
            context_length: as ``open_to_generate`` has it.
            longest_outage_s: of the server, from the first connection on, where the settings say nothing.
            should_stop: asked while the server is waited for.
            recorder: keeps what crosses.

        Raises what ``open_to_generate`` does.
        """
        from dlora.edge.model.opening import open_to_generate

        return open_to_generate(self._opening(recorder, longest_outage_s, should_stop), context_length=context_length)

    def open_to_evaluate(
        self, longest: int, recorder: Recorder | None
    ) -> AbstractContextManager[SplitModel | TrunkModel]:
        """The model, connected where it has to be. ``longest``: tokens of the longest example."""
        from dlora.edge.model.opening import open_to_evaluate

        return open_to_evaluate(self._opening(recorder), longest=longest)

    def check_server(self) -> None:
        """Raise ``UsageError`` where a server is needed and none is named."""
        if self.settings.server.server is None and self._device_blocks() < self.bundle.manifest.base_model.blocks:
            raise UsageError("--server is missing, which runs blocks; --device-blocks all needs none")

    def warn_of_server(self) -> None:
        """Say where a server is to be told what an adapter computes that was trained without, or is not asked."""
        from dlora.edge.model.device_lora import trained_device_blocks

        count, trained = self._device_blocks(), trained_device_blocks(self.find_adapter())
        if count == self.bundle.manifest.base_model.blocks and self.settings.server.server is not None:
            warn("the adapter was trained with --device-blocks all: all blocks run here, and --server is not asked")
        if not count and trained:
            warn(
                f"the adapter was trained with {trained} blocks here; the server is now sent what it computes, token "
                "by token"
            )

    def _device_blocks(self) -> int:
        """How many blocks run here; by default as many as when the adapter was trained."""
        from dlora.edge.model.device_lora import trained_device_blocks

        word, last = self.settings.placement.device_blocks, self.bundle.manifest.base_model.blocks
        if word == "auto":
            return trained_device_blocks(self.find_adapter())
        count = last if word == "all" else int(word)
        if count > last:
            raise UsageError(f"--device-blocks {word}: the model has {last} blocks")
        return count

    def _opening(
        self,
        recorder: Recorder | None,
        longest_outage_s: float | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Opening:
        from dlora.edge.model.device_lora import other_storage_line
        from dlora.edge.model.opening import Opening
        from dlora.edge.wire.connecting import ConnectSettings, Retry
        from dlora.edge.wire.identity import load_device_id

        self.check_server()
        server, device, adapter = self.settings.server, self.settings.device, self.find_adapter()
        count, manifest = self._device_blocks(), self.bundle.manifest
        if count and (line := other_storage_line(manifest, adapter)):
            warn(line)
        lends = self.lends and adapter is not None
        if lends and count:
            text = "--lend-adapter is for a server that runs all blocks, and some run here: use --device-blocks 0"
            raise UsageError(text)
        is_all = count == manifest.base_model.blocks
        # What the adapter was trained with says that there are some, and it itself how many are needed.
        is_open = self.settings.placement.device_blocks == "auto" and count and not is_all
        connecting = None
        if not is_all:
            longest_s = longest_outage_s if server.max_retry_s is None else server.max_retry_s
            connecting = ConnectSettings(
                self.credentials,
                load_device_id(warn=warn),
                Retry(max_s=longest_s, at_start=bool(server.max_retry_s)),
                say=warn,
                should_stop=should_stop,
                recorder=recorder,
            )
        assert server.wire_dtype is not None
        opening = Opening(
            self.bundle, None if is_all else server.server, adapter, None if is_open else count, server.wire_dtype,
            server.send, device.threads, device.engine, connecting, server.passes or "auto",
            self.drafts in ("auto", "server"), lends,
        )  # fmt: skip
        if self.drafts == "server" and opening.table is None:
            raise UsageError(
                "--draft server needs a token embedding that the server has, too, and the bundle's is "
                f"{manifest.embedding.dtype}: export it with --embedding-dtype fp16, or give --send token-ids"
            )
        return opening
