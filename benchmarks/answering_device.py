"""A device that answers, an answer a JSON line: what benchmarks/generate.py has several of at once.

Reads {"ids": […], "tokens": n} and answers {"tokens": […], "s": …, "first_s": …}: greedy, n tokens; with "draft_length"
as many are guessed at a time. Options come as one
JSON object: ``bundle``, ``url``, ``adapter`` and ``threads``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from dlora.edge.engine.bundle import Bundle
from dlora.edge.generation.generate import TokenAnswer
from dlora.edge.generation.sampling import Sampling
from dlora.edge.model.context import Context
from dlora.edge.model.opening import Opening, open_to_generate


def main(options: str) -> None:
    """Answer requests until stdin ends."""
    given = json.loads(options)
    adapter = given["adapter"] and Path(given["adapter"])
    bundle = Bundle.open(Path(given["bundle"]))
    opening = Opening(bundle, given["url"], adapter, threads=given["threads"], drafts=True, passes="auto")
    with open_to_generate(opening, context_length=512) as model:
        context = Context(model)
        for line in sys.stdin:
            request = json.loads(line)
            ids = np.array(request["ids"], np.int64)
            answer = TokenAnswer(
                context, ids, Sampling(), max_new_tokens=request["tokens"], stop_token_ids=(),
                drafts="server" if "draft_length" in request else "auto", draft_length=request.get("draft_length"),
            )  # fmt: skip
            tokens = [choice.token for choice in answer]
            context.logits(np.array([0]))  # the next answer's prompt is not held
            found = {"tokens": tokens, "s": answer.counters.seconds, "first_s": answer.counters.first_token_s}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
