"""An audit of what really crossed, on a tiny model: what it must find and must not, and what it says of bad files."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from processes import run_cloud, run_edge
from recordings import opened, record_training, record_trunk
from safetensors.numpy import load, save
from serving import config, serving, training
from test_given_units import RANDOM
from test_trunk_command import records
from tiny import Tiny, TinyFactory

from dlora.cloud.audit.audit import Audit, run_audit
from dlora.cloud.audit.finding import Finding
from dlora.cloud.audit.observed import observe
from dlora.cloud.audit.page import page
from dlora.cloud.audit.scoring import Verdict
from dlora.cloud.audit.tokenizer import truth_tokenizer
from dlora.cloud.commands.audit import audit as audit_command
from dlora.cloud.serving.timeouts import SessionTimeouts
from dlora.edge.data.examples import Dataset
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.edge.wire.recorder import Recorder
from dlora.protocol import child
from dlora.protocol import messages as m
from dlora.protocol.errors import DataError, DloraError, ModelMismatchError, UsageError
from dlora.protocol.frames import Decoder, encode, read_prefix
from dlora.protocol.recording import FRAMES_FILE, TOKENIZER_FILE, TRUTH_FILE, FramesWriter, read_recording
from dlora.protocol.tensors import WireTensor

pytestmark = pytest.mark.slow

STEPS = 4
BLOCKS = 4


@pytest.fixture(scope="module")
def model(tiny: TinyFactory) -> Tiny:
    return tiny(blocks=BLOCKS, device_blocks=3, head_dtype="fp32")


@pytest.fixture(scope="module")
def data(model: Tiny) -> Dataset:
    """Prompts of different lengths that end in the same two tokens, and answers."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(24):
        prompt = [*rng.integers(10, model.base.vocabulary_size, int(rng.integers(3, 7))), 4, 5]
        answer = rng.integers(10, model.base.vocabulary_size, 3)
        ids = [int(token) for token in (*prompt, *answer)]
        made.append((ids, list(range(len(prompt) - 1, len(ids) - 1))))
    return Dataset.of(made)


@pytest.fixture(scope="module")
def url(model: Tiny) -> Iterator[str]:
    with serving(model.base) as server:
        yield server.url


