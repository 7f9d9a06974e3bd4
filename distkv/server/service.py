"""What all routes share: the model, once it is loaded, and who is being answered."""

import asyncio
import time
from typing import Any

from distkv.async_llm import AsyncLLM
from distkv.planner.hardware import Hardware
from distkv.server.errors import ApiError
from distkv.server.options import ServerOptions
from distkv.values import shown

LOADING_SECONDS = 5


class Service:
    """A model that is being served. Used by the event loop alone."""

    def __init__(self, names: list[str], options: ServerOptions):
        """Serves nothing until `loaded`; `names` are what clients call the model by."""
        self.names, self.options = names, options
        self.created = int(time.time())
        self.is_draining = False  # whether what goes on without end is to end
        self.no_transfer = asyncio.Event()  # unless an export or import is under way
        self.no_transfer.set()
        self.hardware: Hardware | None = None  # that the model runs on, if that is known
        self._llm: AsyncLLM | None = None

    @property
    def llm(self) -> AsyncLLM:
        """The model; raises ApiError while it is being loaded."""
        if self._llm is None:
            raise ApiError(503, "the model is being loaded; try again soon", retry_after=LOADING_SECONDS)
        return self._llm

    @property
    def kv_policy(self) -> dict[str, Any]:
        """What bodies of answers have beside the fields of their API: `RequestOutput.kv_policy`, unless it is None."""
        policy = self.llm.info.kv_policy
        return {} if policy is None else {"kv_policy": policy}

    @property
    def is_loaded(self) -> bool:
        return self._llm is not None

    @property
    def num_open(self) -> int:
        """Answers that clients wait for, an export or import among them."""
        return (0 if self._llm is None else self._llm.num_open) + (not self.no_transfer.is_set())

    def loaded(self, llm: AsyncLLM, hardware: Hardware | None = None) -> None:
        """Begins to serve."""
        self._llm, self.hardware = llm, hardware

    def check_model(self, name: str | None) -> str:
        """The name that an answer carries; raises ApiError for another model's."""
        if name is None:
            return self.names[0]
        if name not in self.names:
            raise ApiError(
                404, f"the model {name!r} is not served here; use {self.names[0]!r}", "model", "model_not_found"
            )
        return name

    def check_vocab(self, name: str, token_ids: list[int]) -> list[int]:
        """The tokens of this field; raises ApiError for one that the model does not know."""
        vocab_size = self.llm.info.vocab_size
        unknown = next((one for one in token_ids if not 0 <= one < vocab_size), None)
        if unknown is not None:
            raise ApiError(400, f"{name} has {shown(unknown)}; ids are integers below {vocab_size}", name)
        return token_ids
