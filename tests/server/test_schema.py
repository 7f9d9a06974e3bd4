"""schemathesis sends whatever the OpenAPI document allows, and what it does not: nothing may be the server's fault."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from support.servers import ServerProcess


@pytest.fixture(scope="module")
def small(talker: Path) -> Iterator[ServerProcess]:
    """A server of short answers."""
    flags = ("--max-model-len", "64", "--page-size", "16", "--device-kv-bytes", "4MiB", "--num-threads", "1")
    with ServerProcess(talker, *flags) as server:
        yield server
        server.await_idle()
        assert "Traceback" not in server.log, server.log


@schemathesis.serializer("application/zip")
def as_it_is(_: Any, value: Any) -> bytes:
    """For bodies that are no JSON."""
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


@pytest.mark.slow
@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_is_the_servers_fault(small: ServerProcess, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 12
    for operation in operations:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
        def send(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=[not_a_server_error])

        with contextlib.suppress(Unsatisfiable):  # nothing can be wrong with one that takes nothing
            send()


CORNERS = [
    b"", b"null", b"[]", b"1", b'"a"', b"{", b"[" * 100_000, b'{"prompt": ' + b"[" * 20_000, b"\xff\xfe",
    b'{"prompt": NaN}',
    b'{"prompt": "\\ud800"}', b'{"prompt": "a", "stop": "\\ud800"}', b'{"prompt": "a", "model": "\\ud800"}',
    b'{"prompt": "a", "\\ud800": 1}', b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "a", "max_tokens": 1e3}',
    b'{"prompt": "a", "cache_salt": "\\ud800"}', b'{"prompt": [true]}', b'{"prompt": [1.5]}', b'{"prompt": [[]]}',
    b'{"prompt": "a\\u0000b", "max_tokens": 1}', b'{"messages": [{"role": "\\ud800", "content": "a"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"messages": [{"role": "user", "content": {}}]}',
    b'{"messages": [{"role": "user"}]}', b'{"messages": [{"content": "a"}]}',
    b'{"messages": [{"role": "user", "content": [1]}]}',
    b'{"messages": [{"role": "assistant", "content": "a", "token_ids": ["b"]}, {"role": "user", "content": "a"}]}',
    b'{"messages": [{"role": "assistant", "content": "a", "token_ids": [-1]}, {"role": "user", "content": "a"}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "session": "a"}',
    b'{"messages": [{"role": "user", "content": "a"}], "system": [{}], "max_tokens": 1}',
    b'{"input": [{"role": [], "content": "a"}]}', b'{"input": [{"type": {}}]}', b'{"input": [[]]}',
    b'{"input": "a", "previous_response_id": "\\ud800"}', b'{"input": "a", "metadata": {"a": "\\ud800"}}',
    b'{"items": []}', b'{"items": [{}]}', b'{"items": [{"sampling_params": {"max_tokens": -1}, "prompt": "a"}]}',
    b'{"items": [{"sampling_params": {"top_q": 1}, "prompt": "a"}]}',
    b'{"items": [{"sampling_params": {}, "prompt": "a"}]}',
    b'{"tokens": [-1]}', b'{"tokens": [9e99]}', b'{"tokens": []}', b'{"prompt": ""}',
]  # fmt: skip
PATHS = (
    "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    "/generate", "/tokenize", "/detokenize", "/reset_prefix_cache",
    "/plan",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_no_corner_is_the_servers_fault(server: ServerProcess, path: str) -> None:
    with httpx2.Client(base_url=server.url, headers={"content-type": "application/json"}, timeout=60) as client:
        for content in CORNERS:
            answer = client.post(path, content=content)
            assert answer.status_code in (200, 400, 404), (content[:80], answer.text)
            assert answer.is_success or answer.json()["error"]["message"]
