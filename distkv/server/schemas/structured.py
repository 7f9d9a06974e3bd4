"""What an answer keeps to, in the several words that clients have for it."""

from typing import Any, Protocol

from distkv.errors import RequestError
from distkv.structured_outputs.params import StructuredOutputsParams
from distkv.values import shown

GUIDED = ("json", "regex", "choice", "grammar")
"""Fields `guided_json` and so on, as vLLM once called those of `structured_outputs`."""
SCHEMA_FIELDS = {"schema", "name", "description", "strict"}
"""Of which all but the first change nothing: answers always keep to the schema."""
FORMATS = "{'type': 'text'}, {'type': 'json_object'} or {'type': 'json_schema', 'json_schema': {'schema': {...}}}"


class Structured(Protocol):
    """A body that has these fields; `guided_...` are looked up by name."""

    response_format: dict[str, Any] | None
    structured_outputs: dict[str, Any] | None


def structured_outputs(body: Structured) -> StructuredOutputsParams | None:
    """What a body asks for; raises RequestError for several things at a time, and for what is none."""
    asked: dict[str, dict[str, Any]] = {}
    if body.response_format is not None and (wanted := _of_format(body.response_format)):
        asked["response_format"] = wanted
    if body.structured_outputs is not None:
        asked["structured_outputs"] = {name: one for name, one in body.structured_outputs.items() if one is not None}
    for name in GUIDED:
        if (value := getattr(body, f"guided_{name}")) is not None:
            asked[f"guided_{name}"] = {name: value}
    if len(asked) > 1:
        raise RequestError(f"{' and '.join(asked)} both say what the answer keeps to; give one of them")
    for source, fields in asked.items():
        unknown = fields.keys() - set(StructuredOutputsParams.__struct_fields__)
        if unknown:
            raise RequestError(f"{source} has {', '.join(sorted(unknown))}, which this server does not support")
        return StructuredOutputsParams(**fields)
    return None


def _of_format(given: dict[str, Any]) -> dict[str, Any]:
    """The fields that OpenAI's `response_format` stands for."""
    given = {name: value for name, value in given.items() if value is not None}
    kind, schema = given.get("type"), given.get("json_schema")
    if kind == "text" and len(given) == 1:
        return {}
    if kind == "json_object" and len(given) == 1:
        return {"json_object": True}
    has_schema = isinstance(schema, dict) and isinstance(schema.get("schema"), dict)
    if kind == "json_schema" and len(given) == 2 and schema is not None and has_schema:
        unknown = [name for name, value in schema.items() if name not in SCHEMA_FIELDS and value is not None]
        if unknown:
            raise RequestError(f"json_schema has {shown(unknown[0])}, which this server does not support; leave it out")
        return {"json": schema["schema"]}
    raise RequestError(f"response_format is {shown(given)}; it must be {FORMATS}")
