"""Files that ask for all memory, never end or crash a library: one line that names the place."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from attacks.fuzz_manifest import manifest_of
from waiting import eventually

from dlora.edge.data.chat import ChatTemplate
from dlora.edge.data.examples import Dataset
from dlora.edge.data.lines import MAX_RECORD_BYTES
from dlora.edge.data.loading import Reading, load_datasets
from dlora.edge.data.prompt import prompt_tokenizer
from dlora.edge.data.read_settings import ReadSettings
from dlora.edge.engine.bundle import Bundle
from dlora.protocol import child, errors
from dlora.protocol.child import Child, Note
from dlora.protocol.errors import BundleError, DataError, DloraError, RefusedError, RemoteProtocolError
from dlora.protocol.manifest import Manifest, TokenizerSpec

CHAT = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
WORDS = ["<unk>", "<s>", "</s>", "user", "assistant", "a", "b", "c"]
QUESTION, ANSWER = {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children with a quarter of a gigabyte."""
    monkeypatch.setattr(child, "spare_bytes", lambda: 1 << 28)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is to stand still: it takes the libraries' loading, too, on busy cores."""
    monkeypatch.setattr(child, "NO_PROGRESS_S", 5)


def bundle_of(directory: Path, template: str | None = CHAT, **changes: object) -> Bundle:
    """A bundle, checked already, whose ``tokenizer.json`` has these fields."""
    tokenizer: dict[str, object] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: at for at, word in enumerate(WORDS)}, "unk_token": "<unk>"},
        **changes,
    }  # fmt: skip
    spec = TokenizerSpec(
        file="tokenizer.json", chat_template=None if template is None else "chat.jinja", bos_token="<s>",
        eos_token="</s>", eos_token_id=2,
    )  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "chat.jinja").write_text(template or "")
    names = ("graph.onnx", "embedding.npy", "tokenizer.json", "chat.jinja")
    manifest = msgspec.json.decode(manifest_of(dict.fromkeys(names, b"")), type=Manifest)
    base = msgspec.structs.replace(manifest.base_model, vocabulary_size=len(WORDS))
    return Bundle(directory, msgspec.structs.replace(manifest, base_model=base, tokenizer=spec))


def load(bundle: Bundle, *paths: Path, columns: dict[str, str] | None = None, **options: Any) -> list[Dataset]:
    settings = {"max_length": 64, "too_long": "error", **options}
    return load_datasets(Reading(bundle, paths, ReadSettings(columns, **settings)))


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(kind: type[DloraError], load: Callable[[], object], *words: str) -> None:
    """One short line of that kind, with these words."""
    with pytest.raises(kind) as caught:
        load()
    said = str(caught.value)
    for word in words:
        assert word in said
    assert "\n" not in said
    assert len(re.sub(r"/\S+", "", said)) < 450


# -- templates -------------------------------------------------------------------------------------------------

TEMPLATES = {
    "allocates": ("{{ 'a' * 10**11 }}", "asks for more memory than there is"),
    "doubles": (
        "{% set all = namespace(x='a') %}{% for i in range(60) %}{% set all.x = all.x ~ all.x %}{% endfor %}",
        "memory",
    ),
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "took longer than 5 s"),
    "counts": ("{{ 10 ** (10 ** 9) }}", "took longer than 5 s"),
    "nests": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "does not compile"),
    "nests less": ("{{ " + "(" * 250 + "messages" + ")" * 250 + " }}", ""),
    "complains at length": ("{{ raise_exception('a' * 10**7) }}", "refuses these messages"),
    "calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses these messages"),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ("loops", "counts") else name for name in TEMPLATES]
)
def test_harmful_template_is_refused(tmp_path: Path, name: str) -> None:
    template, words = TEMPLATES[name]
    path = write(tmp_path / "d.jsonl", {"messages": [QUESTION, ANSWER]})
    bundle = bundle_of(tmp_path, template)
    refused(DataError, lambda: load(bundle, path), f"{path}:1", words)

    def generate() -> None:
        with prompt_tokenizer(bundle) as tokenizer:
            tokenizer.encode_chat([{"role": "user", "content": "a"}])

    if name != "nests less":  # which is a template like any other, but for its assistant
        refused(DataError, generate, words)


# -- tokenizers ------------------------------------------------------------------------------------------------

