"""Which rank is blamed when nothing comes of the ranks."""

from distkv.workers.group.ray_group import Node, hung_rank

NODES = [Node("a", "10.0.0.1", 2, 11), Node("b", "10.0.0.2", 2, 12)]


def test_a_stopped_process_is_blamed() -> None:
    assert hung_rank(["S", "T"], NODES) == (1, "its process 12 is stopped (SIGSTOP)")
    assert hung_rank(["", "Z"], NODES) == (1, "its process 12 is gone")


def test_a_node_that_does_not_tell_is_not_said_to_have_no_stopped_process() -> None:
    assert hung_rank(["S", ""], NODES) == (1, "its node has not told whether its process runs")


def test_where_all_processes_run_something_else_is_stuck() -> None:
    rank, why = hung_rank(["S", "R"], NODES)
    assert rank == 0 and why.startswith("no process is stopped")
