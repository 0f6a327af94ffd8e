"""What of ``k8s/components/monitoring`` nobody writes by hand."""

from __future__ import annotations

from pathlib import Path

import yaml

from hycluster.errors import SettingsError
from hycluster.monitoring.alerts import prometheus_rule
from hycluster.settings.objectives import Objectives

FOLDER = Path("k8s/components/monitoring")
RULES = "rules.yaml"
HEAD = "# Made by `hycluster metrics render`; a test compares.\n"


def monitoring_files(objectives: Objectives) -> dict[Path, str]:
    """Texts by their path in the repository.

    Raises:
        SettingsError: Grafana's library is not here.
    """
    try:
        from hycluster.monitoring.dashboards import dashboard_files
    except ModuleNotFoundError as error:
        raise SettingsError(f"{error.name} is not installed; pip install 'hycluster[k8s]'") from None
    dashboards = {FOLDER / "dashboards" / name: text for name, text in dashboard_files().items()}
    rules = HEAD + yaml.safe_dump(prometheus_rule(objectives), sort_keys=False, width=120, allow_unicode=True)
    return dashboards | {FOLDER / RULES: rules}
