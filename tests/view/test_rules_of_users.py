"""A rule that this file alone defines is pictured, described and block-mapped as any window is."""

import re
from dataclasses import dataclass

import oracle
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import drawing, drawn, kinds_of, read_html, read_text

from flexlocal.masks import Reach, Rule, Window, inspect
from flexlocal.masks.view.symbols import BLOCKS, TOKENS


@dataclass(frozen=True, eq=False)
class SizesByEntry(Rule):
    """A query sees so many keys up to its own: ``sizes``, int64 ``(batch, heads)``."""

    sizes: torch.Tensor

    def keys(self, batch, head, query):
        return query - self.sizes[batch, head] + 1, query

    def queries(self, batch, head, key):
        return key, key + self.sizes[batch, head] - 1

    @property
    def reach(self):
        most = int(self.sizes.max())
        return Reach(keys=most, back=max(most - 1, 0), ahead=0, label="sizes_by_entry")


@dataclass(frozen=True, eq=False)
class Documents(Rule):
    """A query sees its document up to itself: ``starts``, int64 ``(batch, n)``, of each query's."""

    starts: torch.Tensor
    words = "a query sees its document up to itself"

    def keys(self, batch, head, query):
        return self.starts[batch, query], query

    def queries(self, batch, head, key):
        raise AssertionError("pictures ask for keys alone")

    @property
    def reach(self):
        n = self.starts.shape[1]
        return Reach(keys=n, back=n - 1, ahead=0, label="documents")


@st.composite
def entries(draw):
    """A rule of this file, an entry, a length, and the mask that the entry stands for."""
    n, batch, heads = draw(st.integers(1, 24)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    entry = draw(st.integers(0, batch - 1)), draw(st.integers(0, heads - 1))
    i, j = torch.arange(n)[:, None], torch.arange(n)
    if draw(st.booleans()):
        sizes = [[draw(st.integers(0, 9)) for _ in range(heads)] for _ in range(batch)]
        size = sizes[entry[0]][entry[1]]
        return SizesByEntry(torch.tensor(sizes)), entry, (j <= i) & (i - j < size)
    # A document begins at token 0 and where a bit is set.
    begins = torch.tensor([[True, *draw(bits(n - 1))] for _ in range(batch)])
    starts = torch.where(begins, torch.arange(n), 0).cummax(1).values
    document = begins[entry[0]].cumsum(0)
    return Documents(starts), entry, (j <= i) & (document[:, None] == document)


def bits(count):
    return st.lists(st.booleans(), min_size=count, max_size=count)


@given(entries(), st.data(), st.integers(1, 9), st.integers(1, 9))
def test_its_pictures_and_numbers_are_those_of_its_mask(case, data, query_block, key_block):
    rule, (batch, head), whole = case
    n = len(whole)
    key_mask = torch.tensor(data.draw(bits(n))) if data.draw(st.booleans()) else None
    seen = whole if key_mask is None else whole & key_mask
    kinds = kinds_of(seen, whole & ~seen)
    picture = inspect(
        rule, n, key_mask=key_mask, block_size=(query_block, key_block), batch=batch, head=head
    )
    assert torch.equal(picture.dense(), seen)
    text = picture.text(color=False, plain=True)
    assert [row for _, row in read_text(text, TOKENS, plain=True)] == kinds.tolist()
    assert torch.equal(read_html(picture.html(), TOKENS), kinds)

    found, per_query = picture.describe(), seen.sum(1)
    assert found.scores == int(seen.sum())
    assert (found.least_keys, found.most_keys) == (int(per_query.min()), int(per_query.max()))
    assert found.blind_queries == int((per_query == 0).sum())
    i = data.draw(st.integers(0, n - 1))
    assert f"query {i} sees {int(per_query[i]) or 'no'} key" in picture.query(i)
    assert ("own included" in picture.query(i)) == bool(seen[i, i])

    states = picture.blocks.states()
    expected = oracle.block_states(seen, query_block, key_block)
    if key_mask is None and whole.any(1).all():
        assert torch.equal(states, expected)
    else:  # a block whose pairs are all hidden, or among whose queries one is blind, may be partial
        assert torch.equal(states == 2, expected == 2)
        assert ((states > 0) >= (expected > 0)).all()
    text = picture.blocks.text(color=False, plain=True)
    assert [row for _, row in read_text(text, BLOCKS, plain=True)] == states.tolist()
    assert drawing(picture.blocks.html(), "blocks") is not None


def test_each_entry_has_its_own_blocks():
    sizes = torch.tensor([[2, 3], [5, 7]])
    apart = torch.arange(9)[:, None] - torch.arange(9)
    for batch, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        found = inspect(SizesByEntry(sizes), 9, block_size=1, batch=batch, head=head)
        seen = (apart >= 0) & (apart < sizes[batch, head])
        assert torch.equal(found.blocks.states(), 2 * seen)


def test_what_is_said_of_windows_is_not_said_of_rules_made_of_one():
    class MadeOfAWindow(SizesByEntry):
        window = Window(3, causal=True)

    picture = inspect(MadeOfAWindow(torch.tensor([[3]])), 200, block_size=16)
    (line,) = picture.describe().advice
    assert line.endswith("smaller blocks would waste less")
    assert picture.query(5) == "query 5 sees 3 keys: 3 to 5, the query's own included"


def test_a_title_says_which_entry_is_shown():
    rule = SizesByEntry(torch.tensor([[2, 3], [5, 7]]))
    assert inspect(rule, 9).title == "sizes_by_entry, 9 queries, 9 keys"
    picture = inspect(rule, 9, block_size=4, batch=1)
    assert picture.title == "sizes_by_entry, 9 queries, 9 keys, batch entry 1, head 0"
    assert picture.blocks.title.endswith("by 4 keys, batch entry 1, head 0")


def test_words_default_to_the_label():
    sizes, documents = (
        SizesByEntry(torch.tensor([[2]])),
        Documents(torch.tensor([[0, 0, 2, 2, 2]])),
    )
    assert inspect(sizes, 5).describe().words == "sizes_by_entry"
    assert inspect(documents, 5).text().splitlines()[1] == Documents.words
    assert inspect(documents, 5).query(3) == "query 3 sees 2 keys: 2 to 3, the query's own included"


def test_a_png_shows_the_entry():
    rule = SizesByEntry(torch.tensor([[2], [5]]))
    first, other = (drawn(inspect(rule, 9, batch=batch).png).text for batch in (0, 1))
    assert first["Title"] == "sizes_by_entry" and re.search("entry 1", other["Description"])
    assert first["Digest"] != other["Digest"]
