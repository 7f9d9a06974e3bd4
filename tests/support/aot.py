"""Compiles kernels for chips that are not here: what a launch would compile, its resources and its instructions.

A launch is recorded, not run: `JITFunction.run` is asked for its warm-up, which takes the arguments' types, integer
specialisation, alignment and launch options just as a real launch does, and compiles for the chip that a stand-in
driver names. Arguments are `meta` tensors, whose address counts as aligned.
"""

import multiprocessing
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

CAPABILITIES = (80, 90, 100)
"""A100, H100, B200."""


@dataclass(frozen=True)
class Case:
    """`launch(*arguments)`, a function of a test module that calls one wrapper with meta tensors."""

    launch: Callable[..., object]
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return "-".join(str(argument).removeprefix("torch.") for argument in self.arguments)


@dataclass(frozen=True)
class Report:
    """What one kernel takes of the chip, read from its binary.

    Attributes:
        registers: of a thread, in words of 4 bytes
        local_bytes: of a thread, in local memory: what registers spill, and nothing else in these kernels
        shared_bytes: of a program, what the launch asks for; the system's own 1 KiB from sm_90 on is not counted
        instructions: how often each opcode with its modifiers (`LDG.E.128`) occurs
        arithmetic: the kinds of products and reductions, each with the layouts of its operands over threads: where they
            are the same, elements come together in the same order
    """

    kernel: str
    registers: int
    local_bytes: int
    shared_bytes: int
    instructions: Counter[str]
    arithmetic: frozenset[str]

    def count(self, *parts: str) -> int:
        """Instructions whose opcode, cut at the dots, holds all of `parts`: `count("LDG", "128")`."""
        return sum(times for opcode, times in self.instructions.items() if set(parts) <= set(opcode.split(".")))


class Compiler:
    """Compiles cases in two processes; what is known to be wanted is compiled ahead. A context manager."""

    def __init__(self, cache_folder: Path, wanted: Iterable[tuple[Case, int]]):
        # forked: the workers have torch, triton and the kernels imported, and find the functions of a test module
        self._pool = ProcessPoolExecutor(2, multiprocessing.get_context("fork"), _set_cache, (cache_folder,))
        self._compiled: dict[tuple[Case, int], Future[list[Report]]] = {}
        for case, capability in wanted:
            self._start(case, capability)

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def reports(self, case: Case, capability: int) -> list[Report]:
        """One report for each kernel that the case launches, in the order of the launches."""
        return self._start(case, capability).result()

    def _start(self, case: Case, capability: int) -> "Future[list[Report]]":
        key = case, capability
        if key not in self._compiled:
            self._compiled[key] = self._pool.submit(compile_launches, case, capability)
        return self._compiled[key]


def compile_launches(case: Case, capability: int) -> list[Report]:
    """Compiles every kernel that the case launches for a chip of this compute capability (90 for 9.0)."""
    compiled = []
    run = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert "enable_fp_fusion" in kwargs, "a launch must say enable_fp_fusion: its default changes with Triton 3.10"
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    stand_in = SimpleNamespace(
        get_current_device=lambda: capability,  # kernels are cached by device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
    driver.set_active(stand_in)
    with patch.object(JITFunction, "run", record):
        case.launch(*case.arguments)
    assert compiled, f"{case} launched no kernel"
    return [_report(kernel) for kernel in compiled]


def cases(launch: Callable[..., object], shapes: dict[str, tuple[Any, ...]], always: Iterable[str]) -> list[Any]:
    """A parameter for each of the named shapes; `always` names those of the default run, the others are slow."""
    assert set(always) <= set(shapes)
    return [
        pytest.param(Case(launch, shape), id=name, marks=() if name in always else pytest.mark.slow)
        for name, shape in shapes.items()
    ]


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _set_cache(folder: Path) -> None:
    triton.knobs.cache.dir = str(folder)


def _report(kernel: Any) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(kernel.asm["cubin"])
        binary.flush()
        tools = triton.knobs.nvidia
        usage = _output(tools.cuobjdump.path, "--dump-resource-usage", binary.name)
        # nvdisasm itself, without its analysis of data flow, takes half the time of cuobjdump -sass
        sass = _output(tools.nvdisasm.path, "--print-code", "--no-dataflow", binary.name)
    fields = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    # "        /*0070*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;"
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    return Report(
        kernel=kernel.metadata.name,
        registers=fields["REG"],
        local_bytes=fields["STACK"] + fields["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        instructions=Counter(opcodes),
        arithmetic=_arithmetic(kernel.asm["ttgir"]),
    )


def _arithmetic(code: str) -> frozenset[str]:
    """Of `%x = ttng.warp_group_dot %a, %b : type * type -> type loc(..)` and `"tt.reduce"(%x) ({ .. }) : (type) -> type
    loc(..)`, the kind and the types, with the layouts that these name."""
    layouts = dict(re.findall(r"^(#\w+) = (#tt.*)$", code, re.MULTILINE))
    found = re.findall(r"(tt\.dot|warp_group_dot|tc_gen5_mma) .*?: (.*) loc", code)
    found += re.findall(r'(tt\.reduce)"\(.*?\}\) : (.*?) loc', code, re.DOTALL)
    named = (re.sub(r"#\w+\b(?!\.)", lambda m: layouts.get(m[0], m[0]), types) for _, types in found)
    return frozenset(f"{kind}: {types.replace(', mutable', '')}" for (kind, _), types in zip(found, named, strict=True))


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
