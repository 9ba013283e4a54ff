"""Evaluation: metrics by head and shot group, their table and their figures."""

from mbib_timm.evaluation.evaluate import evaluate
from mbib_timm.evaluation.metrics import Statistics, batch_statistics, summarize
from mbib_timm.evaluation.table import results_table

__all__ = ["Statistics", "batch_statistics", "evaluate", "results_table", "summarize"]
