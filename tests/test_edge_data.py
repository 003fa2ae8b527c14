"""Data on the device: reading rows, chat templates, labels, batches."""

from __future__ import annotations

import itertools
import json
from datetime import datetime
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tokenizers
from attacks.fuzz_manifest import manifest_of
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from dlora.edge.data.batches import Batches, evaluation_batches, pack
from dlora.edge.data.chat import ChatTemplate
from dlora.edge.data.examples import Dataset
from dlora.edge.data.reading import load_examples
from dlora.edge.data.records import parse_columns
from dlora.edge.data.tokenizer import EdgeTokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.protocol.counting import counted_tokens
from dlora.protocol.errors import BundleError, DataError, UsageError
from dlora.protocol.manifest import Manifest, TokenizerSpec

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Gemma's and Llama's habits: bos, trim, exceptions, blocks on lines of their own, loop controls, tojson.
FUSSY = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {{- raise_exception('System role not supported') }}
{%- endif %}
{% for message in messages %}
    {%- if message['role'] == 'skip' %}{% continue %}{% endif %}
    {%- if message.tool_calls is defined %}{{ message.tool_calls | tojson }}{% endif %}
    <turn>{{ message['role'] }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{ message['content'] | trim }}{% endgeneration %}
    {%- else %}
        {{- message['content'] | trim }}
    {%- endif %}
{% endfor %}
{%- if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}<turn>assistant{% endif %}"""
# Qwen3's habit: what the assistant thought is dropped from all but the last turn.
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:{% if m.role == 'assistant' and loop.last %}<think></think>"
    "{% endif %}{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)
TALK = [
    {"role": "user", "content": " What is <b>2 + 2</b>? "},
    {"role": "assistant", "content": "It is 4, né? 🙂"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6"},
]


def train_tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    corpus = ["the answer is yes or no", "what is the sum of two numbers", "assistant user system", "And 3 + 3 is 6"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


SPEC = TokenizerSpec(
    file="tokenizer.json", chat_template="chat.jinja", bos_token="<s>", eos_token="</s>", eos_token_id=1
)


def edge_tokenizer(template: str | None = CHATML) -> EdgeTokenizer:
    return EdgeTokenizer(train_tokenizer(), SPEC, template)


TOKENIZER = edge_tokenizer()


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, tokenizer: EdgeTokenizer = TOKENIZER, **options: object) -> Dataset:
    return load_examples(path, tokenizer, **{"max_length": 512, **options})


def learned(dataset: Dataset, index: int = 0) -> str:
    """The text of an example's labels."""
    return TOKENIZER.decode(dataset[index].labels, skip_special_tokens=False)


# -- chat templates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, FUSSY, REWRITES])
@pytest.mark.parametrize("tools", [None, [{"name": "add", "description": "a < b"}]])
@pytest.mark.parametrize("prompt", [False, True])
def test_template_renders_as_transformers_does(template: str, tools: list[object] | None, prompt: bool) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(), bos_token="<s>", eos_token="</s>")
    messages = [*TALK[:3], {"role": "assistant", "content": "x", "tool_calls": [{"f": "é<"}], "name": None}]
    expected = theirs.apply_chat_template(
        messages, chat_template=template, tools=tools, add_generation_prompt=prompt, tokenize=False
    )
    ours = ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"})
    assert ours.render(messages, add_generation_prompt=prompt, tools=tools) == expected


def test_template_knows_the_date() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, lambda: datetime(2024, 7, 26))
    assert template.render([]) == "26 Jul 2024"


