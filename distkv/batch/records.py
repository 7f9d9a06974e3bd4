"""Lines of the output and of the error file, in OpenAI's batch-file format."""

import uuid

import msgspec
from msgspec import Raw

OK = 200
HEAD = b'{"id":"batch_req_'
"""What every line begins with."""
SERVER_ERROR = 500


class Response(msgspec.Struct):
    """What a route has answered."""

    status_code: int
    request_id: str
    body: Raw


class LineFault(msgspec.Struct):
    """Why no route was asked."""

    code: str
    message: str


class Record(msgspec.Struct):
    """A line."""

    id: str
    custom_id: str | None  # None for an input line without one
    response: Response | None
    error: LineFault | None

    def encode(self) -> bytes:
        """The line, with its end."""
        return msgspec.json.encode(self) + b"\n"

    @property
    def is_answer(self) -> bool:
        """Whether it has what was asked for, and no error."""
        return self.response is not None and self.response.status_code == OK

    @property
    def may_pass(self) -> bool:
        """Whether the line itself is in order, and may well be answered at another time: an engine was lost, say."""
        return self.response is not None and self.response.status_code >= SERVER_ERROR


class _Details(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class Usage(msgspec.Struct):
    """Tokens of an answer, in the words of completions or in those of responses."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details = _Details()
    input_tokens: int = 0
    output_tokens: int = 0
    input_tokens_details: _Details = _Details()

    @property
    def num_prompt_tokens(self) -> int:
        return self.prompt_tokens + self.input_tokens

    @property
    def num_answer_tokens(self) -> int:
        return self.completion_tokens + self.output_tokens

    @property
    def num_cached_tokens(self) -> int:
        return self.prompt_tokens_details.cached_tokens + self.input_tokens_details.cached_tokens


class _Answer(msgspec.Struct):
    usage: Usage


def answered(custom_id: str, response: Response) -> Record:
    """A line with what a route has answered."""
    return Record(f"batch_req_{response.request_id}", custom_id, response, None)


def refused(number: int, custom_id: str | None, message: str) -> Record:
    """A line that says what is wrong with line `number` of the input."""
    fault = LineFault("invalid_line", f"line {number}: {message}")
    return Record(f"batch_req_{uuid.uuid4().hex}", custom_id, None, fault)


def read_record(line: bytes) -> Record:
    """A line that was written before. Raises msgspec.DecodeError or UnicodeDecodeError for anything else."""
    return msgspec.json.decode(line, type=Record)


def read_usage(body: Raw) -> Usage:
    """What an answer has taken."""
    return msgspec.json.decode(body, type=_Answer).usage
