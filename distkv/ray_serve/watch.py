"""Whether a deployed application runs and answers, for whoever has started it and stays with it."""

import logging
import re
import time
from typing import Any

import httpx2
import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ReplicaState

from distkv.client.serve_app import application_url, serve_details
from distkv.errors import CapacityError, ConfigError, DistKVError
from distkv.ray_serve.signals import Signals

log = logging.getLogger(__name__)

POLL_SECONDS = 0.3
LOOK_SECONDS = 2.0  # between two looks at an application that answers
SILENCE_SECONDS = 30.0  # in which one whose replicas run is to answer at this node
REMARK_SECONDS = 20.0  # for which replicas may be missing without a word
ANSWER_SECONDS = 5.0
NUM_SILENCES = 2  # looks in a row that find no answer, after which that is said
OWN_ERROR = re.compile(r"\bdistkv(?:\.[\w.]+)?\.(\w+): (.+)")
NO_MODULE = "No module named 'distkv"
SLOW = "have taken more than"  # 30 s to start, says Serve, as a large model does


class Watch:
    """Follows an application by Serve's status and by its own answers."""

    def __init__(self, name: str, url: str, wanted: dict[str, int], signals: Signals):
        """
        Args:
            wanted: replicas of each deployment.
        """
        self._name, self._url, self._signals = name, url, signals
        self._missing = Missing(name, wanted)
        self._status = ApplicationStatus.DEPLOYING

    def await_answer(self) -> str | None:
        """Waits until requests are answered, by one replica at least; returns where they are, at this node's proxy or
        at another one, or None when somebody has sent a signal.

        Raises DistKVError when the application is gone, and as `failure` says when it cannot run.
        """
        runs_since: float | None = None  # monotonic time
        while not self._signals.num_come:
            found = self._look()
            if all(num_running(found, deployment) for deployment in self._missing.wanted):
                if silence(self._url) is None:
                    return self._url
                now = time.monotonic()
                runs_since = now if runs_since is None else runs_since
                if now - runs_since > SILENCE_SECONDS:  # it may be that no proxy listens on this node
                    details = serve_details()
                    if self._name in details["applications"]:
                        node_id = ray.get_runtime_context().get_node_id()
                        self._url = application_url(self._name, details, node_id)
            self._signals.sleep(POLL_SECONDS)
        return None

    def stay(self) -> None:
        """Waits for a signal, and says what changes meanwhile. Raises as `await_answer`."""
        answers = Answers(self._url)
        while not self._signals.num_come:
            self._signals.sleep(LOOK_SECONDS)
            before, found = self._status, self._look()
            if found.status != before and (before, found.status) != (
                ApplicationStatus.DEPLOYING, ApplicationStatus.RUNNING,
            ):  # fmt: skip
                log.warning("the application %r is %s now", self._name, found.status.value.lower())
            if not self._signals.num_come:
                answers.look()

    def _look(self) -> ApplicationStatusOverview:
        found = serve.status().applications.get(self._name)
        if found is None:
            raise DistKVError(f"the application {self._name!r} was deleted; serve it anew to go on")
        if found.status == ApplicationStatus.DEPLOY_FAILED:
            raise failure(found)
        self._missing.look(found)
        self._status = found.status
        return found


class Missing:
    """Says which replicas an application lacks, and why, once that has taken a while and whenever it changes."""

    def __init__(self, name: str, wanted: dict[str, int]):
        self.wanted = wanted
        self._name = name
        self._since: float | None = None  # monotonic time since which some are missing
        self._told: dict[str, tuple[int, str]] = {}  # how many run of each deployment, and why no more do
        self._reasons: dict[str, tuple[int, str]] = {}

    def look(self, found: ApplicationStatusOverview) -> None:
        """Takes the application's status of this moment."""
        states = {name: self._state(found, name) for name in self.wanted}
        lacking = {name: state for name, state in states.items() if state[0] < self.wanted[name]}
        now = time.monotonic()
        if not lacking:
            if self._told:
                log.warning("the application %r has all its replicas now", self._name)
            self._since, self._told = None, {}
            return
        self._since = now if self._since is None else self._since
        if now - self._since >= REMARK_SECONDS and lacking != self._told:
            self._told = lacking
            texts = (self._text(found, name, *state) for name, state in lacking.items())
            log.warning("the application %r waits for replicas: %s", self._name, "; ".join(texts))

    def _state(self, found: ApplicationStatusOverview, name: str) -> tuple[int, str]:
        """How many replicas of a deployment run, and the last reason that was given while it was that many: Serve
        forgets the one of a replica that it starts once more."""
        running = num_running(found, name)
        known_with, reason = self._reasons.get(name, (running, ""))
        deployment = found.deployments.get(name)
        told = "" if deployment is None else reason_of(deployment.message)
        self._reasons[name] = state = (running, told or (reason if known_with == running else ""))
        return state

    def _text(self, found: ApplicationStatusOverview, name: str, running: int, reason: str) -> str:
        deployment = found.deployments.get(name)
        text = f"{running} of {self.wanted[name]} {name} run"
        for state, num in ({} if deployment is None else deployment.replica_states).items():
            if num and state != ReplicaState.RUNNING:
                text += f", {num} {ReplicaState(state).value.lower()}"
        return f"{text} ({reason})" if reason else text


class Answers:
    """Says once when a server does not answer any more, and once when it does again."""

    def __init__(self, url: str):
        self._url, self._num_silences = url, 0

    def look(self) -> None:
        """Asks it."""
        why = silence(self._url)
        if why is None:
            if self._num_silences >= NUM_SILENCES:
                log.warning("%s answers again", self._url)
            self._num_silences = 0
            return
        self._num_silences += 1
        if self._num_silences == NUM_SILENCES:
            log.warning("%s does not answer (%s); Ray Serve replaces what has died", self._url, why)


def silence(url: str) -> str | None:
    """Why a server does not answer requests, or None when it does."""
    try:
        status = httpx2.get(f"{url}/health", timeout=ANSWER_SECONDS).status_code
    except httpx2.HTTPError as error:
        return str(error) or type(error).__name__
    return None if status == 200 else f"status {status}"


def num_running(found: ApplicationStatusOverview, deployment: str) -> int:
    """How many replicas of a deployment run."""
    status = found.deployments.get(deployment)
    return 0 if status is None else status.replica_states.get(ReplicaState.RUNNING, 0)


def failure(found: ApplicationStatusOverview) -> DistKVError:
    """Why an application cannot run, as one line where distkv has said it."""
    texts = [one.message for one in found.deployments.values() if one.message] + [found.message]
    for text in texts:
        if NO_MODULE in text:
            return ConfigError(
                "Serve's replicas cannot import distkv; install it on every node, or submit with `ray job submit "
                "--working-dir` from a checkout"
            )
        if own := OWN_ERROR.findall(text):
            kind, message = own[-1]
            known: Any = {"ConfigError": ConfigError, "CapacityError": CapacityError}.get(kind, DistKVError)
            return known(message)
    return DistKVError(
        f"the application failed to start: {reason_of(texts[0]) or 'no reason is known'}; `serve status` has more"
    )


def reason_of(message: str) -> str:
    """What Serve's message about a deployment gives as the reason, in a line; nothing where it has none."""
    if own := OWN_ERROR.findall(message):
        return str(own[-1][1])
    return "" if SLOW in message else (message.strip().splitlines() or [""])[-1]
