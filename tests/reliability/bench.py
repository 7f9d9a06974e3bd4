"""What faults are tried on: an engine in a process of its own, on Ray or not, and the answers that it must give."""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reliability.driver_process import DriverProcess
from reliability.load import Request, requests
from reliability.our_processes import Family
from reliability.ray_nodes import RayNodes
from support.checkpoints import save_llama

from distkv.models.fetch import fetch_model
from distkv.storage.disk.file_lock import is_locked

PAGE = 16  # tokens


@dataclass(frozen=True)
class Setting:
    """Of a bench. Faults of one setting share it."""

    size: int = 1  # ranks of an engine
    engines: int = 1
    nodes: tuple[int, ...] = ()  # CPUs of each node of a Ray cluster; without any the engine is in the driver's process
    model: str = "tiny"  # or "smollm2"
    answer_len: int = 480  # tokens of the longest answers
    options: tuple[tuple[str, Any], ...] = ()  # further ones of the engine
    environment: tuple[tuple[str, str], ...] = ()  # further variables of all processes


class Bench:
    """Of one setting, in a folder of its own that is removed in the end."""

    def __init__(self, setting: Setting, limit: float, leave: float):
        """
        Args:
            limit: seconds without any progress after which something counts as hung.
            leave: seconds in which what has ended must have left.
        """
        self.setting, self.limit, self._leave = setting, limit, leave
        self.folder = Path(tempfile.mkdtemp(prefix="distkv-rel-", dir="/tmp"))
        self.family = Family(self.folder.name, dict(setting.environment))
        self.cluster: RayNodes | None = None
        self._driver: DriverProcess | None = None
        self.known: dict[int, dict[int, list[int]]] = {}  # the answers to each request, by its key and theirs
        try:
            self.model, self.requests = self._make_model()
            self.cache = self.folder / "cache"
            self.start_cluster()
        except BaseException:
            self.remove()
            raise

    @property
    def driver(self) -> DriverProcess:
        """One with an engine that runs: the one of the try before, or a new one."""
        if self._driver is None:
            self._driver = self.new_driver()
            self._driver.start(self.model, self.options)
        if not self.known:
            self._learn(self._driver)
        return self._driver

    def new_driver(self, **how: Any) -> DriverProcess:
        """A process without an engine; the arguments are those of `DriverProcess`. The caller ends it, or gives it to
        `adopt`."""
        return DriverProcess(self.folder / "home", self.family, self.limit, **how)

    def adopt(self, driver: DriverProcess) -> None:
        """Makes it the bench's, whose engine runs."""
        assert self._driver is None
        self._driver = driver

    def drop_driver(self) -> DriverProcess | None:
        """Lets go of it, so that the next try gets a new one; the caller ends it."""
        driver, self._driver = self._driver, None
        return driver

    @property
    def options(self) -> dict[str, Any]:
        """Of the engine."""
        page = 2 * 2 * 3 * PAGE * 16 * 4 if self.setting.model == "tiny" else 30 * 2 * 3 * PAGE * 64 * 2
        options: dict[str, Any] = {
            "page_size": PAGE, "max_num_seqs": 8, "max_num_batched_tokens": 128, "cache_dir": str(self.cache),
            "device_kv_bytes": 140 * page, "host_kv_bytes": 140 * page, "disk_kv_bytes": 1000 * page, "num_threads": 1,
        }  # fmt: skip
        if self.cluster is not None:
            options |= {
                "tensor_parallel_size": self.setting.size, "data_parallel_size": self.setting.engines,
                "ray_address": self.cluster.address, "max_rank_failures": 1000, "hang_timeout": 5,
            }  # fmt: skip
        return options | dict(self.setting.options)

    @property
    def num_ranks(self) -> int:
        """That run as Ray actors."""
        return self.setting.size * self.setting.engines if self.cluster is not None else 0

    def start_cluster(self) -> None:
        """Starts the Ray cluster, if the setting wants one."""
        if self.setting.nodes:
            self.cluster = RayNodes(self.folder, self.family, self.setting.nodes)

    def what_is_held(self, driver: DriverProcess) -> list[str]:
        """What an engine without requests has that it must not have, once it has had time to let go of it."""

        def look() -> list[str]:
            found, stats = [], driver.stats()
            if stats["error"] is not None:
                return [f"the engine has ended: {stats['error']}"]
            if stats["pages_in_use"] or stats["running"] or stats["waiting"]:
                found.append(f"an idle engine has {stats}")
            if stats["engines"] != self.setting.engines:
                found.append(f"{stats['engines']} engines run instead of {self.setting.engines}")
            if self.cluster is not None:
                if len(ranks := self.cluster.rank_pids()) != self.num_ranks:
                    found.append(f"{len(ranks)} processes of ranks for {self.num_ranks}")
                told = driver.inspect(self.cluster.address)
                if told != {"groups": self.setting.engines, "cpus_taken": self.num_ranks}:
                    found.append(f"the cluster has {told}")
            return found

        held = self.settled(look)
        self.family.note_segments()
        return held

    def what_is_left(self, asker: DriverProcess | None = None) -> list[str]:
        """What is there of an engine that has been closed, once it has had time to leave.

        Args:
            asker: a driver without an engine that asks the cluster, if that is to be asked.
        """

        def look() -> list[str]:
            found = []
            if self.cluster is not None and (ranks := self.cluster.rank_pids()):
                found.append(f"processes of ranks: {ranks}")
            if self.cluster is not None and asker is not None:
                told = asker.inspect(self.cluster.address)
                if any(told.values()):
                    found.append(f"the cluster has {told}")
            found += [f"a lock: {path}" for path in self.cache.rglob("lock") if is_locked(path)]
            found += [f"memory: {name}" for name in self._segments_of_engines()]
            return found

        return self.settled(look)

    def what_runs(self) -> list[str]:
        """Processes of the bench behind a driver and a cluster that have ended, once they have had time to leave."""
        return self.settled(lambda: [f"process {pid}: {title}" for pid, title in self.family.members().items()])

    def what_is_in_folders(self) -> list[str]:
        """Files of work that has ended, behind an engine that has been closed in peace."""
        found = [path for pattern in ("*.partial", "writer.*") for path in self.cache.rglob(pattern)]
        return [f"a file: {path}" for path in [*found, *(self.folder / "home" / "tmp").glob("*")]]

    def close(self) -> list[str]:
        """Ends everything in peace; returns what is left of it, which is removed then."""
        left = []
        try:
            if (driver := self.drop_driver()) is not None:
                self.family.note_segments()
                if (error := driver.close()) is not None:
                    left.append(f"an engine that was closed: {error}")
                left += self.what_is_left(driver)
                driver.end()
                left += self.what_is_in_folders()
            if self.cluster is not None:
                self.cluster.stop()
            left += self.what_runs()
            left += [f"memory: {name}" for name in self.family.left_segments()]
        finally:
            self.remove()
        return left

    def remove(self) -> None:
        """Ends everything at once."""
        self._driver = self.cluster = None
        self.family.kill_all()
        for name in self.family.left_segments():
            Path(name).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _segments_of_engines(self) -> list[str]:
        """Ray's own memory has a name as long as the cluster runs."""
        return [name for name in self.family.left_segments() if self.cluster is None or "plasma" not in name]

    def settled(self, look: Callable[[], list[str]]) -> list[str]:
        """What a look finds when it finds nothing, or when its time is up."""
        deadline = time.monotonic() + self._leave
        while (found := look()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def _make_model(self) -> tuple[Path, list[Request]]:
        if self.setting.model != "tiny":
            return fetch_model(self.setting.model, progress=False), requests(16, 40000, 160, self.setting.answer_len)
        shape = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, "max_position_embeddings": 1024}
        return save_llama(self.folder / "model", **shape)[0], requests(16, 128, 240, self.setting.answer_len)

    def _learn(self, driver: DriverProcess) -> None:
        """Has an engine that nothing disturbs answer all requests."""
        load = driver.ask(self.requests)
        driver.finish(load)
        errors = [error for error in load.ended.values() if error is not None]
        if errors:
            raise RuntimeError(f"an undisturbed run failed: {errors}")
        self.known = {request.key: load.answers[load.name_of(request)] for request in self.requests}
