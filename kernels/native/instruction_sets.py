"""Which instruction sets the native kernels are built for, and which of them this machine has."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")


@dataclass(frozen=True)
class InstructionSet:
    """A library of the kernels is built for each."""

    name: str
    features: tuple[str, ...]  # as the compiler calls them

    @property
    def flags(self) -> list[str]:
        """What the compiler is told."""
        return [f"-m{feature}" for feature in self.features]

    @property
    def is_here(self) -> bool:
        """Whether this machine has all of it."""
        return {_LINUX_NAMES.get(feature, feature) for feature in self.features} <= _flags_of_machine()


INSTRUCTION_SETS = (
    InstructionSet("amx", (*_AVX512, "avx512bf16", "amx-tile", "amx-bf16")),
    InstructionSet("avx512_bf16", (*_AVX512, "avx512bf16")),
    InstructionSet("avx512", _AVX512),
    InstructionSet("avx2", _AVX2),
)
"""The best one first."""

_LINUX_NAMES = {"avx512bf16": "avx512_bf16", "amx-tile": "amx_tile", "amx-bf16": "amx_bf16"}


@cache
def _flags_of_machine() -> frozenset[str]:
    """Those of /proc/cpuinfo; none where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())
