"""Reads a rank's slices of a checkpoint, or makes up weights of the right shape.

A source gives any slice of any tensor by its Hugging Face name; no rank ever holds the whole model.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distkv.workers.errors import ConfigError
from distkv.workers.model.files import cannot_read
from distkv.workers.model.weight_files import WeightFile, sample_digest, weights_digest

log = logging.getLogger(__name__)

SINGLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
STORED_DTYPES = ("F64", "F32", "F16", "BF16")
PREFIX = "model."  # of all names but the head's; a checkpoint of a LlamaModel alone is saved without it
NEEDLESS = re.compile(r"rotary_emb\.inv_freq$")  # older checkpoints hold what follows from the config
MOST_NAMES = 8  # of tensors in a message

Rows = tuple[int, int] | None
"""A half-open range along one dim, or all of it."""


class WeightSource(Protocol):
    """Where weights come from."""

    def read(self, name: str, shape: tuple[int, ...], rows: Rows = None, columns: Rows = None) -> Tensor:
        """The slice `[rows, columns]` of tensor `name`, whose whole shape must be `shape`; dtype as stored, on the CPU
        or the device it is made on. Raises ConfigError when it is missing or its shape differs, or it is stored in a
        dtype that no weight of this model has."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        ...


class SafetensorsSource:
    """The `*.safetensors` of a Hugging Face folder: one file, or shards with an index. A context manager."""

    def __init__(self, folder: Path, warns: bool = True):
        """`warns` has it tell of a folder that holds two checkpoints."""
        if warns and all((folder / name).exists() for name in (SINGLE, INDEX)):
            log.warning(
                "%s holds %s beside the shards of %s; the single file is read, as transformers does: remove what is "
                "not meant", folder, SINGLE, INDEX,
            )  # fmt: skip
        self._folder = folder
        self._file_of = tensor_files(folder)
        self._has_prefix = any(name.startswith(PREFIX) for name in self._file_of)
        self._files: dict[str, Any] = {}
        self._opened: dict[str, WeightFile] = {}
        self._unread: set[str] = set()
        self._exits = ExitStack()

    def __enter__(self) -> "SafetensorsSource":
        with self._exits:  # what is open is closed again if one cannot be opened
            for file in sorted(set(self._file_of.values())):
                opened = self._files[file] = self._exits.enter_context(self._open(file))
                self._unread.update(opened.keys())
            self._exits = self._exits.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._exits.close()

    def has(self, name: str) -> bool:
        return self._stored_name(name) in self._file_of

    def read(self, name: str, shape: tuple[int, ...], rows: Rows = None, columns: Rows = None) -> Tensor:
        name = self._stored_name(name)
        if name not in self._file_of:
            raise ConfigError(f"the checkpoint in {str(self._folder)!r} has no tensor {name!r}")
        try:
            stored = self._files[self._file_of[name]].get_slice(name)
        except SafetensorError as error:
            raise ConfigError(
                f"{self._file_of[name]} in {str(self._folder)!r} lacks tensor {name!r}: {error}"
            ) from error
        if stored.get_dtype() not in STORED_DTYPES:
            raise ConfigError(
                f"tensor {name!r} is stored as {stored.get_dtype()}, as quantized weights are; distkv reads "
                f"{', '.join(STORED_DTYPES)}: give a checkpoint that is not quantized"
            )
        if tuple(stored.get_shape()) != shape:
            raise ConfigError(f"tensor {name!r} has shape {stored.get_shape()}; config.json asks for {list(shape)}")
        self._unread.discard(name)
        index = tuple(slice(None) if part is None else slice(*part) for part in (rows, columns)[: len(shape)])
        return stored[index]

    def check_all_read(self, is_elsewhere: Callable[[str], bool] = lambda name: False) -> None:
        """Raises ConfigError when there are tensors that nobody has read: they belong to another model.

        Args:
            is_elsewhere: whether another rank reads a tensor.
        """
        left = {name for name in self._unread if not NEEDLESS.search(name) and not is_elsewhere(name)}
        kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in left})
        if kinds:
            names = ", ".join(kinds[:MOST_NAMES]) + (", ..." if len(kinds) > MOST_NAMES else "")
            raise ConfigError(
                f"the checkpoint in {str(self._folder)!r} has {len(left)} tensor(s) that no LlamaForCausalLM of its "
                f"config.json reads: {names}; it is of another model, or quantized, or the config lacks a field"
            )

    def digest(self, whole: bool) -> str:
        """Tells these weights from others, once all are read; without `whole` only as far as ranks are to be compared.
        Raises ConfigError when a file cannot be read, or was changed since it was opened."""
        files = self._opened, self._file_of
        digest = weights_digest(self._folder, *files) if whole else sample_digest(*files)
        for file in self._opened.values():
            file.check()
        return digest

    def _stored_name(self, name: str) -> str:
        return name if self._has_prefix else name.removeprefix(PREFIX)

    def _open(self, file: str) -> Any:
        """Opens a file twice, for its tensors and for its digest, by a path that makes sure that both are the same."""
        path = self._folder / file
        try:
            opened = self._opened[file] = WeightFile(path)
        except OSError as error:
            raise cannot_read(path, error) from error
        self._exits.callback(opened.close)
        return open_tensors(path, opened.link)


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

    def check_all_read(self, is_elsewhere: Callable[[str], bool] = lambda name: False) -> None:
        """There are never more."""

    def digest(self, whole: bool) -> str:
        return f"dummy {self._seed} {self._device.type}"  # on another kind of device they are other ones

    def read(self, name: str, shape: tuple[int, ...], rows: Rows = None, columns: Rows = None) -> Tensor:
        whole = torch.ones(shape, dtype=self._dtype, device=self._device)
        if not name.endswith("norm.weight"):
            # a hash, since torch's CPU generator takes 32 bits of a seed
            generator = torch.Generator(self._device).manual_seed(crc32(f"{self._seed} {name}".encode()))
            whole.normal_(0, 0.02, generator=generator)
        index = tuple(slice(None) if part is None else slice(*part) for part in (rows, columns)[: len(shape)])
        return whole[index].clone()


