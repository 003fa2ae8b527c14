"""A directory of adapters: names, and what is said of each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from peft import LoraConfig, get_peft_model
from test_peft_adapter import LLAMA_TARGETS, R, assert_refused, llama, random_modules, save

from dlora.edge.adapters.about import about_adapter
from dlora.edge.adapters.model_card import CARD_NAME, model_card
from dlora.edge.adapters.parts import Parts
from dlora.edge.adapters.peft import load_adapter
from dlora.edge.adapters.store import AdapterStore, default_directory
from dlora.protocol.adapter_record import (
    CONFIG_NAME,
    RECORD_NAME,
    WEIGHTS_NAME,
    AdapterRecord,
    TrainingRecord,
    load_record,
)
from dlora.protocol.errors import CheckpointError, UsageError

FINGERPRINT = "ab" * 32
TRAINING = TrainingRecord(
    steps=3, examples=4, tokens=50, labelled=20, eval_loss_before=2.5, eval_loss_after=1.25, eval_tokens=9,
    bytes_per_token=1234.5, round_trips_per_step=7.0, recipe={"kind": "lora", "lr": 1e-3, "target_modules": "q,v"},
    versions={"python": "3.11", "numpy": "2"},
)  # fmt: skip


def saved(directory: Path, seed: int = 0, **options: Any) -> Path:
    """An adapter as a run saves it."""
    modules = random_modules(LLAMA_TARGETS, seed=seed)
    save(directory, modules, **{"base_fingerprint": FINGERPRINT, "training": TRAINING, **options})
    return directory


def damage(path: Path) -> None:
    """Change a weight, in a way that the format cannot see."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


# -- the record ------------------------------------------------------------------------------------------


def test_record_says_what_the_adapter_is(tmp_path: Path) -> None:
    loaded = load_adapter(saved(tmp_path))
    record = load_record(tmp_path)
    assert record == loaded.record
    assert record is not None
    assert (record.base_fingerprint, record.kind, record.rank, record.training) == (FINGERPRINT, "lora", R, TRAINING)
    assert record.weights_sha256 == loaded.weights_sha256
    assert record.replaces_sha256 is None
    damage(tmp_path / WEIGHTS_NAME)
    assert_refused(tmp_path, f"has not the SHA-256 that {RECORD_NAME} gives")
    (tmp_path / RECORD_NAME).unlink()
    assert load_adapter(tmp_path).record is None


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", "is damaged"), (b"[]", "is damaged"), (b"\xff", "is damaged"), (b'{"format": 99}', "update dlora"),
        (b'{"format": 1}', "is damaged"), (b" " * (2 << 20), "too large"),
    ],
)  # fmt: skip
def test_damaged_record_is_one_line(tmp_path: Path, content: bytes, text: str) -> None:
    saved(tmp_path)
    (tmp_path / RECORD_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=text) as caught:
        load_adapter(tmp_path)
    assert "\n" not in str(caught.value)


def test_record_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / RECORD_NAME).unlink()
    os.mkfifo(tmp_path / RECORD_NAME)
    assert_refused(tmp_path, "no regular file")


@pytest.mark.parametrize("nth", range(1, 7))
def test_save_that_is_cut_short_leaves_an_adapter_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """Whichever file of the six comes last: the record knows the old weights and the new ones until both are there."""
    from dlora.edge.adapters import peft as peft_adapter

    saved(tmp_path)
    write, calls = peft_adapter.write_atomically, []

    def write_some(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) == nth:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(peft_adapter, "write_atomically", write_some)
    if nth <= 5:
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, seed=1)
    else:
        saved(tmp_path, seed=1)
        assert [path.name for path in calls] == [RECORD_NAME, WEIGHTS_NAME, CONFIG_NAME, RECORD_NAME, CARD_NAME]
    record = load_adapter(tmp_path).record
    assert record is not None
    assert record.base_fingerprint == FINGERPRINT


# -- the card --------------------------------------------------------------------------------------------


