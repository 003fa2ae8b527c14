"""A training loop of one's own: the adapters are here, the base model's blocks on a server.

    python examples/custom_loop.py --bundle build/smollm2 --server ws://127.0.0.1:8765 --steps 30 --out my-loop

Each step takes all of a few pairs, and the learning rate falls as a cosine. Then the adapter is saved as PEFT has it,
and asked.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from dlora.edge import Settings, TrainingClient

PAIRS = (
    ("Which bread keeps longest?", " Rye, for two weeks."),
    ("When does the bus to the coast leave?", " At ten past, but not on Sundays."),
    ("What do I do about the rear brake?", " Sand the pads lightly."),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--server", help="none: all blocks run here, where the bundle has all of them")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--out", type=Path, default=Path("my-loop"))
    options = parser.parse_args()
    where = {"server": options.server} if options.server else {"device_blocks": "all"}
    settings = Settings.of(bundle=options.bundle, kind="lora", rank=8, seed=0, **where)
    with TrainingClient.create(settings) as client:
        data = [client.datum(prompt, completion) for prompt, completion in PAIRS]
        for step in range(options.steps):
            found = client.forward_backward(data)
            rate = options.lr * (1 + math.cos(math.pi * step / options.steps)) / 2
            stepped = client.optim_step(rate)
            print(f"step {step + 1}: loss {found.loss:.4f}, gradient {stepped.grad_norm:.3f}")
        client.save_adapter(options.out)
        print(f"saved: {options.out}")
        with client.sampling_client() as sampling:
            for prompt, _ in PAIRS:
                print(f"{prompt}{sampling.sample(prompt, max_new_tokens=12, as_it_is=True).text}")


if __name__ == "__main__":
    main()
