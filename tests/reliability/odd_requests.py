"""Bodies and bytes that a server may get, and that nobody meant."""

import json
import random
from collections.abc import Callable
from typing import Any

CHAT = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {
        "prompt": "Hello", "max_tokens": 4, "temperature": 0.5, "n": 1, "stop": ["a"], "logprobs": 2, "seed": 3,
        "stream": False, "logit_bias": {"5": 1.0}, "cache_salt": "a", "min_tokens": 1, "bad_words": ["x"],
        "guided_choice": ["yes", "no"],
    }),
    ("/v1/completions", {
        "prompt": [[5, 6], [7]], "max_tokens": 3, "echo": True, "prompt_logprobs": 1, "stream": True,
        "structured_outputs": {"json": SCHEMA}, "stream_options": {"include_usage": True},
    }),
    ("/v1/chat/completions", {
        "messages": CHAT, "max_tokens": 3, "session": "s1", "logprobs": True, "top_logprobs": 2,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
        "chat_template_kwargs": {"a": 1},
    }),
    ("/v1/responses", {
        "input": "Hi", "max_output_tokens": 3, "instructions": "be", "metadata": {"a": "b"}, "store": True,
        "previous_response_id": None, "text": {"format": {"type": "text"}},
    }),
    ("/v1/messages", {
        "messages": CHAT, "max_tokens": 3, "system": "x", "stop_sequences": ["a"], "metadata": {"user_id": "a"},
    }),
    ("/v1/messages/count_tokens", {"messages": CHAT}),
    ("/tokenize", {"prompt": "abc", "add_special_tokens": True}),
    ("/tokenize", {"messages": CHAT}),
    ("/detokenize", {"tokens": [5, 6]}),
    ("/plan", {"model": "talker", "gpu": "h100", "context": 1000, "tensor_parallel_size": 2}),
    ("/generate", {"items": [{"prompt": [5], "sampling_params": {"max_tokens": 3, "output_kind": 2}, "priority": 1}]}),
    ("/reset_prefix_cache", {}),
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, -(10**30), 1e308, 1e-320, float("nan"), float("inf"), "",
    "a", "\0", "\ud800", "é" * 1000, "x" * 100_000, [], {}, [[]], [None], {"a": None}, [1e9], ["\ud800"],
    "../../etc/passwd", "%s%n", {"$ref": "#"}, {"type": "object", "properties": {"a": {"$ref": "#"}}}, "(a+)+$", "[",
    list(range(3000)), [[1] * 500] * 20,
]  # fmt: skip
NAMES = "x", "\ud800", "", "model", "n", "stop", "ignore_eos", "max_tokens", "priority", "top_p", "top_k", "regex"


def odd_body(rng: random.Random) -> tuple[str, bytes]:
    """A path and a body for it, in which something is other than it should be."""
    path, body = rng.choice(BODIES)
    content = bytearray(json.dumps(_changed(rng, body)).encode())
    if rng.random() < 0.1:
        for _ in range(rng.choice([1, 3, 20])):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif rng.random() < 0.03:
        del content[rng.randrange(len(content)) :]
    return path, bytes(content)


def _changed(rng: random.Random, value: Any) -> Any:
    drawn = rng.random()
    if drawn < 0.15:
        return rng.choice(VALUES)
    if drawn < 0.17:
        nested: Any = 1
        for _ in range(rng.choice([10, 100, 900])):
            nested = [nested]
        return nested
    if isinstance(value, dict):
        found = {
            name: _changed(rng, one) if rng.random() < 0.35 else one
            for name, one in value.items()
            if rng.random() > 0.1
        }
        return found | ({rng.choice(NAMES): rng.choice(VALUES)} if rng.random() < 0.1 else {})
    if isinstance(value, list):
        found_list = [_changed(rng, one) if rng.random() < 0.5 else one for one in value]
        return found_list * rng.choice([0, 2, 50]) if rng.random() < 0.2 else found_list
    return value if rng.random() < 0.3 else rng.choice(VALUES)


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\n"
BROKEN: list[Callable[[random.Random], bytes]] = [
    lambda rng: rng.randbytes(rng.choice([1, 100, 100_000])),
    lambda rng: b"\x16\x03\x01" + rng.randbytes(200),  # of TLS
    lambda rng: HEAD[: rng.randrange(len(HEAD))],
    lambda rng: HEAD + b"content-length: 100\r\n\r\n{",
    lambda rng: HEAD + b"content-length: -1\r\n\r\n{}",
    lambda rng: HEAD + b"content-length: 99999999999999999999999\r\n\r\n{}",
    lambda rng: HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    lambda rng: HEAD + b"transfer-encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n{}",
    lambda rng: HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\nzz\r\n",
    lambda rng: HEAD + b"a: " + b"b" * rng.choice([1000, 500_000]) + b"\r\n\r\n",
    lambda rng: HEAD + b"a: b\r\n" * rng.choice([100, 60_000]) + b"\r\n",
    lambda rng: b"GET /" + b"x" * rng.choice([10, 500_000]) + b" HTTP/1.1\r\nhost: here\r\n\r\n",
    lambda rng: b"GET /%ff%00%2e%2e HTTP/1.1\r\nhost: \xff\xfe\r\n\r\n",
    lambda rng: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    lambda rng: HEAD + b"expect: 100-continue\r\ncontent-length: 100000000\r\n\r\n" + bytes(100_000),
    lambda rng: b"GET /health HTTP/1.1\r\nhost: here\r\n\r\n" * 100,
    lambda rng: b"GET /health HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n" + rng.randbytes(50),
]
"""What may come on a connection."""
