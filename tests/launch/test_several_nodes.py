"""Engines over several nodes of one machine, with addresses and disks of their own: the answers are those of one rank,
bit for bit, whatever becomes of nodes and disks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import save_llama
from support.namespaces import Nodes, address, lack
from support.prompts import random_prompts

from distkv.storage.disk.cache_folder import CATALOGUE
from distkv.storage.disk.page_arrays import find_arrays

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

PROMPTS = random_prompts(150, 70)
OPTIONS: dict[str, Any] = {"page_size": 16, "max_model_len": 512, "device_kv_bytes": "4MiB"}
PAGE_BYTES = 2 * 4 * 3 * 16 * 16 * 4  # of the model below
SMALL: dict[str, Any] = {  # a part of the pages lies on disk
    "device_kv_bytes": 9 * PAGE_BYTES, "host_kv_bytes": 4 * PAGE_BYTES, "disk_kv_bytes": "8MiB",
    "max_num_batched_tokens": 64, "max_num_seqs": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    if reason := lack():
        pytest.skip(reason)
    found = Nodes(3)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def model(nodes: Nodes) -> Path:
    return save_llama(
        nodes.folder / "model", num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=3, hidden_size=96,
        vocab_size=130, max_position_embeddings=512,
    )[0]  # fmt: skip


@pytest.fixture(scope="module")
def expected(nodes: Nodes, model: Path) -> list[Any]:
    """The answers of one rank."""
    return ask(nodes, model)["answers"]


def ask(nodes: Nodes, model: Path, meanwhile: Any = None, pauses: int = 0, **options: Any) -> dict[str, Any]:
    wanted = {"model": str(model), "options": OPTIONS | options, "prompts": PROMPTS, "pauses": pauses}
    return nodes.generate(meanwhile, **wanted)


def stages(log: str) -> list[str]:
    """The addresses of the nodes on which stages lie, as the log tells them."""
    lines = [line for line in log.splitlines() if " lies on " in line]
    return [line.rpartition(" ")[2] for line in lines]


def arrays(folder: Path) -> list[str]:
    """The arrays with pages in a cache_dir."""
    return [
        array.name
        for cache in folder.iterdir()
        for array in find_arrays(cache)
        if any((cache / array.name).glob("c.*"))
    ]


@pytest.mark.parametrize(
    "layout", [{"pipeline_parallel_size": 3}, {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}]
)
def test_stages_lie_on_nodes_of_their_own(
    nodes: Nodes, model: Path, expected: list[Any], layout: dict[str, int]
) -> None:
    """Each with its layers alone on its disk, of which the same layout finds all again."""
    if size := layout.get("tensor_parallel_size"):  # sums over other numbers of ranks round otherwise
        expected = ask(nodes, model, tensor_parallel_size=size)["answers"]
    cache = nodes.disk / f"kv{json.dumps(layout)}".translate(str.maketrans(dict.fromkeys('{}": ,')))
    for turn in range(2):
        told = ask(nodes, model, cache_dir=str(cache), **SMALL, **layout)
        assert told["answers"] == expected
        places = stages(told["log"])
        assert len(set(places)) == len(places) == layout["pipeline_parallel_size"]
        found = {address(number): disk / cache.name for number, disk in enumerate(nodes.disks)}
        assert [len(arrays(found[place])) for place in places] == [1] * len(places)
        assert (next(found[places[0]].iterdir()) / CATALOGUE).exists()
        assert told["moved"]["disk_streamed"]
        if turn == 0:
            first = places
        elif places == first:
            assert all(told["cached"])
        else:  # Ray chooses the nodes
            assert "KV pages on disk are missing and are not used: node-" in told["log"] or not any(told["cached"])


def test_a_cache_of_one_layout_on_shared_storage_is_read_by_all(nodes: Nodes, model: Path, expected: list[Any]) -> None:
    shared = nodes.folder / "shared"
    for number, layout in enumerate(
        ({"pipeline_parallel_size": 2}, {"tensor_parallel_size": 3}, {"pipeline_parallel_size": 3}, {})
    ):
        told = ask(nodes, model, cache_dir=str(shared), **SMALL, **layout)
        if "tensor_parallel_size" not in layout:  # sums over other numbers of ranks round otherwise
            assert told["answers"] == expected
        assert all(told["cached"]) == bool(number) and "are missing" not in told["log"]


def test_nodes_that_are_swapped_find_nothing_and_say_so(nodes: Nodes, model: Path, expected: list[Any]) -> None:
    layout, cache = {"pipeline_parallel_size": 2}, nodes.disk / "swapped"
    told = ask(nodes, model, cache_dir=str(cache), **SMALL, **layout)
    places = stages(told["log"])
    one, other = (nodes.disks[[address(number) for number in range(3)].index(place)] for place in places)
    catalogue = next((one / "swapped").iterdir()).name
    # the leader's node keeps the catalogue, and all else changes places
    arrays_of = {disk: find_arrays(disk / "swapped" / catalogue) for disk in (one, other)}
    for disk, target in ((one, other), (other, one)):
        for array in arrays_of[disk]:
            (disk / "swapped" / catalogue / array.name).rename(target / "swapped" / catalogue / array.name)
    told = ask(nodes, model, cache_dir=str(cache), **SMALL, **layout)
    assert told["answers"] == expected
    if stages(told["log"])[0] == places[0]:
        assert not any(told["cached"]) and told["log"].count("KV pages on disk are missing and are not used") == 1
        assert "has not all files of layers" in told["log"] and "a cache_dir that all nodes see" in told["log"]


def test_a_disk_that_is_lost(nodes: Nodes, model: Path, expected: list[Any]) -> None:
    """All files of a stage, while answers are written that read them."""
    cache = nodes.disk / "lost"

    def lose() -> None:
        for disk in nodes.disks:
            for folder in (disk / "lost").glob("*/kv.layers-2-3.zarr"):
                for file in folder.glob("c.*"):
                    file.unlink()

    told = ask(nodes, model, lose, pauses=8, cache_dir=str(cache), pipeline_parallel_size=2, **SMALL)
    assert told["answers"] == expected and "cannot be read: No such file" in told["log"]


def test_a_disk_that_is_full(nodes: Nodes, model: Path, expected: list[Any]) -> None:
    """On one node of two: what lies there already is read, and the rest stays above or is computed again."""
    for number in range(3):
        nodes.mount(number, "full", 2**20)
    told = ask(
        nodes, model, lambda: [nodes.fill(number, "full") for number in (1, 2)], pauses=2,
        cache_dir=str(nodes.disk / "full" / "kv"), pipeline_parallel_size=3, **(SMALL | {"disk_kv_bytes": "500KiB"}),
    )  # fmt: skip
    assert told["answers"] == expected


def test_answers_outlive_a_node(nodes: Nodes, model: Path, expected: list[Any]) -> None:
    """It is killed with all that runs there, while answers are written; the engine goes on without it."""
    killed: list[int] = []

    def kill() -> None:
        killed.append(next(number for number in (1, 2) if nodes.has_rank(number)))
        nodes.kill(killed[0])

    told = ask(nodes, model, kill, pauses=8, pipeline_parallel_size=2, max_rank_failures=1)
    assert told["answers"] == expected and "is started anew" in told["log"]
    places = stages(told["log"])
    assert address(killed[0]) in places[:2] and address(killed[0]) not in places[-2:]
    nodes.start(killed[0])
