"""Trained models in use: loading by any name, prediction, export, a demo page."""
