"""`distkv plan`'s texts made requests: lists, GPUs, prices and guesses."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from distkv.errors import ConfigError
from distkv.option_checks import check_amount, check_whole
from distkv.planner.hardware import GPUS, Hardware, find_hardware, with_disk
from distkv.planner.model_shape import find_model
from distkv.planner.nodes import parse_node
from distkv.planner.request import PARALLEL, PlanRequest
from distkv.planner.units import parse_tokens
from distkv.reporting.out_file import check_out_file, check_plot_file
from distkv.values import shown

MOST_PLANS = 200  # that are shown
One = TypeVar("One")
DEFAULT_GPU = "h100"
DEFAULT_MODEL = "llama-3.1-8b"  # of a page that is given none
SOLVE_SIZES = "1,2,4,8"


@dataclass(frozen=True)
class PlanOptions:
    """What `distkv plan` is given; see `distkv plan --help`. None leaves the choice to what is done."""

    model: str
    context: str  # lists with commas
    concurrency: str
    gpu: list[str] | None
    measured: Hardware | None  # this machine, to be planned for too
    gpus: str | None
    node: str | None  # see `parse_node`
    layouts: bool
    disk_bandwidth: float | None
    solve: bool
    ms_per_token: float | None
    price_per_hour: list[str] | None
    kinds: bool
    guess: str | None
    json_file: Path | None
    plot_file: Path | None
    request: Mapping[str, Any] = field(default_factory=dict)  # further fields of `PlanRequest`

    def check(self) -> None:
        """Raises ConfigError for options that contradict each other or that nothing would come of, and for files that
        cannot be written."""
        for name, value, needs, has in (
            ("--ms-per-token", self.ms_per_token, "--solve", self.solve),
            ("--price-per-hour", self.price_per_hour, "--solve", self.solve),
            ("--guess", self.guess, "--kinds", self.kinds),
        ):
            if value is not None and not has:
                raise ConfigError(f"{name} is given without {needs}; add that, or leave it out")
        tables = [name for name, asked in self._tables.items() if asked]
        if len(tables) > 1:
            raise ConfigError(f"{tables[0]} and {tables[1]} are both given; give one at a time")
        self._check_layouts()
        if self.measured is not None and self.price_per_hour:
            raise ConfigError("--price-per-hour is for GPUs with names, and --measured has no price; leave one out")
        if self.plot_file is not None and tables:
            raise ConfigError(f"--plot draws plans, and not {tables[0]}; leave one of them out")
        if self.measured is not None and self.measured.is_cpu:
            self._check_cpu()
        check_plot_file(self.plot_file)
        check_out_file(self.json_file)

    @property
    def _tables(self) -> dict[str, bool]:
        """What is done in place of plans."""
        return {"--solve": self.solve, "--kinds": self.kinds, "--layouts": self.layouts}

    def _check_layouts(self) -> None:
        """Raises ConfigError where the layout is given that is looked for, and where one machine's GPUs are."""
        given = [name for name in PARALLEL[1:] if name in self.request] + ["gpus"] * (self.gpus is not None)
        if self.layouts and given:
            raise ConfigError(f"--layouts tries all of {_flag(given[0])}; leave it out, and say --nodes and --node")
        if self.layouts and self.measured is not None:
            raise ConfigError("--layouts is for GPUs of nodes, and --measured is this machine; leave one of them out")
        beyond = [name for name in (*PARALLEL[1:], "nodes") if name in self.request]
        if self.solve and beyond:
            raise ConfigError(
                f"--solve looks for GPUs of one machine, and {_flag(beyond[0])} is given; leave one of them out"
            )

    def _check_cpu(self) -> None:
        if set(self.sizes("1")) != {1}:
            raise ConfigError(
                "--measured is this CPU, whose cores and memory several ranks would share; leave --gpus out"
            )
        if "gpu_memory_utilization" in self.request and not self.gpu:
            raise ConfigError("--gpu-memory-utilization is given and --measured is this CPU; leave it out")

    def requests(self) -> list[PlanRequest]:
        """One for every mix of GPU, context, number of GPUs and concurrency."""
        model, contexts, loads = find_model(self.model), self.contexts(), self.loads()
        mixes = list(itertools.product(self.hardware(), contexts, self.sizes("1"), loads))
        if len(mixes) > MOST_PLANS:
            raise ConfigError(f"these lists make {len(mixes)} plans; {MOST_PLANS} at most are shown: shorten one")
        return [
            PlanRequest(model, one, tensor_parallel_size=size, context=context, concurrency=load, **self._fields)
            for one, context, size, load in mixes
        ]

    def only_request(self, what: str, of_one_setup: bool = True) -> PlanRequest:
        """For what takes one of each list; the setup, GPUs and their number, may be left open, and is then one of the
        first. Raises ConfigError for lists of more."""
        context, load = _only(what, "--context", self.contexts()), _only(what, "--concurrency", self.loads())
        hardware, size = self.hardware(), 1
        if of_one_setup:
            _only(what, "--gpu", hardware)
            size = _only(what, "--gpus", self.sizes("1"))
        return PlanRequest(
            find_model(self.model), hardware[0], tensor_parallel_size=size, context=context, concurrency=load,
            **self._fields,
        )  # fmt: skip

    def one_rank(self, what: str) -> tuple[PlanRequest, int]:
        """The only request for a single rank, and the number of nodes, for what lays out the ranks itself."""
        fields = {name: value for name, value in self.request.items() if name != "nodes"}
        nodes = check_whole("nodes", self.request.get("nodes", 1))
        return replace(self, request=fields).only_request(what), nodes

    @property
    def _fields(self) -> dict[str, Any]:
        """Of `PlanRequest`, as it takes them."""
        return {**self.request, **({} if self.node is None else {"node": parse_node(self.node)})}

    def only_context(self, what: str) -> int:
        """Tokens, for what takes one context. Raises ConfigError for more."""
        return _only(what, "--context", self.contexts())

    def page_start(self) -> dict[str, Any]:
        """The only request as the fields of `POST /plan`, for a page to begin with."""
        request = self.only_request("--serve")
        fields = {
            "gpu": (self.gpu or [DEFAULT_GPU])[0], "disk_bandwidth": self.disk_bandwidth, "context": request.context,
            "node": self.node,
            "tensor_parallel_size": request.tensor_parallel_size, "concurrency": request.concurrency,
        }  # fmt: skip
        return {**self.request, **{name: value for name, value in fields.items() if value is not None}}

    def hardware(self, default: tuple[str, ...] = (DEFAULT_GPU,)) -> list[Hardware]:
        """What is planned for, each once."""
        found = [] if self.measured is None else [self.measured]
        found += [find_hardware(one) for one in self.gpu or (default if self.measured is None else ())]
        return _each_once(with_disk(one, self.disk_bandwidth) for one in found)

    def contexts(self) -> list[int]:
        """Tokens."""
        return _each_once(parse_tokens("--context", one) for one in _listed("--context", self.context))

    def loads(self) -> list[int]:
        """Requests at a time."""
        return _each_once(_whole("--concurrency", one) for one in _listed("--concurrency", self.concurrency))

    def sizes(self, default: str) -> list[int]:
        """Numbers of GPUs."""
        listed = _listed("--gpus", default if self.gpus is None else self.gpus)
        return _each_once(_whole("--gpus", one) for one in listed)

    def prices(self) -> dict[str, float]:
        """Of a GPU and hour, by `Hardware.name`; empty where none are given."""
        found = {}
        for text in self.price_per_hour or ():
            gpu, _, price = text.rpartition("=")
            if not gpu and len(self.gpu or ()) != 1:
                raise ConfigError(f"--price-per-hour {shown(text)} names no GPU; give h100=2.99, or a single --gpu")
            hardware = find_hardware(gpu or (self.gpu or [""])[0])
            found[hardware.name] = check_amount(f"--price-per-hour of {hardware.name}", _number(price))
        idle = [name for name in found if self.gpu and name not in {one.name for one in self.hardware()}]
        if idle:
            raise ConfigError(f"--price-per-hour is for {', '.join(idle)}, which --gpu does not name; leave it out")
        return found

    def priced_hardware(self) -> list[Hardware]:
        """What --solve chooses from: the GPUs that are named, or those that have a price, or all of the table."""
        prices = self.prices()
        return self.hardware(tuple(name for name, one in GPUS.items() if not prices or one.name in prices))

    def guesses(self) -> dict[str, int] | None:
        """At a configuration that is not published; None where there are none."""
        if self.guess is None:
            return None
        found = {}
        for part in _listed("--guess", self.guess):
            name, _, value = (text.strip() for text in part.partition("="))
            if name in found:
                raise ConfigError(f"--guess says {name} twice; say it once")
            found[name] = _whole(f"{name} of --guess", value)
        return found


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _only(what: str, name: str, values: list[One]) -> One:
    if len(values) > 1:
        raise ConfigError(f"{what} takes one {name}, and {len(values)} are given")
    return values[0]


def _listed(name: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"{name} is {shown(text)}; give one or more values with commas between them")
    return parts


def _each_once(values: Iterable[One]) -> list[One]:
    """In the order in which they come."""
    return list(dict.fromkeys(values))


def _whole(name: str, text: str) -> int:
    return check_whole(name, int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else text)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
