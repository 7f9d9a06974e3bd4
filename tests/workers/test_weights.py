"""Checkpoints: what is read of a folder, what is refused, and that the message names the file or the tensor."""

import builtins
import errno
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.checkpoints import edit_config, edit_weights, save_llama
from support.ranks import load_rank

from distkv.errors import ConfigError
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.model.weights import DummySource, SafetensorsSource


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A checkpoint in one file, with all biases."""
    return save_llama(tmp_path / "single", attention_bias=True, mlp_bias=True, num_hidden_layers=1)[0]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint in several files and an index."""
    return save_llama(tmp_path / "sharded", max_shard_size="60KB")[0]


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_no_weights(single: Path) -> None:
    (single / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_rank(single)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(single: Path, keep: float) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(ConfigError, match=r"model\.safetensors' cannot be read .* fetch it again"):
        load_rank(single)


def test_every_tensor_must_be_there(single: Path) -> None:
    path = single / "model.safetensors"
    tensors = load_file(path)
    assert len(tensors) == 3 + 9 + 7
    for name in tensors:
        save_file({other: tensor for other, tensor in tensors.items() if other != name}, path)
        with pytest.raises(ConfigError, match=f"has no tensor '{name}'"):
            load_rank(single)


def test_every_tensor_must_have_its_shape(single: Path) -> None:
    path = single / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        for wrong in (torch.cat([tensor, tensor[:1]]), tensor[None], tensor[:-1]):
            save_file(tensors | {name: wrong.contiguous()}, path)
            message = rf"^tensor '{name}' has shape {re.escape(str(list(wrong.shape)))}; config\.json asks for "
            with pytest.raises(ConfigError, match=message + re.escape(str(list(tensor.shape)))):
                load_rank(single)


@pytest.mark.parametrize("keep", [None, 0.0, 0.5])
def test_missing_or_truncated_shard(sharded: Path, keep: float | None) -> None:
    for path in sorted(sharded.glob("*.safetensors")):
        content = path.read_bytes()
        path.unlink()
        if keep is not None:
            path.write_bytes(content[: int(len(content) * keep)])
        cause = (
            "No such file or directory.*; it is not there" if keep is None else "header.*; it is truncated or damaged"
        )
        with pytest.raises(ConfigError, match=f"{path.name}' cannot be read .*{cause}: fetch it again"):
            load_rank(sharded)
        path.write_bytes(content)
    load_rank(sharded)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": ["a"]}'])
def test_malformed_index(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"index\.json' is not a safetensors index"):
        load_rank(sharded)


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/passwd", "..", "shards/1.safetensors"])
def test_index_that_leads_out_of_its_folder(sharded: Path, file: str) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"model.norm.weight": file}))
    with pytest.raises(ConfigError, match=f"names '{file}', which is no file of that folder"):
        load_rank(sharded)


def test_index_that_lacks_a_tensor(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].pop("model.norm.weight"))
    with pytest.raises(ConfigError, match=r"has no tensor 'model\.norm\.weight'"):
        load_rank(sharded)


def test_index_that_names_the_wrong_shard(sharded: Path) -> None:
    def move(index: dict[str, Any]) -> None:
        files = index["weight_map"]
        name = "model.norm.weight"
        files[name] = next(file for file in files.values() if file != files[name])

    edit_index(sharded, move)
    with pytest.raises(ConfigError, match=r"lacks tensor 'model\.norm\.weight'"):
        load_rank(sharded)


