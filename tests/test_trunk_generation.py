"""Generation in the mode ``trunk`` gives the tokens of PEFT's ``generate``, and of the mode ``split``."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import tiny_model
from generating import generated, save_lora
from peft import PeftModel
from serving import serving
from test_generation import PROMPTS, TOKENS, generated_by_peft
from tiny import TinyFactory

from dlora.edge.engine.bundle import Bundle
from dlora.edge.model.context import Context
from dlora.edge.model.trunk_use import open_trunk
from dlora.edge.model.use import open_model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gemma3_text", "qwen3", "phi3"])
def test_greedy_tokens_are_those_of_peft(family: str, tiny: TinyFactory, tmp_path: Path) -> None:
    """Without drafts, with the length that pays, and with long ones that mostly miss; as in the mode split."""
    untied = {"tie_word_embeddings": False}  # else some repeat one token for ever
    model = tiny(family, head_dtype="fp32", device_blocks=1, **untied)
    save_lora(model.bundle, tmp_path, blocks=(1,))
    reference = PeftModel.from_pretrained(tiny_model(family, **untied), tmp_path).eval()
    settings = {"wire_dtype": "fp32", "context_length": 64}
    bundle = Bundle.open(model.bundle)
    with (
        serving(tiny(family, **untied).base) as server,
        open_trunk(bundle, server.url, tmp_path, **settings) as trunk,
        open_model(bundle, server.url, tmp_path, **settings) as split,
    ):
        context = Context(trunk)
        for prompt in PROMPTS:
            wanted = generated_by_peft(reference, prompt, TOKENS)
            for draft_length in (0, None, 5):
                assert generated(context, prompt, TOKENS, draft_length=draft_length) == wanted
        assert generated(split, prompt, TOKENS) == wanted
        assert wanted != generated_by_peft(tiny_model(family, **untied), prompt, TOKENS)  # the adapter does something
