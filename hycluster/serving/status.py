"""``hycluster status``: what of a running service is there, what is missing, and why."""

from __future__ import annotations

from hycluster.app import deployment_of
from hycluster.directory.directory import Overview
from hycluster.errors import SettingsError
from hycluster.serving.ray_state import Look


def status_lines(look: Look) -> tuple[list[str], bool]:
    """A line for each part, and whether all is well.

    Raises:
        SettingsError: nothing runs here.
    """
    if look.controller is not None and look.deployments is None:
        raise SettingsError(
            "RAY_ADDRESS: no hycluster is running in this Ray cluster; start one with 'hycluster serve'"
        )
    overview, deployments = look.overview or Overview(), look.deployments or {}
    lines, well = [], look.controller is not None and look.overview is not None
    for model in sorted(overview.ready):
        deployment, ready = deployments.get(deployment_of(model)), overview.ready[model]
        if deployment is None:
            continue
        line = f"model {model}: {ready} of {deployment.wanted} replicas serve"
        if trouble := overview.troubles.get(model):
            line += f"; {trouble.told()}; next try in {trouble.retry_in_s:.0f} s"
        lines.append(line)
        well &= ready >= deployment.wanted and trouble is None
    for name, called in (("ingress", "ingress processes"), ("batches", "batch executor")):
        if deployment := deployments.get(name):
            there = sum(process.deployment == name for process in look.processes.values())
            lines.append(f"{called}: {there} of {deployment.wanted} there")
            well &= there >= deployment.wanted
    lines.append(f"Serve's controller: {'there' if look.controller else 'does not answer'}")
    lines.append(f"directory: {f'there (pid {overview.pid})' if look.overview else 'does not answer'}")
    lines.append(f"nodes: {len(look.nodes)} ({', '.join(sorted(look.nodes.values()))})")
    return lines, well
