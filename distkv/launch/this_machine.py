"""What this machine is, as the planner needs it: a GPU that the table has, or its CPU as measured."""

from pathlib import Path

import torch

from distkv.planner.hardware import GPUS, NVME, Hardware
from distkv.reporting.machine import cpu_name
from distkv.storage.process_limits import available_bytes
from distkv.workers.bandwidth import PROBE_BYTES, disk_bandwidth
from distkv.workers.probes import measure_cpu


def measured_cpu(folder: Path | None = None) -> Hardware:
    """Rates by probes of half a second; they are of this moment, and of all cores together.

    Args:
        folder: on the disk that is measured, past the page cache; without one, or where the disk has no room for a
            probe, what an NVMe drive reads by its data sheet stands for it.
    """
    rates = measure_cpu()
    disk = 0.0 if folder is None else disk_bandwidth(folder, PROBE_BYTES)
    source = f"measured just now on this CPU with {torch.get_num_threads()} threads"
    return Hardware(
        name=cpu_name(),
        source=source if disk else f"{source}; disk assumed",
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