GROW = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10_000}] * 10
TOKENIZERS: dict[str, tuple[type[DloraError], dict[str, object], str]] = {
    "no words": (BundleError, {"model": {"type": "BPE", "vocab": {}, "merges": []}}, "has no words"),
    "more words than the base model": (
        BundleError,
        {"model": {"type": "WordLevel", "vocab": {"<unk>": 8}, "unk_token": "<unk>"}},
        "has a token 8, its base model has 8 of them",
    ),
    "a bomb of a normalizer": (
        DataError,
        {"normalizer": {"type": "Sequence", "normalizers": GROW}},
        "d.jsonl:1 needs more than the 256 MiB",
    ),
    "one that panics": (
        BundleError,
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
        "does not work",
    ),
    "one without its unknown word": (
        BundleError,
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}},
        "does not work",
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_harmful_tokenizer_is_refused(tmp_path: Path, name: str) -> None:
    kind, changes, words = TOKENIZERS[name]
    path = write(tmp_path / "d.jsonl", {"text": "a b c"})
    refused(kind, lambda: load(bundle_of(tmp_path, **changes), path), words)


def test_endless_decoder_is_a_bundle_error(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, decoder={"type": "Sequence", "decoders": GROW})
    with prompt_tokenizer(bundle) as tokenizer:
        asked = [{"role": "user", "content": "b"}]
        assert tokenizer.encode_chat(asked).tolist() == [3, 6, 2, 4]  # user b </s> assistant
        refused(BundleError, lambda: tokenizer.decode([5]), "the text of the answer needs more than the 256 MiB")


# -- data ------------------------------------------------------------------------------------------------------


def test_child_returns_data_sets_unchanged(tmp_path: Path) -> None:
    long = {"prompt": "", "completion": "a b c " * 30}
    unanswered = {"prompt": "a " * 90, "completion": "b"}
    one = write(tmp_path / "one.jsonl", {"prompt": "", "completion": "a b"}, *[long] * 4, unanswered)
    two = write(tmp_path / "two.jsonl", {"messages": [QUESTION, ANSWER]})
    first, second = load(bundle_of(tmp_path), one, two, too_long="truncate")
    assert (len(first), first.facts.truncated.count, first.facts.skipped.count) == (5, 4, 1)
    assert first.facts.truncated.first == tuple(f"{one}:{line}" for line in (2, 3, 4))
    assert first.facts.skipped.first == (f"{one}:6",)
    assert first[0].ids.tolist() == [5, 6, 2]
    assert second[0].labels.tolist() == [7, 2]
    (skipped,) = load(bundle_of(tmp_path), one, too_long="skip")
    assert (len(skipped), skipped.facts.skipped.count, skipped.facts.truncated.first) == (1, 5, ())
    assert skipped.facts.skipped.first == tuple(f"{one}:{line}" for line in (2, 3, 4))


def test_too_long_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + "a " * (10 << 20) + '"}\n')
    refused(DataError, lambda: load(bundle_of(tmp_path), path), f"{path}:2: a line of more than 8 MiB")


def test_endless_file_is_refused(tmp_path: Path) -> None:
    refused(DataError, lambda: load(bundle_of(tmp_path), Path("/dev/zero")), "/dev/zero:1: a line of more than 8 MiB")


@pytest.mark.usefixtures("impatient")
def test_pipe_without_writer_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(DataError, lambda: load(bundle_of(tmp_path), tmp_path / "pipe"), f"{tmp_path / 'pipe'} took longer")


