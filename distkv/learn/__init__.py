"""A report for whoever wants to understand a KV cache, with the figures of the machine that it is made on."""
