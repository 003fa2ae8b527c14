"""A model that is named by its hub id, on a machine that the hub cannot be reached from: asked once, and said."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from tiny import TinyFactory

from dlora.cloud.model import hub
from dlora.cloud.model.base_model import load_base_model
from dlora.cloud.model.hub import reach
from dlora.cloud.model.source import find_source
from dlora.export.bundle import export_bundle
from dlora.export.settings import ExportSettings
from dlora.protocol.errors import ExportError

NAME = "org/tiny"


def use(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``HF_ENDPOINT`` does before the hub's library is loaded."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A hub that lets one connect and says nothing, as a firewall's; and an empty cache."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        use(endpoint, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield endpoint


def test_a_silent_hub_is_given_up_after_five_seconds(silent_hub: str) -> None:
    said: list[str] = []
    began = time.monotonic()
    with pytest.raises(ExportError, match=f"{silent_hub}. cannot be reached, and {NAME} is not in .* give that"):
        load_base_model(NAME, say=said.append)
    assert hub.ANSWER_S <= time.monotonic() - began < 2 * hub.ANSWER_S
    assert said == [f"asking the Hugging Face hub ({silent_hub}) for {NAME}, 5 s at most"]


def test_a_hub_that_is_away_is_given_up_at_once(
    silent_hub: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use("http://127.0.0.1:1", monkeypatch)
    told: list[str] = []
    began = time.monotonic()
    with pytest.raises(ExportError, match="check the network, or copy"):
        export_bundle(ExportSettings(NAME, tmp_path / "bundle"), tell=told.append)
    assert time.monotonic() - began < hub.ANSWER_S
    assert len(told) == 1


def test_the_cache_is_taken_where_the_hub_is_away(
    silent_hub: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: TinyFactory
) -> None:
    use("http://127.0.0.1:1", monkeypatch)
    repository = tmp_path / "cache" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    shutil.copytree(tiny().model, repository / "snapshots" / "abc")
    said: list[str] = []
    base = load_base_model(NAME, say=said.append)
    assert base.fingerprint == tiny().base.fingerprint
    assert len(said) == 2
    assert str(repository / "snapshots" / "abc") in said[1]


def test_nobody_is_asked_for_what_lies_here(silent_hub: str, tiny: TinyFactory) -> None:
    source = find_source(str(tiny().model))
    assert reach(source, pytest.fail) == source
