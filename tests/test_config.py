"""Options as users give them: sizes, paths, numbers of other libraries, and those that nothing would come of."""

import os
import pickle
import traceback
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from support.llms import tiered_options
from typer.testing import CliRunner

import distkv
from distkv import LLM, ConfigError, EngineConfig, SamplingParams
from distkv.commands.main import app
from distkv.option_checks import parse_bytes
from distkv.planner.ranks import make_rank_config
from distkv.workers.model.model_config import ModelConfig

SHORT = SamplingParams(max_tokens=2, temperature=0)


@pytest.mark.parametrize(
    "size, expected",
    [
        (1, 1), ("1", 1), ("4096", 4096), ("512MB", 512 * 10**6), ("4GiB", 2**32), ("1 GiB", 2**30), (" 2kib ", 2048),
        ("1.5GiB", 3 * 2**29), ("0.5KiB", 512), ("1.9", 1), (np.int32(7), 7), (np.uint64(2**40), 2**40),
        ("9007199254740993", 2**53 + 1), (2**63 - 1, 2**63 - 1), ("4G", 4 * 10**9), ("4 Gi", 2**32), ("512k", 512_000),
        ("2Mi", 2**21), ("1T", 10**12), (4e9, 4 * 10**9), (np.float32(4096), 4096),
    ],
)  # fmt: skip
def test_sizes(size: Any, expected: int) -> None:
    assert parse_bytes("x", size) == expected and type(parse_bytes("x", size)) is int


@pytest.mark.parametrize(
    "size",
    [
        "0.5", "0.9B", "0", 0, "0.0GiB", "-1", -1, "1e3", "GiB", "", " ", "1.5.5", "nan", "inf", float("nan"), 0.5, 1.5,
        float("inf"), True, False, np.True_, np.float64(4096.5), 1e30, 2**63, 10**400, "9" * 30, "9" * 400, "8 EiB",
        "4 apples", "٤", "4_096", "0x10", b"4GiB", None, [4], "1 G iB",
    ],
)  # fmt: skip
def test_what_is_no_size(size: Any) -> None:
    with pytest.raises(ConfigError, match=r"^device_kv_bytes is .*give bytes as a positive whole number or a text"):
        parse_bytes("device_kv_bytes", size)


def test_none_is_a_size_where_it_means_something() -> None:
    for zero in (0, "0", "0GiB", "0.0 MB", np.int64(0)):
        assert EngineConfig("m", host_kv_bytes=zero).host_kv_bytes == 0
    for less in ("0.5", False, -1, "-0"):
        with pytest.raises(ConfigError, match="host_kv_bytes is"):
            EngineConfig("m", host_kv_bytes=less)
    with pytest.raises(ConfigError, match=r"max-bytes is '0\.5'"):
        CliRunner().invoke(app, ["cache", "prune", "--cache-dir", "x", "--max-bytes", "0.5"], catch_exceptions=False)


def test_a_share_of_the_gpu_may_be_given_where_there_is_none() -> None:
    for device in ("auto", "cpu"):
        assert EngineConfig("m", device=device, gpu_memory_utilization=0.5).gpu_memory_utilization == 0.5


def test_numbers_of_other_libraries_are_taken() -> None:
    config = EngineConfig(
        "m", page_size=np.int64(64), max_num_seqs=np.uint8(5), num_threads=np.int16(2), seed=np.int64(3),
        gpu_memory_utilization=np.float32(0.5), enable_prefix_caching=np.False_,
    )  # fmt: skip
    assert config == EngineConfig(
        "m", page_size=64, max_num_seqs=5, num_threads=2, seed=3, gpu_memory_utilization=0.5,
        enable_prefix_caching=False,
    )  # fmt: skip
    for field in fields(EngineConfig):
        assert type(getattr(config, field.name)).__module__ in ("builtins", "pathlib"), field.name


