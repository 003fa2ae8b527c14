"""The option --ledger, of the commands that have it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dlora.protocol.command import extra_needed

if TYPE_CHECKING:  # of an extra
    from dlora.cloud.admission.valkey_ledger import ValkeyLedger

LedgerOption = Annotated[
    str | None,
    typer.Option(
        help="Valkey or Redis where several servers count quotas and failures and find revoked tokens: "
        "valkey://HOST:PORT/0.",
        metavar="URL",
        envvar="DLORA_CLOUD_LEDGER",
        show_envvar=True,
        rich_help_panel="Who may come in",
    ),
]


def open_ledger(url: str) -> ValkeyLedger:
    """The ledger at an address. Raises ``UsageError`` where it is none, ``MissingExtraError`` without the extra."""
    with extra_needed("ledger"):
        from dlora.cloud.admission.valkey_ledger import ValkeyLedger
    return ValkeyLedger(url)
