"""The engines that are compared: how the driver and the server of each are started."""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from distkv.errors import ConfigError
from distkv.option_checks import settle_path

DRIVERS = Path(__file__).parent / "drivers"
OWN_PACKAGES = Path(__file__).resolve().parents[3]  # the folder that `distkv` is imported from
PEERS = ("vllm", "vllm-eager", "hf")
MODULES = {"distkv": "distkv", "vllm": "vllm", "vllm-eager": "vllm", "hf": "transformers"}
"""What each engine is in its environment."""
PYTHON_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
SERVED = "bench"  # what both servers call the model
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Setting:
    """What is the same for all engines."""

    model: Path
    dtype: str
    threads: int
    max_model_len: int  # tokens
    kv_bytes: int


@dataclass(frozen=True)
class Engine:
    """One engine: distkv or a peer, and the Python that it is installed for."""

    name: str  # distkv or one of PEERS
    python: Path

    @property
    def driver(self) -> Path:
        return DRIVERS / f"{self.name.split('-')[0]}_driver.py"

    @property
    def is_served(self) -> bool:
        """Whether its server can be asked for the same: transformers' takes no token ids and goes past no end token."""
        return self.name != "hf"

    @property
    def eager(self) -> list[str]:
        return ["--eager"] if self.name == "vllm-eager" else []

    def environment(self, setting: Setting) -> dict[str, str]:
        """Variables of its processes: the same number of threads, no network, and no module of this environment in
        another one."""
        variables = dict(os.environ)
        if self.python == Path(sys.executable):
            paths = [str(OWN_PACKAGES), *filter(None, [variables.get("PYTHONPATH")])]
            variables["PYTHONPATH"] = os.pathsep.join(paths)
        else:
            for name in PYTHON_VARIABLES:
                variables.pop(name, None)
        threads = str(setting.threads)
        return variables | {
            "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }  # fmt: skip

    def probe_command(self) -> list[str]:
        return [str(self.python), str(DRIVERS / "probe.py"), MODULES[self.name]]

    def driver_command(self, setting: Setting) -> list[str]:
        return [
            str(self.python), str(self.driver), "--model", str(setting.model), "--dtype", setting.dtype,
            "--threads", str(setting.threads), "--max-model-len", str(setting.max_model_len),
            "--kv-bytes", str(setting.kv_bytes), *self.eager,
        ]  # fmt: skip

    def server_command(self, setting: Setting, port: int) -> list[str]:
        shared = [
            str(setting.model), "--host", HOST, "--port", str(port), "--served-model-name", SERVED,
            "--dtype", setting.dtype, "--max-model-len", str(setting.max_model_len), "--no-enable-prefix-caching",
        ]  # fmt: skip
        if self.name == "distkv":
            own = ["--num-threads", str(setting.threads), "--device-kv-bytes", str(setting.kv_bytes)]
            return [str(self.python), "-m", "distkv", "serve", *shared, *own, "--host-kv-bytes", "0"]
        return [
            # what `vllm serve` runs; that command itself does not find its version in the CPU build
            str(self.python), "-m", "vllm.entrypoints.openai.api_server", "--model", *shared,
            "--kv-cache-memory-bytes", str(setting.kv_bytes), "--gpu-memory-utilization", "0.2",
            "--disable-uvicorn-access-log", *(["--enforce-eager"] if self.eager else []),
        ]  # fmt: skip


def engines(peers: Iterable[str]) -> list[Engine]:
    """distkv, and the peers given as NAME or NAME=PYTHON. Raises ConfigError for names that are not known and for one
    that is given twice; whether there is such a Python and such an engine is found when it is started."""
    found = [Engine("distkv", Path(sys.executable))]
    for text in peers:
        name, has_python, python = text.partition("=")
        if name not in PEERS:
            raise ConfigError(f"--peer {text!r}: {name!r} is not known; use one of {', '.join(PEERS)}")
        if any(name == engine.name for engine in found):
            raise ConfigError(f"--peer {name} is given twice; give each peer once")
        found.append(Engine(name, settle_path("--peer", python) if has_python else Path(sys.executable)))
    return found
