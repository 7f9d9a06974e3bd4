"""What rank 0 of a Ray group runs: the engine loop, fed with requests over ZeroMQ."""

import zmq
from torch import Tensor

from distkv.engine.engine import Engine
from distkv.engine.protocol import (
    Abort,
    Accepted,
    Add,
    EngineInfo,
    GetStats,
    Refused,
    ResetPrefixCache,
    Shutdown,
    Tokens,
    decode_command,
    encode,
)
from distkv.errors import CapacityError
from distkv.workers.group.channel import LeaderChannel
from distkv.workers.group.report import Report, ReportCollector
from distkv.workers.group.step_plan import StepPlan
from distkv.workers.rank import Rank

IDLE_POLL = 1000  # milliseconds


def lead(rank: Rank, followers: LeaderChannel, client: zmq.Socket, info: EngineInfo) -> None:
    """Serves the owner of the group on a PAIR socket until it sends Shutdown."""

    reports = ReportCollector(rank.group.size)

    def execute(plan: StepPlan, drawn: Tensor | None) -> tuple[Tensor | None, Report]:
        followers.send(plan)
        logits = rank.execute(plan, drawn)
        return logits, reports.add([rank.take_report(), *followers.receive()])

    engine = Engine(info, execute, survives=False, warm_up=rank.warm_up)
    while True:
        while client.poll(0 if engine.has_work else IDLE_POLL):
            match decode_command(client.recv()):
                case Add(requests):
                    try:
                        engine.add(requests)
                        client.send(encode(Accepted()))
                    except CapacityError as error:
                        client.send(encode(Refused(str(error))))
                case Abort(answers):
                    engine.abort(answers)
                case GetStats():
                    client.send(encode(engine.stats()))
                case ResetPrefixCache():
                    engine.reset_prefix_cache()
                    client.send(encode(Accepted()))
                case Shutdown():
                    engine.close()
                    return
        if outputs := engine.step():
            client.send(encode(Tokens(outputs)))
