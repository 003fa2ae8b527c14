"""Writes files and directories so that they survive a power cut."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Put on the disk what a file holds, or which names a directory has. Raises ``OSError``."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network and phone file systems cannot do that for directories
            raise
    finally:
        os.close(descriptor)
