"""This machine as hardware to plan for: its GPU by the ceilings that benchmarks of kernels have, or its CPU."""

import statistics
from dataclasses import replace

import torch

from distkv.bench.device import WARM_UP, DeviceMeter, LinkCeiling, MatmulCeiling, MemoryCeiling, Work
from distkv.launch.this_machine import ASSUMED, known_gpu, measured_cpu
from distkv.planner.hardware import NVME, Hardware
from distkv.reporting.out_file import temporary_folder
from distkv.workers.bandwidth import PROBE_BYTES, disk_bandwidth

REPEATS = 5
DTYPE = torch.bfloat16


def measured_machine() -> Hardware:
    """What torch sees first, and the disk of the folder for temporary files, past the page cache, in a second or two.
    Ranks on one CPU would share what is measured."""
    with temporary_folder() as folder:
        if not torch.cuda.is_available():
            return measured_cpu(folder)
        disk = disk_bandwidth(folder, PROBE_BYTES)
    device = torch.device("cuda", torch.cuda.current_device())
    memory = torch.cuda.mem_get_info()[1]
    found = measured_gpu(DeviceMeter(), device, torch.cuda.get_device_name(), memory, known_gpu())
    return replace(found, disk_bandwidth=disk) if disk else replace(found, source=found.source + ASSUMED)


def measured_gpu(
    meter: DeviceMeter,
    device: torch.device,
    name: str,
    memory_bytes: int,
    known: Hardware | None,
    num_bytes: int = 2**30,
    size: int = 8192,
) -> Hardware:
    """A GPU by medians of reading its memory, of a product and of copies from pinned memory.

    Args:
        known: the same by its data sheet, which has the links between GPUs; None takes them to be as the link measured.
        num_bytes: that are read and copied.
        size: rows and columns of the product's matrices.
    """
    memory, link = MemoryCeiling(device, num_bytes), LinkCeiling(device, num_bytes)
    product = MatmulCeiling(device, DTYPE, size)
    read, multiplied, copied = (_seconds(meter, work) for work in (memory.read, product.run, link.to_device))
    link.close()
    host_link = link.num_bytes / copied
    links = "taken as that to the host" if known is None else "by the data sheet"
    return Hardware(
        name=name,
        source=f"measured; links between GPUs {links}",
        memory_bytes=memory_bytes,
        memory_bandwidth=memory.read_bytes / read,
        matrix_rate=product.flops / multiplied,
        host_link=host_link,
        peer_link=host_link if known is None else known.peer_link,
        disk_bandwidth=NVME,
        is_measured=True,
        nominal_bytes=None if known is None else known.nominal_bytes,
    )


def _seconds(meter: DeviceMeter, work: Work) -> float:
    return statistics.median([meter.seconds(work) for _ in range(WARM_UP + REPEATS)][WARM_UP:])
