"""The arguments of an application in a Serve config file, in the shape of `ray.serve.llm`'s."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distkv.errors import ConfigError

ELSEWHERE = {
    "accelerator_type": "ranks take any GPU of the cluster; leave it out, and have the cluster have the right ones",
    "accelerator_config": "ranks take any GPU of the cluster; leave it out",
    "placement_group_config": "an engine places its ranks itself, a bundle each, on one node where one has the room; "
    "leave it out",
    "lora_config": "distkv has no adapters; leave it out",
    "runtime_env": "give it as the application's runtime_env, beside import_path",
    "llm_engine": "the engine is distkv; leave it out",
    "server_cls": "the engine is distkv; leave it out",
    "tokenizer_source": "the tokenizer is that of the model's folder; leave it out",
    "ingress_cls_config": "the ingress is distkv's server; leave it out",
}
"""What to do about fields of `ray.serve.llm` that would have no effect here."""


class Arguments(BaseModel):
    """Refuses fields that it does not know."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ModelLoadingConfig(Arguments):
    """Which model."""

    model_id: str  # what clients call it
    model_source: str | None = None  # its folder on each node, or smollm2; None for the id


class LLMConfig(Arguments):
    """A model and its engines."""

    model_loading_config: ModelLoadingConfig
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)  # fields of `EngineConfig` but the model
    deployment_config: dict[str, Any] = Field(default_factory=dict)  # options of the engines' `serve.deployment`


class ServingArgs(Arguments):
    """All arguments of an application."""

    llm_configs: list[LLMConfig]
    ingress_deployment_config: dict[str, Any] = Field(default_factory=dict)  # options of the ingress's
    server_kwargs: dict[str, Any] = Field(default_factory=dict)  # fields of `ServerOptions`


def parse_arguments(given: dict[str, Any]) -> ServingArgs:
    """Raises ConfigError with the first field that cannot be used, and what to do about it."""
    try:
        args = ServingArgs.model_validate(given)
    except ValidationError as error:
        found = error.errors()[0]
        raise ConfigError(_reason(".".join(map(str, found["loc"])), str(found["loc"][-1]), found)) from error
    if len(args.llm_configs) != 1:
        raise ConfigError(
            f"llm_configs has {len(args.llm_configs)} models, and an application serves one; make an application of "
            "each, with a name and a route_prefix of its own"
        )
    return args


def check_names(place: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ConfigError for a name that is not among the known ones."""
    known = list(known)
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            cure = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"{place}.{name} would have no effect: distkv knows no such field; {cure}")


def _reason(place: str, name: str, found: Any) -> str:
    if found["type"] != "extra_forbidden":
        return f"{place}: {found['msg'][0].lower()}{found['msg'][1:]}"
    return f"{place} would have no effect: {ELSEWHERE.get(name, 'distkv knows no such field; leave it out')}"
