"""Data in the forms in which people have them: what is learnt of each is what TRL's own preprocessing makes of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Final

import pytest
from test_edge_data import CHATML, TOKENIZER, load, train_tokenizer, write

from dlora.edge.data import json_array
from dlora.edge.data.examples import Dataset
from dlora.edge.data.question import Wanted
from dlora.edge.data.questions import read_questions
from dlora.edge.data.read_settings import ReadSettings
from dlora.edge.data.reading import load_examples, load_split
from dlora.edge.data.tokenizer import EdgeTokenizer
from dlora.protocol.errors import DataError
from dlora.protocol.manifest import TokenizerSpec

SAMPLES: Final = Path(__file__).parent / "data_forms"
MARKED: Final = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}"
    "{% if message.tool_calls %}{{ message.tool_calls[0].function.arguments | tojson }}{% endif %}"
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPEC: Final = TokenizerSpec(file="", bos_token="<s>", eos_token="</s>", eos_token_id=1)


def rows_of(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    return list(json.loads(text)) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


def as_trl_takes_it(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what TRL leaves to its users: ShareGPT's roles, Alpaca as messages, OpenAI's parts and arguments."""
    trl = pytest.importorskip("trl")
    row = copy.deepcopy(row)
    if "instruction" in row:
        asked = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
        return {
            "prompt": [{"role": "user", "content": asked}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
    if "conversations" in row:
        for message in row["conversations"]:
            message["from"] = {"human": "user", "gpt": "assistant"}[message["from"]]
        if system := row.pop("system", ""):
            row["conversations"].insert(0, {"from": "system", "value": system})
        row = trl.data_utils.maybe_convert_to_chatml(row)  # its trainer does so too, but too late for its own check
    for message in row.get("messages", []):
        if isinstance(message["content"], list):
            message["content"] = "".join(part["text"] for part in message["content"])
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return row


def trl_examples(rows: list[dict[str, Any]], template: str, tmp_path: Path) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels, -100 for none, as TRL's trainer has them before it trains."""
    import datasets
    import transformers
    import trl

    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = template
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"), max_length=None, use_cpu=True, report_to=[], bf16=False,
        assistant_only_loss="messages" in rows[0] and "generation" in template,
    )  # fmt: skip
    # A row at a time: rows of one data set would share their keys.
    found = []
    for row in rows:
        trainer = trl.SFTTrainer(
            transformers.LlamaForCausalLM(config), settings, train_dataset=datasets.Dataset.from_list([row]),
            processing_class=tokenizer,
        )  # fmt: skip
        (made,) = trainer.train_dataset
        found.append((made["input_ids"], made.get("labels", made["input_ids"])))
    return found


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("messages.jsonl", MARKED),
        ("prompt_completion.jsonl", CHATML),
        ("prompt_completion_messages.jsonl", CHATML),
        ("sharegpt.json", MARKED),
        ("alpaca.json", CHATML),
        ("text.jsonl", CHATML),
    ],
)
def test_each_form_gives_what_trl_makes_of_it(name: str, template: str, tmp_path: Path) -> None:
    path = SAMPLES / name
    ours = load_examples(path, EdgeTokenizer(train_tokenizer(), SPEC, template), max_length=4096)
    theirs = trl_examples([as_trl_takes_it(row) for row in rows_of(path)], template, tmp_path)
    assert len(ours) == len(theirs) >= 2
    for example, (ids, labels) in zip(ours, theirs, strict=True):
        assert example.ids.tolist() == ids
        labelled = [place for place, label in enumerate(labels) if label != -100 and place]
        assert (example.label_positions + 1).tolist() == labelled
        assert 0 < len(labelled) <= len(ids)


def text_of(dataset: Dataset, index: int = 0) -> str:
    return TOKENIZER.decode(dataset[index].ids, skip_special_tokens=False)


