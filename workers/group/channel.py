"""Step plans from the leader to the followers, and their reports back, over ZeroMQ."""

import zmq

from distkv.workers.group.log_lines import relay
from distkv.workers.group.private_socket import Address, bind_private, connect_private, decoded
from distkv.workers.group.report import Report, decode_report, encode_report
from distkv.workers.group.step_plan import StepPlan, decode, encode


class LeaderChannel:
    """The leader's end: a socket per follower, so that none misses a plan."""

    def __init__(self, context: zmq.Context, host: str, num_followers: int):
        bound = [bind_private(context, host) for _ in range(num_followers)]
        self.sockets = [socket for socket, _ in bound]
        self.addresses = [address for _, address in bound]  # one per follower, in order of rank

    def send(self, plan: StepPlan | None) -> None:
        """Sends a plan to all followers; None ends them."""
        message = b"" if plan is None else encode(plan)
        for socket in self.sockets:
            socket.send(message)

    def receive(self) -> list[Report]:
        """Waits for each follower's report of a plan, in order of rank, and logs here what they have logged."""
        reports = [decoded(decode_report, socket.recv()) for socket in self.sockets]
        for rank, report in enumerate(reports, 1):
            relay(report.log, rank)
        return reports


class FollowerChannel:
    """A follower's end."""

    def __init__(self, context: zmq.Context, address: Address):
        self._socket = connect_private(context, address)

    def receive(self) -> StepPlan | None:
        """Waits for the next plan; None means the end."""
        message = self._socket.recv()
        return decoded(decode, message) if message else None

    def send(self, report: Report) -> None:
        """Answers a plan."""
        self._socket.send(encode_report(report))
