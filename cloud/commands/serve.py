"""``dlora-cloud serve``."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import platformdirs
import typer

from dlora.cloud.admission.tls import check_exposure, server_context
from dlora.cloud.admission.tokens import FILE_NAME, BearerTokenStore
from dlora.cloud.admission.trusted_proxies import TrustedProxies
from dlora.cloud.model.memory import freeze_gc, limit_arenas, release_freed_memory
from dlora.cloud.model.source import find_source
from dlora.cloud.serving.listening import check_address
from dlora.cloud.serving.ticket_key import load_key
from dlora.cloud.serving.timeouts import SessionTimeouts
from dlora.protocol.choices import WeightFormat
from dlora.protocol.connections import raise_file_limit
from dlora.protocol.errors import UsageError
from dlora.protocol.limits import MAX_WINDOW

from .log_lines import LogFormat, log_to_stderr
from .shared_ledger import LedgerOption, open_ledger
from .torch_start import computes_bfloat16, start_torch

if TYPE_CHECKING:  # torch is loaded when a server starts
    from dlora.cloud.model.base_model import BaseModel
    from dlora.cloud.model.workers import Workers
    from dlora.cloud.serving.server import CloudServer

logger = logging.getLogger("dlora.cloud")

# Options under a heading of their own.
base_model = partial(typer.Option, rich_help_panel="The base model")
door = partial(typer.Option, rich_help_panel="Who may come in")
quota = partial(typer.Option, rich_help_panel="Quotas of a device")
limit = partial(typer.Option, rich_help_panel="Limits of the whole server")
timeout = partial(typer.Option, rich_help_panel="Timeouts")
watching = partial(typer.Option, rich_help_panel="Watching")

Dtype = Literal["auto", "float32", "bfloat16"]


# Long, and with many parameters: each is an option, with its default and its help beside it.
def serve(
    model: Annotated[str, typer.Argument(help="Local directory, hub id, .gguf file, or smollm2-135m.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8765,
    dtype: Annotated[
        Dtype | None,
        base_model(
            help="What the base model computes in; auto: bfloat16 where the processor has it, else float32. By default "
            "float32, and auto with --weights."
        ),
    ] = None,
    weights: Annotated[
        WeightFormat,
        base_model(
            help="How the weights of linear modules are held: as they are computed with, or in eight or four bits. "
            "Devices need a bundle of the same: dlora-export MODEL --weights int8."
        ),
    ] = "full",
    device: Annotated[str, base_model(help="cpu, cuda or cuda:N.")] = "cpu",
    device_map: Annotated[
        Literal["auto"] | None,
        base_model(
            help="auto: spread the blocks over all GPUs, and what they have no room for over memory and disk; in place "
            "of --device.",
        ),
    ] = None,
    tensor_parallel: Annotated[
        int,
        base_model(
            help="Divide the weights among so many processes of this machine, each with a GPU of its own where "
            "--device is cuda.",
            metavar="N",
            min=1,
            max=64,
        ),
    ] = 1,
    threads: Annotated[
        int, typer.Option(help="Torch threads of a process; 0: one for each core.", min=0, max=1024)
    ] = 0,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where tokens and the key that signs tickets are kept; ~/.local/state/dlora-cloud by default.",
            envvar="DLORA_CLOUD_STATE",
        ),
    ] = None,
    tls_cert: Annotated[Path | None, door(help="Certificate chain (PEM): speak TLS.")] = None,
    tls_key: Annotated[Path | None, door(help="Its key, where that is another file.")] = None,
    tls_client_ca: Annotated[
        Path | None, door(help="Let devices in whose certificate this authority signed (PEM).")
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        door(
            help="Address of a proxy, or a network of proxies, whose X-Forwarded-For and X-SSL-Client-CN say who "
            "comes; may be given several times.",
            metavar="ADDRESS",
        ),
    ] = None,
    ledger: LedgerOption = None,
    insecure: Annotated[bool, door("--insecure", help="Listen on a network without TLS, or let everybody in.")] = False,
    quota_sessions: Annotated[int | None, quota(help="Sessions of one device at a time.", metavar="N", min=1)] = None,
    quota_tokens_per_minute: Annotated[
        int | None, quota(help="Tokens of one device in a minute.", metavar="N", min=1)
    ] = None,
    quota_live_mb: Annotated[
        float | None, quota(help="Memory of one device's running micro-batches, MB.", metavar="MB", min=0.001)
    ] = None,
    quota_compute_s: Annotated[
        float | None, quota(help="Seconds of computing for one device in an hour.", metavar="S", min=0.001)
    ] = None,
    max_sessions: Annotated[int, limit(help="Sessions open at a time, parked ones included.", min=1)] = 16,
    live_mb: Annotated[
        float | None,
        limit(
            help="Memory of all running micro-batches together, MB; more of them wait their turn. By default half of "
            "what the model leaves of the machine's.",
            min=0.001,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        limit(help="Most tokens of one micro-batch. By default what takes half of --live-mb, 8192 at most.", min=1),
    ] = None,
    window: Annotated[
        str,
        limit(
            help="Most micro-batches of a session under way at a time; each runs once there is memory for it. auto: as "
            "many of 256 tokens as a device's quota holds, 4 at most.",
            metavar="N|auto",
        ),
    ] = "auto",
    batch_rows: Annotated[
        int,
        limit(help="Most tokens of several devices' answers that run through the model at once; 0: one by one.", min=0),
    ] = 64,
    park_s: Annotated[float, timeout(help="Seconds that a session is kept whose device is away.", min=0)] = 120.0,
    exchange_timeout_s: Annotated[
        float, timeout(help="Least seconds for one answer of a device; slow ones get more.", min=0.1)
    ] = 120.0,
    step_timeout_s: Annotated[float, timeout(help="Least seconds for all answers of a micro-batch.", min=0.1)] = 900.0,
    idle_timeout_s: Annotated[float, timeout(help="Seconds that a session may do nothing.", min=0.1)] = 3600.0,
    drain_s: Annotated[float, timeout(help="Seconds that running steps may take when the server stops.", min=0)] = 30.0,
    metrics: Annotated[
        str | None,
        watching(
            help="Answer GET /metrics there, for Prometheus: of 127.0.0.1 where no host is given; 0 takes a free port.",
            metavar="[HOST:]PORT",
        ),
    ] = None,
    log_format: Annotated[LogFormat, watching(help="The log's lines: text, or a JSON object each.")] = "text",
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object once it listens.")] = False,
) -> None:
    """Serve one base model over a websocket until SIGINT, SIGTERM or SIGHUP.

    Devices with different ranks, target modules and active adapters share the one base; no bundle is needed.
    The server never gets optimizer state, and token ids (labels are among them) or what is trained of an adapter
    only where a device's user asks for that. GET /healthz answers on the same port. A network is listened on only
    with --tls-cert and with tokens (dlora-cloud token create) or --tls-client-ca. Once there is a token, every
    device needs one. Steps under way are finished when the server is asked to stop.

    Example:  dlora-cloud serve smollm2-135m --port 8765
    """
    log_to_stderr(log_format)
    state = state_dir or platformdirs.user_state_path("dlora-cloud")
    tokens = BearerTokenStore(state / FILE_NAME)
    authenticated = tls_client_ca is not None or tokens.any()
    check_exposure(host, tls=tls_cert is not None, authenticated=authenticated, insecure=insecure)
    tls = _tls(tls_cert, tls_key, tls_client_ca)
    proxies = TrustedProxies(trusted_proxy or ())
    shared = open_ledger(ledger) if ledger is not None else None
    check_address(host, port)
    metrics_address = None if metrics is None else _parse_metrics(metrics)
    if metrics_address is not None:
        check_address(*metrics_address, "--metrics")
    most_under_way = _parse_window(window)
    find_source(model)
    raise_file_limit()
    limit_arenas()
    _check_devices(device, device_map, tensor_parallel)
    key = load_key(state)
    threads = start_torch(device, threads, tensor_parallel)

    from dlora.cloud.admission.access import Access
    from dlora.cloud.admission.ledger import QuotaLimits
    from dlora.cloud.model.live_bytes import default_live_limit
    from dlora.cloud.serving.server import CloudServer
    from dlora.cloud.serving.service import ServerSettings

    dtype = dtype or ("float32" if weights == "full" else "auto")
    workers = _start_workers(tensor_parallel, device, threads)
    base = _load(model, dtype, device, weights, device_map, workers)
    quota_live_bytes = round(quota_live_mb * 1e6) if quota_live_mb else None
    live_limit = round(live_mb * 1e6) if live_mb else default_live_limit(base)
    settings = ServerSettings(
        max_sessions=max_sessions,
        max_tokens=max_tokens,
        threads=threads,
        quotas=QuotaLimits(quota_sessions, quota_tokens_per_minute, quota_live_bytes, quota_compute_s),
        timeouts=SessionTimeouts(exchange_timeout_s, step_timeout_s, idle_timeout_s, park_s),
        live_limit=live_limit,
        drain_s=drain_s,
        window=most_under_way,
        batch_rows=batch_rows,
    )
    access = Access(tokens, required=authenticated, ledger=shared)
    server = CloudServer(base, settings, ticket_key=key, access=access, proxies=proxies, ledger=shared, tls=tls)
    if workers is not None:
        workers.call_when_lost(server.fail)
    _log_limits(server, live_limit, max_sessions)
    metrics_url = None if metrics_address is None else _show_metrics(server, *metrics_address)
    freeze_gc()
    release_freed_memory()

    def say() -> None:
        if json_output:
            urls = {"url": f"{server.scheme}://{host}:{server.port}", "metrics_url": metrics_url}
            print(json.dumps({**urls, **server.health()}), flush=True)

    asyncio.run(server.serve_until_stopped(host, port, say))


def _parse_window(text: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= MAX_WINDOW):
        raise UsageError(f"--window {text}: give a number from 1 to {MAX_WINDOW}, or auto")
    return int(text)


def _parse_metrics(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise UsageError(f"--metrics {text}: give a port, as 9464, or an address and a port, as 127.0.0.1:9464")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


def _tls(certificate: Path | None, key: Path | None, client_ca: Path | None) -> ssl.SSLContext | None:
    if certificate is not None:
        return server_context(certificate, key, client_ca)
    if key or client_ca:
        raise UsageError("--tls-key and --tls-client-ca need --tls-cert")
    return None


def _check_devices(device: str, device_map: str | None, tensor_parallel: int) -> None:
    if device_map is not None and device != "cpu":
        raise UsageError("--device and --device-map both say where the model is to be; give one")
    if tensor_parallel > 1 and device_map is not None:
        raise UsageError("--device-map and --tensor-parallel both divide the model; give one")
    if tensor_parallel > 1 and device not in ("cpu", "cuda"):
        raise UsageError(f"--tensor-parallel takes GPUs from cuda:0 on, not {device}; write --device cuda")


def _start_workers(tensor_parallel: int, device: str, threads: int) -> Workers | None:
    if tensor_parallel == 1:
        return None
    from dlora.cloud.model.workers import Workers

    started = time.monotonic()
    workers = Workers(tensor_parallel, device=device, threads=threads)
    logger.info("%d processes that compute together, in %.1f s", tensor_parallel, time.monotonic() - started)
    return workers


def _load(
    model: str,
    dtype: Dtype,
    device: str,
    weights: WeightFormat,
    device_map: Literal["auto"] | None,
    workers: Workers | None,
) -> BaseModel:
    import torch

    from dlora.cloud.model.base_model import load_base_model
    from dlora.cloud.model.held_linear import bytes_of_weights
    from dlora.cloud.model.placement import placed_on

    logger.info("loading %s", model)
    started = time.monotonic()
    if device_map is not None and torch.cuda.is_available():
        device = "cuda"  # what computes
    if dtype == "auto":
        dtype = "bfloat16" if computes_bfloat16(device) else "float32"
    base = load_base_model(model, getattr(torch, dtype), device, logger.info, weights, device_map, workers)
    logger.info(
        "loaded %s: %s, %d blocks, %.0fM parameters, fingerprint %s…, in %.1f s",
        base.name, base.architecture, base.blocks, base.parameters / 1e6, base.fingerprint[:12],
        time.monotonic() - started,
    )  # fmt: skip
    logger.info("%s weights take %.0f MB; computing in %s", weights, bytes_of_weights(base.model) / 1e6, dtype)
    if parts := placed_on(base.model):
        logger.info("parts of the model on each device: %s", ", ".join(f"{name} {n}" for name, n in parts.items()))
    return base


def _log_limits(server: CloudServer, live_limit: int, max_sessions: int) -> None:
    logger.info(
        "memory: %s MB for all running micro-batches (--live-mb), %s MB for those of one device (--quota-live-mb)",
        f"{live_limit / 1e6:,.0f}", f"{(server.service.quotas.limits.live_bytes or live_limit) / 1e6:,.0f}",
    )  # fmt: skip
    logger.info(
        "micro-batches: up to %s tokens (--max-tokens), which take %s MB; %d sessions (--max-sessions), each with up "
        "to %d micro-batches under way (--window)",
        f"{server.service.max_tokens:,}", f"{server.largest_micro_batch / 1e6:,.0f}", max_sessions,
        server.service.window,
    )  # fmt: skip
    if server.largest_micro_batch > live_limit:
        logger.warning("memory: the largest micro-batches do not fit; raise --live-mb, or lower --max-tokens")


def _show_metrics(server: CloudServer, host: str, port: int) -> str:
    from dlora.cloud.serving.metrics import start_metrics

    port = start_metrics(server, host, port)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"
    logger.info("metrics at %s", url)
    return url
