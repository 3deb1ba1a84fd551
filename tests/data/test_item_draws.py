"""Drawing items a user has not rated."""

from __future__ import annotations

import numpy as np
import pytest

from alro_fast.data.item_draws import ItemDraws, first_new

COUNT = np.array([0, 3, 0, 1, 4])


@pytest.mark.parametrize(("by", "widths"), [("uniform", [1, 1, 1]), ("popularity", [3, 1, 4])])
def test_items_take_their_share_and_unrated_ones_none(by, widths):
    draws = ItemDraws(COUNT, by)
    assert draws.eligible.tolist() == [1, 3, 4]
    shares = (np.arange(2400) + 0.5).reshape(60, 40) / 2400
    items, times = np.unique(draws.at(shares), return_counts=True)
    assert items.tolist() == [1, 3, 4]
    np.testing.assert_array_equal(times, 2400 * np.array(widths) // sum(widths))
    assert draws.at(np.array([0.0, np.nextafter(1.0, 0.0)])).tolist() == [1, 4]


def test_the_first_new_proposals_and_no_proposal_more_than_needed():
    proposals, taken = iter([4, 2, 4, 3, 7, 9]), {2}
    assert first_new(proposals, 2, taken) == [4, 3]
    assert taken == {2, 3, 4}
    assert list(proposals) == [7, 9]
    assert first_new(iter([5]), 0, taken) == []
    assert first_new([3, 5], 4, taken) == [5]
