"""The LLaMA model (https://arxiv.org/abs/2302.13971), as one rank runs its part of it.

Dims: T tokens of the step, E hidden_size, H query heads and K KV heads of this rank, D head_dim, V vocabulary of this
rank. Row-parallel outputs (attention's and the MLP's second projection, the embedding) are summed over the ranks of its
stage.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from distkv.kernels.linear import Linear, side_by_side
from distkv.kernels.token_kernels import MakeLinear, TokenKernels
from distkv.storage.moving.staging_ring import Stream
from distkv.storage.pools.device_pool import DevicePool
from distkv.workers.group.process_group import ProcessGroup
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.model.rope import RotaryEmbedding
from distkv.workers.model.shard import Shard
from distkv.workers.model.weights import PREFIX, Rows, WeightSource
from distkv.workers.runners.batch import Batch
from distkv.workers.runners.runner import Receive

EMBEDDING, FINAL_NORM, HEAD = f"{PREFIX}embed_tokens.weight", f"{PREFIX}norm.weight", "lm_head.weight"
_LAYER = re.compile(rf"(?:{re.escape(PREFIX)})?layers\.(\d{{1,9}})\.")


@dataclass(frozen=True)
class Layer:
    """One transformer block."""

    input_norm: Tensor
    qkv: Linear  # E -> (H + 2 * K) * D
    attention_out: "RowParallel"  # H * D -> E
    post_attention_norm: Tensor
    gate_up: Linear  # E -> intermediate of this rank, gated
    down: "RowParallel"  # intermediate of this rank -> E


@dataclass(frozen=True)
class RowParallel:
    """A weight of which each rank has some columns, and so a part of its product, or several: their sum."""

    group: ProcessGroup
    parts: list[Linear]
    widths: list[int]  # input columns of each
    num_parts: list[int]  # of each rank

    def __call__(self, x: Tensor) -> Tensor:
        """Maps `[T, columns of this rank]` to `[T, E]`, summed over the ranks."""
        if max(self.num_parts) == 1:
            return self.group.all_reduce(self.parts[0](x))
        own = [part(columns.contiguous()) for part, columns in zip(self.parts, x.split(self.widths, 1), strict=True)]
        return self.group.sum_parts(own, self.num_parts)


@dataclass(frozen=True)
class Ends:
    """What comes before and behind the layers."""

    embedding: Tensor  # [V, E]
    final_norm: Tensor
    head: Linear  # E -> V


@dataclass(frozen=True)
class LlamaModel:
    """A rank's part of the model."""

    config: ModelConfig
    shard: Shard
    group: ProcessGroup
    kernels: TokenKernels
    rope: RotaryEmbedding
    layers: list[Layer]  # of this stage
    ends: Ends | None  # of the first stage

    def forward(self, batch: Batch, pool: DevicePool, stream: Stream | None, x_TE: Tensor | None = None) -> Tensor:
        """Runs a step and fills the pages of its tokens; `stream` brings the batch's loads. Returns the hidden states
        `[rows, E]` before the final norm of the rows whose logits are wanted. The others end with the last layer's
        attention, which nobody reads. Stages before the last one return those of all tokens.

        Args:
            x_TE: what the stage before has returned, which is changed in place; behind the first one.
        """
        eps, head_dim, kernels, tokens = self.config.rms_norm_eps, self.config.head_dim, self.kernels, batch.tokens
        cos, sin = self.rope.angles(tokens.positions, tokens.context)
        if x_TE is None:
            x_TE = self._embed(tokens.token_ids)
        delta_TE: Tensor | None = None  # what is still to be added to x
        for index, layer in enumerate(self.layers):
            layer_pool = pool.layer(index)
            qkv = layer.qkv(kernels.rms_norm(x_TE, layer.input_norm, eps, delta_TE)).unflatten(1, (-1, head_dim))
            q_THD, k_TKD, v_TKD = kernels.rope_and_write_kv(qkv, cos, sin, layer_pool, tokens.page, tokens.offset)
            attended = batch.attention.attend(q_THD, k_TKD, v_TKD, layer_pool, stream)
            if self.shard.is_last_stage and index == len(self.layers) - 1:
                x_TE, attended = x_TE[tokens.logit_rows], attended[tokens.logit_rows]
            delta_TE = layer.attention_out(attended)
            gated = layer.gate_up(kernels.rms_norm(x_TE, layer.post_attention_norm, eps, delta_TE))
            delta_TE = layer.down(gated)
        assert delta_TE is not None
        return x_TE.add_(delta_TE)

    def blank_input(self, rows: int) -> Receive | None:
        """Gives what stands for the hidden states of the stage before, to try out what a step takes; None on the first
        stage."""
        if self.shard.is_first_stage:
            return None
        return lambda: self.layers[0].input_norm.new_zeros(rows, self.config.hidden_size)

    def logits(self, x: Tensor) -> Tensor | None:
        """fp32 logits `[rows, vocab_size]` of hidden states `[rows, E]` on rank 0; None on other ranks of the first
        stage, which alone makes them."""
        assert self.ends is not None
        local = self.ends.head(self.kernels.rms_norm(x, self.ends.final_norm, self.config.rms_norm_eps))
        parts = [shard.vocab for shard in _all_shards(self.config, self.shard)]
        logits = self.group.gather_columns(local, [last - first for first, last in parts])
        return None if logits is None else logits.float()

    def _embed(self, token_ids: Tensor) -> Tensor:
        assert self.ends is not None
        first, last = self.shard.vocab
        embedding = self.ends.embedding
        if self.shard.size == 1:
            return embedding[token_ids]
        mine = (token_ids >= first) & (token_ids < last)
        x = embedding[torch.where(mine, token_ids - first, 0)].masked_fill_(~mine[:, None], 0)
        return self.group.all_reduce(x)


