"""A float64 reference of a request with random keys and values, for contexts that no memory holds at once.

The random pages are made again, one layer of one page at a time, and attention is merged over them; so what is held
is the weights of a matrix and the few tokens that the model really read: the end of the prompt and the answer.

Dims: T tokens read, E hidden_size, H query heads, K KV heads, G = H / K, S page_size, D head_dim, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distkv.engine.protocol import EngineRequest
from distkv.engine.synthetic_kv import SyntheticKV
from distkv.kernels import reference
from distkv.storage.synthetic_pages import synthetic_slice
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.model.rope import RotaryEmbedding
from distkv.workers.model.weights import WeightSource

WIDENED_ROWS = 4096  # rows of a weight that are held in float64 at a time


@dataclass(frozen=True)
class Reference:
    """The model of a run: weights and KV are rounded to `dtype` as there, and everything else is float64."""

    source: WeightSource
    model: ModelConfig
    dtype: torch.dtype
    device: torch.device
    page_size: int

    @torch.inference_mode()
    def logprobs(self, request: EngineRequest, answer: list[int]) -> Tensor:
        """Log-probabilities float64 `[tokens of the answer, V]`, each given the prompt and the answer's tokens before
        it. The request must have a `synthetic_kv_seed`."""
        model, prompt_len = self.model, len(request.prompt_token_ids)
        num_pages = (prompt_len - 1) // self.page_size
        start = num_pages * self.page_size
        read = torch.tensor([*request.prompt_token_ids[start:], *answer[:-1]], device=self.device)
        positions = torch.arange(start, start + len(read), device=self.device)
        rope = RotaryEmbedding(model.rope, model.head_dim, self.device)
        angles = rope.angles(positions, (positions + 1).clamp(min=prompt_len))
        x_TE = self._weight("model.embed_tokens.weight", (model.vocab_size, model.hidden_size))[read].double()
        for layer in range(model.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            attended = self._attend(layer, self._norm(f"{prefix}.input_layernorm", x_TE), angles, request, num_pages)
            x_TE = x_TE + self._linear(f"{prefix}.self_attn.o_proj", attended, model.hidden_size, model.attention_bias)
            x_TE = x_TE + self._mlp(f"{prefix}.mlp", self._norm(f"{prefix}.post_attention_layernorm", x_TE))
        x_TE = self._norm("model.norm", x_TE[-len(answer) :])
        tied = model.tie_word_embeddings and not self.source.has("lm_head.weight")
        return self._linear("model.embed_tokens" if tied else "lm_head", x_TE, model.vocab_size).log_softmax(-1)

    def _attend(
        self, layer: int, x_TE: Tensor, angles: tuple[Tensor, Tensor], request: EngineRequest, num_pages: int
    ) -> Tensor:
        """`[T, H * D]`."""
        model, prefix = self.model, f"model.layers.{layer}.self_attn"
        heads = {"q": model.num_attention_heads, "k": model.num_key_value_heads, "v": model.num_key_value_heads}
        q_THD, k_TKD, v_TKD = (
            self._linear(f"{prefix}.{name}_proj", x_TE, count * model.head_dim, model.attention_bias)
            .unflatten(1, (count, model.head_dim))
            for name, count in heads.items()
        )  # fmt: skip
        q_TKGD = reference.rotate(q_THD, *angles).unflatten(1, (heads["k"], model.group_size))
        out, lse = reference.attention(q_TKGD, reference.rotate(k_TKD, *angles), v_TKD)
        assert request.synthetic_kv_seed is not None
        for index in range(num_pages):
            seed = SyntheticKV(request.synthetic_kv_seed).page_seed(index)
            page = synthetic_slice(seed, layer, range(heads["k"]), self.page_size, model.head_dim, self.device)
            k_KSD, v_KSD = page.to(self.dtype).double()
            scores = torch.einsum("tkgd,ksd->tkgs", q_TKGD, k_KSD) * model.head_dim**-0.5
            page_lse = scores.logsumexp(-1)
            both = torch.logaddexp(lse, page_lse)
            page_out = torch.einsum("tkgs,ksd->tkgd", (scores - both[..., None]).exp(), v_KSD)
            out, lse = out * (lse - both).exp()[..., None] + page_out, both
        return out.flatten(1)

    def _mlp(self, prefix: str, x_TE: Tensor) -> Tensor:
        model = self.model
        gate, up = (
            self._linear(f"{prefix}.{name}_proj", x_TE, model.intermediate_size, model.mlp_bias)
            for name in ("gate", "up")
        )
        inner = reference.swiglu(torch.cat([gate, up], 1))
        return self._linear(f"{prefix}.down_proj", inner, model.hidden_size, model.mlp_bias)

    def _norm(self, name: str, x_TE: Tensor) -> Tensor:
        weight = self._weight(f"{name}.weight", (self.model.hidden_size,))
        return reference.rms_norm(x_TE, weight, self.model.rms_norm_eps)

    def _linear(self, name: str, x: Tensor, size: int, biased: bool = False) -> Tensor:
        rows = self._weight(f"{name}.weight", (size, x.shape[1])).split(WIDENED_ROWS)
        product = torch.cat([x @ part.double().T for part in rows], 1)
        return product + self._weight(f"{name}.bias", (size,)).double() if biased else product

    def _weight(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.source.read(name, shape).to(self.device, self.dtype)
