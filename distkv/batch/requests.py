"""Input lines of OpenAI's batch-file format: a JSON object per line, which says what to ask of which route."""

import hashlib
from typing import Any

import msgspec
from msgspec import Raw

from distkv.errors import RequestError
from distkv.values import shown

CHAT, COMPLETIONS, RESPONSES = URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class LineError(RequestError):
    """An input line that no route could be asked with; the text has neither the line's number nor its id."""


class _Line(msgspec.Struct):
    """Values other than the id are looked at one by one, so that an error about them can still name the line."""

    custom_id: str
    method: Raw = Raw(b"null")
    url: Raw = Raw(b"null")
    body: Raw = Raw(b"null")


class _Model(msgspec.Struct):
    model: str | None = None


class Request(msgspec.Struct):
    """What a line asks for. The values of the body are as they stand there."""

    custom_id: str
    url: str
    body: dict[str, Raw]

    def sent(self, seed: int) -> bytes:
        """The body as a route gets it, with what a batch has other defaults for.

        Args:
            seed: of the whole batch.
        """
        body = dict(self.body)
        if _is_null(body.get("seed")):
            body["seed"] = Raw(str(line_seed(seed, self.custom_id)).encode())
        if self.url == RESPONSES and _is_null(body.get("store")):  # nobody goes on from it
            body["store"] = Raw(b"false")
        return msgspec.json.encode(body)


def line_seed(seed: int, custom_id: str) -> int:
    """The seed of a line that brings none: a function of the batch's and of the line's id, whatever is around it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {custom_id}".encode()).digest()[:8], "big") >> 1


def read_id(line: bytes) -> tuple[str, str | None]:
    """The id of an input line, and the model that it names, if any; raises LineError for what has no id."""
    found = _parse(line)
    try:
        return found.custom_id, msgspec.json.decode(found.body, type=_Model).model
    except UNREADABLE:
        return found.custom_id, None


def read_request(line: bytes) -> Request:
    """What an input line asks for; raises LineError when that is nothing that a batch can have answered."""
    found = _parse(line)
    method, url = _value("method", found.method), _value("url", found.url)
    if method != "POST":
        raise LineError(f"method is {shown(method)}; it must be 'POST'")
    if url not in URLS:
        raise LineError(f"url is {shown(url)}; use one of {', '.join(URLS)}")
    try:
        body = msgspec.json.decode(found.body, type=dict[str, Raw])
    except UNREADABLE:
        raise LineError(f"body is {shown(_value('body', found.body))}; it must be a JSON object") from None
    if "stream" in body and bytes(body["stream"]) not in (b"null", b"false"):
        raise LineError("stream is set, and a batch writes whole answers; leave it out")
    if not _is_null(body.get("session")):
        raise LineError("session is set, and lines of a batch run side by side and may run again; leave it out")
    return Request(found.custom_id, url, body)


def _parse(line: bytes) -> _Line:
    try:
        line.decode()  # values that are passed on are not looked at otherwise
        found = msgspec.json.decode(line, type=_Line)
    except UnicodeDecodeError as error:
        raise LineError(f"it is not UTF-8 (byte {error.start}); convert the file first") from error
    except msgspec.ValidationError as error:
        raise LineError(f"it must be a JSON object that has a text as custom_id ({error})") from error
    except UNREADABLE as error:
        raise LineError(f"it is not JSON ({error})") from error
    if not found.custom_id:
        raise LineError("custom_id is empty; give each line one of its own")
    return found


def _value(name: str, raw: Raw) -> Any:
    try:
        return msgspec.json.decode(raw)
    except UNREADABLE as error:
        raise LineError(f"{name} cannot be read ({error})") from error


def _is_null(raw: Raw | None) -> bool:
    return raw is None or bytes(raw) == b"null"
