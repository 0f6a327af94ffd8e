from __future__ import annotations

import struct

import pytest

from hycluster.engine.block_changes import decode_changes, encode_changes, is_changes
from hycluster.engine.messages import EngineCoreOutput, EngineCoreOutputs, encode


def name(number: int) -> bytes:
    return number.to_bytes(8, "big")


@pytest.mark.parametrize(("stored", "dropped"), [((), ()), ((1, 2**64 - 1), ()), ((), (7,)), ((3,), (5, 2**63))])
@pytest.mark.parametrize("whole", [True, False])
def test_what_was_written_is_read(stored: tuple[int, ...], dropped: tuple[int, ...], whole: bool) -> None:
    frame = encode_changes(2**63 + 5, map(name, stored), map(name, dropped), whole=whole)
    assert len(frame) == 14 + 8 * (len(stored) + len(dropped))
    assert is_changes(frame)
    read = decode_changes(memoryview(frame))
    assert (read.epoch, read.whole) == (2**63 + 5, whole)
    assert (tuple(read.stored.tolist()), tuple(read.dropped.tolist())) == (stored, dropped)


def test_outputs_are_something_else() -> None:
    outputs = [EngineCoreOutput(request_id="r", new_token_ids=[1])]
    for message in (EngineCoreOutputs(), EngineCoreOutputs(outputs=outputs * 20, timestamp=1.0)):
        (frame,) = encode(message)
        assert not is_changes(frame)
    assert not is_changes(b"")


def test_a_frame_that_is_cut_short_is_refused() -> None:
    frame = encode_changes(1, map(name, range(4)))
    with pytest.raises(ValueError, match="4 blocks stored, and names of 3"):
        decode_changes(frame[:-8])
    with pytest.raises(ValueError, match="multiple"):
        decode_changes(frame[:-1])
    with pytest.raises(struct.error):
        decode_changes(frame[:5])
