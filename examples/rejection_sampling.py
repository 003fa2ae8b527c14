"""Rejection sampling: the model answers, a function of yours says how good that is, and the best answers are learnt.

    python examples/rejection_sampling.py --bundle build/smollm2 --server ws://127.0.0.1:8765 --rounds 3 --out my-best

The reward here is for short answers. Prompts, answers and rewards stay here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dlora.edge import Datum, Settings, TrainingClient

PROMPTS = ("Why is the sky blue?", "What is bread made of?", "How do I boil an egg?")


def reward(answer: str) -> float:
    """One for twenty characters or fewer, less for more; nothing for no words."""
    return 20 / max(20, len(answer)) if any(map(str.isalpha, answer)) else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--server", help="none: all blocks run here, where the bundle has all of them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=4, help="answers to each prompt, of which the best is learnt")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of a round")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("my-best"))
    options = parser.parse_args()
    where = {"server": options.server} if options.server else {"device_blocks": "all"}
    settings = Settings.of(bundle=options.bundle, kind="lora", rank=8, seed=0, **where)
    with TrainingClient.create(settings) as client:
        for round_ in range(options.rounds):
            best: list[Datum] = []
            rewards: list[float] = []
            with client.sampling_client() as sampling:
                for number, prompt in enumerate(PROMPTS):
                    answers = [
                        sampling.sample(
                            prompt, as_it_is=True, temperature=1.0, seed=1000 * round_ + 100 * number + sample,
                            max_new_tokens=options.max_new_tokens,
                        ).text
                        for sample in range(options.samples)
                    ]  # fmt: skip
                    rewards += map(reward, answers)
                    best.append(client.datum(prompt, max(answers, key=reward) or " "))
            for _ in range(options.steps):
                loss = client.forward_backward(best).loss
                client.optim_step(options.lr)
            print(f"round {round_ + 1}: mean reward {sum(rewards) / len(rewards):.3f}, loss {loss:.4f}")
        client.save_adapter(options.out)
        print(f"saved: {options.out}")


if __name__ == "__main__":
    main()
