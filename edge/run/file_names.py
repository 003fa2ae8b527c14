"""What the files of a run's directory are called that tell of it."""

from typing import Final

METRICS: Final = "metrics.jsonl"
EVALUATIONS: Final = "evaluations.jsonl"
SUMMARY: Final = "summary.json"
REPORT: Final = "report.html"
TENSORBOARD: Final = "tensorboard"
