"""Settings as a text that people read."""

from __future__ import annotations

from typing import Any

import yaml


class _Yaml(yaml.SafeDumper):
    """Texts of several lines are written as they read, and nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # YAML's other line ends come back as another one, or not at all, unless they are escaped.
        escaped = any(end in text for end in "\x85\u2028\u2029")
        return self.represent_scalar(
            "tag:yaml.org,2002:str", text, style='"' if escaped else "|" if "\n" in text else None
        )


_Yaml.add_representer(str, _Yaml.represent_text)


def as_yaml(data: dict[str, Any]) -> str:
    """A YAML document that people can read."""
    return str(yaml.dump(data, Dumper=_Yaml, sort_keys=False, allow_unicode=True, width=100))
