"""SIGTERM as an orderly end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from distkv.errors import ConfigError

EXIT_CODE = 128 + signal.SIGTERM


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """For as long as this lasts, SIGTERM raises SystemExit in the main thread, and does not end the process on the
    spot. So `with` blocks are left, and every LLM is closed, which saves its KV pages. The exit code is 143, which a
    shell gives whoever died of SIGTERM. A second one ends the process at once.

    Raises ConfigError in any other thread, since Python lets the main thread alone handle signals.

    Example:
        with distkv.exit_on_sigterm(), distkv.LLM("path/to/model", cache_dir="/nvme/kv") as llm:
            ...
    """
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError("exit_on_sigterm was entered in another thread than the main one; enter it there")

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        signal.alarm(0)  # by which Ray's own handler aborts the process three seconds later
        raise SystemExit(EXIT_CODE)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