@pytest.mark.parametrize("rest", ["a line of words\n", '","x\n'], ids=["an open quote", "fields without end"])
def test_endless_csv_record_is_refused(tmp_path: Path, rest: str) -> None:
    path = tmp_path / "d.csv"
    path.write_text('text\na\n"' + rest * (MAX_RECORD_BYTES // len(rest) + 1))
    refused(DataError, lambda: load(bundle_of(tmp_path), path), f"{path}:3: a record of more than 8 MiB", "quote")


def test_csv_file_may_be_longer_than_the_record_limit(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    field = "a" * (MAX_RECORD_BYTES // 2)
    path.write_text(f"text,other\na,{field}\na,{field}\na,{field}\n")
    assert len(load(bundle_of(tmp_path), path)[0]) == 3


@pytest.mark.parametrize("too_long", ["error", "skip", "truncate"])
def test_chat_is_rendered_as_often_as_needed(tmp_path: Path, too_long: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dlora.edge.data.reading import load_examples
    from dlora.edge.data.tokenizer import EdgeTokenizer

    path = write(tmp_path / "d.jsonl", {"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION, ANSWER] * 10_000})
    rendered = []
    render = ChatTemplate.render_marked

    def counting(self: ChatTemplate, messages: Any, **options: Any) -> tuple[str, list[tuple[int, int]]]:
        rendered.append(len(messages))
        return render(self, messages, **options)

    monkeypatch.setattr(ChatTemplate, "render_marked", counting)
    tokenizer = EdgeTokenizer.open(bundle_of(tmp_path))

    def read() -> Dataset:
        return load_examples(path, tokenizer, max_length=20, too_long=too_long)  # type: ignore[arg-type]

    if too_long == "error":
        refused(DataError, read, f"{path}:2: 70000 tokens, the limit is 20")
        assert rendered == [2, 1, 20_000]  # the last turn of the first ends with its text
        return
    found = read()
    assert rendered[:3] == [2, 1, 20_000]
    assert rendered[-2:] == [1, 1]  # how an answer begins
    del rendered[-2:]
    if too_long == "skip":
        assert (len(found), found.facts.skipped.count, len(rendered)) == (1, 1, 3)
    else:
        # Seven tokens a question with its answer: of the third answer, one is within the limit of 20.
        assert rendered[3:] == [1, 2, 3, 4, 5, 6, 7]
        assert found[1].labels.tolist() == [7, 2, 7, 2, 7]


# -- the child -------------------------------------------------------------------------------------------------


def die(number: int) -> Callable[[bytes], list[bytes]]:
    def work(request: bytes) -> list[bytes]:
        os.kill(os.getpid(), number)
        time.sleep(60)
        return []

    return work


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGABRT, "needs more than the 256 MiB of memory"),
        (signal.SIGKILL, "needs more than the 256 MiB of memory"),
        (signal.SIGSEGV, "crashed the library that reads it (SIGSEGV)"),
    ],
)
def test_dead_child_is_an_error_that_names_the_place(number: signal.Signals, words: str) -> None:
    note = Note("shorten it")
    note.set_place("file.jsonl:7", DataError)
    with Child(die(number), note) as one:
        refused(DataError, one.call, f"file.jsonl:7 {words}")
    assert one._pid == 0


def test_child_reaped_by_the_system_is_handled() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with Child(die(signal.SIGABRT), Note("shorten it")) as one:
            refused(DloraError, one.call, "needs more than the 256 MiB of memory")
        with Child(lambda _: [b"x"], Note("shorten it")) as one:
            assert one.call() == [b"x"]
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_errors_of_the_child_arrive_unchanged() -> None:
    raised: list[DloraError] = [
        RemoteProtocolError("one", "non_finite"),
        RefusedError("two", "quota", retry_after_s=3.5),
        *(kind("text") for kind in vars(errors).values() if _takes_a_text(kind)),
    ]

    def work(request: bytes) -> list[bytes]:
        raise raised[int(request)]

    with Child(work, Note("shorten it")) as one:
        for at, error in enumerate(raised):
            with pytest.raises(DloraError) as caught:
                one.call(str(at).encode())
            assert type(caught.value) is type(error)
            assert str(caught.value) == str(error)
            assert vars(caught.value) == vars(error)


def _takes_a_text(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, DloraError) and kind is not RefusedError


def test_a_bug_in_the_child_keeps_its_traceback() -> None:
    def work(request: bytes) -> list[bytes]:
        raise ZeroDivisionError("ours")

    with Child(work, Note("shorten it")) as one, pytest.raises(RuntimeError, match="ZeroDivisionError: ours"):
        one.call()


@pytest.mark.usefixtures("impatient")
def test_child_that_makes_progress_is_not_stopped() -> None:
    note = Note("shorten it")

    def work(request: bytes) -> list[bytes]:
        for at in range(28):  # longer than one place may take, and never in one place for long
            note.set_place(f"line {at}", DataError)
            time.sleep(0.25)
        return [b"done"]

    heard: list[str] = []
    with Child(work, note, heard.append) as one:
        assert one.call() == [b"done"]
    assert heard
    assert all(place.startswith("line ") for place in heard)


def test_an_interrupt_ends_the_child_as_well() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    one = Child(lambda _: time.sleep(60) or [], Note("shorten it"))
    pids = []

    def wait_for_it() -> None:
        with one:
            pids.append(one._pid)
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            one.call()

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            wait_for_it()
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


@pytest.mark.skipif(sys.platform != "linux", reason="others have no way to ask for it")
@pytest.mark.parametrize("start_s", [0, 1])
def test_a_child_does_not_outlive_its_parent(start_s: int) -> None:
    """Nor where the parent is killed while the child still sets itself up."""
    code = (
        "import os, time\nfrom dlora.protocol import child\nfrom dlora.protocol.child import Child, Note\n"
        f"path = child.Path\nchild.Path = lambda name: time.sleep({start_s}) or path(name)\n"
        "with Child(lambda _: time.sleep(600) or [], Note('')) as one:\n    print(one._pid, flush=True)\n    one.call()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate(timeout=120)
    eventually(lambda: not _runs(pid))


def _runs(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()  # one that nobody has reaped yet is over
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_process_group_is_handled_by_the_parent(number: signal.Signals) -> None:
    """systemd and Ctrl-C tell the child as well: that it ended first must not look as if a library crashed."""

    def work(request: bytes) -> list[bytes]:
        os.kill(os.getpid(), number)
        return [b"still here"]

    with Child(work, Note("shorten it")) as one:
        assert one.call() == [b"still here"]
