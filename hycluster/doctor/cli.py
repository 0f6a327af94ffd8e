"""``hycluster doctor``: one line for each thing that serving needs, with what to do where it is not as it must be."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from hycluster import __file__ as package
from hycluster.doctor.finding import Finding
from hycluster.settings.base import home
from hycluster.settings.read import DEFAULT_SETTINGS, load_settings
from hycluster.settings.settings import Settings
from hycluster.terminal import console, echo

SHM = Path("/dev/shm")
COLOURS = {"ok": "green", "warn": "yellow", "bad": "red"}


def doctor(
    config: Annotated[
        Path | None, typer.Argument(help=f"Settings file; default: {DEFAULT_SETTINGS}, or the embedded model.")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; repeatable.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Ray cluster to look at; default: RAY_ADDRESS.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look whether this machine can serve the settings of CONFIG, and say what to do where it can't.

    Changes nothing, but that it writes an empty file into the stores of the Batch API and of the usage ledger and
    deletes it again.

    Exits 0 when nothing is bad (warnings may be there), 1 when something is, 2 when the settings are wrong.
    """
    found = findings(load_settings(config, assignments or []), address)
    if as_json:
        echo(json.dumps({"findings": [dataclasses.asdict(each) for each in found]}))
    else:
        _print(found)
    raise typer.Exit(1 if any(each.verdict == "bad" for each in found) else 0)


def findings(settings: Settings, address: str | None) -> list[Finding]:
    """All looks, one after the other."""
    from hycluster.doctor import machine_checks, service_checks
    from hycluster.memory import usage

    shm = shutil.disk_usage(SHM) if SHM.is_dir() else None
    return [
        *machine_checks.installed(machine_checks.version_of, machine_checks.requirements()),
        machine_checks.variables_found(os.environ),
        machine_checks.processor(machine_checks.cpu_flags(), platform.machine()),
        machine_checks.gpus(settings),
        machine_checks.memory(settings, usage()),
        *([machine_checks.shared_memory(shm.total, shm.free)] if shm else []),
        machine_checks.disk("HYCLUSTER_HOME", home()),
        machine_checks.disk("Ray's files", Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())),
        machine_checks.open_files(machine_checks.most_open_files()),
        machine_checks.wall_clock(time.time(), Path(package).stat().st_mtime, machine_checks.clock_state()),
        *service_checks.ports(settings),
        service_checks.ray_cluster(address),
        service_checks.store(settings.batches),
        service_checks.ledger(settings),
        service_checks.database(settings.auth),
        service_checks.certificate(settings.auth),
    ]


def _print(found: list[Finding]) -> None:
    from rich.text import Text

    screen = console()
    for each in found:
        screen.print(
            Text.assemble((f"{each.verdict:<5}", COLOURS[each.verdict]), (f"{each.name}: ", "bold"), each.what),
            soft_wrap=True,
        )
        if each.todo:
            screen.print(Text(f"      -> {each.todo}", "bold"), soft_wrap=True)
    bad, warned = (sum(each.verdict == verdict for each in found) for verdict in ("bad", "warn"))
    screen.print("all is well" if not bad + warned else f"{bad} bad, {warned} to look at")
