from __future__ import annotations

import random

from bench.overhead import BASE, SIDES, added_ms, compared, median_of, others_than


def test_bounds_hold_what_they_promise() -> None:
    """Skewed noise, as a machine with others' work has; the median of all is told within the bounds by 95 in 100."""
    draw, held = random.Random(3), 0
    true = 1.01
    for _ in range(400):
        found = median_of([true * draw.lognormvariate(0, 0.08) for _ in range(100)])
        assert found.low <= found.value <= found.high
        assert found.high - found.low < 0.07
        held += found.low <= true <= found.high
    assert held >= 0.92 * 400
    assert median_of([3.0, 1.0, 2.0]).low == 1.0


def test_sides_are_compared_within_a_block() -> None:
    # The machine is twice as slow in every other block.
    slow = [1.0, 2.0] * 20
    found = {side: [each * (1.02 if side == "traces-1" else 1.0) for each in slow] for side in SIDES}
    ratios = compared(found)
    assert BASE not in ratios
    assert round(ratios["traces-1"].high, 6) == round(ratios["traces-1"].low, 6) == 1.02
    assert ratios["off-again"].value == 1
    assert 0.02 <= added_ms(found, "traces-1").value <= 0.04
    assert others_than(0)
