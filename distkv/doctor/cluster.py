"""The Ray cluster, if one is asked for or one runs here."""

import os
from collections.abc import Iterator

from distkv.doctor.finding import Finding, fine, problem, warning
from distkv.errors import ConfigError


def check_cluster(address: str | None) -> Iterator[Finding]:
    """Joins a cluster and looks at its nodes; without an address the one that runs on this machine, if any. None is
    started."""
    try:
        import ray
    except ImportError as error:
        yield problem("Ray", f"cannot be imported ({error})", "pip install ray, for more than one rank")
        return
    from distkv.workers.group.ray_cluster import connect, disconnect

    try:
        connect(address or "auto", None)
    except ConfigError as error:
        if address is None:
            yield fine("Ray", f"{ray.__version__}, no cluster runs here; several ranks start one for themselves")
        else:
            yield problem("Ray", str(error), "see above")
        return
    try:
        yield from _check_nodes()
    finally:
        disconnect()


def _check_nodes() -> Iterator[Finding]:
    import ray

    alive = sum(node["Alive"] for node in ray.nodes())
    total, free = ray.cluster_resources(), ray.available_resources()
    kinds = [f"{free.get(kind, 0):g} of {total[kind]:g} {kind}s free" for kind in ("GPU", "CPU") if kind in total]
    said = f"{ray.__version__}, {alive} nodes, {', '.join(kinds)}"
    if dead := len(ray.nodes()) - alive:
        said += f", {dead} nodes are dead"
    said += f", tokens {os.environ.get('RAY_AUTH_MODE', 'disabled')}"
    if not total.get("GPU") and not total.get("CPU"):
        yield warning("Ray", said, "start nodes with `ray start --num-cpus=N` or GPUs")
    else:
        yield fine("Ray", said)
