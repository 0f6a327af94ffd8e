"""Configurations of published models; only the fields that sizes depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hycluster.planning.architecture import Architecture
from hycluster.planning.families import architecture

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "published"
PATHS = {path.stem: path for path in sorted(FOLDER.glob("*.json"))} | {
    f"hunyuan-{size}": ROOT / "hycluster" / "models" / f"hunyuan_{size}.json" for size in ("large", "a13b")
}


def published(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(PATHS[name].read_text())
    return config


def shape(name: str) -> Architecture:
    return architecture(published(name))
