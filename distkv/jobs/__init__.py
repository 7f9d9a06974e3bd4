"""Commands as jobs on a Ray cluster: what is shipped, what is followed, and what comes back."""
