"""YAML in which no key is given twice: of two, PyYAML takes the last without a word."""

from __future__ import annotations

from typing import Any

import yaml


class TwiceError(yaml.YAMLError):
    """A mapping has a key twice."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Before ``<<`` is filled in: what it brings may be given anew.
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            first = lines.get((key.tag, key.value))
            if first is not None:
                raise TwiceError(f"the key {key.value!r} is given twice, in lines {first} and {line}")
            lines[key.tag, key.value] = line
        return node


def read_yaml(text: str) -> Any:
    """What a text of YAML says.

    Raises:
        yaml.YAMLError: it is none, or gives a key twice (:class:`TwiceError`).
    """
    return yaml.load(text, _Loader)