def test_alpaca_is_a_prompt_where_the_model_has_no_template() -> None:
    tokenizer = EdgeTokenizer(train_tokenizer(), SPEC)
    dataset = load(SAMPLES / "alpaca.json", tokenizer, max_length=2000)
    text = text_of(dataset, 1)
    assert text.startswith("<s>Below is an instruction that describes a task, paired with an input that")
    assert text.endswith("### Input:\nMars, Moon, Venus\n\n### Response:\nThe Moon.</s>")
    assert "### Input" not in text_of(dataset, 0)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("end", "choices"),
    [
        ("true/false", ["true", "false"]),
        ("  a/b/c \n", ["a", "b", "c"]),
        ("Answer format: a//b", ["a", "", "b"]),
        ("true", []),
        ("/", []),
        ("a/b c", []),
        ("/" * 100 + " x", []),  # a regular expression looked for it in 2**50 ways
    ],
)
def test_answers_to_choose_among_are_read_from_the_question(end: str, choices: list[str], tmp_path: Path) -> None:
    row = {"instruction": f"Is it?\n\nAnswer format: {end}", "input": "", "output": "a/b"}
    path = write(tmp_path / "d.jsonl", row)
    (question,) = read_questions(path, EdgeTokenizer(train_tokenizer(), SPEC), ReadSettings(max_length=2000), Wanted())
    assert question.choices == choices


def test_alpacas_history_is_turns_before(tmp_path: Path) -> None:
    row = {"system": "s", "history": [["q", "a"]], "instruction": "i", "output": "o"}
    path = write(tmp_path / "d.jsonl", row)
    said = [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "i"), ("assistant", "o")]
    assert text_of(load(path)) == "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said)


def test_sharegpts_function_calls_are_tool_calls(tmp_path: Path) -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    row = {"conversations": [
        {"from": "human", "value": "1?"}, {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "2"}, {"from": "gpt", "value": "3"},
    ]}  # fmt: skip
    dataset = load(write(tmp_path / "d.jsonl", row), EdgeTokenizer(train_tokenizer(), SPEC, MARKED))
    assert '<|im_start|>assistant\n{"a": 1}<|im_end|>\n<|im_start|>tool\n2<|im_end|>' in text_of(dataset)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "~", ":", "^"])
