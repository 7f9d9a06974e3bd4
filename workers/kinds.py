"""The kinds of machines that ranks run on, and what is known of each by its name, where there is no such machine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What is known of a kind of machine by the name that `EngineConfig.device` has for it."""

    module: str  # it has `make_backend`, and is imported where such a machine is used
    resource: str  # as Ray counts it
    collectives: str  # what carries tensors between ranks, see `ProcessGroup`
    reads_ahead: bool  # whether pages that stream from disk pass through host memory, see `ReadAhead`
    follows_policies: bool  # whether its kernels know `attention_policy`
    has_link: bool  # whether pages cross to it from its host, which may have a share of attention
    has_bits_of_host: bool  # whether what the host computes of attention has the bits of its own kernels
    load_pieces: int  # pieces of a prefix in a buffer of the staging ring, unless an option says how large that is
    is_simulated: bool = False  # whether it is another one behind a link, see `EngineConfig.link_bytes_per_second`


KINDS = {
    "cpu": Kind(
        "distkv.workers.backends.cpu",
        "CPU",
        "gloo",
        reads_ahead=False,
        follows_policies=True,
        has_link=False,
        has_bits_of_host=True,
        load_pieces=1,
    ),
    # enqueuing a load takes the host a tenth of a millisecond, for which the link brings more than one piece
    "cuda": Kind(
        "distkv.workers.backends.cuda",
        "GPU",
        "nccl",
        reads_ahead=True,
        follows_policies=False,
        has_link=True,
        has_bits_of_host=False,
        load_pieces=4,
    ),
    "simulated": Kind(
        "distkv.workers.backends.simulated",
        "CPU",
        "gloo",
        reads_ahead=False,
        follows_policies=False,
        has_link=True,
        has_bits_of_host=True,
        load_pieces=1,
        is_simulated=True,
    ),
}
