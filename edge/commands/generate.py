"""``dlora-edge generate``: an answer to a prompt, as it comes."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from dlora.edge.files import read_small
from dlora.edge.settings import Settings
from dlora.protocol.errors import DataError, UsageError
from dlora.protocol.text import visible_json

from .model_options import UsedModel, check_model, takes_model
from .options import AdapterOption, JsonOption, LendOption, RecordOption, VerboseOption
from .output import print_answer, warn
from .sampling_options import DraftOption, MaxNewTokensOption, SamplingOptions, StopOption

if TYPE_CHECKING:
    from dlora.edge.data.prompt import Message, PromptTokenizer
    from dlora.edge.generation.generate import Counters
    from dlora.edge.generation.sampling import Choice

_MOST_BYTES: Final = 64 << 20  # of a chat


@takes_model()
def generate(
    settings: Settings,
    adapter: AdapterOption = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="What to say to the model; a user's turn where it has a chat template. Without it: stdin."),
    ] = None,
    messages: Annotated[
        Path | None, typer.Option(help="A chat to answer: a JSON list of messages with role and content.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told to be, before the prompt.")] = None,
    no_chat_template: Annotated[
        bool, typer.Option("--no-chat-template", help="Continue the prompt as it stands.")
    ] = False,
    max_new_tokens: MaxNewTokensOption = 256,
    sampling_options: SamplingOptions = SamplingOptions(),
    stop: StopOption = None,
    draft: DraftOption = "auto",
    lend_adapter: LendOption = False,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: each token with so many likeliest in its place.", min=0, max=20)
    ] = None,
    record: RecordOption = None,
    verbose: VerboseOption = False,
    json_output: JsonOption = False,
) -> None:
    """Answer a prompt with the base model or an adapter, token by token.

    Prompt, answer, adapter and the choice of tokens stay here; the server sees hidden states, and keeps keys and values
    of the text until the command ends. What that tells it: SECURITY.md.

    A terminal shows characters that would steer it as codes; a pipe or a file gets the answer as it is.
    """
    from dlora.edge.data.prompt import prompt_tokenizer
    from dlora.edge.wire.recorder import check_record, recording

    check_model(settings)
    check_record(record, is_local=settings.placement.device_blocks == "all")
    if lend_adapter and adapter is None:
        raise UsageError("--lend-adapter needs an --adapter to lend")
    if prompt is not None and messages is not None:
        raise UsageError("give --prompt or --messages, not both")
    asked_messages = None if messages is None else _read_messages(messages)
    text = _read_stdin() if prompt is None and messages is None else prompt
    sampling = sampling_options.sampling(logprobs=logprobs if json_output else None)
    used = UsedModel.of(settings, adapter, draft, lends=lend_adapter)
    with prompt_tokenizer(used.bundle) as tokenizer, recording(record, used.bundle.tokenizer_file(), warn) as recorder:
        from dlora.edge.generation.answer import TextAnswer
        from dlora.edge.generation.prompt import Prompt
        from dlora.edge.model.context import Context

        if system is not None and (text is None or no_chat_template or not tokenizer.has_chat_template):
            raise UsageError("--system needs a --prompt and a chat template; with --messages, write it as a message")
        if text is None:
            asked = Prompt(messages=asked_messages)
        else:
            asked = Prompt.of_text(text, tokenizer, system=system, as_it_is=no_chat_template)
        context_length = len(asked.encode(tokenizer)) + max_new_tokens
        with used.open_generating(context_length=context_length, recorder=recorder) as model:
            answer = TextAnswer(
                Context(model),
                tokenizer,
                asked.encode(tokenizer, model.invocation, warn),
                sampling,
                max_new_tokens=max_new_tokens,
                stop=stop or (),
                drafts=draft,
            )
            for piece in answer:
                if not json_output:
                    print_answer(piece)
            tokens = [] if logprobs is None else [_token(choice, tokenizer) for choice in answer.choices]
    if json_output:
        result: dict[str, Any] = {"prompt": text if asked_messages is None else asked_messages, "answer": answer.text}
        result |= {"finish_reason": answer.finish_reason, **asdict(answer.counters)}
        print(visible_json(result | ({"logprobs": tokens} if tokens else {})))
    else:
        print(flush=True)
        if verbose:
            print(summary_line(answer.counters), file=sys.stderr)


def summary_line(counters: Counters) -> str:
    """What an answer took, for people."""
    tokens, later_s = counters.tokens, counters.seconds - counters.first_token_s
    rate = f", {(tokens - 1) / later_s:.1f} tokens/s" if tokens > 1 and later_s > 0 else ""
    each = max(1, tokens)
    drafts = f", {counters.accepted} of {counters.drafted} drafted tokens right" if counters.drafted else ""
    return (
        f"{tokens} tokens{rate}, the first after {counters.first_token_s:.2f} s; a token took "
        f"{counters.round_trips / each:.2f} round trips and {counters.bytes_sent / each / 1e3:.1f} KB up, "
        f"{counters.bytes_received / each / 1e3:.1f} KB down{drafts}"
    )


def _token(choice: Choice, tokenizer: PromptTokenizer) -> dict[str, Any]:
    top = [{"token": tokenizer.decode([token]), "id": token, "logprob": logprob} for token, logprob in choice.top]
    return {"token": tokenizer.decode([choice.token]), "id": choice.token, "logprob": choice.logprob, "top": top}


def _read_messages(path: Path) -> tuple[Message, ...]:
    from dlora.edge.generation.prompt import check_messages

    try:
        return check_messages(json.loads(read_small(path, _MOST_BYTES)))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON in UTF-8 ({error})") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _read_stdin() -> str:
    """The prompt that is piped in, without its last line end."""
    if sys.stdin.isatty():
        raise UsageError("nothing is asked; give --prompt or --messages, or pipe a prompt in")
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise DataError("the prompt is not UTF-8; say it in another way") from None
