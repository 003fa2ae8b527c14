"""``dlora-edge serve``: the model, and adapters, for any client that speaks OpenAI's API."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated, Final

import typer

from dlora.edge.settings import Settings
from dlora.protocol.command import extra_needed
from dlora.protocol.errors import UsageError

from .model_options import UsedModel, check_model, find_adapter, takes_model
from .options import AdapterOption, AdaptersOption, JsonOption, LendOption
from .sampling_options import ChatSamplingOptions, ContextLengthOption, DraftOption, MaxNewTokensOption

LONGEST_OUTAGE_S: Final = 60.0  # a client waits for its answer, and gives up itself


@takes_model()
def serve(
    settings: Settings,
    adapter: AdapterOption = None,
    adapters: AdaptersOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8080,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key that clients show; else DLORA_API_KEY.")
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(help="Other web page that may use it, https://HOST; may be given several times.")
    ] = None,
    parallel: Annotated[int, typer.Option(help="Answers at a time, each with its own session.", min=1, max=64)] = 2,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more are told to come again.", min=0)] = 32,
    context_length: ContextLengthOption = 4096,
    max_new_tokens: MaxNewTokensOption = 1024,
    sampling_options: ChatSamplingOptions = ChatSamplingOptions(),
    draft: DraftOption = "auto",
    lend_adapter: LendOption = False,
    json_output: JsonOption = False,
) -> None:
    """Serve OpenAI's API on this device: http://127.0.0.1:8080/v1 in any client, and a page to chat on beside it.

    Each adapter of the directory is a model by its name, and so is the plain base model. Prompts, answers and adapters
    stay here; the server of the base model sees hidden states, and keeps keys and values of the last texts.
    What that tells it: SECURITY.md.
    """
    with extra_needed("serve"):
        from dlora.edge.adapters.store import default_directory
        from dlora.edge.data.prompt import prompt_tokenizer
        from dlora.edge.endpoint.running import Listening, ServeSettings, run

    check_model(settings)
    listening = Listening.checked(host, port, api_key_file, cors or ())
    sampling = sampling_options.sampling()
    if adapters is not None and not adapters.is_dir():
        raise UsageError(f"--adapters {adapters} is no directory")
    directory, stopping = adapters or default_directory(), threading.Event()
    used = UsedModel.of(settings, adapter, draft, lends=lend_adapter)
    with prompt_tokenizer(used.bundle, for_long=True) as tokenizer:
        serving = ServeSettings(
            bundle=used.bundle,
            tokenizer=tokenizer,
            open_model=lambda path: used.with_adapter(path).open_generating(
                context_length=context_length, longest_outage_s=LONGEST_OUTAGE_S, should_stop=stopping.is_set
            ),
            adapter=find_adapter(adapter, directory),
            adapters=directory,
            listening=listening,
            parallel=parallel,
            queue=queue,
            context_length=context_length,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            drafts=draft,
            json_output=json_output,
            stopping=stopping,
        )
        run(serving)
