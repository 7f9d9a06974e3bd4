"""An engine without a model: every answer is the same tokens."""

from distkv.engine.protocol import EngineInfo, EngineRequest, StepOutput, TokenOutput
from distkv.engine.stats import EngineStats


class ScriptedEngine:
    """Samples `script` for every request, a token in each step, until one of them ends it; behind what was begun."""

    def __init__(self, script: list[int], eos_token_ids: tuple[int, ...] = (), vocab_size: int = 300):
        self.info = EngineInfo(1 << 20, 64, 2048, 16, 1, 0, 0, 1, 1, 1, vocab_size, eos_token_ids, 0, None)
        self.script = script
        self.prompts: list[list[int]] = []
        self._open: dict[str, tuple[EngineRequest, int]] = {}  # tokens sampled

    def add(self, requests: list[EngineRequest]) -> None:
        self._open |= {request.request_id: (request, len(request.begun.get(0, []))) for request in requests}
        self.prompts += [request.prompt_token_ids for request in requests]

    def abort(self, answers: list[tuple[str, int | None]], reason: str = "abort") -> None:
        for request_id, _ in answers:
            self._open.pop(request_id, None)

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    def step(self) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        for request_id, (request, count) in list(self._open.items()):
            token = self.script[count]
            by_eos = token in self.info.eos_token_ids and not request.params.ignore_eos
            by_stop = token in request.stop_token_ids and not by_eos
            is_last = count + 1 == min(len(self.script), request.max_tokens)
            reason = "stop" if by_eos or by_stop else "length" if is_last else None
            outputs.append(TokenOutput(request_id, 0, token, None, reason, token if by_stop else None))
            self._open[request_id] = request, count + 1
            if reason:
                del self._open[request_id]
        return outputs

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, len(self._open), 0)

    def reset_prefix_cache(self) -> None:
        pass

    def import_pages(self, path: str, cache_salt: str | None, start: int) -> tuple[int, int]:
        raise NotImplementedError

    def rest(self) -> None:
        """Nothing has to be looked after."""

    def check_ready(self) -> None:
        pass

    def close(self) -> None:
        pass