@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        (FUSSY, [{"role": "system", "content": "x"}, *TALK], "System role not supported"),
        ("{{ messages[9].content.x }}", TALK, "refuses these messages"),
        ("{{ 1 / 0 }}", TALK, "refuses these messages"),
        ("{{ ().__class__.__base__.__subclasses__() }}", TALK, "unsafe"),
        (CHATML, TALK[1:], "first message is the assistant's"),
        (None, TALK, "no chat template"),
        ("{% for %}", TALK, "does not compile"),
    ],
)
def test_template_errors_name_the_line(tmp_path: Path, template: str | None, messages: object, text: str) -> None:
    path = write(tmp_path / "d.jsonl", {"messages": messages})
    with pytest.raises(DataError, match=text) as caught:
        load(path, edge_tokenizer(template))
    assert str(caught.value).startswith(f"{path}:1: ")


# -- labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("the answer is", " yes", " yes</s>"),
        ("the answer is ", "yes", " yes</s>"),  # one token takes the blank along
        ("the answer is\n", "yes", "yes</s>"),
        ("the ans", "wer", " answer</s>"),  # and one is of both
        ("", "yes", "yes</s>"),
        ("say 🙂", "🙂", "🙂</s>"),
    ],
)
def test_completion_is_labelled_and_ends_with_eos(tmp_path: Path, prompt: str, completion: str, expected: str) -> None:
    dataset = load(write(tmp_path / "d.jsonl", {"prompt": prompt, "completion": completion}))
    example = dataset[0]
    assert learned(dataset) == expected
    assert TOKENIZER.decode(example.ids, skip_special_tokens=False) == f"<s>{prompt}{completion}</s>"
    assert (example.ids[example.label_positions + 1] == example.labels).all()
    assert (example.ids.dtype, example.label_positions.dtype, example.labels.dtype) == (np.int32, np.int32, np.int64)


def test_eos_added_by_the_tokenizer_is_not_added_twice(tmp_path: Path) -> None:
    inner = train_tokenizer()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = EdgeTokenizer(inner, TokenizerSpec(file="", eos_token="</s>", eos_token_id=1))
    dataset = load(write(tmp_path / "d.jsonl", {"prompt": "what", "completion": " is"}), tokenizer)
    assert learned(dataset) == " is</s>"
    assert dataset[0].ids.tolist().count(1) == 1


def test_too_long_example_is_refused_skipped_or_cut(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.jsonl",
        *(
            {"prompt": prompt, "completion": completion}
            for prompt, completion in (("", "no"), ("", "yes " * 50), ("a" * 90, "b"))
        ),
    )
    with pytest.raises(DataError, match=r":2: \d+ tokens, the limit is 20; raise --max-length"):
        load(path, max_length=20)
    cut = load(path, max_length=20, too_long="truncate")
    # The third has its completion cut off, so there is nothing left to learn from it.
    assert (len(cut), cut.facts.skipped.count, cut.facts.truncated.count, len(cut[1].ids)) == (2, 1, 1, 20)
    assert cut[1].label_positions.max() == 18
    with pytest.raises(DataError, match="every example is over the limit"):
        load(path, max_length=1, too_long="skip")


# -- files ----------------------------------------------------------------------------------------------------


def test_bom_crlf_and_blank_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "yes"}\r\n\r\n  \n{"text": "no"}')
    dataset = load(path)
    assert [learned(dataset, index) for index in range(2)] == ["yes</s>", "no</s>"]


