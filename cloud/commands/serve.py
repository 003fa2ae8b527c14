"""The command line of ``dlora-cloud``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import secrets
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import platformdirs
import typer

from dlora.cloud.door.guard import raise_file_limit
from dlora.cloud.door.tls import check_exposure, server_context
from dlora.cloud.door.tokens import FILE_NAME, TokenStore
from dlora.cloud.model.memory import forget_long_lived, limit_arenas
from dlora.cloud.serving.listening import check_address
from dlora.cloud.serving.patience import Patience
from dlora.protocol import interrupts
from dlora.protocol.errors import StorageError, UsageError
from dlora.protocol.files import sync
from dlora.protocol.version import SOFTWARE_VERSION

from . import tokens as token_cli

DOOR = "Who may come in"
QUOTAS = "Quotas of a device"
LIMITS = "Limits of the whole server"
PATIENCE = "Patience"
KEY_BYTES = 32

app = typer.Typer(
    help="Serve the frozen blocks of a language model to devices that fine-tune it.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(token_cli.app, name="token")


class Dtype(StrEnum):
    """The base model's dtype on the server."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def _version(wanted: bool) -> None:
    if wanted:
        print(f"dlora-cloud {SOFTWARE_VERSION}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Local directory, hub id, .gguf file, or smollm2-135m.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8765,
    dtype: Annotated[Dtype, typer.Option(help="The base model's dtype here.")] = Dtype.float32,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Torch threads; 0: one for each core.", min=0, max=1024)] = 0,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where tokens and the key that signs tickets are kept; ~/.local/state/dlora-cloud by default.",
            envvar="DLORA_CLOUD_STATE",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate chain (PEM): speak TLS.", rich_help_panel=DOOR)
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="Its key, where that is another file.", rich_help_panel=DOOR)
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(help="Let devices in whose certificate this authority signed (PEM).", rich_help_panel=DOOR),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Listen on a network without TLS, or let everybody in.", rich_help_panel=DOOR),
    ] = False,
    quota_sessions: Annotated[
        int | None, typer.Option(help="Sessions of one device at a time.", metavar="N", min=1, rich_help_panel=QUOTAS)
    ] = None,
    quota_tokens_per_minute: Annotated[
        int | None, typer.Option(help="Tokens of one device in a minute.", metavar="N", min=1, rich_help_panel=QUOTAS)
    ] = None,
    quota_live_mb: Annotated[
        float | None,
        typer.Option(
            help="Memory of one device's running micro-batches, MB.", metavar="MB", min=0.001, rich_help_panel=QUOTAS
        ),
    ] = None,
    quota_compute_s: Annotated[
        float | None,
        typer.Option(
            help="Seconds of computing for one device in an hour.", metavar="S", min=0.001, rich_help_panel=QUOTAS
        ),
    ] = None,
    max_sessions: Annotated[
        int, typer.Option(help="Devices that may train at a time.", min=1, rich_help_panel=LIMITS)
    ] = 16,
    live_mb: Annotated[
        float | None,
        typer.Option(
            help="Memory of all running micro-batches together, MB; more of them wait their turn. By default half of "
            "what the model leaves of the machine's.",
            min=0.001,
            rich_help_panel=LIMITS,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of one micro-batch. By default what takes half of --live-mb, 8192 at most.",
            min=1,
            rich_help_panel=LIMITS,
        ),
    ] = None,
    park_s: Annotated[
        float,
        typer.Option(help="Seconds that a session is kept whose device is away.", min=0, rich_help_panel=PATIENCE),
    ] = 120.0,
    exchange_timeout_s: Annotated[
        float,
        typer.Option(
            help="Least seconds for one answer of a device; slow ones get more.", min=0.1, rich_help_panel=PATIENCE
        ),
    ] = 120.0,
    step_timeout_s: Annotated[
        float,
        typer.Option(help="Least seconds for all answers of a micro-batch.", min=0.1, rich_help_panel=PATIENCE),
    ] = 900.0,
    idle_timeout_s: Annotated[
        float,
        typer.Option(help="Seconds that a session may do nothing.", min=0.1, rich_help_panel=PATIENCE),
    ] = 3600.0,
    drain_s: Annotated[
        float,
        typer.Option(
            help="Seconds that running steps may take when the server stops.", min=0, rich_help_panel=PATIENCE
        ),
    ] = 30.0,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object once it listens.")] = False,
) -> None:
    """Serve one base model over a websocket until SIGINT or SIGTERM.

    Devices with different ranks, target modules and active adapters share the one base; no bundle is needed.
    The server never gets token ids, labels, adapter weights or optimizer state. GET /healthz answers on the same
    port. A network is listened on only with --tls-cert and with tokens (dlora-cloud token create) or
    --tls-client-ca. Once there is a token, every device needs one. SIGTERM lets running steps finish.

    Example:  dlora-cloud serve smollm2-135m --port 8765
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S", stream=sys.stderr
    )
    logging.getLogger("websockets").setLevel(logging.CRITICAL)  # every end of a connection has a line of ours
    patience = Patience(exchange_timeout_s, step_timeout_s, idle_timeout_s, park_s)
    state = state_dir or platformdirs.user_state_path("dlora-cloud")
    tokens = TokenStore(state / FILE_NAME)
    authenticated = tls_client_ca is not None or tokens.any()
    check_exposure(host, tls=tls_cert is not None, authenticated=authenticated, insecure=insecure)
    if tls_cert is None and (tls_key or tls_client_ca):
        raise UsageError("--tls-key and --tls-client-ca need --tls-cert")
    tls = server_context(tls_cert, tls_key, tls_client_ca) if tls_cert else None
    check_address(host, port)
    raise_file_limit()
    limit_arenas()
    key = load_key(state)
    # Idle OpenMP threads spin: with a device on the same cores that made a step 15 times slower. Must be set
    # before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    import torch

    from dlora.cloud.door.access import Access
    from dlora.cloud.door.quotas import QuotaLimits
    from dlora.cloud.model.base_model import load_base_model
    from dlora.cloud.model.live_bytes import default_live_limit
    from dlora.cloud.serving.server import CloudServer

    check_device(device, torch.cuda.device_count())
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    log = logging.getLogger("dlora.cloud")
    log.info("loading %s", model)
    started = time.monotonic()
    base = load_base_model(model, dtype=getattr(torch, dtype.value), device=device)
    log.info(
        "loaded %s: %s, %d blocks, %.0fM parameters, fingerprint %s…, in %.1f s",
        base.name, base.architecture, base.blocks, base.parameters / 1e6, base.fingerprint[:12],
        time.monotonic() - started,
    )  # fmt: skip
    quota_live_bytes = round(quota_live_mb * 1e6) if quota_live_mb else None
    live_limit = round(live_mb * 1e6) if live_mb else default_live_limit(base)
    server = CloudServer(
        base,
        max_sessions=max_sessions,
        max_tokens=max_tokens,
        threads=threads,
        ticket_key=key,
        access=Access(tokens, required=authenticated),
        tls=tls,
        quotas=QuotaLimits(quota_sessions, quota_tokens_per_minute, quota_live_bytes, quota_compute_s),
        patience=patience,
        live_limit=live_limit,
        drain_s=drain_s,
    )

    log.info(
        "memory: %s MB for all running micro-batches (--live-mb), %s MB for those of one device (--quota-live-mb)",
        f"{live_limit / 1e6:,.0f}", f"{(server.service.quotas.limits.live_bytes or live_limit) / 1e6:,.0f}",
    )  # fmt: skip
    log.info(
        "micro-batches: up to %s tokens (--max-tokens), which take %s MB; %d sessions (--max-sessions)",
        f"{server.service.max_tokens:,}", f"{server.largest_micro_batch / 1e6:,.0f}", max_sessions,
    )  # fmt: skip
    if server.largest_micro_batch > live_limit:
        log.warning("memory: the largest micro-batches do not fit; raise --live-mb, or lower --max-tokens")

    forget_long_lived()

    async def run() -> None:
        serving = asyncio.create_task(server.serve_until_stopped(host, port))
        while json_output and not server.port and not serving.done():
            await asyncio.sleep(0.01)
        if json_output and server.port:
            print(json.dumps({"url": f"{server.scheme}://{host}:{server.port}", **server.health()}), flush=True)
        await serving

    asyncio.run(run())


def check_device(device: str, gpus: int) -> None:
    """Raise ``UsageError`` unless a model can be put on ``device`` of a machine with that many GPUs."""
    found = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", device)
    if found is None:
        raise UsageError(f"--device {device!r} is none; write cpu, cuda or cuda:N")
    if device != "cpu" and int(found[1] or 0) >= gpus:
        seen = f"{gpus} CUDA devices, from cuda:0 on," if gpus else "no CUDA device"
        raise UsageError(f"--device {device}: torch sees {seen} here; use --device cpu or another one")


def load_key(state_dir: Path) -> bytes:
    """The key that signs kill-and-revive tickets, 32 bytes; made on first use, readable by its owner only.

    It is whole and on the disk before it has its name: a key that a power cut took away would take every ticket along,
    and an empty one would sign for anybody. Of servers that begin together, all get the same.
    """
    path = state_dir / "ticket.key"
    try:
        if not path.exists():
            state_dir.mkdir(parents=True, exist_ok=True)
            with interrupts.raising():
                _make_key(path)
        key = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot keep the ticket key in {path}: {error.strerror}; choose --state-dir") from None
    if len(key) != KEY_BYTES:
        text = f"the ticket key {path} has {len(key)} bytes, not {KEY_BYTES}; restore it from a backup"
        raise StorageError(f"{text}, or remove it: runs whose session is gone then cannot go on")
    return key


def _make_key(path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another server was faster: its key counts
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
