"""Words that a user chooses among; read by the command line, so that nothing slow is here."""

from __future__ import annotations

from typing import Literal

TooLong = Literal["error", "truncate", "skip"]
"""What happens to examples with more tokens than are taken."""

Keep = Literal["last", "best"]
"""Which adapter a run saves in the end."""

EngineName = Literal["onnx", "executorch"]
"""What runs a bundle's graphs."""

EngineChoice = Literal["auto", EngineName]
"""An engine, or whichever there is."""
