"""How much there is in a gRPC message, told before anybody takes it apart; as ``json_shape.py`` does for JSON.

Two bytes are enough for a message within a message, of which protobuf makes 128 and Python some hundreds more: four
megabytes took half a second and a quarter of a gigabyte, and that before anybody had looked at them.
"""

from __future__ import annotations

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor

from hycluster.ingress.json_shape import members_of_text

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
# No tag and no length is longer.
_MAX_VARINT_BYTES = 10
# Texts that are JSON, and are read as such.
_JSON = {"Function.parameters", "ToolCall.arguments", "StructuredOutput.json_schema"}
_JSON_NAME = "chat_template_kwargs"


def message_kind(method: str) -> Descriptor | None:
    """What a method is asked with, by its path (``/hycluster.v1.Inference/Generate``); None if it is not known."""
    try:
        return descriptor_pool.Default().FindMethodByName(method.strip("/").replace("/", ".")).input_type
    except KeyError:
        return None


def count_members(message: bytes, kind: Descriptor, most: int) -> int:
    """Fields that are set and elements of repeated ones, in messages within it too, and what is in its JSON.

    Numbers that are packed, as all clients pack them, count as one. What can't be read is left to who parses it.

    Args:
        message: in protobuf's wire format.
        most: counting ends behind it.
    """
    found, place = 0, 0
    # Where each message that has begun ends, and what it is.
    open_messages = [(len(message), kind)]
    while open_messages and found <= most:
        end, kind = open_messages[-1]
        if place >= end:
            open_messages.pop()
            continue
        tag, place = _varint(message, place)
        found += 1
        wire = tag & 7
        if wire == _VARINT:
            _, place = _varint(message, place)
        elif wire == _BYTES:
            size, place = _varint(message, place)
            field = kind.fields_by_number.get(tag >> 3)
            if field is None:
                place += size
            elif (within := field.message_type) is not None:
                open_messages.append((min(place + size, end), within))
            else:
                if f"{kind.name}.{field.name}" in _JSON or field.name == _JSON_NAME:
                    found += members_of_text(message[place : place + size], most)
                place += size
        else:
            place += _FIXED.get(wire, 0)
    return found


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A number, and where it ends; what is broken ends the message."""
    value = 0
    for at in range(place, min(place + _MAX_VARINT_BYTES, len(message))):
        value |= (message[at] & 0x7F) << 7 * (at - place)
        if message[at] < 0x80:
            return value, at + 1
    return 0, len(message)
