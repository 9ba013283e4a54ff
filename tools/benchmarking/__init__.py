"""What `tools/benchmark.py` runs: contestants, the measurements that let them take turns, and the table of targets."""
