"""The versions of the contracts: the wire, the bundle, and what lies beside a saved adapter."""

from typing import Final

SOFTWARE_VERSION: Final = "0.1.0"

PROTOCOL_VERSIONS: Final = (18,)
"""Wire versions that this code speaks, newest last. See docs/reference/protocol.md, section Evolution."""

BUNDLE_FORMAT: Final = 12
"""Bundle format that this code writes, and the newest that it reads. See docs/reference/bundle.md."""

ADAPTER_FORMAT: Final = 1
"""Format of ``dlora_adapter.json`` that this code writes, and the newest that it reads. See docs/how-to/adapters.md."""
