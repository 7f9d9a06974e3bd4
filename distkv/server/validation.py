"""What a client is told of a body that is not as it must be."""

from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError

from distkv.server.errors import ApiError

MOST_REASONS = 3


def validation_error(error: RequestValidationError) -> ApiError:
    """The first field that is wrong, and why; a field that may have several types has a reason for each."""
    found = error.errors()
    field = _field(found[0])
    reasons = dict.fromkeys(_reason(one) for one in found if _field(one) == field)
    message = " or ".join(list(reasons)[:MOST_REASONS])
    return ApiError(400, f"{field}: {message}" if field else message, field)


def _field(one: dict[str, Any]) -> str | None:
    place: Sequence[Any] = one["loc"][1:]  # behind "body"
    if one["type"] == "json_invalid" or not place:
        return None
    if one["type"] == "extra_forbidden":
        return ".".join(map(str, place))
    return str(place[0])


def _reason(one: dict[str, Any]) -> str:
    match one["type"]:
        case "extra_forbidden":
            return "this server does not support this field; leave it out"
        case "json_invalid":
            return "the body is not JSON"
        case "missing" if len(one["loc"]) == 1:
            return "the body is missing; send JSON, with 'content-type: application/json'"
        case "model_attributes_type" if len(one["loc"]) == 1:
            return "the body must be a JSON object, sent with 'content-type: application/json'"
        case "missing":
            return "this field is required"
        case "value_error":
            return str(one["ctx"]["error"])
    text = str(one["msg"])
    return text[0].lower() + text[1:]
