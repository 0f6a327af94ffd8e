"""The dashboards as Grafana's JSON, by its own library."""

from __future__ import annotations

import json

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models

from hycluster.monitoring.panels import DASHBOARDS, DashboardSpec, PanelSpec

WIDTH, HEIGHT = 12, 8
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")


def dashboard_files() -> dict[str, str]:
    """Texts by the name of their file."""
    return {f"{spec.name}.json": _json(spec) for spec in DASHBOARDS}


def _json(spec: DashboardSpec) -> str:
    label, metric = spec.chosen_by
    page = (
        dashboard.Dashboard(spec.title)
        .uid(f"hycluster-{spec.name}")
        .description(spec.what)
        .tags(["hycluster"])
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable(label)
            .label(label.capitalize())
            .datasource(SOURCE)
            .query(f"label_values({metric}, {label})")
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
        .link(
            dashboard.DashboardLink("hycluster")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["hycluster"])
            .keep_time(True)
            .include_vars(True)
        )
    )
    for number, panel in enumerate(spec.panels, 1):
        page = page.with_panel(_panel(panel).id(number))
    return json.dumps(page.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def _panel(spec: PanelSpec) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .title(spec.title)
        .description(spec.what)
        .datasource(SOURCE)
        .unit(spec.unit)
        .min(0)
        .span(WIDTH)
        .height(HEIGHT)
        .fill_opacity(8)
        .show_points(common_models.VisibilityMode.NEVER)
        .tooltip(
            common.VizTooltipOptions()
            .mode(common_models.TooltipDisplayMode.MULTI)
            .sort(common_models.SortOrder.DESCENDING)
        )
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.TABLE)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull", "max"])
        )
    )
    for number, query in enumerate(spec.queries):
        panel = panel.with_target(
            prometheus.Dataquery()
            .ref_id(chr(ord("A") + number))
            .expr(query.promql)
            .legend_format(query.legend)
            .exemplar("_bucket" in query.promql)
            .range()
        )
    return panel
