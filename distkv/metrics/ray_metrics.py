"""The same figures through Ray, for an engine that runs in one of its actors: Ray has its own way to Prometheus.

Ray takes no colon in a name, so `distkv:prompt_tokens_total` is `ray_distkv_prompt_tokens_total` there.
"""

import time
from pathlib import Path

from ray.util.metrics import Counter, Gauge
from ray.util.metrics import Histogram as RayHistogram

from distkv.engine.protocol import EngineInfo
from distkv.engine.request_meter import RequestMeter
from distkv.engine.stats import EngineStats, Histogram
from distkv.metrics.catalogue import CATALOGUE, PREFIX

SECONDS = 1.0  # between updates
METRICS = [metric for metric in CATALOGUE if metric.of_engine]


class RayMetrics:
    """Tells Ray what an engine of this process tells of itself; `update` is to be called every now and then."""

    def __init__(self, info: EngineInfo, meter: RequestMeter):
        """
        Args:
            meter: of the engine. Ray keeps distributions itself, so it is told of each value when it comes.
        """
        self._info = info
        self._due = 0.0
        self._told: dict[tuple[str, tuple[str, ...]], float] = {}  # what counters stand at
        model_name = {"model_name": Path(info.model).name}
        self._metrics: dict[str, Counter | Gauge] = {}
        for metric in METRICS:
            name, keys = PREFIX.replace(":", "_") + metric.name, ("model_name", *metric.labels)
            if metric.kind == "histogram":
                values = meter.distributions[metric.field]
                histogram = RayHistogram(name, metric.help, boundaries=list(values.bounds), tag_keys=keys)
                values.listener = histogram.set_default_tags(model_name).observe
                continue
            make = Counter if metric.kind == "counter" else Gauge
            self._metrics[metric.name] = make(name, metric.help, tag_keys=keys)
            self._metrics[metric.name].set_default_tags(model_name)

    @property
    def is_due(self) -> bool:
        """Whether so much time has passed that there should be an update."""
        return time.monotonic() >= self._due

    def update(self, stats: EngineStats) -> None:
        """Tells Ray what has changed since the last call."""
        self._due = time.monotonic() + SECONDS
        for metric in METRICS:
            if metric.kind == "histogram":
                continue
            for labels, value in metric.samples(stats, self._info):
                assert not isinstance(value, Histogram)
                self._tell(metric.name, dict(zip(metric.labels, labels, strict=True)), value)

    def _tell(self, name: str, labels: dict[str, str], value: float) -> None:
        metric = self._metrics[name]
        if isinstance(metric, Gauge):
            metric.set(value, labels)
            return
        key = name, tuple(labels.values())
        if more := value - self._told.get(key, 0):
            metric.inc(more, labels)
            self._told[key] = value
