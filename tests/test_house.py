"""What holds of the code as a whole: who may import whom, what an import costs, what a wheel contains."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("distkv", "workers", "storage", "kernels")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", ORDER[1:])
def test_arrows_point_downwards(package: str) -> None:
    """distkv -> workers -> storage -> kernels; distkv.errors is everybody's."""
    allowed = {f"distkv.{name}" for name in ORDER[ORDER.index(package) :]} | {"distkv.errors"}
    modules = list((ROOT / package).rglob("*.py"))
    assert modules
    for path in modules:
        for name in imports(path):
            if name == "distkv" or name.startswith("distkv."):
                top = ".".join(name.split(".")[:2])
                assert top in allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_kernels_know_nothing_of_ray_and_policy_holds_no_tensor() -> None:
    for path in [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "storage").rglob("*.py")]:
        assert not {"ray", "zmq", "transformers"} & {name.split(".")[0] for name in imports(path)}, path
    policy = ["slot_allocator", "tiered_cache", "page", "page_table", "prefix_index", "idle_pages", "tier", "page_size"]
    engine = ["scheduler", "sequence", "cold_budget"]
    for path in [f"storage/{name}.py" for name in policy] + [f"distkv/{name}.py" for name in engine]:
        assert "torch" not in {name.split(".")[0] for name in imports(ROOT / path)}, path


def test_folders_are_symlinked_namespace_packages() -> None:
    for package in ORDER[1:]:
        link = ROOT / "distkv" / package
        assert link.is_symlink() and os.readlink(link) == f"../{package}"
        assert not (ROOT / package / "__init__.py").exists()


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_one_rank_on_a_cpu_needs_neither_ray_nor_zarr_nor_triton(tmp_path: Path) -> None:
    from support.helpers import save_llama

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
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(tree)]
    subprocess.run(command, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    expected = {f"distkv/{path.relative_to(ROOT / 'distkv')}" for path in (ROOT / "distkv").rglob("*.py")}
    for package in ORDER[1:]:
        expected |= {f"distkv/{path.relative_to(ROOT)}" for path in (ROOT / package).rglob("*.py")}
    assert packed == expected
