"""What a request's parameters let the tokens of an answer be, as edits of the logits that each is sampled from."""

from distkv.engine.protocol import EngineInfo, EngineRequest
from distkv.structured_outputs.grammars import make_grammar
from distkv.workers.sampling.grammar import Grammar
from distkv.workers.sampling.row_edits import RowEdits, TokenBits, token_bits


class TokenRules:
    """The rules of one answer. What they allow is a function of the request and of the answer's tokens so far."""

    def __init__(self, request: EngineRequest, end_token_ids: frozenset[int], allowed: TokenBits | None):
        """
        Args:
            end_token_ids: the tokens that end the answer.
            allowed: `SamplingParams.allowed_token_ids`.
        """
        self.grammar: Grammar | None = None  # that the answer keeps to
        self._request = request
        self._ends = sorted(end_token_ids)
        self._allowed = allowed
        self._banned = [words[0] for words in request.bad_words_token_ids if len(words) == 1]
        self._banned_runs = [words for words in request.bad_words_token_ids if len(words) > 1]

    def fresh(self) -> "TokenRules":
        """The rules of another answer of the request, which has no tokens yet."""
        rules = TokenRules(self._request, frozenset(self._ends), self._allowed)
        rules.grammar = None if self.grammar is None else self.grammar.fresh()
        return rules

    def edits(self, answer: list[int], has_pending: bool, draft: list[int] | None = None) -> RowEdits:
        """What is done to the logits of the answer's next token. The one of the answer itself is resolved before those
        of drafts behind it.

        Args:
            answer: its tokens, as far as they are known.
            has_pending: the answer has one token more.
            draft: tokens behind it that may be the answer's.
        """
        params = self._request.params
        edits = RowEdits(params.logit_bias or {}, list(self._banned), [], self._allowed, self.grammar)
        tokens = answer + draft if draft else answer
        num_known = len(tokens)
        if num_known + has_pending < params.min_tokens:
            edits.forbidden += self._ends
        for *before, token in self._banned_runs:
            known = before[:-1] if has_pending else before
            if len(known) > num_known or tokens[num_known - len(known) :] != known:
                continue
            if has_pending:
                edits.forbidden_after.append((token, before[-1]))
            else:
                edits.forbidden.append(token)
        if self.grammar is not None:
            assert self.grammar.num_tokens <= len(answer), "a grammar is told tokens that are the answer's"
            edits.grammar_tokens = [] if draft else answer[self.grammar.num_tokens :]
            edits.grammar_draft = draft or []
        return edits


def make_rules(request: EngineRequest, info: EngineInfo) -> TokenRules | None:
    """The rules of a request's first answer; None where there are none. Raises RequestError as `make_grammar` does."""
    params = request.params
    if not (
        params.min_tokens
        or params.logit_bias
        or params.allowed_token_ids is not None
        or params.structured_outputs is not None
        or request.bad_words_token_ids
    ):
        return None
    stops = request.stop_token_ids | (frozenset() if params.ignore_eos else frozenset(info.eos_token_ids))
    ends = frozenset(token for token in stops if 0 <= token < info.vocab_size)  # a config may name others
    allowed = None if params.allowed_token_ids is None else token_bits(params.allowed_token_ids, info.vocab_size)
    rules = TokenRules(request, ends, allowed)
    if params.structured_outputs is not None:
        rules.grammar = make_grammar(info.model, info.vocab_size, params.structured_outputs, ends)
    return rules
