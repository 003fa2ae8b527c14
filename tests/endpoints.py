"""``dlora-edge serve`` as a process, and all that it needs: a bundle, a server, adapters."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
from families import tiny_model
from generating import save_random_adapter
from processes import BIN, END_TIMEOUT_S, Command, quiet_environment
from serving import RunningServer, serving
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlora.cloud.model.base_model import BaseModel
from dlora.edge.endpoint.answers import Generation
from dlora.edge.endpoint.app import Served
from dlora.edge.endpoint.requests import PromptLimit
from dlora.edge.endpoint.slots import ServedAdapter, Slots
from dlora.edge.generation.sampling import Sampling
from dlora.export.bundle import export_bundle
from dlora.export.settings import ExportSettings
from dlora.protocol.manifest import MANIFEST_NAME

SPECIAL = ("<pad>", "<s>", "</s>", "<|python_tag|>")
VOCABULARY = 256 + len(SPECIAL)
TEMPLATE = (
    "{% if tools %}<s>tools <|python_tag|> {{ tools | tojson }}</s>{% endif %}"
    "{% for message in messages %}<s>{{ message['role'] }} {{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
ASK = [{"role": "user", "content": "Say something."}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CHAT = "/v1/chat/completions"
GOOD: dict[str, Any] = {"model": "first", "messages": ASK, "max_tokens": 1}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, so that anything can be said, JSON too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def replace_file(bundle: Path, role: str, text: str) -> None:
    """Give a bundle another tokenizer's ``file`` or ``chat_template``."""
    manifest = json.loads((bundle / MANIFEST_NAME).read_text())
    name = manifest["tokenizer"][role]
    (bundle / name).write_text(text)
    manifest["files"][name] = {"bytes": len(text.encode()), "sha256": sha256(text.encode()).hexdigest()}
    (bundle / MANIFEST_NAME).write_text(json.dumps(manifest))


@dataclass
class Place:
    bundle: Path
    model: Path
    adapters: Path
    cloud: RunningServer

    def with_template(self, template: str, made: Path) -> Place:
        """The same, with another chat template in a bundle that is ``made``."""
        shutil.copytree(self.bundle, made)
        replace_file(made, "chat_template", template)
        return replace(self, bundle=made)


@contextmanager
def endpoint_place(directory: Path) -> Iterator[Place]:
    """A bundle, a server of its base model, and two adapters beside a directory that is none."""
    model, bundle, adapters = (directory / name for name in ("model", "bundle", "adapters"))
    tiny = tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=2048)
    tiny.save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    export_bundle(ExportSettings(str(model), bundle, rank=4, alpha=8.0, head_dtype="fp32"))
    (adapters / "broken").mkdir(parents=True)
    with serving(BaseModel.from_model(tiny, "tiny"), max_sessions=16) as cloud:
        for seed, name in enumerate(("first", "second")):
            save_random_adapter(bundle, cloud.url, adapters / name, seed)
        yield Place(bundle, model, adapters, cloud)


def served_by(kind: type[Generation], encode: Any = lambda _: np.zeros(1, np.int64)) -> Served:
    """The HTTP side alone, with a generation of that kind, which needs no model."""
    tokenizer: Any = SimpleNamespace(encode_text=encode)
    return Served(
        base_name="base", adapters=lambda: [ServedAdapter("mine", Path("mine"))],
        generation=kind(tokenizer, lambda _: None, 8, None, print),  # type: ignore[arg-type, return-value]
        slots=Slots(1, 1), defaults=Sampling(), knows_tools=False, tool_form=None,
        prompt_limit=PromptLimit(100, 100), api_key=None, hosts=None,
        origins=(), log=lambda _: None, problem=lambda: None, is_stopping=lambda: False,
    )  # fmt: skip


@dataclass
class Endpoint:
    url: str
    port: int
    models: list[str]
    process: subprocess.Popen[str]

    def client(self, key: str = "none", **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=END_TIMEOUT_S, **settings)

    def request(
        self, path: str, body: bytes | dict[str, Any] | None = None, method: str = "POST", **headers: str
    ) -> tuple[int, dict[str, Any]]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=END_TIMEOUT_S)
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        connection.request(method, path, content, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def is_ready(self) -> bool:
        return self.request("/health", method="GET")[0] == 200


@contextmanager
def endpoint_process(
    place: Place, *arguments: object, server: str | None = None, most_files: int | None = None
) -> Iterator[Endpoint]:
    """``dlora-edge serve`` on a free port; ``most_files``: that it may have open."""
    command = [
        BIN / "dlora-edge", "serve", "--bundle", place.bundle, "--server", server or place.cloud.url, "--port", 0,
        "--json", "--threads", 1, "--wire-dtype", "fp32", *arguments,
    ]  # fmt: skip
    words, piped = [str(each) for each in command], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if most_files is None:
        process: subprocess.Popen[str] = Command(words, **piped)
    else:
        limited = ["sh", "-c", f'ulimit -n {most_files} && exec "$@"', "sh", *words]
        process = subprocess.Popen(limited, text=True, env=quiet_environment(), **piped)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        hello = json.loads(line)
        yield Endpoint(hello["url"], int(re.findall(r":(\d+)/", hello["url"])[0]), hello["models"], process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=END_TIMEOUT_S)
