"""Why an answer ends whose next token could not be sampled, see `NO_TOKEN`."""

from distkv.engine.protocol import EngineRequest
from distkv.engine.token_rules import TokenRules
from distkv.errors import DistKVError, RequestError

LIMITS = ("allowed_token_ids", "bad_words", "min_tokens", "structured_outputs")
"""Parameters that may together leave no token."""


def no_token(model: str, request: EngineRequest, rules: TokenRules | None) -> DistKVError:
    """The error of a request whose logits, with what it asks for, are no numbers to choose by: a RequestError where its
    limits may be the cause."""
    params = request.params
    if rules is not None and rules.grammar is not None and rules.grammar.error:
        return RequestError(
            f"structured_outputs cannot go on ({rules.grammar.error}); give a simpler schema, expression or grammar"
        )
    limits = [name for name in LIMITS if getattr(params, name)]
    if limits:
        return RequestError(
            f"{' and '.join(limits)} leave no token that may come next, or model {model!r} gives NaN or infinity; make "
            "room for a token"
        )
    cure = "look for NaN and infinity in its weights, or give dtype='float32' where a narrower one may overflow"
    if params.repetition_penalty != 1:
        cure += f"; or repetition_penalty {params.repetition_penalty:g} takes them out of range"
    return DistKVError(f"the logits of this request are not finite: model {model!r} gives NaN or infinity; {cure}")
