"""What ``hycluster serve`` was asked to serve: a settings file, a model, or nothing in particular."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hycluster.engine.weights import prepare
from hycluster.errors import SettingsError, shown
from hycluster.planning.machine import Available, of_nodes, this_machine
from hycluster.planning.source import source_config
from hycluster.planning.suggest import Suggestion, suggest
from hycluster.planning.write import write_settings_file
from hycluster.settings.base import home
from hycluster.settings.embedded import EMBEDDED_SOURCE, embedded_settings
from hycluster.settings.read import DEFAULT_SETTINGS, load_settings, override, validate
from hycluster.settings.settings import Settings

SETTINGS_FILES = (".yaml", ".yml", ".json")


def asked_settings(
    what: str | None, assignments: Sequence[str], save: Path | None, say: Callable[[str], None]
) -> Settings:
    """The settings to serve with; those that nobody wrote are shown.

    Args:
        what: a settings file, or a model's folder, hub id or ``package:NAME``; None is deployments/local.yaml where
            there is one, else the embedded model.
        save: where to write what was made up here.

    Raises:
        SettingsError: there is no such thing, it does not fit this machine, or a setting is wrong.
    """
    if what is None and not DEFAULT_SETTINGS.exists():
        say(f"no settings file and no model was named, and there is no {DEFAULT_SETTINGS} here: the embedded model")
        what = EMBEDDED_SOURCE
    if what is None or _is_file(what):
        path = DEFAULT_SETTINGS if what is None else Path(what)
        if save is not None:
            raise SettingsError(f"--save: is for the settings of a MODEL; {path} is a settings file already")
        return load_settings(path, assignments)
    made = _suggested(what)
    text = made.text(shlex.join(["hycluster", "serve", what]))
    settings = validate(Settings, override(made.settings, assignments, Settings), what)
    say(text)
    if assignments:
        say(f"# and by --set: {', '.join(assignments)}")
    if save is not None:
        write_settings_file(save, text, overwrite=False, option="--save")
        say(f"written: {save}; from now on 'hycluster serve {shlex.quote(str(save))}' does the same")
    return settings


def _is_file(what: str) -> bool:
    return Path(what).is_file() or (what.endswith(SETTINGS_FILES) and not Path(what).is_dir())


def _suggested(what: str) -> Suggestion:
    if what == EMBEDDED_SOURCE:
        return Suggestion(embedded_settings(), ("the model that comes along, for a CPU",))
    files = str(prepare(what, home()))
    config = source_config(files, "MODEL")
    source = str(Path(what).expanduser().resolve()) if Path(what).expanduser().is_dir() else what
    return suggest(source, config, _hardware())


def _hardware() -> Available:
    """Of the cluster that is named, or of this machine."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return this_machine()
    import ray

    from hycluster import cluster

    cluster.join_cluster()
    nodes: list[dict[str, Any]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return of_nodes(nodes, f"the Ray cluster {shown(address)}")
