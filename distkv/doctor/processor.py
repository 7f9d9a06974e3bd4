"""Processor, memory, and the limits of this process."""

import os
import platform
import resource
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from distkv.doctor.finding import Finding, fine, problem, warning
from distkv.kernels.native.build import BuildError
from distkv.kernels.native.library import load_best
from distkv.planner.units import shown_bytes
from distkv.reporting.machine import cpu_name
from distkv.storage.process_limits import available_bytes, usable_cores

LEAST_FILES = 4096  # a disk tier, Ray and the clients of a server each have hundreds open
LEAST_SHARED_BYTES = 2**30  # Ray's object store lies in /dev/shm
PACKAGES = {"torch": "", "zarr": "pages on disk", "pyzmq": "several ranks", "ray": "several ranks"}
"""What each is needed for; "" for everything."""


def check_packages() -> Iterator[Finding]:
    """Python and what is installed beside distkv."""
    found, missing = [f"Python {platform.python_version()}"], []
    for name, use in PACKAGES.items():
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(f"{name} (for {use})" if use else name)
    if missing:
        yield problem("packages", f"not installed: {', '.join(missing)}", "pip install distkv with its dependencies")
    else:
        yield fine("packages", ", ".join(found))


def check_processor() -> Iterator[Finding]:
    """Cores, and the kernels for them, which are built if need be."""
    usable, there = usable_cores(), os.cpu_count() or 1
    yield fine("processor", f"{cpu_name()}, {usable} cores" + (f" of {there} may be used" if usable < there else ""))
    try:
        yield fine("CPU kernels", f"native, for {load_best().instruction_set}")
    except BuildError as error:
        cure = "install g++ 10 or newer (apt install g++)" if shutil.which("g++") is None else "mend that"
        yield warning(
            "CPU kernels", f"cannot be had, so a CPU runs torch's operators, at half the speed: {error}", cure
        )


def check_memory(shared: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Memory that is free, and shared memory."""
    yield fine("memory", f"{shown_bytes(available_bytes())} may be taken")
    try:
        usage = shutil.disk_usage(shared)
    except OSError as error:
        yield warning(str(shared), f"cannot be used ({error.strerror})", "mount a tmpfs there; Ray needs it")
        return
    said = f"{shown_bytes(usage.free)} of {shown_bytes(usage.total)} are free"
    if usage.free < LEAST_SHARED_BYTES:
        yield warning(
            str(shared), f"{said}, and Ray's object store lies there",
            "make it larger (docker run --shm-size=8g, or mount -o remount,size=8G /dev/shm)",
        )  # fmt: skip
    else:
        yield fine(str(shared), said)


def check_limits() -> Iterator[Finding]:
    """Files that may be open, and memory that a process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < LEAST_FILES:
        most = "unlimited" if hard == resource.RLIM_INFINITY else hard
        yield warning(
            "open files", f"{soft} at most", f"ulimit -n {LEAST_FILES} or more before the start (up to {most} here)"
        )
    else:
        yield fine("open files", "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} at most")
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        yield warning(
            "address space", f"{shown_bytes(space)} at most, which pools and libraries share", "ulimit -v unlimited"
        )
