"""Adapters to answer with, and answers of an open model, in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from answers import INVOCATION, random_answers
from families import VOCABULARY
from serving import RunningServer, config, random_dataset, randomize_all, training

from dlora.edge.adapters.peft import SavedModule, save_adapter
from dlora.edge.generation.generate import Counters, TokenAnswer
from dlora.edge.generation.sampling import Sampling
from dlora.edge.model.context import Context
from dlora.edge.model.generating import GeneratingModel
from dlora.protocol.adapter_record import TrainingRecord
from dlora.protocol.choices import Drafts
from dlora.protocol.manifest import load_manifest

LONG = {"max_position_embeddings": 256, "tie_word_embeddings": False}  # of models with room for an answer
PROMPTS = [[9, 10, 11, 7, 8], [5, 6, 5, 6, 5, 6, 7, 8], [7, 8, 20, 21, 22, 7, 8, 12]]  # each invokes at 7, 8


def answer_of(
    model: GeneratingModel | Context,
    prompt: Sequence[int],
    count: int,
    *,
    sampling: Sampling = Sampling(),
    draft_length: int | None = 0,
    drafts: Drafts = "prompt",
) -> TokenAnswer:
    """An answer of ``count`` tokens, not yet made."""
    context = model if isinstance(model, Context) else Context(model)
    ids = np.array(prompt, np.int64)
    return TokenAnswer(
        context, ids, sampling, max_new_tokens=count, stop_token_ids=(), drafts=drafts, draft_length=draft_length
    )


def generated(model: GeneratingModel | Context, prompt: Sequence[int], count: int, **settings: Any) -> list[int]:
    """The tokens of an answer; ``settings``: as ``answer_of`` takes them."""
    return [choice.token for choice in answer_of(model, prompt, count, **settings)]


def generated_while_sessions_are_lost(
    model: GeneratingModel,
    server: RunningServer,
    prompt: Sequence[int],
    count: int,
    sampling: Sampling,
    draft: int,
    drafts: Drafts = "prompt",
) -> tuple[list[int], Counters]:
    """The tokens of an answer after whose 3rd and 11th the server forgets all sessions, and what it took."""
    answer = answer_of(model, prompt, count, sampling=sampling, draft_length=draft, drafts=drafts)
    found = []
    for choice in answer:
        found.append(choice.token)
        if len(found) in (3, 11):
            for live in server.server.service.sessions:
                server.server.service.sessions._evict(live, "a test")
    return found, answer.counters


def train_adapter(
    bundle: Path, server: RunningServer, out: Path, kind: str, adapt: str, *, size: float = 1.0, **changes: object
) -> None:
    """An adapter of random weights, large enough to change what is said; the smaller its ``size``, the more often the
    base model says the same."""
    answers = adapt == "answer"
    run = config(kind=kind, invocation=INVOCATION if answers else (), basis_steps=2 if answers else 0, **changes)
    dataset = random_answers() if answers else random_dataset(VOCABULARY)
    with training(bundle, server.url, run, dataset) as trainer:
        for _ in range(run.total_steps if "kill_revive" in changes else 1):
            trainer.run_step()
        randomize_all(trainer)
        for parameter in trainer.adapters.parameters().values():
            parameter.value *= size
        trainer.save_adapter(out)


def save_random_adapter(bundle: Path, url: str, directory: Path, seed: int = 0) -> None:
    """A LoRA of random weights, large enough to change what is said."""
    with training(bundle, url, config(), random_dataset(VOCABULARY)) as trainer:
        randomize_all(trainer, seed)
        trainer.save_adapter(directory)


def save_lora(
    bundle: Path,
    directory: Path,
    *,
    blocks: Sequence[int],
    rank: int = 3,
    invocation: tuple[int, ...] = (),
    size: float = 0.5,
    training: TrainingRecord | None = None,
) -> None:
    """A LoRA of random weights on every linear module of some blocks; no server is needed to make it.

    ``size``: of ``lora_B``.
    """
    manifest = load_manifest(bundle)
    random = np.random.default_rng(0)
    modules = [
        SavedModule(
            target.name,
            (random.standard_normal((rank, group.in_features)) / group.in_features**0.5).astype(np.float32),
            (random.standard_normal((target.out_features, rank)) * size).astype(np.float32),
        )
        for group in manifest.groups
        if group.block in blocks
        for target in group.targets
    ]
    save_adapter(
        directory,
        modules,
        r=rank,
        lora_alpha=2.0 * rank,
        base_model_name=manifest.base_model.name,
        fan_in_fan_out=manifest.base_model.architecture == "gpt2",
        invocation=invocation,
        base_fingerprint=manifest.base_model.fingerprint,
        training=training,
    )
