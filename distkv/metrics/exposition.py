"""A snapshot of an engine in the text that Prometheus reads."""

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.core import (
    Metric as Family,
)
from prometheus_client.registry import Collector

from distkv.engine.protocol import EngineInfo
from distkv.engine.stats import EngineStats, Histogram
from distkv.metrics.catalogue import CATALOGUE, PREFIX

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(stats: EngineStats, info: EngineInfo, model_name: str) -> bytes:
    """All metrics of an engine, with `model_name` as a label, and those of this process; of `CONTENT_TYPE`."""
    registry = CollectorRegistry()
    registry.register(_Snapshot(stats, info, model_name))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class _Snapshot(Collector):
    def __init__(self, stats: EngineStats, info: EngineInfo, model_name: str):
        self._stats, self._info, self._model_name = stats, info, model_name

    def collect(self) -> Iterator[Family]:
        for metric in CATALOGUE:
            name, labels = PREFIX + metric.name, ("model_name", *metric.labels)
            if metric.kind == "histogram":
                histogram = HistogramMetricFamily(name, metric.help, labels=labels)
                for values, value in metric.samples(self._stats, self._info):
                    assert isinstance(value, Histogram)
                    histogram.add_metric((self._model_name, *values), _buckets(value), value.total)
                yield histogram
                continue
            make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = make(name, metric.help, labels=labels)
            for values, value in metric.samples(self._stats, self._info):
                assert not isinstance(value, Histogram)
                family.add_metric((self._model_name, *values), value)
            yield family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Counts of values up to each bound, as Prometheus has them."""
    return list(zip([*map(str, histogram.bounds), "+Inf"], accumulate(histogram.counts), strict=True))
