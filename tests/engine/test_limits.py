"""A context of 131,072 tokens in little memory: what the process and the folder really take, watched from outside."""

import json
import threading
import time
from pathlib import Path

from support.processes import read_line, start_python

CONTEXT = 131_072
MIB = 2**20
DEVICE, HOST, DISK = 4 * MIB, 16 * MIB, 160 * MIB
SLACK = 48 * MIB  # of the process beside its pools: the plan's lists, attention's work space, threads, the allocator

RUN = """
import json, sys
from distkv.config import EngineConfig
from distkv.launch.launch import launch
from distkv.engine.protocol import EngineRequest
from distkv.sampling_params import SamplingParams

folder, cache, context, device, host, disk = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
engine = launch(EngineConfig(
    model=folder, load_format="dummy", dtype="float32", max_model_len=context + 64, max_num_batched_tokens=512,
    device_kv_bytes=device, host_kv_bytes=host, disk_kv_bytes=disk, cache_dir=cache, num_threads=1,
    enable_prefix_caching=False))
params = SamplingParams(temperature=0, ignore_eos=True)

def answer(name, length, new_tokens):
    engine.add([EngineRequest(name, [7] * length, params, new_tokens, 0, synthetic_kv_seed=1)])
    tokens = []
    while len(tokens) < new_tokens:
        tokens += [output.token_id for output in engine.step()]
    return tokens

answer("warm", 3000, 3)
print("warm", flush=True)
sys.stdin.readline()
tokens = answer("long", context, 6)
told = {"tokens": tokens, "moved": engine.stats().bytes_moved, "kv": engine.info.kv_bytes_per_token}
print(json.dumps(told), flush=True)
sys.stdin.readline()
engine.close()
"""


def test_memory_and_disk_stay_within_their_limits(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 64,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1,
        "head_dim": 64, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "torch_dtype": "float32",
    }  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    cache = tmp_path / "cache" / "scratch"
    process = start_python(RUN, tmp_path / "model", cache.parent, CONTEXT, DEVICE, HOST, DISK)
    assert process.stdin is not None and process.stdout is not None
    assert read_line(process) == "warm"
    before, most, largest = resident_bytes(process.pid), 0, 0
    result: list[str] = []
    reader = threading.Thread(target=lambda: result.append(read_line(process)))
    reader.start()
    print(file=process.stdin, flush=True)
    while reader.is_alive():
        most, largest = (
            max(most, resident_bytes(process.pid)),
            max(largest, folder_bytes(cache / "kv.zarr")),
        )
        time.sleep(0.05)
    print(file=process.stdin, flush=True)
    assert process.wait() == 0
    process.stdin.close()
    process.stdout.close()
    told = json.loads(result[0])

    whole = CONTEXT * told["kv"]
    assert whole == 128 * MIB > 2 * (DEVICE + HOST + SLACK) - 10 * MIB, "or nothing would be shown"
    assert len(told["tokens"]) == 6
    assert told["moved"]["disk_streamed"] > 5 * (whole - DEVICE - HOST)
    assert most - before < DEVICE + HOST + SLACK
    assert whole - DEVICE - HOST < largest <= DISK
    assert not (cache / "kv.zarr").exists()


def resident_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # a temporary file that has just been renamed
            continue
    return total