BAD_LINES = [
    (b'{"text": "a"}\n{"text": \n', ":2: not valid JSON"),
    (b'{"text": "a"}\n\n[{"text": "a"}]\n', ":3: a JSON array; each line must be one whole JSON object"),
    (b'"x"\n', ":1: a JSON string"),
    (b"\n null \n", ":2: a JSON null"),
    (b'{"text": "a"} {"text": "b"}\n', ":1: not valid JSON"),
    (b'{"text": 3}\n', ":1: 'text' must be a string, not a number"),
    (b'{"prompt": "a"}\n', ":1: no form of data that is known: it needs 'messages'"),
    (b'{"prompt": "a", "completion": null}\n', "'completion' must be a string"),
    (b'{"body": "a", "id": 1}\n', "and has 'body', 'id'"),
    (b"{}\n", "and has nothing"),
    (b'{"text": "a", "messages": []}\n', ":1: it may be chat messages or text, for it has 'text', 'messages'"),
    (b'{"text": ""}\n', ":1: the text is empty"),
    (b'{"messages": []}\n', "at least one message"),
    (b'{"messages": "hi"}\n', "must be a list"),
    (b'{"messages": ["hi"]}\n', "message 1 must be an object"),
    (b'{"messages": [{"content": "hi"}]}\n', "message 1 needs a 'role'"),
    (b'{"messages": [{"role": "user"}]}\n', "message 1 needs a 'content'"),
    (b'{"messages": [{"role": "user", "content": "hi"}]}\n', ":1: nothing to learn"),
    (b'{"text": "a"}\n{"text": "\xff"}\n', ":2: not UTF-8"),
    ('{"text": "a"}'.encode("utf-16"), ":1: not UTF-8"),
    (b'{"text": "\\ud800"}\n', ":1: not valid JSON"),
    (b"[" * 100_000, ":1: not valid JSON"),
    (b"", "no examples in it"),
    (b"\n\n", "no examples in it"),
]
BAD_TABLES = [
    (b"text,label\na,b\nc\n", ":3: 1 fields, the header has 2"),
    (b'text,label\n"a\nb",c\n"x"y,z\n', ":4: not valid CSV"),
    (b'text\n"a', ":2: not valid CSV"),
    (b"text,text\na,b\n", ":1: the header names a column twice"),
    (b"text\n\xff\n", ":2: not UTF-8"),
    (b"text\n", "no examples in it"),
    (b"body\nx\n", ":2: no form of data that is known"),
]
BAD_FORMS = [
    (b'{"text": "a"}\n{"instruction": "a", "output": "b"}\n', ":2: this is Alpaca ('instruction' and 'output'),"),
    (b'{"prompt": "a", "completion": ""}\n{"prompt": "b", "completion": " "}\n', ":1: its answer is empty, and so"),
    (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}', ":1: its answer is"),
    (b'{"prompt": "a", "chosen": "b", "rejected": "c"}', ":1: a pair of a chosen and a rejected answer"),
    (b'{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}', "'completion' must be a list of"),
    (b'{"prompt": [], "completion": []}', "'prompt' must be a list of at least one message, not an empty array"),
    (b'{"conversations": [{"from": "human", "value": "a"}]}', ":1: nothing to learn: no message of the"),
    (b'{"conversations": [{"from": "human", "value": 3}]}', ":1: message 1 needs a 'content', a string"),
    (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', ":1: message 1 has a part that is"),
    (b'{"instruction": "a", "output": "b", "history": "c"}', ":1: 'history' must be a list of pairs"),
    (b'{"messages": [{"role": "assistant", "content": "a"}], "tools": "["}', ":1: 'tools' must be JSON"),
    (b'[{"text": "a"},\n{"text": "b"]', ":2: not valid JSON"),
    (b'[{"text": "a"}\n{"text": "b"}]', ":2: not valid JSON: a comma, or the end of the array, belongs here"),
    (b'[{"text": "a"},\n3]', ":2: a JSON number; each element of the array must be one JSON object"),
    (b'[{"text": "a"}\n', ":2: not valid JSON"),
    (b'[{"text": "a"}]\n[]', ":2: something follows the array"),
    (b'[{"text": "a"},\n{"text": "\xff"}]', ":2: not UTF-8 (byte 11 of the line)"),
    (b"[]", "no examples in it"),
]
BAD_FILES = [
    *(("d.jsonl", *row) for row in BAD_LINES), *(("d.csv", *row) for row in BAD_TABLES),
    *(("d.json", *row) for row in BAD_FORMS),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "text"), BAD_FILES)
def test_error_names_the_bad_line(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(path)
    assert text in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_file_and_directory_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "no.jsonl")
    with pytest.raises(DataError, match="no data in this directory"):
        load(tmp_path)


