"""`--quick` of every benchmark that needs no GPU, on a small random model: it ends well and says where its figures come
from. What the figures mean is tested beside each benchmark."""

import json
from pathlib import Path

import pytest
from support.checkpoints import save_llama
from typer.testing import CliRunner

from distkv.commands.bench import bench
from distkv.commands.main import app
from distkv.reporting.machine import machine_facts

COMMANDS = {
    "cache": "--model MODEL",
    "cpu-attention": "--model MODEL",
    "decode": "--model MODEL",
    "disk-codec": "--model MODEL",
    "gqa": "",
    "offload": "--model MODEL",
    "paging": "--model MODEL",
    "prefix": "--model MODEL",
    "scheduler": "",
    "serve-offline": "--model MODEL",
}
# they have tests with smaller sizes too
SLOW = {"cpu-attention", "disk-codec", "gqa", "offload", "paging", "prefix", "scheduler"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)[0]


@pytest.mark.parametrize(
    "command", [pytest.param(one, marks=[pytest.mark.slow] if one in SLOW else []) for one in COMMANDS]
)
def test_quick(command: str, model: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    given = COMMANDS[command].replace("MODEL", str(model)).split()
    result = CliRunner().invoke(app, ["bench", command, "--quick", *given, "--json", str(figures)])
    assert result.exit_code == 0, result.exception or result.output
    written = json.loads(figures.read_text())
    assert written.keys() >= machine_facts().keys() and (written["benchmark"], written["quick"]) == (command, True)
    assert written["rows"] and not written.get("wrong")


def test_every_benchmark_has_the_same_options() -> None:
    for command in bench.registered_commands:
        text = CliRunner().invoke(app, ["bench", str(command.name), "--help"]).output
        assert all(option in text for option in ("--repeats", "--quick", "--json")), command.name
