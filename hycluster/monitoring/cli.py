"""``hycluster metrics``: what there is to be seen under ``/metrics``, and the dashboards and alerts over it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hycluster.terminal import echo

app = typer.Typer(
    name="metrics", help="What the metrics under /metrics are; dashboards and alerts over them.", no_args_is_help=True
)


@app.callback()
def metrics() -> None:
    """What the metrics under /metrics are; dashboards and alerts over them."""


@app.command(name="reference")
def metrics_reference() -> None:
    """Print the reference of all metrics of hycluster's own, in Markdown: docs/metrics.md."""
    from hycluster.observe.catalogue import metrics_page

    echo(metrics_page(), nl=False)


@app.command()
def rules(
    config: Annotated[
        Path | None, typer.Argument(help="Settings file, for its objectives; default: deployments/local.yaml.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change one setting, such as objectives.first_token_s=1; repeatable."
        ),
    ] = None,
) -> None:
    """Print the alerts as a rule file of Prometheus, for the objectives of the settings.

    hycluster metrics rules settings.yaml > /etc/prometheus/hycluster.yml
    """
    import yaml

    from hycluster.monitoring.alerts import rule_groups
    from hycluster.settings.read import load_settings

    groups = rule_groups(load_settings(config, assignments or []).objectives)
    echo(yaml.safe_dump({"groups": groups}, sort_keys=False, width=120, allow_unicode=True), nl=False)


@app.command(name="render")
def render_monitoring(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 if a file is not as it would be.")
    ] = False,
) -> None:
    """Write the dashboards and alerts in k8s/components/monitoring. Run it in the repository."""
    from hycluster.monitoring.files import FOLDER, monitoring_files
    from hycluster.settings.objectives import Objectives

    files = monitoring_files(Objectives())
    made = {*FOLDER.glob("dashboards/*.json")}
    behind = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    gone = sorted(made - files.keys())
    for path in behind:
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path], encoding="utf-8")
        echo(f"{path}: differs from the code" if check else f"{path}: written", err=check)
    for path in gone:
        if not check:
            path.unlink()
        echo(f"{path}: nothing makes it any more" if check else f"{path}: removed", err=check)
    if not behind and not gone:
        echo("all as the code says")
    raise typer.Exit(1 if check and (behind or gone) else 0)
