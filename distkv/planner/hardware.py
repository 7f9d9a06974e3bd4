"""What one rank runs on: sizes and rates of a GPU by its maker's data sheet, by hand, or as measured."""

import difflib
import math
from dataclasses import dataclass, fields, replace

from distkv.errors import ConfigError
from distkv.option_checks import parse_bytes
from distkv.planner.pairs import split_pairs
from distkv.values import shown

GIB = 2**30
NVME = 7e9
"""Bytes per second that an NVMe drive on four lanes of PCIe 4 reads, by the data sheets of such drives."""


@dataclass(frozen=True)
class Hardware:
    """A rank's device and what lies below it. Rates are bytes per second in one direction, or operations per second.

    Raises ConfigError for a figure that is no positive finite number.
    """

    name: str
    source: str  # where the figures are from, for people to read
    memory_bytes: int  # of the device, as CUDA reports it; of a CPU, what may be taken
    memory_bandwidth: float
    matrix_rate: float  # multiplications and additions of dense products in bf16 or fp16
    host_link: float  # from host memory to the device; of a CPU, how fast cold pages are copied
    peer_link: float  # of one rank to the others
    disk_bandwidth: float = NVME  # of the disk that all ranks of a machine share; a node's own, where there are several
    is_cpu: bool = False  # where streaming and computing take turns
    is_measured: bool = False
    nominal_bytes: int | None = None  # memory by the data sheet, where CUDA reports less
    attention_bandwidth: float | None = None  # of reading KV, where that is known to differ from `memory_bandwidth`
    step_seconds: float = 0.0  # of every step whatever it computes, where that was measured

    def __post_init__(self) -> None:
        for field in fields(self):
            value, optional = getattr(self, field.name), field.default is None
            if field.name in ("name", "source", "is_cpu", "is_measured") or (value is None and optional):
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            least_open = field.name != "step_seconds"
            if not is_number or not math.isfinite(value) or value < 0 or (least_open and value == 0):
                raise ConfigError(f"{field.name} of {self.name} is {shown(value)}; it must be a positive finite number")

    @property
    def kv_bandwidth(self) -> float:
        """Bytes per second at which attention reads KV on the device."""
        return self.memory_bandwidth if self.attention_bandwidth is None else self.attention_bandwidth


def _gpu(
    name: str, gib: float, nominal_gib: int, bandwidth: float, matrix: float, link: float, peers: float | None = None
) -> Hardware:
    """Gigabytes per second, and 10**12 operations per second."""
    source = "NVIDIA's data sheet; memory as CUDA reports it"
    peer_link = (link if peers is None else peers) * 1e9
    return Hardware(
        name, source, int(gib * GIB), bandwidth * 1e9, matrix * 1e12, link * 1e9, peer_link,
        nominal_bytes=nominal_gib * GIB,
    )  # fmt: skip


# Data sheets give sparse rates for bf16, of which half is dense, and links both ways, of which half is one way. What
# CUDA reports as total memory is told in PyTorch's messages of memory that ran out (vllm issue 27508: H100 79.11 GiB;
# vllm issue 4408: A100 79.15; Wan2.1 issue 205: L40S 44.53; VGen issue 104: RTX 4090 23.64; TrajectoryCrafter issue 20:
# RTX 5090 31.36; pytorch/ao pull 4002: B200 178.35 and its memory bus); it moves by a per cent with the driver.
GPUS: dict[str, Hardware] = {
    "a10": _gpu("A10", 22.1, 24, 600, 125, 32),
    "a100-40gb": _gpu("A100 40GB SXM", 39.5, 40, 1555, 312, 32, 300),
    "a100-80gb": _gpu("A100 80GB SXM", 79.15, 80, 2039, 312, 32, 300),
    "l4": _gpu("L4", 22.0, 24, 300, 121, 32),
    "l40s": _gpu("L40S", 44.4, 48, 864, 362, 32),
    "h100": _gpu("H100 SXM", 79.11, 80, 3350, 989, 64, 450),
    "h100-pcie": _gpu("H100 PCIe", 79.1, 80, 2000, 756, 64),
    "h200": _gpu("H200 SXM", 139.8, 141, 4800, 989, 64, 450),
    "b200": _gpu("B200 SXM", 178.35, 180, 7700, 2250, 64, 900),
    "rtx-4090": _gpu("GeForce RTX 4090", 23.64, 24, 1008, 165.2, 32),
    "rtx-5090": _gpu("GeForce RTX 5090", 31.36, 32, 1792, 209.5, 64),
}
ALIASES = {
    "a100": "a100-80gb", "h100-sxm": "h100", "h200-sxm": "h200", "b200-sxm": "b200", "4090": "rtx-4090",
    "5090": "rtx-5090", "rtx4090": "rtx-4090", "rtx5090": "rtx-5090", "a100-40": "a100-40gb", "a100-80": "a100-80gb",
}  # fmt: skip
BY_HAND = ("memory", "bandwidth", "matrix", "link", "peers", "disk")
"""What a GPU given by hand is told by."""
NEEDED = BY_HAND[:4]


def find_hardware(gpu: str) -> Hardware:
    """A GPU of the table by its name, or one by hand: "memory=48GiB,bandwidth=900GB,matrix=200T,link=32GB", with
    "peers" (taken as the link if left out) and "disk" besides. Raises ConfigError that lists what there is."""
    if "=" in gpu:
        return _by_hand(gpu)
    name = gpu.strip().lower().replace(" ", "-").replace("_", "-").removeprefix("nvidia-")
    name = ALIASES.get(name, name)
    if name not in GPUS:
        near = difflib.get_close_matches(name, GPUS, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(
            f"GPU {shown(gpu)} is not known{meant}; use one of {', '.join(GPUS)}, or give one by hand: "
            "memory=48GiB,bandwidth=900GB,matrix=200T,link=32GB"
        )
    return GPUS[name]


def _by_hand(text: str) -> Hardware:
    texts = dict(split_pairs("the GPU", text, BY_HAND))
    given = {key: parse_bytes(f"{key} of the GPU", value) for key, value in texts.items()}
    missing = [key for key in NEEDED if key not in given]
    if missing:
        raise ConfigError(f"the GPU {shown(text)} lacks {', '.join(missing)}; give {', '.join(NEEDED)} at least")
    return Hardware(
        name=f"GPU of {texts['memory']} at {texts['bandwidth']}/s",
        source="given by hand",
        memory_bytes=given["memory"],
        memory_bandwidth=given["bandwidth"],
        matrix_rate=given["matrix"],
        host_link=given["link"],
        peer_link=given.get("peers", given["link"]),
        disk_bandwidth=given.get("disk", NVME),
        nominal_bytes=given["memory"],
    )


def with_disk(hardware: Hardware, disk_bandwidth: float | None) -> Hardware:
    """The same with another disk, if one is given."""
    return hardware if disk_bandwidth is None else replace(hardware, disk_bandwidth=disk_bandwidth)
