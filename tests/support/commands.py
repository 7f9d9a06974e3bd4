"""Commands as a user types them, in the process of the tests."""

import io
import subprocess
import sys
from collections.abc import Callable

import pytest

from distkv.commands.main import main

Run = Callable[..., subprocess.CompletedProcess[str]]


def make_run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """See the fixture `run_here`."""

    def run_here(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["distkv", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            assert isinstance(end.code, int)
            code = end.code
        printed = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, code, printed.out, printed.err)

    return run_here
