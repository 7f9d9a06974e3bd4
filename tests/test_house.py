"""What holds of the code as a whole: who may import whom, what an import costs, what a wheel contains."""

import ast
import itertools
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from support.processes import run_python

from distkv.kernels.native.instruction_sets import INSTRUCTION_SETS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("distkv", "workers", "storage", "kernels")
"""An arrow may only point to the right."""
ROOMS = (
    "commands", "jobs", "learn", "bench", "demo", "doctor", "stress", "batch", "ray_serve", "server", "client",
    "async_llm", "llm", "frontend", "launch", "planner", "metrics", "engine", "models", "cache_folders", "reporting",
    "outputs", "config", "sampling_params", "speculative_config", "structured_outputs",
    "option_help", "option_effects", "option_checks",
    "signals", "values", "errors",
)  # fmt: skip
"""Folders and modules of `distkv`, in the same order."""
WITHOUT_TENSOR = ("distkv.engine", "distkv.planner", "distkv.storage.ledger")


def modules() -> dict[str, Path]:
    """All modules by the names they are imported by."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if package == "distkv" and len(parts) > 1 and parts[1] in PACKAGES:
                continue  # the same once more, through a link
            parts = ["distkv", *parts] if package != "distkv" else parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """What a module imports, anywhere in it: modules where there are such, else what the statement names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def arrows() -> list[tuple[str, str]]:
    """Which of our modules imports which."""
    return [(name, other) for name, others in IMPORTS.items() for other in others if other in MODULES and other != name]


def test_arrows_between_packages_point_downwards() -> None:
    for package in PACKAGES:
        assert any(name.startswith(f"distkv.{package}.") or package == "distkv" for name in MODULES)
    for name, other in arrows():
        assert _package(name) <= _package(other), f"{name} imports {other}"


def test_arrows_between_rooms_point_downwards() -> None:
    rooms = {name.split(".")[1] for name in MODULES if _package(name) == 0 and "." in name}
    assert rooms == {*ROOMS, "__main__"}
    for name, other in arrows():
        if "." in name and "." in other and _package(name) == _package(other) == 0 and name != "distkv.__main__":
            assert ROOMS.index(name.split(".")[1]) <= ROOMS.index(other.split(".")[1]), f"{name} imports {other}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """`distkv/__init__.py` gives its names on demand, so whoever imports it takes the version alone."""
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for name, other in arrows():
        if name != "distkv":
            graph[name].add(other)
    assert list(TopologicalSorter(graph).static_order())


def test_every_import_says_distkv() -> None:
    for name, others in IMPORTS.items():
        assert not {other.split(".")[0] for other in others} & {"workers", "storage", "kernels"}, name


def test_kernels_and_storage_know_neither_ray_nor_text() -> None:
    for name, others in IMPORTS.items():
        if _package(name) >= PACKAGES.index("storage"):
            assert not {"ray", "zmq", "transformers"} & {other.split(".")[0] for other in others}, name


def test_no_code_of_a_models_folder_is_run() -> None:
    """transformers asks on stdin whether it may, unless it is told that it may not."""
    found = 0
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".from_pretrained", ".from_config")):
                found += 1
                assert any(ast.unparse(one) == "trust_remote_code=False" for one in node.keywords), path
    assert found


def test_nothing_is_unpickled() -> None:
    """Neither from a network nor from a folder; what Ray itself does with the arguments of actors is Ray's."""
    for name, others in IMPORTS.items():
        roots = {other.split(".")[0] for other in others}
        assert not roots & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}, name
    unsafe = ("torch.load", "np.load", "numpy.load", "yaml.load", "eval", "exec")
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in unsafe, f"{path}:{node.lineno}"


@pytest.mark.parametrize("room", WITHOUT_TENSOR)
def test_policy_holds_no_tensor(room: str) -> None:
    """Nor does anything that it imports."""
    names = sorted(name for name in MODULES if name == room or name.startswith(f"{room}."))
    assert len(names) > 1
    loaded = run_python(f"import {', '.join(names)}, sys; print(*sys.modules)").split()
    assert "torch" not in loaded


def test_no_test_imports_another() -> None:
    """What several of them need is in `tests/support`."""
    tests = list((ROOT / "tests").rglob("test_*.py"))
    assert tests
    for path in tests:
        assert not [name for name in imports(path) if name.startswith("test_")], path


def _package(name: str) -> int:
    """Index in `PACKAGES` of the one that a module belongs to."""
    part = name.split(".")[1] if "." in name else ""
    return PACKAGES.index(part) if part in PACKAGES else 0


def test_folders_are_symlinked_namespace_packages() -> None:
    for package in PACKAGES[1:]:
        link = ROOT / "distkv" / package
        assert link.is_symlink() and os.readlink(link) == f"../{package}"
        assert not (ROOT / package / "__init__.py").exists()


def test_one_rank_on_a_cpu_needs_neither_ray_nor_zarr_nor_triton(tmp_path: Path) -> None:
    from support.checkpoints import save_llama

    folder, _ = save_llama(tmp_path)
    run_python(
        "import sys; sys.modules |= {'ray': None, 'zarr': None, 'zmq': None, 'triton': None}\n"
        "from distkv import LLM, SamplingParams\n"
        f"with LLM({str(folder)!r}, device_kv_bytes='4MiB') as llm:\n"
        "    out = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)\n"
        "assert len(out[0].outputs[0].token_ids) == 4\n"
        "assert not [name for name in sys.modules if name.startswith('distkv.kernels.cuda')]"
    )


def test_importing_distkv_imports_nothing_heavy() -> None:
    heavy = {"torch", "ray", "zarr", "transformers", "numpy", "typer", "rich"}
    loaded = run_python("import distkv, sys; print(*sys.modules)").split()
    assert not heavy & set(loaded)
    loaded = run_python("import distkv.commands.main, sys; print(*sys.modules)").split()
    assert not {"torch", "ray", "zarr", "transformers"} & set(loaded)


def test_every_public_name_can_be_had() -> None:
    run_python("import distkv\nfor name in distkv.__all__: getattr(distkv, name)")
    with pytest.raises(AttributeError, match="no_such_name"):
        import distkv

        distkv.no_such_name  # noqa: B018


def test_a_wheel_contains_everything(tmp_path: Path) -> None:
    tree = tmp_path / "tree"  # a build leaves folders behind
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".git", "build", "*.egg-info", ".*_cache"))
    build = tree / "kernels" / "native" / "build.py"  # every kernel is compiled, and in a fifth of the time
    build.write_text(build.read_text().replace('"-O3"', '"-O0"'))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(tree)]
    subprocess.run(command, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if name.endswith((".py", ".hpp", ".cpp")) or "/page/" in name}
    expected = {f"distkv/server/page/{path.name}" for path in (ROOT / "distkv/server/page").iterdir()}
    expected |= {f"distkv/{path.relative_to(ROOT / 'distkv')}" for path in (ROOT / "distkv").rglob("*.py")}
    for package, ending in itertools.product(PACKAGES[1:], ("py", "hpp", "cpp")):
        expected |= {f"distkv/{path.relative_to(ROOT)}" for path in (ROOT / package).rglob(f"*.{ending}")}
    assert packed == expected
    assert {"distkv/metrics/grafana.json", "distkv/learn/report.html.jinja"} <= set(names)
    libraries = {name.split("/")[-1] for name in names if name.endswith(".so")}
    name_library = runpy.run_path(str(build))["library_name"]  # names tell flags apart
    assert libraries == {name_library(one.name, one.flags) for one in INSTRUCTION_SETS}
