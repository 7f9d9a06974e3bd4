"""What is mangled on its way between the ranks of a group is refused, and neither runs nor takes memory."""

import random
from collections import Counter
from pathlib import Path

import pytest
from support.checkpoints import save_llama
from support.plans import sequence_step, step_plan
from support.ranks import load_rank

from distkv.engine.protocol import Add, EngineRequest, TokenOutput, Tokens, decode_command, decode_reply
from distkv.engine.protocol import encode as encode_message
from distkv.sampling_params import SamplingParams
from distkv.storage.tier import Tier, Transfer
from distkv.workers.errors import DistKVError
from distkv.workers.group.private_socket import decoded
from distkv.workers.group.report import Report, decode_report, encode_report
from distkv.workers.group.step_plan import StepPlan, decode, encode

ADD = Add([EngineRequest("a", [1, 2, 3], SamplingParams(stop=["a"]), 5, 7, begun={0: [4]})])
HUGE = [
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xcf" + b"\xff" * 8,
    b"\x91" * 9999,
]


def mangled(rng: random.Random, message: bytes) -> bytes:
    """Bytes that are changed, missing, doubled, or claim to be more than there is."""
    content = bytearray(message)
    place = rng.randrange(len(content))
    match rng.randrange(4):
        case 0:
            for _ in range(rng.choice([1, 2, 8])):
                content[rng.randrange(len(content))] = rng.randrange(256)
        case 1:
            del content[place:]
        case 2:
            content[place:place] = content[: rng.randrange(40)]
        case 3:
            content[place : place + 1] = rng.choice(HUGE)
    return bytes(content)


def test_messages_that_cannot_be_read() -> None:
    rng, read = random.Random(1), Counter[bool]()
    tokens = Tokens([TokenOutput("a", 0, 5, None, None, None)])
    report = Report([1], [(2, "x")], {3: b"a"}, [(4, "y")], {"a": 5}, [6], [(30, "distkv", "t")])
    for _ in range(3000):
        for decode_one, message in (
            (decode_command, encode_message(ADD)), (decode_reply, encode_message(tokens)),
            (decode_report, encode_report(report)),
        ):  # fmt: skip
            try:
                decoded(decode_one, mangled(rng, message))  # type: ignore[arg-type, operator]
                read[True] += 1
            except DistKVError as error:
                assert "within the group cannot be read (" in str(error)
                read[False] += 1
    assert read[True] > 100 and read[False] > 1000


def test_plans_that_cannot_be_run(tmp_path: Path) -> None:
    """A rank whose kernels go where plans send them: without the check it reads and writes outside of its pools."""
    rank = load_rank(save_llama(tmp_path)[0], num_pages=8)
    steps = [sequence_step([5, 6, 7] * 6, 0, [3, 1], 18, 1), sequence_step([9], 20, [2, 5], 21, 1)]
    plan = step_plan(steps, copies=[(1, 2)], clear=[3])
    ends: Counter[str] = Counter()
    for seed in range(4000):
        rng = random.Random(seed)
        try:
            found = decoded(decode, mangled(rng, encode(plan)))
            rank.plan_check.check(found)
            found.transfers, found.await_ids, found.num_sampled = [], [], 0
            rank.execute(found)
            ends["run"] += 1
        except DistKVError as error:
            ends[" ".join(str(error).split()[:3])] += 1
        rank.take_report()
    assert ends["run"] > 100 and ends["a step plan"] > 100 and ends["a message of"] > 1000, ends


@pytest.mark.parametrize(
    "change, words",
    [
        ({"copies": [(0, 8)]}, "a device slot is 8, of 8"),
        ({"clear": [-1]}, "a device slot is -1, of 8"),
        ({"relocated": [(2**40, 0)]}, "a page is 1099511627776, of 16"),
        ({"relocated": [(0, -3)]}, "a slot of HOST is 2, of 0"),
        ({"transfers": [Transfer(1, Tier.DEVICE, 0, Tier.DISK, 0)]}, "no page goes from DEVICE to DISK"),
        ({"transfers": [Transfer(1, Tier.DEVICE, 0, Tier.HOST, 0)]}, "a slot of HOST is 0, of 0"),
        ({"adopt": {0: b""}}, "a slot of DISK is 0, of 0"),
        ({"num_sampled": 10**9}, "the number of sampled tokens is 1000000000, of 65"),
    ],
)
def test_numbers_that_are_out_of_range(tmp_path: Path, change: dict[str, object], words: str) -> None:
    rank = load_rank(save_llama(tmp_path)[0], num_pages=8)
    plan = StepPlan([], [], [])
    rank.plan_check.check(plan)
    for name, value in change.items():
        setattr(plan, name, value)
    with pytest.raises(DistKVError, match=rf"a step plan of the leader's cannot be run: {words}"):
        rank.plan_check.check(plan)
