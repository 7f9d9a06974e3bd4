"""`distkv serve`: the OpenAI API, and a page to look at, over one `AsyncLLM`."""
