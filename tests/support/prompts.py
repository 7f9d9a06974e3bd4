"""Random numbers and prompts that are a function of a seed."""

import torch


def seeded(seed: int) -> torch.Generator:
    """A generator for `torch.randn`, so that a test's numbers are a function of its drawn seed."""
    return torch.Generator().manual_seed(seed)


def random_prompt(length: int, seed: int = 1, end: int = 128) -> list[int]:
    """Tokens from 3 up to `end`, which is the vocabulary of a tiny model, without it."""
    return torch.randint(3, end, (length,), generator=seeded(seed)).tolist()


def random_prompts(*lengths: int) -> list[list[int]]:
    """Prompts of these lengths, each a function of its length."""
    return [random_prompt(length, length) for length in lengths]
