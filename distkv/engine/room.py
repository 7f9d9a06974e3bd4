"""With which sizes a request would fit that does not, for the errors that say so."""

from distkv.engine.protocol import EngineInfo, EngineRequest
from distkv.option_checks import raise_to
from distkv.storage.tier import Tier


def room_for(info: EngineInfo, num_pages: int) -> str:
    """What to raise so that the tiers hold so many pages, which is more than they do: the size of the slowest tier
    there is, exactly."""
    held = info.num_pages, info.num_host_pages, info.num_disk_pages
    tier = max(tier for tier in Tier if held[tier] or tier is Tier.DEVICE)
    size = info.tier_bytes[tier] // held[tier] if info.tier_bytes[tier] else info.page_bytes_in(tier)
    return raise_to(f"{tier.name.lower()}_kv_bytes", (num_pages - sum(held) + held[tier]) * size)


def most_tokens(request: EngineRequest, page_size: int, num_pages: int, num_observed: int = 0) -> int:
    """The most `max_tokens` with which all answers to a request fit into so many pages, below 1 where none do; see
    `most_pages`."""
    prompt_len, num_answers = len(request.prompt_token_ids), request.params.n
    shared = max(0, prompt_len - num_observed) // page_size
    each = (num_pages - shared) // num_answers
    return (shared + each) * page_size - prompt_len + 1  # the last token sampled is never read
