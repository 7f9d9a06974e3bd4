"""`Client` and `AsyncClient`: the methods of `LLM` on a server that `distkv serve` runs."""
