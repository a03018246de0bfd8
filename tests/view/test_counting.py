"""What rows see, counted from the ends of intervals, against a dense grid."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from flexlocal.masks import Reach, Rule
from flexlocal.masks.view.counting import Intervals, bounds_of


@given(
    st.lists(st.tuples(st.integers(-5, 25), st.integers(-5, 25)), min_size=1, max_size=20),
    st.lists(st.booleans(), min_size=1, max_size=20),
    st.integers(1, 6),
    st.booleans(),
)
def test_counts_are_those_of_a_dense_grid(ends, kept, step, hides):
    """Ends in any order, inside the grid or not."""
    first, last = torch.tensor(ends).unbind(1)
    column, mask = torch.arange(len(kept)), torch.tensor(kept) | (not hides)
    seen = (first[:, None] <= column) & (column <= last[:, None]) & mask
    found = Intervals(
        len(ends), len(kept), lambda rows: (first[rows], last[rows]), mask if hides else None
    )
    assert torch.cat(list(found.counts())).tolist() == seen.sum(1).tolist()
    cells = [[int(part.sum()) for part in row.split(step, 1)] for row in seen.split(step)]
    assert found.cells(step).tolist() == cells


def test_bounds_may_be_ints():
    class Prefix(Rule):
        reach = Reach(keys=3, back=9, ahead=3, label="prefix")

        def keys(self, batch, head, query):
            return 0, 2

        def queries(self, batch, head, key):
            raise AssertionError("pictures ask for keys alone")

    first, last = bounds_of(Prefix(), torch.arange(4))
    assert first.tolist() == [0] * 4 and last.tolist() == [2] * 4
