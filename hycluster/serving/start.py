"""When a start is over, model by model: what serves, serves on, whatever becomes of the rest. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from hycluster.directory.directory import Overview
from hycluster.errors import EngineStartFailed, HyclusterError, SettingsError, one_line, reported
from hycluster.settings.settings import Settings


def ready_models(settings: Settings, overview: Overview, *, elapsed_s: float) -> list[str] | None:
    """Names of the models that are served, once nothing is to be waited for; None before.

    Waited for is a model that may yet serve for the first time: it has not failed, and ``start_timeout_s`` is not over.
    One that has failed is tried on; it is no reason to keep the others' callers waiting. A model that serves is waited
    for until no ingress process is left that would refuse its requests.
    """
    able = [model.name for model in settings.models if overview.ready.get(model.name) or model.name in overview.asleep]
    if not able:
        return None
    late = [model.name for model in settings.models if model.name not in able and model.name not in overview.troubles]
    late += overview.unreached & set(able)
    return able if not late or elapsed_s > settings.start_timeout_s else None


def end_of_hope(
    settings: Settings, overview: Overview, reports: Iterable[str], *, elapsed_s: float
) -> HyclusterError | None:
    """Why a service that has never served will not do so either; None while it may.

    Args:
        reports: what Serve says of its deployments.
    """
    reports = [report for report in reports if report]
    told = "; ".join(f"{name}: {trouble.told()}" for name, trouble in overview.troubles.items())
    if all(model.name in overview.troubles and overview.troubles[model.name].hopeless for model in settings.models):
        return SettingsError("; ".join(overview.troubles[model.name].reason for model in settings.models))
    # Ingress processes fail for settings only: theirs, or what no machine here can give them.
    for report in reports:
        if isinstance(error := reported(report), SettingsError) and not told:
            return error
    if elapsed_s > settings.start_timeout_s:
        state = told or one_line(" ".join(reports)) or "no reason is known"
        return EngineStartFailed(
            f"start_timeout_s: no model could be served after {settings.start_timeout_s:g} s: {state}"
        )
    return None
