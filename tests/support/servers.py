"""`distkv serve` in a process of its own."""

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
from support.checkpoints import save_llama
from support.processes import ROOT
from support.tokenizers import save_tokenizer
from tokenizers import Tokenizer

from distkv import Client

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def save_talker(folder: Path) -> Path:
    """A small random model with a tokenizer of its own, of which each byte is a token, and a chat template."""
    save_tokenizer(folder, "byte level", chat_template=TEMPLATE)
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    ends = {"eos_token_id": size - 3, "bos_token_id": size - 4}
    save_llama(folder, vocab_size=size, max_position_embeddings=2048, **ends)
    return folder


class ServerProcess:
    """A server on a free port, which is killed in the end. Use it as a context manager; `url` is known then."""

    url: str

    def __init__(self, model: Path | str, *flags: str, env: dict[str, str] | None = None):
        self._start(["serve", str(model), *flags], env)

    def _start(self, command: list[str], env: dict[str, str] | None) -> None:
        command = [sys.executable, "-m", "distkv", *command, "--port", "0"]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, it is closed in the end
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log, text=True, cwd=ROOT, env=env
        )  # fmt: skip

    def __enter__(self) -> "ServerProcess":
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert " at http" in line, line + self.log
        self.url = line.split()[-1]
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self._log.close()

    @property
    def log(self) -> str:
        """What it has written on stderr."""
        self._log.seek(0)
        return self._log.read()

    def terminate(self) -> int:
        """Sends SIGTERM, waits for the end and returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait()

    def get(self, path: str, **options: Any) -> httpx2.Response:
        """What a GET of a path brings."""
        return httpx2.get(self.url + path, timeout=60, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        """What a POST of JSON to a path brings."""
        return httpx2.post(self.url + path, json=body, timeout=60, **options)

    def await_idle(self, api_key: str | None = None) -> None:
        """Returns when nothing runs and no page is held; fails when that does not come."""
        deadline = time.monotonic() + 60
        with Client(self.url, api_key=api_key) as client:
            while (stats := client.stats()).num_running or stats.num_waiting or stats.pages_in_use:
                assert time.monotonic() < deadline, stats
                time.sleep(0.01)


class PlannerProcess(ServerProcess):
    """The planner without a model, as `distkv plan --serve` serves it."""

    def __init__(self, *flags: str, env: dict[str, str] | None = None):
        self._start(["plan", "--serve", *flags], env)

    def __enter__(self) -> "PlannerProcess":
        super().__enter__()
        self.url = self.url.removesuffix("/plan")
        return self
