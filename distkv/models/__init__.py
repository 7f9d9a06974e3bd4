"""Models to run: one that can be fetched, and shapes for random weights."""
