"""transformers' own LLaMA, to stand beside distkv on a GPU."""

import time
from collections.abc import Callable
from typing import Any

import torch


def transformers_runner(network: Any, new_cache: Callable[[], Any] = lambda: None) -> Callable[[list[int], int], float]:
    """What reads a prompt, decodes so many further tokens after the first, and returns the seconds that each of these
    took. Attention is transformers' default; `new_cache` makes the cache of a call, None for DynamicCache."""
    device = network.device

    @torch.inference_mode()
    def runner(prompt: list[int], new_tokens: int) -> float:
        out = network(
            torch.tensor([prompt], device=device), past_key_values=new_cache(), use_cache=True, logits_to_keep=1
        )
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        token.tolist()  # waits for the device
        start = time.perf_counter()
        for _ in range(new_tokens):
            out = network(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            token.tolist()
        return (time.perf_counter() - start) / new_tokens

    return runner
