"""How floating-point tensors cross the wire: read by the command line too, which must not wait for numpy."""

from __future__ import annotations

from typing import Literal

WireDtype = Literal["fp16", "fp32"]
"""As the device asks for it in ``OpenSession``."""
