"""What goes between a front end (text, requests) and the engine (tokens, pages), within a process or over a socket."""

import msgspec

from distkv.engine.stats import EngineStats
from distkv.sampling_params import SamplingParams
from distkv.speculative_config import SpeculativeConfig
from distkv.storage.tier import Tier
from distkv.workers.attention.policies.registry import FULL
from distkv.workers.group.log_lines import LogLine
from distkv.workers.sampling.sampled_token import TokenLogprobs


class EngineInfo(msgspec.Struct, frozen=True):
    """What the engine has fixed at start. Byte figures are of the whole group, replicated heads counted as often as
    they are held."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int  # tokens
    num_pages: int  # on the device
    num_host_pages: int
    num_disk_pages: int
    page_bytes: int  # on the device
    pool_bytes: int  # of the device pools as allocated
    kv_bytes_per_token: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    seed: int
    cache_dir: str | None  # of the disk tier: the sub-folder for this model's pages
    fingerprint: str = ""  # of all that pages on disk depend on; "" where they do not outlive the engine
    enable_prefix_caching: bool = False  # whether full pages of ended requests are kept for later ones
    write_through: bool = True  # whether pages that may be used again are written to disk as soon as they are full
    max_cold_bytes_per_step: int = 0  # see `ColdBudget`; 0 for no limit
    disk_cost: float = 1.0  # how often a byte on disk counts towards it
    model: str = ""  # its folder
    tier_bytes: tuple[int, int, int] = (0, 0, 0)  # of device, host and disk, as allocated
    max_share_per_salt: float | None = None  # of device and host, see `Shares`
    num_engines: int = 1  # that share the requests; all other figures are those of one
    save_timeout: float | None = None  # see `EngineConfig`
    attention_policy: str = FULL  # see `EngineConfig`
    num_observed: int = 0  # tokens at the end of a prompt by which the policy begins what it remembers, if it does
    kv_policy: str | None = None  # what outputs say of it
    coded_page_bytes: int = 0  # of a page below the device; 0: as on it
    kv_cache_dtype: str = "auto"  # see `EngineConfig`
    speculation: SpeculativeConfig | None = None  # see `EngineConfig.speculative_config`
    num_ranks: int = 1  # that compute each step together
    # of a token, for each one that it attends to, in what all products of a token with the weights of layers cost
    attention_cost: float = 0.0
    cold_page_seconds: tuple[float, float] = (0.0, 0.0)  # from host and disk, as measured at start; 0 where it was not
    context_size: int = 1  # ranks that share out the tokens of a page, see `decode_context_parallel_size`
    host_share: float = 0.0  # of the pages of a sequence that tokens of answers meet on the host, see `is_hosts`
    summary_bytes: int = 0  # beside the tiers, of all pages that requests can hold, where a policy chooses by summaries

    @property
    def coded_page_size(self) -> int:
        """Tokens that are rounded together when the last of them has come, where pages have a codec."""
        return self.page_size // self.context_size

    @property
    def cold_page_bytes(self) -> int:
        """Of a page below the device."""
        return self.coded_page_bytes or self.page_bytes

    @property
    def cold_kv_bytes_per_token(self) -> int:
        """Of a full page below the device."""
        return self.cold_page_bytes // self.page_size

    def page_bytes_in(self, tier: Tier) -> int:
        """Of a page in a tier."""
        return self.page_bytes if tier is Tier.DEVICE else self.cold_page_bytes

    def bytes_of(self, num_pages: int) -> int:
        """What so many pages take, as many of them on the device as it holds."""
        on_device = min(num_pages, self.num_pages)
        return on_device * self.page_bytes + (num_pages - on_device) * self.cold_page_bytes


class EngineRequest(msgspec.Struct, frozen=True):
    """A checked request; `max_tokens` is set and fits the model's limit."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int
    # The keys and values of all full pages but the last token's are random numbers of this seed, not those of the
    # prompt: a context of any length without its prefill, for stress tests.
    synthetic_kv_seed: int | None = None
    priority: int = 0  # lower goes first
    cache_salt: str | None = None  # pages of a prefix are shared among requests of one salt only
    # That end an answer, beside the engine's own unless params.ignore_eos; a front end names them all, with those that
    # only the tokenizer knows.
    stop_token_ids: frozenset[int] = frozenset()
    bad_words_token_ids: list[list[int]] = []  # that no answer may have in a row: `params.bad_words` as tokens
    # Where an engine that was lost had begun it: the answers that are still wanted, each with its tokens so far, behind
    # which it goes on. None of them has ended, and the log-probabilities of the prompt are known if any has a token.
    begun: dict[int, list[int]] = {}
    # Where the caller has begun the one answer: how many of the likeliest tokens to return in the place of each of its
    # tokens, which are scored as those of a prompt can be. The request ends with the next token. None scores none.
    begun_logprobs: int | None = None

    @property
    def num_to_read(self) -> int:
        """Tokens that are read before the next one can be sampled: the prompt, and the longest answer so far."""
        return len(self.prompt_token_ids) + max(map(len, self.begun.values()), default=0)


