"""`distkv plan` as users type it."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.checkpoints import save_llama
from support.cpu_plans import CPU
from support.processes import run_python
from typer.testing import CliRunner

from distkv import ConfigError
from distkv.commands.main import app
from distkv.planner import command
from distkv.planner.options import PlanOptions


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


def test_files_are_written_though_the_reader_of_the_tables_has_left(tmp_path: Path) -> None:
    class Left(Console):
        def print(self, *texts: Any, **how: Any) -> None:
            raise BrokenPipeError

    target, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    with pytest.raises(BrokenPipeError):
        command.run(Left(), options(json_file=target, plot_file=picture))
    assert json.loads(target.read_text())["plans"] and picture.read_bytes().startswith(b"\x89PNG")


def options(**more: Any) -> PlanOptions:
    given: dict[str, Any] = {
        "model": "smollm2-135m", "context": "4k", "concurrency": "1", "gpu": None, "measured": None, "gpus": None,
        "layouts": False, "node": None,
        "disk_bandwidth": None, "solve": False, "ms_per_token": None, "price_per_hour": None, "kinds": False,
        "guess": None, "json_file": None, "plot_file": None,
    }  # fmt: skip
    return PlanOptions(**{**given, **more})


@pytest.mark.parametrize(
    "given, message",
    [
        ({"gpus": "1,2"}, "leave --gpus out"), ({"request": {"gpu_memory_utilization": 0.5}}, "is this CPU; leave it"),
        ({"solve": True, "price_per_hour": ["h100=1"]}, "--measured has no price"),
    ],
)  # fmt: skip
def test_what_a_measured_cpu_has_no_use_for_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(measured=CPU, **given).check()


def test_a_value_that_is_given_twice_is_planned_for_once() -> None:
    assert options(context="4k,4096", gpus="2,02,1").contexts() == [4096]
    assert options(gpus="2,02,1").sizes("1") == [2, 1]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    "arguments",
    [
        ("llama-3.1-405b", "--context", "4k,1M", "--gpus", "8,16", "--host-memory", "2TiB", "--disk", "100TiB"),
        ("llama-3.1-70b", "--solve", "--ms-per-token", "40", "--context", "32k", "--price-per-hour", "h100=2.99"),
        ("llama-3.1-8b", "--kinds", "--guess", "layers=120,heads=96,head_dim=128"),
        ("llama-3.1-70b", "--layouts", "--nodes", "2", "--context", "1M", "--host-memory", "2TiB"),
        (
            "llama-3.1-70b",
            "--gpus",
            "16",
            "--decode-context-parallel-size",
            "2",
            "--nodes",
            "2",
            "--context",
            "128k",
            "--concurrency",
            "1,16,64",
            "--host-memory",
            "2TiB",
        ),
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
    assert f"To serve it: distkv serve {folder} --host-kv-bytes 0 --max-model-len 64\n" in output
    assert "at most 256 tokens of context" in output


@pytest.mark.parametrize("how", [(), ("--solve",)])
@pytest.mark.parametrize(
    "why, sentence",
    [
        (("--context", "8193"), "for 8192 positions and the engine refuses more"),
        (("--attention-policy", "top_pages"), "The engine refuses attention_policy on GPUs"),
        (("--device-kv-bytes", "1TiB"), "device_kv_bytes 1099511627776 holds"),
    ],
)
def test_no_command_is_shown_that_would_do_otherwise(why: tuple[str, str], sentence: str, how: tuple[str, ...]) -> None:
    arguments = "smollm2-135m", "--gpu", "l4", "--gpus", "1", *how
    assert "distkv serve" in run(*arguments)
    output = run(*arguments, *why)
    assert "distkv serve" not in output and sentence in output


def test_names_and_figures_are_shown_whole(tmp_path: Path) -> None:
    """What would be markup, and a terminal that is too narrow for the tables."""
    folder, _ = save_llama(tmp_path / "[red]tuned[")
    output = run(str(folder), "--context", "64", columns=40)
    assert f"{folder.name}: 0.08" in output and f"distkv serve '{folder}'" in output and "…" not in output
    by_hand = "memory=48GiB,bandwidth=900GB,matrix=200T,link=32GB"
    others = by_hand.replace("48GiB", "24GiB")
    output = run("llama-3-8b", "--solve", "--gpu", by_hand, "--gpu", others, "--price-per-hour", f"{others}=0.001",
                 "--price-per-hour", f"{by_hand}=2")  # fmt: skip
    assert "The cheapest is 1 x GPU of 24GiB at 900GB/s" in output and "0.00100" in output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--context", "4x"], "--context is '4x'"), (["--context", "0"], "--context is '0'"),
        (["--concurrency", "1,,2"], "--concurrency is"), (["--gpus", "-1"], "--gpus is '-1'"),
        (["--gpu", "h101"], r"did you mean h100\?"), (["--gpu", "memory=3GiB"], "lacks bandwidth"),
        (["--gpu", "memory=1,memory=2"], "each given once"), (["--plot", "x.pdf"], r"is not a \.png"),
        (["--ms-per-token", "3"], "without --solve"), (["--guess", "layers=3"], "without --kinds"),
        (["--price-per-hour", "1"], "without --solve"), (["--solve", "--kinds"], "one at a time"),
        (["--layouts", "--solve"], "one at a time"), (["--layouts", "--gpus", "8"], "tries all of --gpus; leave it"),
        (["--layouts", "--pipeline-parallel-size", "2"], "tries all of --pipeline-parallel-size"),
        (["--layouts", "--plot", "x.png"], "--plot draws plans, and not --layouts"),
        (["--layouts", "--concurrency", "1,2"], "takes one --conc"), (["--node", "gpu=8"], "in the node 'gpu=8'"),
        (["--solve", "--nodes", "2"], "--nodes is given; leave one of them out"),
        (["--pipeline-parallel-size", "33"], "more than the model's 32 layers"),
        (["--solve", "--plot", "x.png"], "--plot draws plans"),
        (["--solve", "--context", "4k,8k"], "takes one --context"),
        (["--kinds", "--gpus", "1,2"], "takes one --gpus"), (["--kinds", "--gpu", "l4", "--gpu", "a10"], "one --gpu,"),
        (["--solve", "--price-per-hour", "h100=nan"], "is nan"), (["--solve", "--ms-per-token", "nan"], "token is nan"),
        (["--solve", "--price-per-hour", "3"], "names no GPU"), (["--json", "/nowhere/x.json"], "cannot be written"),
        (["--solve", "--gpu", "l4", "--price-per-hour", "h100=1"], "--gpu does not name"),
        (["--disk-bandwidth", "1GB"], "without --disk-kv-bytes"), (["--kinds", "--guess", "heads=1,heads=2"], "twice"),
        (["--gpus", ",".join(map(str, range(1, 33))), "--concurrency", "1,2,3,4,5,6,7"], "make 224 plans"),
    ],
)  # fmt: skip
def test_nonsense_is_one_error(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["plan", "llama-3.1-8b", *arguments], catch_exceptions=False)


def test_a_guess_takes_nothing_of_a_setup() -> None:
    with pytest.raises(ConfigError, match="--gpu has no effect on a guess"):
        CliRunner().invoke(app, ["plan", "gpt-4", "--kinds", "--gpu", "h100"], catch_exceptions=False)


def test_no_plan_imports_torch(tmp_path: Path) -> None:
    target = str(tmp_path / "plan.json")
    commands = [["llama-3.1-8b", "--json", target], ["llama-3.1-8b", "--solve"], ["smollm2-135m", "--kinds"]]
    run_python(
        "import sys\nfrom distkv.commands.main import app\n"
        f"for arguments in {commands}:\n    app(['plan', *arguments], standalone_mode=False)\n"
        "loaded = {'torch', 'ray', 'numpy', 'transformers'} & set(sys.modules)\nassert not loaded, loaded"
    )
