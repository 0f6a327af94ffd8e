"""``hycluster metrics``: what there is to be seen under ``/metrics``, and the dashboards and alerts over it."""

from __future__ import annotations

from typing import Annotated

import typer

from hycluster.errors import SettingsError
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
    answered_ratio: Annotated[
        float, typer.Option(metavar="RATIO", help="Of requests that were not shed, those that are to be answered.")
    ] = 0.995,
    first_token_s: Annotated[
        float, typer.Option(metavar="SECONDS", help="Within so long the first token is to come.")
    ] = 2.5,
    first_token_ratio: Annotated[
        float, typer.Option(metavar="RATIO", help="Of requests, those of which it is to.")
    ] = 0.95,
) -> None:
    """Print the alerts as a rule file of Prometheus, for other objectives too.

    hycluster metrics rules --first-token-s 1 > /etc/prometheus/hycluster.yml
    """
    import yaml

    from hycluster.monitoring.alerts import FIRST_TOKEN_BOUNDS_S, rule_groups
    from hycluster.objectives import Objectives

    for option, ratio in (("--answered-ratio", answered_ratio), ("--first-token-ratio", first_token_ratio)):
        if not 0 < ratio < 1:
            raise SettingsError(f"{option}: {ratio:g} is not allowed; must be above 0 and below 1")
    if first_token_s not in FIRST_TOKEN_BOUNDS_S:
        bounds = ", ".join(f"{bound:g}" for bound in FIRST_TOKEN_BOUNDS_S)
        raise SettingsError(
            f"--first-token-s: {first_token_s:g} is not allowed; must be a bound of vLLM's histogram: {bounds}"
        )
    groups = rule_groups(Objectives(answered_ratio, first_token_s, first_token_ratio))
    echo(yaml.safe_dump({"groups": groups}, sort_keys=False, width=120, allow_unicode=True), nl=False)


@app.command(name="render")
def render_monitoring(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 if a file is not as it would be.")
    ] = False,
) -> None:
    """Write the dashboards and alerts in k8s/components/monitoring. Run it in the repository."""
    from hycluster.monitoring.files import FOLDER, monitoring_files
    from hycluster.objectives import Objectives

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
