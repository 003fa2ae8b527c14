"""``dlora-cloud token``: create, list, revoke and prune the tokens of devices, also while the server runs."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import platformdirs
import typer
from rich.console import Console
from rich.table import Table

from dlora.cloud.admission.tokens import FILE_NAME, BearerTokenRecord, BearerTokenStore
from dlora.protocol import interrupts
from dlora.protocol.errors import StorageError, UsageError

from .shared_ledger import LedgerOption, open_ledger

app = typer.Typer(help="Create, list, revoke and prune the tokens of devices.", no_args_is_help=True)

_UNITS_S = {"m": 60, "h": 3600, "d": 86_400}

StateDirOption = Annotated[
    Path | None, typer.Option(help="Where the server keeps its state.", envvar="DLORA_CLOUD_STATE")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@app.command()
def create(
    device: Annotated[str, typer.Option(help="A name for the device, for logs and quotas.")],
    expires: Annotated[str, typer.Option(help="Lifetime: 90d, 12h, 30m or never.")] = "90d",
    out: Annotated[
        Path | None, typer.Option(help="Write it to a new file that only you can read, and print nothing of it.")
    ] = None,
    state_dir: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Create a token and print it, or write it to --out, once: only its hash is kept.

    Example:  dlora-cloud token create --device phone --expires 90d --out phone.token
    """
    lifetime_s = parse_lifetime(expires)
    store = _store(state_dir)
    if out is None:
        token = store.create(device, lifetime_s)
    else:
        with interrupts.raise_on_signal():
            token = create_in_file(store, device, lifetime_s, out)
    record = store.verify(token)
    if json_output:
        print(json.dumps({**({"token": token} if out is None else {"file": str(out)}), **_public(record)}))
        return
    if out is None:
        print(token)
        kept = "It is shown only once. On the device: put it in a file that only its owner can read,"
    else:
        kept = f"It is in {out} only. Copy that to the device,"
    print(
        f"token {record.id} of {device}, expires: {_date(record.expires)}. {kept} "
        "then train with --token-file FILE or DLORA_TOKEN",
        file=sys.stderr,
    )


@app.command("list")
def list_tokens(state_dir: StateDirOption = None, json_output: JsonOption = False) -> None:
    """List all tokens, without their secrets."""
    records = _store(state_dir).all()
    if json_output:
        print(json.dumps([_public(record) for record in records]))
        return
    table = Table("id", "device", "state", "created", "expires")
    for record in records:
        state = record.state(time.time())
        table.add_row(record.id, record.device, state, _date(record.created), _date(record.expires))
    Console().print(table)


@app.command()
def revoke(
    device_or_id: Annotated[str, typer.Argument(metavar="DEVICE|ID", help="A device's name, or one token's id.")],
    state_dir: StateDirOption = None,
    ledger: LedgerOption = None,
    json_output: JsonOption = False,
) -> None:
    """Revoke one token, or all of a device, at once; the server ends their sessions too.

    With --ledger, for all servers that share it: say it once, on any of them.
    """
    store = _store(state_dir)
    revoked = store.revoke(device_or_id)
    if ledger is not None and (ids := store.ids_of(device_or_id)):
        shared = open_ledger(ledger)
        shared.revoke(ids)  # the revoked ones again: it may not have been told of them
        shared.close()
        revoked = revoked or len(ids)
    if not revoked:
        raise UsageError(f"no token to revoke for {device_or_id!r}; see: dlora-cloud token list")
    if json_output:
        print(json.dumps({"revoked": revoked}))
    print(f"revoked {revoked} token{'s' if revoked > 1 else ''} of {device_or_id}", file=sys.stderr)


@app.command()
def prune(state_dir: StateDirOption = None, json_output: JsonOption = False) -> None:
    """Delete the records of revoked and expired tokens. The server still asks for a token."""
    pruned = _store(state_dir).prune()
    if json_output:
        print(json.dumps({"pruned": pruned}))
    print(f"deleted the records of {pruned} token{'' if pruned == 1 else 's'}", file=sys.stderr)


def create_in_file(store: BearerTokenStore, device: str, lifetime_s: float | None, path: Path) -> str:
    """A new token, also in a new file with mode 0600. Where the file cannot be written there is no token either.

    Raises ``UsageError`` where there is such a file already, ``StorageError`` where it cannot be written.
    """
    try:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w")
    except FileExistsError:
        raise UsageError(f"{path} is there already; choose another --out, or remove it") from None
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; choose another --out") from None
    token = None
    try:
        with file:
            token = store.create(device, lifetime_s)
            file.write(token + "\n")
    except BaseException as error:
        path.unlink(missing_ok=True)
        if token is not None:
            store.revoke(store.verify(token).id)
        if isinstance(error, OSError):
            raise StorageError(f"cannot write {path}: {error.strerror}; choose another --out") from None
        raise
    return token


def parse_lifetime(text: str) -> float | None:
    """Seconds of ``90d``, ``12h`` or ``30m``; None for ``never``. Raises ``UsageError``."""
    if text == "never":
        return None
    found = re.fullmatch(r"([1-9][0-9]{0,4})([mhd])", text)
    if found is None:
        raise UsageError(f"--expires {text!r} is no lifetime; write for example 90d, 12h, 30m or never")
    return float(int(found[1]) * _UNITS_S[found[2]])


def _store(state_dir: Path | None) -> BearerTokenStore:
    return BearerTokenStore((state_dir or platformdirs.user_state_path("dlora-cloud")) / FILE_NAME)


def _public(record: BearerTokenRecord) -> dict[str, object]:
    return {**asdict(record), "state": record.state(time.time())}


def _date(seconds: float | None) -> str:
    return "never" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
