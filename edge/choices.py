"""Words that a user chooses among. The command line reads them without loading what they steer."""

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
