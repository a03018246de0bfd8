"""Where documents begin, from what ranks tell of theirs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded import cuts
from strategies import EXAMPLES

from flexlocal.distributed.documents import begin_of_first, begins, summary
from flexlocal.distributed.plan import runs


@st.composite
def packings(draw):
    n = draw(st.integers(1, 30))
    row = st.lists(st.integers(-1, 2), min_size=n, max_size=n)
    return draw(st.lists(row, min_size=1, max_size=3)), draw(cuts(n, draw(st.integers(1, 6))))


@settings(max_examples=EXAMPLES // 2)
@given(packings())
def test_every_rank_knows_where_its_documents_begin(drawn):
    rows, lengths = drawn
    documents, owns = torch.tensor(rows), runs(lengths)
    parts = [documents[:, own.start : own.stop] for own in owns]
    told = torch.stack([summary(part, own) for part, own in zip(parts, owns, strict=True)])
    found = [begins(part, told, owns, rank) for rank, part in enumerate(parts)]
    for row, ours in zip(rows, torch.cat(found, dim=1).tolist(), strict=True):
        start = 0
        for i, number in enumerate(row):
            if i > 0 and number != row[i - 1]:
                start = i
            assert ours[i] == (start if number >= 0 else -1)


@pytest.mark.parametrize(
    ("index", "offset", "position"),
    [(0, 7, 0), (3, 7, 10), (-1, 7, 0), (3, -5, 0), (9, -5, 4), (9, 0, 9)],
)
def test_the_first_document_of_a_run_begins_at_position(index, offset, position):
    for given_offset in (offset, torch.tensor([offset])):
        found = begin_of_first(torch.tensor([[index, 20]]), given_offset, 6)
        assert found.tolist() == [position]


def test_batches_of_documents_and_offsets_meet_row_by_row():
    found = begin_of_first(torch.tensor([[2], [5]]), torch.tensor([0, 10, 20]), 6)
    assert found.tolist() == [2, 2, 12, 15, 25, 25]
