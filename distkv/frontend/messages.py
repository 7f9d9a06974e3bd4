"""Messages of a conversation as clients send them, made what chat templates understand."""

from typing import Any

from distkv.errors import RequestError
from distkv.values import integer, shown

Message = dict[str, Any]
"""One message of a conversation: `{"role": "user", "content": "..."}`. An answer may carry `token_ids` besides its
text: what the model sampled for it, without the end token."""

OWN_FIELDS = ("role", "content", "token_ids")


def plain_messages(messages: Any) -> list[Message]:
    """The messages with text as their content, of which parts are joined by line breaks, or None beside `tool_calls`.
    Other fields that hold nothing, as clients write them out, are left out.

    Raises RequestError for what is no conversation, and for content that is no text.
    """
    if not isinstance(messages, list | tuple) or not messages or not all(isinstance(one, dict) for one in messages):
        raise RequestError(
            f"a conversation is {shown(messages)}; it must be a list of messages such as "
            "{'role': 'user', 'content': 'Hello'}"
        )
    return [_plain(message) for message in messages]


def _plain(message: Message) -> Message:
    if not isinstance(message.get("role"), str):
        raise RequestError(f"a message has the role {shown(message.get('role'))}; it must be 'user', say, or 'system'")
    answer = message.get("token_ids")
    if answer is not None and not (isinstance(answer, list) and isinstance(message.get("content"), str)):
        raise RequestError("a message with token_ids needs them as a list of integers, and its text as content")
    if answer is not None:
        message = message | {"token_ids": [integer("one of a message's token_ids", one, 0) for one in answer]}
    if "content" not in message and not message.get("tool_calls"):
        raise RequestError(f"a message of the {message['role']} has no content; give its text as 'content'")
    more = {key: value for key, value in extra_fields(message).items() if value is not None and not _is_empty(value)}
    own = {key: message[key] for key in OWN_FIELDS if message.get(key) is not None}
    return own | {"content": _text(message.get("content"))} | more


def extra_fields(message: Message) -> dict[str, Any]:
    """What a message has that not every template knows."""
    return {key: value for key, value in message.items() if key not in OWN_FIELDS}


def _is_empty(value: Any) -> bool:
    return isinstance(value, list) and not value


def _text(content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise RequestError(f"content is {shown(content)}; it must be a text or a list of parts of type 'text'")
    return "\n".join(_part(part) for part in content)


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else part
    raise RequestError(
        f"content has a part of type {shown(kind)}; a part is a text or {{'type': 'text', 'text': 'Hello'}}, and the "
        "model reads nothing else"
    )
