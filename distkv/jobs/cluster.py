"""The job server of a Ray cluster, by the address of its dashboard, with errors that name their cure."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, cast
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import requests
from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from distkv.errors import ConfigError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Where `ray job submit` looks for an address, in its order. It has them win over its --address; here that wins."""
CONNECT_TIMEOUT = 10.0  # seconds until a dashboard says anything at all
AGENT_TIMEOUT = 60.0  # seconds for the part of a new cluster that starts jobs, which comes up last
FETCH_TIMEOUT = 3600  # seconds for one file
TIMEOUTS = {"GET": 20.0, "POST": 120.0}  # seconds that a request may bring nothing; an upload takes what it takes
LOG_SECONDS = 60.0  # without anything of a log, after which it is asked whether the job still runs
TOKEN_HELP = (
    "set RAY_AUTH_MODE=token, and have the cluster's token in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH "
    "names, or in ~/.ray/auth_token"
)


class ClusterAway(ConfigError):
    """Nothing answers, now."""


class LogLost(Exception):
    """The connection that brings a log."""


class Cluster:
    """A connection to the job server. All methods raise ConfigError when it refuses, ClusterAway when it is away."""

    def __init__(self, address: str | None):
        """Connects to `address`, else to what the environment names, else to a dashboard on this machine."""
        given = address or next(filter(None, map(os.environ.get, ADDRESS_VARIABLES)), None)
        self.address = (given or DEFAULT_ADDRESS).rstrip("/")
        for name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray"):
            logging.getLogger(name).setLevel(logging.WARNING)
        if "://" in self.address and not self.address.startswith("ray://"):
            self._knock()
        with self._explained(), _variable(ADDRESS_VARIABLES[0], self.address):  # else another one there would win
            self._client = JobSubmissionClient(self.address)
            self.address = self._client.get_address()
        self._client._do_request = partial(_request, self._client._do_request)  # type: ignore[method-assign]

    def submit(self, job: str, entrypoint: str, runtime_env: dict[str, Any]) -> None:
        """Uploads what the job needs and has it started."""
        deadline = time.monotonic() + AGENT_TIMEOUT
        while True:
            with self._explained():
                try:
                    self._client.submit_job(entrypoint=entrypoint, submission_id=job, runtime_env=runtime_env)
                    return
                except RuntimeError as error:
                    if "No available agent" not in str(error):
                        raise
                    if time.monotonic() > deadline:
                        raise ConfigError(
                            f"the cluster at {self.address} has started nothing that runs jobs: its dashboard agents "
                            "are not up, for two clusters on one machine because both want port 52365 "
                            "(`ray start --dashboard-agent-listen-port`)"
                        ) from error
            time.sleep(1)

    def details(self, job: str) -> Any:
        """Ray's `JobDetails` of a job."""
        with self._explained():
            try:
                return self._client.get_job_info(job)
            except RuntimeError as error:
                if "status code 5" in str(error):  # of a proxy in between, or of a dashboard that is starting
                    raise self._away() from error
                raise

    async def log(self, job: str) -> AsyncIterator[str]:
        """What the job prints, from its beginning, as it comes; ends with the job. Raises LogLost when the connection
        is lost, or has brought nothing for a while although the job has ended."""
        try:
            async with aclosing(cast(AsyncGenerator[str], self._client.tail_job_logs(job))) as texts:
                while (text := await self._next(texts, job)) is not None:
                    yield text
        except (ClientError, OSError, RuntimeError, ClusterAway) as error:
            raise LogLost(str(error)) from error

    async def _next(self, texts: AsyncIterator[str], job: str) -> str | None:
        """What a log brings next; None at its end."""
        coming = asyncio.create_task(_first(texts))
        try:
            while not (await asyncio.wait([coming], timeout=LOG_SECONDS))[0]:
                if (await asyncio.to_thread(self.details, job)).status.is_terminal():
                    raise LogLost("the log of a job that has ended does not end")
            return coming.result()
        finally:
            coming.cancel()
            await asyncio.wait([coming])  # `texts` cannot be closed by two

    def log_file(self, node: str, name: str) -> bytes:
        """A file of a node's folder of logs. Raises FileNotFoundError when there is none of that name."""
        # Ray's `get_log` takes the cluster's own address only, which a job's client need not reach
        wanted = {"node_id": node, "filename": name, "lines": -1, "timeout": FETCH_TIMEOUT}
        with self._explained():
            answer = self._client._do_request("GET", "/api/v0/logs/file", params=wanted, timeout=FETCH_TIMEOUT)
            if answer.status_code != 200 and "not found" in answer.text:
                raise FileNotFoundError(name)
            answer.raise_for_status()
            return answer.content

    def _knock(self) -> None:
        """Raises ConfigError unless something answers in time: Ray's own requests would wait for ever."""
        try:
            urlopen(f"{self.address}/api/version", timeout=CONNECT_TIMEOUT).close()
        except HTTPError:
            """It speaks HTTP; Ray's client says what is wrong."""
        except (URLError, OSError, ValueError) as error:
            raise self._away() from error

    def _away(self) -> ClusterAway:
        return ClusterAway(
            f"no Ray dashboard answers at {self.address}; give its address with --address or in RAY_API_SERVER_ADDRESS "
            "(`ray start --head` and `ray status` print it; on Kubernetes, kubectl port-forward service/NAME-head-svc "
            "8265)"
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise ConfigError(f"the Ray cluster at {self.address} asks for a token; {TOKEN_HELP}") from error
        except (FileNotFoundError, ConfigError):
            raise
        except (requests.JSONDecodeError, requests.HTTPError, KeyError) as error:
            raise ConfigError(
                f"what answers at {self.address} is not a Ray dashboard; name one by --address"
            ) from error
        except (requests.RequestException, OSError) as error:
            raise self._away() from error
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"Ray refuses: {_last_line(str(error))}") from error


def _request(do: Callable[..., Any], method: str, *path: str, **how: Any) -> Any:
    """One of the client's requests, which would wait for ever."""
    return do(method, *path, **{"timeout": TIMEOUTS.get(method), **how})


async def _first(texts: AsyncIterator[str]) -> str | None:
    return await anext(texts, None)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _last_line(text: str) -> str:
    """What a traceback ends with, or the text itself."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" .")]
    return lines[-1] if lines else "it does not say why"
