"""What a process says of its own memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np


def test_the_peak_is_this_programs_and_not_its_parents() -> None:
    """Linux hands ``ru_maxrss`` down through exec: a small device started by a large test run looked large."""
    ours = np.ones(500 * 10**6, np.uint8)
    code = "from dlora.edge.memory import peak_rss_mb; print(peak_rss_mb())"
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 5 < float(child.stdout) < 250
    assert ours[-1] == 1


def test_the_peak_stays_when_the_memory_is_given_back() -> None:
    code = (
        "from dlora.edge.memory import peak_rss_mb; import numpy as np\n"
        "before = peak_rss_mb(); held = np.ones(300 * 10**6, np.uint8); del held; print(peak_rss_mb() - before)"
    )
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 290 < float(child.stdout) < 320
