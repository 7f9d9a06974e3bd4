"""A dashboard for Grafana. It is a file as Grafana exports it, so that it can be changed there and exported again."""

from importlib.resources import files


def dashboard() -> str:
    """The dashboard as JSON; it asks for a Prometheus data source, and shows one model, several or all."""
    return files("distkv.metrics").joinpath("grafana.json").read_text(encoding="utf-8")
