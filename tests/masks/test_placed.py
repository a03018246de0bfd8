"""Windows over documents and offsets: bounds, block lists, pictures, one token pair at a time."""

from dataclasses import asdict, dataclass

import oracle
import pytest
import torch
from block_grids import listed
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import EXAMPLES, windows
from strategies import Window as Letters

from flexlocal.masks import (
    KeyLayout,
    Window,
    documents_from_cu_seqlens,
    documents_from_positions,
    inspect,
)
from flexlocal.masks.block_intervals import Grid, Side
from flexlocal.masks.block_lists import block_lists
from flexlocal.masks.placed import place


@dataclass(frozen=True)
class Packing:
    """A window, its tokens, and where they stand, for some batch entries."""

    letters: Letters
    n: int
    m: int
    documents: tuple | None  # a row of numbers for each entry
    q_offset: tuple  # a number for each entry
    kv_offset: tuple
    as_numbers: bool
    seeing: tuple | None = None  # queries outside see nothing

    @property
    def entries(self):
        return len(self.q_offset)

    @property
    def given(self):
        """documents, q_offset and kv_offset, as tensors `(batch, ...)` or numbers."""
        documents = None
        if self.documents is not None:
            documents = torch.tensor(self.documents, dtype=torch.int32).reshape(-1, self.m)
        if self.as_numbers:
            return documents, self.q_offset[0], self.kv_offset[0]
        return documents, torch.tensor(self.q_offset), torch.tensor(self.kv_offset)

    @property
    def rule(self):
        documents, *offsets = self.given
        offsets = [x if self.as_numbers else x[:, None, None] for x in offsets]
        documents = None if documents is None else documents[:, None]
        window = Window(**asdict(self.letters))
        return place(window, self.n, self.m, documents, *offsets, seeing=self.seeing)

    @property
    def seen(self):
        """(entries, n, m) booleans, by brute force."""
        at = oracle.places(self.entries, self.n, self.m, *self.given)
        seen = oracle.seen_from(*at, self.letters.size, **self.letters.letters)
        first, stop = self.seeing or (0, self.n)
        seen[:, :first] = seen[:, stop:] = False
        return seen


@st.composite
def packings(draw, aligned=False, all_see=False):
    """`aligned` for as many queries as keys, each at a key."""
    n = m = draw(st.integers(1, 40))
    entries = draw(st.integers(1, 3))
    documents = None
    numbers = st.lists(st.integers(-1, 3), min_size=m, max_size=m).map(sorted)
    shuffled = st.lists(st.integers(-1, 2), min_size=m, max_size=m)
    offset = st.integers(-12, 50)
    offsets = st.lists(offset, min_size=entries, max_size=entries)
    as_numbers = draw(st.booleans())
    q_offset = draw(offsets)
    kv_offset = q_offset
    if not aligned:
        m = draw(st.integers(1, 40))
        numbers = st.lists(st.integers(-1, 3), min_size=m, max_size=m).map(sorted)
        shuffled = st.lists(st.integers(-1, 2), min_size=m, max_size=m)
        kv_offset = draw(offsets)
    if as_numbers:
        q_offset, kv_offset = q_offset[:1] * entries, kv_offset[:1] * entries
    if draw(st.booleans()):
        rows = st.lists(numbers | shuffled, min_size=entries, max_size=entries)
        documents = tuple(map(tuple, draw(rows)))
    letters = draw(windows())
    seeing = (
        None
        if all_see or draw(st.booleans())
        else tuple(sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=2))))
    )
    offsets = tuple(q_offset), tuple(kv_offset)
    return Packing(letters, n, m, documents, *offsets, as_numbers, seeing)


def bounds(rule, entry, side, count, others):
    """First and last of `others` for each of `count` queries or keys, clipped."""
    token = torch.arange(count)
    first, last = (torch.as_tensor(x).expand(count) for x in getattr(rule, side)(entry, 0, token))
    return first.clamp(0, others), last.clamp(-1, others - 1)


@settings(max_examples=3 * EXAMPLES)
@given(packings())
def test_bounds_are_what_queries_see_and_never_decrease(case):
    rule, seen = case.rule, case.seen
    for entry in range(case.entries):
        for side, pairs in (("keys", seen[entry]), ("queries", seen[entry].T)):
            count, others = pairs.shape
            first, last = bounds(rule, entry, side, count, others)
            index = torch.arange(others)
            found = (first[:, None] <= index) & (index <= last[:, None])
            assert torch.equal(found, pairs)
            assert (first.diff() >= 0).all() and (last.diff() >= 0).all()
    reach = rule.reach
    assert int(seen.sum(-1).max()) <= reach.keys


@settings(max_examples=3 * EXAMPLES)
@given(packings(), st.integers(1, 9))
def test_block_lists_name_every_block_that_is_touched_and_no_full_one_wrongly(case, block):
    queries, keys = Side(case.n, block), Side(case.m, block)
    lists = block_lists(Grid(case.rule, queries, keys, (case.entries, 1)), "cpu")
    lists = [x.expand(case.entries, *x.shape[1:]) for x in lists]
    for entry in range(case.entries):
        states = oracle.block_states(case.seen[entry], block, block)
        for side, true in ((lists[:4], states), (lists[4:], states.T)):
            partial, full = (
                listed(number[entry, 0], indices[entry, 0], *true.shape)
                for number, indices in (side[:2], side[2:])
            )
            assert not (partial & full).any()
            assert (full <= (true == 2)).all()
            assert ((partial | full) >= (true > 0)).all()


