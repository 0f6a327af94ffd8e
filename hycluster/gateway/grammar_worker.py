"""A process that tries out what a caller wants outputs to look like, so that no other process needs to.

It does with a schema, a regex or a grammar whatever vLLM may do with it before it compiles it for a vocabulary, and
says nothing of whether it is any good: vLLM does that. Its own end, by a limit or by a fault of the libraries', is the
answer that it costs too much (``hycluster/gateway/grammars.py``).

Started as a script: it imports the two libraries and nothing of vLLM, torch or transformers, and is there within half a
second. For that, xgrammar's package is imported past its ``__init__``, which asks for both.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import json
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable
from typing import IO, Any, Literal

LENGTH = struct.Struct(">I")
# What is left behind by the last one counts against the next: beyond this a fresh process takes over.
STALE_BYTES = 64 << 20


def read(stream: IO[bytes]) -> Any:
    """The next message.

    Raises:
        EOFError: there is none.
    """
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    (length,) = LENGTH.unpack(head)
    body = stream.read(length)
    if len(body) < length:
        raise EOFError
    return json.loads(body)


def write(stream: IO[bytes], message: Any) -> None:
    body = json.dumps(message).encode()
    stream.write(LENGTH.pack(len(body)) + body)
    stream.flush()


class Libraries:
    """What vLLM validates with."""

    def __init__(self) -> None:
        import_xgrammar()
        import llguidance
        from xgrammar.grammar import Grammar
        from xgrammar.structural_tag import StructuralTagItem

        self.xgrammar, self.tag_item = Grammar, StructuralTagItem
        self.guidance = llguidance
        self.outlines = importlib.import_module("outlines_core.json_schema")
        self._tokenizers: dict[str, Any] = {}

    def learn(self, tokenizer: str) -> None:
        """Special tokens may be named in grammars."""
        self._tokenizers = {"": self.guidance.LLTokenizer(tokenizer)}

    def tries(self, kind: str, spec: str) -> list[Callable[[], object]]:
        """Everything that may be done with it."""
        if kind == "json":
            tries: list[Callable[[], object]] = [
                lambda: self.xgrammar.from_json_schema(spec),
                lambda: self._guide_schema(spec),
            ]
            if "patternProperties" in spec:
                tries.append(lambda: self.outlines.build_regex_from_schema(spec))
            return tries
        if kind == "regex":
            return [lambda: self.xgrammar.from_regex(spec), lambda: self._guide("regex", spec)]
        if kind == "choice":
            choices = json.loads(spec)
            ebnf = "root ::= " + " | ".join(json.dumps(choice) for choice in choices)
            return [lambda: self.xgrammar.from_ebnf(ebnf), lambda: self._guide("choice", spec)]
        if kind == "grammar":
            return [
                lambda: self.xgrammar.from_ebnf(spec),
                lambda: self.xgrammar.from_lark(spec),
                lambda: self._guide("grammar", spec),
            ]
        return [lambda: self._tag(json.loads(spec))]

    def _tag(self, tag: Any) -> None:
        if "structures" not in tag:
            self.xgrammar.from_structural_tag(json.dumps(tag))
            return
        structures = tag["structures"]
        for one in structures:
            self._guide_schema(json.dumps(one["schema"]))
        items = [self.tag_item(begin=s["begin"], schema=json.dumps(s["schema"]), end=s["end"]) for s in structures]
        self.xgrammar.from_structural_tag(items, tag["triggers"])

    def _guide_schema(self, schema: str) -> None:
        matcher = self.guidance.LLMatcher
        grammar = matcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": True})
        matcher.validate_grammar(grammar, None)

    def _guide(self, kind: Literal["regex", "choice", "grammar"], spec: str) -> None:
        grammar = self.guidance.grammar_from(kind, spec)
        self.guidance.LLMatcher.validate_grammar(grammar, self._tokenizers.get(""))


def import_xgrammar() -> None:
    """Its modules that turn text into grammars, without torch and transformers."""
    spec = importlib.util.find_spec("xgrammar")
    assert spec is not None
    package = types.ModuleType("xgrammar")
    package.__path__ = list(spec.submodule_search_locations or ())
    package.__spec__ = importlib.machinery.ModuleSpec("xgrammar", None, is_package=True)
    sys.modules["xgrammar"] = package
    # None is how Python says that there is no such module; tvm_ffi does without it.
    sys.modules["torch"] = None  # type: ignore[assignment]
    importlib.import_module("xgrammar.load_binding")


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def address_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def main(cpu_s: float, memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    libraries = Libraries()
    write(answers, "ready")
    before = resident_bytes()
    with contextlib.suppress(EOFError):
        while resident_bytes() < before + STALE_BYTES:
            request = read(requests)
            if request["tokenizer"] is not None:
                libraries.learn(request["tokenizer"])
                before = resident_bytes()
            most = address_bytes() + memory_bytes
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
            # At its end the kernel ends the process; a handler of Python's would not be asked within a library.
            signal.setitimer(signal.ITIMER_PROF, cpu_s)
            write(answers, {"memory": _out_of_memory(libraries, request["kind"], request["spec"])})
            signal.setitimer(signal.ITIMER_PROF, 0)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _out_of_memory(libraries: Libraries, kind: str, spec: str) -> bool:
    tries: list[Callable[[], object]] = []
    try:
        tries = libraries.tries(kind, spec)
    except MemoryError:
        return True
    except (ValueError, RecursionError):
        return False
    for one in tries:
        try:
            one()
        except MemoryError:
            return True
        except Exception as error:
            # That it is no good is vLLM's to say.
            if "bad_alloc" in str(error):
                return True
    return False


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
