"""Analyses of trained models beyond accuracy: sections 4.5 to 4.7 and appendices D and E of the paper, and more.

`analyze` is the command's function. It collects a model's outputs over a split in one pass; the other modules
turn them into numbers, one analysis each: `outputs` and `distances` on torch tensors, the others on numpy arrays.
"""

from mbib_timm.analysis.analyze import analyze, analyze_run

__all__ = ["analyze", "analyze_run"]
