"""Errors say whose fault it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dlora.cloud.serving.transport import as_refusal
from dlora.protocol import messages as m
from dlora.protocol.command import run_command
from dlora.protocol.errors import (
    DamagedFrameError,
    LocalProtocolError,
    NonFiniteError,
    ProtocolError,
    RefusedError,
    RemoteProtocolError,
)
from dlora.protocol.session import Session
from dlora.protocol.states import Side
from dlora.protocol.wire_codecs import encode_floats


def ended(command: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and stderr of a command."""
    with pytest.raises(SystemExit) as caught:
        run_command(command)
    assert isinstance(caught.value.code, int)
    return caught.value.code, capsys.readouterr().err


def test_local_protocol_error_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def reports_before_it_greets() -> None:
        Session(Side.EDGE).send(m.StepReport(step=0, scores=encode_floats(np.ones(2, np.float32), "fp32")))

    code, said = ended(reports_before_it_greets, capsys)
    *traceback, last = said.splitlines()
    assert code == LocalProtocolError.exit_code == 7
    assert traceback[0].startswith("Traceback")
    assert any("reports_before_it_greets" in line for line in traceback)
    assert last.startswith("error: a bug in dlora: StepReport in START: not now; please report it")


def test_remote_protocol_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def receives_invalid_bytes() -> None:
        Session(Side.EDGE).receive(b"nonsense")

    code, said = ended(receives_invalid_bytes, capsys)
    assert code == ProtocolError.exit_code
    assert said.startswith("error: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RefusedError("full", "busy", retryable=True, retry_after_s=5.0), ("busy", True, 5.0)),
        (RefusedError("forged", "ticket"), ("ticket", False, None)),
        (RemoteProtocolError("not now"), ("protocol", False, None)),
        (RemoteProtocolError("too long", "limit"), ("limit", False, None)),
        (DamagedFrameError("another checksum"), ("damaged", True, None)),
        (NonFiniteError("NaN"), ("non_finite", False, None)),
    ],
)
def test_as_refusal_keeps_code_and_text(
    error: RefusedError | RemoteProtocolError | NonFiniteError, told: tuple[str, bool, float | None]
) -> None:
    refusal = as_refusal(error)
    assert (refusal.code, refusal.retryable, refusal.retry_after_s) == told
    assert str(refusal) == str(error)


def test_refused_error_is_not_a_protocol_error() -> None:
    assert not issubclass(RefusedError, ProtocolError)
    assert not issubclass(LocalProtocolError, RemoteProtocolError)
