"""Analyses of trained models: pure functions of features, predictions, labels and counts, and their command."""
