"""How the tokens of a step are sampled."""

from distkv.engine.sequence import Sequence
from distkv.engine.sequence_work import SequenceWork
from distkv.workers.sampling.sample_row import SampleRow, uniform_number


def sample_rows(step: list[SequenceWork]) -> list[SampleRow]:
    """What is to be sampled from a step's logits: one token for an answer being written and one behind each token
    of its draft, one for each answer of a request whose prompt has just been read. What would come next in a draft
    is sampled as it will be once the draft is checked."""
    rows: list[SampleRow] = []
    logits_row = 0
    for work in step:
        if work.sampled_index is None:
            continue
        one = work.sequence
        if work.is_drafting:
            rows.append(_sample_row(one, one.index, logits_row, None, work.draft))
            rows[-1].num_logprobs = None
            logits_row += 1
            continue
        for index in [one.index] if one.is_alone else range(one.request.params.n):
            rows.append(_sample_row(one, index, logits_row, work.pending_index, []))
        for count in range(1, len(work.draft) + 1):
            rows.append(_sample_row(one, one.index, logits_row + count, None, work.draft[:count]))
        logits_row += 1 + len(work.draft)
    return rows


def _sample_row(
    sequence: Sequence, index: int, logits_row: int, pending_index: int | None, draft: list[int]
) -> SampleRow:
    """How the token behind those of a draft is sampled, or behind the answer's own where there is none."""
    params = sequence.request.params
    position = sequence.num_output_tokens + (pending_index is not None) + len(draft)
    row = plain_row(sequence, index, logits_row, position)
    row.repetition_penalty = params.repetition_penalty
    row.presence_penalty, row.frequency_penalty = params.presence_penalty, params.frequency_penalty
    row.num_logprobs, row.pending = params.logprobs, pending_index
    if row.penalised:
        row.output_token_ids.extend(sequence.output_token_ids + draft)
    if sequence.rules is not None:
        row.edits = sequence.rules.edits(sequence.output_token_ids, pending_index is not None, draft)
    return row


def plain_row(sequence: Sequence, index: int, logits_row: int, position: int) -> SampleRow:
    """How a token of an answer is drawn, but for what the request does to logits besides and what it is told of them.

    Args:
        index: of the answer among those of the request.
        position: of the token in the answer.
    """
    params, request = sequence.request.params, sequence.request
    return SampleRow(
        logits_row=logits_row,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        num_logprobs=None,
        uniform=uniform_number(request.seed, index, position) if params.temperature > 0 else 0.0,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=[],
    )
