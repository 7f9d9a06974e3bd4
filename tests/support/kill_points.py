"""Has a process kill itself at a moment that it does not choose. For code that `support.processes` starts."""

import os
import signal
import sys


def kill_at(event: str, number: int) -> None:
    """Sends SIGKILL to this process just before its audit event `event` (`os.rename`) happens for that many times."""
    count = 0

    def hook(name: str, arguments: object) -> None:
        nonlocal count
        count += name == event
        if name == event and count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
