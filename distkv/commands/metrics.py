"""The commands that look at a server's metrics: `distkv top` and `distkv metrics ...`."""

from typing import Annotated

import typer

metrics = typer.Typer(help="Dashboards for what a server tells of itself.")


@metrics.command("dashboard")
def metrics_dashboard() -> None:
    """Print a dashboard for Grafana, as JSON to be imported there."""
    from distkv.metrics.dashboard import dashboard

    print(dashboard(), end="")


def top(
    url: Annotated[str, typer.Argument(help="Address of a server, such as http://localhost:8000.")],
    api_key: Annotated[
        str | None, typer.Option(help="The server's key, if it has one.", envvar="DISTKV_API_KEY", show_envvar=True)
    ] = None,
) -> None:
    """Show once a second what a server is doing: requests, tokens, latencies, tiers; Ctrl-C ends it."""
    from rich.console import Console

    from distkv.metrics.top import watch

    watch(Console(highlight=False), url, api_key)
