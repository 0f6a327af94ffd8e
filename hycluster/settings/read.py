"""From YAML and ``--set`` to checked settings; every error names the field, the value and what is allowed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from hycluster.errors import SettingsError, shown
from hycluster.explain import explain, near_file
from hycluster.settings.api import PATHS
from hycluster.settings.embedded import embedded_settings
from hycluster.settings.settings import Settings
from hycluster.settings.texts import takes_text
from hycluster.settings.unique_keys import TwiceError, read_yaml

DEFAULT_SETTINGS = Path("deployments/local.yaml")
M = TypeVar("M", bound=BaseModel)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        SettingsError: the file is missing, is no YAML, gives a key twice, or is no mapping.
    """
    path = Path(path)
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file{near_file(path)}") from None
    except OSError as error:
        raise SettingsError(f"{path}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: is not text in UTF-8") from error
    except TwiceError as error:
        raise SettingsError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if data is None:
        raise SettingsError(f"{path}: is empty; must be a mapping of settings")
    if not isinstance(data, dict):
        raise SettingsError(f"{path}: must be a mapping of settings, not {type(data).__name__}")
    return data


def override(data: dict[str, Any], assignments: Sequence[str], kind: type[BaseModel] | None = None) -> dict[str, Any]:
    """Apply ``--set a.b.c=VALUE`` to a copy of ``data``.

    VALUE is YAML, but where the setting is a text: then it is the text as it stands, and ``null`` only is none.
    Numbers index into lists: ``models.0.name=x``.

    Args:
        kind: the settings class of ``data``, which knows what is a text; without it all is YAML.
    """
    result: dict[str, Any] = copy.deepcopy(data)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise SettingsError(f"--set: {shown(assignment)} must be of the form KEY=VALUE")
        *parents, last = path = key.split(".")
        value = _value(text, as_it_stands=kind is not None and takes_text(kind, path))
        target: Any = result
        try:
            for part in parents:
                target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
            target[int(last) if isinstance(target, list) else last] = value
        except (TypeError, ValueError, IndexError, AttributeError):
            raise SettingsError(f"--set: {shown(key)} names no place in the settings") from None
    return result


def _value(text: str, *, as_it_stands: bool) -> Any:
    if as_it_stands:
        return None if text == "null" else text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def validate(kind: type[M], data: dict[str, Any], where: str) -> M:
    """Turn a mapping into settings of a kind.

    Raises:
        SettingsError: one line for each wrong field, with its value and what is allowed.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise SettingsError("\n".join(explain(kind, error, where))) from None


def load_settings(path: str | Path | None = None, assignments: Sequence[str] = ()) -> Settings:
    """Read and check a deployment's settings.

    Args:
        path: None is deployments/local.yaml where there is one, else the embedded model's settings.

    Raises:
        SettingsError: names the file, the field, the value and what is allowed.
    """
    if path is None and not DEFAULT_SETTINGS.exists():
        return validate(Settings, override(embedded_settings(), assignments, Settings), "the embedded model's settings")
    path = Path(path or DEFAULT_SETTINGS)
    read = load_yaml(path)
    if "task" in read and "models" not in read:
        raise SettingsError(
            f"{path}: is a batch job, not a deployment's settings; 'hycluster batch run {path}' takes it"
        )
    data = override(read, assignments, Settings)
    _resolve_paths(data, path.parent)
    return validate(Settings, data, str(path))


def _resolve_paths(data: dict[str, Any], folder: Path) -> None:
    """Files that ``api`` names relative to the settings file: processes of the service run elsewhere."""
    models = data.get("models")
    for model in models if isinstance(models, list) else ():
        api = model.get("api") if isinstance(model, dict) else None
        if not isinstance(api, dict):
            continue
        for name in PATHS:
            given = api.get(name)
            # A template may be there itself.
            if isinstance(given, str) and not set("{}\n") & set(given) and (found := folder / given).is_file():
                api[name] = str(found.absolute())
