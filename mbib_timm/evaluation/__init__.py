"""Evaluation: metrics by head and shot group."""

from mbib_timm.evaluation.evaluate import evaluate
from mbib_timm.evaluation.metrics import Statistics, batch_statistics, summarize

__all__ = ["Statistics", "batch_statistics", "evaluate", "summarize"]
