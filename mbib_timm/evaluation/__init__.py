"""Evaluation: metrics by head and shot group, and the answers for single images."""

from mbib_timm.evaluation.evaluate import AnswerLog, Answers, evaluate
from mbib_timm.evaluation.metrics import Statistics, batch_statistics, summarize, with_intervals

__all__ = ["AnswerLog", "Answers", "Statistics", "batch_statistics", "evaluate", "summarize", "with_intervals"]
