"""Plain float64 references of the kernels: the definition that each implementation is tested against.

Dims as in `attention.py`: T tokens, K KV heads, G query heads per KV head, S page_size, D head_dim.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `norm.rms_norm`; float64 result."""
    x = x.double()
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def swiglu(gate_up: Tensor) -> Tensor:
    """See `activation.swiglu`; float64 result."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `rope.rotate`; float64 result, each pair turned as a complex number."""
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double())
    return torch.cat([turned.real, turned.imag], dim=-1)


def read_pages(layer_pool: Tensor, pages: list[int], num_tokens: int) -> tuple[Tensor, Tensor]:
    """The first `num_tokens` keys and values of a sequence, token by token.

    Shapes: layer_pool `[2, pages, K, S, D]`; results `[num_tokens, K, D]`.
    """
    page_size = layer_pool.shape[3]
    where = [(pages[token // page_size], token % page_size) for token in range(num_tokens)]
    keys = [layer_pool[0, page, :, offset] for page, offset in where]
    values = [layer_pool[1, page, :, offset] for page, offset in where]
    return torch.stack(keys), torch.stack(values)


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of the last tokens of a sequence over all of it.

    Shapes: q `[T, K, G, D]`, the queries of the last T of N positions; k, v `[N, K, D]`.
    Returns float64 out `[T, K, G, D]` and lse `[T, K, G]`.
    """
    num_queries, num_keys = q.shape[0], k.shape[0]
    scores = torch.einsum("tkgd,nkd->tkgn", q.double(), k.double()) * q.shape[-1] ** -0.5
    position = torch.arange(num_keys - num_queries, num_keys, device=q.device)
    hidden = torch.arange(num_keys, device=q.device)[None] > position[:, None]
    scores.masked_fill_(hidden[:, None, None], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    return torch.einsum("tkgn,nkd->tkgd", torch.exp(scores - lse[..., None]), v.double()), lse
