"""How an answer's tokens are chosen, by every command that generates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from dlora.protocol.choices import Drafts

if TYPE_CHECKING:
    from dlora.edge.generation.sampling import Sampling

TemperatureOption = Annotated[
    float, typer.Option(help="0: always the likeliest token; above it, the higher the more varied.", min=0)
]
TopPOption = Annotated[float, typer.Option(help="Choose among the likeliest with this probability together.")]
StopOption = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given several times.")]
MaxNewTokensOption = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]
DraftOption = Annotated[
    Drafts,
    typer.Option(
        help="Who guesses the next tokens, to save round trips; the answer is the same. server: the base model there. "
        "prompt: what followed the same words before. auto: whichever pays, as many as pay. off: nobody.",
        metavar="WHO",
    ),
]

ContextLengthOption = Annotated[
    int, typer.Option(help="Longest text, question and answer, in tokens; the server keeps room for it.", min=16)
]


@dataclass(frozen=True)
class SamplingOptions:
    """As a group of options."""

    temperature: TemperatureOption = 0.0
    top_k: Annotated[int, typer.Option(help="Choose among so many likeliest tokens; 0: all.", min=0)] = 0
    top_p: TopPOption = 1.0
    min_p: Annotated[
        float, typer.Option(help="Choose among tokens at least so likely, as a part of the likeliest.")
    ] = 0.0
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: makes what was said before less likely.")] = 1.0
    seed: Annotated[int | None, typer.Option(help="The same answer each time, where one is drawn.", min=0)] = None

    def sampling(self, *, logprobs: int | None = None) -> Sampling:
        """As the sampler takes them. Raises ``UsageError``."""
        from dlora.edge.generation.sampling import Sampling

        return Sampling(**asdict(self), logprobs=logprobs)


@dataclass(frozen=True)
class ChatSamplingOptions(SamplingOptions):
    """The same for chats, which one would not have each answer twice."""

    temperature: TemperatureOption = 0.7
    top_p: TopPOption = 0.95
