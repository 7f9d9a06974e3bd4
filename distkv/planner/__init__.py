"""How much of a model and its KV cache fits where, and what a step then takes. Nothing here imports torch."""
