"""Angles of the rotary embedding for the tokens of a step, for each supported scaling of its frequencies."""

import math

import torch
from torch import Tensor

from distkv.workers.model.model_config import RopeConfig


class RotaryEmbedding:
    """Computes cos and sin for given positions, in fp32; no table, so a long context costs no memory.

    The types are Hugging Face's: "linear" (position interpolation, https://arxiv.org/abs/2306.15595), "dynamic"
    (NTK-aware scaling that begins past the trained length) and "llama3" (scaling of the low frequencies alone).
    """

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device):
        self._config = config
        # powers of theta, [head_dim / 2]
        self._exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float().to(device) / head_dim
        self._head_dim = head_dim
        inv_freq = 1.0 / config.theta**self._exponent
        if config.rope_type == "linear":
            inv_freq /= config.factor
        elif config.rope_type == "llama3":
            inv_freq = _llama3_frequencies(inv_freq, config)
        self._inv_freq = inv_freq

    def angles(self, positions: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 `[tokens, 1, head_dim / 2]`.

        Shapes: positions, context int64 `[tokens]`; context is the length that "dynamic" scales for: that of the
        prompt, or the position + 1 where that is more. So the angles of a token do not depend on how the prompt is cut
        into chunks, and equal those of Hugging Face's generate.
        """
        inv_freq = self._inv_freq
        if self._config.rope_type == "dynamic":
            inv_freq = self._dynamic_frequencies(context)
        angle = (positions.float()[:, None] * inv_freq)[:, None]
        return angle.cos(), angle.sin()

    def _dynamic_frequencies(self, context: Tensor) -> Tensor:
        """`[tokens, head_dim / 2]`: theta grows with the context past the trained length."""
        config, dim = self._config, self._head_dim
        trained = config.original_max_position_embeddings
        ratio = config.factor * context.clamp(min=trained).float() / trained - (config.factor - 1)
        # not by `**`, which rounds in another way at the end of a tensor than before it: a token's place must not count
        theta = (config.theta * (ratio.double().log() * (dim / (dim - 2))).exp()).float()
        return 1.0 / theta[:, None] ** self._exponent


def _llama3_frequencies(inv_freq: Tensor, config: RopeConfig) -> Tensor:
    """Divides low frequencies by the factor, keeps high ones, and blends those between."""
    low, high = config.low_freq_factor, config.high_freq_factor
    turns = config.original_max_position_embeddings * inv_freq / (2 * math.pi)  # within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / config.factor