def test_card_is_what_peft_writes_and_more(tmp_path: Path) -> None:
    saved(tmp_path / "ours", base_model_name="org/name")
    model = llama()
    model.config._name_or_path = model.name_or_path = "org/name"
    config = LoraConfig(r=R, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours, theirs = (metadata_load(tmp_path / who / CARD_NAME) for who in ("ours", "theirs"))
    for field in ("base_model", "library_name", "pipeline_tag"):
        assert ours[field] == theirs[field]
    assert set(theirs["tags"]) < set(ours["tags"])
    text = ModelCard.load(tmp_path / "ours" / CARD_NAME).text
    for said in ("2.5000 → 1.2500, ", "1,234 ", FINGERPRINT, "--lr 0.001", "### Framework versions", "- numpy 2"):
        assert said.removesuffix(", ") in text, said
    assert "PEFT 0" not in text.split("### Framework versions")[1]  # nobody knows here which one will load it


@pytest.mark.parametrize(
    "name",
    [
        'a"b: c', "x\n---\nlicense: mit", "- [x]", "# no", "naïve/模型", "`code` | <b>", "\x1b[31m", "a" * 1000,
        "x\n# A heading of theirs\n", "%TAG", "yes", "\u2028next", "😀/model", "---", "{a: 1}", "C:\\model",
    ],
)  # fmt: skip
def test_strangers_names_stay_names_in_the_card(tmp_path: Path, name: str) -> None:
    record = AdapterRecord(
        format=1, software="0 | <i>", base_model=name, base_fingerprint=FINGERPRINT, kind=name, rank=1,
        weights_sha256=FINGERPRINT,
        training=TrainingRecord(
            steps=1, examples=1, tokens=1, labelled=1, bytes_per_token=1, round_trips_per_step=1,
            recipe={"kind": f"```\n# {name}"}, versions={name: name},
        ),
    )  # fmt: skip
    (tmp_path / CARD_NAME).write_text(model_card(1, 1, 1.0, name, [name], acts_on_answers=True, record=record))
    card = ModelCard.load(tmp_path / CARD_NAME)
    shown = "".join(each for each in " ".join(name[:300].split()) if each.isprintable())
    assert card.data.base_model == shown
    assert set(card.data.to_dict()) == {"base_model", "library_name", "pipeline_tag", "tags"}
    assert "license" not in card.data.to_dict()
    assert "\x1b" not in card.text
    assert card.text.count("```") == 6  # three blocks, and none of a stranger's
    headings = [line for line in card.text.splitlines() if line.startswith("#")]
    assert headings == ["# LoRA adapter", "## How to use it", "## Training", "### Framework versions"]
    assert yaml.safe_load((tmp_path / CARD_NAME).read_text().split("\n---\n")[0].removeprefix("---\n"))


# -- the store -------------------------------------------------------------------------------------------


def test_default_directory_is_this_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DLORA_ADAPTERS", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "dlora" / "adapters"
    monkeypatch.setenv("DLORA_ADAPTERS", str(tmp_path / "mine"))
    assert default_directory() == tmp_path / "mine"


def test_a_copied_run_is_shown_as_it_is(store: AdapterStore, tmp_path: Path) -> None:
    assert store.names() == []
    parts = Parts("bottleneck", R, 1.0, {"x": 2.0}, {"x.core": random_modules(LLAMA_TARGETS)[0].lora_A})
    saved(store.directory / "one", parts=parts)
    about = about_adapter(store.path("one"))
    assert store.names() == ["one"]
    assert (about.name, about.kind, about.rank, about.modules) == ("one", "bottleneck", R, 2)
    assert about.acts_on == "everything"
    assert (about.base_fingerprint, about.training, about.blocks) == (FINGERPRINT, TRAINING, "0,2")


def test_adapters_of_peft_itself_are_as_good(store: AdapterStore) -> None:
    config = LoraConfig(r=R, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(llama(), config).save_pretrained(store.directory / "theirs", save_embedding_layers=False)
    about = about_adapter(store.path("theirs"))
    assert (about.base_fingerprint, about.training, about.kind) == (None, None, "lora")


NO_NAMES = ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "a b", "a\n", "a\0", "-x", "é", "x" * 65, "a\\b", "~"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_lead_nowhere_else(store: AdapterStore, tmp_path: Path, name: str) -> None:
    saved(tmp_path / "x")  # what ../x would be
    saved(store.directory / "a")
    with pytest.raises(UsageError, match="cannot be the name of an adapter") as caught:
        store.path(name)
    assert "\n" not in str(caught.value)


def test_links_are_not_followed(store: AdapterStore, tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    saved(store.directory / "a")
    (store.directory / "link").symlink_to(source)
    assert store.names() == ["a"]
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        about_adapter(store.path("link"))


def test_pickles_and_damaged_adapters_are_not_shown(store: AdapterStore) -> None:
    source = saved(store.directory / "a")
    damage(source / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="SHA-256"):
        about_adapter(store.path("a"))
    (source / WEIGHTS_NAME).rename(source / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        load_adapter(store.path("a"))


def test_directory_that_is_a_file_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is no directory of adapters"):
        AdapterStore(tmp_path / "file").names()


def test_other_things_in_the_directory_are_left_alone(store: AdapterStore) -> None:
    saved(store.directory / "a")
    (store.directory / "notes.txt").write_text("mine")
    for other in (".git", "my own"):
        (store.directory / other).mkdir()
    assert (store.names(), store.entries()) == (["a"], ["a", "my own"])
