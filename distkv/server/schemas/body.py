"""What the bodies of all requests have in common."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

ANYTHING = object()
"""Any value: a remark that changes no answer."""


class Body(BaseModel):
    """The body of a request, or a part of one. A field that is null is as if it were not there, and so is one of
    `without_effect` with one of the values that ask for no more than the server does; all other unknown ones are
    refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    without_effect: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None and not cls._is_idle(key, value)}

    @classmethod
    def _is_idle(cls, key: str, value: Any) -> bool:
        idle = cls.without_effect.get(key, ())
        return any(one is ANYTHING or (type(one) is type(value) and one == value) for one in idle)
