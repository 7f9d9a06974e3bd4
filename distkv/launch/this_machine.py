"""What this machine is, as the planner needs it: a GPU that the table has, or its CPU as measured."""

from dataclasses import replace
from pathlib import Path

import torch

from distkv.config import EngineConfig
from distkv.engine.protocol import EngineInfo
from distkv.planner.hardware import GPUS, NVME, Hardware
from distkv.planner.sizing import cold_rates
from distkv.reporting.machine import cpu_name
from distkv.storage.process_limits import available_bytes
from distkv.workers.bandwidth import PROBE_BYTES, disk_bandwidth
from distkv.workers.probes import measure_cpu

ASSUMED = "; disk assumed"  # at the end of a source


def engine_hardware(config: EngineConfig, info: EngineInfo) -> Hardware | None:
    """Where the ranks of an engine run, as far as this process can tell: a CPU of a cluster may be any. Measures for
    half a second on a CPU."""
    on_cpu = config.device in ("cpu", "simulated") or not torch.cuda.is_available()
    found = known_gpu() if not on_cpu else None if config.is_on_ray else measured_cpu()
    if found is None or not info.num_host_pages or config.max_cold_bytes_per_step is not None:
        return found
    rates = cold_rates((info.max_cold_bytes_per_step, info.disk_cost), config.num_ranks)
    if not info.num_disk_pages:
        return replace(found, host_link=rates.host)
    source = found.source.removesuffix(ASSUMED)
    return replace(found, host_link=rates.host, disk_bandwidth=rates.disk, source=source)


def measured_cpu(folder: Path | None = None) -> Hardware:
    """Rates by probes of half a second; they are of this moment, and of all cores together.

    Args:
        folder: on the disk that is measured, past the page cache; without one, or where the disk has no room for a
            probe, what an NVMe drive reads by its data sheet stands for it.
    """
    rates = measure_cpu()
    disk = 0.0 if folder is None else disk_bandwidth(folder, PROBE_BYTES)
    source = f"measured on this CPU, threads: {torch.get_num_threads()}"
    return Hardware(
        name=cpu_name(),
        source=source if disk else source + ASSUMED,
        memory_bytes=available_bytes(),
        memory_bandwidth=rates.read,
        matrix_rate=rates.matrix,
        host_link=rates.copy,
        peer_link=rates.copy,
        disk_bandwidth=disk or NVME,
        is_cpu=True,
        is_measured=True,
    )


def known_gpu() -> Hardware | None:
    """The GPU that torch sees first, by its data sheet; None where the table has no such one."""
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    memory = torch.cuda.get_device_properties(0).total_memory
    found = [one for key, one in GPUS.items() if key.split("-")[-1 if key.startswith("rtx") else 0] in name.split("-")]
    return min(found, key=lambda one: abs(one.memory_bytes - memory), default=None)