@pytest.mark.parametrize(
    "options, message",
    [
        ({"page_size": True}, "page_size is True"),
        ({"max_num_seqs": 2.0}, r"max_num_seqs is 2\.0"),
        ({"max_model_len": 2**31}, "max_model_len is 2147483648"),
        ({"seed": -1}, "seed is -1; it must be an integer from 0"),
        ({"staging_pages": 0}, "staging_pages is 0"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization is nan"),
        ({"gpu_memory_utilization": "0.5"}, "gpu_memory_utilization is '0.5'"),
        ({"gpu_memory_utilization": 10**400}, "gpu_memory_utilization is 1000"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching is 'no'; use True or False"),
        ({"enable_prefix_caching": 2}, "enable_prefix_caching is 2"),
        ({"dtype": np.array(["float32", "auto"])}, "dtype is array"),
        ({"device": None}, "device is None; use one of auto, cuda, cpu"),
        ({"ray_address": " "}, "ray_address is ' '"),
        ({"cache_dir": ""}, "cache_dir is ''; give the path"),
        ({"cache_dir": b"kv"}, "cache_dir is b'kv'"),
        ({"cache_dir": "a\0b"}, "cache_dir is 'a"),
        ({"cache_dir": "~nobody-of-this-name/kv"}, "cache_dir is '~nobody-of-this-name/kv', which leads nowhere"),
        ({"model": ""}, "model is ''"),
        ({"model": 7}, "model is 7"),
        ({"max_queued_requests": -1}, "max_queued_requests is -1; it must be an integer from 0"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens is 0; it must be an integer from 1"),
        ({"max_prompt_tokens": 1.5}, r"max_prompt_tokens is 1\.5"),
        ({"max_sessions": float("nan"), "cache_dir": "kv"}, "max_sessions is nan"),
        ({"max_share_per_salt": 0}, "max_share_per_salt is 0; use a share above 0"),
        ({"max_share_per_salt": -0.1}, r"max_share_per_salt is -0\.1"),
        ({"max_share_per_salt": 1.5}, r"max_share_per_salt is 1\.5"),
        ({"max_share_per_salt": float("nan")}, "max_share_per_salt is nan"),
        ({"max_share_per_salt": "half"}, "max_share_per_salt is 'half'"),
        ({"max_session_bytes": "0", "cache_dir": "kv"}, "max_session_bytes is '0'; give bytes as a positive"),
        # nothing would come of these
        (
            {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "min_tensor_parallel_size": 1}
            | {"max_rank_failures": 1},
            "min_tensor_parallel_size is set and pipeline_parallel_size is more than 1",
        ),
        ({"max_share_per_salt": 1.0}, "max_share_per_salt is set and 1 is no limit; lower it, or leave it out"),
        ({"max_sessions": 5}, "max_sessions is set and cache_dir is not, where they are kept; name the folder"),
        ({"max_session_bytes": "1MiB"}, "max_session_bytes is set and cache_dir is not"),
        ({"max_prompt_tokens": 100, "max_model_len": 100}, "max_prompt_tokens is set and max_model_len is 100, which"),
        ({"disk_kv_bytes": "1GiB"}, "disk_kv_bytes is set and cache_dir is not; name the folder"),
        ({"disk_write_policy": "idle"}, "disk_write_policy is set and cache_dir is not"),
        ({"disk_kv_codec": "lossless"}, "disk_kv_codec is set and cache_dir is not; name the folder"),
        ({"disk_kv_codec": "zstd", "cache_dir": "kv"}, "disk_kv_codec is 'zstd'; use one of none, lossless"),
        (
            {"disk_write_policy": "idle", "cache_dir": "kv", "enable_prefix_caching": False},
            "disk_write_policy is set and enable_prefix_caching is off",
        ),
        ({"save_timeout": 0, "cache_dir": "kv"}, "save_timeout is 0"),
        ({"save_timeout": 5}, "save_timeout is set and cache_dir is not"),
        (
            {"save_timeout": 5, "cache_dir": "kv", "enable_prefix_caching": False},
            "save_timeout is set and enable_prefix_caching is off",
        ),
        ({"staging_pages": 64, "host_kv_bytes": 0}, "staging_pages is set and host_kv_bytes is 0"),
        ({"max_cold_bytes_per_step": 64, "host_kv_bytes": 0}, "max_cold_bytes_per_step is set and host_kv_bytes is 0"),
        ({"cache_dir": "kv", "host_kv_bytes": 0}, "cache_dir is set and host_kv_bytes is 0"),
        ({"gpu_memory_utilization": 0.5, "device_kv_bytes": 9}, "gpu_memory_utilization is set and device_kv_bytes is"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**({"model": "m"} | options))


def test_loads_are_larger_on_cuda_unless_their_size_is_given(tiny_model: Path) -> None:
    model, pages = ModelConfig.load(tiny_model), []
    for given in (None, 99):
        config = EngineConfig(tiny_model, staging_pages=given)
        pages.append([make_rank_config(config, model, device).staging_pages for device in ("cpu", "cuda")])
    assert pages == [[4 * 2048 // 256, 16 * 2048 // 256], [99, 99]]


def test_a_number_that_python_does_not_print_is_refused_all_the_same() -> None:
    for name in ("max_model_len", "device_kv_bytes"):
        with pytest.raises(ConfigError, match=f"{name} is an unprintable int"):
            EngineConfig("m", **{name: 10**5000})


def test_paths_are_settled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Named:
        def __fspath__(self) -> str:
            return "kv"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given in ("kv", "./kv", Path("kv"), Named(), str(tmp_path / "kv")):
        assert EngineConfig("m", cache_dir=given).cache_dir == tmp_path / "kv"  # type: ignore[arg-type]
    assert EngineConfig("~/m", cache_dir="~/kv") == EngineConfig(tmp_path / "home/m", cache_dir=tmp_path / "home/kv")


def test_the_working_directory_may_change(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Between two turns of a session, the pages and the session stay where they began."""
    (tmp_path / "model").mkdir()
    (tmp_path / "other").mkdir()
    for file in tiny_model.iterdir():
        (tmp_path / "model" / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    with LLM("model", **tiered_options((4, 8, 12), Path("kv"))) as llm:  # type: ignore[arg-type]
        llm.generate([[5] * 40], SHORT, use_tqdm=False)
        session = llm._front_end.session("trip", SHORT)
        monkeypatch.chdir(tmp_path / "other")
        llm.generate([[6] * 40], SHORT, use_tqdm=False)
        assert llm._front_end.session("tour", SHORT)._path.parent == session._path.parent == tmp_path / "kv/sessions"
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.parametrize("folder", ["/proc/x", "/sys/x"])
def test_a_folder_where_no_files_can_be_is_told_from_a_full_disk(tiny_model: Path, folder: str) -> None:
    with pytest.raises(ConfigError, match=f"cache_dir '{folder}/[0-9a-f]*' cannot be used: .* is no place for files"):
        LLM(tiny_model, cache_dir=folder)


def leaves(group: Any, *names: str) -> list[tuple[tuple[str, ...], Any]]:
    if not hasattr(group, "commands"):
        return [(names, group)]
    return [leaf for name, command in group.commands.items() for leaf in leaves(command, *names, name)]


COMMANDS = leaves(typer.main.get_command(app))


@pytest.mark.parametrize("names, command", COMMANDS, ids=[" ".join(names) for names, _ in COMMANDS])
def test_help_shows_every_name_and_help_in_80_columns(names: tuple[str, ...], command: Any) -> None:
    text = CliRunner().invoke(app, [*names, "--help"], env={"COLUMNS": "80"}).output
    words, lines = text.replace(",", " ").split(), " ".join(text.split())
    for option in command.params:
        assert all(name in words or option.param_type_name == "argument" for name in option.opts), option.opts
        assert " ".join(option.help.split()) in lines.replace("- ", "-")
    told = lines.removeprefix(f"Usage: root {' '.join(names)} [OPTIONS]").removeprefix(" [-- COMMAND]...")
    assert "…" not in text and "..." not in told, text
    if "--disk-kv-bytes" in text and "--cache-dir" in text:  # of an engine; those of a plan need none
        assert "--disk-kv-bytes <str> KV memory on disk, such as 100GiB; it needs --cache-dir." in lines


@pytest.mark.parametrize("names", [(), ("bench",), ("cache",)])
def test_lists_of_commands_cut_no_text(names: tuple[str, ...]) -> None:
    text = CliRunner().invoke(app, [*names, "--help"], env={"COLUMNS": "80"}).output
    assert "..." not in text.replace("[ARGS]...", "")


REQUIRED = {
    "model": "m",
    "name": "smollm2",
    "cache_dir": "kv",
    "max_bytes": "1",
    "input_file": "i",
    "output": "o",
    "out": "o",
    "file": "f",
}


def _given(option: Any, value: str | None = None) -> str:
    """An option or argument on a command line, which is required unless it has a value."""
    value = REQUIRED[option.name] if value is None else value
    return f"{option.opts[0]}={value}" if option.opts[0].startswith("-") else value


def test_every_option_that_takes_a_path_settles_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    seen = 0
    for names, command in COMMANDS:
        for option in command.params:
            if option.name.endswith(("dir", "file")) or option.name == "out":
                others = [_given(other) for other in command.params if other.required and other is not option]
                for given, expected in (("~/f", tmp_path / "home/f"), ("f", tmp_path / "f"), ("/f", Path("/f"))):
                    context = command.make_context("x", [*others, _given(option, given)])
                    assert context.params[option.name] in (expected, [expected]), names
                with pytest.raises(ConfigError, match=rf"(?i)^{option.opts[0]} is ''; give the path"):
                    command.make_context("x", [*others, _given(option, "")])
                seen += 1
    assert seen > 15
    for command in ("generate", "chat", "stress", "demo"):
        with pytest.raises(ConfigError, match="--model is ''"):
            CliRunner().invoke(app, [command, "--model="], input="x", catch_exceptions=False)


@pytest.mark.parametrize("name", [name for name in distkv.__all__ if name.endswith(("Error", "Died"))])
def test_errors_are_called_by_the_name_that_users_know(name: str) -> None:
    kind = getattr(distkv, name)
    error = kind(1, "here", "it was killed") if name == "WorkerDied" else kind("what to do")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error)
    assert traceback.format_exception_only(error)[0].startswith(f"distkv.{name}: ")


def test_a_folder_below_one_that_was_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ConfigError, match="cache_dir is 'kv', which leads nowhere"):
        EngineConfig("/m", cache_dir="kv")
    os.chdir(tmp_path)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"tensor_parallel_size": 3}, "does not divide tensor_parallel_size 3"),
        ({"tensor_parallel_size": 4, "attention_policy": "sink_window"}, "attention_policy is sink_window"),
        ({"tensor_parallel_size": 4, "max_rank_failures": 1, "min_tensor_parallel_size": 1}, "leave one of them out"),
        ({"tensor_parallel_size": 4, "device": "cuda", "page_size": 128}, "use page_size 256 or more"),
    ],
)
def test_context_groups_go_with_some_options_alone(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EngineConfig("folder", decode_context_parallel_size=2, **options)
    assert EngineConfig("f", tensor_parallel_size=4, decode_context_parallel_size=2, page_size=16).plan_page_size == 32
