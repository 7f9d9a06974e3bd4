"""What ranks log reaches the leader with their reports."""

import logging
from collections.abc import Iterator

import pytest
import zmq

from distkv.workers.group.channel import FollowerChannel, LeaderChannel
from distkv.workers.group.log_lines import LogCollector, relay
from distkv.workers.group.report import Report


@pytest.fixture
def collector() -> Iterator[LogCollector]:
    collector = LogCollector()
    yield collector
    logging.getLogger("distkv").removeHandler(collector)


def test_warnings_are_collected_and_others_are_not(collector: LogCollector, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    logger = logging.getLogger("distkv.some.module")
    logger.info("of no interest")
    logging.getLogger("another").error("of others")
    logger.warning("%d pages are gone", 3)
    try:
        raise ZeroDivisionError("a bug")
    except ZeroDivisionError:
        logger.exception("a step failed")
    first, second = collector.take()
    assert first == (logging.WARNING, "distkv.some.module", "3 pages are gone")
    assert second[0] == logging.ERROR and "a step failed" in second[2] and "ZeroDivisionError: a bug" in second[2]
    assert collector.take() == []
    caplog.clear()
    relay([first], 2)
    [record] = caplog.records
    assert (record.levelno, record.name, record.message) == (*first[:2], "rank 2: 3 pages are gone")
    assert collector.take() == [(*first[:2], "rank 2: 3 pages are gone")], "and goes on to whoever owns the leader"
    relay([first, (*first[:2], "rank 2: 3 pages are gone")], 0)
    assert [record.message for record in caplog.records[1:]] == ["3 pages are gone", "rank 2: 3 pages are gone"]


def test_lines_of_a_follower_come_with_its_report(caplog: pytest.LogCaptureFixture) -> None:
    with zmq.Context() as context:
        leader = LeaderChannel(context, "127.0.0.1", 2)
        followers = [FollowerChannel(context, address) for address in leader.addresses]
        followers[0].send(Report())
        followers[1].send(Report(done=[4], log=[(logging.WARNING, "distkv.some.module", "the disk is slow")]))
        assert [report.done for report in leader.receive()] == [[], [4]]
        context.destroy(linger=0)
    assert [record.message for record in caplog.records] == ["rank 2: the disk is slow"]