def load_llama(
    source: WeightSource,
    config: ModelConfig,
    shard: Shard,
    group: ProcessGroup,
    dtype: torch.dtype,
    device: torch.device,
    kernels: TokenKernels,
) -> LlamaModel:
    """Reads this rank's slices; query, key and value rows are fused unless other ranks hold the same KV heads, and gate
    and up always.

    Raises ConfigError when a tensor is missing or its shape is not what the config says.
    """
    hidden, dim = config.hidden_size, config.head_dim
    heads = shard.query_heads[0] * dim, shard.query_heads[1] * dim
    kv = shard.kv_heads[0] * dim, shard.kv_heads[1] * dim
    part_heads = [(first * dim, last * dim) for first, last in (part.query_heads for part in shard.parts)]
    part_mlp = [part.mlp for part in shard.parts]
    num_parts = [len(one.parts) for one in _all_shards(config, shard)]

    def read(name: str, shape: tuple[int, ...], rows: Rows = None, columns: Rows = None) -> Tensor:
        # always a copy: what is read is the file's memory, which changes when somebody writes to the file
        return source.read(name, shape, rows, columns).to(device=device, dtype=dtype, copy=True)

    def columns_of(
        parts: list[tuple[str, int, tuple[int, int]]], biased: bool, make: MakeLinear = kernels.make_linear
    ) -> Linear:
        """Column-parallel: the given output rows of several weights, fused."""
        weight = torch.cat([read(f"{name}.weight", (size, hidden), rows) for name, size, rows in parts])
        bias = torch.cat([read(f"{name}.bias", (size,), rows) for name, size, rows in parts]) if biased else None
        return make(weight, bias)

    def rows_of(name: str, size: int, columns: list[tuple[int, int]], biased: bool) -> RowParallel:
        """Row-parallel: the given input columns of each part; the first one of all adds the bias to the sum."""
        bias = read(f"{name}.bias", (hidden,)) if biased else None
        parts = []
        for index, own in enumerate(columns):
            weight = read(f"{name}.weight", (hidden, size), None, own)
            parts.append(kernels.make_linear(weight, bias if shard.rank == index == 0 else None))
        return RowParallel(group, parts, [last - first for first, last in columns], num_parts)

    def layer(index: int) -> Layer:
        prefix = f"model.layers.{index}"
        q_size, kv_size = config.num_attention_heads * dim, config.num_key_value_heads * dim
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        q = [(f"{attention}.q_proj", q_size, heads)]
        k_and_v = [(f"{attention}.k_proj", kv_size, kv), (f"{attention}.v_proj", kv_size, kv)]
        if shard.num_holders == 1:
            qkv = columns_of(q + k_and_v, config.attention_bias)
        else:
            # the holders of a KV head share its pages on disk, so they must agree in every bit: a product of one shape,
            # while their shares of the query heads differ
            qkv = side_by_side(columns_of(q, config.attention_bias), columns_of(k_and_v, config.attention_bias))
        gate_up = [(f"{mlp}.{part}_proj", config.intermediate_size, shard.mlp) for part in ("gate", "up")]
        return Layer(
            input_norm=read(f"{prefix}.input_layernorm.weight", (hidden,)),
            qkv=qkv,
            attention_out=rows_of(f"{attention}.o_proj", q_size, part_heads, config.attention_bias),
            post_attention_norm=read(f"{prefix}.post_attention_layernorm.weight", (hidden,)),
            gate_up=columns_of(gate_up, config.mlp_bias, kernels.make_gated_linear),
            down=rows_of(f"{mlp}.down_proj", config.intermediate_size, part_mlp, config.mlp_bias),
        )

    def ends() -> Ends:
        vocab = (config.vocab_size, hidden)
        embedding = read(EMBEDDING, vocab, shard.vocab)
        # as in transformers, a head that the checkpoint does hold wins over the config's tie
        tied = config.tie_word_embeddings and not source.has(HEAD)
        head = kernels.make_linear(embedding if tied else read(HEAD, vocab, shard.vocab))
        return Ends(embedding, read(FINAL_NORM, (hidden,)), head)

    return LlamaModel(
        config=config,
        shard=shard,
        group=group,
        kernels=kernels,
        rope=RotaryEmbedding(config.rope, dim, device),
        layers=[layer(index) for index in range(*shard.layers)],
        ends=ends() if shard.is_first_stage else None,
    )


def is_elsewhere(name: str, config: ModelConfig, shard: Shard) -> bool:
    """Whether a tensor of the model, by its name in a checkpoint, is for other stages than that of a rank."""
    found = _LAYER.match(name)
    if found is None:
        ends = EMBEDDING, FINAL_NORM, HEAD
        return not shard.is_first_stage and name in (*ends, *(end.removeprefix(PREFIX) for end in ends))
    return int(found[1]) < config.num_hidden_layers and int(found[1]) not in range(*shard.layers)


def _all_shards(config: ModelConfig, shard: Shard) -> list[Shard]:
    """Those of all ranks of its stage."""
    layout = shard.layout
    return [Shard.of(config, layout, rank) for rank in layout.ranks_of_stage(shard.stage)]
