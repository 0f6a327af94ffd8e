"""``hycluster metrics``: what there is to be seen under ``/metrics``."""

from __future__ import annotations

import typer

from hycluster.terminal import echo

app = typer.Typer(name="metrics", help="Print what the metrics under /metrics are.", no_args_is_help=True)


@app.callback()
def metrics() -> None:
    """Print what the metrics under /metrics are."""


@app.command(name="reference")
def metrics_reference() -> None:
    """Print the reference of all metrics of hycluster's own, in Markdown: docs/metrics.md."""
    from hycluster.observe.catalogue import metrics_page

    echo(metrics_page(), nl=False)
