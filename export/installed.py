"""Which executorch is installed, without loading it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from dlora.protocol.errors import MissingExtraError


def check_executorch() -> str:
    """The version of executorch that is installed. Raises ``MissingExtraError``."""
    spec = importlib.util.find_spec("executorch")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(place) / "version.py"
        if path.exists() and (found := re.search(r"__version__ = ['\"]([^'\"+]+)", path.read_text())):
            return found[1]
    raise MissingExtraError(
        "executorch is not installed; --engine executorch needs the extra 'executorch': pip install 'dlora[executorch]'"
    )
