"""A plan: what fits where, what a step costs, which limit binds, and what to change."""

import shlex
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from distkv.models.fetch import MODELS, default_cache_dir
from distkv.planner.advice import advise
from distkv.planner.fit import Fit, find_fit
from distkv.planner.reading import cpu_share
from distkv.planner.request import PARALLEL, PlanRequest
from distkv.planner.roofline import Cost, decode_step, first_token
from distkv.planner.units import option_bytes


@dataclass(frozen=True)
class Plan:
    """What `make_plan` has found; times are lower bounds, see `roofline.py`."""

    request: PlanRequest
    fit: Fit
    decode: Cost | None  # of a step with one token for each running request; None when nothing fits
    first_token: Cost | None  # of one request alone

    @cached_property
    def advice(self) -> list[str]:
        """What to change, in whole sentences, the most pressing first."""
        return advise(self.request, self.fit, self.decode)

    @property
    def fits(self) -> bool:
        """Whether all requests that are asked for run at a time."""
        return self.fit.running == self.request.concurrency

    @property
    def tokens_per_second(self) -> float | None:
        """Over all running requests."""
        return None if self.decode is None else self.fit.running / self.decode.seconds

    @property
    def capacity_limit(self) -> str:
        """What keeps more requests from running: an option, or the memory of a tier."""
        most = min(self.fit.most_requests, self.request.concurrency)
        return "max_num_seqs" if self.request.num_seqs < most else self.fit.limit

    @property
    def command(self) -> str | None:
        """The command that serves the model as planned; None where nothing fits or the engine does otherwise."""
        request, model = self.request, self.request.model
        if not self.fit.running or request.unknown_options or request.is_too_long:
            return None
        is_fetched = model.name in MODELS and model.folder in (None, default_cache_dir() / model.name)
        folder = model.name if is_fetched else str(model.folder or f"path/to/{model.name}")
        options = request.engine_options | ({"cache_dir": "path/to/cache"} if request.disk_kv_bytes else {})
        flags = [
            f"--{name.replace('_', '-')} {option_bytes(value) if name.endswith('_bytes') else shlex.quote(str(value))}"
            for name, value in options.items()
        ]
        return " ".join(["distkv serve", shlex.quote(folder), *flags])

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values: bytes, tokens and seconds."""
        request, model, fit = self.request, self.request.model, self.fit
        config = model.config
        return {
            "model": {
                "name": model.name,
                "parameters": model.num_parameters,
                "num_hidden_layers": config.num_hidden_layers,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "head_dim": config.head_dim,
                "max_position_embeddings": config.max_position_embeddings,
                "most_positions": config.most_positions,
            },
            "hardware": asdict(request.hardware),
            "node": asdict(request.node),
            "request": {
                **{name: getattr(request, name) for name in PARALLEL},
                "nodes": request.nodes,
                "cpu_attention": request.cpu_attention,
                "dtype": request.run_dtype,
                "kv_cache_dtype": request.kv_cache_dtype,
                "attention_policy": request.attention_policy,
                "context": request.context,
                "concurrency": request.concurrency,
                "device_kv_bytes": request.device_kv_bytes,
                "host_kv_bytes": request.host_kv_bytes,
                "disk_kv_bytes": request.disk_kv_bytes,
                "page_size": request.page_size,
                "max_num_seqs": request.num_seqs,
                "max_num_batched_tokens": request.max_num_batched_tokens,
                "gpu_memory_utilization": request.gpu_memory_utilization,
            },
            "fits": self.fits,
            "running": fit.running,
            "most_requests": fit.most_requests,
            "usual_requests": fit.usual_requests,
            "capacity_limit": self.capacity_limit,
            "kv_bytes_per_token": fit.kv_bytes_per_token,
            "cold_kv_bytes_per_token": fit.cold_kv_bytes_per_token,
            "share_read": request.share_read,
            "cpu_share": cpu_share(request),
            "kv_bytes_per_request": fit.kv_bytes_per_request,
            "ranks": [asdict(one) for one in fit.ranks],
            "tiers": [asdict(one) for one in fit.tiers],
            "decode": None if self.decode is None else asdict(self.decode),
            "first_token": None if self.first_token is None else asdict(self.first_token),
            "tokens_per_second": self.tokens_per_second,
            "advice": self.advice,
            "engine_options": request.engine_options,
            "command": self.command,
        }


def make_plan(request: PlanRequest) -> Plan:
    """What of a request fits where, and what it costs. Raises ConfigError for one that cannot be planned for."""
    fit = find_fit(request)
    return Plan(request, fit, decode_step(request, fit), first_token(request, fit))
