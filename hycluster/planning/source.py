"""A model's configuration, from wherever its source is: a folder, a file, the Hugging Face cache, or the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hycluster.errors import SettingsError, one_line, shown
from hycluster.explain import near_file
from hycluster.planning.families import read_config

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_ANSWER_S = 15.0


def is_hub_id(source: str) -> bool:
    """Whether it can be one, and is nothing on this disk."""
    return not Path(source).expanduser().exists() and HUB_ID.fullmatch(source) is not None


def source_config(source: str, field: str, revision: str | None = None) -> dict[str, Any]:
    """The ``config.json`` of a model.

    Args:
        source: a folder, a file, or a hub id (``org/name``).
        field: what the user gave it by, for errors.
        revision: of the hub's repository.

    Raises:
        SettingsError: it is nowhere, or is no such file; says where it was looked for.
    """
    path = Path(source).expanduser()
    if path.exists():
        return read_config(path)
    if not is_hub_id(source) or source.endswith((".json", ".yaml", ".yml")):
        raise SettingsError(
            f"{field}: {shown(source, 200)}: no such file or folder{near_file(path)}; must be a model's config.json, a"
            " folder that has one, or a hub id (org/name)"
        )
    return _cached(source, revision) or _fetched(source, field, revision)


def _cached(source: str, revision: str | None) -> dict[str, Any] | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "config.json", revision=revision)
    return read_config(found) if isinstance(found, str) else None


def _fetched(source: str, field: str, revision: str | None) -> dict[str, Any]:
    """By one request; the hub's own client tries for half a minute where there is no network."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    where = f"{field}: {shown(source)}"
    url = f"{constants.ENDPOINT}/{source}/resolve/{quote(revision or 'main', safe='')}/config.json"
    nowhere = (
        f"{where}: no such folder, its config.json is not in the Hugging Face cache ({constants.HF_HUB_CACHE}), and"
    )
    if constants.HF_HUB_OFFLINE:
        raise SettingsError(f"{nowhere} HF_HUB_OFFLINE forbids to ask {constants.ENDPOINT}")
    try:
        answer = httpx.get(url, headers=build_hf_headers(), follow_redirects=True, timeout=_ANSWER_S)
    except httpx.HTTPError as error:
        raise SettingsError(f"{nowhere} {constants.ENDPOINT} can't be reached: {one_line(error)}") from None
    if answer.status_code in (401, 403):
        raise SettingsError(
            f"{where}: {constants.ENDPOINT} has no such model, or does not let you read it; HF_TOKEN says who you are"
        )
    if answer.status_code == 404:
        raise SettingsError(f"{where}: {constants.ENDPOINT} has no such model, or no config.json in it")
    if answer.status_code != 200:
        raise SettingsError(f"{where}: {constants.ENDPOINT} answers with status {answer.status_code}")
    try:
        config = answer.json()
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise SettingsError(f"{where}: its config.json on {constants.ENDPOINT} is no JSON object")
    return config
