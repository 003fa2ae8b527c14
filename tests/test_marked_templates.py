"""What a chat template marks with {% generation %} is what is learnt: as transformers has it, for TRL's templates."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
from test_edge_data import TALK, train_tokenizer, write

from dlora.edge.data.examples import Dataset
from dlora.edge.data.reading import load_examples
from dlora.edge.data.tokenizer import EdgeTokenizer
from dlora.protocol.errors import DataError
from dlora.protocol.manifest import TokenizerSpec

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Sum", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}}}]  # fmt: skip
TALKS: dict[str, list[dict[str, Any]]] = {
    "one turn": TALK[:2],
    "two turns": TALK,
    "a system's message": [{"role": "system", "content": "Be short."}, *TALK],
    "what was thought": [TALK[0], {"role": "assistant", "content": "<think>\n2 + 2\n</think>\n\n4"}, *TALK[2:]],
    "a tool": [
        TALK[0],
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": "4"},
        TALK[1],
    ],
}


def marked_templates() -> list[Path]:
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        return []
    paths = sorted((Path(found.origin).parent / "chat_templates").glob("*.jinja"))
    return [path for path in paths if re.search(r"\{%-?\s*generation\s*-?%\}", path.read_text())]


def test_there_are_templates_with_marks() -> None:
    pytest.importorskip("trl")
    assert len(marked_templates()) >= 20


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("path", marked_templates(), ids=lambda path: path.stem)
def test_labels_are_what_the_template_marks(path: Path, talk: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source, messages, tools = path.read_text(), TALKS[talk], TOOLS if talk == "a tool" else None
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(), bos_token="<s>", eos_token="</s>")
    spec = TokenizerSpec(file="", bos_token="<s>", eos_token="</s>", eos_token_id=1)
    tokenizer = EdgeTokenizer(train_tokenizer(), spec, source)
    file = write(tmp_path / "d.jsonl", {"messages": messages, "tools": tools})

    def load(train_on: Any) -> Dataset:
        return load_examples(file, tokenizer, max_length=100_000, train_on=train_on)

    def rendered(messages: list[dict[str, Any]]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = theirs.apply_chat_template(
            messages, chat_template=source, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        return found

    try:
        try:
            wanted = rendered(messages)
        except jinja2.UndefinedError:  # it takes parts only, or no empty text
            wanted = rendered([{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages])
    except Exception as error:  # each template has its own complaints
        with pytest.raises(DataError, match=r"d.jsonl:1: .*the chat template refuses these messages"):
            load("answers")
        if talk in ("one turn", "two turns"):
            raise error
        return
    if 1 not in wanted["assistant_masks"]:
        with pytest.raises(DataError, match="marks nothing"):
            load("answers")
        return
    (example,) = load("answers")
    assert example.ids.tolist() == wanted["input_ids"]
    # The first token of all is a label of no row.
    labelled = [place for place, is_label in enumerate(wanted["assistant_masks"]) if is_label and place]
    assert (example.label_positions + 1).tolist() == labelled
    (last,) = load("last")
    assert len(last.ids) == len(example.ids)
    assert (last.label_positions + 1).tolist() == labelled[-len(last.labels) :]
    turns = sum(message["role"] == "assistant" for message in messages)
    assert (len(last.labels) < len(example.labels)) == (turns > 1), json.dumps(messages)
    (everything,) = load("all")
    assert everything.label_positions.tolist() == list(range(len(example.ids) - 1))
