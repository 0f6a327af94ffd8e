"""What an error's message must not tell is cut out of it in time that is in proportion to its length.

What: the four searches of vLLM's ``sanitize_message`` (addresses, lines of tracebacks, paths) find the same and never
go over a stretch of text twice; what is longer than anybody reads is cut off before.
Why: messages repeat what callers wrote, and the searches are quadratic in a run of blanks and cubic in one like
``/a/a/a``: 10,000 characters of it, as the name of a model that there is not, took 49 s, in which nothing else ran in
the ingress process. A name of 10 MB came back as an error of 10 MB.
Upstream: none filed.
Version: vLLM 0.32.0. Applied in whatever process has vLLM's API app. Watched by
``tests/engine/patches/test_error_messages.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import re
from types import SimpleNamespace
from typing import Any

from vllm.entrypoints.serve.exception_handling import utils

MOST_CHARACTERS = 8192
# By the first words of vLLM's own, in its order. What is taken is not given back, and what could not begin at the start
# of a run of blanks is not tried again within it.
_FIRST = " at 0x"
_LINEAR: dict[str, re.Pattern[str]] = {
    _FIRST: re.compile(r" at 0x[0-9a-fA-F]++>"),
    r"\n?\s*File": re.compile(r'(?<!\s)\s*+File "[^"]++", line \d++, in \S++(?:\n\s++.*+)?+'),
    "/(?:home": re.compile(r"/(?:home|usr|opt|var|tmp|root|lib|mnt|srv)(?:/[\w.\-]++)++"),
    r"(?:/[\w\-]+)+": re.compile(r"(?P<run>(?:/[\w\-]++)++)(?P<suffix>\.\w++)?+"),
}


def patch_error_messages() -> None:
    """Have vLLM search like that; once is enough."""
    # Its function is imported by name in many places, and asks for this by name.
    module: Any = utils
    module.re = SimpleNamespace(sub=_sub)


def _sub(pattern: str, instead: str, text: str) -> str:
    if pattern.startswith(_FIRST) and len(text) > MOST_CHARACTERS:
        text = f"{text[:MOST_CHARACTERS]}... ({len(text) - MOST_CHARACTERS} characters more)"
    linear = next(linear for words, linear in _LINEAR.items() if pattern.startswith(words))
    if "run" not in linear.groupindex:
        return linear.sub(instead, text)

    def path(found: re.Match[str]) -> Any:
        # Two parts at least, and a file's suffix.
        return instead if found["suffix"] and found["run"].count("/") > 1 else found[0]

    return linear.sub(path, text)
