"""The metrics of a server as somebody reads them who watches it, and what lies between two readings."""

import math
import time
from dataclasses import dataclass, field
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from prometheus_client.parser import text_string_to_metric_families

from distkv.errors import ConfigError
from distkv.metrics.catalogue import PREFIX

TIMEOUT = 10.0  # seconds for an answer
MOST_BYTES = 2**24  # of an answer

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Reading:
    """The samples of one answer, without the prefix."""

    samples: dict[tuple[str, Labels], float]
    seconds: float = field(default_factory=time.monotonic)

    def total(self, name: str, **labels: str) -> float:
        """The sum of all samples of a name that have these labels; 0 where there are none."""
        wanted = set(labels.items())
        return sum(value for (other, has), value in self.samples.items() if other == name and wanted <= has)

    def values_of(self, name: str, label: str) -> list[str]:
        """The values that a label of a name has, in order."""
        found = [dict(has).get(label) for other, has in self.samples if other == name]
        return [value for value in dict.fromkeys(found) if value is not None]


@dataclass(frozen=True)
class Interval:
    """What has happened between two readings."""

    before: Reading
    after: Reading

    @property
    def seconds(self) -> float:
        return self.after.seconds - self.before.seconds

    def rise(self, name: str, **labels: str) -> float:
        """By how much a counter has risen; from 0 when it has begun again."""
        first, last = self.before.total(name, **labels), self.after.total(name, **labels)
        return last - first if last >= first else last

    def rate(self, name: str, **labels: str) -> float:
        """The same in a second."""
        return self.rise(name, **labels) / self.seconds if self.seconds > 0 else 0.0

    def quantile(self, name: str, share: float) -> float | None:
        """The value of a histogram that `share` of the new ones do not exceed, as Prometheus estimates it; None when
        there are no new ones."""
        bounds = sorted(self.after.values_of(f"{name}_bucket", "le"), key=float)
        rises = [self.rise(f"{name}_bucket", le=bound) for bound in bounds]
        if not rises or not rises[-1]:
            return None
        wanted = share * rises[-1]
        low, below = 0.0, 0.0
        for bound, count in zip(map(float, bounds), rises, strict=True):
            if count >= wanted:
                return low if math.isinf(bound) else low + (bound - low) * (wanted - below) / (count - below)
            low, below = bound, count
        return low


def metrics_url(url: str) -> str:
    """Where a server that is named by `url` has its metrics. Raises ConfigError for what is no such name."""
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and full.isprintable()
    except ValueError:
        valid = False
    if not valid or " " in full:
        raise ConfigError(f"{url!r} is no address of a server; give one such as http://localhost:8000")
    return full if parts.path.endswith("/metrics") else f"{full.rstrip('/')}/metrics"


def read(url: str, api_key: str | None) -> Reading:
    """Reads what `metrics_url` has named. Raises ConfigError when distkv does not answer there."""
    request = Request(url, headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"})
    try:
        with urlopen(request, timeout=TIMEOUT) as answer:
            text = answer.read(MOST_BYTES).decode("utf-8", "replace")
    except HTTPError as error:
        cure = "give it with --api-key or DISTKV_API_KEY" if error.code in (401, 403) else "is that distkv's address?"
        key = "wants an API key" if error.code in (401, 403) else f"answers {error.code} {error.reason}"
        raise ConfigError(f"{url} {key}; {cure}") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(f"nothing answers at {url} ({reason}); does `distkv serve` run there?") from error
    try:
        samples = {
            (one.name.removeprefix(PREFIX), frozenset(one.labels.items())): one.value
            for family in text_string_to_metric_families(text)
            for one in family.samples
            if one.name.startswith(PREFIX)
        }
    except ValueError:
        samples = {}
    if not samples:
        raise ConfigError(f"{url} has no metrics of distkv; give the address of `distkv serve`")
    return Reading(samples)