def test_example_of_one_token_is_refused(tmp_path: Path) -> None:
    inner = train_tokenizer()
    inner.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer = EdgeTokenizer(inner, TokenizerSpec(file=""))
    with pytest.raises(DataError, match=":1: nothing to learn"):
        load(write(tmp_path / "d.jsonl", {"text": "a"}), tokenizer)


def test_csv_columns_are_mapped(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(b'\xef\xbb\xbftext,category\r\n"what, is\nthe sum", yes\r\n\r\nthe answer, no\r\n')
    dataset = load(path, columns="prompt=text,completion=category")
    assert [learned(dataset, index) for index in range(2)] == [" yes</s>", " no</s>"]
    assert learned(load(path)) == "what, is\nthe sum</s>"  # a header that needs no mapping
    with pytest.raises(DataError, match=r"d.csv:2: no column 'label'; there are 'text', 'category'"):
        load(path, columns={"prompt": "text", "completion": "label"})


def test_csv_with_semicolons_is_read(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('"text, or ""what""";category\n"what; is, the sum"; yes\n')
    columns = {"prompt": 'text, or "what"', "completion": "category"}
    assert learned(load(path, columns=columns)) == " yes</s>"
    path.write_text("text,a;b\nx,y\n")  # a comma decides
    assert learned(load(path)) == "x</s>"
    path.write_text("text;category\na;b;c\n")
    with pytest.raises(DataError, match=r"d.csv:2: 3 fields, the header has 2; quote fields that have semicolons"):
        load(path)
    path.write_bytes(b"text;a\rb\nx;y\n")
    with pytest.raises(DataError, match=r"d.csv:1: not valid CSV"):
        load(path)


def test_columns_option_works_for_jsonl(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"conversation": TALK[:2], "text": "x"})
    assert learned(load(path, columns="messages=conversation")) == "It is 4, né? 🙂<|im_end|>\n"


@pytest.mark.parametrize("text", ["", "text", "text=", "prompt=a", "body=a", "text=a,prompt=b,completion=c"])
def test_bad_columns_option_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--columns"):
        parse_columns(text)


def bundle_with(directory: Path, spec: TokenizerSpec) -> Bundle:
    """A bundle that was checked already; its files may be gone by now."""
    named = [name for name in ("graph.onnx", "embedding.npy", spec.file, spec.chat_template) if name is not None]
    manifest = msgspec.json.decode(manifest_of(dict.fromkeys(named, b"")), type=Manifest)
    base = msgspec.structs.replace(manifest.base_model, vocabulary_size=400)
    return Bundle(directory, msgspec.structs.replace(manifest, base_model=base, tokenizer=spec))


def test_tokenizer_opens_from_a_bundle(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path, SPEC)
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read"):
        EdgeTokenizer.open(bundle)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match="damaged"):
        EdgeTokenizer.open(bundle)
    train_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BundleError, match=r"chat\.jinja cannot be read"):
        EdgeTokenizer.open(bundle)
    (tmp_path / "chat.jinja").write_text(CHATML)
    opened = EdgeTokenizer.open(bundle)
    assert opened.encode_chat(TALK).tolist() == TOKENIZER.encode_chat(TALK).tolist()


