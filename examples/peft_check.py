"""Load a saved adapter with PEFT into the whole base model and print its loss on a data set, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel

from dlora.cloud.model.base_model import load_base_model
from dlora.edge.data.batches import evaluation_batches
from dlora.edge.data.reading import load_examples
from dlora.edge.data.tokenizer import EdgeTokenizer
from dlora.edge.engine.bundle import Bundle


def main(model: str, adapter: Path, bundle: Path, data: Path) -> None:
    """Print {"loss": mean cross-entropy a labelled token, "tokens": how many}."""
    opened = Bundle.open(bundle)
    dataset = load_examples(data, EdgeTokenizer.open(opened), max_length=512)
    wrapped = PeftModel.from_pretrained(load_base_model(model).model, adapter).eval()
    total, tokens = 0.0, 0
    for batch in evaluation_batches(dataset, 8):
        sequences = torch.from_numpy(batch.ids.copy()).split(batch.sequence_lengths.tolist())
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in sequences], batch_first=True)
        with torch.no_grad():
            logits = wrapped(input_ids=ids, attention_mask=mask).logits
        rows = logits[mask.bool()][torch.from_numpy(batch.label_positions.copy()).long()]  # (labelled, vocabulary)
        labels = torch.from_numpy(batch.labels.copy())
        total += float(torch.nn.functional.cross_entropy(rows.double(), labels, reduction="sum"))
        tokens += len(labels)
    print(json.dumps({"loss": total / tokens, "tokens": tokens}))


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:5]))
