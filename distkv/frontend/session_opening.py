"""Sessions that an event loop has opened: in a thread, since whoever opens one may wait seconds for another node."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future

from distkv.frontend.session import Session


async def open_in_thread(open_session: Callable[[], Session]) -> Session:
    """The session that `open_session` opens, and as it raises.

    A task that is cancelled meanwhile ends at once; what the thread opens all the same, it closes again.
    """
    opened: Future[Session] = Future()

    def run() -> Session:
        session = open_session()
        opened.set_result(session)
        return session

    try:
        return await asyncio.to_thread(run)
    except BaseException:
        opened.add_done_callback(lambda opened: opened.result().close())  # in that thread, or here if it is done
        raise