def test_prompt_is_encoded_for_generation() -> None:
    asked = [{"role": "user", "content": "hi"}]
    text = TOKENIZER.decode(TOKENIZER.encode_chat(asked), skip_special_tokens=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    bare = edge_tokenizer(None)
    assert bare.decode(bare.encode_prompt_text("hi"), skip_special_tokens=False) == "<s>hi"
    assert bare.encode_prompt_text("hi ").tolist() == bare.encode_prompt_text("hi").tolist()


# -- the data set and its batches ------------------------------------------------------------------------------


def numbered(count: int) -> Dataset:
    """Example i is i + 2 tokens of the value i, labelled from its second token on."""
    return Dataset.of([([index] * (index + 2), range(index + 1)) for index in range(count)])


def test_fingerprint_depends_on_ids_labels_and_boundaries() -> None:
    variants = [
        Dataset.of([([1, 2, 3, 4], [0, 2])]),
        Dataset.of([([1, 2, 3, 5], [0, 2])]),
        Dataset.of([([1, 2, 3, 4], [0, 1])]),
        Dataset.of([([1, 2], [0]), ([3, 4], [0])]),
    ]
    assert len({dataset.fingerprint for dataset in variants}) == len(variants)
    assert Dataset.of([([1, 2, 3, 4], [0, 2])]).fingerprint == variants[0].fingerprint


def test_each_epoch_has_each_example_once() -> None:
    batches = Batches(numbered(11), batch_size=2, grad_accum=2, seed=(3,))
    assert batches.steps_per_epoch == 3
    epochs = []
    for epoch in range(2):
        steps = [batches.step_batches(3 * epoch + step) for step in range(3)]
        assert [[len(batch.sequence_lengths) for batch in step] for step in steps] == [[2, 2], [2, 2], [2, 1]]
        epochs.append([int(value) for step in steps for batch in step for value in batch.sequence_lengths])
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(2, 13))
    assert epochs[0] != epochs[1]


def test_a_step_depends_on_seed_and_step_only() -> None:
    for step in (0, 7, 40):
        one, other = (Batches(numbered(11), 2, 2, seed=(3,)) for _ in range(2))
        for before in range(step):
            one.step_batches(before)
        for left, right in zip(one.step_batches(step), other.step_batches(step), strict=True):
            assert left.ids.tolist() == right.ids.tolist()
    assert Batches(numbered(11), 2, 2, seed=(4,)).step_indices(0).tolist() != other.step_indices(0).tolist()


def test_packed_labels_are_the_next_token_of_the_same_sequence() -> None:
    dataset = numbered(9)
    for batch in evaluation_batches(dataset, 4):
        assert batch.sequence_lengths.sum() == len(batch.ids)
        assert (np.diff(batch.label_positions) > 0).all()
        assert (batch.ids[batch.label_positions + 1] == batch.labels).all()
        owner = np.repeat(np.arange(len(batch.sequence_lengths)), batch.sequence_lengths)
        assert (owner[batch.label_positions] == owner[batch.label_positions + 1]).all()
        assert (batch.ids.dtype, batch.labels.dtype) == (np.int64, np.int64)
        assert (batch.sequence_lengths.dtype, batch.label_positions.dtype) == (np.int32, np.int32)
    assert Batches(dataset, 4, 1, seed=(0,)).max_sequence_length == 10
    assert sum(len(batch.labels) for batch in evaluation_batches(dataset, 4)) == dataset.labelled


@pytest.mark.parametrize("packs", [True, False])
def test_micro_batch_is_cut_to_the_servers_limit(packs: bool) -> None:
    whole = pack(list(numbered(9)))  # sequences of 2 to 10 tokens
    assert whole.cut(max_tokens=1000, packs=packs) == [whole]
    for limit in (1, 7, 10, 20, 33):
        parts = whole.cut(max_tokens=limit, packs=packs)
        starts = np.cumsum([0, *(len(part.ids) for part in parts[:-1])])
        assert np.concatenate([part.ids for part in parts]).tolist() == whole.ids.tolist()
        assert np.concatenate([part.labels for part in parts]).tolist() == whole.labels.tolist()
        positions = [part.label_positions + start for part, start in zip(parts, starts, strict=True)]
        assert np.concatenate(positions).tolist() == whole.label_positions.tolist()
        counts = [counted_tokens(part.sequence_lengths, packs=packs) for part in parts]
        assert all(count <= limit or len(part.sequence_lengths) == 1 for count, part in zip(counts, parts, strict=True))
        for part, following in itertools.pairwise(parts):  # as few as can be
            longer = np.append(part.sequence_lengths, following.sequence_lengths[0])
            assert counted_tokens(longer, packs=packs) > limit
