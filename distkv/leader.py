"""What rank 0 of a Ray group runs: the engine loop, fed by requests over ZeroMQ."""

from collections import defaultdict
from collections.abc import Callable

import zmq

from distkv.engine import Engine
from distkv.errors import CapacityError
from distkv.messages import (
    Abort,
    Accepted,
    Add,
    EngineInfo,
    GetStats,
    Refused,
    Shutdown,
    Tokens,
    decode_command,
    encode,
)
from distkv.workers.rank import Rank
from distkv.workers.step_plan import StepPlan

IDLE_POLL = 1000  # milliseconds


def lead(rank: Rank, send_plan: Callable[[StepPlan], None], requests: zmq.Socket, info: EngineInfo) -> None:
    """Serves clients on a ROUTER socket until one sends Shutdown."""

    def execute(plan: StepPlan):
        send_plan(plan)
        return rank.execute(plan)

    engine = Engine(info, execute)
    owners: dict[str, bytes] = {}  # request id -> client
    while True:
        while requests.poll(0 if engine.has_work else IDLE_POLL):
            client, message = requests.recv_multipart()
            match decode_command(message):
                case Add(added):
                    try:
                        engine.add(added)
                    except CapacityError as error:
                        requests.send_multipart([client, encode(Refused(str(error)))])
                        continue
                    owners |= {request.request_id: client for request in added}
                    requests.send_multipart([client, encode(Accepted())])
                case Abort(answers):
                    engine.abort(answers)
                case GetStats():
                    requests.send_multipart([client, encode(engine.stats())])
                case Shutdown():
                    return
        if engine.has_work:
            by_client = defaultdict(list)
            for output in engine.step():
                by_client[owners[output.request_id]].append(output)
            for client, outputs in by_client.items():
                requests.send_multipart([client, encode(Tokens(outputs))])
