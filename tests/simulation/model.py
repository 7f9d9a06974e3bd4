"""A model whose keys and values are hashes of all keys and values before them, as attention reads them.

So a page that is stale, cleared, torn or another one's makes every later token wrong. The same without a cache is
`PlainModel`: what the engine's answers are compared with.
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b

from distkv.engine.protocol import EngineRequest
from distkv.workers.sampling.sample_row import uniform_number

VALUE_BYTES = 6  # of a token in each KV head


def head_hash(head: int) -> "blake2b":
    """What attention of a KV head has read: to be updated with the values of all tokens, in order."""
    return blake2b(bytes([head]), digest_size=8)


class ObservedTokens:
    """What a policy of attention remembers of tokens that it has observed, a `Memory`: a hash of all that these came
    to, in their order. It goes into the tokens of the answer."""

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=8)

    def choose(self) -> bytes:
        """What an answer's next token reads besides."""
        return self._hash.copy().digest()

    def observe(self, logits: bytes) -> None:
        """Takes in the logits of one more token."""
        self._hash.update(logits)


def token_state(digests: Sequence[bytes], token: int, position: int) -> bytes:
    """What becomes of a token, given what each head has read before it: `VALUE_BYTES` of new values for each head, and
    8 bytes of logits at the end."""
    size = VALUE_BYTES * len(digests) + 8
    return blake2b(b"%s %d %d" % (b"".join(digests), token, position), digest_size=size).digest()


def synthetic_value(page_seed: int, head: int, offset: int) -> bytes:
    """The value of a token in a page that is filled with random numbers."""
    return blake2b(b"%d %d %d" % (page_seed, head, offset), digest_size=VALUE_BYTES).digest()


def pick(
    logits: bytes, vocab_size: int, uniform: float, rules: tuple[object, ...], banned: set[int], history: Sequence[int]
) -> int:
    """The token that is sampled from a row of logits.

    Args:
        uniform: the draw; 0.0 for greedy ones.
        rules: all else that the choice depends on.
        banned: tokens that it cannot be.
        history: the answer's tokens so far, where penalties depend on them.
    """
    seed = repr((uniform, rules, list(history))).encode()
    number = int.from_bytes(blake2b(logits + seed, digest_size=8).digest(), "little")
    allowed = [token for token in range(vocab_size) if token not in banned]
    return allowed[number % len(allowed)]


def score(logits: bytes, token: int) -> float:
    """The log-probability of a token in a row of logits."""
    return -(int.from_bytes(blake2b(b"%s %d" % (logits, token), digest_size=4).digest(), "little") / 2**32)


class PlainModel:
    """The whole of a sequence, from its first token on, with nothing kept."""

    def __init__(self, num_heads: int, page_size: int, num_observed: int = 0):
        self.num_heads, self.page_size, self.num_observed = num_heads, page_size, num_observed

    def logits(
        self, token_ids: Iterable[int], prompt_len: int, synthetic_seed: int | None = None, num_synthetic: int = 0
    ) -> list[bytes]:
        """A row of logits for each token."""
        memory = ObservedTokens()
        hashes = [head_hash(head) for head in range(self.num_heads)]
        found = []
        for position, token in enumerate(token_ids):
            read = [one.copy().digest() for one in hashes]
            if self.num_observed and position >= prompt_len:
                read[0] += memory.choose()
            state = token_state(read, token, position)
            if position >= prompt_len - self.num_observed:
                memory.observe(state[-8:])
            for head, one in enumerate(hashes):
                value = state[VALUE_BYTES * head : VALUE_BYTES * (head + 1)]
                if position < num_synthetic:
                    page, offset = divmod(position, self.page_size)
                    value = synthetic_value(((synthetic_seed or 0) << 32) + page, head, offset)
                one.update(value)
            found.append(state[-8:])
        return found

    def page_values(self, token_ids: Iterable[int]) -> list[bytes]:
        """The values of all tokens, by head."""
        hashes = [head_hash(head) for head in range(self.num_heads)]
        values = [bytearray() for _ in hashes]
        for position, token in enumerate(token_ids):
            state = token_state([one.copy().digest() for one in hashes], token, position)
            for head, one in enumerate(hashes):
                value = state[VALUE_BYTES * head : VALUE_BYTES * (head + 1)]
                one.update(value)
                values[head] += value
        return [bytes(one) for one in values]

    def row_logits(self, request: EngineRequest, tokens: Sequence[int]) -> list[bytes]:
        """The logits of a request's prompt and of these tokens of an answer."""
        prompt_len, num_synthetic = len(request.prompt_token_ids), 0
        if request.synthetic_kv_seed is not None:
            num_read = max(1, self.num_observed)
            num_synthetic = max(0, prompt_len - num_read) // self.page_size * self.page_size
        token_ids = [*request.prompt_token_ids, *tokens]
        return self.logits(token_ids, prompt_len, request.synthetic_kv_seed, num_synthetic)

    def next_token(
        self,
        request: EngineRequest,
        index: int,
        logits: bytes,
        answer: Sequence[int],
        vocab_size: int,
        eos: Sequence[int],
    ) -> int:
        """The token that answer `index` of a request goes on with."""
        params = request.params
        banned: set[int] = set()
        if len(answer) < params.min_tokens:
            banned |= request.stop_token_ids | (set() if params.ignore_eos else set(eos))
        for *before, word in request.bad_words_token_ids:
            if not before or list(answer[-len(before) :]) == before:
                banned.add(word)
        if params.allowed_token_ids is not None:
            banned |= set(range(vocab_size)) - set(params.allowed_token_ids)
        uniform = uniform_number(request.seed, index, len(answer)) if params.temperature > 0 else 0.0
        penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        penalised = penalties != (1.0, 0.0, 0.0)
        rules = (params.temperature, params.top_p, params.top_k, *penalties, sorted((params.logit_bias or {}).items()))
        return pick(logits, vocab_size, uniform, rules, banned, list(answer) if penalised else [])
