"""What rank 0 of a Ray group runs: the engine loop, fed with requests over ZeroMQ."""

from collections.abc import Callable

import zmq

from distkv.engine.engine import Engine
from distkv.engine.protocol import (
    Abort,
    Accepted,
    Add,
    EngineInfo,
    GetStats,
    Logged,
    Refused,
    ResetPrefixCache,
    Saving,
    Shutdown,
    Tokens,
    Traced,
    decode_command,
    encode,
)
from distkv.errors import CapacityError
from distkv.metrics.ray_metrics import RayMetrics
from distkv.metrics.step_trace import StepTrace
from distkv.workers.group.executor import Executor
from distkv.workers.group.log_lines import LogLine

IDLE_POLL = 1000  # milliseconds


def lead(
    executor: Executor, client: zmq.Socket, take_log: Callable[[], list[LogLine]], info: EngineInfo, traces: bool
) -> None:
    """Serves the owner of the group on a PAIR socket until it sends Shutdown, which may have asked for a trace."""
    trace = StepTrace(lambda events: client.send(encode(Traced(events)))) if traces else None
    try:
        engine = Engine(info, executor, survives=False, observer=trace)
        _serve(engine, client, take_log, RayMetrics(info, engine.meter))
    finally:
        client.send(encode(Logged(take_log())))


def _serve(engine: Engine, client: zmq.Socket, take_log: Callable[[], list[LogLine]], metrics: RayMetrics) -> None:
    while True:
        if metrics.is_due:
            metrics.update(engine.stats())
        while client.poll(0 if engine.has_work else IDLE_POLL):
            match decode_command(client.recv()):
                case Add(requests):
                    try:
                        engine.add(requests)
                        client.send(encode(Accepted()))
                    except CapacityError as error:
                        client.send(encode(Refused(str(error))))
                case Abort(answers, reason):
                    engine.abort(answers, reason)
                case GetStats():
                    client.send(encode(engine.stats()))
                case ResetPrefixCache():
                    engine.reset_prefix_cache()
                    client.send(encode(Accepted()))
                case Shutdown():
                    engine.close(lambda num_unsaved: client.send(encode(Saving(num_unsaved))))
                    return
        if outputs := engine.step():
            client.send(encode(Tokens(outputs)))
        if lines := take_log():
            client.send(encode(Logged(lines)))
