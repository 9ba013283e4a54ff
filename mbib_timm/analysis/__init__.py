"""Analyses of trained models: pure functions of features, predictions, labels and training counts, and their command."""
