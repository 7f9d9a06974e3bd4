"""`distkv plan` as users type it."""

import json
from pathlib import Path

import pytest
from support.checkpoints import save_llama
from support.processes import run_python
from typer.testing import CliRunner

from distkv import ConfigError
from distkv.commands.main import app


def run(*arguments: str, columns: int = 80) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False, env={"COLUMNS": str(columns)})
    assert result.exit_code == 0
    return result.output


def test_tables_json_and_picture_say_the_same(tmp_path: Path) -> None:
    target, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    lists = ("--context", "4k,128k", "--gpus", "1,8", "--concurrency", "8", "--host-memory", "64GiB")
    output = run("llama-3.1-8b", *lists, "--json", str(target), "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    plans = json.loads(target.read_text())["plans"]
    asked = [(plan["request"]["context"], plan["request"]["tensor_parallel_size"]) for plan in plans]
    assert asked == [(4096, 1), (4096, 8), (131072, 1), (131072, 8)]
    assert [plan["fits"] for plan in plans] == [True, True, False, True]
    rows = [[cell.strip() for cell in line.strip("│ \n").split("│")] for line in output.splitlines() if "│" in line]
    steps = [row for row in rows if len(row) == 7][-4:]
    for plan, (context, size, running, seconds, _, _, limit) in zip(plans, steps, strict=True):
        assert (context, int(size)) == (
            f"{plan['request']['context'] // 1024}k",
            plan["request"]["tensor_parallel_size"],
        )
        assert running == (str(plan["running"]) if plan["fits"] else f"{plan['running']} of 8")
        assert float(seconds.removesuffix(" ms")) == pytest.approx(1e3 * plan["decode"]["seconds"], rel=0.01)
        assert limit == plan["decode"]["limit"]
    assert plans[2]["advice"][0] in output and "would hold the rest" in output


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    "arguments",
    [
        ("llama-3.1-405b", "--context", "4k,1M", "--gpus", "8,16", "--host-memory", "2TiB", "--disk", "100TiB"),
        ("llama-3.1-70b", "--solve", "--ms-per-token", "40", "--context", "32k", "--price-per-hour", "h100=2.99"),
        ("llama-3.1-8b", "--kinds", "--guess", "layers=120,heads=96,head_dim=128"),
    ],
)
def test_tables_are_whole_at_any_width(arguments: tuple[str, ...], columns: int) -> None:
    """No cell is cut, and no line of a table is broken."""
    output = run(*arguments, columns=columns)
    assert "…" not in output
    assert all(len(line) <= columns for line in output.splitlines() if line[:1] in "┏┃┡│└")
    assert sum(line.startswith("┃") for line in output.splitlines()) == output.count("┏"), "a heading takes two lines"


def test_a_folder_is_served_by_the_command_that_is_shown(tmp_path: Path) -> None:
    folder, _ = save_llama(tmp_path)
    output = run(str(folder), "--context", "64", "--gpu", "memory=1GiB,bandwidth=50GB,matrix=1T,link=10GB")
    assert f"To serve it: distkv serve {folder}\n" in output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--context", "4x"], "--context is '4x'"), (["--context", "0"], "--context is '0'"),
        (["--concurrency", "1,,2"], "--concurrency is"), (["--gpus", "-1"], "--gpus is '-1'"),
        (["--gpu", "h101"], r"did you mean h100\?"), (["--gpu", "memory=3GiB"], "lacks bandwidth"),
        (["--gpu", "memory=1,memory=2"], "each given once"), (["--plot", "x.pdf"], r"is not a \.png"),
        (["--ms-per-token", "3"], "without --solve"), (["--guess", "layers=3"], "without --kinds"),
        (["--price-per-hour", "1"], "without --solve"), (["--solve", "--kinds"], "one at a time"),
        (["--solve", "--plot", "x.png"], "--plot draws plans"),
        (["--solve", "--context", "4k,8k"], "takes one --context"),
        (["--kinds", "--gpus", "1,2"], "takes one --gpus"), (["--kinds", "--gpu", "l4", "--gpu", "a10"], "one --gpu,"),
        (["--solve", "--price-per-hour", "h100=nan"], "is nan"), (["--solve", "--ms-per-token", "-1"], "above 0"),
        (["--solve", "--price-per-hour", "3"], "names no GPU"), (["--json", "/nowhere/x.json"], "cannot be written"),
        (["--solve", "--gpu", "l4", "--price-per-hour", "h100=1"], "--gpu does not name"),
        (["--gpus", ",".join(map(str, range(1, 33))), "--concurrency", "1,2,3,4,5,6,7"], "make 224 plans"),
    ],
)  # fmt: skip
def test_nonsense_is_one_error(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["plan", "llama-3.1-8b", *arguments], catch_exceptions=False)


def test_no_plan_imports_torch(tmp_path: Path) -> None:
    target = str(tmp_path / "plan.json")
    commands = [["llama-3.1-8b", "--json", target], ["llama-3.1-8b", "--solve"], ["smollm2-135m", "--kinds"]]
    run_python(
        "import sys\nfrom distkv.commands.main import app\n"
        f"for arguments in {commands}:\n    app(['plan', *arguments], standalone_mode=False)\n"
        "loaded = {'torch', 'ray', 'numpy', 'transformers'} & set(sys.modules)\nassert not loaded, loaded"
    )
