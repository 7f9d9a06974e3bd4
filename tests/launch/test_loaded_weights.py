"""Pages are kept under a digest of the weights that were read, whoever replaces or changes files meanwhile."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoints import save_llama
from support.llms import tiered
from support.prompts import random_prompt
from support.ranks import load_rank, run_chunks

from distkv import LLM, ConfigError, RequestOutput, SamplingParams
from distkv.config import EngineConfig
from distkv.launch.fingerprint import common_digest
from distkv.launch.launch import set_up
from distkv.workers.group.local_group import LocalGroup
from distkv.workers.model.model_config import ModelConfig
from distkv.workers.model.weight_files import WeightFile
from distkv.workers.model.weights import SafetensorsSource
from distkv.workers.rank import Loaded
from distkv.workers.rank_config import RankConfig

WEIGHTS = "model.safetensors"
PROMPT = random_prompt(200, 1)
PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """The weights of two models of one shape."""
    folders = [save_llama(tmp_path_factory.mktemp("model"), seed=seed)[0] for seed in (0, 1)]
    one, other = ((folder / WEIGHTS).read_bytes() for folder in folders)
    return one, other


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path, weights: tuple[bytes, bytes]) -> Path:
    """The first of the two."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    put(folder, weights[0])
    return folder


def put(folder: Path, content: bytes) -> None:
    """Has another file take the place of the weights, as whoever fetches them does it, with the time of the old one."""
    path = folder / WEIGHTS
    path.with_suffix(".new").write_bytes(content)
    shutil.copystat(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def write_into(folder: Path, content: bytes) -> None:
    """Changes the file itself, as `cp` does."""
    with open(folder / WEIGHTS, "r+b") as file:
        file.write(content)


def digest(folder: Path, whole: bool = True) -> str:
    with SafetensorsSource(folder) as source:
        return source.digest(whole)


def ask(llm: LLM) -> RequestOutput:
    return llm.generate([PROMPT], PARAMS, use_tqdm=False)[0]


def test_weights_replaced_before_they_are_read(
    folder: Path, tmp_path: Path, weights: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an engine has seen the first model's files, and before it opens them, the second takes their place; later
    that is taken back. Each finds its own pages, and none the other's."""
    answers = []
    for content in weights:
        put(folder, content)
        with LLM(folder, device_kv_bytes="1MiB", host_kv_bytes=0, page_size=16) as llm:
            answers.append(ask(llm).outputs[0].token_ids)
    assert answers[0] != answers[1]
    put(folder, weights[0])
    digest(folder)  # so that it is known
    enter = SafetensorsSource.__enter__

    def late(self: SafetensorsSource) -> SafetensorsSource:
        put(folder, weights[1])
        return enter(self)

    for number, cached in ((1, 0), (0, 0), (1, 192), (0, 192)):
        if not cached and number:
            monkeypatch.setattr(SafetensorsSource, "__enter__", late)
        else:
            monkeypatch.undo()
            put(folder, weights[number])
        with tiered(folder, (20, 20, 60), tmp_path / "cache") as llm:
            output = ask(llm)
        assert output.outputs[0].token_ids == answers[number]
        assert output.num_cached_tokens == cached


@pytest.mark.parametrize("whole", [True, False], ids=["digest", "sample"])
def test_ranks_that_read_different_weights(folder: Path, weights: tuple[bytes, bytes], whole: bool) -> None:
    """Replaced between two of them, or another file on another node. They are told apart without a cache too."""
    found = [digest(folder, whole)]
    put(folder, weights[1])
    found += [digest(folder, whole)] * 2
    put(folder, weights[0])
    found.append(digest(folder, whole))
    assert common_digest([found[0], found[3]], folder) == found[0]
    with pytest.raises(ConfigError, match=r"different weights from .*model': rank 1, 2 not those of rank 0"):
        common_digest(found, folder)


def test_an_engine_whose_ranks_read_different_weights_does_not_start(folder: Path) -> None:
    class TornGroup(LocalGroup):
        def load(self, config: RankConfig) -> list[Loaded]:
            return [*super().load(config), Loaded("of another rank", "torch")]

    group = TornGroup("cpu")
    try:
        with pytest.raises(ConfigError, match="rank 1 not those of rank 0"):
            set_up(group, EngineConfig(folder), ModelConfig.load(folder), 256)
    finally:
        group.close()


def test_weights_replaced_while_they_are_read(folder: Path, weights: tuple[bytes, bytes]) -> None:
    """What is open stays open: all of it is the first model's."""
    before = digest(folder)
    with SafetensorsSource(folder) as source:
        put(folder, weights[1])
        assert torch.equal(source.read("model.norm.weight", (64,)), read_norm(folder, weights[0]))
        assert source.digest(whole=True) == before
    assert digest(folder) != before


def read_norm(folder: Path, content: bytes) -> torch.Tensor:
    elsewhere = folder.parent / "elsewhere"
    shutil.copytree(folder, elsewhere)
    put(elsewhere, content)
    with SafetensorsSource(elsewhere) as source:
        return source.read("model.norm.weight", (64,)).clone()


@pytest.mark.parametrize("keeps_times", [False, True])
def test_weights_changed_while_they_are_read(folder: Path, weights: tuple[bytes, bytes], keeps_times: bool) -> None:
    """Nobody can tell what was read."""
    with SafetensorsSource(folder) as source:
        before = (folder / WEIGHTS).stat()
        write_into(folder, weights[1])
        if keeps_times:
            os.utime(folder / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
        for whole in (True, False):
            with pytest.raises(ConfigError, match="was changed while it was read; start again"):
                source.digest(whole)


def test_other_rights_are_no_other_weights(folder: Path) -> None:
    before = digest(folder)
    with SafetensorsSource(folder) as source:
        (folder / WEIGHTS).chmod(0o600)
        assert source.digest(whole=True) == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_changed_after_they_were_read(folder: Path, weights: tuple[bytes, bytes], dtype: str) -> None:
    """A model computes with what it has read, and does not even hold the file."""
    rank = load_rank(folder, dtype=dtype)
    expected = run_chunks(rank, PROMPT[:20], [20])
    write_into(folder, weights[1])
    assert torch.equal(run_chunks(rank, PROMPT[:20], [20]), expected)
    os.truncate(folder / WEIGHTS, 0)
    assert torch.equal(run_chunks(rank, PROMPT[:20], [20]), expected)
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_tensors_swapped_by_the_index_alone(tmp_path: Path) -> None:
    """Two shards hold tensors of the same names, and the index says which are meant."""
    folder, _ = save_llama(tmp_path / "model", max_shard_size="60KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    weight_map = content["weight_map"]
    shard = min(weight_map.values())
    shutil.copy(folder / shard, folder / f"twin-{shard}")
    change_last_bit(folder / f"twin-{shard}")
    first, *others = (tensor for tensor, file in weight_map.items() if file == shard)
    found = []
    for moved in ([first], others):
        changed = weight_map | dict.fromkeys(moved, f"twin-{shard}")
        index.write_text(json.dumps(content | {"weight_map": changed}))
        found += [digest(folder), digest(folder, whole=False)]
    assert len(set(found)) == 4


def change_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_files_are_closed_when_one_of_them_cannot_be_opened(tmp_path: Path) -> None:
    folder, _ = save_llama(tmp_path / "model", max_shard_size="60KB")
    sorted(folder.glob("*.safetensors"))[-1].unlink()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match="fetch it again"):
        load_rank(folder)
    assert os.listdir("/proc/self/fd") == before


def test_a_file_that_cannot_be_read_to_its_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: WeightFile) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(WeightFile, "digest", broken)
    with pytest.raises(ConfigError, match=r"model.safetensors' cannot be read \(Input/output error\): fetch it again"):
        digest(folder)
