"""``dlora-edge chat``: talk in the terminal."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Final

import typer

from dlora.edge.settings import Settings
from dlora.protocol.errors import DloraError, StoppedError, UsageError
from dlora.protocol.text import one_line

from .generate import summary_line
from .model_options import UsedModel, check_model, find_adapter, takes_model
from .options import AdapterOption, AdaptersOption, LendOption, VerboseOption
from .output import print_answer, warn
from .sampling_options import ChatSamplingOptions, ContextLengthOption, DraftOption, MaxNewTokensOption

if TYPE_CHECKING:
    from dlora.edge.generation.chat import Chat
    from dlora.edge.model.context import Context

HELP: Final = '''\
/adapter NAME  use another adapter, a directory or one of --adapters; none: the plain base model
/reset         begin anew
/save FILE     write the chat as JSON, which is also what train takes as a line of data
/system TEXT   begin anew, with this as what the model is told to be
/help          this
/exit          leave; so does Ctrl-D
"""            begin and end a text of several lines
Ctrl-C         stop the answer'''


@takes_model()
def chat(
    settings: Settings,
    adapter: AdapterOption = None,
    adapters: AdaptersOption = None,
    system: Annotated[str | None, typer.Option(help="What the model is told to be.")] = None,
    max_new_tokens: MaxNewTokensOption = 1024,
    context_length: ContextLengthOption = 4096,
    sampling_options: ChatSamplingOptions = ChatSamplingOptions(),
    draft: DraftOption = "auto",
    lend_adapter: LendOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Talk to the model, with an adapter or without; /help tells what else can be said.

    What is said stays here, and is kept nowhere unless you say /save; the server sees hidden states. What that tells
    it: SECURITY.md.
    """
    from dlora.edge.data.prompt import prompt_tokenizer

    check_model(settings)
    sampling = sampling_options.sampling()
    used = UsedModel.of(settings, adapter, draft, lends=lend_adapter)
    with prompt_tokenizer(used.bundle) as tokenizer:
        from dlora.edge.adapters.store import default_directory
        from dlora.edge.generation.chat import Chat

        said = Chat(tokenizer, system=system, sampling=sampling, max_new_tokens=max_new_tokens, drafts=draft, say=_note)
        directory = adapters or default_directory()
        found = find_adapter(adapter, directory)
        with closing(_Talk(said, used, found, directory, context_length, verbose=verbose)) as talk:
            talk.run()


class _Stopping:
    """Ctrl-C: it stops an answer that is being made, and otherwise leaves the line that is being written."""

    def __init__(self) -> None:
        self.is_answering = False
        self._asked = False

    def is_asked(self) -> bool:
        return self._asked

    @contextmanager
    def answering(self) -> Iterator[None]:
        self.is_answering, self._asked = True, False
        try:
            yield
        finally:
            self.is_answering, self._asked = False, False

    @contextmanager
    def handling(self) -> Iterator[None]:
        before = signal.getsignal(signal.SIGINT)
        if before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.is_answering or self._asked:  # a second one does not wait for the server
            raise KeyboardInterrupt
        self._asked = True


def _path(text: str) -> Path:
    """A path as a user writes it, with ``~``. Raises ``UsageError``."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # Python's, for ``~nobody/file``
        raise UsageError(f"there is no such place ({error})") from None


class _Talk:
    """What is said, and the model that answers: opened when it is needed, and again after a failure."""

    def __init__(
        self,
        said: Chat,
        used: UsedModel,
        adapter: Path | None,
        adapters: Path,
        context_length: int,
        *,
        verbose: bool,
    ) -> None:
        self._verbose = verbose
        self._said = said
        self._used = used
        self._adapter = adapter
        self._adapters = adapters
        self._context_length = context_length
        self._stopping = _Stopping()
        self._open = ExitStack()
        self._context: Context | None = None

    def context(self) -> Context:
        """Raises what ``open_generating`` does."""
        from dlora.edge.model.context import Context

        if self._context is None:
            opening = self._used.with_adapter(self._adapter).open_generating(
                context_length=self._context_length, should_stop=self._stopping.is_asked
            )
            self._context = Context(self._open.enter_context(opening))
        return self._context

    def close(self) -> None:
        self._context = None
        with suppress(DloraError):
            self._open.close()

    def _use(self, adapter: Path | None) -> None:
        """Another adapter; where it cannot be opened, the one from before stays."""
        before, self._adapter = self._adapter, adapter
        self.close()
        try:
            self.context()
        except DloraError:
            self._adapter = before
            raise

    def run(self) -> None:
        """Until the user leaves."""
        with self._stopping.handling():
            self.context()  # a mistake shows before anything is said
            self._listen(is_terminal=sys.stdin.isatty())

    def _listen(self, *, is_terminal: bool) -> None:
        if is_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  # gives ``input`` its history and its keys
            _note("/help tells what can be said; Ctrl-D leaves")
        while (text := _read(is_terminal=is_terminal)) is not None:
            try:
                if text.startswith("/"):
                    if text.split()[0] in ("/exit", "/quit", "/bye"):
                        return
                    self._obey(text)
                elif text.strip():
                    self._answer(text)
            except StoppedError:
                _note("stopped")
            except KeyboardInterrupt:  # a second one, or one in the moment after an answer
                if not is_terminal:
                    raise
                _note("stopped")
            except DloraError as error:
                _note(f"error: {error}")

    def _obey(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        rest = rest.strip()
        match word:
            case "/help":
                print(HELP)
            case "/reset":
                self._said.reset()
                _note("begun anew")
            case "/system" if rest:
                self._said.reset(rest)
                _note("begun anew")
            case "/save" if rest:
                self._save(_path(rest))
            case "/adapter" if rest:
                self._use(None if rest == "none" else find_adapter(_path(rest), self._adapters))
                _note(f"now with {self._adapter or 'the plain base model'}")
            case _:
                raise UsageError(f"{text.split()[0]} is not understood, or lacks a word after it; /help tells what is")

    def _save(self, path: Path) -> None:
        from dlora.edge.files import write_atomically

        if path.exists() and not path.is_file():  # it would be replaced: a device, a directory
            raise UsageError(f"{path} is no file; choose another place")
        content = json.dumps({"messages": self._said.messages}, ensure_ascii=False)
        write_atomically(path, f"{content}\n".encode())
        _note(f"saved to {path}")

    def _answer(self, text: str) -> None:
        with self._stopping.answering():
            try:
                context = self.context()
                answer = self._said.ask(text, context, self._stopping.is_asked)
                for piece in answer:
                    print_answer(piece)
            except BaseException:
                # In the middle of a step: that session cannot go on. What was asked can be asked again.
                self.close()
                self._said.forget_last()
                print(flush=True)
                raise
        print(flush=True)
        self._said.keep(answer.text)
        context.model.release_weights()
        if answer.finish_reason == "cancelled":
            _note("stopped")
        if self._verbose:
            _note(summary_line(answer.counters))


def _read(*, is_terminal: bool) -> str | None:
    """What the user says next; None where that is nothing any more."""
    text = _read_line("> ", is_terminal=is_terminal)
    if text is None or not text.startswith('"""'):
        return text
    lines = [text[3:]]
    while not lines[-1].endswith('"""'):
        line = _read_line(". ", is_terminal=is_terminal)
        if line is None:
            break
        lines.append(line)
    return "\n".join(lines).removesuffix('"""').strip("\n")


def _read_line(prompt: str, *, is_terminal: bool) -> str | None:
    while True:
        try:
            if is_terminal:
                return input(prompt)
            line = sys.stdin.buffer.readline()
            return line.decode().removesuffix("\n") if line else None
        except EOFError:
            print()
            return None
        except UnicodeDecodeError:
            warn("this is not UTF-8; say it in another way")
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print()  # another line


def _note(text: str) -> None:
    print(one_line(text), file=sys.stderr, flush=True)