@settings(max_examples=2 * EXAMPLES)
@given(packings(aligned=True), st.integers(1, 5), st.integers(1, 9))
def test_xpos_lays_out_every_key_that_is_seen(case, windows_each, block):
    documents, offset, _ = case.given
    offset = offset if case.as_numbers else offset[:, None, None]
    documents = None if documents is None else documents[:, None]
    window = Window(**asdict(case.letters))
    rule = place(window, case.n, case.m, documents, offset, offset, seeing=case.seeing)
    layout = KeyLayout(rule, windows_each, case.n)
    slots = layout.all_slots
    key = layout.slot_keys("cpu")
    exists = (key >= 0) & (key < case.n)
    grid = Grid(layout, Side(case.n, block), Side(slots, block), (case.entries, 1))
    lists = block_lists(grid, "cpu")
    lists = [x.expand(case.entries, *x.shape[1:]) for x in lists]
    for entry in range(case.entries):
        query, slot = torch.arange(case.n)[:, None], torch.arange(slots)
        first, last = layout.keys(entry, 0, query)
        found = (first <= slot) & (slot <= last)
        assert not (found & ~exists).any()
        laid_out = torch.zeros(case.n, case.n, dtype=torch.long)
        laid_out.index_add_(1, key.clamp(0, case.n - 1), found.long())
        assert torch.equal(laid_out, case.seen[entry].long())  # each once
        states = oracle.block_states(found, block, block)
        for side, true in ((lists[:4], states), (lists[4:], states.T)):
            named = [
                listed(number[entry, 0], indices[entry, 0], *true.shape)
                for number, indices in (side[:2], side[2:])
            ]
            assert ((named[0] | named[1]) >= (true > 0)).all()
            assert (named[1] <= (true == 2)).all()


@given(packings(all_see=True), st.data())
def test_pictures_show_what_is_seen(case, data):
    entry = data.draw(st.integers(0, case.entries - 1))
    documents, q_offset, kv_offset = case.given
    picture = inspect(
        Window(**asdict(case.letters)), case.n, n_keys=case.m, batch=entry, documents=documents,
        q_offset=q_offset, kv_offset=kv_offset,
    )  # fmt: skip
    assert torch.equal(picture.dense(), case.seen[entry])
    queries, _ = oracle.places(case.entries, case.n, case.m, *case.given)
    i = data.draw(st.integers(0, case.n - 1))
    place, document = queries[entry][i]
    if document is not None and place != i:
        assert f"\nits position is {place}" in picture.query(i)


@given(
    st.lists(st.integers(0, 5), max_size=6),
    st.sampled_from([0, 1, 4, 300]),
    st.sampled_from([torch.uint8, torch.int8, torch.int32, torch.int64]),
)
def test_documents_from_cumulative_lengths(lengths, more, dtype):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    total = sum(lengths)
    expected = [number for number, length in enumerate(lengths) for _ in range(length)]
    found = documents_from_cu_seqlens(cu, total + more)
    assert found.dtype == torch.int32
    assert found.tolist() == expected + [-1] * more


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=3))
def test_documents_from_positions(rows):
    n = max(map(sum, rows))
    rows = [[*lengths, n - sum(lengths)] for lengths in rows]
    positions = [[i for length in lengths for i in range(length)] for lengths in rows]
    expected = [
        [number for number, length in enumerate(lengths) for _ in range(length)] for lengths in rows
    ]
    assert documents_from_positions(torch.tensor(positions)).tolist() == expected
    assert documents_from_positions(torch.tensor(positions[0])).tolist() == expected[0]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: documents_from_positions([0, 1]), "position_ids must be a tensor, got type list"),
        (
            lambda: documents_from_positions(torch.zeros(3)),
            "position_ids must be of an integer dtype, got torch.float32",
        ),
        (
            lambda: documents_from_positions(torch.zeros(1, 2, 3, dtype=torch.int32)),
            r"position_ids must have the shape \(batch, n\) or \(n,\), got \(1, 2, 3\)",
        ),
        (
            lambda: documents_from_cu_seqlens(torch.zeros(2, 3, dtype=torch.int32), 3),
            r"cu_seqlens must have the shape \(documents \+ 1,\), got \(2, 3\)",
        ),
        (
            lambda: documents_from_cu_seqlens(torch.tensor([0, 3]), -1),
            "n must be at least 0, got -1",
        ),
        (
            lambda: inspect(3, 5, documents=torch.zeros(2, 4, dtype=torch.int64)),
            r"documents must have the shape \(batch, 5\) or \(5,\), got \(2, 4\)",
        ),
        (
            lambda: inspect(3, 5, batch=2, q_offset=torch.tensor([1, 2])),
            "batch must be below the 2 entries of q_offset, got 2",
        ),
        (
            lambda: inspect(3, 5, kv_offset=torch.tensor(1)),
            r"kv_offset must have the shape \(batch,\), got \(\)",
        ),
        (
            lambda: inspect(3, 5, q_offset=1.0),
            "q_offset must be an int or a tensor, got type float",
        ),
        (
            lambda: inspect(KeyLayout(Window(2), 1, 5), 5, q_offset=1),
            "documents, q_offset and kv_offset must be None but with a Window, got KeyLayout",
        ),
    ],
)
def test_what_is_no_packing_is_refused(call, says):
    with pytest.raises((ValueError, TypeError), match=f"^{says}$"):
        call()
