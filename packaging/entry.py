"""What the frozen ``dlora-edge`` runs."""

import os
import sys
from pathlib import Path

from dlora.edge.__main__ import main

PR_SET_PDEATHSIG = 1


def join_with_parent() -> None:
    """Be one process, to signals, with the parent that has unpacked us: the single file runs as two.

    The parent passes on what it gets. Ctrl-C in a terminal goes to the whole group and would come twice, which means
    "at once" to ``train``; and SIGKILL, which cannot be passed on, would leave us behind.
    """
    import ctypes
    import signal

    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


unpacked = Path(getattr(sys, "_MEIPASS", sys.prefix))
if not unpacked.is_relative_to(Path(sys.executable).parent):
    join_with_parent()
main()
