"""Requests as people send them: many that begin alike, sessions that go on, several answers, all kinds of rules."""

from random import Random

from simulation.shape import VOCAB

from distkv.engine.protocol import EngineInfo, EngineRequest
from distkv.sampling_params import SamplingParams


class Workload:
    """Makes requests up, for an engine of this shape."""

    def __init__(self, rng: Random, info: EngineInfo, is_unlimited: bool = False):
        """`is_unlimited` has most of them come without max_tokens."""
        self.rng, self.info = rng, info
        self._limits = [None, None, None, None, 5] if is_unlimited else [None, 1, 2, 5, 20]
        self.num_requests = 0
        self.busy = rng.choice([0.05, 0.2, 0.5])  # how often one comes
        tiers = info.num_pages + info.num_host_pages + info.num_disk_pages
        self.longest = min(info.max_model_len, tiers * info.page_size)
        longest = self.longest - 1
        self._stems = [self._tokens(rng.randint(1, longest)) for _ in range(rng.choice([1, 2, 4]))]
        self._sessions: list[tuple[str | None, list[int]]] = []  # what was said so far
        self._salts = rng.choice([[None], [None, None, "a", "b"]])

    def request(self) -> EngineRequest:
        """The next one."""
        rng, longest = self.rng, self.longest - 1
        salt, prompt = rng.choice(self._salts), self._tokens(rng.randint(1, 12))
        kind = rng.random()
        if kind < 0.35:
            stem = rng.choice(self._stems)
            prompt = stem[: rng.randint(1, len(stem))] + prompt
        elif kind < 0.6 and self._sessions:
            salt, said = rng.choice(self._sessions)
            prompt = said + prompt[: rng.choice([0, 1, 3, 12])]
        elif kind < 0.75:
            prompt = list(rng.choice(self._stems))  # the very same, so that several compute it at a time
        prompt = prompt[:longest]
        room = self.longest - len(prompt)
        max_tokens = rng.choice([*self._limits, room])
        params = self._params(None if max_tokens is None else min(max_tokens, room), len(prompt))
        self.num_requests += 1
        is_synthetic = rng.random() < 0.03 and params.prompt_logprobs is None
        return EngineRequest(
            str(self.num_requests), prompt, params, params.max_tokens or room, rng.randrange(1000),
            synthetic_kv_seed=rng.randrange(100) if is_synthetic else None,
            priority=rng.choice([0, 0, 0, 1, -1]), cache_salt=salt,
            stop_token_ids=frozenset(rng.sample(range(3, VOCAB), rng.choice([0, 0, 1, 3]))),
            bad_words_token_ids=[self._tokens(rng.choice([1, 2])) for _ in range(rng.choice([0, 0, 0, 2]))],
        )  # fmt: skip

    def said(self, request: EngineRequest, answer: list[int]) -> None:
        """A session may go on behind an answer."""
        if request.synthetic_kv_seed is None:
            self._sessions = [*self._sessions[-5:], (request.cache_salt, request.prompt_token_ids + answer)]

    def _params(self, max_tokens: int | None, prompt_len: int) -> SamplingParams:
        rng = self.rng
        n = min(rng.choice([1, 1, 1, 1, 2, 3]), self.info.max_num_seqs)
        return SamplingParams(
            n=n, temperature=rng.choice([0.0, 0.7, 1.0]), max_tokens=max_tokens,
            ignore_eos=rng.random() < 0.4,
            min_tokens=0 if max_tokens is None or rng.random() < 0.8 else rng.randint(0, max_tokens),
            presence_penalty=rng.choice([0.0, 0.0, 0.0, 0.5]), logprobs=rng.choice([None, None, 0]),
            prompt_logprobs=rng.choice([None] * 6 + [0]),
            allowed_token_ids=sorted(rng.sample(range(VOCAB), 20)) if rng.random() < 0.1 else None,
            logit_bias={rng.randrange(VOCAB): 1.5} if rng.random() < 0.1 else None,
        )  # fmt: skip

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(3, VOCAB) for _ in range(count)]
