"""Decode steps of contexts that lie in one tier as far as they can: an engine on this CPU for each tier, and the
request of a plan for the same."""

import random
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Self

from distkv.bench.decoder import Decoder, Variant
from distkv.config import EngineConfig
from distkv.planner.hardware import Hardware
from distkv.planner.model_shape import ModelShape
from distkv.planner.request import PlanRequest
from distkv.storage.ledger.write_back import MAX_DISK_WRITES
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.rank_config import model_page_spec

TIERS = ("device", "host", "disk")
PAGE_SIZE = 256
NO_LIMIT = 2**62  # bytes, so that no step leaves the sequence out


class TierDecoders:
    """Engines with room for contexts of `longest` tokens at most, with random weights for the config in a folder. What
    lies on disk stays in the page cache, as files do that were written a moment ago. A context manager."""

    def __init__(self, folder: Path, name: str, longest: int, cache_dir: Path):
        config = ModelConfig.load(folder)
        self.model = ModelShape(name, config, folder)
        self._spec = model_page_spec(config, PAGE_SIZE, config.dtype)
        pages = self._spec.pages_for(longest)
        self._variants = {  # as in `bench offload`: what is not cold is the page that is written, and the first
            "device": Variant("device", pages + 1, 0, 0, 0),
            "host": Variant("host", 2, pages + 1, 0, pages - 1),
            "disk": Variant("disk", 2, 1, pages + 1 + MAX_DISK_WRITES, pages - 1),
        }
        self._exits, self._decoders = ExitStack(), dict[str, Decoder]()
        try:
            for tier in TIERS:
                sizes = self._sizes(tier)
                engine = EngineConfig(
                    folder, load_format="dummy", device="cpu", page_size=PAGE_SIZE, max_num_seqs=1,
                    max_model_len=longest + PAGE_SIZE, max_num_batched_tokens=PAGE_SIZE, enable_prefix_caching=False,
                    max_cold_bytes_per_step=None if tier == "device" else NO_LIMIT,
                    device_kv_bytes=sizes["device_kv_bytes"], host_kv_bytes=sizes["host_kv_bytes"],
                    disk_kv_bytes=sizes["disk_kv_bytes"] or None, cache_dir=cache_dir if tier == "disk" else None,
                )  # fmt: skip
                decoder = Decoder(self._variants[tier], engine, 0, drops_page_cache=False)
                self._decoders[tier] = self._exits.enter_context(closing(decoder))
        except BaseException:
            self._exits.close()
            raise

    def seconds(self, tier: str, context: int, new_tokens: int) -> list[float]:
        """Of each of `new_tokens` decode steps after a context of so many tokens, whole pages."""
        decoder, generator = self._decoders[tier], random.Random(context)
        prompt = [generator.randrange(self.model.config.vocab_size) for _ in range(context + 1)]
        decoder.cold_bytes = 0 if tier == "device" else (context // PAGE_SIZE - 1) * self._spec.page_bytes
        return decoder.turn(prompt, new_tokens).seconds

    def request(self, tier: str, context: int, hardware: Hardware) -> PlanRequest:
        """What is to be planned for the same step."""
        sizes = self._sizes(tier)
        return PlanRequest(
            self.model, hardware, context=context + 1, page_size=PAGE_SIZE, max_num_seqs=1,
            max_num_batched_tokens=PAGE_SIZE, device_kv_bytes=sizes["device_kv_bytes"],
            host_kv_bytes=sizes["host_kv_bytes"], disk_kv_bytes=sizes["disk_kv_bytes"],
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def _sizes(self, tier: str) -> dict[str, int]:
        one, size = self._variants[tier], self._spec.page_bytes
        return {
            "device_kv_bytes": one.device * size,
            "host_kv_bytes": one.host * size,
            "disk_kv_bytes": one.disk * size,
        }
