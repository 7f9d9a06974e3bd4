"""An engine with fewer ranks than it was asked for, since the cluster has shrunk: how many will do, and what becomes of
its sums."""

import logging
from dataclasses import replace

from distkv.config import EngineConfig
from distkv.errors import ConfigError
from distkv.workers.attention.policies.policy import looks_at_queries
from distkv.workers.attention.policies.registry import parse_policy
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.model.shard import merges_parts

log = logging.getLogger(__name__)

FEWER_SECONDS = 30.0  # for which all ranks of an engine have found no room


def fewer_sizes(config: EngineConfig, model: ModelConfig) -> tuple[int, ...]:
    """Numbers of ranks that an engine may be started anew with, in rising order, beside the one that was asked for:
    those that can share out its parts. Raises ConfigError where the heads allow none from `min_tensor_parallel_size`
    on, and where these would attend to other pages."""
    least, size = config.min_tensor_parallel_size, config.tensor_parallel_size
    if least is None:
        return ()
    kv_heads = model.num_key_value_heads
    if size > kv_heads and looks_at_queries(parse_policy(config.attention_policy)):
        raise ConfigError(
            f"min_tensor_parallel_size is {least}, and attention_policy {config.attention_policy} has each rank choose "
            f"pages by its own queries of a KV head: {size} ranks share {kv_heads} of these, and fewer would choose "
            f"others; use a tensor_parallel_size of at most {kv_heads}, or leave min_tensor_parallel_size out"
        )
    allowed = [one for one in range(1, size) if merges_parts(model, one, size)]
    found = tuple(one for one in allowed if one >= least)
    if not found:
        raise ConfigError(
            f"min_tensor_parallel_size is {least}, and with {kv_heads} KV heads the parts of {size} "
            f"ranks can be taken by {', '.join(map(str, allowed))}; lower it to {allowed[-1]} or less"
        )
    return found


def fewer_after(config: EngineConfig) -> float:
    """Seconds for which there must have been no room for all."""
    return min(FEWER_SECONDS, config.seconds_to_rebuild / 2)


def with_fewer(config: EngineConfig, size: int, device: str) -> tuple[EngineConfig, int | None]:
    """The options for fewer ranks, which are on Ray all the same, and the number of parts that their sums have, see
    `Layout`; says what that means for answers.

    Args:
        device: that the ranks run on.
    """
    asked = config.tensor_parallel_size
    keeps_bits = device != "cuda" or bool(config.batch_invariant)
    what_of_it = (
        f"they take the parts of {asked} in all sums, so answers are the same"
        if keeps_bits
        else "sums over them round otherwise, so answers that go on may differ from those that would have come"
    )
    log.warning(
        "the cluster had no room for %d ranks, so the engine is started anew with %d: %s; all %d are tried when it is "
        "lost again", asked, size, what_of_it, asked,
    )  # fmt: skip
    address = config.ray_address or "auto"
    fewer = replace(config, tensor_parallel_size=size, min_tensor_parallel_size=None, ray_address=address)
    return fewer, asked if keeps_bits else None
