"""A whole run of an LLM with its pages in given tiers, and all that it computed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.llms import idle_engine
from torch import Tensor

from distkv import LLM, SamplingParams
from distkv.engine.engine import Engine
from distkv.engine.stats import EngineStats
from distkv.outputs import RequestOutput
from distkv.storage.page_spec import PageSpec
from distkv.storage.tier import Tier
from distkv.workers.model.model_config import ModelConfig

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@dataclass(frozen=True)
class Run:
    """What a run computed and moved."""

    logits: list[Tensor]  # of each step that wanted any
    outputs: list[RequestOutput]
    stats: EngineStats
    page_bytes: int  # below the device
    peak: tuple[int, int, int]  # most pages in use by tier
    tiers: tuple[int, int, int]

    def moved(self, route: str) -> int:
        return self.stats.bytes_moved.get(route, 0)

    def assert_same(self, other: "Run") -> None:
        """Bit for bit, step by step."""
        assert [len(one) for one in self.logits] == [len(one) for one in other.logits]
        for step, (mine, theirs) in enumerate(zip(self.logits, other.logits, strict=True)):
            assert torch.equal(mine, theirs), f"step {step}"
        for mine, theirs in zip(self.outputs, other.outputs, strict=True):
            assert [one.token_ids for one in mine.outputs] == [one.token_ids for one in theirs.outputs]


def run(
    folder: Path,
    prompts: list[list[int]],
    params: SamplingParams | list[SamplingParams] = GREEDY,
    *,
    pages: tuple[int | None, int, int] = (None, 0, 0),
    cache_dir: Path | None = None,
    watch: Callable[[Engine], None] = lambda engine: None,
    **options: Any,
) -> Run:
    """Answers the prompts with `pages` of (device, host, disk).

    After each step the books are checked, and `watch` is called.
    """
    model = ModelConfig.load(folder)
    dtype = model.run_dtype(options.get("dtype", "auto"))
    spec = PageSpec(
        model.num_hidden_layers, model.num_key_value_heads, options["page_size"], model.head_dim, dtype,
        options.get("kv_cache_dtype", "auto"),
    )  # fmt: skip
    parts = options.get("decode_context_parallel_size", 1)
    page_bytes, on_host, on_disk = (parts * spec.page_bytes_in(tier) for tier in Tier)
    sizes: dict[str, Any] = {"device_kv_bytes": "1GiB" if pages[0] is None else pages[0] * page_bytes}
    sizes["host_kv_bytes"] = pages[1] * on_host
    if pages[2]:
        sizes |= {"cache_dir": cache_dir, "disk_kv_bytes": pages[2] * on_disk}
    logits: list[Tensor] = []
    peak = [0, 0, 0]
    with LLM(folder, **sizes, **({"enable_prefix_caching": False} | options)) as llm:
        engine = idle_engine(llm)
        execute = engine._runner.executor.forward

        def spy(plan, sampled):
            result = execute(plan, sampled)
            if result[0] is not None and len(result[0]):
                logits.append(result[0].clone())
            used = engine.stats()
            for tier, count in enumerate((used.device_pages, used.host_pages, used.disk_pages)):
                peak[tier] = max(peak[tier], count)
            watch(engine)
            return result

        engine._runner.executor.forward = spy
        try:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            idle_engine(llm).integrity_check()
        finally:
            engine._runner.executor.forward = (
                execute  # else engine and spy would keep each other, and the memory of a GPU
            )
        info = llm.info
        assert info.page_bytes == page_bytes
        tiers = info.num_pages, info.num_host_pages, info.num_disk_pages
        assert all(count <= size for count, size in zip(peak, tiers, strict=True))
        if info.cache_dir is not None:
            arrays = Path(info.cache_dir).glob("kv*.zarr")  # of each stage
            files = sum(file.stat().st_size for array in arrays for file in array.iterdir())
            assert 0 < files <= pages[2] * on_disk + 4096 * 3
        return Run(logits, outputs, llm.stats(), on_host, (peak[0], peak[1], peak[2]), tiers)
