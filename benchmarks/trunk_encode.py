"""Part of ``trunk.py``: how fast a server fills caches, of one device and of sixteen at once."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
from bars import Entry, at_least
from children import log
from delaying_proxy import delaying_proxy
from trunk_trainers import trunk_source

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.model.cached_source import CachedSource
from dlora.edge.model.ends import LongArray
from dlora.edge.model.text_packs import batch_of

DEVICES: Final = 16
TEXTS: Final = 48  # of each: few of its tokens are in a pack that is not full
ROUNDS: Final = 3
ROUND_TRIP_S: Final = 0.02
LENGTHS: Final = (12, 48)  # of texts, in tokens


def measure_encoding(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Examples a second, medians of rounds in which all take turns: ``one`` device that asks for many texts ahead,
    ``together``: sixteen such devices, ``one_at_a_time``: a device that asks for a text when it has the one before,
    over a round trip of 20 ms."""
    bundle = Bundle.open(options.bundle)
    rounds = []
    for number in range(ROUNDS):
        rounds.append(_round(bundle, url, options.blocks, number))
        log(f"round {number}: " + ", ".join(f"{name} {rate:.1f}/s" for name, rate in rounds[-1].items()))
    rates = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    return {"devices": DEVICES, "examples_per_s": rates}


def _round(bundle: Bundle, url: str, blocks: int, seed: int) -> dict[str, float]:
    texts = _texts(bundle, seed)
    everything = [ids for each in texts for ids in each]
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack, delaying_proxy(url, ROUND_TRIP_S) as far:

        def connected(name: str, address: str) -> CachedSource:
            source = trunk_source(bundle, OnnxEngine(bundle, 1), address, Path(directory) / name, blocks)
            stack.callback(source.close)
            source.hidden_states(batch_of([np.zeros(1, np.int64)]))
            return source

        # One after the other: a server has room for sixteen.
        one = connected("one", url)
        seconds = {"one": _seconds(lambda: one.fill(everything))}
        slow = connected("slow", far)
        seconds["one_at_a_time"] = _seconds(lambda: [slow.hidden_states(batch_of([ids])) for ids in texts[0]])
        slow.hang_up()
        many = [connected(str(number), url) for number in range(DEVICES)]
        with ThreadPoolExecutor(DEVICES) as pool:
            seconds["together"] = _seconds(lambda: list(pool.map(CachedSource.fill, many, texts)))
    counts = {"one": len(everything), "together": len(everything), "one_at_a_time": len(texts[0])}
    return {name: counts[name] / each for name, each in seconds.items()}


def bars_of_encoding(found: dict[str, Any], command: str) -> dict[str, Entry]:
    """What sixteen get together, as a share of what others get."""
    rates = found["examples_per_s"]
    alone, packed = 1 / rates["one_at_a_time"] - ROUND_TRIP_S, 1 / rates["together"]
    reason = f"a text alone takes {alone:.3f} s beside the round trip, in packs {packed:.3f}: computing is most of both"
    return {
        "encode_of_one": at_least(0.95, rates["together"] / rates["one"], command),
        "encode_of_one_at_a_time": at_least(
            3, rates["together"] / rates["one_at_a_time"], command, reason=reason
        ),
    }


def _texts(bundle: Bundle, seed: int) -> list[list[LongArray]]:
    """Of each device; no two alike."""
    rng, vocabulary = np.random.default_rng(seed), bundle.manifest.base_model.vocabulary_size
    return [[rng.integers(0, vocabulary, int(rng.integers(*LENGTHS))) for _ in range(TEXTS)] for _ in range(DEVICES)]


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
