"""What the frozen ``dlora-edge`` runs."""

from dlora.edge.__main__ import main

main()
