"""Several micro-batches of a step under way at a time: the same bits, whatever gets in their way."""

from __future__ import annotations

import numpy as np
from families import VOCABULARY
from serving import config, final_weights, random_dataset, serving, training
from tiny import TinyFactory

from dlora.edge.wire.connecting import ConnectSettings, Liveness

LARGE = {"blocks": 2, "intermediate_size": 4096, "max_position_embeddings": 1024}


def test_large_frames_both_ways_hold_nobody_back(tiny: TinyFactory) -> None:
    """More than any buffer between the two has room for: each side reads while it has something to send."""
    model = tiny(**LARGE)
    dataset = random_dataset(VOCABULARY, examples=4, longest=1000)
    run = config(target_modules=("all-linear",), passes="2,2", grad_accum=4, batch_size=1, total_steps=1)
    found = []
    with serving(model.base) as server:
        for window in (1, 4):
            connecting = ConnectSettings(liveness=Liveness(exchange_s=100.0))
            with training(model.bundle, server.url, run, dataset, connecting, window=window) as trainer:
                trainer.run_step()
                assert trainer.side.crossed.reconnects == 0
                found.append(final_weights(trainer))
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])