FILES = ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_why_a_file_cannot_be_read(
    single: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """As the system says it, whoever runs the tests: root may read everything."""
    folder = sharded if name == FILES[3] else single
    (folder / name).touch()
    plain = builtins.open

    def refuse(path: Any, *rest: Any, **options: Any) -> Any:
        if str(path) == str(folder / name):
            raise OSError(number, os.strerror(number), str(path))
        return plain(path, *rest, **options)

    for module in (builtins, io):  # Path.read_text takes the other one
        monkeypatch.setattr(module, "open", refuse)
    cure = "; let this user read it" if number == errno.EACCES else ""
    with pytest.raises(ConfigError, match=rf"/{name}' cannot be read \({os.strerror(number)}\){cure}"):
        load_rank(folder)


def test_a_folder_that_may_not_be_searched(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, **_: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(
        ConfigError, match=rf"{single.name}' cannot be read \(Permission denied\); let this user read it"
    ):
        ModelConfig.load(single)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_link_to_nowhere(single: Path, name: str) -> None:
    (single / "model.safetensors").unlink()
    (single / name).symlink_to(single / "gone")
    with pytest.raises(ConfigError, match=rf"/{name}' cannot be read \(No such file or directory\)"):
        load_rank(single)


@pytest.mark.parametrize(
    ("left", "names"),
    [
        ({"model.layers.0.self_attn.q_norm.weight": 1}, r"1 tensor\(s\) .*: model\.layers\.\*\.self_attn\.q_norm\."),
        ({"model.layers.1.mlp.up_proj.weight": 1}, r"1 tensor\(s\) .*model\.layers\.\*\.mlp\.up_proj"),  # a layer more
        ({"model.embed_positions.weight": 1, "score.weight": 1}, r": model\.embed_positions.*, score\.weight"),
        ({f"model.layers.0.self_attn.{part}_proj.weight_scale": 1 for part in "qkvo"},
         r"4 tensor\(s\) .*\.k_proj\.weight_scale, .*\.q_proj\.weight_scale"),
        ({"norm.weight": 64}, r"1 tensor\(s\) .*: norm\.weight; "),  # beside the one with a prefix
        ({f"x{number}": 1 for number in range(20)}, r"20 tensor\(s\) .*: x0, .*, \.\.\.; "),
    ],
)  # fmt: skip
def test_tensors_that_nobody_reads(single: Path, left: dict[str, int], names: str) -> None:
    edit_weights(single, lambda tensors: tensors.update({name: torch.ones(size) for name, size in left.items()}))
    with pytest.raises(ConfigError, match=names):
        load_rank(single)


def test_biases_that_the_config_does_not_tell_of(single: Path) -> None:
    edit_config(single, lambda raw: raw.update(attention_bias=False))
    with pytest.raises(ConfigError, match=r"4 tensor\(s\) .*k_proj\.bias, .*o_proj\.bias, .* config lacks a field"):
        load_rank(single)


def test_tensors_that_an_index_does_not_list(sharded: Path) -> None:
    path = min(sharded.glob("*.safetensors"))
    save_file(load_file(path) | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, path)
    with pytest.raises(ConfigError, match="q_norm"):
        load_rank(sharded)


@pytest.mark.parametrize("name", ["model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_tensors_that_nobody_needs(single: Path, name: str) -> None:
    edit_weights(single, lambda tensors: tensors.update({name: torch.ones(8)}))
    load_rank(single)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_quantized_weights_that_nobody_tells_of(single: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.down_proj.weight"

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[f"{name}_scale"] = torch.ones(1)

    edit_weights(single, quantize)
    with pytest.raises(ConfigError, match=f"^tensor '{name}' is stored as (F8_E4M3|I8|U8), .* not quantized"):
        load_rank(single)


def test_an_adapter_beside_the_weights(single: Path) -> None:
    (single / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has adapter_config\.json: .*merge"):
        load_rank(single)


def test_untied_config_without_a_head(tmp_path: Path) -> None:
    folder, _ = save_llama(tmp_path, tie_word_embeddings=True)
    load_rank(folder)
    edit_config(folder, lambda raw: raw.update(tie_word_embeddings=False))
    with pytest.raises(ConfigError, match=r"has no tensor 'lm_head\.weight'"):
        load_rank(folder)


@given(data=st.data())
def test_slices_of_a_tensor(tiny_model: Path, data: st.DataObject) -> None:
    """Any source gives the slice of the whole tensor, whatever else is read."""
    stored = load_file(tiny_model / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(stored)))
    shape = tuple(stored[name].shape)

    def part(size: int) -> tuple[int, int] | None:
        first = data.draw(st.integers(0, size - 1))
        return data.draw(st.sampled_from([None, (first, data.draw(st.integers(first + 1, size)))]))

    rows, columns = part(shape[0]), part(shape[-1]) if len(shape) == 2 else None
    index = tuple(slice(None) if cut is None else slice(*cut) for cut in (rows, columns)[: len(shape)])
    with SafetensorsSource(tiny_model) as source:
        assert source.has(name) and not source.has(name + "x")
        assert torch.equal(source.read(name, shape, rows, columns), stored[name][index])
    dummy = DummySource(3, torch.float32, torch.device("cpu"))
    assert torch.equal(dummy.read(name, shape, rows, columns), dummy.read(name, shape)[index])