@pytest.fixture(scope="module")
def recordings(model: Tiny, data: Dataset, url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("recordings")
    common = {"total_steps": STEPS, "batch_size": 4, "grad_accum": 2, "target_modules": ("all-linear",)}
    bottleneck = {"kind": "bottleneck", "basis_steps": 2, "wire_dtype": "int8"}
    for name, more in (
        ("lora", {"kind": "lora", "wire_dtype": "fp16"}),
        ("bottleneck", bottleneck),
        ("ffa", {"kind": "ffa", "wire_dtype": "fp16"}),
        ("passes", {**bottleneck, "passes": "2,2"}),
    ):
        record_training(model, url, directory / name, data, **common, **more)
    record_trunk(model, url, directory / "trunk", data, blocks=(2, 3))
    return {path.name: path for path in directory.iterdir()}


@pytest.fixture(scope="module")
def audits(model: Tiny, recordings: dict[str, Path]) -> dict[str, Audit]:
    return {name: run_audit(*opened(path), model.base) for name, path in recordings.items()}


def finding(audit: Audit, secret: str) -> Finding:
    (found,) = (each for each in audit.findings if each.secret == secret)
    return found


@pytest.mark.parametrize("run", ["lora", "bottleneck", "ffa", "passes"])
def test_what_crosses_in_split_is_exposed(audits: dict[str, Audit], run: str) -> None:
    audit = audits[run]
    for secret in ("text", "labels", "adapter", "gradients", "prompt lengths", "membership", "lengths of texts"):
        assert finding(audit, secret).verdict is Verdict.EXPOSED, secret
    for secret in ("text", "labels", "prompt lengths", "membership"):
        best = finding(audit, secret).best
        assert best is not None
        assert best.figure == 1.0, (secret, best.found)
    adapter = finding(audit, "adapter").best
    assert adapter is not None
    assert adapter.interval[0] > 0.99
    if run != "lora":  # with fewer tokens than the rank
        names = {attack.name: attack for attack in finding(audit, "adapter").attacks}
        assert names["replay of the optimiser"].interval[0] > 0.99


def test_of_trunk_the_text_is_exposed_and_what_is_trained_is_not(audits: dict[str, Audit]) -> None:
    audit = audits["trunk"]
    for secret in ("text", "prompt lengths", "membership", "labels fed back as text"):
        assert finding(audit, secret).verdict is Verdict.EXPOSED, secret
    for secret in ("labels never fed back", "adapter", "gradients"):
        found = finding(audit, secret)
        assert found.verdict is Verdict.BY_CONSTRUCTION, secret
        assert not found.attacks
        (named,) = re.findall(r"(tests/\w+\.py)::(\w+)", found.why)
        assert f"def {named[1]}(" in Path(named[0]).read_text()
    assert "24 of 72" in finding(audit, "labels never fed back").why  # the last of three labels is never fed back


def test_a_run_without_an_adapter_has_none_to_find(model: Tiny, data: Dataset, url: str, tmp_path: Path) -> None:
    with (
        Recorder(tmp_path) as recorder,
        training(model.bundle, url, config(), data, ConnectSettings(recorder=recorder)) as trainer,
    ):
        trainer.run_step()
    audit = run_audit(*opened(tmp_path), model.base)
    assert finding(audit, "adapter").verdict is None  # B is still zero
    assert finding(audit, "text").verdict is Verdict.EXPOSED


def test_recording_costs_no_bit(model: Tiny, data: Dataset, url: str, tmp_path: Path) -> None:
    weights = []
    for recorder in (None, Recorder(tmp_path / "recorded")):
        with training(model.bundle, url, config(), data, ConnectSettings(recorder=recorder)) as trainer:
            for _ in range(3):
                trainer.run_step()
            weights.append({name: each.value.tobytes() for name, each in trainer.adapters.parameters().items()})
    assert weights[0] == weights[1]


def test_only_its_owner_may_read_the_truth(recordings: dict[str, Path]) -> None:
    for path in recordings.values():
        assert stat.S_IMODE((path / "truth").stat().st_mode) == 0o700
        assert stat.S_IMODE((path / "truth" / TRUTH_FILE).stat().st_mode) == 0o600
        assert stat.S_IMODE((path / "frames" / FRAMES_FILE).stat().st_mode) == 0o600


def test_frames_alone_have_no_truth(recordings: dict[str, Path], data: Dataset) -> None:
    """What attackers are given has no token ids, so that they cannot cheat."""
    content = (recordings["lora"] / "frames" / FRAMES_FILE).read_bytes()
    for example in data:
        assert example.ids.astype("<i4").tobytes() not in content
        assert example.ids.astype("<i8").tobytes() not in content


def test_a_page_needs_nothing_else_and_escapes_what_strangers_wrote(model: Tiny, recordings: dict[str, Path]) -> None:
    seen, truth = opened(recordings["trunk"])
    evil = "<script>alert(1)</script>"
    html = page(run_audit(seen, truth, model.base, phrases=[evil]))
    assert evil not in html
    assert "&lt;script&gt;" in html
    assert not re.search(r"(src|href)=|@import|url\(", html)
    assert "prefers-color-scheme: dark" in html
    assert "BY CONSTRUCTION" in html


class _Broken:
    """Recordings that are not what they should be."""

    def __init__(self, recordings: dict[str, Path], directory: Path) -> None:
        self.frames, self.truth = directory / "frames", directory / "truth"
        self._recordings = recordings
        self.frames.mkdir()
        self.truth.mkdir()
        (self.frames / FRAMES_FILE).write_bytes(self.of("ffa", FRAMES_FILE))
        (self.truth / TRUTH_FILE).write_bytes(self.of("ffa", TRUTH_FILE))

    def of(self, name: str, file: str) -> bytes:
        part = "frames" if file == FRAMES_FILE else "truth"
        return (self._recordings[name] / part / file).read_bytes()

    def audit(self, model: Path) -> str:
        """The line that it says."""
        with pytest.raises(DloraError) as caught:
            audit_command(str(model), self.frames, self.truth, self.frames.parent / "audit.html")
        assert type(caught.value) in (DataError, ModelMismatchError, UsageError)
        assert "\n" not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def broken(recordings: dict[str, Path], tmp_path: Path) -> _Broken:
    return _Broken(recordings, tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "line"),
    [
        (FRAMES_FILE, lambda whole: whole[:-7], "is torn: what begins at byte"),
        (FRAMES_FILE, lambda whole: whole[:20], "is no recording of frames"),
        (FRAMES_FILE, lambda _: b"", "is no recording of frames"),
        (FRAMES_FILE, lambda whole: b"GIF89a" + whole, "is no recording of frames"),
        (FRAMES_FILE, lambda whole: whole[:32], "has no micro-batch"),
        (FRAMES_FILE, lambda whole: whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:], "cannot be read"),
        (FRAMES_FILE, lambda _: None, "cannot be read"),
        (TRUTH_FILE, lambda whole: whole[:-9], "is no truth that can be read"),
        (TRUTH_FILE, lambda _: b"", "is no truth that can be read"),
        (TRUTH_FILE, lambda whole: whole.replace(b'\\"format\\":1', b'\\"format\\":9'), "is no truth that can be read"),
        (TRUTH_FILE, lambda whole: whole.replace(b'\\"modes\\"', b'\\"nodes\\"'), "is no truth that can be read"),
        (TRUTH_FILE, lambda _: None, "does not exist"),
    ],
)
def test_a_damaged_or_missing_file_is_one_line(
    model: Tiny, broken: _Broken, file: str, change: Callable[[bytes], bytes | None], line: str
) -> None:
    path = (broken.frames if file == FRAMES_FILE else broken.truth) / file
    whole = path.read_bytes()
    path.unlink()
    if (content := change(whole)) is not None:
        assert content != whole
        path.write_bytes(content)
    assert line in broken.audit(model.model)


