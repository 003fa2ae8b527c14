"""The model card beside a saved adapter: ``README.md``, as the Hugging Face hub reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

CARD_NAME: Final = "README.md"


def model_card(
    modules: int,
    r: int,
    lora_alpha: float,
    base_model_name: str,
    target_modules: Sequence[str],
    *,
    acts_on_answers: bool,
) -> str:
    """The card's text; ``modules``: how many have an adapter."""
    about = ""
    if acts_on_answers:
        about = """
It is an activated LoRA: it acts from the beginning of the answer on (`alora_invocation_tokens`), and the prompt is the
base model's own. PEFT 0.18 or newer loads it so, and cannot merge it into the base model: `dlora-edge train
--adapt all` gives one that can be merged.
"""
    asked = f" of the target modules {', '.join(target_modules)}" if target_modules else ""
    base = msgspec.json.encode(base_model_name).decode()
    return f"""---
base_model: {base}
library_name: peft
tags: [lora, dlora]
---

# LoRA adapter

Made with dlora for `{base_model_name}`: rank {r}, alpha {lora_alpha:g}, {modules} modules{asked}.
{about}
```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/directory")
```
"""
