"""What several engines tell together."""

from distkv.engine.stats import EngineStats, Histogram, RequestStats, TierStats, total


def test_all_figures_are_summed() -> None:
    times = Histogram((1.0, 2.0), (3, 4, 5), 6.0)
    one = EngineStats(
        1, 2, 3, 4, bytes_moved={"host_to_disk": 7}, tiers={"device": TierStats(1, 2, 3, 4, 5)},
        requests=RequestStats(prompt_tokens=8, finished={"stop": 1}, e2e_latency=times),
    )  # fmt: skip
    other = EngineStats(
        10, 20, 30, 40, bytes_moved={"disk_to_host": 9}, tiers={"device": TierStats(10, 20, 30, 40, 50)},
        requests=RequestStats(prompt_tokens=80, finished={"stop": 1, "length": 2}, e2e_latency=times, queue_time=times),
    )  # fmt: skip
    assert total([one]) == one
    assert total([one, other]) == EngineStats(
        11, 22, 33, 44, bytes_moved={"host_to_disk": 7, "disk_to_host": 9},
        tiers={"device": TierStats(11, 22, 33, 44, 55)},
        requests=RequestStats(
            prompt_tokens=88, finished={"stop": 2, "length": 2},
            e2e_latency=Histogram((1.0, 2.0), (6, 8, 10), 12.0), queue_time=times,
        ),
        num_engines=2,
    )  # fmt: skip
