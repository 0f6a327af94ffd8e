from __future__ import annotations

from hycluster.page.plots import bars, line


def test_bars_stand_on_the_ground_and_what_went_wrong_on_them() -> None:
    plot = bars([(6, 2), (4, 0), (0, 0)], [60, 120, 180])
    assert (plot.most, plot.begins_at) == (8, 60)
    assert [(bar.x, bar.width) for bar in plot.bars] == [(1.0, 198.0), (201.0, 198.0), (401.0, 198.0)]
    assert [(bar.good_y, bar.good_height, bar.bad_y, bar.bad_height) for bar in plot.bars] == [
        (25.0, 75.0, 0.0, 25.0),
        (50.0, 50.0, 50.0, 0.0),
        (100.0, 0.0, 100.0, 0.0),
    ]


def test_a_line_is_broken_where_nothing_was_measured() -> None:
    plot = line([None, 2.0, 1.0, None, 2.0, None])
    assert plot.lines == ("101.0,0.0 199.0,0.0 299.0,50.0", "401.0,0.0 499.0,0.0")


def test_nothing_to_draw() -> None:
    assert not bars([(0, 0)] * 3, [1, 2, 3]).bars
    assert not line([None, None]).lines
    assert bars([], []).most == line([]).most == 0