class TokenOutput(msgspec.Struct, frozen=True, tag=True):
    """One more token of one answer."""

    request_id: str
    index: int
    token_id: int
    logprobs: TokenLogprobs | None
    finish_reason: str | None
    stop_reason: int | None
    # with the first token of an answer: tokens of the prompt whose KV was found on device, host and disk
    num_cached_tokens: tuple[int, int, int] = (0, 0, 0)


class PromptLogprobs(msgspec.Struct, frozen=True, tag=True):
    """Log-probabilities of some of a prompt's tokens, or of those of an answer that the caller has begun. They come in
    order, and all before the first token that is sampled; the first token of a prompt has none."""

    request_id: str
    first: int  # index in the prompt and what was begun
    tokens: list[TokenLogprobs]


class RequestFailed(msgspec.Struct, frozen=True, tag=True):
    """A request that cannot go on, with all its answers; the others do."""

    request_id: str
    error: str  # name of a class of `distkv.errors`
    message: str


StepOutput = TokenOutput | PromptLogprobs | RequestFailed


class Add(msgspec.Struct, frozen=True, tag=True):
    """Client to leader: queue requests; answered by Accepted or Refused."""

    requests: list[EngineRequest]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Client to leader: end answers, see `Engine.abort`. Not answered."""

    answers: list[tuple[str, int | None]]
    reason: str = "abort"


class GetStats(msgspec.Struct, frozen=True, tag=True):
    """Client to leader; answered by EngineStats."""


class ResetPrefixCache(msgspec.Struct, frozen=True, tag=True):
    """Client to leader: forget the pages that are kept for later requests; answered by Accepted."""


class ImportPages(msgspec.Struct, frozen=True, tag=True):
    """Client to leader: take a part of an exported cache in, see `EngineClient.import_pages`; answered by ImportedPages
    or Refused."""

    path: str
    cache_salt: str | None
    start: int


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Client to leader: save the cache and end the group. Answered by Saving every now and then."""

    save_timeout: float | None = None  # see `Engine.close`


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Leader to client: the requests are queued, or the prefix cache is empty."""


class ImportedPages(msgspec.Struct, frozen=True, tag=True):
    """Leader to client: a part of an exported cache is taken in."""

    end: int
    num_new: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Leader to client: none of the requests is queued, no page of the part is taken in."""

    reason: str
    error: str = "CapacityError"  # name of a class of `distkv.errors`, whose text the reason is


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """Leader to client: what a step sampled."""

    outputs: list[StepOutput]


class Working(msgspec.Struct, frozen=True, tag=True):
    """Leader to client, every second or so: steps go on, though nothing has come of them."""


class Saving(msgspec.Struct, frozen=True, tag=True):
    """Leader to client: the group is on its way to its end."""

    num_unsaved: int  # KV pages that are not on disk yet


class Logged(msgspec.Struct, frozen=True, tag=True):
    """Leader to client: what the ranks have logged."""

    lines: list[LogLine]


class Traced(msgspec.Struct, frozen=True, tag=True):
    """Leader to client: events of a trace, see `TraceFile.write`."""

    events: bytes


encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Add | Abort | GetStats | ResetPrefixCache | ImportPages | Shutdown).decode
decode_reply = msgspec.msgpack.Decoder(
    Accepted | Refused | ImportedPages | Tokens | EngineStats | Working | Saving | Logged | Traced
).decode
