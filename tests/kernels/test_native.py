"""The native kernels, for each instruction set that this machine has: against their float64 definitions, and that a row
is a function of nothing but the row. Attention is tested in `workers/test_batch.py` as well."""

import ctypes
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.measures import TOLERANCE, relative_error
from support.prompts import seeded
from torch import Tensor

from distkv.kernels import reference
from distkv.kernels.cpu_kernels import CPU_KERNELS
from distkv.kernels.native import build, library
from distkv.kernels.native.build import BuildError, find_or_build
from distkv.kernels.native.instruction_sets import INSTRUCTION_SETS, InstructionSet
from distkv.kernels.native.library import Library, load
from distkv.kernels.native.page_states import MOST_ROWS, merge_page_states, page_states, state_width
from distkv.kernels.native.paged_attention import Chunks, attend_pages, kept_states
from distkv.kernels.native.token_kernels import native_token_kernels
from distkv.kernels.rope import rope_and_write_kv
from distkv.workers.backends.cpu import make_backend
from distkv.workers.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = [load(one) for one in INSTRUCTION_SETS if one.is_here]
libraries = st.sampled_from(LIBRARIES)
dtypes = st.sampled_from(list(TOLERANCE))
seeds = st.integers(0, 2**32 - 1)
ONE_ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def test_this_machine_has_one() -> None:
    assert LIBRARIES


