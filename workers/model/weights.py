"""Reads a rank's slices of a checkpoint, or makes up weights of the right shape.

A source gives any slice of any tensor by its Hugging Face name; no rank ever holds the whole model.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distkv.workers.errors import ConfigError

Rows = tuple[int, int] | None
"""A half-open range along one dim, or all of it."""


class WeightSource(Protocol):
    """Where weights come from."""

    def read(self, name: str, shape: tuple[int, ...], rows: Rows = None, columns: Rows = None) -> Tensor:
        """The slice `[rows, columns]` of tensor `name`, whose whole shape must be `shape`; dtype as stored, on the CPU
        or the device it is made on. Raises ConfigError when it is missing or its shape differs."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        ...


class SafetensorsSource:
    """The `*.safetensors` of a Hugging Face folder: one file, or shards with an index. A context manager."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._file_of = tensor_files(folder)
        self._files: dict[str, Any] = {}
        self._exits = ExitStack()

    def __enter__(self) -> "SafetensorsSource":
        for file in sorted(set(self._file_of.values())):
            try:
                self._files[file] = self._exits.enter_context(safe_open(self._folder / file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ConfigError(
                    f"{str(self._folder / file)!r} cannot be read ({error}); it is missing, truncated or damaged: "
                    "fetch it again"
                ) from error
        return self

    def __exit__(self, *exception: object) -> None:
        self._exits.close()

    def has(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str, shape: tuple[int, ...], rows: Rows = None, columns: Rows = None) -> Tensor:
        if name not in self._file_of:
            raise ConfigError(f"the checkpoint in {str(self._folder)!r} has no tensor {name!r}")
        try:
            stored = self._files[self._file_of[name]].get_slice(name)
        except SafetensorError as error:
            raise ConfigError(
                f"{self._file_of[name]} in {str(self._folder)!r} lacks tensor {name!r}: {error}"
            ) from error
        if tuple(stored.get_shape()) != shape:
            raise ConfigError(f"tensor {name!r} has shape {stored.get_shape()}; config.json asks for {list(shape)}")
        index = tuple(slice(None) if part is None else slice(*part) for part in (rows, columns)[: len(shape)])
        return stored[index]


class DummySource:
    """Seeded random weights that depend on the tensor's name, not on how it is cut, so all group sizes see one."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device):
        self._seed, self._dtype, self._device = seed, dtype, device

    def __enter__(self) -> "DummySource":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def has(self, name: str) -> bool:
        return False  # nothing beyond what the config asks for

    def read(self, name: str, shape: tuple[int, ...], rows: Rows = None, columns: Rows = None) -> Tensor:
        whole = torch.ones(shape, dtype=self._dtype, device=self._device)
        if not name.endswith("norm.weight"):
            # a hash, since torch's CPU generator takes 32 bits of a seed
            generator = torch.Generator(self._device).manual_seed(crc32(f"{self._seed} {name}".encode()))
            whole.normal_(0, 0.02, generator=generator)
        index = tuple(slice(None) if part is None else slice(*part) for part in (rows, columns)[: len(shape)])
        return whole[index].clone()


class CheckedSource:
    """A `WeightSource` that calls `check` before it reads a tensor, so that what this raises ends the loading."""

    def __init__(self, source: WeightSource, check: Callable[[], None]):
        self._source, self._check = source, check

    def read(self, name: str, shape: tuple[int, ...], rows: Rows = None, columns: Rows = None) -> Tensor:
        self._check()
        return self._source.read(name, shape, rows, columns)

    def has(self, name: str) -> bool:
        return self._source.has(name)


def tensor_files(folder: Path) -> Mapping[str, str]:
    """Tensor name -> file name."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            return {name: str(file) for name, file in files.items()}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{str(index)!r} is not a safetensors index: {error!r}") from error
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ConfigError(
            f"{str(folder)!r} has neither model.safetensors nor model.safetensors.index.json; distkv reads safetensors "
            "checkpoints (load_format='dummy' needs none)"
        )
    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single.name)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{str(single)!r} cannot be read ({error}); it is truncated or damaged: fetch it again"
        ) from error
