"""Sweeps: a base recipe, axes and seeds, run in one process, and what they found beside the paper's numbers."""