@given(
    kernels_of=libraries,
    dtype=dtypes,
    seed=seeds,
    rows=st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 257, 300])),
    depth=st.one_of(st.integers(1, 130), st.sampled_from([576, 1536])),
    width=st.integers(1, 100),
    biased=st.booleans(),
    gated=st.booleans(),
)
def test_linear(
    kernels_of: Library, dtype: torch.dtype, seed: int, rows: int, depth: int, width: int, biased: bool, gated: bool
) -> None:
    """Of rows that lie apart, too. Any of them alone, and any neighbours, give the bits of all together."""
    generator, outputs = seeded(seed), 2 * width if gated else width
    weight = (torch.randn(outputs, depth, generator=generator) / depth**0.5).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype) if biased else None
    x = torch.randn(rows, depth + 3, generator=generator).to(dtype)[:, :depth]
    kernels = native_token_kernels(kernels_of)
    linear = (kernels.make_gated_linear if gated else kernels.make_linear)(weight, bias)
    result = linear(x)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    if gated:
        expected = reference.swiglu(expected)
    assert result.shape == (rows, width) and result.dtype == dtype
    assert relative_error(result, expected) < ONE_ROUNDING[dtype]
    for first, count in ((0, 1), (rows - 1, 1), (rows // 2, 5), (rows // 3, 17), (1, 33), (rows // 4, rows // 2)):
        some = slice(first, min(first + count, rows))
        assert torch.equal(linear(x[some]), result[some])


@given(
    kernels_of=libraries,
    dtype=dtypes,
    seed=seeds,
    rows=st.integers(1, 70),
    hidden=st.integers(1, 700),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    adds=st.booleans(),
)
def test_rms_norm(
    kernels_of: Library, dtype: torch.dtype, seed: int, rows: int, hidden: int, scale: float, adds: bool
) -> None:
    """Of x, or with a delta of the rounded sum, which x becomes."""
    generator = seeded(seed)
    x, delta = (torch.randn(2, rows, hidden, generator=generator) * scale).to(dtype)
    weight = torch.randn(hidden, generator=generator).to(dtype)
    added = x + delta if adds else x.clone()
    norm = native_token_kernels(kernels_of).rms_norm
    result = norm(x, weight, 1e-5, delta if adds else None)
    assert torch.equal(x, added)
    assert relative_error(result, reference.rms_norm(added, weight, 1e-5)) < 2 * ONE_ROUNDING[dtype]
    assert torch.equal(norm(added[-1:].clone(), weight, 1e-5), result[-1:])


@given(
    kernels_of=libraries,
    dtype=dtypes,
    seed=seeds,
    tokens=st.integers(1, 40),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([2, 6, 16, 64, 80]),
)
def test_rope_and_write_kv(
    kernels_of: Library, dtype: torch.dtype, seed: int, tokens: int, kv_heads: int, group: int, head_dim: int
) -> None:
    """As torch's operators do it, and in the pool exactly the addressed places change."""
    generator, page_size, num_pages = seeded(seed), 16, 5
    qkv = torch.randn(tokens, kv_heads * (group + 2), head_dim, generator=generator).to(dtype)
    angle = torch.randn(tokens, 1, head_dim // 2, generator=generator) * 10
    places = torch.randperm(num_pages * page_size, generator=generator)[:tokens]
    pools = (
        torch.randn(2, num_pages, kv_heads, page_size, head_dim, generator=generator).to(dtype).repeat(2, 1, 1, 1, 1, 1)
    )
    where = angle.cos(), angle.sin(), pools[0], places // page_size, places % page_size
    expected = rope_and_write_kv(qkv.clone(), *where)
    kernels = native_token_kernels(kernels_of)
    found = kernels.rope_and_write_kv(qkv, *where[:2], pools[1], *where[3:])
    for got, wanted in zip([*found, pools[1]], [*expected, pools[0]], strict=True):
        assert relative_error(got, wanted.double()) < 2 * ONE_ROUNDING[dtype]
    written = torch.zeros(num_pages, page_size, dtype=torch.bool)
    written[places // page_size, places % page_size] = True
    assert torch.equal(pools[1].transpose(2, 3)[:, ~written], pools[0].transpose(2, 3)[:, ~written])
    assert torch.equal(pools[1].transpose(2, 3)[0, places // page_size, places % page_size], found[1])


@given(
    kernels_of=libraries,
    dtype=dtypes,
    seed=seeds,
    start=st.integers(0, 200),
    tokens=st.integers(1, 70),
    page_size=st.sampled_from([16, 64, 256]),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 3, 4]),
    head_dim=st.sampled_from([2, 16, 20, 64, 80, 128]),
    few=st.booleans(),
    cut=st.integers(0, 3),
)
def test_attention(
    kernels_of: Library, dtype: torch.dtype, seed: int, start: int, tokens: int, page_size: int, kv_heads: int,
    group: int, head_dim: int, few: bool, cut: int,
) -> None:  # fmt: skip
    """Page by page or many rows at a time, in one call or cut in two: right, and bitwise the same."""
    generator, count = seeded(seed), -(-(start + tokens) // page_size)
    pool = torch.randn(2, count + 3, kv_heads, page_size, head_dim, generator=generator).to(dtype)
    table = torch.randperm(count + 3, generator=generator)[:count]
    q = torch.randn(tokens, kv_heads * group, head_dim, generator=generator).to(dtype)

    def attend(few: bool, *ends: int) -> Tensor:
        out, first = q.new_empty(tokens, q.shape[1] * head_dim), 0
        kept = kept_states(tokens, q.shape[1], head_dim) if len(ends) > 1 else None
        for end in ends:
            chunk = torch.tensor([[0, tokens, start, 0, first, end, int(end == count), -1]])
            attend_pages(kernels_of, q, pool, None, table, Chunks(chunk, int(few)), kept, out)
            first = end
        return out

    found = attend(few, count)
    keys, values = reference.read_pages(pool, table.tolist(), start + tokens)
    expected, _ = reference.attention(q.unflatten(1, (kv_heads, -1)), keys, values)
    assert relative_error(found, expected.flatten(1)) < TOLERANCE[dtype]
    assert torch.equal(attend(not few, count), found)
    if 0 < cut < count:
        assert torch.equal(attend(few, cut, count), found)


@given(
    kernels_of=libraries,
    dtype=dtypes,
    seed=seeds,
    start=st.integers(0, 200),
    tokens=st.integers(1, 20),
    page_size=st.sampled_from([16, 64, 256]),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 3, 8]),
    head_dim=st.sampled_from([2, 16, 20, 64, 80, 128]),
    rows=st.integers(1, MOST_ROWS),
)
def test_states_of_pages(
    kernels_of: Library, dtype: torch.dtype, seed: int, start: int, tokens: int, page_size: int, kv_heads: int,
    group: int, head_dim: int, rows: int,
) -> None:  # fmt: skip
    """Pages by themselves, in any order, here and there, and merged: bitwise what one call over all of them gives."""
    generator, count = seeded(seed), -(-(start + tokens) // page_size)
    pool = torch.randn(2, count, kv_heads, page_size, head_dim, generator=generator).to(dtype)
    apart = pool.transpose(0, 1).unsqueeze(1).repeat(1, 3, 1, 1, 1, 1)[:, 1]  # pages with others between them
    q = torch.randn(tokens, kv_heads * group, head_dim, generator=generator).to(dtype)
    expected = q.new_empty(tokens, q.shape[1] * head_dim)
    chunk = torch.tensor([[0, tokens, start, 0, 0, count, 1, -1]])
    attend_pages(kernels_of, q, pool, None, torch.arange(count), Chunks(chunk, 1), None, expected)

    states = torch.full((count * tokens, q.shape[1], state_width(head_dim)), torch.nan)
    places = torch.randperm(count, generator=generator)[:, None] * tokens + torch.arange(tokens)  # [page, token]
    items = [
        [
            first,
            min(rows, tokens - first),
            start + first,
            page,
            -1 - page if page % 2 else page,
            -1,
            places[page, first],
        ]
        for page in range(count)
        for first in range(0, tokens, rows)
    ]
    page_states(kernels_of, q, pool, apart, torch.tensor(items)[torch.randperm(len(items))], states)
    out = torch.empty_like(expected)
    merge_page_states(kernels_of, states, places.T.flatten(), torch.arange(tokens + 1) * count, out)
    assert torch.equal(out, expected)


def test_the_system_is_asked_before_tiles_are_used() -> None:
    """In a process that has loaded nothing but the library."""
    code = """
import sys, torch
from distkv.kernels.native.library import load_best
from distkv.kernels.native.token_kernels import native_token_kernels
x = torch.ones(40, 64, dtype=torch.bfloat16)
print(native_token_kernels(load_best()).make_linear(x)(x).sum().item())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) == 40 * 40 * 64


# --- building ---


def test_a_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BUILT", tmp_path / "none")
    monkeypatch.setattr(build, "FLAGS", ["-O0" if flag == "-O3" else flag for flag in build.FLAGS])  # in half the time
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = INSTRUCTION_SETS[-1]
    path = find_or_build(one.name, one.flags)
    assert path.parent == tmp_path / "distkv/kernels"
    before = path.stat()
    assert find_or_build(one.name, one.flags) == path and path.stat() == before
    os.truncate(path, before.st_size // 2)  # would end the process that loads it
    path.with_suffix(".building").mkdir()  # a killed build left it
    assert find_or_build(one.name, one.flags) == path and path.stat().st_size == before.st_size
    assert {file.suffix for file in path.parent.iterdir()} == {".so", ".lock", ".sha256"}
    assert ctypes.CDLL(str(path)).start() == 0  # not before, since a library in use must stay as it is
    monkeypatch.setattr(build, "PATIENCE", 0)
    path.unlink()
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BuildError, match="another process has been building"):
            find_or_build(one.name, one.flags)


def test_the_next_best_is_taken_where_one_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    best = InstructionSet("better", INSTRUCTION_SETS[-1].features)  # than any; all machines that we test on have these

    def find(name: str, flags: list[str]) -> Path:
        if name == best.name:
            raise BuildError("the compiler is too old")
        return find_or_build(name, flags)

    monkeypatch.setattr(library, "load", library.load.__wrapped__)  # which remembers what it has loaded
    monkeypatch.setattr(library, "find_or_build", find)
    monkeypatch.setattr(library, "INSTRUCTION_SETS", (best, *INSTRUCTION_SETS))
    assert library.load_best().instruction_set == next(one.name for one in INSTRUCTION_SETS if one.is_here)
    assert f"for {best.name} cannot be used: the compiler is too old" in caplog.text
    monkeypatch.setattr(library, "INSTRUCTION_SETS", ())
    with pytest.raises(BuildError, match="none of the instruction sets"):
        library.load_best()


def test_a_damaged_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "damaged.so"
    path.write_bytes(b"no library")
    monkeypatch.setattr(library, "find_or_build", lambda name, flags: path)
    with pytest.raises(BuildError, match=r"damaged\.so: .*; set XDG_CACHE_HOME"):
        library.load.__wrapped__(INSTRUCTION_SETS[-1])


def test_torch_runs_where_there_is_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def find(name: str, flags: list[str]) -> Path:
        raise BuildError("there is no g++ on the path")

    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    monkeypatch.setattr(library, "find_or_build", find)
    assert make_backend(None).kernels is CPU_KERNELS
    with pytest.raises(ConfigError, match=r"batch_invariant is True and .* there is no g\+\+ on the path"):
        make_backend(True)
    assert "there is no g++ on the path. torch's operators run instead" in caplog.text


def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")


def no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "distkv").touch()


def no_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-std=c++98"])


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (no_compiler, r"there is no g\+\+ on the path"),
        (no_folder, "distkv/kernels cannot be used: "),
        (no_source, r"g\+\+ failed: .*error"),
    ],
)
def test_what_cannot_be_built(
    trouble: Callable[[pytest.MonkeyPatch, Path], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "BUILT", tmp_path / "none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trouble(monkeypatch, tmp_path)
    with pytest.raises(BuildError, match=message):
        find_or_build("avx2", INSTRUCTION_SETS[-1].flags)
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
def test_kernels_with_sanitizers(tmp_path: Path) -> None:
    """No byte outside of what a kernel was given, and no undefined behaviour, in the tests above."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}",
    }  # fmt: skip
    command = ["pytest", "-p", "support.sanitized", __file__, "-k", "linear or norm or rope or attention"]
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert len(list(tmp_path.rglob("*.so"))) == len(LIBRARIES)
