"""Words that a user chooses among; read by the command line, so that nothing slow is here."""

from __future__ import annotations

from typing import Literal

TooLong = Literal["error", "truncate", "skip"]
"""What happens to examples with more tokens than are taken."""

TrainOn = Literal["answers", "all", "last"]
"""Which tokens are labels: those of answers, all of them, or those of the last answer."""

AnswerScore = Literal["exact", "contains", "regex", "likelihood"]
"""When an answer counts as right. exact: it is the reference, but for blanks; contains: it has the key in it, in any
case; regex: what the first match of a pattern finds in it is the key; likelihood: of the answers to choose among, the
key's is the likeliest."""

Keep = Literal["auto", "last", "best"]
"""Which adapter a run saves in the end. auto: the last, and the best where the last is worse than none."""

OnWorse = Literal["warn", "stop"]
"""What a run does that makes the model worse than it was."""

ScheduleName = Literal["constant", "linear", "cosine"]
"""How the learning rate goes after warm-up."""

EngineName = Literal["onnx", "executorch"]
"""What runs a bundle's graphs."""

EngineChoice = Literal["auto", EngineName]
"""An engine, or whichever there is."""
