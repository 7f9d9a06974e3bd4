"""What an answer keeps to. Names are vLLM's."""

import json as json_module
from typing import Any

import msgspec

from distkv.errors import RequestError
from distkv.option_help import explained
from distkv.values import flag, listed, plain, shown, text

KINDS = ("json", "regex", "choice", "grammar", "json_object")
MAX_CHOICES = 10_000
MAX_CHARACTERS = 2**17  # which the library compiles in a second at worst


@explained
class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True, repr_omit_defaults=True):
    """What an answer keeps to: one of `json`, `regex`, `choice`, `grammar` and `json_object`. Raises RequestError for
    none or several of them, and for values that are none."""

    json: str | dict[str, Any] | None = None
    """A JSON schema, as a dict or as text."""
    regex: str | None = None
    """A regular expression that the whole answer matches, in the syntax of Rust's."""
    choice: list[str] | None = None
    """The texts that the answer may be."""
    grammar: str | None = None
    """A context-free grammar in Lark's syntax or in GBNF."""
    json_object: bool = False
    """Whether the answer is any JSON object."""
    disable_any_whitespace: bool = False
    """Whether JSON has no blanks beside one behind each comma and colon.

    Small models may otherwise write blanks without end.
    """

    def __post_init__(self) -> None:
        for name in ("json_object", "disable_any_whitespace"):
            self._set(name, flag(name, getattr(self, name)))
        given = self._given()
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs has {' and '.join(given) or 'nothing'}; it must be one of {', '.join(KINDS)}"
            )
        for name in ("regex", "grammar"):
            if getattr(self, name) is not None:
                self._set(name, _text(name, getattr(self, name)))
        if self.json is not None:
            self._set("json", _schema(self.json))
        if self.choice is not None:
            self._set("choice", _choice(self.choice))
        self._check_size(given[0])
        if self.disable_any_whitespace and given[0] not in ("json", "json_object"):
            raise RequestError(f"disable_any_whitespace must be left out beside {given[0]}; it is about JSON")

    def _check_size(self, name: str) -> None:
        value = getattr(self, name)
        length = sum(map(len, value)) if isinstance(value, list) else len(value) if isinstance(value, str) else 0
        if length > MAX_CHARACTERS:
            raise RequestError(
                f"{name} has {length} characters; it must be of at most {MAX_CHARACTERS}, for it takes long to be "
                "compiled"
            )

    @property
    def kind(self) -> str:
        """Which of the fields says what the answer keeps to."""
        return self._given()[0]

    def _given(self) -> list[str]:
        return [name for name in KINDS if getattr(self, name) is not None and getattr(self, name) is not False]

    def _set(self, name: str, value: Any) -> None:
        """Has a field hold what was made of its value."""
        msgspec.structs.force_setattr(self, name, value)


def _text(name: str, value: Any) -> str:
    found = text(value)
    if not found:
        raise RequestError(f"{name} is {shown(value)}; it must be a text that is not empty")
    return found


def _schema(value: Any) -> str:
    """The text of a schema."""
    found = text(value)
    try:
        if found is None and isinstance(value, dict):
            found = json_module.dumps(value, allow_nan=False)
        if found is not None and isinstance(json_module.loads(found), dict):
            return found
    except (ValueError, TypeError, RecursionError):
        pass
    raise RequestError(f"json is {shown(value)}; it must be a JSON schema, as a dict or as its text")


def _choice(value: Any) -> list[str]:
    found = None if isinstance(plain(value), str) else listed(value)
    texts = None if found is None else [text(one) for one in found]
    if not texts or not all(texts) or len(texts) > MAX_CHOICES:
        raise RequestError(
            f"choice is {shown(value)}; it must be a list of 1 to {MAX_CHOICES} strings, none of them empty"
        )
    return texts  # type: ignore[return-value]