def test_any_delimiter_is_found(delimiter: str, tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text(f"prompt{delimiter}completion{delimiter}n\nq{delimiter}a{delimiter}1\n")
    assert text_of(load(path)) == "<s>qa</s>"
    path.write_text(f"my question{delimiter}my-answer\nq{delimiter}a\n")
    assert text_of(load(path, columns="prompt=my question,completion=my-answer")) == "<s>qa</s>"


def test_parquet_is_read_as_json_is(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name in ("messages.jsonl", "alpaca.json", "prompt_completion.jsonl"):
        rows = rows_of(SAMPLES / name)
        for message in (each for row in rows for each in row.get("messages", [])):
            if isinstance(message["content"], list):  # a column has one type
                message["content"] = "".join(part["text"] for part in message["content"])
        rows = [{**dict.fromkeys(key for each in rows for key in each), **row} for row in rows]
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        tokenizer = EdgeTokenizer(train_tokenizer(), SPEC, MARKED)
        wanted = load(SAMPLES / name, tokenizer, max_length=4096)
        assert load(path, tokenizer, max_length=4096).fingerprint == wanted.fingerprint
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"parquet:1: not valid Parquet"):
        load(path)


# -- texts ------------------------------------------------------------------------------------------------------


def test_a_folder_of_notes_is_learnt_text_by_text() -> None:
    """Short ones together; the first token of each is predicted by nothing, its end is learnt."""
    dataset = load(SAMPLES / "notes", max_length=4096)
    texts = [path.read_text() for path in (SAMPLES / "notes/bicycle.md", SAMPLES / "notes/bus.txt")]
    texts.append((SAMPLES / "notes/garden/tomatoes.md").read_text())
    assert text_of(dataset) == "".join(f"<s>{text}</s>" for text in texts)
    assert len(dataset) == 1
    assert dataset.facts.rows == 3
    example = dataset[0]
    unlearnt = sorted(set(range(len(example.ids))) - set((example.label_positions + 1).tolist()))
    assert example.ids[unlearnt].tolist() == [0, 0, 0]  # <s>
    apart = load(SAMPLES / "notes", max_length=60)
    assert sum(map(len, (each.ids for each in apart))) == len(example.ids)


@pytest.mark.parametrize("max_length", [16, 50, 300])
def test_pieces_of_a_long_text_are_its_tokens(max_length: int, tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number}. " + "the answer is yes or no, " * (number % 7) for number in range(60)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    whole = load(path, max_length=10**6)
    pieces = load(path, max_length=max_length)
    assert [token for each in pieces for token in each.ids.tolist()] == whole[0].ids.tolist()
    assert int(pieces.lengths.max()) <= max_length
    assert pieces.labelled == pieces.tokens - len(pieces)
    if max_length == 300:  # a piece ends with a paragraph
        ends = [TOKENIZER.decode(each.ids)[-2:] for each in pieces][:-1]
        assert ends == ["\n\n"] * len(ends)


def test_a_text_longer_than_a_part_is_read_in_parts(tmp_path: Path) -> None:
    lines = [f"the answer {number} is yes or no\n" + ("\n" if number % 9 == 0 else "") for number in range(9000)]
    path = tmp_path / "long.md"
    path.write_text("".join(lines))
    dataset = load(path, max_length=512)
    text = TOKENIZER.decode([token for each in dataset for token in each.ids.tolist()], skip_special_tokens=False)
    assert text == f"<s>{''.join(lines)}</s>"
    assert dataset.facts.rows == 1


def test_blank_texts_and_other_files_are_passed_over(tmp_path: Path) -> None:
    for name, text in (("a.md", "yes"), ("b.txt", "\n \n"), (".hidden.md", "no"), ("c.png", "no"), (".git/x.md", "no")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert text_of(load(tmp_path)) == "<s>yes</s>"
    (tmp_path / "a.md").unlink()
    with pytest.raises(DataError, match="no examples in it"):
        load(tmp_path)


def test_a_data_set_is_read_part_by_part(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation.jsonl", "README.md"):
        write(tmp_path / name, {"text": name.replace("-", " ")})
    assert [text_of(load(tmp_path), index)[3:14] for index in range(2)] == ["train 00000", "train 00001"]
    settings = ReadSettings(part="test")
    (tested,) = load_split(tmp_path, EdgeTokenizer(train_tokenizer(), SPEC), settings)
    assert text_of(tested) == "<s>validation.jsonl</s>"
    for path in tmp_path.glob("train*"):
        path.unlink()
    with pytest.raises(DataError, match=r"has validation.jsonl, and no file of the part 'train'; name the file"):
        load(tmp_path)


# -- what is learnt ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_train_on_chooses_the_labels(template: str) -> None:
    def learned(train_on: str) -> str:
        tokenizer = EdgeTokenizer(train_tokenizer(), SPEC, template)
        example = load(SAMPLES / "messages.jsonl", tokenizer, max_length=4096, train_on=train_on)[0]
        return TOKENIZER.decode(example.labels, skip_special_tokens=False).replace("\n", "")

    first, last = "A dancing bee tells the others where flowers are.", "The longer she waggles, the farther they are."
    assert learned("answers") == f"{first}<|im_end|>{last}<|im_end|>"
    assert learned("last") == f"{last}<|im_end|>"
    assert learned("all").startswith("systemYou answer in one sentence.")


def test_last_works_where_a_template_rewrites_earlier_turns(tmp_path: Path) -> None:
    from test_edge_data import REWRITES, TALK

    tokenizer = EdgeTokenizer(train_tokenizer(), SPEC, REWRITES)
    path = write(tmp_path / "d.jsonl", {"messages": TALK})
    with pytest.raises(DataError, match=r"d.jsonl:1: .*no \{% generation %\} marks.*--train-on last"):
        load(path, tokenizer)
    (example,) = load(path, tokenizer, train_on="last")
    assert TOKENIZER.decode(example.labels, skip_special_tokens=False) == "<think></think>6<|im_end|>"


def test_a_long_array_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.json"
    rows = [{"prompt": f"é{number}", "completion": "yes " * 90} for number in range(900)]
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    monkeypatch.setattr(json_array, "_CHUNK_BYTES", 1021)
    assert path.stat().st_size > 300 * json_array._CHUNK_BYTES
    dataset = load(path, max_length=1000)
    assert len(dataset) == 900
    assert text_of(dataset, 899).startswith("<s>é899yes")
    with path.open("a") as file:
        file.write("x")
    with pytest.raises(DataError, match=rf"d.json:{900 * 4 + 2}: something follows"):
        load(path, max_length=1000)
