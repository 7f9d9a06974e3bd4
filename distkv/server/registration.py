"""The name of a server at a Ray cluster, by which `Client.attach` finds it.

A process of its own keeps it: Ray ends whatever is connected to a cluster whose head has been gone for a minute or two,
and the server is to go on. That process ends with the server, however that ends, and the name with it.
"""

import asyncio
import logging
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from ipaddress import ip_address
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from distkv import __version__
from distkv.client.card import NAMESPACE, Card, http_url
from distkv.errors import ConfigError, DistKVError

log = logging.getLogger(__name__)

REGISTER_SECONDS = 60.0
START_SECONDS = 60.0  # more, for the process to start and to join the cluster
END_SECONDS = 5.0


class Registration:
    """A name, kept until `close`."""

    def __init__(self, name: str, *place: Any):
        """Registers a server; returns when it can be found.

        Args:
            place: the other arguments of `_register`.

        Raises ConfigError when no cluster can be joined (none is started), and when the name is taken; DistKVError when
        the cluster does not do as it is asked.
        """
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_keep, args=(theirs, name, *place), name="distkv name", daemon=True)
        try:
            with closing(theirs):
                self._process.start()
            log.info(
                "%r is the name of this server at the Ray cluster at %s, and %s its URL there", name, *self._answer()
            )
        except BaseException:
            self.close()
            raise

    def watch(self) -> None:
        """Has the running event loop warn when the name is lost."""
        loop = asyncio.get_running_loop()

        def lost() -> None:
            loop.remove_reader(self._pipe)
            log.warning(
                "the name %r is lost: the process that keeps it has ended, as it does when the cluster's head is gone; "
                "the server goes on, and has the name again when it is started anew", self._name,
            )  # fmt: skip

        loop.add_reader(self._pipe, lost)

    def release(self) -> None:
        """Gives the name up, without waiting until it is free; in the event loop of `watch`, if there is one."""
        with suppress(RuntimeError, OSError):  # nobody watches, or it has been given up
            asyncio.get_running_loop().remove_reader(self._pipe)
        self._pipe.close()

    def close(self) -> None:
        """Gives the name up, and waits for the process that has kept it."""
        self.release()
        if self._process.pid is not None:
            self._process.join(END_SECONDS)
            self._process.kill()
            self._process.join()

    def _answer(self) -> tuple[str, str]:
        """What the process says, once it has registered the name."""
        seconds = START_SECONDS + REGISTER_SECONDS
        if not self._pipe.poll(seconds):
            raise DistKVError(
                f"the Ray cluster did not register {self._name!r} within {seconds:.0f} s; see if it is well"
            )
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise DistKVError(
                f"the process that was to register {self._name!r} has ended; what it wrote says why"
            ) from None
        if isinstance(answer, DistKVError):
            raise answer
        return answer


@contextmanager
def registered(name: str | None, *place: Any) -> Iterator[Registration | None]:
    """Keeps a name for as long as this lasts, if there is to be one; arguments and errors are those of
    `Registration`."""
    if name is None:
        yield None
        return
    with closing(Registration(name, *place)) as registration:
        yield registration


def _keep(pipe: Connection, *arguments: Any) -> None:
    """What the process does: registers, says how that went, and waits for the end of the server or of its use."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server gets it too, and lets what runs end
    try:
        answer, release = _register(*arguments)
    except DistKVError as error:
        pipe.send(error)
        return
    with suppress(EOFError, OSError):
        pipe.send(answer)
        pipe.recv()
    release()


def _register(
    name: str, ray_address: str | None, host: str, port: int, api_key: str | None
) -> tuple[tuple[str, str], Callable[[], None]]:
    """Registers a server that listens at `host`, an IP address, for those that have the key, if it is not None.

    Returns the addresses of the cluster and of the server, and what gives the name up.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from distkv.workers.group.ray_cluster import connect, disconnect
    from distkv.workers.group.ray_errors import TOKENS_DIFFER, cause_of, tokens_differ

    class NamedServer:
        """Pickled by value, as it is local: the cluster needs nothing of distkv's for it."""

        def __init__(self, card: bytes):
            self._card = card

        def card(self) -> bytes:
            return self._card

    connect(ray_address, None)
    context = ray.get_runtime_context()
    here = context.get_node_id()
    if ip_address(host.partition("%")[0]).is_unspecified:
        host = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here)
    url = http_url(host, port)
    options: dict[str, Any] = {
        "name": name, "namespace": NAMESPACE, "num_cpus": 0, "max_restarts": -1,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False),
    }  # fmt: skip
    try:
        card = msgspec.json.encode(Card(url, here, __version__, api_key))
        actor: Any = ray.remote(NamedServer).options(**options).remote(card)
        ray.get(actor.card.remote(), timeout=REGISTER_SECONDS)
    except ValueError as error:
        raise ConfigError(
            f"the name {name!r} is taken at the Ray cluster at {context.gcs_address}; give another --name, or end the "
            "server that has it"
        ) from error
    except RayActorError as error:
        raise ConfigError(
            TOKENS_DIFFER if tokens_differ(error) else f"the Ray cluster cannot keep a name: {cause_of(error)}"
        ) from error
    except GetTimeoutError as error:
        raise DistKVError(
            f"the Ray cluster did not register {name!r} within {REGISTER_SECONDS:.0f} s; see if it is well"
        ) from error

    def release() -> None:
        with suppress(Exception):  # it ends with this process all the same
            ray.kill(actor)
        disconnect()

    return (context.gcs_address, url), release