def test_a_truth_of_another_recording_is_one_line(model: Tiny, broken: _Broken) -> None:
    (broken.truth / TRUTH_FILE).write_bytes(broken.of("lora", TRUTH_FILE))
    assert "is the truth of another recording" in broken.audit(model.model)


def test_frames_of_another_model_are_one_line(tiny: TinyFactory, broken: _Broken) -> None:
    assert "the frames are of another base model" in broken.audit(tiny(blocks=BLOCKS, seed=1).model)


def test_a_second_recording_in_a_directory_is_refused(recordings: dict[str, Path]) -> None:
    before = {path: path.read_bytes() for path in recordings["ffa"].rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="there is a recording already"):
        Recorder(recordings["ffa"])
    assert {path: path.read_bytes() for path in before} == before


def test_a_recording_of_nothing_leaves_nothing(tmp_path: Path) -> None:
    with Recorder(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()


def test_a_full_recording_goes_no_further(
    model: Tiny, data: Dataset, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlora.edge.wire.recorder.MOST_BYTES", 100_000)
    lines: list[str] = []
    with (
        Recorder(tmp_path, lines.append) as recorder,
        training(model.bundle, url, config(total_steps=50), data, ConnectSettings(recorder=recorder)) as trainer,
    ):
        while not recorder.is_full:
            trainer.run_step()
        trainer.run_step()
    assert "takes no more" in lines[0]
    seen, truth = opened(tmp_path)
    assert len(seen.micro_batches) == len(truth.micro_batches)
    assert finding(run_audit(seen, truth, model.base), "text").verdict is Verdict.EXPOSED  # and its last one is torn


@pytest.fixture(params=["full", "int8"])
def served(request: pytest.FixtureRequest, tiny: TinyFactory) -> Iterator[tuple[Tiny, str]]:
    """A model whose weights are held in one way or another, and its server's address."""
    model = tiny(blocks=BLOCKS, device_blocks=3, head_dtype="fp32", weight_format=request.param)
    with serving(model.base) as server:
        yield model, server.url


def test_the_commands_from_recording_to_page(served: tuple[Tiny, str], tmp_path: Path) -> None:
    model, url = served
    data, record = tmp_path / "data.jsonl", tmp_path / "record"
    data.write_text(records(8))
    common = ("--bundle", model.bundle, "--server", url)
    trained = run_edge(
        "train", *common, "--data", data, "--out", tmp_path / "run", "--kind", "lora", "--steps", 2, "--record", record
    )
    assert trained.code == 0, trained.stderr
    assert "gets this run's text, labels, adapter and gradients, in the clear" in trained.stderr
    done = run_cloud(
        "audit", model.model, "--frames", record, "--truth", record, "--out", tmp_path / "audit.html",
        "--phrase", "w17", "--phrase", "nowhere to be found", "--json",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    said = json.loads(done.stdout)
    assert said == json.loads((tmp_path / "audit.json").read_text())
    verdicts = {each["secret"]: each["verdict"] for each in said["findings"]}
    assert {verdicts[secret] for secret in ("text", "labels", "adapter", "gradients", "membership")} == {"EXPOSED"}
    assert verdicts["the phrase 'nowhere to be found'"] is None
    assert verdicts["the phrase 'w17'"] in ("EXPOSED", None)
    html = (tmp_path / "audit.html").read_text()
    assert json.loads(data.read_text().splitlines()[0])["text"].split()[0] in html
    assert (tmp_path / "audit.html").stat().st_mode & 0o077 == 0

    for command in (("evaluate", "--data", data), ("generate", "--prompt", "w3 w4", "--max-new-tokens", 3)):
        recorded = run_edge(*command, *common, "--adapter", tmp_path / "run", "--record", tmp_path / command[0])
        assert recorded.code == 0, recorded.stderr
        audit = run_audit(*opened(tmp_path / str(command[0])), model.base)
        assert finding(audit, "text").verdict is Verdict.EXPOSED
        texts = 8 if command[0] == "evaluate" else 1
        assert len(audit.texts) == texts  # tokens that go on from each other are one text
        assert audit.clear[0].startswith(f"{texts} text")
        assert (finding(audit, "labels").verdict is None) == (command[0] == "generate")
    refused = run_edge("evaluate", "--data", data, "--bundle", model.bundle, "--device-blocks", "all", "--record", "x")
    assert refused.code == 2
    assert "nothing does: leave it out" in refused.stderr


# -- truths and frames of strangers ----------------------------------------------------------------------


Change = Callable[[dict[str, Any], dict[str, np.ndarray]], None]


def changed_truth(content: bytes, change: Change) -> bytes:
    """A truth with other tensors, or another description."""
    tensors = dict(load(content))
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    about = json.loads(header["__metadata__"]["truth"])
    change(about, tensors)
    return save(tensors, {"truth": json.dumps(about)})


def put(name: str, value: Callable[[np.ndarray], np.ndarray]) -> Change:
    def change(_: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        found = next(each for each in sorted(tensors) if re.fullmatch(name, each))
        tensors[found] = np.ascontiguousarray(value(tensors[found]))

    return change


def set_about(**changes: Any) -> Change:
    def change(about: dict[str, Any], _: dict[str, np.ndarray]) -> None:
        about.update({name: value(about[name]) for name, value in changes.items()})

    return change


@pytest.mark.parametrize(
    "change",
    [
        put(r"micro_batch.0.ids", lambda ids: ids[:-1]),
        put(r"micro_batch.0.ids", lambda ids: -ids),
        put(r"micro_batch.0.ids", lambda ids: ids + (1 << 40)),
        put(r"micro_batch.0.ids", lambda ids: ids[None]),
        put(r"micro_batch.0.ids", lambda ids: ids.astype(np.float32)),
        put(r"micro_batch.0.lengths", lambda lengths: lengths[:0]),
        put(r"micro_batch.0.lengths", lambda lengths: lengths[0]),
        put(r"micro_batch.0.labels", lambda labels: labels[:-1]),
        put(r"micro_batch.0.labels", lambda labels: labels.astype(np.float32)),
        put(r"micro_batch.0.label_positions", lambda positions: positions + 1_000_000),
        put(r"example.0.label_positions", lambda positions: positions[:0]),
        put(r"example.0.label_positions", lambda positions: positions + 1_000_000),
        put(r"example.0.ids", lambda ids: ids.astype(np.float32)),
        put(r"parameters.0.*", lambda values: values[:, :-1]),
        put(r"parameters.0.*", lambda values: values.astype(np.int32)),
        put(r"parameters.1.*", lambda values: values * np.float32(np.nan)),
        put(r"gradients.0.*", lambda values: values[:-1]),
        put(r"gradients.0.*", lambda values: values + np.float32(np.inf)),
        set_about(snapshots=lambda _: []),
        set_about(snapshots=lambda each: [{**snapshot, "scales": snapshot["scales"][:-1]} for snapshot in each]),
        set_about(snapshots=lambda each: [{**snapshot, "scales": [1e300] * 99} for snapshot in each]),
        set_about(snapshots=lambda each: [{**snapshot, "micro_batch": 99} for snapshot in each]),
        set_about(gradients=lambda each: [{**gradients, "snapshot": 99} for gradients in each]),
        set_about(gradients=lambda each: [{**gradients, "snapshot": -1} for gradients in each]),
        set_about(gradients=lambda each: [{**gradients, "first": -9} for gradients in each]),
        set_about(modes=lambda modes: modes[:-5]),
        set_about(examples=lambda count: count + 1),
        set_about(format=lambda _: 2),
        set_about(snapshots=lambda each: [{**each[0], "names": [each[0]["names"][0] * 1000, *each[0]["names"][1:]]}]),
        set_about(snapshots=lambda each: each * 1000),
        set_about(gradients=lambda each: each * 1000),
    ],
)
def test_a_truth_that_cannot_be_is_one_line(model: Tiny, broken: _Broken, change: Change) -> None:
    (broken.truth / TRUTH_FILE).write_bytes(changed_truth(broken.of("lora", TRUTH_FILE), change))
    (broken.frames / FRAMES_FILE).write_bytes(broken.of("lora", FRAMES_FILE))
    said = broken.audit(model.model)
    assert "is not what was recorded with the frames" in said or "is no truth that can be read" in said


def doubling(times: int) -> dict[str, Any]:
    """A decoder that doubles a token so often."""
    return {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"Regex": "^w"}, "content": "a"},
        *[{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * times,
    ]}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoder": doubling(12)}, "characters of"),
        pytest.param({"decoder": doubling(40)}, "needs more than the 64 MiB of memory", marks=pytest.mark.slow),
        ({"model": {"type": "WordLevel", "vocab": 7}}, "is no tokenizer that can be read"),
    ],
    ids=["a long text", "all memory", "damaged"],
)
def test_a_tokenizer_of_a_stranger_harms_no_audit(
    model: Tiny, broken: _Broken, changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it makes of tokens it makes in a child with a limit of memory, and it makes no more than tokens can be."""
    monkeypatch.setattr(child, "spare_bytes", lambda: 1 << 26)
    whole = json.loads((model.model / TOKENIZER_FILE).read_text())
    (broken.truth / TOKENIZER_FILE).write_bytes(json.dumps({**whole, **changes}).encode())
    said = broken.audit(model.model)
    assert said.startswith(str(broken.truth / TOKENIZER_FILE))
    assert words in said
    assert "tokens are then shown as numbers" in said


def test_an_audit_loads_no_tokenizer_itself(model: Tiny, recordings: dict[str, Path], tmp_path: Path) -> None:
    """The texts come from a child, and none is left behind."""
    (tmp_path / TRUTH_FILE).write_bytes((recordings["ffa"] / "truth" / TRUTH_FILE).read_bytes())
    (tmp_path / TOKENIZER_FILE).write_bytes((model.model / TOKENIZER_FILE).read_bytes())
    with truth_tokenizer(tmp_path) as tokenizer:
        assert tokenizer is not None
        before = Path(f"/proc/{tokenizer._child._pid}/limits").read_text()
        assert re.search(r"Max address space +\d+ ", before)
        assert tokenizer.decode([7, 8]) == "w0w1"
        pid = tokenizer._child._pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    code = (
        "import sys\nfrom pathlib import Path\nfrom dlora.cloud.audit.tokenizer import truth_tokenizer\n"
        f"with truth_tokenizer(Path({str(tmp_path)!r})) as it:\n    assert it.decode([7]) == 'w0'\n"
        "assert 'tokenizers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_frames_that_are_a_pipe_are_one_line(model: Tiny, broken: _Broken) -> None:
    (broken.frames / FRAMES_FILE).unlink()
    os.mkfifo(broken.frames / FRAMES_FILE)
    assert "cannot be read (it is no regular file)" in broken.audit(model.model)


def test_what_a_user_may_get_wrong_is_one_line(model: Tiny, recordings: dict[str, Path], tmp_path: Path) -> None:
    good = {"model": str(model.model), "frames": recordings["ffa"], "truth": recordings["ffa"]}
    (tmp_path / "package.json").write_text("{}")
    for wrong, line in (
        ({"out": tmp_path / "audit.json"}, "ends in .html"),
        ({"out": tmp_path / "audit"}, "ends in .html"),
        ({"out": tmp_path / "no" / "audit.html"}, "ends in .html"),
        ({"out": tmp_path / "package.html"}, "which is no audit"),
        ({"phrase": [" "]}, "--phrase is empty"),
        ({"phrase": ["w3"]}, "--phrase needs the truth's tokenizer.json"),
        ({"model": str(tmp_path / "[/b]")}, "does not exist"),
        ({"frames": tmp_path / "package.json"}, "is no recording"),
        ({"truth": tmp_path / "package.json"}, "is no truth"),
    ):
        with pytest.raises(UsageError if "is no" not in line or "audit" in line else DataError, match=line):
            audit_command(**{"out": tmp_path / "audit.html", **good, **wrong})
    assert (tmp_path / "package.json").read_text() == "{}"


def without_group_inputs(message: m.AnyMessage) -> m.AnyMessage | None:
    return None if isinstance(message, m.GroupInput) and message.groups == (1,) else message


def without_numbers(message: m.AnyMessage) -> m.AnyMessage | None:
    if isinstance(message, m.GroupInput):
        rows = np.full(message.hidden_states.data.shape, np.nan, np.float32)
        return structs.replace(message, hidden_states=WireTensor("fp32", rows))
    return message


def of_one_width(message: m.AnyMessage) -> m.AnyMessage | None:
    if isinstance(message, m.GroupDelta):
        return structs.replace(message, deltas=(WireTensor("fp32", np.ones((1, 1), np.float32)),))
    return message


@pytest.mark.parametrize("change", [without_group_inputs, without_numbers, of_one_width])
def test_frames_that_are_no_conversation_are_one_line(
    model: Tiny, broken: _Broken, change: Callable[[m.AnyMessage], m.AnyMessage | None]
) -> None:
    """Each of them is a whole message, sealed anew."""
    recording = read_recording(broken.frames)
    with (broken.frames / FRAMES_FILE).open("wb") as file:
        writer = FramesWriter(file, recording.id)
        for each in recording.frames:
            prefix = read_prefix(each.frame)
            message = change(Decoder().decode(each.frame))
            if message is not None:
                writer.add(each.time, encode(message, seq=prefix.seq, ack=prefix.ack), up=each.up)
    assert "fails on these frames" in broken.audit(model.model)


def test_a_recording_of_few_tokens_is_audited(tiny: TinyFactory, tmp_path: Path) -> None:
    """Fewer rows than the rank of what they are to give, and some that are zero."""
    small = tiny()
    data = Dataset.of([([int(token) for token in range(10 + row, 18 + row)], [5, 6]) for row in range(6)])
    with serving(small.base) as server:
        record_training(
            small, server.url, tmp_path, data, total_steps=2, batch_size=2, wire_dtype="fp16",
            target_modules=("all-linear",),
        )  # fmt: skip
    assert finding(run_audit(*opened(tmp_path), small.base), "text").verdict is Verdict.EXPOSED


# -- verdicts that must not claim more -------------------------------------------------------------------


def test_embeddings_that_hold_something_else_are_not_by_construction(model: Tiny, recordings: dict[str, Path]) -> None:
    seen, truth = opened(recordings["trunk"])
    for micro_batch in seen.micro_batches:
        sent = micro_batch.begun.hidden_states
        assert sent is not None
        changed = sent.data.copy()
        changed[:, ::2] *= changed.dtype.type(1.05)
        micro_batch.begun = structs.replace(micro_batch.begun, hidden_states=WireTensor(sent.dtype, changed))
    audit = run_audit(seen, truth, model.base)
    for secret in ("labels never fed back", "adapter", "gradients"):
        assert finding(audit, secret).verdict is Verdict.PARTIAL
        assert "are not those of the text" in finding(audit, secret).why


def test_a_label_that_another_text_shows_is_fed_back(model: Tiny, url: str, tmp_path: Path) -> None:
    """A conversation as a row a turn: what is last in one text is in the middle of the next."""
    turns = [[10, 11, 12], [10, 11, 12, 13, 14], [20, 21, 22]]
    record_trunk(model, url, tmp_path, Dataset.of([(ids, [len(ids) - 2]) for ids in turns]), blocks=(2, 3))
    audit = run_audit(*opened(tmp_path), model.base)
    assert finding(audit, "labels never fed back").why.startswith("2 of 3 labels")
    assert finding(audit, "labels fed back as text").attacks[0].found.startswith("1 of 1 labels")


def test_a_seed_that_was_chosen_is_exposed_whether_it_is_guessed_or_not(
    model: Tiny, data: Dataset, url: str, tmp_path: Path
) -> None:
    record_training(model, url, tmp_path, data, seed=(20_261_128,), total_steps=1)
    found = finding(run_audit(*opened(tmp_path), model.base), "seed")
    assert found.verdict is Verdict.EXPOSED
    assert "in under an hour" in found.attacks[0].found


def test_an_attack_that_was_not_tried_is_said(model: Tiny, recordings: dict[str, Path]) -> None:
    seen, truth = opened(recordings["ffa"])
    later = [each for each in seen.micro_batches if each.step > 0]
    skipped = len(seen.micro_batches) - len(later)
    seen = replace(seen, micro_batches=later)
    truth = replace(
        truth,
        micro_batches=truth.micro_batches[skipped:],
        parameters=[replace(each, micro_batch=max(0, each.micro_batch - skipped)) for each in truth.parameters],
        gradients=[replace(each, first=each.first - skipped, end=each.end - skipped) for each in truth.gradients[1:]],
    )
    adapter = finding(run_audit(seen, truth, model.base), "adapter")
    assert "replay of the optimiser was not tried" in adapter.why
    assert all(attack.name != "replay of the optimiser" for attack in adapter.attacks)


def test_a_lost_server_does_not_hide_an_adapter(model: Tiny, data: Dataset, tmp_path: Path) -> None:
    """The session is gone in the middle of a step, which is run again in another one."""
    run = config(kind="bottleneck", total_steps=STEPS, batch_size=4, target_modules=("all-linear",), basis_steps=2)
    settings = ConnectSettings(recorder=Recorder(tmp_path), retry=Retry(max_s=30.0, first_s=0.01, ceiling_s=0.1))
    assert settings.recorder is not None
    with (
        serving(model.base, timeouts=SessionTimeouts(park_s=0.0)) as server,
        settings.recorder,
        training(model.bundle, server.url, run, data, settings) as trainer,
    ):
        for step in range(STEPS):
            if step == 2:
                trainer.side.crossed._disconnect()
            trainer.run_step()
        assert trainer.side.crossed.reconnects == 1
    seen, truth = opened(tmp_path)
    assert len(seen.openings) == 2
    adapter = finding(run_audit(seen, truth, model.base), "adapter")
    names = {attack.name: attack.figure for attack in adapter.attacks}
    assert names["replay of the optimiser"] > 0.99


def test_recordings_of_several_runs_are_one_line(recordings: dict[str, Path]) -> None:
    lora, ffa = (read_recording(recordings[name]) for name in ("lora", "ffa"))
    with pytest.raises(DataError, match="of several runs"):
        observe(lora._replace(frames=[*lora.frames, *ffa.frames]))


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_what_is_given_to_the_server_is_exposed(
    model: Tiny, data: Dataset, url: str, tmp_path: Path, kind: str
) -> None:
    """Units that are killed and revived in turn; what is handed over is compared with what it was then."""
    record_training(
        model, url, tmp_path, data, kind=kind, total_steps=6, target_modules=("all-linear",), basis_steps=2,
        kill_revive={**RANDOM, "on_kill": "give_to_server"},
    )  # fmt: skip
    adapter = finding(run_audit(*opened(tmp_path), model.base), "adapter")
    names = {attack.name: attack for attack in adapter.attacks}
    assert adapter.verdict is Verdict.EXPOSED
    assert names["handed over as it is"].interval[0] > 0.999
