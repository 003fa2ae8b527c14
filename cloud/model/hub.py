"""Whether the Hugging Face hub answers, asked once: its own client tries again and again, without a word."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from dlora.protocol.errors import ExportError

from .source import ModelSource

ANSWER_S: Final = 5.0
_CONFIG: Final = "config.json"


def reach(source: ModelSource, say: Callable[[str], None] = lambda _: None) -> ModelSource:
    """``source`` itself where it lies here, or where the hub answers, whatever it says; else what the hub's cache has.

    ``say`` is called with one line before the hub is asked, and with another where the cache is taken. Raises
    ``ExportError`` where neither has it, after ``ANSWER_S`` seconds at most.
    """
    from huggingface_hub import constants

    if source.hub_id is None or source.location != source.hub_id or constants.HF_HUB_OFFLINE:
        return source
    say(f"asking the Hugging Face hub ({constants.ENDPOINT}) for {source.name}, {ANSWER_S:g} s at most")
    if _answers(source.hub_id):
        return source
    cached = _cached(source.hub_id)
    if cached is None:
        raise ExportError(
            f"the Hugging Face hub ({constants.ENDPOINT}) cannot be reached, and {source.name} is not in its cache "
            "here: check the network, or copy the model's directory to this machine and give that"
        )
    say(f"the hub cannot be reached: taking {source.name} from its cache, {cached}")
    return replace(source, location=str(cached))


def _answers(hub_id: str) -> bool:
    """Whether the hub says anything at all, a refusal too. In a thread: looking its name up has no time limit."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    found: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(hub_id, _CONFIG), timeout=ANSWER_S)
        except HfHubHTTPError:
            found.put(True)
        except Exception:  # of whichever client the hub's library has, or of the system's
            found.put(False)
        else:
            found.put(True)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return found.get(timeout=ANSWER_S)
    except queue.Empty:
        return False


def _cached(hub_id: str) -> Path | None:
    """The directory of a model that was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, _CONFIG)
    return Path(found).parent if isinstance(found, str) else None
