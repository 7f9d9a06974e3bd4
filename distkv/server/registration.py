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

REGISTER_SECONDS = 90.0
END_SECONDS = 5.0


class Registration:
    """A name, kept until `close`."""

    def __init__(self, name: str, ray_address: str | None, host: str, port: int, api_key: str | None):
        """Registers what listens there; returns when it can be found.

        Raises ConfigError when no cluster can be joined (none is started), and when the name is taken.
        """
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = theirs, name, ray_address, host, port, api_key
        self._process = context.Process(target=_keep, args=arguments, name="distkv name", daemon=True)
        try:
            with closing(theirs):
                self._process.start()
            if not self._pipe.poll(REGISTER_SECONDS):
                raise DistKVError(
                    f"the Ray cluster did not register {name!r} within {REGISTER_SECONDS:.0f} s; is it well?"
                )
            answer = self._pipe.recv()
        except EOFError:
            self.close()
            raise DistKVError(f"the process that was to register {name!r} has ended; what it wrote says why") from None
        except BaseException:
            self.close()
            raise
        if isinstance(answer, DistKVError):
            self.close()
            raise answer
        log.info("%r is the name of this server at the Ray cluster at %s, and its address there %s", name, *answer)

    def watch(self) -> None:
        """Has the running event loop warn when the name is lost."""
        loop = asyncio.get_running_loop()

        def lost() -> None:
            loop.remove_reader(self._pipe)
            log.warning(
                "the Ray cluster is gone, and the name %r with it: the server goes on; start it anew to have the name again",
                self._name,
            )  # fmt: skip

        loop.add_reader(self._pipe, lost)

    def release(self) -> None:
        """Gives the name up, without waiting until it is free."""
        if not self._pipe.closed:
            with suppress(RuntimeError):  # no loop runs any more
                asyncio.get_running_loop().remove_reader(self._pipe)
            self._pipe.close()

    def close(self) -> None:
        """Gives the name up, and waits for the process that has kept it."""
        self.release()
        if self._process.pid is not None:
            self._process.join(END_SECONDS)
            self._process.kill()
            self._process.join()


@contextmanager
def registered(
    name: str | None, ray_address: str | None, host: str, port: int, api_key: str | None
) -> Iterator[Registration | None]:
    """Keeps a name for as long as this lasts, if there is to be one; else as `Registration`."""
    if name is None:
        yield None
        return
    with closing(Registration(name, ray_address, host, port, api_key)) as registration:
        yield registration


def _keep(pipe: Connection, name: str, *arguments: Any) -> None:
    """What the process does: registers, says how that went, and waits for the end of the server or of its use."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server gets it too, and lets what runs end
    try:
        answer, release = _register(name, *arguments)
    except DistKVError as error:
        pipe.send(error)
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which Ray has taken over
    with suppress(EOFError, OSError):
        pipe.send(answer)
        pipe.recv()
    release()


def _register(
    name: str, ray_address: str | None, host: str, port: int, api_key: str | None
) -> tuple[tuple[str, str], Callable[[], None]]:
    """Registers the name; returns the addresses of the cluster and of the server, and what gives the name up."""
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
    here = ray.get_runtime_context().get_node_id()
    if ip_address(host.partition("%")[0]).is_unspecified:
        host = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here)
    url = http_url(host, port)
    options: dict[str, Any] = {
        "name": name, "namespace": NAMESPACE, "num_cpus": 0, "max_restarts": -1,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False),
    }  # fmt: skip
    try:
        actor = (
            ray.remote(NamedServer)
            .options(**options)
            .remote(msgspec.json.encode(Card(url, here, __version__, api_key)))
        )
        ray.get(actor.card.remote(), timeout=REGISTER_SECONDS)
    except ValueError as error:
        raise ConfigError(
            f"the name {name!r} is taken at this Ray cluster; give another --name, or end the server that has it"
        ) from error
    except RayActorError as error:
        raise ConfigError(
            TOKENS_DIFFER if tokens_differ(error) else f"the Ray cluster cannot keep a name: {cause_of(error)}"
        ) from error
    except GetTimeoutError as error:
        raise DistKVError(f"the Ray cluster did not register {name!r}; see whether it has room for an actor") from error

    def release() -> None:
        with suppress(Exception):  # it ends with this process all the same
            ray.kill(actor)
        disconnect()

    return (ray.get_runtime_context().gcs_address, url), release