def weight_source(
    folder: Path, load_format: str, seed: int, dtype: torch.dtype, device: torch.device, warns: bool
) -> DummySource | SafetensorsSource:
    """Where a model's weights come from by `RankConfig.load_format`. Raises ConfigError as `SafetensorsSource` does."""
    return DummySource(seed, dtype, device) if load_format == "dummy" else SafetensorsSource(folder, warns)


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
    """Tensor name -> file name, in the folder. With one file and an index the file counts, as in transformers.

    Raises ConfigError when there is neither or it cannot be read, and where an adapter is to be put on the weights.
    """
    if os.path.lexists(folder / ADAPTER):
        raise ConfigError(
            f"{str(folder)!r} has {ADAPTER}: weights that are to be changed by an adapter; merge the two into one "
            f"checkpoint, or remove {ADAPTER} to have the weights as they are"
        )
    if os.path.lexists(folder / SINGLE):  # a link to nowhere counts, and opening it tells
        with open_tensors(folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), SINGLE)
    if not os.path.lexists(folder / INDEX):
        raise ConfigError(
            f"{str(folder)!r} has neither {SINGLE} nor {INDEX}; distkv reads safetensors checkpoints "
            "(load_format='dummy' needs none)"
        )
    try:
        files = dict(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
        found = {name: str(file) for name, file in files.items()}
    except OSError as error:
        raise cannot_read(folder / INDEX, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{str(folder / INDEX)!r} is not a safetensors index: {error!r}") from error
    elsewhere = next((file for file in found.values() if file != Path(file).name or file == ".."), None)
    if elsewhere is not None:
        raise ConfigError(
            f"{str(folder / INDEX)!r} names {elsewhere!r}, which is no file of that folder; have all shards in it"
        )
    return found


def open_tensors(path: Path, link: str | None = None) -> Any:
    """Opens a file for reading, as a context manager; raises ConfigError when it cannot be read.

    Args:
        link: another path of the same file, by which it is opened.
    """
    try:
        with open(link or path, "rb"):  # which tells why it cannot be; safetensors takes every cause for a missing file
            pass
        return safe_open(link or path, framework="pt")
    except OSError as error:
        raise cannot_read(path, error) from error
    except SafetensorError as error:
        raise ConfigError(
            f"{str(path)!r} cannot be read ({error}); it is truncated or damaged: fetch it again"
        ) from error
