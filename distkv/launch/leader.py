"""What rank 0 of a Ray group runs: the engine loop, fed with requests over ZeroMQ."""

import zmq

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
from distkv.workers.group.executor import Executor

IDLE_POLL = 1000  # milliseconds


def lead(executor: Executor, client: zmq.Socket, info: EngineInfo) -> None:
    """Serves the owner of the group on a PAIR socket until it sends Shutdown."""
    engine = Engine(info, executor, survives=False)
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
