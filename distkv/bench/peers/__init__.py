"""`distkv bench peers`: the same work on distkv and on other engines, each in a Python environment of its own."""
