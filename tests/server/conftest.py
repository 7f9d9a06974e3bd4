"""A server over a small random model, for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from support.servers import ServerProcess, save_talker


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random model that has a tokenizer and a chat template."""
    return save_talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's folder for pages and sessions."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def server(talker: Path, cache_dir: Path) -> Iterator[ServerProcess]:
    """A server that serves it as "talker", with a folder for sessions."""
    flags = (
        "--served-model-name", "talker", "--served-model-name", "other", "--page-size", "16", "--device-kv-bytes",
        "8MiB", "--host-kv-bytes", "2MiB", "--disk-kv-bytes", "2MiB", "--cache-dir",
        str(cache_dir), "--max-num-seqs", "64", "--num-threads", "1",
    )  # fmt: skip
    with ServerProcess(talker, *flags) as server:
        yield server
        server.await_idle()
        log = server.log
    assert "Traceback" not in log, log


@pytest.fixture(scope="session")
def openai(server: ServerProcess) -> Iterator[OpenAI]:
    """OpenAI's own client of it, which tries nothing twice."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
