"""`distkv stress`: one very long context, watched and verified."""
