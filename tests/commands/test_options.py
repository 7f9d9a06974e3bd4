"""Options of commands are made of the fields of classes, and reach them."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from distkv import ConfigError, EngineConfig, RequestOutputKind, SamplingParams
from distkv.commands.main import app
from distkv.commands.options import engine, sampling, spread
from distkv.config import EngineOptions
from distkv.engine.stats import EngineStats
from distkv.option_help import option_help

DELTA = RequestOutputKind.DELTA  # an answer is shown as it comes
NGRAM = {"method": "ngram", "num_speculative_tokens": 3}
GIVEN: dict[str, tuple[str, Any]] = {
    "tensor_parallel_size": ("3", 3),
    "data_parallel_size": ("3", 3),
    "max_rank_failures": ("4", 4),
    "hang_timeout": ("90.5", 90.5),
    "rebuild_timeout": ("30", 30.0),
    "min_tensor_parallel_size": ("2", 2),
    "dtype": ("float16", "float16"),
    "max_model_len": ("100", 100),
    "max_prompt_tokens": ("90", 90),
    "max_num_seqs": ("5", 5),
    "max_num_batched_tokens": ("77", 77),
    "page_size": ("32", 32),
    "ray_address": ("local", "local"),
    "device": ("cpu", "cpu"),
    "device_kv_bytes": ("4MiB", 4 << 20),
    "host_kv_bytes": ("8MiB", 8 << 20),
    "disk_kv_bytes": ("16MiB", 16 << 20),
    "cache_dir": ("kv", Path("kv")),
    "disk_kv_codec": ("lossless", "lossless"),
    "max_share_per_salt": ("0.3", 0.3),
    "max_sessions": ("7", 7),
    "max_session_bytes": ("2MiB", 2 << 20),
    "staging_pages": ("999", 999),
    "disk_write_policy": ("idle", "idle"),
    "save_timeout": ("12.5", 12.5),
    "max_cold_bytes_per_step": ("123", 123),
    "load_format": ("dummy", "dummy"),
    "num_threads": ("2", 2),
    "batch_invariant": ("no", False),
    "attention_audit": ("16", 16),
    "attention_policy": ("top_pages(share=0.25)", "top_pages(share=0.25)"),
}
"""What the command line is given for a field, and what the field is then."""
OTHERS: dict[str, tuple[str, Any]] = {
    "pipeline_parallel_size": ("2", 2),
    "device": ("simulated", "simulated"),
    "link_bytes_per_second": ("4GB", 4 * 10**9),
    "enable_prefix_caching": ("no", False),
    "trace": ("steps.json", Path("steps.json")),
    "gpu_memory_utilization": ("0.5", 0.5),
    "kv_cache_dtype": ("int8", "int8"),
    "cpu_attention": ("0.4", 0.4),
    "tensor_parallel_size": ("4", 4),
    "decode_context_parallel_size": ("2", 2),
    "speculative_config": ('{"method": "ngram", "num_speculative_tokens": 3}', NGRAM),
}
"""The same for fields that would make some of these useless."""


class Seen:
    """Takes the place of `LLM`: keeps the last configuration and parameters, and answers nothing."""

    config: EngineConfig
    params: SamplingParams
    tokenizer: Any = None
    info: Any = None

    def __init__(self, model: Path, **options: Any):
        Seen.config = EngineConfig(model, **options)

    def stream(self, prompt: Any, params: SamplingParams) -> list[Any]:
        Seen.params = params
        return []

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0, 0)

    def __enter__(self) -> "Seen":
        return self

    def __exit__(self, *error: object) -> None: ...


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a command up to the engine; returns the configuration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distkv.llm.LLM", Seen)
    monkeypatch.setattr("distkv.launch.start_lines.start_lines", lambda *_: [])
    monkeypatch.setattr("distkv.launch.this_machine.engine_hardware", lambda *_: None)
    monkeypatch.setattr("distkv.frontend.conversation.Conversation.prompt", lambda *_: [])

    def run(command: str, *arguments: str) -> EngineConfig:
        more = ("--prompt", "Hello") if command == "generate" else ()
        result = CliRunner().invoke(
            app, [command, "--model", "folder", *more, *arguments], input="Hello\n\n", catch_exceptions=False
        )
        assert result.exit_code == 0, result.output
        return Seen.config

    return run


def flag(name: str, text: str) -> list[str]:
    if text == "no":
        return [f"--no-{name.replace('_', '-')}"]
    return [f"--{name.replace('_', '-')}", text]


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_every_option_of_the_engine_has_a_flag_that_reaches_it(command: str, run: Any) -> None:
    assert run(command) == EngineConfig(Path("folder")), "the defaults are those of the fields"
    assert GIVEN.keys() | OTHERS.keys() == {field.name for field in fields(EngineConfig)} - {
        "model",
        "seed",
        "max_queued_requests",
    }
    for group in (GIVEN, OTHERS):
        arguments = [part for name, (text, _) in group.items() for part in flag(name, text)]
        values = {name: value for name, (_, value) in group.items()}
        assert run(command, *arguments) == EngineConfig(Path("folder"), **values)


def test_a_command_runs_in_a_folder_that_was_removed(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run("generate", "--model", "/m").model == Path("/m")
    monkeypatch.chdir(tmp_path)


def test_commands_have_defaults_of_sampling_of_their_own(run: Any) -> None:
    run("generate")
    assert Seen.params == SamplingParams(max_tokens=256, output_kind=DELTA)
    run("chat")
    assert Seen.params == SamplingParams(max_tokens=1024, temperature=0.7, top_p=0.95, output_kind=DELTA)
    given = ("--max-tokens", "9", "--temperature", "0.1", "--top-p", "0.2", "--top-k", "3", "--seed", "4")
    for command in ("generate", "chat"):
        run(command, *given, "--stop", "a", "--stop", "b")
        assert Seen.params == SamplingParams(
            max_tokens=9, temperature=0.1, top_p=0.2, top_k=3, seed=4, stop=["a", "b"], output_kind=DELTA
        )


def test_a_command_gets_one_object_of_the_fields_it_names() -> None:
    got: list[Any] = []
    app = typer.Typer()

    @app.command()
    @spread
    def bake(
        *,
        cake: str,
        options: Annotated[EngineOptions, engine("page_size", "cache_dir", page_size=64)],
        params: Annotated[SamplingParams, sampling(max_tokens=7)],
        layers: int = 1,
    ) -> None:
        """Bake a cake."""
        got.extend([cake, options, params, layers])

    assert CliRunner().invoke(app, ["tart", "--cache-dir", "kv"]).exit_code == 0
    assert got == ["tart", {"page_size": 64, "cache_dir": Path("kv").absolute()}, SamplingParams(max_tokens=7), 1]
    with pytest.raises(ConfigError, match="page_size 3 is not a power of two"):
        CliRunner().invoke(app, ["tart", "--page-size", "3"], catch_exceptions=False)
    assert len(got) == 4, "before the command is called"
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    assert "Bake a cake." in text
    assert option_help(EngineConfig)["page_size"] in text and "[default: 64]" in text
    assert "--options" not in text and "--params" not in text and "--layers" in text
