"""What commands have in common: options that come from the fields of a class, and what a model may be given as."""

import copy
import re
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, fields
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer
from msgspec.structs import replace

from distkv.bench.options import BenchOptions
from distkv.config import EngineConfig, EngineOptions
from distkv.option_checks import settle_path
from distkv.option_help import option_help
from distkv.sampling_params import RequestOutputKind, SamplingParams

Value = TypeVar("Value")


def path_option(*names: str, **how: Any) -> Any:
    """An option that takes a path, which the command gets as an absolute one."""
    return typer.Option(*names, parser=str, callback=_settled, metavar="<path>", **how)


def path_argument(**how: Any) -> Any:
    """The same for an argument."""
    return typer.Argument(parser=str, callback=_settled, **how)


def _settled(param: typer.CallbackParam, value: str | Path | list[str] | None) -> Path | list[Path] | None:
    name = param.opts[0] if param.opts[0].startswith("-") else param.opts[0].upper()
    if isinstance(value, list):
        return [settle_path(name, one) for one in value]
    return None if value is None else settle_path(name, value)


Model = Annotated[str, typer.Option(help="Hugging Face model folder, or smollm2, which is fetched if need be.")]
JsonFile = Annotated[Path | None, path_option("--json", help="Also write the figures here.")]


@dataclass(frozen=True)
class Sized:
    """A default that is another one with --quick; see `sized`."""

    full: Any
    quick: Any

    def parameter(self, parameter: Parameter) -> Parameter:
        """The parameter as typer understands it: None unless the option is given, and a help that has both values."""
        kind, option = get_args(parameter.annotation)
        option = copy.copy(option)
        option.show_default = f"{_listed(self.full)}; {_listed(self.quick)} with --quick"
        return parameter.replace(default=None, annotation=Annotated[kind | None, option])


def sized(full: Value, quick: Value) -> Value:
    """The default of an option of a benchmark: `quick` where --quick is given and this option is not. For commands that
    are `spread`."""
    default: Any = Sized(full, quick)
    return default


@dataclass(frozen=True)
class Fields:
    """Fields of a class, of which a command has an option each, with the help and, unless told otherwise, the default
    of the field. It stands in the annotation of the parameter that takes them all; see `spread`."""

    source: type
    names: tuple[str, ...]
    defaults: dict[str, Any]

    def parameters(self) -> Iterator[Parameter]:
        """The fields as parameters that typer understands."""
        given, kinds, texts = signature(self.source).parameters, get_type_hints(self.source), option_help(self.source)
        for name in self.names:
            kind = _typed(kinds[name])
            make_option = path_option if Path in (kind, *get_args(kind)) else typer.Option
            default = self.defaults.get(name, given[name].default)
            only = [f"--{name.replace('_', '-')}"] if kind is bool and default is False else []  # no use for --no-...
            option = make_option(*only, help=_with_flags(texts.get(name, "").partition("\n")[0], given))
            yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])

    def check(self, values: dict[str, Any]) -> None:
        """Raises ConfigError for values that cannot be used, before anything is loaded."""
        if self.source is EngineConfig:
            EngineConfig("/", **values)  # a model that needs no current folder


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command with options in place of its parameters that are annotated `Annotated[Kind, Fields(...)]`; each of
    these gets one `Kind` that is made of them, once they are checked. Parameters are keyword-only, so that any of them
    may have a default, which may be `sized`."""
    parameters: list[Parameter] = []
    groups: dict[str, tuple[type, Fields]] = {}
    for parameter in signature(command).parameters.values():
        match get_args(parameter.annotation):
            case kind, Fields() as group:
                groups[parameter.name] = kind, group
                parameters += group.parameters()
            case _:
                parameters.append(parameter)
    sizes = {one.name: one.default for one in parameters if isinstance(one.default, Sized)}
    parameters = [sizes[one.name].parameter(one) if one.name in sizes else one for one in parameters]

    @wraps(command)
    def gathered(**given: Any) -> None:
        for name, size in sizes.items():
            if given[name] is None or given[name] == []:
                given[name] = size.quick if given["quick"] else size.full
        for name, (kind, group) in groups.items():
            values = {field: given.pop(field) for field in group.names}
            group.check(values)
            given[name] = kind(**values)
        command(**given)

    gathered.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
    return gathered


def engine(*names: str, **defaults: Any) -> Fields:
    """These options of the engine."""
    return Fields(EngineConfig, names, defaults)


def sampling(**defaults: Any) -> Fields:
    """The options of sampling that a reader of one answer may want."""
    return Fields(SamplingParams, ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop"), defaults)


def measuring(**defaults: Any) -> Fields:
    """The options that every benchmark has."""
    return Fields(BenchOptions, ("repeats", "quick", "json"), defaults)


EngineFlags = Annotated[
    EngineOptions,
    engine(*(one.name for one in fields(EngineConfig) if one.name not in ("model", "seed", "max_queued_requests"))),
]
"""All options of the engine but the model, for which there is `Model`, the seed (--seed is that of sampling) and the
queue's limit, since nobody else asks."""


def surviving(options: EngineOptions, max_rank_failures: int) -> EngineOptions:
    """The same for what is to go on when ranks are lost, if they can be, unless the user has said how often."""
    names = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "ray_address")
    where: Any = {name: value for name, value in options.items() if name in names}  # others may need failures made good
    is_told = options["max_rank_failures"] is not None or not EngineConfig("/", **where).is_on_ray
    return options if is_told else {**options, "max_rank_failures": max_rank_failures}


def piecemeal(params: SamplingParams) -> SamplingParams:
    """The same for a reader who shows an answer as it comes."""
    return replace(params, output_kind=RequestOutputKind.DELTA)


def model_folder(model: str) -> Path:
    """The folder of a model given as a path or as the name of one that can be fetched."""
    from distkv.models.fetch import MODELS, fetch_model

    folder = settle_path("--model", model)
    return fetch_model(model) if model in MODELS and not folder.exists() else folder


def _with_flags(text: str, names: Container[str]) -> str:
    """A help text in which other options are called as the command line has them."""
    flag = lambda match: f"--{match[0].replace('_', '-')}" if match[0] in names else match[0]  # noqa: E731
    return re.sub(r"[a-z]+(?:_[a-z]+)+", flag, text)


def _listed(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _typed(kind: Any) -> Any:
    """The type of a field as the command line gives it: of several alternatives the last one, which a text can be."""
    if not isinstance(kind, UnionType):
        return kind
    return [one for one in get_args(kind) if one is not NoneType][-1] | None
