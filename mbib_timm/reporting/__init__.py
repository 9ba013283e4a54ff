"""Reports: runs and sweeps as one HTML file, beside the paper's numbers."""
