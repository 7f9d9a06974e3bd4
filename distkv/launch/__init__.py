"""Starts an engine from its options: sizes, fingerprint, a group of ranks here or on Ray."""
