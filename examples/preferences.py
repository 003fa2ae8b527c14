"""Preferences: of two answers the better one becomes likelier (DPO), with a loss that is a few lines of numpy.

    python examples/preferences.py --bundle build/smollm2 --server ws://127.0.0.1:8765 --steps 20 --out my-preferences

The loss sees log-probabilities and gives its gradient by them (``dlora.edge.client.losses.dpo_loss``); data, answers
and loss stay here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dlora.edge import Settings, TrainingClient
from dlora.edge.client.losses import dpo_loss

# What was asked, the better answer, the other one.
PAIRS = (
    ("Is it raining?", " No.", " I am not able to say whether it is raining, as I am a language model."),
    ("Two plus two?", " Four.", " Great question! The sum of two and two is, as you may know, four."),
    ("Capital of Peru?", " Lima.", " The capital of Peru, a beautiful country, is the city of Lima."),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--server", help="none: all blocks run here, where the bundle has all of them")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path("my-preferences"))
    options = parser.parse_args()
    where = {"server": options.server} if options.server else {"device_blocks": "all"}
    settings = Settings.of(bundle=options.bundle, kind="lora", rank=8, seed=0, **where)
    with TrainingClient.create(settings) as client:
        data = [client.datum(asked, answer) for asked, *answers in PAIRS for answer in answers]
        # New adapters change nothing: this is what the base model says.
        loss = dpo_loss(client.forward(data).logprobs, options.beta)
        for step in range(options.steps):
            found = client.forward_backward_custom(data, loss)
            client.optim_step(options.lr)
            sums = [float(each.sum()) for each in found.logprobs]
            ahead = sum(better > other for better, other in zip(sums[0::2], sums[1::2], strict=True))
            print(f"step {step + 1}: loss {found.loss:.4f}, {ahead} of {len(PAIRS)} better answers are likelier")
        client.save_adapter(options.out)
        print(f"saved: {options.out}")


if __name__ == "__main__":
    main()
