"""A patch is for one version of a library, and for no other."""

from __future__ import annotations

import importlib


class WrongVersion(ImportError):
    """A patch is for another version of a library than the one that is installed."""


def pinned_to(library: str, version: str, patch: str) -> None:
    """Refuse to go on with any other version; called before a patch imports what it changes.

    Args:
        library: by the name that it is imported by.
        version: without the label of a build, such as ``+cpu``.
        patch: the module of the patch.

    Raises:
        WrongVersion: names the patch, its version and the one that is installed.
    """
    installed = importlib.import_module(library).__version__
    if installed.partition("+")[0] != version:
        raise WrongVersion(
            f"{patch} is for {library} {version}, and {installed} is installed: install {library} {version}, or see"
            " whether this version still needs the patch (docs/reaches.md) and name it there"
            + (
                "; VLLM_PLUGINS without 'hycluster' keeps a bare `vllm serve` from loading it"
                if library == "vllm"
                else ""
            )
        )
