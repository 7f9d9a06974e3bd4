"""Random keys and values, the same whoever makes them: a context of any length without its prefill."""

import torch
from torch import Tensor

# Deviation of the values. Attention over n random tokens gives their mean, which shrinks as n ** -0.5; with values as
# small as the keys it would be lost in the model's rounding from some 100,000 tokens on, and so would any mistake.
VALUE_SCALE = 64


def synthetic_slice(seed: int, layer: int, heads: range, page_size: int, head_dim: int, device: torch.device) -> Tensor:
    """One layer of a page: fp32 `[2, kv_head, page_size, head_dim]` on the device, which makes them, K first; normal
    numbers, the values times VALUE_SCALE.

    A head's numbers depend on the kind of device, the page's seed, and the layer's and the head's index in the model
    alone, so they are the same whichever rank holds it.
    """
    numbers = torch.empty(2, len(heads), page_size, head_dim, device=device)
    generator = torch.Generator(device)
    for index, head in enumerate(heads):
        generator.manual_seed(hash((seed, layer, head)))
        numbers[:, index] = torch.randn(2, page_size, head_dim, generator=generator, device=device)
    numbers[1] *= VALUE_SCALE
    return numbers
