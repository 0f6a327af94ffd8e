"""What a caller in Python may write, looked at before it becomes a message.

protobuf refuses it too, and does not say what is meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hycluster.core import Priority, Sampling, is_number, is_whole_number
from hycluster.errors import InvalidInput, shown
from hycluster.ingress.proto import inference_pb2 as pb

_MESSAGE_KEYS = tuple(pb.ChatMessage.DESCRIPTOR.fields_by_name)
_MOST_TOKEN_ID = 2**32 - 1


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_list(value: object) -> bool:
    """Of anything; strings are sequences too, and never meant."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


# What a value must be, and how that is said.
Kind = tuple[Callable[[Any], bool], str]
TEXT: Kind = (is_text, "a string")
SECONDS: Kind = (lambda value: is_number(value) and value >= 0, "a number of seconds")
KINDS: dict[str, Kind] = {
    "model": TEXT,
    "prompt": TEXT,
    "messages": (is_list, "a list of messages"),
    "token_ids": (
        lambda value: not isinstance(value, (str, bytes)) and isinstance(value, Iterable),
        "a list of token ids",
    ),
    "texts": (is_list, "a list of strings, not one string"),
    "sampling": (lambda value: isinstance(value, Sampling), "a hycluster.core.Sampling"),
    "priority": (
        lambda value: isinstance(value, Priority),
        f"one of {', '.join(f'Priority.{priority.name}' for priority in Priority)}",
    ),
    "request_id": TEXT,
    "session_id": TEXT,
    "job": TEXT,
    "timeout_s": SECONDS,
}


def check_argument_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse arguments that there are not.

    Raises:
        InvalidInput: names the argument, the one that may be meant, and all that there are.
    """
    for name in given:
        _check_name(name, tuple(known), "unknown argument", name)


def _check_name(name: object, known: Sequence[str], what: str, where: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InvalidInput(f"{where}: {what}{hint} (allowed: {', '.join(known)})")


def check_arguments(**given: Any) -> None:
    """Refuse values of the wrong kind; None is an argument that was not given, but for the model.

    Raises:
        InvalidInput: names the argument, the value and what it must be.
    """
    for name, value in given.items():
        if value is None and name != "model":
            continue
        fits, allowed = KINDS[name]
        _check(name, value, fits(value), allowed)
    for place, turn in enumerate(given.get("messages") or ()):
        _check_message(f"messages[{place}]", turn)
    for place, text in enumerate(given.get("texts") or ()):
        _check(f"texts[{place}]", text, is_text(text), "a string")


def token_ids(ids: Iterable[Any]) -> list[int]:
    """Those of a prompt.

    Raises:
        InvalidInput: one of them is no token id.
    """
    listed = list(ids)
    for place, value in enumerate(listed):
        fits = is_whole_number(value) and 0 <= value <= _MOST_TOKEN_ID
        _check(f"token_ids[{place}]", value, fits, f"a whole number from 0 to {_MOST_TOKEN_ID}")
    return listed


def _check_message(where: str, turn: object) -> None:
    _check(where, turn, isinstance(turn, Mapping), "a dict with 'role' and 'content'")
    assert isinstance(turn, Mapping)
    for key, value in turn.items():
        _check_name(key, _MESSAGE_KEYS, "unknown key", f"{where}.{key}")
        _check(f"{where}.{key}", value, is_text(value), "a string")
    _check(f"{where}.role", turn.get("role"), bool(turn.get("role")), "a string that is not empty")


def _check(name: str, value: object, fits: bool, allowed: str) -> None:
    if not fits:
        raise InvalidInput(f"{name}: {shown(value)} is not allowed; must be {allowed}")
