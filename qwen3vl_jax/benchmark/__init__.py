"""What scripts/bench.py measures: work and its bounds, our runs, and those of transformers."""
