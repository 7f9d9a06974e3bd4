"""What ends an answer by a token, and what its reader is told of it. The engine knows the end tokens of config and
generation config by itself, for requests that no front end makes."""

from distkv.engine.protocol import EngineInfo
from distkv.errors import RequestError
from distkv.frontend.tokenizer import Tokenizer
from distkv.sampling_params import SamplingParams

StopReasons = dict[int, int | str | None]
"""The tokens that end an answer, each with the `stop_reason` that the answer then has: the token where it was asked
for, the text of a special token that was asked for as such, None for an end token of the model's own."""


def stop_reasons(params: SamplingParams, info: EngineInfo, tokenizer: Tokenizer | None) -> StopReasons:
    """What ends the answers of a request; `info` has the end tokens of config, generation config and tokenizer.

    Raises RequestError for stop tokens and stop strings that can never come, such as those with a special token in them
    that ordinary tokens cannot spell.
    """
    reasons: StopReasons = {} if params.ignore_eos else dict.fromkeys(info.eos_token_ids)
    for token in params.stop_token_ids or ():
        if token >= info.vocab_size:
            raise RequestError(f"stop_token_ids has {token}; ids are integers below {info.vocab_size}")
        reasons.setdefault(token, token)
    if tokenizer is None:
        return reasons
    for stop in params.stop_strings:
        token_id = tokenizer.special_token_id(stop)
        if token_id is not None:
            reasons.setdefault(token_id, stop)
            continue
        for held, token in tokenizer.special_tokens.items():
            if params.skip_special_tokens and held and held in stop and not tokenizer.can_spell(held):
                raise RequestError(
                    f"stop has {stop!r}, and the special token {held!r} in it is no part of an answer's text; use "
                    f"{held!r} alone, or stop_token_ids=[{token}], or skip_special_tokens=False"
                )
    return reasons
