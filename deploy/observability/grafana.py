"""Converts our dashboards from data to Grafana's JSON, with Grafana's SDK."""

from collections.abc import Iterator

from grafana_foundation_sdk.builders import common as common_builder
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as model
from observability.panels import Dashboard, Panel, Row

_TAG = "quire"
_SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
_RAY = {"Ray Serve": "rayServeDashboard", "Ray cluster": "rayDefaultDashboard"}
"""Ray's own dashboards, by their uids."""


def dashboard_json(dashboard: Dashboard) -> str:
    """Return the file for Grafana: rows in order, panels side by side."""
    made = (
        build.Dashboard(dashboard.title)
        .uid(dashboard.uid)
        .description(dashboard.description)
        .tags([_TAG])
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .readonly()
    )
    for variable in (_datasource(), _application()):
        made.with_variable(variable)
    for link in _links():
        made.link(link)
    numbers = iter(range(1, 1000))
    for row in dashboard.rows:
        made.with_row(build.Row(row.title).id(next(numbers)))
        for panel in row.panels:
            made.with_panel(_panel(row, panel).id(next(numbers)))
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


def _panel(row: Row, panel: Panel) -> stat.Panel | timeseries.Panel:
    made = _number(row, panel) if panel.single else _course(row, panel)
    made.title(panel.title).description(panel.meaning).unit(panel.unit).datasource(_SOURCE)
    for letter, query in zip("ABCDEFGH", panel.queries, strict=False):
        made.with_target(
            prometheus.Dataquery()
            .expr(query.expression)
            .legend_format(query.legend)
            .ref_id(letter)
            .datasource(_SOURCE)
        )
    return made


def _number(row: Row, panel: Panel) -> stat.Panel:
    singles = sum(each.single for each in row.panels)
    return stat.Panel().height(4).span(24 // singles).graph_mode(common.BigValueGraphMode.AREA)


def _course(row: Row, panel: Panel) -> timeseries.Panel:
    made = timeseries.Panel().height(8).span(8).min(0).fill_opacity(10)
    if panel.stacked:
        made.fill_opacity(40).stacking(common_builder.StackingConfig().mode(common.StackingMode.NORMAL))
    return made.legend(
        common_builder.VizLegendOptions()
        .display_mode(common.LegendDisplayMode.LIST)
        .placement(common.LegendPlacement.BOTTOM)
        .show_legend(True)
    )


def _datasource() -> build.DatasourceVariable:
    return build.DatasourceVariable("datasource").label("Prometheus").type("prometheus")


def _application() -> build.QueryVariable:
    return (
        build.QueryVariable("application")
        .label("Application")
        .datasource(_SOURCE)
        .query("label_values(ray_quire_replica_up, application)")
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .include_all(True)
        .all_value(".*")
        .current(model.VariableOption(selected=True, text="All", value="$__all"))
    )


def _links() -> Iterator[build.DashboardLink]:
    yield build.DashboardLink("Quire").type(model.DashboardLinkType.DASHBOARDS).tags([_TAG]).keep_time(True)
    for title, uid in _RAY.items():
        link = build.DashboardLink(title).type(model.DashboardLinkType.LINK).icon("dashboard")
        yield link.url(f"/d/{uid}").keep_time(True)
