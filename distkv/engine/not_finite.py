"""Why an answer ends whose next token could not be sampled, see `NO_TOKEN`."""

from distkv.errors import DistKVError
from distkv.sampling_params import SamplingParams


def not_finite(model: str, params: SamplingParams) -> DistKVError:
    """The error of a request whose logits are not finite."""
    cure = "look for NaN and infinity in its weights, or give dtype='float32' where a narrower one may overflow"
    if params.repetition_penalty != 1:
        cure += f"; or repetition_penalty {params.repetition_penalty:g} takes them out of range"
    return DistKVError(f"the logits of this request are not finite: model {model!r} gives NaN or infinity; {cure}")
